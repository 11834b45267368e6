"""Disk of a run folder and memory of a host, from the formats that are written, in bytes.

The index's numbers are `engine.index.estimate`'s, for the plan that `engine.index.plan` makes; the others follow from
the file formats: a tar's headers and blocks (`shards.writer`), an array's numbers (`shards.embeddings`,
`engine.data.candidates`), float32 weights and moments (`engine.training.state`, `engine.models.weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from tarfile import BLOCKSIZE

from engine.config.recipe import Config
from engine.index.estimate import IndexEstimate, estimate_index
from engine.index.plan import IndexPlan, cut_parts
from launcher.plan.corpus import Corpus
from launcher.plan.memory import idle_bytes
from launcher.plan.models import ModelShape

_JSON_BYTES = 45
"""Of a document's record beside its text: keys, quotes, id."""
_OFFSET_BYTES, _DOCID_BYTES = 16, 24 + 9
_POSTING_BYTES = 8
"""Of BM25: a document's number and a score, for each different word of a document."""
_INDEXED_WORDS = 0.55
"""Of a text's words, those that are no stop words."""
_CANDIDATE_BYTES = 8 + 4
_QID_BYTES = 16
_WEIGHT_BYTES, _STATE_BYTES = 4, 12
_MARKER_BYTES, _HEADER_BYTES = 470, 128
PROCESS_BYTES = 2 * 2**30
"""Of a rank's process on a GPU before it loads anything: torch, CUDA's libraries, pinned buffers (assumed)."""
CPU_PROCESS_BYTES = 2**29
"""The same of a rank on a CPU (measured: 0.45 GB)."""
STATE_FILE_BYTES = 2**28
"""As in `engine.training.state`, whose import takes DeepSpeed's seconds; a test holds them together."""
_QUERY_BYTES = 3_000
"""Of a query in a rank's memory: text, judgements, token ids as Python objects."""
DEFAULT_DOCUMENTS_PER_SHARD = (500, 250, 20_000)
"""Shards wanted, and the fewest and most documents of one, as in engine.data.tokenization."""


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes in the run folder by kind: at the end, and at the fullest moment."""

    shards: int
    bm25: int
    embeddings: int
    """Of one iteration."""
    index: int
    """Of one iteration, finished."""
    index_building: int
    """Of one iteration while it is built: parts and the merged file."""
    indexes_kept: int
    """Iterations whose embeddings and index lie there at the fullest moment, the new one not counted."""
    candidates: int
    weights: int
    checkpoints: int
    checkpoints_writing: int
    """Of the largest that is written while the old ones are kept."""
    exports: int

    @property
    def parts(self) -> dict[str, tuple[int, str]]:
        """Kind -> (bytes at the fullest moment, how that comes about)."""
        kept = self.indexes_kept
        return {
            "token shards": (self.shards, "once, before any training"),
            "BM25 index": (self.bm25, "once"),
            "embeddings": ((kept + 1) * self.embeddings, f"{kept} kept and the new one"),
            "index": (kept * self.index + self.index_building, f"{kept} kept and the new one with its parts"),
            "candidates": (self.candidates, "of every iteration, and BM25's"),
            "weights": (self.weights, "of every iteration"),
            "checkpoints": (self.checkpoints + self.checkpoints_writing, "those kept and the one being written"),
            "exports": (self.exports, "at the end"),
        }

    @property
    def peak(self) -> int:
        """At the fullest moment: nothing that was made early goes later, but indexes and checkpoints."""
        return sum(size for size, _ in self.parts.values())


def shard_sizes(config: Config, documents: int) -> list[int]:
    """Return the documents of each shard, as `engine.data.tokenization` cuts them."""
    wanted, fewest, most = DEFAULT_DOCUMENTS_PER_SHARD
    size = config.data.documents_per_shard or min(most, max(fewest, documents // wanted))
    return [min(size, documents - start) for start in range(0, documents, size)]


def shard_bytes(text_bytes: float, tokens: list[float]) -> float:
    """Return what a document takes in a tar of shards and beside it, on average.

    Args:
        text_bytes: Of title and text.
        tokens: Ids of each token stream.
    """
    payloads = [text_bytes + _JSON_BYTES, *(4 * count for count in tokens)]
    # A member has a header of one block; its payload fills the last block by half on average.
    members = sum(BLOCKSIZE + max(BLOCKSIZE, payload + BLOCKSIZE / 2) for payload in payloads)
    return members + _OFFSET_BYTES * len(payloads) + _DOCID_BYTES


def token_streams(config: Config, corpus: Corpus, retriever: ModelShape, ranker: ModelShape) -> list[float]:
    """Return the tokens of a document in each stream: one where both models have the same tokenizer.

    Whether they have is known from the tokenizers alone; equal names or vocabularies are taken for it.
    """
    lengths = [config.retriever.max_length, config.ranker.max_length]
    same = config.retriever.name == config.ranker.name or (
        retriever.embedding // retriever.hidden == ranker.embedding // ranker.hidden
    )
    return [min(corpus.tokens, length) for length in ([max(lengths)] if same else lengths)]


def index_needs(config: Config, corpus: Corpus, plan: IndexPlan, dimension: int, gigaflops: float) -> IndexEstimate:
    """Return what one iteration's index takes, from the engine's own estimate."""
    parts = cut_parts(shard_sizes(config, corpus.documents))
    width = 2 if config.index.embedding_dtype == "float16" else 4
    return estimate_index(
        plan,
        num_documents=corpus.documents,
        dimension=dimension,
        num_parts=len(parts),
        embedding_bytes=width,
        gigaflops=gigaflops,
    )


def mined_queries(config: Config, corpus: Corpus, iteration: int) -> int:
    """Return the training queries whose candidates an iteration retrieves."""
    if config.ar2.mine == "all":
        return corpus.train
    steps = config.warmup_ranker.steps * config.warmup_ranker.batch_size if iteration == 0 else 0
    game = config.ar2
    steps += game.retriever.steps * game.retriever.batch_size + game.ranker.steps * game.ranker.batch_size
    return min(corpus.train, steps)


def disk_use(
    config: Config, corpus: Corpus, retriever: ModelShape, ranker: ModelShape, needs: IndexEstimate
) -> DiskUse:
    """Estimate the run folder.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        retriever: Its shape.
        ranker: Its shape.
        needs: From `index_needs`.
    """
    documents, iterations = corpus.documents, config.ar2.iterations
    num_shards = len(shard_sizes(config, documents))
    both = retriever.parameters + ranker.parameters
    bm25_queries = corpus.train
    if config.ar2.mine == "sampled":
        bm25_queries = min(corpus.train, config.warmup_retriever.steps * config.warmup_retriever.batch_size)
    mined = sum(mined_queries(config, corpus, iteration) for iteration in range(iterations + 1))
    candidates = bm25_queries * (config.warmup_retriever.bm25_depth * _CANDIDATE_BYTES + _QID_BYTES)
    candidates += mined * (config.ar2.top_k * _CANDIDATE_BYTES + _QID_BYTES)
    return DiskUse(
        shards=int(documents * shard_bytes(corpus.text_bytes, token_streams(config, corpus, retriever, ranker))),
        bm25=int(documents * corpus.words * _INDEXED_WORDS * _POSTING_BYTES),
        embeddings=needs.embeddings_bytes + num_shards * (_MARKER_BYTES + _HEADER_BYTES),
        index=needs.merged_bytes or needs.parts_bytes,
        index_building=needs.merged_bytes + needs.parts_bytes,
        indexes_kept=min(iterations, config.run.keep_indexes) + config.evaluation.zero_shot + (iterations > 0),
        candidates=candidates,
        weights=_WEIGHT_BYTES * (both * (iterations + 1) + retriever.parameters * config.evaluation.zero_shot),
        checkpoints=_STATE_BYTES * sum(size * count for size, count in _checkpoints(config, retriever, ranker)),
        checkpoints_writing=_STATE_BYTES * max(retriever.parameters, ranker.parameters),
        exports=_WEIGHT_BYTES * both,
    )


def host_memory(
    config: Config,
    corpus: Corpus,
    retriever: ModelShape,
    ranker: ModelShape,
    plan: IndexPlan,
    needs: IndexEstimate,
    *,
    ranks_per_host: int,
    world_size: int,
    training: int | None,
) -> dict[str, tuple[int, str]]:
    """Estimate the memory of the host that needs most, the one with rank 0.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        retriever: Its shape.
        ranker: Its shape.
        plan: Of the index.
        needs: What the index takes.
        ranks_per_host: Ranks on it.
        world_size: Ranks in all.
        training: Where ranks compute on the CPU, what each holds of models and activations at most; None on GPUs.

    Returns:
        What -> (bytes, how that comes about). Files that are mapped (shards, embeddings, docids, candidates, BM25)
        lie in the page cache and are not counted, but for docids.
    """
    searched = needs.index_bytes if plan.placement == "memory" and not plan.exact else 0
    offloaded = 0
    if training is None:
        for shape, section in ((retriever, config.retriever), (ranker, config.ranker)):
            offloaded += offloaded_bytes(shape, section.precision, section.zero_stage, world_size)
    bm25 = int(corpus.documents * corpus.words * _INDEXED_WORDS * 2 * _POSTING_BYTES)
    gathered = 2 * _WEIGHT_BYTES * max(retriever.parameters, ranker.parameters)
    process = PROCESS_BYTES if training is None else CPU_PROCESS_BYTES
    return {
        "processes": (ranks_per_host * process, f"{ranks_per_host} of {process / 2**30:g} GiB, assumed"),
        "models": (ranks_per_host * (training or 0), "of each rank, in the phase that needs most"),
        "queries": (ranks_per_host * (corpus.train + corpus.dev + corpus.test) * _QUERY_BYTES, "of each rank"),
        "docids": (corpus.documents * _DOCID_BYTES, "mapped, shared by the ranks"),
        "offloaded engines": (ranks_per_host * offloaded, "both at rest, while the corpus is encoded and searched"),
        "index": (ranks_per_host * searched, "loaded by each rank" if searched else "searched from disk"),
        "index training": (needs.training_bytes, "rank 0, at each refresh"),
        "index filling": (ranks_per_host * needs.rank_bytes, "each rank, at each refresh"),
        "BM25 building": (bm25, "rank 0, once"),
        "weights gathered": (gathered, "rank 0, when they are published"),
        "checkpoint files": (ranks_per_host * 2 * STATE_FILE_BYTES, "each rank, while one is written"),
    }


def host_peak(parts: dict[str, tuple[int, str]]) -> int:
    """Return the most of a host at a time: what stays, and the largest of what takes turns."""
    turns = ("index", "index training", "index filling", "BM25 building", "weights gathered", "checkpoint files")
    lasting = sum(size for name, (size, _) in parts.items() if name not in turns)
    filling = parts["index training"][0], parts["index filling"][0]
    return lasting + max(max(filling), *(parts[name][0] for name in turns if name not in ("index training",)))


def offloaded_bytes(shape: ModelShape, precision: str, stage: int, world_size: int) -> int:
    """Return what a rank's engine takes in host memory while it is out of the GPU's way."""
    element = 4 if precision == "fp32" else 2
    share = -(-shape.parameters // world_size)
    if stage == 0:
        return shape.parameters * (element + (12 if precision != "fp32" else 8)) - idle_bytes(shape, precision, stage)
    return (share if stage == 3 else shape.parameters) * element + 12 * share + (element * share if stage == 3 else 0)


def _checkpoints(config: Config, retriever: ModelShape, ranker: ModelShape) -> list[tuple[int, int]]:
    """Return for each model its parameters and the number of checkpoints that are kept."""
    settings, game = config.run, config.ar2
    stages = {
        "retriever": [config.warmup_retriever.steps, *[game.retriever.steps] * game.iterations],
        "ranker": [config.warmup_ranker.steps, *[game.ranker.steps] * game.iterations],
    }
    result = []
    for name, shape in (("retriever", retriever), ("ranker", ranker)):
        saved = [
            step
            for steps in stages[name]
            for step in {*range(settings.checkpoint_every_steps, steps + 1, settings.checkpoint_every_steps), steps}
            if step
        ]
        kept = min(len(saved), settings.keep_checkpoints)
        if settings.keep_every_steps is not None:
            kept += sum(step % settings.keep_every_steps == 0 for step in saved)
        kept += settings.keep_best is not None
        result.append((shape.parameters, kept))
    return result

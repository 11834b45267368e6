"""Disk of a run folder and memory of a host, from the formats that are written, in bytes.

The index's numbers are `engine.index.estimate`'s, for the plan that `engine.index.plan` makes; the others follow from
the file formats: a tar's headers and blocks (`shards.writer`), an array's numbers (`shards.embeddings`,
`engine.data.candidates`), float32 weights and moments (`engine.training.state`, `engine.models.weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from tarfile import BLOCKSIZE

from engine.config.ar2 import DENSE
from engine.config.recipe import Config
from engine.config.timetable import Mining, Timetable
from engine.evaluation.chosen import plays_iterations
from engine.index.estimate import IndexEstimate, estimate_index
from engine.index.plan import IndexPlan, cut_parts
from launcher.plan.bm25 import bm25_use
from launcher.plan.corpus import Corpus
from launcher.plan.memory import idle_bytes
from launcher.plan.models import ModelShape, all_of, encoder_of

_JSON_BYTES = 45
"""Of a document's record beside its text: keys, quotes, id."""
_OFFSET_BYTES, _DOCID_BYTES = 16, 24 + 9
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
    """Of one iteration while it is built: parts and the merged file, or the sample that trains it before."""
    indexes_kept: int
    """Iterations whose embeddings and index lie there at the fullest moment, the new one not counted."""
    candidates: int
    weights: int
    checkpoints: int
    checkpoints_writing: int
    """Of the largest that is written while the old ones are kept."""
    exports: int
    postings: int = 0
    """Of all states of lexical retrievers."""
    gathered: int | None = None
    """Where embeddings lie on the hosts: those that are copied into the run folder at the end; None where all do."""

    @property
    def local_bytes(self) -> int:
        """On the hosts' own disks together, at the fullest moment."""
        return 0 if self.gathered is None else (self.indexes_kept + 1) * self.embeddings

    @property
    def parts(self) -> dict[str, tuple[int, str]]:
        """Kind -> (bytes at the fullest moment, how that comes about)."""
        kept = self.indexes_kept
        return {
            "token shards": (self.shards, "once, before any training"),
            **({"BM25 index": (self.bm25, "once, when all parts are counted")} if self.bm25 else {}),
            "embeddings": ((kept + 1) * self.embeddings, f"{kept} kept and the new one")
            if self.gathered is None
            else (self.gathered, "copied from the hosts at the end"),
            "index": (kept * self.index + self.index_building, f"{kept} kept and the new one with its parts"),
            **({"postings": (self.postings, "of every state of a lexical retriever")} if self.postings else {}),
            "candidates": (self.candidates, "of every iteration, and of the first phase"),
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


def token_streams(config: Config, corpus: Corpus, shapes: Mapping[str, ModelShape]) -> list[float]:
    """Return the tokens of a document in each stream: models with the same tokenizer share one.

    Whether they have is known from the tokenizers alone; equal names or vocabularies are taken for it.
    """
    words = {model: shape.embedding // shape.hidden for model, shape in shapes.items()}

    def alike(one: str, other: str) -> bool:
        return config.models[one].name == config.models[other].name or words[one] == words[other]

    lengths: dict[str, int] = {}  # by the first model of each stream
    for model, section in config.models.items():
        first = next((other for other in lengths if alike(model, other)), model)
        lengths[first] = max(lengths.get(first, 0), section.stored_length)
    return [min(corpus.tokens, length) for length in lengths.values()]


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


def refreshes(timetable: Timetable) -> list[Mining]:
    """Return the minings for which a trained model encodes the corpus anew; postings are `plan.postings`'s."""
    return [one for one in timetable.minings if one.retriever == DENSE and not one.is_of_start]


def mining_of_start(timetable: Timetable) -> Mining | None:
    """Return the mining that searches with a model before any training; None without one."""
    return next((mining for mining in timetable.minings if mining.is_of_start), None)


def searches_start(config: Config) -> bool:
    """Tell whether a model encodes the corpus before any training: to be measured, or for a warm-up's negatives."""
    return config.evaluation.zero_shot or mining_of_start(config.timetable) is not None


def mined_queries(timetable: Timetable, corpus: Corpus, mining: Mining) -> int:
    """Return the training queries whose candidates are retrieved.

    A phase of the iterations counts for all of a retriever's minings, although the first or the last one may be drawn
    from by fewer phases than the others.
    """
    if timetable.mine_all:
        return corpus.train
    alike = {
        other.name
        for other in timetable.minings
        if (other.retriever, other.model, other.is_of_start) == (mining.retriever, mining.model, mining.is_of_start)
    }
    if timetable.refreshes is not None:  # they differ in how many visits draw from them: the largest stands for all
        drawn = max(
            sum(len(visit.places) for visit in timetable.drawing_from(name) if is_own or not visit.phase.is_warmup)
            for name, is_own in [(mining.name, True), *((other, False) for other in alike)]
        )
        return min(corpus.train, drawn)
    drawn = sum(
        phase.steps * phase.batch_size
        for phase in timetable.phases
        if mining.name in phase.candidates or (not phase.is_warmup and alike.intersection(phase.candidates))
    )
    return min(corpus.train, drawn)


def disk_use(
    config: Config, corpus: Corpus, shapes: Mapping[str, ModelShape], needs: IndexEstimate | None, *, postings: int = 0
) -> DiskUse:
    """Estimate the run folder.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        shapes: Of all models, by name.
        needs: From `index_needs`; None where no dense index is searched.
        postings: Bytes of lexical retrievers' postings, of all their states.
    """
    documents, table = corpus.documents, config.timetable
    num_shards = len(shard_sizes(config, documents))
    later = max(0, len(refreshes(table)) - 1)
    newest = min(later, config.run.keep_indexes)
    # The index of an iteration that is best may be older than those.
    best = later > newest and plays_iterations(config) and config.evaluation.iteration == "best"
    candidates = sum(
        mined_queries(table, corpus, mining) * (mining.top_k * _CANDIDATE_BYTES + _QID_BYTES)
        for mining in table.minings
    )
    candidates += sum(  # those that a newer retriever scores anew, beside what they were
        min(corpus.train, sum(len(visit.places) for visit in visits))
        * (table.mining(visits[0].candidates).top_k * _CANDIDATE_BYTES + _QID_BYTES)
        for visits in table.rescored.values()
    )
    published = sum(shape.weights * _published(table, model) for model, shape in shapes.items())
    if needs is None:
        zero_shot = sum(shape.weights for shape in shapes.values())
    else:
        zero_shot = shapes[encoder_of(config)].weights * searches_start(config)
    kept = sum(shape.parameters * _checkpoints_kept(config, model) for model, shape in shapes.items())
    return DiskUse(
        shards=int(documents * shard_bytes(corpus.text_bytes, token_streams(config, corpus, shapes))),
        bm25=bm25_use(config, corpus, shard_sizes(config, documents)).disk_bytes,
        embeddings=needs.embeddings_bytes + num_shards * (_MARKER_BYTES + _HEADER_BYTES) if needs else 0,
        index=needs.merged_bytes or needs.parts_bytes if needs else 0,
        index_building=max(needs.merged_bytes + needs.parts_bytes, needs.sample_bytes) if needs else 0,
        indexes_kept=newest + best + searches_start(config) + (later > 0) if needs else 0,
        candidates=candidates,
        weights=_WEIGHT_BYTES * (published + zero_shot),
        checkpoints=_STATE_BYTES * kept,
        checkpoints_writing=_STATE_BYTES * max(shape.parameters for shape in shapes.values()),
        exports=_WEIGHT_BYTES * sum(shape.weights for shape in shapes.values()),
        postings=postings,
        gathered=_gathered(config, needs),
    )


def _gathered(config: Config, needs: IndexEstimate | None) -> int | None:
    if config.index.embeddings == "shared" or needs is None:
        return None
    return needs.embeddings_bytes if config.index.gather_embeddings else 0


def host_memory(
    config: Config,
    corpus: Corpus,
    shapes: Mapping[str, ModelShape],
    plan: IndexPlan,
    needs: IndexEstimate,
    *,
    ranks_per_host: int,
    world_size: int,
    training: int | None,
    postings: int = 0,
) -> dict[str, tuple[int, str]]:
    """Estimate the memory of the host that needs most, the one with rank 0.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        shapes: Of all models, by name.
        plan: Of the index.
        needs: What the index takes.
        ranks_per_host: Ranks on it.
        world_size: Ranks in all.
        training: Where ranks compute on the CPU, what each holds of models and activations at most; None on GPUs.
        postings: What a rank holds while a lexical retriever encodes or searches.

    Returns:
        What -> (bytes, how that comes about). Files that are mapped (shards, embeddings, docids, candidates, BM25)
        lie in the page cache and are not counted, but for docids.
    """
    searched = needs.index_bytes if plan.placement == "memory" and not plan.exact else 0
    offloaded = 0
    if training is None:
        for model, section in config.models.items():
            shape = shapes[model]
            offloaded += offloaded_bytes(shape, section.precision, section.zero_stage, world_size)
    learning = ranks_per_host * needs.training_bytes + needs.rotation_bytes
    bm25 = bm25_use(config, corpus, shard_sizes(config, corpus.documents)).rank_bytes
    gathered = 2 * _WEIGHT_BYTES * max(shape.weights for shape in shapes.values())
    at_rest = f"{all_of(len(shapes))} at rest, while the corpus is encoded and searched"
    process = PROCESS_BYTES if training is None else CPU_PROCESS_BYTES
    companions = config.refresh_devices or (ranks_per_host if config.timetable.beside else 0)
    num_processes = ranks_per_host + companions
    return {
        "processes": (num_processes * process, f"{num_processes} of {process / 2**30:g} GiB, assumed"),
        "models": (ranks_per_host * (training or 0), "of each rank, in the phase that needs most"),
        "queries": (ranks_per_host * (corpus.train + corpus.dev + corpus.test) * _QUERY_BYTES, "of each rank"),
        "docids": (corpus.documents * _DOCID_BYTES, "mapped, shared by the ranks"),
        "offloaded engines": (ranks_per_host * offloaded, at_rest),
        "index": (ranks_per_host * searched, "loaded by each rank" if searched else "searched from disk"),
        "index training": (learning, "each rank, at each refresh"),
        "index filling": (ranks_per_host * needs.rank_bytes, "each rank, at each refresh"),
        "postings": (ranks_per_host * postings, "each rank, while a lexical retriever encodes or searches"),
        "BM25 building": (ranks_per_host * bm25, "each rank, once, of a part of the corpus at a time"),
        "weights gathered": (gathered, "rank 0, when they are published"),
        "checkpoint files": (ranks_per_host * 2 * STATE_FILE_BYTES, "each rank, while one is written"),
    }


def host_peak(parts: dict[str, tuple[int, str]]) -> int:
    """Return the most of a host at a time: what stays, and the largest of what takes turns."""
    turns = (
        *("index", "index training", "index filling", "postings"),
        *("BM25 building", "weights gathered", "checkpoint files"),
    )
    lasting = sum(size for name, (size, _) in parts.items() if name not in turns)
    filling = parts["index training"][0], parts["index filling"][0]
    return lasting + max(max(filling), *(parts[name][0] for name in turns if name not in ("index training",)))


def offloaded_bytes(shape: ModelShape, precision: str, stage: int, world_size: int) -> int:
    """Return what a rank's engine takes in host memory while it is out of the GPU's way."""
    element = 4 if precision == "fp32" else 2
    share = -(-shape.parameters // world_size)
    frozen = element * (-(-shape.frozen // world_size) if stage == 3 else shape.frozen)
    if stage == 0:
        moments = 12 if precision != "fp32" else 8
        return frozen + shape.parameters * (element + moments) - idle_bytes(shape, precision, stage)
    weights = (share if stage == 3 else shape.parameters) * element
    return frozen + weights + 12 * share + (element * share if stage == 3 else 0)


def _published(timetable: Timetable, model: str) -> int:
    """Return how often a model's weights are published: once for each iteration in which a phase trains it."""
    return len({visit.iteration for phase in timetable.phases_of(model) for visit in phase.visits})


def _checkpoints_kept(config: Config, model: str) -> int:
    """Return the number of a model's checkpoints that are kept."""
    settings = config.run
    saved = [
        step
        for phase in config.timetable.phases_of(model)
        for _ in phase.visits
        for step in {
            *range(settings.checkpoint_every_steps, phase.steps + 1, settings.checkpoint_every_steps),
            phase.steps,
        }
        if step
    ]
    kept = min(len(saved), settings.keep_checkpoints)
    if settings.keep_every_steps is not None:
        kept += sum(step % settings.keep_every_steps == 0 for step in saved)
    return kept + (settings.keep_best is not None)

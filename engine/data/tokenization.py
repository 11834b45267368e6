"""From documents to token shards: what they depend on, where they lie, and how all ranks write them together.

A corpus is tokenised once. Its shards lie in the run folder, or beside the data (`DATA/shards/NAME`) where they were
prepared for the same tokenizers, so that many runs read one copy; there the BM25 index lies with them. Ranks take the
shards that are still missing one by one, so an interrupted writing goes on and a slow rank holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from engine.config.recipe import Config
from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError, ConfigError, DataError
from engine.models.loading import tokenizer_fingerprint
from engine.models.template import InputTemplate
from engine.reliability.progress import progress_bar
from engine.results import NOT_SHOWN
from shards.files import canonical_json, parse_record
from shards.files.overlap import WriteBehind, read_ahead
from shards.manifest import MAX_SHARDS, CorpusManifest, TokenStream
from shards.records import Dataset, Document, Query
from shards.writer import (
    Tokenization,
    begin_corpus,
    publish_manifest,
    recorded_docids,
    tokenize_shard,
    write_tokenized,
)

_MOST_SHARDS, _FEWEST_DOCUMENTS, _MOST_DOCUMENTS = 500, 250, 20_000


@dataclass(frozen=True)
class ModelText:
    """How one model reads text.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        template: Where its special tokens go.
        stream: Name of the token stream in the shards.
        max_query_tokens: Tokens of a query, special tokens not counted.
        prompts: What texts begin with, by side.
        known: Text of a query -> its token ids, of those that `remember_queries` was given; models with one stream
            share it.
    """

    tokenizer: Any
    template: InputTemplate
    stream: str
    max_query_tokens: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """The hash of all that decides which ids a document has in the shards: the tokenizer, and its wording."""
        own, wording = tokenizer_fingerprint(self.tokenizer), self.template.documents
        return sha256(canonical_json([own, wording.lead, wording.trail]).encode()).hexdigest() if wording else own

    def tokenize_queries(self, queries: Sequence[Query]) -> list[list[int]]:
        """Tokenise queries without special tokens, truncated; those that are remembered are not again."""
        new = [text for text in dict.fromkeys(query.text for query in queries) if text not in self.known]
        read = self.template.queries.token_ids(self.tokenizer, new, self.max_query_tokens)
        found = dict(zip(new, read, strict=True))
        return [found[text] if text in found else self.known[text] for text in (query.text for query in queries)]

    def remember_queries(self, queries: Sequence[Query]) -> list[list[int]]:
        """Tokenise queries that are going to be asked for again, such as at each refresh."""
        ids = self.tokenize_queries(queries)
        self.known.update(zip((query.text for query in queries), ids, strict=True))
        return ids


@dataclass(frozen=True)
class CorpusPlan:
    """All that the shards of a corpus depend on.

    Attributes:
        dataset_sha256: Fingerprint of the source files.
        template: How a document becomes one string.
        documents_per_shard: Documents in one shard.
        tokenizations: The token streams and what makes them.
    """

    dataset_sha256: str
    template: str
    documents_per_shard: int
    tokenizations: tuple[Tokenization, ...]

    @property
    def streams(self) -> list[TokenStream]:
        """The token streams by name."""
        return [tokenization.stream for tokenization in self.tokenizations]

    def is_served_by(self, manifest: CorpusManifest) -> bool:
        """Tell whether a corpus holds all that this plan asks for, in shards of any size."""
        present = {stream.name: stream for stream in manifest.streams}
        return (manifest.dataset_sha256, manifest.template) == (self.dataset_sha256, self.template) and all(
            stream.name in present
            and present[stream.name].tokenizer_sha256 == stream.tokenizer_sha256
            and present[stream.name].max_tokens >= stream.max_tokens
            for stream in self.streams
        )


@dataclass(frozen=True, slots=True)
class WrittenCorpus:
    """What there is once a corpus is tokenised.

    Attributes:
        documents: How many.
        shards: How many.
        tokens: Token stream to the number of its tokens.
        reused_shards: How many were there before.
        dataset_sha256: Fingerprint of the source files.
        prepared: Folder beside the data whose shards are read in place; None where they lie where they were asked for.
    """

    documents: int
    shards: int
    tokens: dict[str, int]
    reused_shards: int
    dataset_sha256: str = field(metadata=NOT_SHOWN)
    prepared: str | None = field(default=None, metadata=NOT_SHOWN)


def plan_corpus(config: Config, dataset: Dataset, texts: Mapping[str, ModelText]) -> CorpusPlan:
    """Say what the shards of a recipe depend on.

    Args:
        config: Lengths, template and size of the shards.
        dataset: The source.
        texts: Of each model; those with equal tokenizers share one stream.

    Raises:
        ConfigError: The shards would be too many.
    """
    lengths: dict[str, int] = {}
    for name, text in texts.items():
        lengths[text.stream] = max(lengths.get(text.stream, 0), config.models[name].stored_length)
    by_stream = {text.stream: text for text in reversed(list(texts.values()))}  # of equal ones, the first
    size = config.data.documents_per_shard
    if size is None:
        size = min(_MOST_DOCUMENTS, max(_FEWEST_DOCUMENTS, dataset.num_documents // _MOST_SHARDS))
        size = max(size, -(-dataset.num_documents // MAX_SHARDS))
    if (num_shards := -(-dataset.num_documents // size)) > MAX_SHARDS:
        raise ConfigError(
            f"data.documents_per_shard is {size}: {dataset.num_documents} documents would lie in {num_shards} shards",
            expected=f"{MAX_SHARDS} shards at most",
            remedy="leave data.documents_per_shard out, or raise it",
        )
    tokenizations = tuple(
        Tokenization(
            TokenStream(stream, text.fingerprint, lengths[stream]),
            partial(text.template.documents.token_ids, text.tokenizer, limit=lengths[stream]),
        )
        for stream, text in sorted(by_stream.items())
    )
    return CorpusPlan(dataset.fingerprint, config.data.template, size, tokenizations)


def find_corpus(plan: CorpusPlan, dataset: Dataset, own: Path) -> Path | None:
    """Return the folder of shards that serves a plan: a run's own, else one prepared beside the data, else None.

    Args:
        plan: What is needed.
        dataset: The source, whose folder may hold `shards/NAME`.
        own: Where a run writes shards that are nowhere else.
    """
    prepared = sorted(path.parent for path in (dataset.path / "shards").glob("*/manifest.json"))
    for folder in (own, *prepared):
        try:
            if plan.is_served_by(CorpusManifest.load(folder)):
                return folder
        except ArtifactError:
            continue  # there is none, or it is damaged
    return None


def write_corpus(
    coordinator: Coordinator, plan: CorpusPlan, dataset: Dataset, own: Path, *, name: str
) -> WrittenCorpus:
    """Tokenise the corpus into shards with all ranks; what is there already is not written again.

    Args:
        coordinator: Between the ranks.
        plan: What to write.
        dataset: The source.
        own: Where the shards go, unless the data folder holds shards that serve the plan.
        name: Of the work, for progress and errors.

    Returns:
        Counts, and the source's fingerprint.

    Raises:
        DataError: A document or a docid cannot be stored.
    """

    def look() -> str | None:
        found = find_corpus(plan, dataset, own)
        return None if found is None else str(found)

    found = coordinator.only_rank_zero(f"{name}: look", look)
    num_found = None if found else _write_missing(coordinator, plan, dataset, own, name)

    def report() -> dict[str, Any]:
        manifest = CorpusManifest.load(Path(found or own))
        num_shards = len(manifest.shards)
        reused = num_shards if num_found is None else num_found
        return asdict(
            WrittenCorpus(
                *(manifest.num_documents, num_shards, manifest.num_tokens, reused),
                dataset_sha256=manifest.dataset_sha256,
                prepared=str(Path(found).absolute()) if found and Path(found) != own else None,
            )
        )

    return parse_record(coordinator.only_rank_zero(f"{name}: report", report), WrittenCorpus, name)


def _write_missing(coordinator: Coordinator, plan: CorpusPlan, dataset: Dataset, folder: Path, name: str) -> int:
    """Write the shards that a folder lacks and publish; return how many it had."""
    size = plan.documents_per_shard
    num_shards = -(-dataset.num_documents // size)
    made_of = {
        "records": 2,  # their form
        "dataset_sha256": plan.dataset_sha256,
        "template": plan.template,
        "documents_per_shard": size,
        "streams": [asdict(stream) for stream in plan.streams],
    }

    def begin() -> list[int]:
        finished = begin_corpus(folder, made_of)
        return [number for number in range(num_shards) if number not in finished]

    missing: list[int] = coordinator.only_rank_zero(f"{name}: begin", begin)
    starts = coordinator.only_rank_zero(f"{name}: blocks", lambda: _starts(coordinator, dataset, size))
    with (
        coordinator.agreement(f"{name}: write"),
        progress_bar(name, num_shards, "shard", shown=coordinator.rank == 0) as bar,
        _reading(dataset, size, starts) as block_of,
        WriteBehind() as behind,  # while the next is tokenised, which leaves the interpreter free
    ):
        bar.update(num_shards - len(missing))
        for number in coordinator.hand_out(name, missing):  # ascending, so that one pass over the source serves all
            block = block_of(number)
            if not block:
                raise DataError(
                    f"{dataset.path} ends before shard {number}",
                    expected=f"{dataset.num_documents} documents, as when it was checked",
                    remedy="leave the data as it is while a run reads it",
                )
            shard = tokenize_shard(block, number, number * size, plan.tokenizations, plan.template)
            behind.write(partial(write_tokenized, shard, folder))
            bar.update(number + 1 - bar.n)

    def publish() -> None:
        publish_manifest(
            folder,
            recorded_docids(folder),
            dataset_sha256=plan.dataset_sha256,
            template=plan.template,
            streams=plan.streams,
        )

    coordinator.only_rank_zero(f"{name}: publish", publish)
    return num_shards - len(missing)


def _starts(coordinator: Coordinator, dataset: Dataset, size: int) -> list[int] | None:
    """Find where blocks begin; one rank reads all of them in order, and needs no such thing."""
    return None if coordinator.world_size == 1 or dataset.find_blocks is None else dataset.find_blocks(size)


@contextmanager
def _reading(dataset: Dataset, size: int, starts: Sequence[int] | None) -> Iterator[Callable[[int], list[Document]]]:
    """Give the documents of blocks that are asked for in ascending order, none where the source has ended.

    Where it is known where blocks begin, no other is read; else all are, ahead, in a thread.
    """
    if starts is not None and dataset.read_block is not None:
        read = dataset.read_block
        yield lambda number: list(islice(read(starts[number], number * size), size)) if number < len(starts) else []
        return
    with read_ahead(enumerate(_blocks(dataset.documents(), size))) as blocks:
        yield lambda number: next((block for found, block in blocks if found == number), [])


def _blocks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    stream = iter(documents)
    while block := list(islice(stream, size)):
        yield block

"""The BM25 index of a corpus in its place: beside prepared shards, or in the run folder.

It is stamped with the corpus and with all settings that it depends on, so that changed ones make a new index. BM25 sees
title and text, not the template by which models read a document: a `[SEP]` would be a word of every document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.bm25 import Bm25Config
from engine.coordination.coordinator import Coordinator
from engine.data.corpus import Data
from engine.errors import ArtifactError
from engine.log import get_logger
from engine.retrievers.bm25 import BM25Searcher
from engine.retrievers.bm25_build import build_bm25
from engine.retrievers.bm25_files import cut_documents
from engine.retrievers.choice import Choice
from engine.retrievers.words import Words
from engine.run import Run, RunFolder, Stage
from shards.embeddings import Stamp
from shards.files import canonical_json
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import render

log = get_logger(__name__)
_TEXT = "{title} {text}"


@dataclass(frozen=True, slots=True)
class BuiltBM25:
    """Result of the stage `bm25`."""

    documents: int
    reused: bool
    """Whether the index was there already."""


def build_bm25_index(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Index the corpus's text in the stage `bm25`; see `RetrieverKind.build`."""
    name = f"{prefix}bm25"
    if run.is_finished(name) and not run.coordinator.only_rank_zero(
        f"{name}: look", lambda: _find(data, folder, run.config.bm25) is not None
    ):
        run.forget([name])  # it was made by other settings, or is gone
    run.once(name, index_text, data, folder)


def open_bm25(run: Run, data: Data, folder: RunFolder, choice: Choice | None = None) -> BM25Searcher:
    """Open the BM25 index of a corpus: the one that was prepared beside its shards, else the folder's.

    Raises:
        ArtifactError: There is none, or it is damaged, of another corpus or of other settings.
    """
    place = _find(data, folder, run.config.bm25) or folder.bm25
    return open_bm25_of(place, data.shards.manifest.sha256, run.config.bm25)


def bm25_stamp(run: Run, data: Data, choice: Choice | None = None) -> Stamp:
    """Return a stamp with the hash of the settings in the place of weights, since BM25 has none."""
    return Stamp("bm25", digest_of_settings(run.config.bm25), data.shards.manifest.sha256)


def index_text(stage: Stage, data: Data, folder: RunFolder) -> BuiltBM25:
    """Index the corpus's text for BM25 with all ranks, unless an index is there, in the folder or beside the shards."""
    settings, coordinator = stage.run.config.bm25, stage.run.coordinator

    def look() -> bool:
        return _find(data, folder, settings, verify=True) is not None

    reused: bool = coordinator.only_rank_zero(f"{stage.name}: look", look)
    if not reused:
        index_documents(coordinator, data.shards, folder.bm25, settings, name=stage.name)
    return BuiltBM25(data.shards.num_documents, reused)


def open_bm25_of(folder: Path, corpus_sha256: str, settings: Bm25Config) -> BM25Searcher:
    """Open the index of a corpus.

    Args:
        folder: What `index_documents` made.
        corpus_sha256: `CorpusManifest.sha256`.
        settings: Words and formula.

    Raises:
        ArtifactError: There is none, or it is damaged, of another corpus or of other settings.
    """
    return BM25Searcher.open(folder, metadata=_made_of(corpus_sha256, settings))


def is_indexed(folder: Path, corpus_sha256: str, settings: Bm25Config, *, verify: bool = False) -> bool:
    """Tell whether a folder holds a whole index of a corpus; arguments as of `open_bm25_of`.

    Args:
        folder: As there.
        corpus_sha256: As there.
        settings: As there.
        verify: Hash every file too; what is damaged is told in the log.
    """
    try:
        BM25Searcher.open(folder, metadata=_made_of(corpus_sha256, settings), verify=verify)
    except ArtifactError as error:
        if verify and folder.exists():
            log.warning("%s", error)
        return False
    return True


def index_documents(
    coordinator: Coordinator, shards: CorpusShards, folder: Path, settings: Bm25Config, *, name: str = "bm25"
) -> None:
    """Index the titles and texts of a corpus for BM25, with all ranks.

    Args:
        coordinator: Between the ranks, which all call this alike.
        shards: The corpus.
        folder: Takes the index; what is finished of the same one is kept, any other is replaced.
        settings: Words and formula.
        name: Of the work, for progress and errors.

    Raises:
        DataError: No document has a word to index.
    """
    entries = shards.manifest.shards
    parts = cut_documents([entry.num_documents for entry in entries])

    def read(number: int) -> Iterator[str]:
        return (words_of(document) for shard in parts[number] for document in shards.documents(shard))

    build_bm25(
        coordinator,
        read,
        [sum(entries[shard].num_documents for shard in part) for part in parts],
        folder,
        words=Words.of(settings),
        k1=settings.k1,
        b=settings.b,
        metadata=_made_of(shards.manifest.sha256, settings),
        name=name,
    )


def words_of(document: Document) -> str:
    """Return what BM25 reads of a document."""
    return render(_TEXT, document)


def prepared_place(shards: Path, settings: Bm25Config) -> Path:
    """Return where the index of prepared shards lies, in a folder of its own for all settings.

    Args:
        shards: The folder of the shards.
        settings: Words and formula.
    """
    return shards / f"bm25-{digest_of_settings(settings)[:8]}"


def _find(data: Data, folder: RunFolder, settings: Bm25Config, *, verify: bool = False) -> Path | None:
    """Return where a whole index of the corpus by these settings lies."""
    places, corpus_sha256 = (prepared_place(data.shards.folder, settings), folder.bm25), data.shards.manifest.sha256
    return next((place for place in places if is_indexed(place, corpus_sha256, settings, verify=verify)), None)


def _made_of(corpus_sha256: str, settings: Bm25Config) -> dict[str, str | float | None]:
    """Return what an index is stamped with: the corpus, the settings for people to read, and their hash."""
    words = Words.of(settings)
    return {
        "corpus_sha256": corpus_sha256,
        "stemmer": words.stemmer,
        "stop_words": len(words.stop_words),
        "tokens": words.tokens,
        "k1": settings.k1,
        "b": settings.b,
        "settings_sha256": digest_of_settings(settings),
    }


def digest_of_settings(settings: Bm25Config) -> str:
    """Hash what an index and its scores depend on: not how its words were asked for, but which they are."""
    made_by = {"words": asdict(Words.of(settings)), "k1": settings.k1, "b": settings.b, "text": _TEXT}
    return hashlib.sha256(canonical_json(made_by).encode()).hexdigest()

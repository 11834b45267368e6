"""The BM25 index of a corpus in its place: beside prepared shards, or in the run folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.data.corpus import Data
from engine.data.tokenization import BM25_FOLDER
from engine.errors import ArtifactError
from engine.retrievers.bm25 import BM25Searcher, build_bm25
from engine.run import Run, RunFolder, Stage
from shards.embeddings import Stamp
from shards.records import Document
from shards.writer import render

_NO_WEIGHTS = "0" * 64


@dataclass(frozen=True, slots=True)
class BuiltBM25:
    """Result of the stage `bm25`."""

    documents: int
    reused: bool
    """Whether the index was there already."""


def build_bm25_index(run: Run, data: Data, folder: RunFolder, state: str, prefix: str) -> None:
    """Index the corpus's text in the stage `bm25`; see `RetrieverKind.build`."""
    run.once(f"{prefix}bm25", index_text, data, folder)


def open_bm25(run: Run, data: Data, folder: RunFolder, state: str = "") -> BM25Searcher:
    """Open the BM25 index of a corpus: the one that was prepared beside its shards, else the folder's.

    Raises:
        ArtifactError: There is none, or it is damaged or of another corpus.
    """
    return open_bm25_of(_place(data, folder), data.shards.manifest.sha256)


def bm25_stamp(run: Run, data: Data, state: str = "") -> Stamp:
    """Return a stamp without weights, since BM25 has none."""
    return Stamp("bm25", _NO_WEIGHTS, data.shards.manifest.sha256)


def index_text(stage: Stage, data: Data, folder: RunFolder) -> BuiltBM25:
    """Index the corpus's text for BM25, unless an index of it is there, in the folder or beside prepared shards."""

    def build() -> bool:
        manifest, documents = data.shards.manifest, data.dataset.documents()
        if is_indexed(_place(data, folder), manifest.sha256):
            return True
        index_documents(folder.bm25, manifest.sha256, manifest.template, documents)
        return False

    reused = stage.run.coordinator.only_rank_zero(f"{stage.name}: build", build)
    return BuiltBM25(data.shards.num_documents, reused)


def open_bm25_of(folder: Path, corpus_sha256: str) -> BM25Searcher:
    """Open the index of a corpus.

    Args:
        folder: What `index_documents` made.
        corpus_sha256: `CorpusManifest.sha256`.

    Raises:
        ArtifactError: There is none, or it is damaged or of another corpus.
    """
    return BM25Searcher.open(folder, metadata={"corpus_sha256": corpus_sha256})


def is_indexed(folder: Path, corpus_sha256: str) -> bool:
    """Tell whether a folder holds a whole index of a corpus; arguments as of `open_bm25_of`."""
    try:
        open_bm25_of(folder, corpus_sha256)
    except ArtifactError:
        return False
    return True


def index_documents(folder: Path, corpus_sha256: str, template: str, documents: Iterable[Document]) -> None:
    """Index documents for BM25.

    Args:
        folder: Takes the index; an older one is replaced.
        corpus_sha256: `CorpusManifest.sha256`.
        template: Makes a text of a document, as for the shards.
        documents: The corpus, in its order.

    Raises:
        DataError: No document has a word to index.
    """
    texts = (render(template, document) for document in documents)
    build_bm25(texts, folder, metadata={"corpus_sha256": corpus_sha256})


def _place(data: Data, folder: RunFolder) -> Path:
    prepared = data.shards.folder / BM25_FOLDER
    return prepared if prepared.is_dir() else folder.bm25

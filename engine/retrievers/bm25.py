"""BM25: the yardstick every dense retriever is measured against, and the negatives that G0 is warmed up with.

What a word is, `engine.retrievers.words` says; scores are Lucene's variant. They are computed by bm25s when the index
is built, so that a search only adds up columns. Every rank opens the same files, mapped into memory rather than read.

    build_bm25(texts, folder, words=Words.of(config.bm25), metadata={...})
    hits = BM25Searcher.open(folder).search(queries, top_k=100)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bm25s  # type: ignore[import-untyped]
import numpy as np

from engine.config.bm25 import Bm25Config
from engine.errors import ArtifactError, DataError
from engine.retrievers.words import Analyzer, Words
from engine.search import Hits, top_matches
from shards.files import fsync, read_record, sha256_file, write_json
from shards.records import Query

_MANIFEST = "bm25.json"
_VERSION = 2
_DEFAULTS = Bm25Config()


@dataclass(frozen=True, slots=True)
class _File:
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What an index is; written last."""

    version: int
    num_documents: int
    num_words: int
    words: Words
    k1: float
    b: float
    metadata: dict[str, Any]
    files: dict[str, _File]


def build_bm25(
    texts: Iterable[str],
    folder: Path,
    *,
    words: Words = Words.of(_DEFAULTS),  # noqa: B008 - frozen
    k1: float = _DEFAULTS.k1,
    b: float = _DEFAULTS.b,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Index the texts of a corpus and publish the index as a folder, whole or not at all.

    Args:
        texts: One text for each document, in the order of the global document index; streamed, their word ids are kept
            in memory until the index is written.
        folder: Where the index goes; an older one is replaced.
        words: How texts become words; recorded, so that queries are read alike.
        k1: How soon further occurrences of a word stop counting, > 0.
        b: How much long documents are marked down, 0..1.
        metadata: What the index was made of, such as `{"corpus_sha256": ...}`; `BM25Searcher.open` compares it.

    Raises:
        DataError: No text has a single word that could be indexed.

    Source: Robertson and Zaragoza (2009); the variant is Lucene's (Kamphuis et al., 2020).
    """
    analyzer = Analyzer(words)
    ids_of_documents = [analyzer.learn(text) for text in texts]
    if not analyzer.vocabulary:
        raise DataError(
            f"None of {len(ids_of_documents)} documents has a word to index",
            expected="words of two or more letters or digits that are not all stop words",
            remedy="check the corpus file's text field, and bm25.stopwords",
        )
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    index.index((ids_of_documents, analyzer.vocabulary), create_empty_token=False, show_progress=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.tmp-{secrets.token_hex(4)}"
    try:
        index.save(temporary, show_progress=False)
        files = sorted(temporary.iterdir())
        for path in files:
            fsync(path)
        described = {path.name: _File(path.stat().st_size, sha256_file(path)) for path in files}
        num_documents, num_words = len(ids_of_documents), len(analyzer.vocabulary)
        manifest = _Manifest(_VERSION, num_documents, num_words, words, k1, b, dict(metadata or {}), described)
        write_json(temporary / _MANIFEST, asdict(manifest))
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class BM25Searcher:
    """Answers queries from an index that `build_bm25` published; use `BM25Searcher.open`.

    Attributes:
        source: `bm25`.
        block_size: Queries best searched in one call.
        num_documents: Documents in the index.
    """

    source: str
    block_size = 512

    def __init__(self, index: bm25s.BM25, num_documents: int, words: Words) -> None:
        self.source, self.num_documents = "bm25", num_documents
        self._index = index
        self._analyzer = Analyzer(words, index.vocab_dict)

    @classmethod
    def open(cls, folder: Path, *, metadata: Mapping[str, Any] | None = None, verify: bool = False) -> BM25Searcher:
        """Open a published index; its arrays stay on disk and are mapped.

        Args:
            folder: What `build_bm25` wrote.
            metadata: What the index must have been made of; None takes any.
            verify: Hash every file too; sizes are always compared.

        Returns:
            A searcher.

        Raises:
            ArtifactError: The index is missing, damaged, or made of something else.
        """
        remedy = f"delete {folder} and build the index again"
        manifest = read_record(folder / _MANIFEST, _Manifest, "the BM25 manifest")
        if manifest.version != _VERSION:
            raise ArtifactError(f"{folder / _MANIFEST} has version {manifest.version}", remedy=remedy)
        if metadata is not None and manifest.metadata != dict(metadata):
            raise ArtifactError(
                f"The BM25 index in {folder} was made of {json.dumps(manifest.metadata)}",
                expected=json.dumps(dict(metadata)),
                remedy=remedy,
            )
        for name, file in manifest.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.num_bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ArtifactError(f"{path} {state}", expected=f"{file.num_bytes} bytes", remedy=remedy)
            if verify and sha256_file(path) != file.sha256:
                raise ArtifactError(f"{path} is not the file that was written", expected=file.sha256, remedy=remedy)
        index = bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)
        return cls(index, manifest.num_documents, manifest.words)

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Find the documents that share the rarest and most words with each query; others are no hits.

        Args:
            queries: Q queries.
            top_k: Documents per query, at least 1.

        Returns:
            Hits [Q, top_k]; sorted by score descending, then by document index ascending.
        """
        documents_QK = np.empty((len(queries), top_k), dtype=np.int64)
        scores_QK = np.empty((len(queries), top_k), dtype=np.float32)
        for row, query in enumerate(queries):
            scores_N = self._index.get_scores_from_ids(self._analyzer.look_up(query.text))
            documents_QK[row], scores_QK[row] = top_matches(scores_N, top_k)
        return Hits(documents_QK, scores_QK)

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found; those that share no word with their query have 0.

        Args:
            queries: Any queries.
            documents: Global document indices for each of them.

        Returns:
            Scores for each query, in the order of its documents, as a search has them.
        """
        return [
            self._index.get_scores_from_ids(self._analyzer.look_up(query.text))[np.array(own, dtype=np.int64)].tolist()
            for query, own in zip(queries, documents, strict=True)
        ]


def _replace_folder(new: Path, target: Path) -> None:
    """Rename a finished folder into place; a crash on the way leaves the old one, or none, never a mixture."""
    aside = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
    if target.exists():
        os.replace(target, aside)
    os.replace(new, target)
    fsync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)

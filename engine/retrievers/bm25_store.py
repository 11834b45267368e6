"""A BM25 index that is whole, opened to be searched: its vocabulary and its parts, mapped from disk as they are needed.

Shapes: V words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ArtifactError
from engine.retrievers.bm25_files import (
    VERSION,
    WORD,
    Bm25Folder,
    BucketMarker,
    Manifest,
    buckets_of,
    damaged,
    file_fault,
    mapped,
    read_part,
)
from engine.retrievers.bm25_formula import Formula
from shards.files import read_record
from shards.postings import Block

_ID = np.dtype(np.int64)


class Vocabulary:
    """The words of a corpus, mapped from disk while they are looked up.

    Args:
        folder: Holds the buckets.
        buckets: Their markers.
    """

    def __init__(self, folder: Bm25Folder, buckets: Sequence[BucketMarker]) -> None:
        self._folder, self._buckets = folder, buckets
        self._firsts = np.cumsum([0, *(bucket.num_words for bucket in buckets)])

    def find(self, words_V: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look words up.

        Args:
            words_V: Hashes in any order.

        Returns:
            The id of each, -1 where the corpus does not have it, and in how many documents it is: int64 [V] each.

        Raises:
            ArtifactError: A bucket cannot be mapped.
        """
        ids_V, num_documents_V = np.full(len(words_V), -1, dtype=np.int64), np.zeros(len(words_V), dtype=np.int64)
        buckets_V = buckets_of(words_V, len(self._buckets))
        for number in np.unique(buckets_V).tolist():
            num_words = self._buckets[number].num_words
            if not num_words:
                continue
            known, num_documents = mapped(self._folder.bucket(number), [(num_words, WORD), (num_words, _ID)])
            own = np.flatnonzero(buckets_V == number)
            places = np.searchsorted(known, words_V[own]).clip(max=num_words - 1)
            has = known[places] == words_V[own]
            ids_V[own[has]] = self._firsts[number] + places[has]
            num_documents_V[own[has]] = num_documents[places[has]]
        return ids_V, num_documents_V


class Bm25Store:
    """The weights of a whole corpus, mapped part by part while they are searched; use `Bm25Store.open`.

    Args:
        folder: Of the index.
        manifest: What it is.
    """

    def __init__(self, folder: Bm25Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.vocabulary = Vocabulary(folder, manifest.statistics.buckets)
        self._firsts: list[int] = np.cumsum([0, *manifest.plan.sizes]).tolist()
        self._checked: set[int] = set()

    @classmethod
    def open(cls, path: Path, *, metadata: Mapping[str, Any] | None = None, verify: bool = False) -> Bm25Store:
        """Open a published index.

        Args:
            path: Its folder.
            metadata: What it must have been made of; None takes any.
            verify: Hash every file too; sizes are always compared.

        Raises:
            ArtifactError: It is missing, damaged, or made of something else.
        """
        folder = Bm25Folder(path)
        remedy = f"delete {path} and build the index again"
        manifest = read_record(folder.manifest, Manifest, "the BM25 manifest")
        plan = manifest.plan
        if plan.version != VERSION:
            raise ArtifactError(f"{folder.manifest} has version {plan.version}", expected=f"{VERSION}", remedy=remedy)
        if metadata is not None and plan.metadata != dict(metadata):
            raise ArtifactError(
                f"The BM25 index in {path} was made of {json.dumps(plan.metadata)}",
                expected=json.dumps(dict(metadata)),
                remedy=remedy,
            )
        for number, bucket in enumerate(manifest.statistics.buckets):
            if fault := file_fault(folder.bucket(number), bucket, verify=verify):
                raise damaged(folder.bucket(number), fault)
        for number, part in enumerate(manifest.parts):
            if fault := file_fault(folder.part(number), part, verify=verify):
                raise damaged(folder.part(number), fault)
        return cls(folder, manifest)

    @property
    def num_terms(self) -> int:
        """Different words of the corpus."""
        return self.manifest.statistics.num_words

    @property
    def num_documents(self) -> int:
        """Documents of the corpus, those without a word too."""
        return self.manifest.statistics.num_documents

    @property
    def formula(self) -> Formula:
        """What its weights were computed by."""
        return self.manifest.statistics.formula(self.manifest.plan)

    @property
    def sizes(self) -> list[int]:
        """Documents of each part."""
        return list(self.manifest.plan.sizes)

    @property
    def firsts(self) -> list[int]:
        """Global index of each part's first document."""
        return self._firsts[:-1]

    def blocks(self, parts: range | None = None) -> Iterator[Block]:
        """Map blocks in the order of the corpus; a part's file is let go when its last block is.

        Args:
            parts: Numbers of the parts to read, ascending; all if None.

        Raises:
            ArtifactError: A part's file cannot be mapped, or is not what its marker says.
        """
        for number in range(len(self.manifest.parts)) if parts is None else parts:
            _, blocks = read_part(
                self.folder.part(number),
                self.manifest.parts[number],
                _ID,
                first_document=self._firsts[number],
                check=number not in self._checked,
            )
            self._checked.add(number)
            yield from blocks

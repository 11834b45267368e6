"""The files of a BM25 index: a plan, the vocabulary in buckets, and postings in parts of the corpus.

    plan.json                what is indexed, and how many documents each part has; written first
    counts-000003.*          of a part: how often each of its words occurs in which document; gone once it is weighted
    vocabulary-0000.*        the words of some hashes, and in how many documents of the whole corpus each of them is
    vocabulary.json          how many buckets, words and occurrences there are; written after them
    part-000003.*            of a part: the BM25 weight of each of its words in each document
    bm25.json                all of these with their sizes and hashes; written last

A word is known by 16 bytes of its hash (BLAKE2b): of one width, so that words are sorted, merged and looked up in
arrays that are mapped from disk, and so many that two of the same hash are not met. Its id is its place among all words
in the order of their hashes. An array lies in a `.npy` file, and a marker beside it, written after it, vouches for it.

Shapes: V words (of a part, or of the corpus), N documents of a block, P postings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import ArtifactError
from engine.retrievers.bm25_formula import Formula
from engine.retrievers.words import Words
from shards.files import read_record, save_array, sha256_file, write_atomically, write_json
from shards.postings import DOCUMENTS_PER_BLOCK, Block

VERSION = 3
WORD = np.dtype("S16")
"""Hash of a word."""
_ID = np.dtype(np.int64)
_PREFIXES = 2**16
"""Values of a hash's first two bytes, by which words are shared out among buckets."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is indexed, in which parts."""

    version: int
    words: Words
    k1: float
    b: float
    metadata: dict[str, Any]
    sizes: tuple[int, ...]
    """Documents of each part."""


@dataclass(frozen=True, slots=True)
class PartMarker:
    """What vouches for a part, of counts or of weights."""

    num_documents: int
    num_words: int
    """Different ones."""
    num_tokens: int
    """Occurrences of words."""
    num_postings: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BucketMarker:
    """What vouches for a bucket of the vocabulary."""

    num_words: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """What BM25 asks of a whole corpus, besides the frequencies of words."""

    num_documents: int
    num_tokens: int
    buckets: tuple[BucketMarker, ...]

    @property
    def num_words(self) -> int:
        """Different words of the corpus."""
        return sum(bucket.num_words for bucket in self.buckets)

    def formula(self, plan: Plan) -> Formula:
        """Return BM25 over this corpus."""
        return Formula(plan.k1, plan.b, self.num_documents, self.num_tokens / self.num_documents)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index is; written last."""

    plan: Plan
    statistics: Statistics
    parts: tuple[PartMarker, ...]


def cut_documents(sizes: Sequence[int], most: int = DOCUMENTS_PER_BLOCK) -> list[range]:
    """Cut the shards of a corpus into the parts of its BM25 index: a function of the corpus alone.

    Args:
        sizes: Documents in each shard.
        most: Documents of a part at most, where it has more than one shard.

    Returns:
        Ranges of shard numbers, contiguous and complete.
    """
    parts: list[range] = []
    first = held = 0
    for number, size in enumerate(sizes):
        if held and held + size > most:
            parts.append(range(first, number))
            first, held = number, 0
        held += size
    return [*parts, range(first, len(sizes))] if sizes else []


class Bm25Folder:
    """Names the files in the folder of an index, and removes them.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.plan, self.manifest = self.path / "plan.json", self.path / "bm25.json"
        self.statistics = self.path / "vocabulary.json"

    def counts(self, number: int) -> Path:
        """Return the array of a part's counts."""
        return self.path / f"counts-{number:06d}.npy"

    def part(self, number: int) -> Path:
        """Return the array of a part's weights."""
        return self.path / f"part-{number:06d}.npy"

    def bucket(self, number: int) -> Path:
        """Return the array of a bucket of the vocabulary."""
        return self.path / f"vocabulary-{number:04d}.npy"

    def remove_leftovers(self) -> None:
        """Remove what a whole index no longer needs, and what killed processes have left half written."""
        for pattern in ("counts-*", ".*.tmp-*"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)


M = TypeVar("M", PartMarker, BucketMarker)


def marker_of(array: Path) -> Path:
    """Return the marker of an array."""
    return array.with_suffix(".json")


def remove(array: Path) -> None:
    """Remove an array, its marker first."""
    marker_of(array).unlink(missing_ok=True)
    array.unlink(missing_ok=True)


def fault_of(array: Path, kind: type[M], *, verify: bool = False) -> tuple[str, M | None]:
    """Look at an array with its marker.

    Args:
        array: Its path.
        kind: Of the marker.
        verify: Hash the array too; else it is checked by its size.

    Returns:
        What is wrong ("" if nothing), and the marker where it can be read.
    """
    if not marker_of(array).is_file() or not array.is_file():
        return "is missing", None
    try:
        marker = read_record(marker_of(array), kind, "the marker of a part of BM25")
    except ArtifactError:
        return "has a damaged marker", None
    return file_fault(array, marker, verify=verify), marker


def file_fault(array: Path, marker: PartMarker | BucketMarker, *, verify: bool = False) -> str:
    """Compare an array with what vouches for it; return what is wrong, "" if nothing."""
    if not array.is_file():
        return "is missing"
    if (num_bytes := array.stat().st_size) != marker.num_bytes:
        return f"has {num_bytes} bytes instead of {marker.num_bytes}"
    if verify and sha256_file(array) != marker.sha256:
        return "is not the file that was written: its bytes do not have the recorded hash"
    return ""


def hash_words(words: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return what words are known by: S16 [V]."""
    return np.array([hashlib.blake2b(word.encode(), digest_size=16).digest() for word in words], dtype=WORD)


def buckets_of(words_V: npt.NDArray[np.bytes_], num_buckets: int) -> npt.NDArray[np.int64]:
    """Return which bucket each word is in: int64 [V]; ascending where the words are sorted.

    Args:
        words_V: Hashes.
        num_buckets: A power of two, 65,536 at most.
    """
    bytes_V16 = np.ascontiguousarray(words_V).view(np.uint8).reshape(-1, WORD.itemsize).astype(np.int64)
    prefixes_V: npt.NDArray[np.int64] = bytes_V16[:, 0] * 256 + bytes_V16[:, 1]
    return prefixes_V // (_PREFIXES // num_buckets)


def span_of_bucket(words_V: npt.NDArray[np.bytes_], number: int, num_buckets: int) -> slice:
    """Return where the words of a bucket lie among sorted ones, of which only a few are looked at.

    Args:
        words_V: Hashes, ascending.
        number: Of the bucket.
        num_buckets: As of `buckets_of`.
    """
    width = _PREFIXES // num_buckets
    first = np.searchsorted(words_V, np.array((number * width).to_bytes(2, "big"), dtype=WORD))
    if number == num_buckets - 1:
        return slice(int(first), len(words_V))
    stop = np.searchsorted(words_V, np.array(((number + 1) * width).to_bytes(2, "big"), dtype=WORD))
    return slice(int(first), int(stop))


@dataclass(frozen=True, slots=True)
class PostingsOf:
    """The postings of neighbouring documents, by word: as in `shards.postings.Block`, to be written."""

    starts_V: npt.NDArray[np.int64]
    weights_P: npt.NDArray[np.float32]
    documents_P: npt.NDArray[np.uint16]


def write_part(
    array: Path, words_V: npt.NDArray[Any], blocks: Sequence[PostingsOf], *, num_documents: int, num_tokens: int
) -> PartMarker:
    """Write the postings of a part's documents, and the marker after them.

    Args:
        array: Its path.
        words_V: What the part's words are known by, ascending: hashes (S16) or ids (int64).
        blocks: Of 65,536 documents each, but for the last.
        num_documents: Of the part.
        num_tokens: Occurrences of words in them.
    """
    pieces = [
        *(block.starts_V for block in blocks),
        words_V,
        *(block.weights_P for block in blocks),
        *(block.documents_P for block in blocks),
    ]
    num_postings = sum(len(block.weights_P) for block in blocks)
    return _publish(
        array,
        pieces,
        lambda size, sha256: PartMarker(num_documents, len(words_V), num_tokens, num_postings, size, sha256),
    )


def read_part(
    array: Path, marker: PartMarker, dtype: npt.DTypeLike, *, first_document: int = 0, check: bool = True
) -> tuple[npt.NDArray[Any], list[Block]]:
    """Map what `write_part` wrote.

    Args:
        array: Its path.
        marker: Its marker.
        dtype: Of what its words are known by, `WORD` or int64.
        first_document: Global index of the first document.
        check: Look at every posting's document; compiled code would follow a damaged number anywhere.

    Returns:
        The words and the blocks; of ids, the blocks know them.

    Raises:
        ArtifactError: The file cannot be mapped, or is not what its marker says.
    """
    num_words, num_postings = marker.num_words, marker.num_postings
    sizes = [
        min(DOCUMENTS_PER_BLOCK, marker.num_documents - start)
        for start in range(0, marker.num_documents, DOCUMENTS_PER_BLOCK)
    ]
    kinds = [(len(sizes) * (num_words + 1), np.dtype(np.int64)), (num_words, np.dtype(dtype))]
    kinds += [(num_postings, np.dtype(np.float32)), (num_postings, np.dtype(np.uint16))]
    starts_BV, words_V, weights_P, documents_P = mapped(array, kinds)
    blocks, first = [], 0
    for place, (size, starts_V) in enumerate(zip(sizes, starts_BV.reshape(len(sizes), -1), strict=True)):
        mine = slice(first, first + int(starts_V[-1]))
        if check and (starts_V[0] or (np.diff(starts_V) < 0).any() or documents_P[mine].max(initial=0) >= size):
            raise damaged(array, f"has postings beyond its {size} documents")
        blocks.append(
            Block(
                first_document + place * DOCUMENTS_PER_BLOCK,
                size,
                starts_V,
                weights_P[mine],
                documents_P[mine],
                words_V if words_V.dtype == _ID else None,
            )
        )
        first = mine.stop
    if first != num_postings:
        raise damaged(array, f"has {first} postings instead of {num_postings}")
    return words_V, blocks


def write_bucket(array: Path, words_V: npt.NDArray[np.bytes_], num_documents_V: npt.NDArray[np.int64]) -> BucketMarker:
    """Write a bucket of the vocabulary: its words, sorted, and in how many documents each of them is."""
    return _publish(array, [words_V, num_documents_V], lambda size, sha256: BucketMarker(len(words_V), size, sha256))


def damaged(array: Path, fact: str) -> ArtifactError:
    """Return the error of a damaged array: without it, the next build makes it anew and keeps the others."""
    return ArtifactError(
        f"{array} {fact}",
        expected="what its marker vouches for",
        remedy=f"delete {array.with_suffix('')}.* and {array.parent / 'bm25.json'} and start the command again that "
        "builds the index: what is whole is kept",
    )


def _publish(array: Path, pieces: Sequence[npt.NDArray[Any]], describe: Callable[[int, str], M]) -> M:
    """Write arrays as the bytes of one, and a marker after them; return the marker."""
    bytes_ = [np.ascontiguousarray(piece).view(np.uint8) for piece in pieces if len(piece)]
    remove(array)
    with write_atomically(array, num_bytes=sum(piece.nbytes for piece in bytes_)) as temporary:
        save_array(temporary, *(bytes_ or [np.empty(0, np.uint8)]))
        marker = describe(temporary.stat().st_size, sha256_file(temporary))
    write_json(marker_of(array), asdict(marker))
    return marker


def mapped(array: Path, kinds: Sequence[tuple[int, np.dtype[Any]]]) -> list[npt.NDArray[Any]]:
    """Map an array of bytes as those that were written into it.

    Args:
        array: Its path.
        kinds: Length and type of each.

    Raises:
        ArtifactError: It cannot be mapped, or has another length.
    """
    try:
        content = np.asarray(np.load(array, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise damaged(array, f"cannot be opened ({error})") from error
    expected = sum(length * kind.itemsize for length, kind in kinds)
    if content.dtype != np.uint8 or content.shape != (expected,):
        raise damaged(array, f"holds {content.dtype} {list(content.shape)} instead of {expected} bytes")
    found, start = [], 0
    for length, kind in kinds:
        found.append(content[start : start + length * kind.itemsize].view(kind))
        start += length * kind.itemsize
    return found

"""Sparse document vectors on disk, by term: one part for each shard, stamped with the weights and the corpus.

A learned sparse retriever gives each document a weight for some terms of its vocabulary. A search asks the other way
round: which documents have this term, and how much of it? So a part is turned over when it is written, and a search
only maps files. Its array is bytes: for each block of documents, where every term's postings begin; then the weights
of all postings, by block, term and document; then their documents, in the same order. A block has 65,536 documents at
most, so that a document's place in it takes two bytes, and the scores of a block stay in a processor's cache. Parts are
published and checked as those of `shards.embeddings`.

Shapes: N documents, V terms of the vocabulary, P postings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]

from shards.embeddings import PartMarker, Stamp, open_markers, part_fault, part_paths, publish_part
from shards.errors import ArtifactError
from shards.manifest import CorpusManifest, ShardEntry

DOCUMENTS_PER_BLOCK = 2**16
"""As many as two bytes tell apart."""
_START_BYTES, _DOCUMENT_BYTES = 8, 2


@dataclass(frozen=True, slots=True)
class PostingsMarker(PartMarker):
    """What vouches for a part of postings; its `shape` is (documents, terms of the vocabulary)."""

    num_postings: int
    """Documents with a term, counted for every term."""


@dataclass(frozen=True, slots=True)
class Block:
    """The postings of neighbouring documents, mapped from a part."""

    first_document: int
    """Global index of the first document."""
    num_documents: int
    starts_V: npt.NDArray[np.int64]
    """Where the postings of each term begin, and where the last one's end, int64 [V + 1]."""
    weights_P: npt.NDArray[np.floating[Any]]
    """float16 or float32 [P], above 0."""
    documents_P: npt.NDArray[np.uint16]
    """Places of the documents in the block, ascending for each term, uint16 [P]."""
    terms_V: npt.NDArray[np.int64] | None = None
    """Which terms of the vocabulary the block has, ascending, int64 [V]; None where V is the whole vocabulary."""


def write_postings(
    folder: Path,
    entry: ShardEntry,
    weights_NV: sparse.csr_array,
    stamp: Stamp,
    *,
    dtype: Literal["float16", "float32"] = "float32",
) -> None:
    """Write the sparse vectors of one shard's documents, by term, the marker last.

    Args:
        folder: The store's folder; made if needed.
        entry: The shard.
        weights_NV: float32 [N, V], N the shard's documents in order; what it holds is finite, and not below 0.
        stamp: What made them.
        dtype: Type of the stored weights. Those that are 0 in it are no postings.

    Raises:
        ArtifactError: Another shape or type, or a weight that is not finite in `dtype` or below 0.
    """
    shape = weights_NV.shape
    if len(shape) != 2 or shape[0] != entry.num_documents or shape[1] < 1 or weights_NV.dtype != np.float32:
        raise ArtifactError(
            f"the sparse vectors of shard {entry.name} are {weights_NV.dtype} {list(shape)}",
            expected=f"float32 [{entry.num_documents}, V]",
        )
    stored_NV = sparse.csr_array(weights_NV, copy=True)
    stored_NV.data = _rounded(entry, weights_NV, dtype)
    stored_NV.eliminate_zeros()
    blocks = [
        stored_NV[start : start + DOCUMENTS_PER_BLOCK].tocsc() for start in range(0, shape[0], DOCUMENTS_PER_BLOCK)
    ]
    firsts = np.cumsum([0, *(block.nnz for block in blocks)]).tolist()
    starts = [first + block.indptr.astype(np.int64) for first, block in zip(firsts, blocks, strict=False)]
    # float16 is no number to scipy's sparse arrays; rounded already, the weights lose nothing here.
    weights = [block.data.astype(dtype) for block in blocks]
    documents = [block.indices.astype(np.uint16) for block in blocks]
    publish_part(
        folder,
        entry,
        [piece.view(np.uint8) for piece in (*starts, *weights, *documents)],
        lambda num_bytes, sha256: PostingsMarker(
            stamp, (shape[0], shape[1]), dtype, entry.first_document, num_bytes, sha256, firsts[-1]
        ),
    )


def postings_are_complete(folder: Path, entry: ShardEntry, stamp: Stamp) -> bool:
    """Tell whether a shard's postings are already there, so that a resumed pass can skip it.

    Args:
        folder: The store's folder.
        entry: The shard.
        stamp: What the caller would make them from.

    Returns:
        Whether the part has a valid marker with an equal stamp, the shard's number of documents and the right size.
    """
    return not part_fault(folder, entry, stamp, PostingsMarker)[0]


class PostingsStore:
    """The postings of a whole corpus, mapped part by part while they are read; use `PostingsStore.open`.

    Args:
        folder: The store's folder.
        manifest: The corpus.
        stamp: What made the postings.
        markers: Of all parts, in order.
    """

    def __init__(self, folder: Path, manifest: CorpusManifest, stamp: Stamp, markers: list[PostingsMarker]) -> None:
        self.folder, self.manifest, self.stamp = Path(folder), manifest, stamp
        self._markers = markers
        self.num_terms, self.dtype = markers[0].shape[1], markers[0].dtype

    @classmethod
    def open(cls, folder: Path, manifest: CorpusManifest, stamp: Stamp, *, verify: bool = False) -> PostingsStore:
        """Open a store and check that every part is there, whole and of the same stamp.

        Args:
            folder: The store's folder.
            manifest: The corpus that was encoded. Parts beyond its shards are ignored.
            stamp: What must have made the postings.
            verify: Hash every part too; without it, parts are checked by size.

        Raises:
            ArtifactError: Parts are missing, stale, short or damaged, or the stamp names another corpus.
        """
        markers = open_markers(folder, manifest, stamp, PostingsMarker, what="postings", verify=verify)
        return cls(folder, manifest, stamp, markers)

    @property
    def num_documents(self) -> int:
        """Documents of the corpus, those without a term too."""
        return self.manifest.num_documents

    @property
    def sizes(self) -> list[int]:
        """Documents of each part."""
        return [entry.num_documents for entry in self.manifest.shards]

    @property
    def firsts(self) -> list[int]:
        """Global index of each part's first document."""
        return [entry.first_document for entry in self.manifest.shards]

    @property
    def num_postings(self) -> int:
        """Postings of all documents."""
        return sum(marker.num_postings for marker in self._markers)

    def blocks(self, shards: range | None = None) -> Iterator[Block]:
        """Map blocks in the order of the corpus; a part's file is let go when its last block is.

        Args:
            shards: Numbers of the shards to read, ascending; all if None.

        Raises:
            ArtifactError: A part's file cannot be mapped, or is not what its marker says.
        """
        for number in range(len(self._markers)) if shards is None else shards:
            entry, marker = self.manifest.shards[number], self._markers[number]
            content = self._open_part(entry)
            num_blocks = -(-entry.num_documents // DOCUMENTS_PER_BLOCK)
            starts_end = num_blocks * (self.num_terms + 1) * _START_BYTES
            weights_end = starts_end + marker.num_postings * np.dtype(marker.dtype).itemsize
            expected = weights_end + marker.num_postings * _DOCUMENT_BYTES
            starts_BV = content[:starts_end].view(np.int64) if len(content) == expected else np.empty(0, np.int64)
            if len(starts_BV) == 0 or (starts_BV[0], starts_BV[-1]) != (0, marker.num_postings):
                raise self._damaged(entry, f"holds {len(content)} bytes", f"{expected} bytes of postings")
            weights_P = content[starts_end:weights_end].view(marker.dtype)
            documents_P = content[weights_end:].view(np.uint16)
            for block, starts_V in enumerate(starts_BV.reshape(num_blocks, -1)):
                first, place = int(starts_V[0]), block * DOCUMENTS_PER_BLOCK
                mine = slice(first, int(starts_V[-1]))
                size = min(DOCUMENTS_PER_BLOCK, entry.num_documents - place)
                # Compiled code would follow a damaged number anywhere.
                if (np.diff(starts_V) < 0).any() or documents_P[mine].max(initial=0) >= size:
                    raise self._damaged(entry, f"has postings beyond its {size} documents", "postings in their order")
                yield Block(entry.first_document + place, size, starts_V - first, weights_P[mine], documents_P[mine])

    def _open_part(self, entry: ShardEntry) -> npt.NDArray[np.uint8]:
        path = part_paths(self.folder, entry)[0]
        try:
            content = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise self._damaged(entry, f"cannot be opened ({error})", "bytes of postings") from error
        if content.dtype != np.uint8 or content.ndim != 1:
            raise self._damaged(entry, f"holds {content.dtype} {list(content.shape)}", "bytes of postings")
        return content

    def _damaged(self, entry: ShardEntry, fact: str, expected: str) -> ArtifactError:
        path = part_paths(self.folder, entry)[0]
        return ArtifactError(
            f"{path} {fact}",
            expected=expected,
            remedy=f"delete {path.with_suffix('')}.* and run the encoding again",
        )


def _rounded(entry: ShardEntry, weights_NV: sparse.csr_array, dtype: str) -> npt.NDArray[np.float32]:
    """Return the weights as they will be stored, and refuse those that no search can add up."""
    with np.errstate(over="ignore"):
        rounded_P: npt.NDArray[np.float32] = weights_NV.data.astype(dtype).astype(np.float32)
    # Where a weight is below 0, a score above 0 no longer tells the documents that share a term.
    bad = np.flatnonzero(~(np.isfinite(rounded_P) & (rounded_P >= 0)))
    if bad.size:
        document, term = (int(np.searchsorted(weights_NV.indptr, bad[0], "right")) - 1, int(weights_NV.indices[bad[0]]))
        raise ArtifactError(
            f"the weight of term {term} in document {entry.first_document + document} (shard {entry.name}) is "
            f"{weights_NV.data[bad[0]]:g}, and {bad.size - 1} more of this shard are not finite or below 0",
            expected=f"weights from 0 to {np.finfo(dtype).max:g}, the largest of {dtype}",
            remedy="look for a training run that diverged, or for a model that is no lexical one",
        )
    return rounded_P

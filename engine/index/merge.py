"""Merges the parts of an index into one file, in bounded memory and in the order of the parts.

The merged file is an ordinary FAISS index: the trained one, and after it the lists, each the concatenation of its
pieces in all parts. It is written from the parts' files piece by piece, so neither the parts nor the whole are ever in
memory, and its bytes are the same whoever filled the parts. FAISS's own merging holds both, looks neither at codebooks
nor at hashes, and corrupts interleaved 4-bit codes; these are interleaved here at the end instead.

Shapes: P parts, L inverted lists.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from engine.errors import ArtifactError
from engine.index.files import (
    INDEX,
    MAPPED,
    TRAINED,
    IndexFile,
    MappedLists,
    PartMarker,
    WrittenFile,
    list_sizes,
    parse_index,
    part_path,
    read_index,
    read_part,
    serialized_lists,
    write_index,
    writing,
)
from engine.index.plan import FAST_SCAN
from shards.embeddings import Stamp
from shards.errors import DiskFullError

_PLAIN = "index.plain"
_WINDOW_BYTES = 64 * 2**20
"""Of lists read from all parts at a time."""
_ID_BYTES = 8

Counts = npt.NDArray[np.int64]


def check_parts(folder: Path, parts: Sequence[range], trained_sha256: str, stamp: Stamp) -> list[PartMarker]:
    """Check that all parts are there, whole, and of one training; hashes all of their bytes.

    Args:
        folder: The index's folder.
        parts: Documents of each part.
        trained_sha256: Hash of the trained index that must have made them.
        stamp: What must have made the embeddings.

    Returns:
        Their markers.

    Raises:
        ArtifactError: A part is missing, damaged, or made from something else; it is named.
    """
    markers = [read_part(folder, number, documents, trained_sha256, stamp) for number, documents in enumerate(parts)]
    for marker in markers:
        path = marker.file.check(folder, fully=True)
        held = MappedLists(path)
        if (found := int(list_sizes(held.lists).sum())) != marker.num_documents:
            raise ArtifactError(
                f"the index part {path} holds {found} documents",
                expected=f"{marker.num_documents}",
                remedy=f"delete {path} and start again",
            )
    return markers


def merge_parts(folder: Path, factory: str, parts: Sequence[range], trained_sha256: str, stamp: Stamp) -> IndexFile:
    """Merge all parts into `index.faiss`; the parts stay.

    Args:
        folder: The index's folder.
        factory: FAISS factory string of the merged index.
        parts: Documents of each part, contiguous and complete.
        trained_sha256: As in `check_parts`.
        stamp: As in `check_parts`.

    Returns:
        The merged index's file.

    Raises:
        ArtifactError: As in `check_parts`.
        DiskFullError: The disk has too little room, which is looked at first.
    """
    markers = check_parts(folder, parts, trained_sha256, stamp)
    trained = read_index(folder / TRAINED, trained_sha256)
    interleaved = FAST_SCAN.search(factory) is not None
    num_bytes = sum(marker.file.num_bytes for marker in markers)
    _require_room(folder, num_bytes * (2 if interleaved else 1))
    num_documents = sum(len(documents) for documents in parts)
    path = folder / (_PLAIN if interleaved else INDEX)
    with writing(path, num_bytes=num_bytes) as file:
        file.write(header_of(trained, num_documents))
        write_lists(file, [part_path(folder, number) for number in range(len(parts))])
    assert file.described
    merged = file.described
    _check_total(path, num_documents)
    if interleaved:
        merged = _interleave(path, factory, folder / INDEX)
        path.unlink()
    return merged


def header_of(trained: faiss.Index, num_documents: int) -> bytes:
    """Return the bytes of a FAISS index up to its lists, which stand at the end.

    Args:
        trained: With empty lists; is told of the documents.
        num_documents: That the lists behind the header hold.

    Raises:
        ArtifactError: This FAISS writes such an index otherwise.
    """
    ivf = faiss.extract_index_ivf(trained)
    trained.ntotal = ivf.ntotal = num_documents
    data: bytes = faiss.serialize_index(trained).tobytes()
    empty = serialized_lists(ivf.invlists)
    if not data.endswith(empty):
        raise ArtifactError(
            f"FAISS {faiss.__version__} does not write the lists of {type(faiss.downcast_index(ivf)).__name__} last",
            remedy="set index.placement=parts, which needs no merge, or name another index.factory",
        )
    return data[: -len(empty)]


def write_lists(file: WrittenFile, paths: Sequence[Path]) -> None:
    """Write the lists of all parts as FAISS would write those of one index, reading a window of lists at a time.

    Args:
        file: Where to.
        paths: The parts, in the order of their documents.
    """
    held = [MappedLists(path) for path in paths]  # opened for their sizes alone
    code_bytes = held[0].code_size
    sizes_PL = np.stack([list_sizes(one.lists) for one in held])
    num_lists = sizes_PL.shape[1]
    for word in (b"ilar", _u64(num_lists), _u64(code_bytes), b"full", _u64(num_lists)):
        file.write(word)
    file.write(sizes_PL.sum(axis=0).astype("<u8").tobytes())
    bytes_PL = sizes_PL * (code_bytes + _ID_BYTES)
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        for one, path, total in zip(files, paths, bytes_PL.sum(axis=1).tolist(), strict=True):
            one.seek(path.stat().st_size - total)
        for window in _windows(bytes_PL.sum(axis=0)):
            pieces = [
                memoryview(one.read(total))
                for one, total in zip(files, bytes_PL[:, window].sum(axis=1).tolist(), strict=True)
            ]
            file.writelines(_joined(pieces, sizes_PL[:, window], code_bytes))


def _joined(pieces: Sequence[memoryview], sizes_PL: Counts, code_bytes: int) -> list[memoryview]:
    """Cut the parts' bytes of a few lists and put them in the order of the merged file."""
    ordered: list[memoryview] = []
    places = [0] * len(pieces)
    for sizes_P in sizes_PL.T.tolist():
        ids = []
        for part, size in enumerate(sizes_P):
            if size:
                start = places[part]
                middle = start + size * code_bytes
                places[part] = middle + size * _ID_BYTES
                ordered.append(pieces[part][start:middle])
                ids.append(pieces[part][middle : places[part]])
        ordered += ids
    return ordered


def _windows(bytes_L: Counts) -> list[slice]:
    """Cut the lists into runs of about `_WINDOW_BYTES`, at least one list each."""
    windows, first, held = [], 0, 0
    for number, size in enumerate(bytes_L.tolist()):
        if held and held + size > _WINDOW_BYTES:
            windows.append(slice(first, number))
            first, held = number, 0
        held += size
    return [*windows, slice(first, len(bytes_L))]


def _interleave(path: Path, factory: str, out_path: Path) -> IndexFile:
    """Write the index of plain 4-bit codes as one of interleaved ones; the plain one is mapped, not loaded."""
    index = parse_index(path, MAPPED)  # kept alive: what is extracted from it does not own it
    outer: Any = faiss.downcast_index(index)
    plain: Any = faiss.downcast_index(faiss.extract_index_ivf(outer))
    model = faiss.index_factory(outer.d, factory, faiss.METRIC_INNER_PRODUCT)
    typed: Any = faiss.downcast_index(faiss.extract_index_ivf(model))
    interleaved = faiss.IndexIVFPQFastScan(plain, typed.bbs)
    if outer.this == plain.this:
        return write_index(interleaved, out_path)
    outer.own_fields = False
    outer.index = interleaved
    try:
        return write_index(outer, out_path)
    finally:
        outer.index = plain
        outer.own_fields = True


def _check_total(path: Path, num_documents: int) -> None:
    """Look at the merged file with FAISS's eyes."""
    index = parse_index(path, MAPPED)
    found = int(list_sizes(faiss.extract_index_ivf(index).invlists).sum())
    if found != num_documents:
        raise ArtifactError(
            f"the merged index {path} holds {found} documents",
            expected=f"{num_documents}, as its parts",
            remedy="set index.placement=parts, which needs no merge",
        )


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"the disk of {folder} has {free} bytes free, the merged index needs {needed} beside its parts",
            remedy="make room and start again, the parts are kept; or set index.placement=parts, which merges nothing",
        )


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "little")

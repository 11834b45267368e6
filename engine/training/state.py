"""Training state on disk: float32 weights and Adam's moments by parameter, for any number of ranks and ZeRO stage.

Every rank writes the fragments that it holds (`engine.training.fragments`) into safetensors files of bounded size, and
reads whatever overlaps those that it is to hold, which may have been written by other ranks. Without ZeRO all ranks
hold the same, so each writes an equal share of it. Nothing is gathered, nothing is pickled.

    weights-00003-000.safetensors      `weights/NAME@START` [F]: of rank 3, its first file
    optimizer-00003-000.safetensors    `exp_avg/NAME@START`, `exp_avg_sq/NAME@START` [F], `steps/NAME@START` [1]

F: elements of a fragment, which begins at START in the flattened parameter NAME.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engine.errors import ArtifactError
from engine.training.fragments import MOMENTS, Fragment
from shards.files import sha256_file, write_atomically
from shards.partition import split_range

MAX_FILE_BYTES = 2**28
"""Tensors of one file, in bytes; while it is written, a rank holds about twice as much."""
_FLOAT_BYTES = 4


def rank_share(fragments: Iterable[Fragment], rank: int, world_size: int) -> Iterator[Fragment]:
    """Cut fragments that all ranks hold into equal runs, and keep this rank's."""
    for fragment in fragments:
        share = split_range(fragment.length, rank, world_size)
        if len(share):
            yield fragment.narrow(share.start, len(share))


def write_state(folder: Path, fragments: Sequence[Fragment], rank: int) -> dict[str, dict[str, Any]]:
    """Write this rank's fragments, and read every file back to see that the disk has it.

    Args:
        folder: Takes the files; the ranks share it.
        fragments: What this rank has to write; no other rank writes the same elements.
        rank: Part of the files' names.

    Returns:
        File name to its `bytes` and `sha256`.

    Raises:
        ArtifactError: A file does not read back as it was written.
        DiskFullError: There was no space for it.
    """
    files: dict[str, dict[str, Any]] = {}
    for kind, parts in (("weights", ("weights",)), ("optimizer", MOMENTS)):
        for number, batch in enumerate(_batches(fragments, len(parts))):
            tensors = {
                f"{part}/{fragment.name}@{fragment.start}": _to_numpy(fragment.parts_F[part])
                for fragment in batch
                for part in parts
            }
            if kind == "optimizer":
                tensors |= {f"steps/{piece.name}@{piece.start}": _to_numpy(piece.steps.view(1)) for piece in batch}
            path = folder / f"{kind}-{rank:05d}-{number:03d}.safetensors"
            files[path.name] = _write_verified(path, save(tensors))
    return files


def read_state(folder: Path, names: Iterable[str], fragments: Sequence[Fragment]) -> None:
    """Fill fragments from files that any number of ranks wrote.

    Args:
        folder: Holds the files.
        names: All files of all ranks, which have been verified.
        fragments: What this rank is to hold; written in place.

    Raises:
        ArtifactError: The files hold other parameters than the model, or not all elements of one.
    """
    with ExitStack() as stack:
        pieces: dict[str, list[_Piece]] = defaultdict(list)
        for name in names:
            file = stack.enter_context(_open(folder / name))
            for key in file.keys():  # noqa: SIM118 - the reader of safetensors is no mapping
                what, _, start = key.rpartition("@")
                pieces[what].append(_Piece(int(start), file.get_slice(key)))
        for fragment in fragments:
            fragment.steps.zero_()
        for fragment in fragments:
            for part, target_F in fragment.parts_F.items():
                _fill(folder, f"{part}/{fragment.name}", target_F, fragment.start, pieces)
            # A rank's parameters may share a counter; one that took no gradient yet counts less than the others.
            seen = max(float(piece.elements[:]) for piece in pieces[f"steps/{fragment.name}"])
            fragment.steps.fill_(max(float(fragment.steps), seen))


def parameters_in(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Return the parameters that files hold, with their numbers of elements."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        with _open(folder / name) as file:
            for key in file.keys():  # noqa: SIM118
                part, _, rest = key.partition("/")
                if part == "weights":
                    counts[rest.rpartition("@")[0]] += file.get_slice(key).get_shape()[0]
    return dict(counts)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a parameter's elements in some file; `elements` is read when it is sliced."""

    start: int
    elements: Any

    @property
    def stop(self) -> int:
        return self.start + int(self.elements.get_shape()[0])


def _batches(fragments: Sequence[Fragment], num_parts: int) -> Iterator[list[Fragment]]:
    """Cut and group fragments so that no group exceeds a file's size."""
    room = limit = max(1, MAX_FILE_BYTES // (_FLOAT_BYTES * num_parts))
    batch: list[Fragment] = []
    for fragment in fragments:
        start = 0
        while start < fragment.length:
            taken = min(room, fragment.length - start)
            batch.append(fragment.narrow(start, taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _to_numpy(tensor: torch.Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _write_verified(path: Path, content: bytes) -> dict[str, Any]:
    with write_atomically(path, num_bytes=len(content)) as temporary:
        temporary.write_bytes(content)
    written = hashlib.sha256(content).hexdigest()
    found = sha256_file(path)
    if found != written:
        raise ArtifactError(
            f"{path} reads back with sha256 {found}",
            expected=f"{written}, which was written",
            remedy="the disk loses data: use another one; the checkpoint before this one is kept",
        )
    return {"bytes": len(content), "sha256": written}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _fill(folder: Path, what: str, target_F: torch.Tensor, start: int, pieces: dict[str, list[_Piece]]) -> None:
    stop, filled = start + target_F.numel(), 0
    for piece in pieces.get(what, ()):
        first, last = max(start, piece.start), min(stop, piece.stop)
        if first < last:
            target_F[first - start : last - start].copy_(piece.elements[first - piece.start : last - piece.start])
            filled += last - first
    if filled != target_F.numel():
        raise ArtifactError(
            f"the checkpoint {folder} has {filled} of the elements {start} to {stop} of {what}",
            expected="each exactly once",
            remedy="the checkpoint is of another model; start in a new run folder",
        )

"""Training state on disk: what any number of ranks wrote, any other number reads, every element once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import engine.training.state as training_state
from engine.errors import ArtifactError
from engine.training.fragments import MOMENTS, Fragment
from engine.training.state import parameters_in, rank_share, read_state, write_state

SIZES = {"encoder.weight": 23, "head@odd/name": 5, "one": 1}


def whole(seed: int | None, steps: float) -> list[Fragment]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = ("weights", *MOMENTS)
    return [
        Fragment(
            name,
            0,
            {part: torch.zeros(size) if seed is None else torch.randn(size, generator=generator) for part in parts},
            torch.tensor(steps),
        )
        for name, size in SIZES.items()
    ]


def cut(fragments: list[Fragment], rank: int, world_size: int) -> list[Fragment]:
    return list(rank_share(fragments, rank, world_size))


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("file_bytes", [2**28, 48])
def test_any_number_of_ranks_reads_what_any_other_wrote(
    writers: int, readers: int, file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_state, "MAX_FILE_BYTES", file_bytes)
    written, names = whole(7, 40.0), []
    for rank in range(writers):
        files = write_state(tmp_path, cut(written, rank, writers), rank)
        assert all((tmp_path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
        names += list(files)
    assert parameters_in(tmp_path, names) == SIZES
    read = whole(None, 3.0)
    for rank in range(readers):
        read_state(tmp_path, names, cut(read, rank, readers))
    for one, other in zip(written, read, strict=True):
        assert float(other.steps) == 40.0
        assert all(torch.equal(one.parts_F[part], other.parts_F[part]) for part in one.parts_F)


def test_files_stay_below_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "MAX_FILE_BYTES", 64)
    files = write_state(tmp_path, whole(7, 1.0), 0)
    assert len([name for name in files if name.startswith("weights-")]) == 2, "29 floats, 16 to a file"
    assert len([name for name in files if name.startswith("optimizer-")]) == 4, "twice 29 floats, 8 pairs to a file"


def test_elements_that_no_file_has_are_an_error(tmp_path: Path) -> None:
    files = write_state(tmp_path, cut(whole(7, 1.0), 0, 2), 0)
    with pytest.raises(ArtifactError, match=r"has 11 of the elements 0 to 23 of weights/encoder\.weight"):
        read_state(tmp_path, files, whole(None, 0.0))


def test_a_file_that_reads_back_differently_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: a disk that loses data is noticed when the checkpoint is needed."""
    monkeypatch.setattr(training_state, "sha256_file", lambda path: "0" * 64)
    with pytest.raises(ArtifactError, match="reads back with sha256 0000"):
        write_state(tmp_path, whole(7, 1.0), 0)


def test_parameters_that_share_a_counter_take_the_highest(tmp_path: Path) -> None:
    """One that took no gradient has no moments either, so the higher count changes nothing for it."""
    written = whole(7, 5.0)
    written[0].steps.zero_()
    files = write_state(tmp_path, written, 0)
    shared, read = torch.tensor(9.0), whole(None, 0.0)
    read = [Fragment(fragment.name, 0, fragment.parts_F, shared) for fragment in read]
    read_state(tmp_path, files, read)
    assert float(shared) == 5.0

"""Artifacts of the training queries are joined part by part: neither memory nor open files grow with their number."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.data import candidates, teacher_scores
from engine.data.arrays import OpenedInTurn, Pieces, write_arrays
from engine.data.candidates import Candidates
from engine.data.teacher_scores import TeacherScores, scores_of_queries
from shards.embeddings import Stamp

STAMP = Stamp("3", "a" * 64, "c" * 64)
NUM_PARTS = 60


@pytest.fixture
def few_files() -> Iterator[None]:
    """As on a machine where a process may have 1024 open files, of which a pass over a million queries has more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_files")
def test_more_parts_of_candidates_than_open_files_are_joined(tmp_path: Path) -> None:
    """Symptom: "Too many open files" at the end of a search of all training queries."""
    folders = [tmp_path / f"{number:03d}" for number in range(NUM_PARTS)]
    for number, folder in enumerate(folders):
        documents_QK = np.full((2, 3), number)
        qids = [f"{number}a", f"{number}b"]
        Candidates("bm25", STAMP, qids, documents_QK, np.zeros((2, 3), np.float32), Counter(seen=1)).save(folder)
    candidates.join(OpenedInTurn(partial(Candidates.load, stamp=STAMP), folders), tmp_path / "whole")
    whole = Candidates.load(tmp_path / "whole", STAMP)
    assert [int(whole.row(f"{number}b")[0]) for number in range(NUM_PARTS)] == list(range(NUM_PARTS))
    assert whole.counts == {"seen": NUM_PARTS}


@pytest.mark.usefixtures("few_files")
def test_more_parts_of_scores_than_open_files_are_joined(tmp_path: Path) -> None:
    folders = [tmp_path / f"{number:03d}" for number in range(NUM_PARTS)]
    for number, folder in enumerate(folders):
        scored = [(f"{number}", np.array([number, number + 1]), np.array([number, -1.0], dtype=np.float32))]
        scores_of_queries("ranker", STAMP, scored, counts=Counter(seen=1)).save(folder)
    teacher_scores.join(OpenedInTurn(partial(TeacherScores.load, stamp=STAMP), folders), tmp_path / "whole")
    whole = TeacherScores.load(tmp_path / "whole", STAMP)
    assert [float(whole.of(f"{number}", np.array([number]))[0]) for number in range(NUM_PARTS)] == list(
        range(NUM_PARTS)
    )
    assert whole.counts == {"seen": NUM_PARTS}


def test_parts_are_opened_in_order_and_by_runs() -> None:
    opened = OpenedInTurn(lambda path: path.name, [Path(name) for name in "abcd"])
    assert (list(opened), len(opened), opened[2], list(opened[1:3])) == (["a", "b", "c", "d"], 4, "c", ["b", "c"])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([np.zeros((1, 3)), np.zeros((1, 3))], "have 2 rows of an array that is"),
        ([np.zeros((3, 2))], r"a piece is float64 \(3, 2\)"),
        ([np.zeros((3, 3), np.float32)], "a piece is float32"),
    ],
)
def test_pieces_that_do_not_make_the_array_leave_no_file(
    tmp_path: Path, pieces: list[np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_arrays(tmp_path, {"x.npy": Pieces((3, 3), np.float64, pieces)})
    assert list(tmp_path.iterdir()) == []

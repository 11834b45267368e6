"""Trains the coarse lists of an index by all ranks: k-means whose iterations are handed out in units of the sample.

An iteration is two passes. In the first each rank finds the lists of the rows of the units that it is handed and adds
these to sums of its own, which go into one file a rank; in the second ranks are handed ranges of lists, of which they
add up all files. Files, because sums of millions of numbers are more than a coordinator's message holds, and because
a collective operation would leave everybody waiting for a rank that died. Sums are exact (`engine.index.kmeans`), so
the bytes are the same for any number of ranks, however the units were dealt. Rank 0 joins the ranges, splits the lists
that lost all their rows, and writes the centroids and after them the state: what a training that was killed goes on
from, at the cost of one iteration.

Shapes: N rows of a unit, D dimensions, L lists, S lists of a range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from engine.errors import ArtifactError
from engine.index.exact import Floats
from engine.index.files import IndexFile
from engine.index.kmeans import (
    Assigner,
    Labels,
    ListSums,
    movement_of,
    normalized,
    quantum_of,
    split_empty,
)
from engine.index.sample import Sample
from engine.index.scratch import described, save_scratch, write_scratch
from engine.index.steps import Steps
from shards.files import parse_record, read_record

_RANGE = 2048
"""Lists whose sums are added up at a time."""
_STATE = "lists.json"

_Finder = Callable[[int, Floats], tuple[Labels, Floats | None]]
"""Takes a unit and its rows; returns their lists, and their inner products with the centroids where it knows them."""


@dataclass(frozen=True, slots=True)
class ListsState:
    """How far the k-means of the lists has come."""

    file: IndexFile
    """The centroids."""
    labels: IndexFile | None = None
    """The list of each row of the sample before the last iteration's update."""
    from_labels: bool = False
    """Whether they have been recomputed from the rows that the last index's lists held."""
    scores: tuple[float, ...] = ()
    """Mean inner product of a row with its centroid, before each iteration's update."""
    movements: tuple[float, ...] = ()
    """How far the centroids went in each iteration, relative to their length."""
    num_split: tuple[int, ...] = ()
    """Lists that had lost all their rows, in each iteration."""

    @property
    def num_iterations(self) -> int:
        """Iterations done."""
        return len(self.scores)


class ListTraining:
    """The k-means of an index's lists; all ranks make one alike and call its methods alike.

    Args:
        steps: Of the training.
        sample: Written.
        folder: Of the training.
        first: Makes the first centroids, float32 [L, D] of length one, on rank 0; not called where a state is there.
    """

    def __init__(self, steps: Steps, sample: Sample, folder: Path, first: Callable[[], Floats]) -> None:
        self._steps, self._sample, self._folder = steps, sample, folder
        begun = steps.alone("begin the lists", lambda: asdict(self._read_or_begin(first)))
        self.state = parse_record(begun, ListsState, "the state of the lists")
        norm = steps.alone("the longest row", sample.largest_norm)
        self._quantum = quantum_of(norm, len(sample))

    def recompute(self, labels: Callable[[], Labels]) -> None:
        """Make each list's centroid anew from the rows that it had in another index.

        Args:
            labels: Returns the list of each row of the sample, int32; called on every rank, unless it has been done.
        """
        if self.state.from_labels:
            return

        def given(_: Floats) -> _Finder:
            held_N = labels()
            return lambda unit, _: (held_N[slice(*_ends(self._sample.units[unit]))], None)

        self._update("recompute the lists", given, lambda *_: replace(self.state, from_labels=True))

    def iterate(self) -> None:
        """Do an iteration of k-means; it leaves the list of each row in the folder."""

        def searched(centroids_LD: Floats) -> _Finder:
            assigner = Assigner(centroids_LD, self._steps.num_threads, self._steps.device)

            def find(unit: int, rows_ND: Floats) -> tuple[Labels, Floats]:
                labels_N, scores_N = assigner.nearest(rows_ND)
                save_scratch(self._labels_path(unit), labels_N)
                return labels_N, scores_N

            return find

        def noted(score: float, movement: float, num_split: int) -> ListsState:
            state, path = self.state, self._folder / f"labels-of-{self.state.num_iterations + 1:03d}.npy"
            units = range(len(self._sample.units))
            save_scratch(path, np.concatenate([np.load(self._labels_path(unit)) for unit in units]))
            return replace(
                state,
                labels=described(path),
                scores=(*state.scores, score),
                movements=(*state.movements, movement),
                num_split=(*state.num_split, num_split),
            )

        self._update(f"lists, iteration {self.state.num_iterations + 1}", searched, noted)

    def centroids(self) -> Floats:
        """Read the centroids: float32 [L, D]."""
        return _read_centroids(self._folder, self.state)

    def labels(self) -> Labels:
        """Read the list of each row in the last iteration, of which there was one: int32, of the whole sample."""
        assert self.state.labels
        labels_N: Labels = np.load(self.state.labels.check(self._folder, fully=True), allow_pickle=False)
        return labels_N

    def _read_or_begin(self, first: Callable[[], Floats]) -> ListsState:
        try:
            state = read_record(self._folder / _STATE, ListsState, "the state of the lists")
            for file in (state.file, state.labels):
                if file:
                    file.check(self._folder, fully=True)
            return state
        except ArtifactError:
            return self._save(first(), ListsState(IndexFile("", 0, "")))  # there is none to go on with

    def _update(
        self,
        what: str,
        make: Callable[[Floats], _Finder],
        note: Callable[[float, float, int], ListsState],
    ) -> None:
        """Add up the rows of each list and make its centroid of them, all ranks together.

        Args:
            what: Is done.
            make: Takes the centroids and returns what finds the lists of the rows of a unit.
            note: Takes the rows' mean score, the centroids' movement and the number of lists that were split, on rank
                0, and returns the state after this.
        """
        before_LD = self.centroids()
        with self._steps.shared(what, range(len(self._sample.units))) as units:
            find, sums = make(before_LD), ListSums(len(before_LD), before_LD.shape[1], self._quantum)
            for unit in units:
                rows_ND = self._sample.rows(unit)
                sums.add(rows_ND, *find(unit, rows_ND))
            has_rows = bool(sums.counts_L.any())
            if has_rows:
                save_scratch(self._of_rank("sums", self._steps.coordinator.rank), sums.sums_LD)
                save_scratch(self._of_rank("counts", self._steps.coordinator.rank), sums.counts_L)
        told = self._steps.every(f"{what}: who", [has_rows, sums.score])
        del find, sums
        ranks = [rank for rank, (has, _) in enumerate(told) if has]
        ranges = range(0, len(before_LD), _RANGE)
        with self._steps.shared(f"{what}: add up", ranges) as firsts:
            for first in firsts:
                every = [np.load(self._of_rank("sums", rank), mmap_mode="r") for rank in ranks]
                total_SD = np.sum([sums_LD[first : first + _RANGE] for sums_LD in every], axis=0)
                save_scratch(self._of_range(first), normalized(total_SD))

        def finish() -> dict[str, object]:
            after_LD = np.concatenate([np.load(self._of_range(first)) for first in ranges])
            counts_L = np.sum([np.load(self._of_rank("counts", rank)) for rank in ranks], axis=0)
            num_split = split_empty(after_LD, counts_L)
            score = sum(score for _, score in told) / len(self._sample)
            return asdict(self._save(after_LD, note(score, movement_of(before_LD, after_LD), num_split)))

        self.state = parse_record(self._steps.alone(f"{what}: done", finish), ListsState, "the state of the lists")

    def _save(self, centroids_LD: Floats, state: ListsState) -> ListsState:
        """Write centroids, and after them the state, which alone says that they are there."""
        path = self._folder / f"lists-{state.num_iterations + state.from_labels:03d}.npy"
        save_scratch(path, centroids_LD)
        state = replace(state, file=described(path))
        write_scratch(self._folder / _STATE, asdict(state))
        kept = {state.file.name, state.labels.name if state.labels else ""}
        for old in [*self._folder.glob("lists-*.npy"), *self._folder.glob("labels-of-*.npy")]:
            if old.name not in kept:
                old.unlink()
        return state

    def _labels_path(self, unit: int) -> Path:
        return self._folder / f"labels-{unit:05d}.npy"

    def _of_rank(self, what: str, rank: int) -> Path:
        return self._folder / f"{what}-{rank:05d}.npy"

    def _of_range(self, first: int) -> Path:
        return self._folder / f"means-{first:08d}.npy"


def _read_centroids(folder: Path, state: ListsState) -> Floats:
    centroids_LD: Floats = np.load(state.file.check(folder, fully=True), allow_pickle=False)
    return centroids_LD


def _ends(rows: range) -> tuple[int, int]:
    return rows.start, rows.stop

"""The refresh of an index beside the ranker's phase, which then trains on what the refresh before has found.

What goes on beside it is done by companions (`engine.refresh.companion`) while the ranks train:

* `ar2.overlap: ranker`. The corpus is encoded first, by all ranks, as ever: it takes the devices that training wants.
  What follows takes processors (the index is trained, filled, tuned and searched for all training queries), and is done
  by one companion of each rank.
* `ar2.overlap: split`. The corpus is encoded beside the training, too, by companions with devices of their own
  (`Run.refreshers`), which the first rank of each host starts. Their number is independent of the ranks'.

Both ends are waited for, and then the companions' stages stand in the run's ledger like any others. Whatever is
interrupted goes on from its own checkpoint or finished part: both are functions of published weights and earlier
candidates, so the result is that of an undisturbed run, for any number of ranks and of companions.

Source: AR2 Table 8, by which refreshing takes more than half of the hours. ANCE (Xiong et al. 2021, section 4) divides
its machines likewise, but lets training go on with whatever index is there, so that how stale it is depends on the
machines; here it is always one refresh.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource
from engine.errors import ConfigError
from engine.models.weights import weights_sha256
from engine.refresh.companion import Companions, Order, meeting_path
from engine.refresh.refresh import note_staleness, pool_of, stages_beside
from engine.retrievers.dense import encode_dense
from engine.retrievers.kinds import dense
from engine.run import Refresher, Run, Stage

_SHOWN_OF_SHA256 = 12


@dataclass
class Refreshed:
    """What is drawn from: until the refresh has ended, what was before it.

    Attributes:
        candidates: Of one retriever, or a pool.
    """

    candidates: NegativeSource


@dataclass(frozen=True, slots=True)
class Overlap:
    """Result of a stage `overlap/ITERATION`: how long a refresh and the training beside it took.

    Where a start was interrupted in between, seconds are those of the last one.

    Attributes:
        training_seconds: Of the ranker's phase.
        refresh_seconds: Of the stages beside it.
        companion_seconds: Of rank 0's companions, which open the run before they begin; 0 where nothing was left to do.
        wall_seconds: From the beginning of both to the end of both.
        hidden_seconds: How much of the shorter one the longer one hides.
    """

    training_seconds: float
    refresh_seconds: float
    companion_seconds: float
    wall_seconds: float
    hidden_seconds: float


@contextmanager
def refreshed_beside(run: Run, data: Data, found: NegativeSource, *, iteration: int) -> Iterator[Refreshed]:
    """Refresh the index of an iteration beside the body, which trains the ranker, and wait for both.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        found: What the last refresh found.
        iteration: Whose retriever, from 1. One without a refresh is the body alone.

    Yields:
        What holds the new candidates after the body, and `found` until then.

    Raises:
        CompanionCrash: The refresh ended by an error of the program.
        SparringError: The refresh failed, as of `refresh_index`.
        Preempted: This start was asked to stop.
    """
    drawn = Refreshed(found)
    if not run.timetable.is_refreshed(iteration):
        yield drawn
        return
    weights = WeightsOf(run.timetable.encoder, iteration)
    name = run.timetable.artifact(weights)
    if not run.timetable.encodes_beside:
        encode_dense(run, data, run.folder, dense(weights), "")
    sha256 = weights_sha256(run.folder.weights(weights.model, weights.state))[:_SHOWN_OF_SHA256]
    folder = run.folder.beside / f"{name}-{sha256}"
    run.adopt(folder / "ledger.json")  # of an interrupted start
    beside = stages_beside(run.timetable, name)
    for stage in beside:
        run.end_before(stage)
    start = time.monotonic()
    companions = None
    if not all(map(run.is_finished, beside)):
        companions = _start(run, folder, name, f"the refresh beside ranker/{iteration}")
    try:
        yield drawn
    except BaseException as error:
        if companions is not None:
            companions.end_with(error)
        raise
    if companions is not None:
        companions.join()
        run.adopt(folder / "ledger.json")
    wall_seconds = time.monotonic() - start
    run.coordinator.only_rank_zero(f"{name}: clear", lambda: shutil.rmtree(run.folder.beside, ignore_errors=True))
    drawn.candidates = pool_of(run, data, name)
    took = companions.seconds if companions is not None else None
    run.once(f"overlap/{iteration}", note_overlap, beside, took or 0.0, wall_seconds, iteration=iteration)
    note_staleness(run, iteration)


def note_overlap(
    stage: Stage, beside: tuple[str, ...], companion_seconds: float, wall_seconds: float, *, iteration: int
) -> Overlap:
    """Record what was saved by doing two things at once.

    Args:
        stage: Where this runs.
        beside: The stages that ran beside the ranker's phase.
        companion_seconds: As of `Overlap`.
        wall_seconds: As of `Overlap`.
        iteration: Whose.
    """
    run = stage.run
    training = run.seconds_of(f"ranker/{iteration}")
    refresh = sum(run.seconds_of(name) for name in beside)
    hidden = max(0.0, min(training, refresh, training + refresh - wall_seconds)) if companion_seconds else 0.0
    found = Overlap(*(round(one, 3) for one in (training, refresh, companion_seconds, wall_seconds, hidden)))
    run.metrics.write(stage.name, iteration, {f"overlap/{key}": value for key, value in asdict(found).items()})
    return found


def _start(run: Run, folder: Path, name: str, label: str) -> Companions:
    """Start the companions of all ranks: one of each on its own device, or one on each device that is kept for them."""
    coordinator, splits = run.coordinator, run.timetable.encodes_beside
    own = run.refreshers if splits else (Refresher(str(run.device)),)
    numbers: list[int] = coordinator.gather(f"{label}: companions", len(own))
    first, num_companions = sum(numbers[: coordinator.rank]), sum(numbers)
    if not run.companion_command or not num_companions:
        raise ConfigError(
            "ar2.overlap is set, but whoever opened this run has not said how to start a process beside it"
            + (" and on which devices" if splits else ""),
            expected="a run that `train` or launcher/run.py has started",
            remedy="start it so, or set ar2.overlap=none",
        )

    def prepare() -> list[str]:
        for other in run.folder.beside.glob("*"):
            if other != folder:  # of weights that are no more
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for words in [*folder.glob("ended-*.json"), *folder.glob("stop-*"), meeting_path(folder)]:
            words.unlink(missing_ok=True)
        return [secrets.token_hex(8), run.lock.nonce if run.lock is not None else ""]

    token, nonce = coordinator.only_rank_zero(f"{label}: prepare", prepare)
    address = "127.0.0.1" if len(set(coordinator.hosts)) == 1 else coordinator.address
    orders = [
        Order(
            run=str(run.folder.path),
            name=name,
            folder=str(folder),
            number=number,
            num_companions=num_companions,
            rank=coordinator.rank,
            device=one.device,
            address=address,
            nonce=nonce,
            token=token,
            timeout_seconds=run.config.run.timeout_seconds,
            heartbeat_seconds=run.config.run.heartbeat_seconds,
        )
        for number, one in enumerate(own, start=first)
    ]
    told = list(zip(orders, own, strict=True))
    with coordinator.agreement(f"{label}: start"):
        return Companions(run, told, label, folder=folder, token=token, num_companions=num_companions)

"""Heartbeats: one small file a rank, `RUN/heartbeats/rank-00003.json`, that says who it is, what it does and how far.

They are written every few seconds by `engine.reliability.watchdog` and read by the other ranks' watchdogs and by
`python -m launcher status`. They are the one thing of a run that is not fsynced: a lost heartbeat is the next one's
matter. Ages are taken with the reader's own clock from the moment at which it saw a beat change, never by comparing
the clocks of two hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from engine.reliability.activity import Activity, describe
from engine.reliability.processes import Signed, own_place
from shards.errors import ArtifactError
from shards.files import read_record

RUNNING, STOPPING, ENDED = "running", "stopping", "ended"
_BEATS_OF_A_SPEED = 12


@dataclass(frozen=True, slots=True)
class Beat(Signed):
    """One heartbeat of one rank."""

    rank: int
    world_size: int
    attempt: str
    """Nonce of the start that this rank belongs to."""
    number: int
    """Counts the beats of this process."""
    time: float
    """Seconds since 1970, by this rank's clock."""
    state: str
    """`running`, `stopping` after a request to stop, `ended` with `code`."""
    code: int | None
    stage: str
    done: int
    total: int
    unit: str
    speed: float | None
    """Units a second over the last beats; None where nothing is counted or nothing has moved."""
    waiting_for: str
    waiting_seconds: float
    last_point: str
    """The last point that all ranks came to."""
    at: str
    """The innermost function of the main thread, such as `all_reduce (distributed_c10d.py:2823)`."""
    in_collective: bool
    """Whether the main thread is inside a collective operation of torch."""

    @property
    def who(self) -> str:
        """Name the rank as messages do."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        """Say where the rank was."""
        return describe(self.stage, self.done, self.total, self.unit, self.waiting_for)


class Heart:
    """Writes the beats of this process.

    Args:
        folder: `RUN/heartbeats`.
        rank: This process.
        world_size: Number of ranks.
        attempt: Nonce of this start.
        activity: What to tell.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, attempt: str, activity: Activity) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._attempt, self._activity, self._number = attempt, activity, 0
        self._seen: deque[tuple[float, int]] = deque(maxlen=_BEATS_OF_A_SPEED)
        self._piece = -1
        folder.mkdir(parents=True, exist_ok=True)

    def beat(self, state: str, code: int | None = None) -> None:
        """Write the next heartbeat.

        Args:
            state: `running`, `stopping` or `ended`.
            code: The exit code, where it has ended.
        """
        self._number += 1
        activity, now = self._activity, time.monotonic()
        at, in_collective = main_thread_at()
        beat = Beat(
            rank=self._rank,
            world_size=self._world_size,
            attempt=self._attempt,
            host=socket.gethostname(),
            place=own_place(),
            pid=os.getpid(),
            number=self._number,
            time=round(time.time(), 3),
            state=state,
            code=code,
            stage=activity.stage,
            done=activity.done,
            total=activity.total,
            unit=activity.unit,
            speed=self._speed(now),
            waiting_for=activity.waiting_for,
            waiting_seconds=round(now - activity.waiting_since, 1) if activity.waiting_for else 0.0,
            last_point=activity.last_point,
            at=at,
            in_collective=in_collective,
        )
        path = beat_path(self._folder, self._rank)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _speed(self, now: float) -> float | None:
        if self._activity.piece != self._piece:
            self._piece = self._activity.piece
            self._seen.clear()
        self._seen.append((now, self._activity.done))
        (first, done), seconds = self._seen[0], now - self._seen[0][0]
        moved = self._activity.done - done
        return round(moved / seconds, 4) if self._activity.total and moved > 0 and now > first else None


def main_thread_at() -> tuple[str, bool]:
    """Say where the main thread is, and whether that is inside a collective operation of torch."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or threading.current_thread() is threading.main_thread():
        return "", False
    at = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return at, True
        frame = frame.f_back
    return at, False


def beat_path(folder: Path, rank: int) -> Path:
    """Return where a rank's heartbeat lies."""
    return folder / f"rank-{rank:05d}.json"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Read a rank's last heartbeat; None where there is none yet, or none that can be read."""
    return _read(beat_path(folder, rank))


def read_beats(folder: Path) -> list[Beat]:
    """Read the last heartbeats of all ranks of the newest start, in rank order."""
    beats = [beat for path in sorted(folder.glob("rank-*.json")) if (beat := _read(path)) is not None]
    if not beats:
        return []
    newest = max(beats, key=lambda beat: beat.time).attempt
    return [beat for beat in beats if beat.attempt == newest]


def _read(path: Path) -> Beat | None:
    with contextlib.suppress(OSError, ArtifactError):
        return read_record(path, Beat, "a heartbeat")
    return None

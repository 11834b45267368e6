"""Further places that metrics are sent to: wandb and trackio, each an extra, behind one interface.

Nothing that they do, or fail to do, may hold up or end a run: they are spoken to by a thread of their own, through a
queue; the first exception is a line of warning, after which that tracker is left alone.

Both have a run's settings and its metrics by the same names as metrics.jsonl. Steps of two phases are two x-axes:
beside `retriever/loss` stands `retriever/step`, and wandb is told that it is the axis. Offline use is theirs:
`WANDB_MODE=offline`; trackio writes to its folder on this machine unless it is told otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.log import get_logger
from engine.metrics.board import TENSORBOARD

log = get_logger(__name__)
_PROJECT = "sparring"
_MOST_WAITING = 20_000
_FINISH_SECONDS = 30.0
"""How long the end of a run waits for what is still to be sent."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not here, before any work.

    Args:
        names: As `run.trackers`.

    Raises:
        ConfigError: A package is missing.
    """
    for name in names:
        if name != TENSORBOARD and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.trackers names {name}, which is not installed",
                expected=f"the package {name} on every host that may have rank 0",
                remedy=f"pip install '{name}', or leave it out of run.trackers",
            )


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run."""

    folder: Path
    """The run folder; its last part is the run's name."""
    settings: Mapping[str, Any]
    """Dotted key -> value."""

    @property
    def id(self) -> str:
        """The same whenever the folder is gone on with."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]


class Tracker:
    """Sends metrics to one package, from a thread of its own.

    Args:
        name: `wandb` or `trackio`.
        tracked: The run.
    """

    def __init__(self, name: str, tracked: TrackedRun) -> None:
        self._name, self._tracked = name, tracked
        self._waiting: queue.Queue[Mapping[str, float] | None] = queue.Queue(_MOST_WAITING)
        self._failed = False
        self._axes: set[str] = set()
        self._thread = threading.Thread(target=self._send, name=f"to {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one point, in a while; nothing where the tracker has failed.

        Args:
            step: The x-axis of these values.
            values: Tag to number.
        """
        if self._failed:
            return
        axes = {f"{tag.split('/')[0]}/step": step for tag in values if not tag.startswith("seconds/")}
        try:
            self._waiting.put_nowait({**values, **axes})
        except queue.Full:
            self._fail("more is waiting than it takes")

    def finish(self) -> None:
        """Wait for what is still to be sent, for some time."""
        with suppress(queue.Full):  # then it hangs, and was told of
            self._waiting.put_nowait(None)
            self._thread.join(_FINISH_SECONDS)
            if self._thread.is_alive():
                self._fail(f"it has not taken everything within {_FINISH_SECONDS:g} s of the run's end")

    def _send(self) -> None:
        try:
            package: Any = importlib.import_module(self._name)
            run = self._open(package)
            while (values := self._waiting.get()) is not None:
                self._declare(run, values)
                run.log(dict(values))
            run.finish()
        except BaseException as error:  # also SystemExit: some packages end the process where they cannot log in
            self._fail(f"{type(error).__name__}: {error}")

    def _open(self, package: Any) -> Any:
        name = self._tracked.folder.name
        settings = {key: _plain(value) for key, value in self._tracked.settings.items()}
        if self._name == "wandb":
            place = {"dir": str(self._tracked.folder), "id": self._tracked.id}
            return package.init(project=_PROJECT, name=name, config=settings, resume="allow", **place)
        return package.init(project=_PROJECT, name=f"{name}-{self._tracked.id[:6]}", config=settings, resume="allow")

    def _declare(self, run: Any, values: Mapping[str, float]) -> None:
        """Say which x-axis values have, to a package that asks."""
        define: Any = getattr(run, "define_metric", None)
        for axis in {tag for tag in values if tag.endswith("/step")} - self._axes:
            self._axes.add(axis)
            if define is None:
                continue
            define(axis)
            define(f"{axis.removesuffix('step')}*", step_metric=axis)

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            first = reason.splitlines()[0] if reason else ""
            log.warning("%s is told nothing more, the run goes on: %s", self._name, first)


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)

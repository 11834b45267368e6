"""How a rank ends: what it tells, which exit code it gives, and that no other rank is left waiting for it.

`guarded` runs a program's main function. The first failure of a start is told in full, once, by the rank whose it is;
what follows from it on other ranks (a lost connection, a point where somebody did not come) is not told again. All
ranks end with the code of the first failure.

    0    finished
    1    a crash: an error of the program, with its traceback
    2    refused: the user can mend it (configuration, data, artifacts, a folder in use, a file that may not be used)
    75   a rank was lost: dead, stopped or not come; starting again may help
    85   stopped because it was asked to; the same command goes on
    130  an interrupt from the keyboard
    141  the reader of what a command tells went away (`launcher.terminal.streams`)
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.coordination.coordinator import PeerError
from engine.errors import CoordinationError, SparringError
from engine.log import terminal
from engine.reliability.activity import ACTIVITY
from engine.reliability.exit_codes import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_PREEMPTED,
    EXIT_REFUSED,
)
from engine.reliability.failure import Failure
from engine.reliability.preemption import Preempted
from engine.reliability.watchdog import Watchdog, watchdog_of_process
from launcher.terminal.aside import keep, tell_held
from launcher.world.leaving import leave_mpi
from shards.files.unusable import as_told

if TYPE_CHECKING:  # torch takes a moment, and most commands open no world
    from launcher.world.opening import World

_QUIET_SECONDS = 1.0
"""How long a failed rank stays, because starters end all ranks with the first: another may still have to report."""
_CAUSE_SECONDS = 3.0
"""How long a rank whose collective operation failed waits to learn why."""
_CLOSE_SECONDS = 10.0
"""How long ranks that were asked to stop wait for each other at the end."""
_LOST_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)


def guarded(world: World | None, function: Callable[[], int | None]) -> int:
    """Run a program's main function; on an error, tell it once and end this rank so that no other is left waiting.

    An error of ours is one message without a traceback, on the rank whose error it is. The other ranks stop at the
    next point where they meet, silently where another one reports. Where the ranks form an MPI world, an error aborts
    all of them and this function does not return.

    Args:
        world: Closed afterwards; None before it is opened.
        function: What to run; an integer that it returns is the exit code.

    Returns:
        The exit code for `sys.exit`, as listed on top of this module.
    """
    try:
        code = function() or 0
        if world is not None and code == 0:
            world.close()
        _end_watch(code)
        return code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            _tell(world, end.code)
        _end_watch(code)
        return leave_mpi(code) if code else 0
    except KeyboardInterrupt as error:
        if world is not None:
            world.coordinator.report_failure(error)
        if world is None or world.rank == 0:
            _tell(world, "interrupted")
        _end_watch(EXIT_INTERRUPTED)
        return leave_mpi(EXIT_INTERRUPTED)
    except Preempted as stop:
        return _stop(world, stop)
    except PeerError as error:
        return _leave(world, _follow(world, error))
    except SparringError as error:
        return _leave(world, _refuse(world, error))
    except Exception as error:
        if (told := as_told(error)) is None:
            return _leave(world, _crash(world, error))
        keep(traceback.format_exc())
        return _leave(world, _refuse(world, told))


def end_of_process(code: int) -> None:
    """Leave the process; after a failure at once, since libraries that lost their peers may wait for them at exit.

    Args:
        code: The exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code in {0, EXIT_PREEMPTED}:
        sys.exit(code)
    os._exit(code)


def _stop(world: World | None, stop: Preempted) -> int:
    """End a rank that was asked to stop, together with the others, all of them at the same place."""
    watchdog = watchdog_of_process()
    first = watchdog.fail("preempted", str(stop), EXIT_PREEMPTED) if watchdog else None
    if first is None and (watchdog is not None or world is None or world.rank == 0):
        _tell(world, str(stop))
    if world is not None:
        with contextlib.suppress(CoordinationError):  # a rank that was ended meanwhile, or stopped inside a pass
            world.close(_CLOSE_SECONDS)
    _end_watch(EXIT_PREEMPTED)
    return EXIT_PREEMPTED


def _follow(world: World | None, error: PeerError) -> int:
    """Return the code of the rank that failed; tell the error where nobody has."""
    code = EXIT_CRASH if error.crashed else EXIT_LOST if error.lost else EXIT_REFUSED
    watchdog = watchdog_of_process()
    if watchdog is None:
        return code
    if (first := _cause(watchdog)) is None:
        code = EXIT_CRASH if error.crashed else EXIT_LOST
        first = _tell_first(world, watchdog, error, f"{error}\n{watchdog.sightings()}", code)
    return first.code if first else code


def _refuse(world: World | None, error: SparringError) -> int:
    """Tell an error of ours, unless another rank has found the same; return the exit code."""
    lost = isinstance(error, CoordinationError)
    code, watchdog = EXIT_LOST if lost else EXIT_REFUSED, watchdog_of_process()
    if watchdog is None:
        if world is None or not _told_by_another(world, error):
            _tell(world, f"error: {error}")
        return code
    text = f"{error}\n{watchdog.sightings()}" if lost else str(error)
    first = _tell_first(world, watchdog, error, text, code)
    if world is not None:
        world.coordinator.report_failure(error)
    return first.code if first else code


def _crash(world: World | None, error: Exception) -> int:
    """Tell an error of the program, or that a rank was lost where that is what it means; return the exit code."""
    watchdog = watchdog_of_process()
    tell_held()
    if watchdog is not None and isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)):
        first = _cause(watchdog)
        if first is None:
            go_on = "Starting the same command again goes on from the last checkpoint."
            text = f"{_lost_in_collective(watchdog, error)}. {go_on}\n{watchdog.sightings()}"
            first = _tell_first(world, watchdog, error, text, EXIT_LOST)
        code = first.code if first else EXIT_LOST
    elif watchdog is not None:
        first = _tell_first(world, watchdog, error, traceback.format_exc(), EXIT_CRASH)
        code = first.code if first else EXIT_CRASH
    else:
        _tell(world, traceback.format_exc())  # first: what follows takes seconds that this process may not have
        code = EXIT_CRASH
    if world is not None:
        world.coordinator.report_failure(error)
    return code


def _lost_in_collective(watchdog: Watchdog, error: Exception) -> str:
    """Say which rank a collective operation has lost."""
    if (lost := watchdog.lost_peer()) is not None:
        return f"{lost.who} has died without a word; it was last seen {lost.where}. This rank was {ACTIVITY}"
    fact = f"a collective operation failed {ACTIVITY}: {str(error).splitlines()[0].rstrip('.')}"
    absent = ", ".join(f"{beat.who}, {beat.where}, in {beat.at}" for beat in watchdog.absentees()[:8])
    if not absent:
        return f"{fact}. No rank is seen to be elsewhere: the network between the hosts may be cut or very slow"
    return f"{fact}. Not in it: {absent}"


def _tell_first(world: World | None, watchdog: Watchdog, error: Exception, text: str, code: int) -> Failure | None:
    """Record and tell the first failure of a start; of a later one that does not follow from it, its last line.

    Returns:
        None where this was the first, else the first one.
    """
    crashed = code == EXIT_CRASH
    kind = type(error).__name__
    first = watchdog.fail(kind, str(error) if crashed else text, code, text if crashed else "")
    if first is None:
        _tell(world, text if crashed else f"error: {text}")
    elif str(error) not in first.message and code != EXIT_LOST:
        _tell(world, f"also failed: {kind}: {error}")
    return first


def _cause(watchdog: Watchdog) -> Failure | None:
    """Wait for moments until another rank has recorded the first failure, or is seen to be gone."""
    deadline = time.monotonic() + _CAUSE_SECONDS
    with ACTIVITY.waiting("the cause of a failed operation"):  # for the others: this rank is not the one to look for
        while time.monotonic() < deadline:
            if (failure := watchdog.first_failure()) is not None:
                return failure
            if watchdog.lost_peer() is not None:
                return None
            time.sleep(0.1)
    return None


def _told_by_another(world: World, error: SparringError) -> bool:
    """Spread the error; where ranks before this one fail alike (all read the same file), leave it to the first."""
    failures = world.coordinator.report_failure(error)
    return any(failure.rank < world.rank and failure.message == str(error) for failure in failures)


def _tell(world: World | None, text: str) -> None:
    rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    world_size = os.environ.get("WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if world is not None:
        rank, world_size = str(world.rank), str(world.world_size)
    where = "" if world_size == "1" else f"[rank {rank} on {socket.gethostname()}] "
    terminal().write("".join(f"{where}{line}\n" for line in text.rstrip().splitlines()))
    terminal().flush()


def _end_watch(code: int) -> None:
    watchdog = watchdog_of_process()
    if watchdog is not None:
        watchdog.end(code)


def _leave(world: World | None, code: int) -> int:
    """End a failed rank after those that come to the same point within seconds have learnt why from it."""
    watchdog = watchdog_of_process()
    if watchdog is not None and (text := watchdog.loss_to_repeat()) is not None:
        _tell(world, text)
    if world is not None and world.world_size > 1:
        time.sleep(_QUIET_SECONDS)
        world.coordinator.close()
    _end_watch(code)
    return leave_mpi(code)

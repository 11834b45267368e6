"""A companion of a rank: a process that makes and searches an index while the rank trains.

It is started by the rank (`engine.refresh.companion`) with its order as its last word, opens the run as a start does,
and makes what the order names, together with all other companions. A rank that ends takes its companion
with it: the pipe between them closes. Signals are the rank's business, which tells its companion to stop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

_ROOT = Path(__file__).resolve().parents[2]
# A script's own folder comes first in sys.path; here it would shadow packages that are named like one of our files.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT / "launcher" / "commands"]
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

from engine.reliability.exit_codes import EXIT_CRASH, EXIT_LOST, EXIT_PREEMPTED, EXIT_REFUSED  # noqa: E402
from engine.reliability.preemption import PREEMPTION, Preempted  # noqa: E402

if TYPE_CHECKING:  # these take seconds to import: a rank that has gone meanwhile must be noticed
    from engine.coordination.coordinator import Coordinator
    from engine.refresh.companion import Order

_TELL_SECONDS = 5.0
"""How long a companion that fails stays, for the others to learn why."""
_LOOK_SECONDS = 0.1


def main(words: list[str]) -> int:
    """Carry out an order; return the exit code.

    Args:
        words: The order as JSON.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_listen, name="rank", daemon=True).start()
    return carry_out(words[-1])


def carry_out(text: str) -> int:
    """Make what an order names and leave the last words for the rank; return the exit code.

    Args:
        text: The order as JSON.
    """
    from engine.coordination.coordinator import PeerError
    from engine.errors import CoordinationError, SparringError
    from engine.refresh.companion import FAILED, FINISHED, STOPPED, Ended, Order, ended_path
    from shards.files import parse_record, write_json
    from shards.files.unusable import as_told

    order = parse_record(json.loads(text), Order, "the order of a companion")
    met: list[Coordinator] = []
    ended = Ended(order.token, order.number, order.rank, FINISHED)
    try:
        _work(order, met)
    except Preempted as stop:
        _tell_others(met, stop)
        ended = Ended(order.token, order.number, order.rank, STOPPED, code=EXIT_PREEMPTED)
    except BaseException as error:
        _tell_others(met, error)
        told = as_told(error) or error
        crashed = not isinstance(told, SparringError)
        code = EXIT_CRASH if crashed else EXIT_LOST if isinstance(told, CoordinationError) else EXIT_REFUSED
        ended = Ended(
            order.token,
            order.number,
            order.rank,
            FAILED,
            message=f"{type(told).__name__}: {told}" if crashed else str(told),
            traceback=traceback.format_exc() if crashed else "",
            code=code,
            follows=isinstance(error, PeerError),
        )
        if PREEMPTION.requested and isinstance(error, PeerError):  # the other one was told to stop first
            ended = Ended(order.token, order.number, order.rank, STOPPED, code=EXIT_PREEMPTED)
    write_json(ended_path(Path(order.folder), order.number), asdict(ended))
    if ended.outcome == FAILED and met and order.number == 0 and order.num_companions > 1:
        time.sleep(_TELL_SECONDS)  # the store in which the others find the answer is this process's
    return ended.code


def _work(order: Order, met: list[Coordinator]) -> None:
    """Open the run with the other companions and make the candidates or the pool of the order.

    Args:
        order: The order.
        met: Takes the coordinator, for whoever has to tell the others of an error.
    """
    import torch

    from engine.log import set_up_logging
    from engine.refresh.refresh import pool_of
    from engine.run import Run, RunFolder
    from launcher.recipe import open_beside

    set_up_logging(order.number, order.num_companions)
    logging.getLogger("sparring").setLevel(logging.WARNING)  # the rank logs what is finished
    device, folder = torch.device(order.device), RunFolder(Path(order.run))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _beating(order):
        met.append(_meet(order))
        run = Run.beside(folder, Path(order.folder) / "ledger.json", met[0], device, order.nonce)
        pool_of(run, open_beside(run), order.name)
        met[0].barrier("end of what runs beside")
        met[0].close()


def _meet(order: Order) -> Coordinator:
    """Return the coordinator of all companions; the port of its store goes through the order's folder."""
    from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport, Transport
    from engine.coordination.watched import WatchedTransport
    from engine.errors import CoordinationError
    from engine.refresh.companion import Meeting, meeting_path
    from shards.files import read_record, write_json

    path, place = meeting_path(Path(order.folder)), (order.number, order.num_companions, order.address)
    transport: Transport
    if order.num_companions == 1:
        transport = LocalTransport()
    elif order.number == 0:
        store = StoreTransport(*place, timeout_seconds=order.timeout_seconds)
        write_json(path, asdict(Meeting(order.token, store.port)))
        transport = store
    else:
        deadline = time.monotonic() + order.timeout_seconds
        while not path.exists():
            PREEMPTION.require_none("the meeting of what runs beside")
            if time.monotonic() > deadline:
                raise CoordinationError(
                    f"the first companion, of rank 0, has not opened its store within {order.timeout_seconds:g} s",
                    expected=f"its port in {path}",
                    remedy="look in rank 0's log for why it did not; where it is only slow, raise run.timeout_seconds",
                )
            time.sleep(_LOOK_SECONDS)
        meeting = read_record(path, Meeting, "where the companions meet")
        transport = StoreTransport(*place, port=meeting.port, timeout_seconds=order.timeout_seconds)
    return Coordinator(WatchedTransport(transport), order.timeout_seconds, order.address)


@contextlib.contextmanager
def _beating(order: Order) -> Iterator[None]:
    """Write heartbeats while the body runs, beside those of the ranks."""
    from engine.refresh.companion import heartbeats_of
    from engine.reliability.activity import ACTIVITY
    from engine.reliability.heartbeat import ENDED, RUNNING, STOPPING, Heart

    heart = Heart(heartbeats_of(Path(order.run)), order.number, order.num_companions, order.nonce, ACTIVITY)
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # a disk that is full fails what matters more
                heart.beat(STOPPING if PREEMPTION.requested else RUNNING)
            over.wait(order.heartbeat_seconds)

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            heart.beat(ENDED, 0)


def _listen() -> None:
    """Stop where the rank says so, and end at once where it is gone."""
    while line := os.read(0, 64):
        if b"stop" in line:
            PREEMPTION.interrupt("its rank was asked to stop")
    os._exit(EXIT_LOST)


def _tell_others(met: list[Coordinator], error: BaseException) -> None:
    for coordinator in met:
        coordinator.report_failure(error)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # threads of libraries, and the one that listens to the rank, end with it

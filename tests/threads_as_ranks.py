"""A world whose ranks are threads of the test's process, with the coordinator and messages that processes have.

For what no second process proves better: importing torch once for each rank takes longer than most such tests.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport

T = TypeVar("T")
_ONE_AT_A_TIME, _literal_eval = threading.Lock(), ast.literal_eval


def _evaluate(text: Any) -> Any:
    """Read a literal, such as the header of an array's file, which all ranks open at once.

    Python 3.11 counts how deep it is in a tree for the whole process: two threads that are in one upset the count, and
    one of them gets a SystemError (python/cpython#106905), which processes do not.
    """
    with _ONE_AT_A_TIME:
        return _literal_eval(text)


ast.literal_eval = _evaluate


def on_ranks(world_size: int, work: Callable[[Coordinator], T], timeout_seconds: float = 30.0) -> list[T | Exception]:
    """Run a function on so many ranks and return what each returned or raised, in rank order."""
    if world_size == 1:
        return [_result(Coordinator(LocalTransport()), work)]
    port: Future[int] = Future()

    def be(rank: int) -> T | Exception:
        known = port.result(timeout_seconds) if rank else 0
        transport = StoreTransport(rank, world_size, "127.0.0.1", known, timeout_seconds)
        if not rank:
            port.set_result(transport.port)
        return _result(Coordinator(transport, timeout_seconds), work)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(be, range(world_size)))


def _result(coordinator: Coordinator, work: Callable[[Coordinator], T]) -> T | Exception:
    try:
        return work(coordinator)
    except Exception as error:
        return error
    finally:
        coordinator.close()

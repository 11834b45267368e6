"""Reading ahead and writing behind: a thread each, so that disks and Python's own work do not hold up a computation.

Neither changes what is done nor its order. A thread of ours runs beside code that leaves the interpreter free (a
tokenizer, a matrix product, a hash, a wait for a disk); what each holds is bounded, so memory is, too.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1
_END = object()


@contextmanager
def read_ahead(items: Iterator[T], ahead: int = 1) -> Iterator[Iterator[T]]:
    """Let a thread take the next items while the body works on the last.

    Args:
        items: Taken by the thread alone, in order.
        ahead: How many may wait for the body; one more may be in the making.

    Yields:
        An iterator over the same items. An error of `items` comes out where its item would.
    """
    taken: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
    left = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not left.is_set():
            try:
                return taken.put((item, error), timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
            put(_END)
        except BaseException as error:
            put(_END, error)

    def give() -> Iterator[T]:
        while True:
            item, error = taken.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        yield give()
    finally:
        left.set()
        thread.join()


class WriteBehind:
    """Writes in a thread, one thing after the other, while the caller makes the next.

    One thing is written at a time and none waits: whoever comes with the next before that is done waits for it. So a
    process that is killed loses one finished thing at most. To be used as a context: leaving it waits for the last
    writing, also where the body fails, so that what is finished is kept.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write behind")
        self._writing: Future[None] | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()  # the body's error goes before one of the last writing

    def write(self, function: Callable[[], object]) -> None:
        """Begin to write, once what was begun before is written.

        Args:
            function: Writes; run by the thread.

        Raises:
            Exception: What the writing before raised; this one is not begun then.
        """
        self.wait()

        def run() -> None:
            function()

        self._writing = self._thread.submit(run)

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            Exception: What the writing raised.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

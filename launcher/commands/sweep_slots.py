"""Places of a machine in which a sweep's runs go at once, each with a number and a port of its own."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from engine.errors import ConfigError

SLOT, PORT = "{slot}", "{port}"
Item = TypeVar("Item")
Result = TypeVar("Result")


class Slots:
    """The places, and the words that start the ranks of a run in each.

    Args:
        number: Of runs at once.
        starter: Words; `{slot}` stands for the number of the place, from 0, and `{port}` for a free TCP port.

    Raises:
        ConfigError: There are no words, or several runs of one launcher would listen at one port.
    """

    def __init__(self, number: int, starter: Sequence[str]) -> None:
        if not starter:
            raise ConfigError("--starter is empty", expected='such as "deepspeed --num_accelerators 2"')
        if number > 1 and Path(starter[0]).name == "deepspeed" and not any(PORT in word for word in starter):
            raise ConfigError(
                f"{number} runs at once, started by {' '.join(starter)}, would listen at one port",
                expected=f"a port for each, for which {PORT} stands",
                remedy=f'--starter "deepspeed --include localhost:{SLOT} --master_port {PORT}", for a GPU a run',
            )
        self.number, self._starter = number, tuple(starter)

    def each(self, work: Callable[[Item, list[str]], Result], items: Sequence[Item]) -> list[Result]:
        """Do some work for each item, in as many places at once as there are.

        Args:
            work: Called with an item and the starter's words, as they are for the place that it has.
            items: In the order in which they begin.

        Returns:
            The results, in the items' order. Where one raises or the sweep is interrupted, no further item begins, and
            what has begun is waited for.
        """
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.number):
            free.put(slot)

        def placed(item: Item) -> Result:
            slot = free.get()
            try:
                return work(item, self._words(slot))
            finally:
                free.put(slot)

        if self.number == 1:
            return [placed(item) for item in items]
        pool = ThreadPoolExecutor(self.number)
        try:
            return [future.result() for future in [pool.submit(placed, item) for item in items]]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _words(self, slot: int) -> list[str]:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        return [word.replace(SLOT, str(slot)).replace(PORT, str(port)) for word in self._starter]

"""Messages over a key-value store of torch, for processes that form no MPI world."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Sequence

from engine.coordination.listening import meet_at_store
from engine.coordination.star import Frame, Kind, Patience, StarTransport
from engine.errors import CoordinationError

_CHUNK_BYTES = 4 * 2**20  # torch's store drops the connection above 8 MiB a value


class StoreTransport(StarTransport):
    """Messages as keys of a `torch.distributed.TCPStore` that rank 0 hosts for this purpose alone.

    A message from `a` to `b` is the key `a>b/n`, where n counts the messages of this pair; its receiver deletes it.
    Where a host is cut off from the network, its own calls end when the kernel gives up the connection (a quarter of
    an hour on Linux); the root notices at its deadline all the same.

    Args:
        rank: This process, 0 to world_size - 1.
        world_size: Number of ranks.
        address: Host name or address of rank 0, as the other ranks reach it.
        port: Where rank 0 listens; 0 on rank 0 lets the system choose, and `port` then tells which it is.
        timeout_seconds: How long to try to connect.

    Raises:
        CoordinationError: Rank 0 cannot listen, or cannot be reached.
    """

    kind: Kind = "store"

    def __init__(self, rank: int, world_size: int, address: str, port: int = 0, timeout_seconds: float = 600.0) -> None:
        super().__init__(rank, world_size)
        self._connection_errors = (RuntimeError, OSError)  # torch's network errors are RuntimeErrors
        try:
            self._store = meet_at_store(rank, world_size, address, port, timeout_seconds)
        except (RuntimeError, OSError) as error:
            raise CoordinationError(
                f"rank {rank} (host {socket.gethostname()}) cannot {'reach' if rank else 'open'} the store of rank 0 "
                f"at {address}:{port}: {str(error).splitlines()[0]}",
                remedy="check that rank 0 runs, and that its address and port are reachable from this host",
            ) from error
        self.port: int = self._store.port
        self._sent: Counter[int] = Counter()
        self._taken: Counter[int] = Counter()
        self._unread: list[tuple[int, str]] = []

    def _send(self, receiver: int, message: bytes) -> None:
        key = f"{self.rank}>{receiver}/{self._sent[receiver]}"
        self._sent[receiver] += 1
        chunks = [message[start : start + _CHUNK_BYTES] for start in range(0, len(message), _CHUNK_BYTES)]
        for place, chunk in enumerate(chunks[1:]):
            self._store.set(f"{key}/{place}", chunk)
        # The key comes last: its presence says that all is there.
        self._store.set(key, b"%d\n" % (len(chunks) - 1) + chunks[0])
        self._unread.append((receiver, key))

    def _receive(self) -> list[Frame]:
        if self.rank:
            # One at a time: rank 0 may go, and the store with it, once it sees that a message was taken. So a follower
            # must use what it holds before it asks for more.
            return [frame] if (frame := self._take_next(0)) else []
        frames = []
        for sender in range(1, self.world_size):
            while frame := self._take_next(sender):  # all: a rank that has given up must be seen to have
                frames.append(frame)
        return frames

    def _take_next(self, sender: int) -> Frame | None:
        key = f"{sender}>{self.rank}/{self._taken[sender]}"
        if not self._store.check([key]):
            return None
        self._taken[sender] += 1
        num_more, _, message = self._store.get(key).partition(b"\n")
        for place in range(int(num_more)):
            message += self._store.get(f"{key}/{place}")
            self._store.delete_key(f"{key}/{place}")
        # The key goes last: its absence says that all was taken. Should the connection end here, the message is ours.
        with contextlib.suppress(*self._connection_errors):
            self._store.delete_key(key)
        return Frame.decode(message)

    def _flush(self, receivers: Sequence[int], seconds: float) -> None:
        patience, wanted = Patience(seconds), set(receivers)
        while True:
            self._unread = [entry for entry in self._unread if self._store.check([entry[1]])]
            if patience.over or not any(receiver in wanted for receiver, _ in self._unread):
                return
            patience.pause()

    def close(self) -> None:
        """Let go of the store; on rank 0 this ends it, after the others have taken what was sent to them."""
        if self.rank == 0:
            super().close()  # a follower has nothing to wait for: the root may have left first
        self._broken = self._broken or "the connection was closed"
        self.__dict__.pop("_store", None)

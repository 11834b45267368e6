"""Messages over MPI, for processes that `mpirun` (or an `srun` with PMIx) has started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.coordination.star import Frame, Kind, Patience, StarTransport

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 1


class MpiTransport(StarTransport):
    """Messages over MPI: point to point, host memory only, on a communicator of their own.

    Blocking MPI calls burn a core and have no deadline, so only calls that return at once are used. All of them must
    come from one thread, and never from a forked worker.

    Args:
        communicator: Whose ranks take part; `MPI.COMM_WORLD` by default. It is duplicated, which is a collective.
    """

    kind: Kind = "mpi"

    def __init__(self, communicator: MPI.Comm | None = None) -> None:
        # Imported here, because this initialises MPI, which aborts the process on clusters that start it without PMI.
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = (communicator or MPI.COMM_WORLD).Dup()
        super().__init__(self._comm.Get_rank(), self._comm.Get_size())
        self._connection_errors = (MPI.Exception,)
        self._outgoing: list[tuple[int, MPI.Request, bytes]] = []
        self._incoming: list[tuple[MPI.Request, bytearray]] = []

    def _send(self, receiver: int, message: bytes) -> None:
        request = self._comm.Isend([message, self._mpi.BYTE], receiver, _TAG)
        self._outgoing.append((receiver, request, message))  # MPI reads the buffer until the request is complete

    def _receive(self) -> list[Frame]:
        self._outgoing = [entry for entry in self._outgoing if not entry[1].Test()]
        status = self._mpi.Status()
        while (message := self._comm.Improbe(self._mpi.ANY_SOURCE, _TAG, status)) is not None:
            buffer = bytearray(status.Get_count(self._mpi.BYTE))
            self._incoming.append((message.Irecv([buffer, self._mpi.BYTE]), buffer))
        done = [(request.Test(), request, buffer) for request, buffer in self._incoming]
        self._incoming = [(request, buffer) for complete, request, buffer in done if not complete]
        return [Frame.decode(bytes(buffer)) for complete, _, buffer in done if complete]

    def _flush(self, receivers: Sequence[int], seconds: float) -> None:
        patience, wanted = Patience(seconds), set(receivers)
        while True:
            self._outgoing = [entry for entry in self._outgoing if not entry[1].Test()]
            if patience.over or not any(receiver in wanted for receiver, _, _ in self._outgoing):
                return
            patience.pause()

"""The end of a failed rank's process in a world of MPI; cheap to import, as every command can fail."""

from __future__ import annotations

import sys


def leave_mpi(code: int) -> int:
    """Return the exit code of a failed rank; where the ranks form an MPI world, abort all of them with it instead.

    MPI would wait at the exit of the process for the others' exit.

    Args:
        code: Not 0.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)
    return code

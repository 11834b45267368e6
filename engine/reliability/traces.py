"""What a start has left in the run folder: which it was, how far it came, and why it ended.

What started the ranks is no witness: `mpirun` and `deepspeed` return 0 or 1 for ranks that were killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.reliability.failure import Failure, last_failure
from engine.reliability.heartbeat import Beat, read_beats
from engine.reliability.starts import newest_nonce


@dataclass(frozen=True, slots=True)
class Traces:
    """What the newest start of a run has left.

    Attributes:
        nonce: Which start it was.
        failure: Its first failure; None where none was recorded.
        beats: The last heartbeat of each rank that gave one.
    """

    nonce: str
    failure: Failure | None
    beats: list[Beat]

    @property
    def place(self) -> tuple[str, int] | None:
        """Stage and number of steps done, at the failure or of the rank that came furthest; None before any."""
        if self.failure is not None:
            return self.failure.stage, self.failure.step
        return max(((beat.stage, beat.done) for beat in self.beats), key=lambda place: place[1], default=None)


def read_traces(run: Path, before: str | None) -> Traces | None:
    """Read what the newest start has left.

    Args:
        run: The run folder.
        before: Nonce of the newest start that is not asked for; None where there was none.

    Returns:
        The traces; None where no rank has opened the folder since.

    Raises:
        ArtifactError: The record of starts is damaged.
    """
    nonce = newest_nonce(run)
    if nonce is None or nonce == before:
        return None
    failure = last_failure(run)
    return Traces(
        nonce,
        failure if failure is not None and failure.attempt == nonce else None,
        [beat for beat in read_beats(run / "heartbeats") if beat.attempt == nonce],
    )

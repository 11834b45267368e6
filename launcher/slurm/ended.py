"""`python -m launcher.slurm.ended RUN --returned CODE`: what follows when the ranks of a job have ended.

The job's script asks this; exit code 85 says: requeue. What the starter of the ranks returns is not to be believed:
mpirun returns 0 when it loses its daemon on another node, and 137 or 1 for ranks that have said 75. So the run folder
is asked: the ledger whether the recipe is finished, the record of failures what the ranks meant.

* finished: 0
* cancelled (`python -m launcher cancel`), or stopped by hand (the file `RUN/stop`, a signal to a rank): 130, no requeue
* asked to stop by SLURM: requeue; but not where three starts in a row came no further
* a rank was lost, or mpirun was: requeue, `--max-restarts` times, but not where it happens twice at the same place
* refused, or a crash: the same code, no requeue
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.reliability.exit_codes import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, EXIT_REFUSED
from engine.reliability.traces import read_traces
from launcher.slurm.job import finished_stages, is_finished, read_submitted, show_job
from launcher.slurm.script import slurm_folder
from launcher.terminal.arguments import typed_path, whole_number
from launcher.terminal.streams import begin_in_utf8, open_streams, run_at_terminal
from shards.files import read_record, write_json

_STARTS_WITHOUT_PROGRESS = 3
_ASK_AGAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class End:
    """How one start of a job ended.

    Attributes:
        job: The job's number.
        time: When.
        nonce: Which start it was; None where no rank came as far as opening the run folder.
        returned: What the starter of the ranks returned.
        code: What the ranks meant.
        place: How many stages were finished, in which stage it was and how many steps of that were done.
        reason: In words.
        again: Whether the job was to be requeued.
    """

    job: str
    time: str
    nonce: str | None
    returned: int
    code: int
    place: tuple[int, str, int]
    reason: str
    again: bool = False


def main(argv: list[str] | None = None) -> int:
    """Find out how the ranks ended, record it, say it, and return the exit code of the job."""
    parser = argparse.ArgumentParser(prog="launcher.slurm.ended", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=typed_path)
    parser.add_argument("--returned", type=whole_number, required=True, help="exit code of mpirun or srun")
    parser.add_argument("--asked", choices=("yes", "no"), default="yes", help="whether SLURM has signalled the script")
    parser.add_argument("--max-restarts", type=whole_number, default=3, help="restarts after a lost rank")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    if is_finished(run):
        print("sparring: the run is finished", flush=True)
        return 0
    record = slurm_folder(run) / "ends.json"
    earlier = _earlier(record)
    by_slurm = arguments.asked == "yes" or _is_preempted(os.environ.get("SLURM_JOB_ID", ""))
    end = _end(run, arguments.returned, earlier, by_slurm)
    cancelled = _cancelled_by(run)
    if end.code == EXIT_PREEMPTED and not by_slurm:
        cancelled = cancelled or f"the file {run / 'stop'}, or a signal to a rank,"
    code, words = verdict(end, earlier, cancelled, arguments.max_restarts)
    entries = [*earlier, replace(end, again=code == EXIT_PREEMPTED)]
    write_json(record, [asdict(entry) for entry in entries])
    print(f"sparring: {end.reason.rstrip('.')}. {words}", flush=True)
    return code


def verdict(end: End, earlier: list[End], cancelled: str | None, max_restarts: int) -> tuple[int, str]:
    """Decide what follows.

    Args:
        end: How this start ended.
        earlier: The ends of the job's earlier starts.
        cancelled: What has asked for the end of the job; None where nobody has.
        max_restarts: How often to start again after a loss.

    Returns:
        The exit code of the job, 85 to requeue it, and the reason in words.
    """
    if cancelled is not None:
        return EXIT_INTERRUPTED, f"The job ends, as {cancelled} asked; submitted again, the run goes on"
    if end.code in {EXIT_REFUSED, EXIT_CRASH, EXIT_INTERRUPTED}:
        mend = {EXIT_REFUSED: "Mend that and submit again", EXIT_CRASH: "This is an error of the program"}
        return end.code, f"{mend.get(end.code, 'It was interrupted')}; the job is not requeued"
    same = 0
    for before in reversed(earlier):
        if before.place != end.place or before.code != end.code:
            break
        same += 1
    where = f"at {end.place[1] or 'the start'}, step {end.place[2]}"
    if end.code == EXIT_PREEMPTED:
        if same + 1 >= _STARTS_WITHOUT_PROGRESS:
            remedy = "ask for more --time, or write checkpoints more often (run.checkpoint_every_steps)"
            return EXIT_REFUSED, f"{same + 1} starts in a row have ended {where}: {remedy}; the job is not requeued"
        return EXIT_PREEMPTED, "The job is requeued"
    lost = sum(before.code == EXIT_LOST for before in earlier)
    if same:
        return EXIT_LOST, f"It has ended twice {where}: starting again would not help; the job is not requeued"
    if lost >= max_restarts:
        return EXIT_LOST, f"It has started again {lost} times, which is all that --max-restarts allows"
    return EXIT_PREEMPTED, f"The job is requeued, restart {lost + 1} of {max_restarts} after a loss"


def _cancelled_by(run: Path) -> str | None:
    return "`sparring cancel`" if (slurm_folder(run) / "cancelled").exists() else None


def _is_preempted(job: str) -> bool:
    """Return whether SLURM wants the nodes of a job back: at a preemption, only the ranks are signalled.

    Asked again where it does not answer: a preemption that is not seen looks like a stop by hand, after which the run
    would not go on.
    """
    for last in (False, False, True):
        if (shown := show_job(job)) is not None:
            return re.search(r" PreemptTime=\d", shown) is not None
        if not last:
            time.sleep(_ASK_AGAIN_SECONDS)
    return False


def _end(run: Path, returned: int, earlier: list[End], asked: bool) -> End:
    submitted = read_submitted(run)
    before = earlier[-1].nonce if earlier else submitted.nonce if submitted else None
    traces = read_traces(run, before)
    stage, step = (traces.place if traces else None) or ("", 0)
    if traces is not None and (failure := traces.failure) is not None:
        known = {EXIT_CRASH, EXIT_REFUSED, EXIT_LOST, EXIT_PREEMPTED, EXIT_INTERRUPTED}
        code = failure.code if failure.code in known else EXIT_LOST
        reason = f"rank {failure.rank} on {failure.host}: {failure.message}"
    else:
        code = returned if returned in {EXIT_REFUSED, EXIT_PREEMPTED, EXIT_INTERRUPTED} else EXIT_LOST
        reason = f"the ranks ended without a word, what started them with {returned}"
        if traces is None:
            code = EXIT_CRASH if returned == EXIT_CRASH else code
            reason = f"no rank came as far as opening the run folder; what started them ended with {returned}"
            reason = "the start was refused, as told above" if returned == EXIT_REFUSED else reason
    if asked and code in {EXIT_LOST, EXIT_CRASH}:  # ended by SLURM before they listened, or before they were ready
        code, reason = EXIT_PREEMPTED, f"asked to stop, but not ready in time: {reason}"
    return End(
        job=os.environ.get("SLURM_JOB_ID", ""),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        nonce=traces.nonce if traces else before,
        returned=returned,
        code=code,
        place=(len(finished_stages(run)), stage, step),
        reason=reason,
    )


def _earlier(path: Path) -> list[End]:
    job = os.environ.get("SLURM_JOB_ID", "")
    ends = read_record(path, list[End], "the ends of the job's starts") if path.exists() else []
    return [end for end in ends if end.job == job]


if __name__ == "__main__":
    begin_in_utf8()
    open_streams()
    sys.exit(run_at_terminal(main))

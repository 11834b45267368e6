"""The job of a run: what `submit` recorded of it, and what SLURM knows of it now.

SLURM forgets a job some minutes after its end unless the site keeps accounts, and its commands exist only on hosts of
the cluster; so each question here has "not known" as an answer. A busy SLURM answers late or not at all, which is
another thing: it says nothing of the job. Cheap to import: no torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.results import LAST_STAGE, read_ledger
from launcher.slurm.script import recipe_path, slurm_folder
from shards.files import read_record, write_json

PENDING, RUNNING = "PENDING", "RUNNING"
_OVER = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
_OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
_ANSWER_SECONDS = 20.0
_FORGOTTEN = re.compile("invalid job id", re.IGNORECASE)
_FIELD = re.compile(r"(?:^| )([A-Z][A-Za-z/:]*)=(\S*)")


@dataclass(frozen=True, slots=True)
class Submitted:
    """What `submit` recorded in `RUN/slurm/job.json`.

    Attributes:
        id: The job's number.
        time: When it was submitted.
        nodes: Nodes of a task.
        ranks: Ranks of a task.
        task: For a run that is one of a sweep, its number in the array; else None.
        sweep: The sweep's folder then; else None.
        tasks: For a sweep, its run folders by number; else empty.
        nonce: The newest start in the run folder at that time; None where it had none.
    """

    id: str
    time: str
    nodes: int
    ranks: int
    task: int | None = None
    sweep: str | None = None
    tasks: dict[str, str] | None = None
    nonce: str | None = None

    @property
    def name(self) -> str:
        """The job as SLURM's commands take it."""
        return self.id if self.task is None else f"{self.id}_{self.task}"

    def log(self, folder: Path) -> Path:
        """Return where the job of a folder writes."""
        if self.task is not None and self.sweep is not None:
            return slurm_folder(Path(self.sweep)) / f"{self.name}.out"
        return slurm_folder(folder) / f"{self.id}.out"


@dataclass(frozen=True, slots=True)
class TaskState:
    """What SLURM says of a job, or of one task of an array.

    Attributes:
        task: Number in the array; None where it is none.
        state: Such as RUNNING, PENDING or COMPLETED.
        reason: Why it waits, as SLURM says it; may be empty.
        nodes: Names of its nodes; empty while it waits.
        restarts: How often it has started again.
        elapsed: Time that the present start has taken.
        limit: Time that it may take.
    """

    task: int | None
    state: str
    reason: str
    nodes: str
    restarts: int
    elapsed: str
    limit: str

    @property
    def is_over(self) -> bool:
        """Whether it will not start again."""
        return self.state in _OVER

    @property
    def has_no_process(self) -> bool:
        """Whether nothing of it runs: not begun, ended with all its processes, or both in turn."""
        return self.is_over or self.state == PENDING


def write_submitted(folder: Path, submitted: Submitted) -> None:
    """Write what was submitted for a run or a sweep."""
    write_json(slurm_folder(folder) / "job.json", asdict(submitted))


def read_submitted(folder: Path) -> Submitted | None:
    """Read what was submitted for a folder; None where nothing was.

    Raises:
        ArtifactError: The record is damaged.
    """
    path = slurm_folder(folder) / "job.json"
    return read_record(path, Submitted, "the record of the job") if path.exists() else None


def finished_stages(run: Path) -> list[str]:
    """Return the finished stages of a run, in their order."""
    return list(read_ledger(run / "ledger.json"))


def is_finished(run: Path) -> bool:
    """Whether nothing of a recipe is left to do."""
    return LAST_STAGE in finished_stages(run)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was submitted for a folder, and what SLURM says of it.

    Attributes:
        submitted: The record.
        found: As `ask_slurm` returns it.
    """

    submitted: Submitted
    found: list[TaskState] | None

    @property
    def waits(self) -> bool:
        """Whether SLURM says that the job waits for its next start."""
        return bool(self.found) and all(known.state == PENDING for known in self.found or ())

    def has_ended(self, argv: Sequence[str]) -> bool:
        """Whether a start of this job is over because SLURM says that the job has no process.

        A job waits, or is over, only when its nodes have none of its processes any more. What they wrote last may be
        moments old all the same: a rank that is ended by force leaves its lock.

        Args:
            argv: The start's command line: the job's script names the recipe beside it, a start by hand another.
        """
        recipe = recipe_path(Path()).parts
        is_the_jobs = any(Path(word).parts[-len(recipe) :] == recipe for word in argv)
        return is_the_jobs and bool(self.found) and all(known.has_no_process for known in self.found or ())


def ask_about(folder: Path) -> Asked | None:
    """Ask SLURM about the job of a folder; None where nothing was submitted for it.

    Raises:
        ArtifactError: The record is damaged.
    """
    submitted = read_submitted(folder)
    return None if submitted is None else Asked(submitted, ask_slurm(submitted))


def ask_slurm(submitted: Submitted) -> list[TaskState] | None:
    """Ask SLURM about a job.

    Returns:
        One entry a task of an array, those that wait as one entry without a number; none where SLURM has forgotten the
        job. None where SLURM is absent or did not answer, so that nothing is known.
    """
    shown = show_job(submitted.name)
    if shown:
        return [_of_scontrol(line) for line in shown.splitlines() if line.startswith("JobId=")]
    columns = "JobID,State,NodeList,Elapsed,Timelimit"
    done = run_slurm("sacct", "--jobs", submitted.name, "-X", "--parsable2", "--noheader", f"--format={columns}")
    rows = done.stdout.splitlines() if done is not None and done.returncode == 0 else []
    found = [_of_sacct(line) for line in rows if line.count("|") == columns.count(",")]
    return None if shown is None and not found else found


def show_job(name: str) -> str | None:
    """Return what `scontrol show job` prints of a job, a line for each task; empty where SLURM has forgotten it.

    None where it is not installed or did not answer: its controller is away, or busy for longer than it waits.
    """
    done = run_slurm("scontrol", "--oneliner", "show", "job", name)
    if done is not None and done.returncode == 0:
        return done.stdout
    return "" if done is not None and _FORGOTTEN.search(done.stderr) else None


def alive(submitted: Submitted) -> list[TaskState]:
    """Return what of a job waits or runs.

    Raises:
        ConfigError: SLURM is absent or did not answer, so that it is not known.
    """
    found = ask_slurm(submitted)
    if found is None:
        raise ConfigError(
            f"whether job {submitted.name}, submitted at {submitted.time}, still waits or runs is not known: "
            + why_not_known(),
            expected="an answer of `scontrol show job`",
            remedy="try again in a minute, on a host where `squeue` answers",
        )
    return [known for known in found if not known.is_over]


def why_not_known() -> str:
    """Say why SLURM has told nothing."""
    return "SLURM did not answer" if shutil.which("scontrol") else "this host has no scontrol"


def run_slurm(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of SLURM's commands; None where it is not installed or does not answer."""
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        return subprocess.run(
            [program, *words[1:]],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None


def job_lines(folder: Path, asked: Asked | None) -> list[tuple[str, str]]:
    """Return what to tell of a run's job, as (name, text); nothing for a run that was not submitted."""
    if asked is None:
        return []
    submitted = asked.submitted
    text = f"{submitted.name}: " + ("; ".join(map(in_words, asked.found or ())) or _not_known(asked, folder))
    return [("job", text), ("job's log", str(submitted.log(folder)))]


def sweep_rows(asked: Asked) -> list[dict[str, str]]:
    """Return a table of a sweep's tasks: number, run folder, job and how far each is."""
    known = asked.found or []
    waiting = next((entry for entry in known if entry.task is None), None)
    by_task = {entry.task: entry for entry in known}
    rows = []
    for number, run in (asked.submitted.tasks or {}).items():
        entry = by_task.get(int(number), waiting)
        stages = finished_stages(Path(run))
        state = "finished" if is_finished(Path(run)) else in_words(entry) if entry else _forgotten(asked, Path(run))
        last = f"{len(stages)} stages, the last {stages[-1]}" if stages else ""
        rows.append({"task": number, "run": Path(run).name, "job": state, "finished": last})
    return rows


def in_words(known: TaskState) -> str:
    """Say how a job is."""
    words = known.state.lower().replace("_", " ")
    if known.state == PENDING and known.restarts:
        words = "requeued, pending"
    if known.reason and not known.is_over:
        words += f" ({known.reason})"
    if known.nodes:
        words += f" on {known.nodes}"
    words += f", restart {known.restarts}" * (known.restarts > 0)
    limited = f" of {known.limit}" if known.limit not in {"", "UNLIMITED", "Partition_Limit"} else ""
    return words + (f", {known.elapsed}{limited}" if known.state != PENDING else "")


def _not_known(asked: Asked, folder: Path) -> str:
    when = f"submitted at {asked.submitted.time}"
    if asked.found is None:
        return f"{when}; what became of it is not known here: {why_not_known()}"
    return f"{when}; {_forgotten(asked, folder)} any more"


def _forgotten(asked: Asked, run: Path) -> str:
    """Say what is known of a run's job without SLURM: that it was cancelled, if it was."""
    if asked.found is None:
        return why_not_known()
    was_cancelled = (slurm_folder(run) / "cancelled").exists()
    return "cancelled; SLURM does not know it" if was_cancelled else "SLURM does not know it"


def _of_scontrol(line: str) -> TaskState:
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line):
        fields.setdefault(name, value)  # what follows the first of a name may be part of a path with blanks
    task = fields.get("ArrayTaskId", "")
    return TaskState(
        task=int(task) if task.isdigit() else None,
        state=fields.get("JobState", "?"),
        reason=_none_as_empty(fields.get("Reason", "")),
        nodes=_none_as_empty(fields.get("NodeList", "")),
        restarts=int(fields.get("Restarts") or 0),
        elapsed=fields.get("RunTime", ""),
        limit=fields.get("TimeLimit", ""),
    )


def _of_sacct(line: str) -> TaskState:
    job_id, state, nodes, elapsed, limit = line.split("|")
    task = job_id.partition("_")[2]
    return TaskState(
        task=int(task) if task.isdigit() else None,
        state=state.split()[0] if state else "?",  # CANCELLED by 1000
        reason="",
        nodes="" if nodes == "None assigned" else nodes,
        restarts=0,
        elapsed=elapsed,
        limit=limit,
    )


def _none_as_empty(text: str) -> str:
    return "" if text in {"None", "(null)"} else text

"""The job of a run: what `submit` recorded of it, and what SLURM knows of it now.

SLURM forgets a job some minutes after its end unless the site keeps accounts, and its commands exist only on hosts of
the cluster; so each question here has "not known" as an answer. Cheap to import: no torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.slurm.script import slurm_folder
from shards.files import read_json, read_record, write_json

PENDING, RUNNING = "PENDING", "RUNNING"
_OVER = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
_OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
_ANSWER_SECONDS = 20.0
_FIELD = re.compile(r"(?:^| )([A-Z][A-Za-z/:]*)=(\S*)")
_LAST_STAGE = "export"


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
    path = run / "ledger.json"
    return list(read_json(path, "the ledger of finished stages")["stages"]) if path.exists() else []


def is_finished(run: Path) -> bool:
    """Whether nothing of a recipe is left to do."""
    return _LAST_STAGE in finished_stages(run)


def ask_slurm(submitted: Submitted) -> list[TaskState]:
    """Ask SLURM about a job; one entry a task of an array. None where SLURM is absent or has forgotten.

    Tasks of an array that wait are one entry without a number.
    """
    done = run_slurm("scontrol", "--oneliner", "show", "job", submitted.name)
    if done is not None and done.returncode == 0:
        return [_of_scontrol(line) for line in done.stdout.splitlines() if line.startswith("JobId=")]
    columns = "JobID,State,NodeList,Elapsed,Timelimit"
    done = run_slurm("sacct", "--jobs", submitted.name, "-X", "--parsable2", "--noheader", f"--format={columns}")
    if done is not None and done.returncode == 0:
        return [_of_sacct(line) for line in done.stdout.splitlines() if line.count("|") == columns.count(",")]
    return []


def alive(submitted: Submitted) -> list[TaskState]:
    """Return what of a job waits or runs."""
    return [known for known in ask_slurm(submitted) if not known.is_over]


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


def job_lines(folder: Path) -> list[tuple[str, str]]:
    """Return what to tell of a run's job, as (name, text); nothing for a run that was not submitted."""
    submitted = read_submitted(folder)
    if submitted is None:
        return []
    found = ask_slurm(submitted)
    text = f"{submitted.name}: " + ("; ".join(map(in_words, found)) or _not_known(submitted))
    return [("job", text), ("job's log", str(submitted.log(folder)))]


def sweep_rows(folder: Path, submitted: Submitted) -> list[dict[str, str]]:
    """Return a table of a sweep's tasks: number, run folder, job and how far each is."""
    known = ask_slurm(submitted)
    waiting = next((entry for entry in known if entry.task is None), None)
    by_task = {entry.task: entry for entry in known}
    rows = []
    for number, run in (submitted.tasks or {}).items():
        entry = by_task.get(int(number), waiting)
        stages = finished_stages(Path(run))
        state = "finished" if is_finished(Path(run)) else in_words(entry) if entry else "SLURM does not know it"
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


def _not_known(submitted: Submitted) -> str:
    if shutil.which("scontrol") is None:
        return f"submitted at {submitted.time}; what became of it is not known here: this host has no scontrol"
    return f"submitted at {submitted.time}; SLURM does not know it any more"


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

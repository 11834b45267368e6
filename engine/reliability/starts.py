"""`RUN/starts.json`: what was started in a run folder, when, on how many ranks and by which code.

Cheap to import: the job of a run and `python -m launcher status` read it without torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.text import as_recorded
from engine.reliability.versions import installed_versions
from shards.files import read_record, write_json

_PACKAGES = (
    "sparring",
    "torch",
    "deepspeed",
    "transformers",
    "mpi4py",
    "webdataset",
    "numpy",
    "bm25s",
    "ir_measures",
    "faiss",
)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run.

    Attributes:
        time: When, by rank 0's clock.
        nonce: What tells it from all others.
        argv: Rank 0's command line.
        host: Rank 0's.
        num_ranks: Number of ranks.
        coordinator: How control messages travelled: `mpi`, `store` or `local`.
        python: Version of Python.
        versions: Package -> version; None where it is not installed.
        git: Commit of the code, with `-dirty` where files differ from it; None where it is not known.
        forced: What `run.force_resume` has overruled.
    """

    time: str
    nonce: str
    argv: list[str]
    host: str
    num_ranks: int
    coordinator: str
    python: str
    versions: dict[str, str | None]
    git: str | None
    forced: list[str] | None = None

    @classmethod
    def now(cls, nonce: str, num_ranks: int, coordinator: str, forced: list[str]) -> Start:
        """Describe the start that this process, rank 0, belongs to."""
        return cls(
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            nonce=nonce,
            argv=[as_recorded(word) for word in sys.argv],
            host=platform.node(),
            num_ranks=num_ranks,
            coordinator=coordinator,
            python=platform.python_version(),
            versions=installed_versions(_PACKAGES),
            git=_git_revision(),
            forced=forced or None,
        )

    def code_changes(self) -> list[str]:
        """List what of the code differs now: our version and commit, and minor releases of libraries."""
        changes = []
        for name, version in installed_versions(_PACKAGES).items():
            before = self.versions.get(name)
            shown = [str(one) if name == "sparring" else ".".join(str(one).split(".")[:2]) for one in (before, version)]
            if shown[0] != shown[1]:
                changes.append(f"{name}: {before} -> {version}")
        commits = [str(one or "").removesuffix("-dirty") for one in (self.git, _git_revision())]
        if all(commits) and commits[0] != commits[1]:
            changes.append(f"git commit: {commits[0]} -> {commits[1]}")
        return changes


def read_starts(run: Path) -> list[Start]:
    """Read the starts of a run folder, in their order; none where no start came as far as opening it.

    Raises:
        ArtifactError: The record is damaged.
    """
    path = run / "starts.json"
    return read_record(path, list[Start], "the record of starts") if path.exists() else []


def newest_nonce(run: Path) -> str | None:
    """Return which start of a run is the newest; None where no start came as far as opening the folder."""
    starts = read_starts(run)
    return starts[-1].nonce if starts else None


def record_start(run: Path, start: Start) -> None:
    """Add a start to the record of a run folder.

    Raises:
        ArtifactError: The record is damaged.
        DiskFullError: There is no space for it.
    """
    entries = [asdict(one) for one in (*read_starts(run), start)]
    for entry in entries:
        if entry["forced"] is None:
            del entry["forced"]
    write_json(run / "starts.json", entries)


def _git_revision() -> str | None:
    git, here = shutil.which("git"), Path(__file__).resolve().parent
    if git is None:
        return None
    answer = subprocess.run(
        [git, "-C", os.fspath(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return answer.stdout.strip() or None

"""A soak: runs that are killed again and again, at seeded moments in every phase, and must end as if nothing were.

First one run is left alone. Then run after run is started, one rank or all of them are killed (SIGKILL) in the middle
of a stage, the same command is started again, and so on until the run is through; its weights of all iterations,
indexes, candidates, metrics and results are compared with those of the run that was left alone, bit by bit. Stages that
were hit least are aimed at first. Worlds of `mpirun` and of `deepspeed` take turns.

    python benchmarks/faults.py [--kills 60] [--kills-per-run 6] [--ranks 2] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import contextlib

from benchmarks.report import machine_line, table

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("mpirun", "deepspeed")
TRAINING = ("warmup_retriever", "warmup_ranker", "retriever", "ranker")
CLOCK = ("seconds", "_per_second", "milliseconds")
"""Parts of the names of metrics that a clock gives."""
WORDS = ("run.device=cpu", "run.heartbeat_seconds=0.1", "run.checkpoint_every_steps=2", "run.timeout_seconds=60")


@dataclass
class Soak:
    """What was seen so far."""

    kills: Counter[str] = field(default_factory=Counter)
    resumed: Counter[str] = field(default_factory=Counter)
    identical: Counter[str] = field(default_factory=Counter)
    runs: list[dict[str, Any]] = field(default_factory=list)
    exits: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))


class World:
    """A start of the run, in a session of its own."""

    def __init__(self, launcher: str, ranks: int, folder: Path, words: Sequence[str]) -> None:
        script = ["launcher/run.py", "--config", "configs/tiny.yaml", f"run.path={folder}", *WORDS, *words]
        bin_folder = Path(sys.executable).parent
        if launcher == "mpirun":
            command = [str(bin_folder / "mpirun"), "--oversubscribe", "-n", str(ranks), sys.executable, *script]
        else:
            options = ["--hostfile", "/nonexistent", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
            command = [str(bin_folder / "deepspeed"), *options, *script]
        path = os.pathsep.join([str(bin_folder), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.folder, self.began, self._start = folder, time.time(), time.monotonic()
        self._log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115  closed when the world has ended
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    def beats(self) -> list[dict[str, Any]]:
        """Return the heartbeats of this start."""
        found = []
        for path in sorted((self.folder / "heartbeats").glob("rank-*.json")):
            try:
                beat = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if beat["time"] > self.began and beat["state"] == "running":
                found.append(beat)
        return found

    @property
    def stage(self) -> str:
        """The stage that rank 0 is in; empty before the first."""
        return next((str(beat["stage"]) for beat in self.beats() if beat["rank"] == 0), "")

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self._process.poll() is not None

    def kill(self, everyone: bool, chosen: random.Random) -> None:
        """Kill one rank, or the launcher and all ranks."""
        pids = [int(beat["pid"]) for beat in self.beats()]
        targets = pids if everyone or not pids else [chosen.choice(pids)]
        if everyone:
            _signal_group(self._process.pid)
        for pid in targets:
            _signal(pid)

    def wait(self, seconds: float) -> int:
        """Wait for the end, kill what is left, and return the launcher's exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the world of {self.folder} still runs after {seconds:g} s") from None
        for beat in self.beats():
            _signal(int(beat["pid"]))
        _signal_group(self._process.pid)
        self._log.close()
        return code

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run computed, by name: hashes of files, and numbers that no clock gave."""
    found: dict[str, Any] = {}
    for pattern in (
        "weights/*/*/*.safetensors",
        "index/*/index.faiss",
        "index/*/embeddings/*.npy",
        "candidates/*/*.npy",
    ):
        for path in sorted(folder.glob(pattern)):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["summary"] = json.loads((folder / "results" / "summary.json").read_text(encoding="utf-8"))
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name not in {"time", "stage", "step"} and not any(word in name for word in CLOCK):
                found.setdefault(f"{entry['stage']} {entry['step']} {name}", []).append(value)
    return found


def stages_of(folder: Path) -> dict[str, float]:
    """Return the stages of a run in their order, with their seconds."""
    stages = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["stages"]
    return {name: float(entry["seconds"]) for name, entry in stages.items()}


def kind_of(stage: str) -> str:
    """Return the phase that a stage belongs to."""
    return stage.split("/")[0] or "before the first stage"


def soak_run(
    launcher: str, folder: Path, expected: dict[str, Any], stages: dict[str, float], given: argparse.Namespace,
    soak: Soak, chosen: random.Random,
) -> None:  # fmt: skip
    """Kill one run several times, let it end, and compare it."""
    names = list(stages)
    least = sorted(names, key=lambda name: (soak.kills[kind_of(name)], chosen.random()))[: given.kills_per_run // 2]
    others = chosen.sample([name for name in names if name not in least], given.kills_per_run - len(least))
    wanted = sorted([*least, *others], key=names.index)
    hit: list[str] = []
    busy, differs = 0.0, []
    for target in wanted:
        world = World(launcher, given.ranks, folder, ())
        delay = chosen.random() * stages[target]
        while not world.is_over and world.stage != target and not _is_past(folder, target):
            time.sleep(0.02)
        time.sleep(0.0 if world.is_over else delay)
        if world.is_over:
            raise RuntimeError(f"the run ended by itself; see {folder.with_suffix('.log')}")
        stage, everyone = world.stage, chosen.random() < 0.5
        world.kill(everyone, chosen)
        code = world.wait(given.patience)
        busy += world.seconds
        hit.append(kind_of(stage))
        soak.kills[hit[-1]] += 1
        soak.exits[f"{launcher}, {'all' if everyone else 'one rank'}"][code] += 1
    world = World(launcher, given.ranks, folder, ())
    code = world.wait(given.patience + 20 * sum(stages.values()))
    busy += world.seconds
    if code == 0:
        soak.resumed.update(hit)
        found = outcome(folder)
        differs = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
        if not differs:
            soak.identical.update(hit)
    soak.runs.append({"launcher": launcher, "kills": len(hit), "seconds": busy, "exit": code, "differs": differs})


def _is_past(folder: Path, target: str) -> bool:
    """Whether a stage has finished, so that it was too short to be met."""
    try:
        return target in stages_of(folder)
    except (OSError, ValueError, KeyError):
        return False


def main() -> None:
    """Run the soak and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="at least so many in all (60)")
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=180.0, help="seconds in which a killed world must be over")
    parser.add_argument("--quick", action="store_true", help="six kills")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.kills = 6
    base = given.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    base.mkdir(parents=True, exist_ok=True)
    chosen, soak = random.Random(given.seed), Soak()
    alone = World("mpirun", given.ranks, base / "alone", ())
    if alone.wait(given.patience * 4) != 0:
        raise SystemExit(f"the run that is left alone failed: see {base / 'alone.log'}")
    alone_seconds = alone.seconds
    expected, stages = outcome(base / "alone"), stages_of(base / "alone")
    print(machine_line())
    print(f"left alone: {alone_seconds:.1f} s, {sum(stages.values()):.1f} s of it in {len(stages)} stages", flush=True)
    rare = World("mpirun", given.ranks, base / "rare", ("run.checkpoint_every_steps=1000000",))
    if rare.wait(given.patience * 4) != 0:
        raise SystemExit(f"the run with few checkpoints failed: see {base / 'rare.log'}")
    print(checkpoint_cost(stages, stages_of(base / "rare")), flush=True)
    number = 0
    while sum(soak.kills.values()) < given.kills:
        launcher = LAUNCHERS[number % 2]
        soak_run(launcher, base / f"run-{number:03d}", expected, stages, given, soak, chosen)
        print(f"run {number}: {soak.runs[-1]}", file=sys.stderr, flush=True)
        number += 1
    report(soak, alone_seconds)


def checkpoint_cost(often: dict[str, float], rare: dict[str, float]) -> str:
    """Say what checkpoints at every second step cost, against checkpoints at the ends of stages alone."""
    training = [name for name in often if kind_of(name) in TRAINING]
    with_them, without = (sum(stages[name] for name in training) for stages in (often, rare))
    return (
        f"checkpoints at every second step: {with_them:.1f} s in training stages against {without:.1f} s with one at "
        f"the end of each, {1 - without / with_them:.0%} of it ({sum(often.values()):.1f} s in all stages)"
    )


def report(soak: Soak, alone_seconds: float) -> None:
    """Print what was seen."""
    phases = sorted(soak.kills, key=lambda phase: -soak.kills[phase])
    rows = [
        {"phase": phase, "kills": soak.kills[phase], "resumed": soak.resumed[phase], "identical": soak.identical[phase]}
        for phase in phases
    ]
    total = {name: sum(counts.values()) for name, counts in
             (("kills", soak.kills), ("resumed", soak.resumed), ("identical", soak.identical))}  # fmt: skip
    print("\n" + table([*rows, {"phase": "all", **total}]))
    lost = [(run["seconds"] - alone_seconds) / run["kills"] for run in soak.runs] or [0.0]
    print(f"\nTime lost a kill, the start of all processes included: {sum(lost) / len(lost):.1f} s on average.")
    print("\n" + table([{"killed": what, "launcher's exit codes": dict(codes)} for what, codes in soak.exits.items()]))
    for run in soak.runs:
        if run["exit"] or run["differs"]:
            print(f"\nNOT AS IT SHOULD BE: {run}")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal(pid: int) -> None:
    try:
        if b"launcher/run.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass  # it has ended


def _signal_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

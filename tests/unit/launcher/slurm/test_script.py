"""The text of a job's script, and the script at work: what it does with signals and with how the ranks end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm.script import DAEMON, DAEMON_NAME, render, slurm_folder
from launcher.slurm.settings import Settings
from tests.distributed.processes import ROOT
from tests.unit.launcher.slurm.stand_ins import SETTINGS, StandIns, leave_start, make_job

REQUEUED = "scontrol requeue 7"


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]


def linted(*words: str | Path) -> str:
    """Return what shellcheck, which comes with the environment, has against a script."""
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.stdout


def with_settings(**changes: Any) -> Settings:
    return Settings(**{**vars(SETTINGS), **changes})


# --- the text --------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_slurm() -> None:
    settings = with_settings(
        partition="gpu", account="lab", constraint="a100&ib", cpus_per_task=12, mem="0", sbatch=("exclusive",)
    )
    assert options_of(render(make_job(Path("/runs/one"), settings=settings))) == [
        "job-name=sparring-run",
        "nodes=2",
        "ntasks=8",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=12",
        "mem=0",
        "time=1:00:00",
        "partition=gpu",
        "account=lab",
        "constraint=a100&ib",
        "exclusive",
        "signal=B:USR1@150",
        "requeue",
        "open-mode=append",
        'output="/runs/one/slurm/%j.out"',
    ]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        (
            {},
            'mpirun -n "$SLURM_NTASKS" --map-by ppr:4:node --bind-to none -x SLURM_NTASKS -x SLURM_NNODES '
            f'--prtemca prte_launch_agent {DAEMON_NAME} "$python" "$root/launcher/run.py"',
        ),
        ({"mpi": "pmix"}, 'srun --kill-on-bad-exit=1 --mpi=pmix "$python" "$root/launcher/run.py"'),
        (
            {"container": "apptainer:/img/a b.sif", "mounts": ("/data:/in",)},
            """apptainer exec --nv --bind /code,/work,/runs/one,/data:/in --pwd "$PWD" '/img/a b.sif' python3 "$root""",
        ),
        (
            {"container": "pyxis:nvcr.io#nvidia/pytorch:24.07", "container_python": "/opt/v/bin/python"},
            "srun --kill-on-bad-exit=1 --mpi=pmix --container-image='nvcr.io#nvidia/pytorch:24.07' "
            "--container-mounts=/code:/code,/work:/work,/runs/one:/runs/one --no-container-mount-home "
            '--container-workdir="$PWD" /opt/v/bin/python "$root/launcher/run.py" --config "$run/slurm/recipe.yaml"',
        ),
    ],
)
def test_what_starts_the_ranks(changes: dict[str, Any], command: str) -> None:
    job = make_job(Path("/runs/one"), settings=with_settings(**changes), root=Path("/code"), cwd=Path("/work"))
    text = " ".join(render(job).replace("\\\n", " ").split())
    assert command in text
    assert (f"launch_agent {DAEMON_NAME}" in text) == ("mpirun -n" in text)


def test_modules_are_loaded_in_a_shell_that_knows_them() -> None:
    text = render(make_job(Path("/r"), settings=with_settings(modules=("cuda/12.6",), setup=("export A=1",))))
    assert text.startswith("#!/bin/bash -l\n")
    assert "module load cuda/12.6 || exit 2\nexport A=1\nexport PATH=" in text


def test_root_is_allowed_only_where_the_user_is_root() -> None:
    assert "ALLOW_RUN_AS_ROOT" not in render(make_job(Path("/r")))
    assert "ALLOW_RUN_AS_ROOT" in render(make_job(Path("/r"), as_root=True))


@pytest.mark.parametrize("runs", [(), (Path("/r/0 a"), Path("/r/1'b"))])
@pytest.mark.parametrize("mpi", ["mpirun", "pmix"])
def test_the_script_is_good_bash(tmp_path: Path, runs: tuple[Path, ...], mpi: str) -> None:
    job = make_job(Path("/r"), settings=with_settings(mpi=mpi, modules=("a",)), runs=runs, tasks=(0, 1))
    for name, text in (("job", render(job)), ("daemon", DAEMON)):
        path = tmp_path / name
        path.write_text(text)
        assert subprocess.run(["bash", "-n", path], capture_output=True, check=False).stderr == b""
        assert linted("--severity=style", path) == ""


# --- the script at work ----------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> StandIns:
    stand_ins = StandIns(tmp_path)
    stand_ins.make("scontrol", 'if [ "$1" = requeue ]; then kill -TERM $PPID; fi')  # SLURM ends what it requeues
    return stand_ins


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / 'a run\'s $(touch x) "%j"'


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ASKED = {"code": 85, "message": "stopped at retriever/1, step 7 (SIGUSR1)", "kind": "preempted"}
WAITS = """
trap 'echo mpirun got {name} >>{calls}; sleep 0.2; exit 85' USR1
echo ready >>{calls}
while true; do sleep 0.05; done
"""


def mpirun_waits(made: StandIns) -> None:
    made.make("mpirun", WAITS.format(name="USR1", calls=made._calls))


def test_a_finished_run_ends_the_job(made: StandIns, run: Path) -> None:
    made.make("mpirun", "exit 0")
    leave_start(run, stages=("shards", "export"))
    process = made.start(run)
    told, _ = process.communicate(timeout=30)
    assert (process.returncode, "the run is finished" in told) == (0, True), told
    assert made.calls_of("scontrol") == []


def test_the_ranks_get_the_recipe_and_no_path_reaches_a_shell(made: StandIns, run: Path) -> None:
    made.make("mpirun", f'printf "%s\\n" "$@" >{made.bin}/words; pwd >{made.bin}/cwd; exit 2')
    process = made.start(run, cwd=made.bin)
    process.communicate(timeout=30)
    words = (made.bin / "words").read_text().splitlines()
    assert words[words.index("--config") + 1] == str(run / "slurm" / "recipe.yaml")
    assert words[:2] == ["-n", "8"]
    assert (made.bin / "cwd").read_text().strip() == str(made.bin), "relative paths begin where it was submitted"
    assert not list(made.bin.glob("**/x")) + list(run.parent.glob("**/x")), "a path was taken for a command"
    assert process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_becomes_a_checkpoint_and_a_requeue(made: StandIns, run: Path, number: int) -> None:
    mpirun_waits(made)
    process = made.start(run)
    until(lambda: "ready" in made.calls)
    leave_start(run, failure=ASKED)
    process.send_signal(number)
    process.send_signal(number)  # as SLURM does when it has become impatient
    told, _ = process.communicate(timeout=30)
    assert "mpirun got USR1" in made.calls, told
    assert [call for call in made.calls if call == REQUEUED] == [REQUEUED], told
    assert process.returncode == 85


def test_ranks_that_end_while_the_signal_comes_keep_their_code(made: StandIns, run: Path) -> None:
    """Symptom: bash lost the status in one of five such moments, and a refused run was started again."""
    made.make("mpirun", "trap '' USR1\nkill -USR1 $SCRIPT\nexit 2")
    for _ in range(5):
        process = made.start(run)
        told, _ = process.communicate(timeout=30)
        assert process.returncode == 2, told
    assert REQUEUED not in made.calls


def test_a_task_of_an_array_requeues_itself_and_no_other(made: StandIns, run: Path) -> None:
    """Symptom: the job number of one of the tasks is that of the array, and requeueing it meant all of them."""
    runs = (run / "0", run / "1")
    mpirun_waits(made)
    process = made.start(run, runs=runs, tasks=(0, 1))
    until(lambda: "ready" in made.calls)
    leave_start(runs[1], failure=ASKED)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert [call for call in made.calls_of("scontrol") if "requeue" in call] == ["scontrol requeue 7_1"]
    assert str(runs[1] / "slurm" / "recipe.yaml") in made.calls_of("mpirun")[0]


def test_a_refused_requeue_is_told(made: StandIns, run: Path) -> None:
    made.make("scontrol", "exit 1")
    made.make("mpirun", "kill -USR1 $SCRIPT; sleep 0.5; exit 85")
    process = made.start(run)
    told, _ = process.communicate(timeout=30)
    assert "SLURM did not requeue job 7: submit the run again" in told
    assert process.returncode == 85


def test_the_daemon_stays_and_its_ranks_are_asked(tmp_path: Path) -> None:
    """Symptom: at a preemption, SLURM's SIGTERM ended mpirun's daemon and all ranks within half a second."""
    stand_ins = StandIns(tmp_path)
    rank = "trap 'echo asked >>{0}; exit 85' USR1; echo ready >>{0}; while true; do sleep 0.05; done"
    (tmp_path / "rank.sh").write_text(rank.format(stand_ins._calls))
    fork = 'if [ "$1" != inner ]; then prted inner & wait $!; exit; fi'  # as the real one does
    stand_ins.make("prted", f"{fork}\nbash {tmp_path}/rank.sh &\nwait $!")
    daemon = tmp_path / DAEMON_NAME
    daemon.write_text(DAEMON)
    process = subprocess.Popen(["bash", daemon, "--a b", "c"], env={"PATH": f"{stand_ins.bin}:/usr/bin:/bin"})
    until(lambda: "ready" in stand_ins.calls)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 85
    assert stand_ins.calls == ["prted --a b c", "prted inner", "ready", "asked"]


# --- how the ranks ended ---------------------------------------------------------------------------------------------


def play(made: StandIns, run: Path, returned: int, failure: dict[str, Any] | None, nonce: str, **changes: Any) -> str:
    """Start the job once; the ranks leave a failure and end. Returns `requeued`, or the exit code."""
    before = made.calls.count(REQUEUED)
    made.make("mpirun", f"exit {returned}")
    leave_start(run, nonce, failure, stages=("shards",))
    process = made.start(run, **changes)
    told, _ = process.communicate(timeout=30)
    again = made.calls.count(REQUEUED) - before
    assert again == (process.returncode == 85), told
    return "requeued" if again else f"{process.returncode}: {told}"


def test_a_lost_rank_starts_again_so_often_and_not_twice_at_one_place(made: StandIns, run: Path) -> None:
    limited = {"settings": with_settings(max_restarts=2)}
    assert play(made, run, 137, {"code": 75, "step": 1}, "a", **limited) == "requeued"
    assert play(made, run, 75, {"code": 75, "step": 2}, "b", **limited) == "requeued"
    told = play(made, run, 75, {"code": 75, "step": 3}, "c", **limited)
    assert told.startswith("75: ")
    assert "started again 2 times, which is all that --max-restarts allows" in told
    ends = json.loads((slurm_folder(run) / "ends.json").read_text())
    assert [(end["returned"], end["code"], end["again"]) for end in ends] == [
        (137, 75, True),
        (75, 75, True),
        (75, 75, False),
    ]


def test_a_rank_lost_twice_at_one_place_is_not_started_again(made: StandIns, run: Path) -> None:
    assert play(made, run, 75, {"code": 75}, "a") == "requeued"
    assert "ended twice at retriever/1, step 7" in play(made, run, 75, {"code": 75}, "b")


def test_mpiruns_0_without_a_finished_recipe_is_a_loss(made: StandIns, run: Path) -> None:
    """Symptom: mpirun loses its daemon on another node, returns 0, and the job counted as completed."""
    assert play(made, run, 0, None, "a") == "requeued"


@pytest.mark.parametrize(("code", "word"), [(2, "Mend that"), (1, "an error of the program")])
def test_what_another_start_does_not_help_ends_the_job(made: StandIns, run: Path, code: int, word: str) -> None:
    told = play(made, run, code, {"code": code}, "a")
    assert told.startswith(f"{code}: ")
    assert word in told
    assert "rank 1 on n1: it is bad" in told


def test_a_run_stopped_by_hand_is_not_requeued(made: StandIns, run: Path) -> None:
    """Symptom: `touch RUN/stop` stopped the run, and SLURM started it again."""
    made.make("scontrol", 'case "$*" in *show*) echo "JobId=7 PreemptTime=None" ;; esac')
    told = play(made, run, 85, ASKED, "a")
    assert told.startswith("130: ")
    assert "submitted again, the run goes on" in told


def test_ranks_that_slurm_has_asked_without_the_script_are_started_again(made: StandIns, run: Path) -> None:
    shown = 'echo "JobId=7 PreemptTime=2026-01-01T00:00:00"'
    made.make("scontrol", f'case "$*" in *show*) {shown} ;; *) kill -TERM $PPID ;; esac')
    assert play(made, run, 85, ASKED, "a") == "requeued"


def test_a_preemption_is_seen_although_slurm_is_busy(made: StandIns, run: Path, tmp_path: Path) -> None:
    """Symptom: as scontrol did not answer once, a preempted run took itself for one stopped by hand and stayed so."""
    busy = f"if [ ! -e {tmp_path}/busy ]; then touch {tmp_path}/busy; echo 'Socket timed out' >&2; exit 1; fi"
    shown = f'{busy}; echo "JobId=7 PreemptTime=2026-01-01T00:00:00"'
    made.make("scontrol", f'case "$*" in *show*) {shown} ;; *) kill -TERM $PPID ;; esac')
    assert play(made, run, 85, ASKED, "a") == "requeued"
    assert len([call for call in made.calls_of("scontrol") if "show" in call]) == 2


def test_a_cancelled_run_is_not_requeued(made: StandIns, run: Path) -> None:
    slurm_folder(run).mkdir(parents=True)
    (slurm_folder(run) / "cancelled").touch()
    assert play(made, run, 85, ASKED, "a").startswith("130: ")


def test_a_run_that_never_gets_further_than_its_time_is_told(made: StandIns, run: Path) -> None:
    made.make("mpirun", "kill -USR1 $SCRIPT; sleep 0.3; exit 85")
    for nonce in ("a", "b", "c"):
        leave_start(run, nonce, ASKED)
        process = made.start(run)
        told, _ = process.communicate(timeout=30)
    assert made.calls.count(REQUEUED) == 2
    assert "3 starts in a row have ended at retriever/1, step 7: ask for more --time" in told
    assert process.returncode == 2


# --- the templates ---------------------------------------------------------------------------------------------------

TEMPLATES = ROOT / "configs" / "slurm"


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch"])
def test_a_template_is_good_bash(name: str) -> None:
    assert subprocess.run(["bash", "-n", TEMPLATES / name], capture_output=True, check=False).stderr == b""
    assert linted("--exclude=SC1091", TEMPLATES / name) == ""


def start_template(made: StandIns, **variables: str) -> subprocess.Popen[str]:
    env = {"PATH": f"{made.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    return subprocess.Popen(
        ["bash", TEMPLATES / "train.sbatch"],
        env={**env, **variables},
        cwd=made.bin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_template_asks_and_requeues_too(made: StandIns) -> None:
    mpirun_waits(made)
    process = start_template(made)
    until(lambda: "ready" in made.calls)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 85, told
    assert made.calls_of("scontrol") == [REQUEUED]


@pytest.mark.parametrize(("code", "restarts", "again"), [(75, "2", True), (75, "3", False), (2, "0", False)])
def test_the_template_starts_again_after_a_loss(made: StandIns, code: int, restarts: str, again: bool) -> None:
    made.make("mpirun", f"exit {code}")
    process = start_template(made, SLURM_RESTART_COUNT=restarts)
    process.communicate(timeout=30)
    assert (made.calls_of("scontrol") == [REQUEUED]) is again
    assert process.returncode == (85 if again else code)

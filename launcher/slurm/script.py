"""The text of a job's sbatch script.

The script is made to be read. What comes from the person who submits goes into it quoted for the shell (paths, module
names) or has matched a pattern (`launcher.slurm.settings`); the recipe does not go into it at all, it names the file.

How it stops in time: SLURM's SIGUSR1 before the time limit (`--signal=B:`) or at a preemption (where the site has set
`preempt_send_user_signal`) and SIGTERM at the end of a job come to the script, which passes them to mpirun as SIGUSR1,
because mpirun gives its ranks half a second on SIGTERM. At a preemption with a grace time SLURM sends SIGTERM to the
steps of a job and not to its script: the step is mpirun's daemon on the other nodes, which would end all ranks at once.
So a few lines of shell stand between SLURM and the daemon (`DAEMON`), and ask the ranks instead.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm.settings import Settings

REQUEUE_SECONDS = 30
"""Between the end of the ranks and that of the job, for what decides how it goes on."""

DAEMON_NAME = "sparring-daemon"
DAEMON = """\
#!/bin/bash
# Stands between SLURM and mpirun's daemon on a node. SLURM's SIGTERM, at a preemption, would end the daemon and with it
# all ranks within half a second. Here it becomes SIGUSR1 to the node's ranks: all ranks write a checkpoint and stop.
ask_below() {
    local child
    # shellcheck disable=SC2013   # words: the numbers stand in one line
    for child in $(cat "/proc/$1/task/"*/children); do
        # The daemon has another one below it, and below that are the ranks.
        if [ "$(cat "/proc/$child/comm")" = prted ]; then ask_below "$child"; else kill -USR1 "$child"; fi
    done
} 2>/dev/null
trap 'ask_below "$daemon"' TERM USR1
trap '' CONT
prted "$@" &
daemon=$!
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon"; done
wait "$daemon"
"""

_HEAD = """\
#!/bin/bash{login}
# A run of Sparring under SLURM, written by `python -m launcher submit`. It asks to be stopped in time, requeues itself
# and goes on where it stopped, until the recipe is finished.
"""

_PLACE = """
# The run folder of this task, one of a sweep.
runs=({runs}
)
run=${{runs[$SLURM_ARRAY_TASK_ID]}}
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
"""

_ENVIRONMENT = """
cd {cwd} || exit 2
root={root}
python={python}
{site}export PATH={bin}:{slurm}:$PATH PYTHONPATH="$root${{PYTHONPATH:+:$PYTHONPATH}}"
export SLURM_EXPORT_ENV=ALL   # all that is set here reaches the ranks of all nodes
# mpirun would wait for minutes for a node that has vanished.
export PRTE_MCA_oob_tcp_keepalive_time=15 PRTE_MCA_oob_tcp_keepalive_intvl=15 PRTE_MCA_oob_tcp_keepalive_probes=3
"""

_AS_ROOT = """\
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"""

_SIGNALS = """
set -u
# SIGUSR1 comes before the time limit and at a preemption, SIGTERM when the job is ended. What starts the ranks, the one
# child of $child, gets SIGUSR1: the ranks write a checkpoint and end with 85.
child=
asked=no
ask_ranks() {
    asked=yes
    local starter=
    while [ -z "$starter" ] && kill -0 "${child:-none}"; do
        read -r starter <"/proc/$child/task/$child/children" || sleep 0.1
    done
    [ -z "$starter" ] || kill -USR1 "$starter"
} 2>/dev/null
trap ask_ranks USR1 TERM
"""

_WAIT = """
    echo "$?" >"$run/slurm/returned"
}} &
child=$!
[ "$asked" = no ] || ask_ranks   # asked before there was anybody to ask
# A signal ends `wait`, and bash may then have lost the status: so it is in a file.
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
child=
code=137
[ ! -e "$run/slurm/returned" ] || read -r code <"$run/slurm/returned"

# Says in words how the start ended; 85: start again.
"$python" -m launcher.slurm.ended "$run" --returned "$code" --asked "$asked" \\
    --max-restarts {max_restarts}
code=$?
if [ "$code" -eq 85 ]; then
    trap 'exit 85' TERM   # SLURM ends the script once it has requeued the job
    scontrol requeue "$job" && {{ sleep 300 & wait; }}
    echo "SLURM did not requeue job $job: submit the run again, and it goes on" >&2
fi
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What a script is made of.

    Attributes:
        settings: What is asked of SLURM.
        name: The job's name: letters, digits, dots and dashes.
        folder: Absolute path of the run, or of the sweep; the script and its log go below it.
        runs: For a sweep, the absolute run folder of each task; else none.
        tasks: Numbers of the tasks that are to run.
        max_parallel: How many tasks run at once; None leaves it to SLURM.
        cwd: Where relative paths of the recipe begin.
        root: The folder of the code.
        python: Interpreter that submitted, which also runs the ranks where there is no container.
        stop_seconds: How long before the time limit the ranks are asked to stop.
        reads: Folders besides that the ranks read, for a container.
        as_root: Whether the user is root, whom mpirun wants to be sure.
    """

    settings: Settings
    name: str
    folder: Path
    cwd: Path
    root: Path
    python: Path
    stop_seconds: int
    runs: tuple[Path, ...] = ()
    tasks: tuple[int, ...] = ()
    max_parallel: int | None = None
    reads: tuple[Path, ...] = ()
    as_root: bool = False


def slurm_folder(run: Path) -> Path:
    """Return where a run or a sweep keeps what concerns SLURM."""
    return run / "slurm"


def recipe_path(run: Path) -> Path:
    """Return where `submit` writes the recipe that the job's script starts."""
    return slurm_folder(run) / "recipe.yaml"


def log_pattern(job: Job) -> str:
    """Return the path of the job's log with sbatch's signs for the job's number in it."""
    name = "%A_%a.out" if job.runs else "%j.out"
    return str(slurm_folder(job.folder)).replace("%", "%%") + "/" + name


def render(job: Job) -> str:
    """Return the script of a job."""
    quote, settings = shlex.quote, job.settings
    if job.runs:
        place = _PLACE.format(runs="".join(f"\n    {quote(str(run))}" for run in job.runs))
    else:
        place = f"\nrun={quote(str(job.folder))}\njob=$SLURM_JOB_ID\n"
    site = "".join(f"module load {quote(name)} || exit 2\n" for name in settings.modules)
    site += "".join(f"{line}\n" for line in settings.setup)
    environment = _ENVIRONMENT.format(
        cwd=quote(str(job.cwd)),
        root=quote(str(job.root)),
        python=quote(str(job.python)),
        bin=quote(str(job.python.parent)),
        slurm=quote(str(slurm_folder(job.folder))),
        site=site,
    )
    if settings.starter == "mpirun":
        environment += _AS_ROOT if job.as_root else ""
    return "".join(
        [
            _HEAD.format(login=" -l" if settings.modules else ""),  # where `module` is defined
            *(f"#SBATCH --{option}\n" for option in _options(job)),
            place,
            environment,
            _SIGNALS,
            f'\nrm -f "$run/slurm/returned"\n{{\n    {_starter(job)}',
            _WAIT.format(max_restarts=settings.max_restarts),
        ]
    )


def mpirun_words(num_ranks: str, ranks_per_node: int) -> list[str]:
    """Return the words by which mpirun starts ranks over the nodes of an allocation.

    Args:
        num_ranks: On all nodes, as a number or as a shell's variable.
        ranks_per_node: On each.
    """
    return ["mpirun", "-n", num_ranks, "--map-by", f"ppr:{ranks_per_node}:node", "--bind-to", "none"]


def srun_words() -> list[str]:
    """Return the words by which srun starts a rank for each task, where the site's SLURM has PMIx."""
    return ["srun", "--kill-on-bad-exit=1", "--mpi=pmix"]


def _options(job: Job) -> list[str]:
    settings = job.settings
    options = [
        f"job-name={job.name}",
        f"nodes={settings.nodes}",
        f"ntasks={settings.nodes * settings.ranks}",
        f"ntasks-per-node={settings.ranks}",
    ]
    options += [f"gpus-per-node={settings.gpus_per_node}"] * (settings.num_gpus > 0)
    for name in (
        "cpus_per_task",
        "mem",
        "time",
        "partition",
        "account",
        "qos",
        "constraint",
        "reservation",
        "exclude",
    ):
        if (value := getattr(settings, name)) is not None:
            options.append(f"{name.replace('_', '-')}={value}")
    options += [option.removeprefix("--") for option in settings.sbatch]
    if job.runs:
        limit = f"%{job.max_parallel}" if job.max_parallel else ""
        options.append(f"array={','.join(map(str, job.tasks))}{limit}")
    options += [f"signal=B:USR1@{job.stop_seconds}", "requeue", "open-mode=append"]
    return [*options, f"output={_quote_for_sbatch(log_pattern(job))}"]


def _starter(job: Job) -> str:
    """Return the command that starts all ranks."""
    settings, quote = job.settings, shlex.quote
    kind, _, image = (settings.container or "").partition(":")
    folders = [*map(str, dict.fromkeys((job.root, job.cwd, job.folder, *job.reads))), *settings.mounts]
    if settings.starter == "mpirun":
        words = [" ".join(mpirun_words('"$SLURM_NTASKS"', settings.ranks))]
        # Without -x, these would be those of the step that holds mpirun's daemons on the other nodes.
        words.append(f"-x SLURM_NTASKS -x SLURM_NNODES --prtemca prte_launch_agent {DAEMON_NAME}")
    else:
        words = [" ".join(srun_words())]
    if kind == "pyxis":
        mounts = ",".join(folder if ":" in folder else f"{folder}:{folder}" for folder in folders)
        words.append(f"--container-image={quote(image)} --container-mounts={quote(mounts)} --no-container-mount-home")
        words.append('--container-workdir="$PWD"')
    elif kind == "apptainer":
        nvidia = "--nv " * (settings.num_gpus > 0)
        words.append(f'apptainer exec {nvidia}--bind {quote(",".join(folders))} --pwd "$PWD" {quote(image)}')
    python = quote(settings.container_python) if kind else '"$python"'
    words.append(f'{python} "$root/launcher/run.py" --config "$run/slurm/recipe.yaml"')
    return " \\\n        ".join(words)


def _quote_for_sbatch(path: str) -> str:
    """Quote a path for an `#SBATCH` line, which sbatch reads as words with quotes and backslashes."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'

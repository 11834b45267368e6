"""A sweep in TensorBoard: its tab HParams has a row for each finished run, with what it was set to and what came of it.

tensorboard --logdir OUT        # that table, the curves of every run, and the figures of the comparison
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from engine.config.file import flatten
from engine.config.metric_names import compared_by
from engine.evaluation.summary import read_rows
from launcher.commands.sweep_file import Sweep, SweepRun
from launcher.slurm.job import is_finished

_FOLDER = "tensorboard"
_OURS = ("run.path", "run.seed")


def write_board(sweep: Sweep) -> Path | None:
    """Write the table of the finished runs anew.

    Args:
        sweep: Its folder takes it.

    Returns:
        What to start TensorBoard with; None where no run is finished.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    board = sweep.out / _FOLDER
    shutil.rmtree(board, ignore_errors=True)
    finished = [run for run in sweep.runs if is_finished(run.folder)]
    settings = settings_of(sweep)
    for run in finished:
        metrics = metrics_of(run)
        writer: Any = SummaryWriter(str(board / f"{run.variant}-seed-{run.seed}"))
        for event in hparams(settings[run.label], metrics):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(event)
        for name, value in metrics.items():
            writer.add_scalar(name, value)
        writer.close()
    return sweep.out if finished else None


def settings_of(sweep: Sweep) -> dict[str, dict[str, int | float | str | bool]]:
    """Return what each run was set to: its setting's name, its seed, and all keys in which runs of the sweep differ.

    Args:
        sweep: The runs.

    Returns:
        Label of a run -> key -> value; texts where TensorBoard knows no such type.
    """
    values = {run.label: flatten(run.config.model_dump(mode="json")) for run in sweep.runs}
    keys = dict.fromkeys(key for own in values.values() for key in own if key not in _OURS)
    differ = [key for key in keys if len({repr(own.get(key)) for own in values.values()}) > 1]
    return {
        run.label: {
            "setting": run.variant,
            "seed": run.seed,
            **{key: _plain(values[run.label].get(key)) for key in differ},
        }
        for run in sweep.runs
    }


def metrics_of(run: SweepRun) -> dict[str, float]:
    """Return what came of a finished run: what it leaves behind, on each split, as `compare` takes it.

    Args:
        run: The run.

    Returns:
        `split/role/metric` -> value, for the metric by which its iterations are compared, and MRR@10; of the most
        queries that each was measured on. Roles are those of `engine.evaluation.recorded.final_systems`.
    """
    from engine.evaluation.recorded import final_systems, row_of
    from launcher.commands.finished import open_run

    opened, threshold = open_run(run.folder), run.config.evaluation.relevance_threshold
    rows, systems = read_rows(opened.folder.summary), final_systems(opened)
    found = {
        (split, role): row_of(rows, system, split, threshold)
        for split in dict.fromkeys(row.split for row in rows)
        for role, system in systems.items()
    }
    names = dict.fromkeys((compared_by(run.config.evaluation.metrics, run.config.run.keep_best), "MRR@10"))
    return {
        f"{split}/{role}/{name}": row.metrics[name]
        for (split, role), row in found.items()
        if row is not None
        for name in names
        if name in row.metrics
    }


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)

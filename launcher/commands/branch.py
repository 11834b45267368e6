"""`python -m launcher branch RUN NEW --before STAGE [key=value ...]`: begin a run with what another one has finished.

    python -m launcher branch runs/ar2 runs/no_kd --before retriever/1 ar2.distillation_weight=0
    deepspeed launcher/run.py --config runs/no_kd/config.yaml

The second line goes on from the same G0 and D0.
"""

from __future__ import annotations

import argparse

from engine.log import get_logger
from engine.training.branching import branch_run
from launcher.terminal.arguments import typed_path

log = get_logger(__name__)


EXAMPLES = (
    "runs/ar2 runs/no_kd --before retriever/1 ar2.distillation_weight=0",
    "runs/ar2 runs/longer --before retriever/1 ar2.iterations=4",
    "runs/r2anker runs/distilled --before student student.name=bert-base-uncased",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="the run folder that has the finished stages")
    parser.add_argument("new", type=typed_path, metavar="NEW", help="the new run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ in the new run")
    parser.add_argument(
        "--before", required=True, metavar="STAGE", help="the first stage that it computes itself, such as retriever/1"
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Make the folder, and say how to go on in it."""
    done = branch_run(arguments.run, arguments.new, arguments.overrides, arguments.before)
    for change in done.changed:
        log.info("differs: %s", change)
    if done.again:
        log.info("made again: %s", ", ".join(done.again))
    if done.left_out:
        log.info("left out, since the new recipe has no such stage: %s", ", ".join(done.left_out))
    if done.gone:
        log.warning(
            "the index of %s is not in %s any more (run.keep_indexes): the next one begins from an older one, and may "
            "find other documents than the one there; index.warm_start=false builds all from nothing",
            *(done.gone, arguments.run),
        )
    log.info("%d stages taken over; go on with --config %s", len(done.kept), arguments.new / "config.yaml")

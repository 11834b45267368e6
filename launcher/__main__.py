"""The other commands: `python -m launcher COMMAND`.

    before a run    convert, docstrings, plan, preflight
    a run           submit, cancel, status, supervise, branch, sweep
    after a run     search, evaluate, matrix, analyse, compare, report, export

Training itself is started by `deepspeed launcher/run.py`, or by the job that `submit` hands to SLURM.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "convert": ("launcher.commands.convert", "make a data folder of public downloads"),
    "docstrings": ("launcher.commands.docstrings", "make a data folder of the installed packages' docstrings"),
    "plan": ("launcher.plan.command", "say what a recipe takes on given hardware, without running it"),
    "preflight": ("launcher.preflight.command", "examine the hosts and their connections, without running anything"),
    "submit": ("launcher.slurm.submit", "hand a run to SLURM, which goes on until it is finished"),
    "cancel": ("launcher.slurm.cancel", "stop a run of SLURM's, after a checkpoint"),
    "status": ("launcher.commands.status", "say what a run does, or why it stopped (exit code 0: it runs)"),
    "supervise": ("launcher.commands.supervise", "start a run's command, and again after failures"),
    "branch": ("launcher.commands.branch", "begin a run with what another one has finished"),
    "sweep": ("launcher.commands.sweep", "run the settings of a file, each with some seeds, and compare them"),
    "search": ("launcher.commands.search", "retrieve, re-rank and print the ten best documents"),
    "evaluate": ("launcher.commands.evaluate", "score the trained models on a data folder"),
    "matrix": ("launcher.commands.matrix", "measure every ranker of some runs over every retriever's list"),
    "analyse": ("launcher.commands.analyse", "compare rankers by the negatives that they were trained on"),
    "compare": (
        "launcher.commands.compare",
        "compare settings, each of a run or several seeds, by what was measured",
    ),
    "report": ("launcher.commands.report.command", "write some runs side by side as one page of HTML"),
    "export": ("launcher.commands.export", "write the models of an iteration for other libraries"),
}
"""Name -> (module, what it is for). A module has `add_arguments(parser)` and `run_command(arguments)`, which returns an
exit code or None for 0. Only the module of the command that is typed is imported."""

ONLY_TELL = frozenset({"plan", "preflight", "search", "status"})
"""Commands that change nothing, and so end where nobody reads on; the others finish what they do."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m launcher", description="What comes before and after a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if words[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    arguments, left = parser.parse_known_args(words)

    from engine.log import set_up_logging
    from launcher.ending import guarded
    from launcher.terminal.arguments import complete

    complete(parser, arguments, left)

    set_up_logging(rank=0, world_size=1)
    run_command = importlib.import_module(COMMANDS[arguments.command][0]).run_command
    return guarded(None, lambda: run_command(arguments))


if __name__ == "__main__":
    from launcher.terminal.streams import begin_in_utf8, open_streams, run_at_terminal

    begin_in_utf8()
    open_streams(stops=not set(sys.argv[1:2]) <= COMMANDS.keys() - ONLY_TELL)
    sys.exit(run_at_terminal(main))

"""The other commands: `python -m launcher COMMAND`.

    before a run    convert, docstrings, plan, preflight
    a run           submit, cancel, status, supervise
    after a run     search, evaluate, export

Training itself is started by `deepspeed launcher/run.py`, or by the job that `submit` hands to SLURM.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from engine.log import set_up_logging
from engine.reliability.preemption import EXIT_PREEMPTED
from launcher.commands.convert import add_arguments as add_convert_arguments
from launcher.ending import EXIT_REFUSED, guarded


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher", description="Use what a run made.")
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="make a data folder of public downloads")
    add_convert_arguments(convert)

    search = commands.add_parser("search", help="retrieve, re-rank and print the ten best documents")
    search.add_argument("run", type=Path, metavar="RUN", help="run folder")
    search.add_argument("question", nargs="?", help="left out, questions are read from the terminal")
    search.add_argument("--top-k", type=int, default=10, help="documents to print (10)")

    evaluate = commands.add_parser("evaluate", help="score the trained models on a data folder")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder, BEIR layout or others")
    evaluate.add_argument("--split", default="test", help="split to score (test)")
    evaluate.add_argument("--max-queries", type=int, help="score a sample of the queries")

    export = commands.add_parser("export", help="write the models of an iteration for other libraries")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument("--iteration", type=int, help="0 is the warm-up; left out, the last finished one")
    export.add_argument("--out", type=Path, help="target folder; left out, RUN/export")

    status = commands.add_parser("status", help="say what a run does, or why it stopped (exit code 0: it runs)")
    status.add_argument("run", type=Path, metavar="RUN", help="run folder")

    supervise = commands.add_parser("supervise", help="start a run's command, and again after failures")
    supervise.add_argument("--max-restarts", type=int, default=3, metavar="N", help="how often again at most (3)")
    supervise.add_argument("--retry-refused", action="store_true", help="also after exit code 2, which wants a mend")
    supervise.add_argument("--retry-preempted", action="store_true", help="also after 85, a stop that was asked for")
    supervise.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what starts the run")

    docstrings = commands.add_parser("docstrings", help="make a data folder of the installed packages' docstrings")
    docstrings.add_argument("--out", type=Path, required=True, help="folder to write, in the BEIR layout")
    docstrings.add_argument("--max-documents", type=int, default=4000, help="size of the corpus (4000)")
    docstrings.add_argument("--seed", type=int, default=0, help="draws documents and splits (0)")

    for name, (module, what) in _MODULES.items():
        importlib.import_module(module).add_arguments(commands.add_parser(name, help=what))

    arguments = parser.parse_args(argv)
    set_up_logging(rank=0, world_size=1)
    command = _COMMANDS.get(arguments.command)
    if command is None:
        command = importlib.import_module(_MODULES[arguments.command][0]).run_command
    return guarded(None, lambda: command(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    from launcher.commands.convert import convert_command

    convert_command(arguments)


def _search(arguments: argparse.Namespace) -> None:
    from launcher.commands.search import answer_questions

    answer_questions(arguments.run, arguments.question, top_k=arguments.top_k)


def _evaluate(arguments: argparse.Namespace) -> None:
    from launcher.commands.evaluate import evaluate_run

    evaluate_run(arguments.run, arguments.data, split=arguments.split, max_queries=arguments.max_queries)


def _export(arguments: argparse.Namespace) -> None:
    from launcher.commands.export import export_run

    export_run(arguments.run, iteration=arguments.iteration, out=arguments.out)


def _docstrings(arguments: argparse.Namespace) -> None:
    from launcher.commands.docstrings import docstrings_command

    docstrings_command(arguments)


def _status(arguments: argparse.Namespace) -> int:
    from launcher.commands.status import show_status

    return show_status(arguments.run)


def _supervise(arguments: argparse.Namespace) -> int:
    from launcher.commands.supervise import supervise

    retry = {EXIT_REFUSED} if arguments.retry_refused else set()
    retry |= {EXIT_PREEMPTED} if arguments.retry_preempted else set()
    command = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    return supervise(command, max_restarts=arguments.max_restarts, retry=frozenset(retry))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "convert": _convert,
    "search": _search,
    "evaluate": _evaluate,
    "export": _export,
    "status": _status,
    "supervise": _supervise,
    "docstrings": _docstrings,
}

_MODULES = {
    "plan": ("launcher.plan.command", "say what a recipe takes on given hardware, without running it"),
    "preflight": ("launcher.preflight.command", "examine the hosts and their connections, without running anything"),
    "submit": ("launcher.slurm.submit", "hand a run to SLURM, which goes on until it is finished"),
    "cancel": ("launcher.slurm.cancel", "stop a run of SLURM's, after a checkpoint"),
}
"""Commands in modules of their own, each with `add_arguments` and `run_command`; cheap to import."""

if __name__ == "__main__":
    sys.exit(main())

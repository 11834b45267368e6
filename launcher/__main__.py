"""All commands: `sparring COMMAND`, or `python -m launcher COMMAND` where nothing is installed.

`GROUPS` lists them by purpose. Training itself is started by `train`, by `deepspeed launcher/run.py`, or by the job
that `submit` hands to SLURM.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "convert": ("launcher.commands.convert", "make a data folder of public downloads"),
    "docstrings": ("launcher.commands.docstrings", "make a data folder of the installed packages' docstrings"),
    "init": ("launcher.commands.init", "write a recipe that fits a data folder, its models and this machine"),
    "options": ("launcher.commands.options", "list or search all keys of recipes, with range, default and meaning"),
    "plan": ("launcher.plan.command", "say what a recipe takes on given hardware, without running it"),
    "preflight": ("launcher.preflight.command", "examine the hosts and their connections, without running anything"),
    "train": ("launcher.commands.train", "start a run by deepspeed or mpirun, whichever fits, and print the command"),
    "submit": ("launcher.slurm.submit", "hand a run to SLURM, which goes on until it is finished"),
    "cancel": ("launcher.slurm.cancel", "stop a run of SLURM's, after a checkpoint"),
    "status": ("launcher.commands.status", "say what a run does, or why it stopped (exit code 0: it runs)"),
    "supervise": ("launcher.commands.supervise", "start a run's command, and again after failures"),
    "branch": ("launcher.commands.branch", "begin a run with what another one has finished"),
    "sweep": ("launcher.commands.sweep", "run the settings of a file, each with some seeds, and compare them"),
    "search": ("launcher.commands.search", "retrieve, re-rank and print the ten best documents"),
    "serve": ("launcher.commands.serve.command", "search over HTTP, encode and re-rank texts, with a page to try it"),
    "evaluate": ("launcher.commands.evaluate", "score the trained models on a data folder"),
    "matrix": ("launcher.commands.matrix", "measure every ranker of some runs over every retriever's list"),
    "analyse": ("launcher.commands.analyse", "compare rankers by the negatives that they were trained on"),
    "compare": (
        "launcher.commands.compare",
        "compare settings, each of a run or several seeds, by what was measured",
    ),
    "report": ("launcher.commands.report.command", "write some runs side by side as one page of HTML"),
    "export": ("launcher.commands.export", "write the models of an iteration for other libraries"),
    "completion": ("launcher.commands.completion", "print a script by which a shell completes all of this"),
}
"""Name -> (module, what it is for). A module has `add_arguments(parser)` and `run_command(arguments)`, which returns an
exit code or None for 0, and `EXAMPLES`, two command lines without the program's name. Only the module of the command
that is typed is imported, and of one in `WORDS_APART` no more than its words where help is asked for."""

WORDS_APART = frozenset({"analyse", "compare", "evaluate", "export", "matrix", "report", "search"})
"""Commands whose modules load models: their words and examples lie in `launcher.commands.words`."""

GROUPS = {
    "Before a run": ("init", "convert", "docstrings", "options", "plan", "preflight"),
    "A run": ("train", "submit", "cancel", "status", "supervise", "branch", "sweep"),
    "After a run": ("search", "serve", "evaluate", "matrix", "analyse", "compare", "report", "export"),
    "The shell": ("completion",),
}
"""Purpose -> commands, in the order of the help."""

ONLY_TELL = frozenset({"options", "plan", "preflight", "search", "status"})
"""Commands that change nothing, and so end where nobody reads on; the others finish what they do."""

_SCRIPT = "sparring"


def program_name() -> str:
    """Return how this program was called, for messages that tell what to type."""
    return _SCRIPT if Path(sys.argv[0]).name == _SCRIPT else "python -m launcher"


def command_line(words: Sequence[str] | None = None, program: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command line.

    Args:
        words: What is typed; of its command alone the words are described, since that takes the import of its module.
            None describes those of all commands.
        program: The name in all messages; None for the one by which this program was called.
    """
    program = program or program_name()
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [--help] [--version] COMMAND ...",
        description="Distributed training of dense retrievers against rankers.",
        epilog=_listed(program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the versions of this program and its libraries")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog=program
    )
    for name, (_, purpose) in COMMANDS.items():
        # A part of an option's name is none: `--ranker` would be `--ranker-shape` until there is a `--ranker`.
        command = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", allow_abbrev=False
        )
        command.set_defaults(parser=command)
        if words is None or list(words[:1]) == [name]:
            _describe(command, name, f"{program} {name}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = command_line(words)
    if not words:
        parser.print_help()
        return 2
    _require_command(parser, words[0])
    arguments, left = parser.parse_known_args(words)

    from engine.log import set_up_logging
    from launcher.ending import guarded
    from launcher.terminal.arguments import complete
    from launcher.world.imports import end_imports

    complete(arguments.__dict__.pop("parser"), arguments, left)

    set_up_logging(rank=0, world_size=1)
    run_command = importlib.import_module(COMMANDS[arguments.command][0]).run_command
    end_imports()
    return guarded(None, lambda: run_command(arguments))


def program() -> None:
    """Run as a program, of the name `sparring` or as this module, and end the process."""
    from launcher.terminal.streams import begin_in_utf8, open_streams, run_at_terminal
    from launcher.world.imports import begin_imports

    begin_imports()
    begin_in_utf8()
    open_streams(stops=not set(sys.argv[1:2]) <= COMMANDS.keys() - ONLY_TELL)
    sys.exit(run_at_terminal(main))


class _Version(argparse.Action):
    """Prints the versions and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from engine.reliability.versions import installed_versions

        versions = installed_versions(("sparring", "torch", "deepspeed", "transformers", "faiss"))
        names = max(map(len, versions))
        for name, version in {**versions, "python": sys.version.split()[0]}.items():
            print(f"{name:{names}}  {version or 'not installed'}")
        parser.exit()


def _require_command(parser: argparse.ArgumentParser, word: str) -> None:
    """End with exit code 2 where a word in the place of a command is none; the nearest ones are named."""
    if word in COMMANDS or word.startswith("-"):
        return
    from difflib import get_close_matches

    near = " or ".join(get_close_matches(word, COMMANDS, n=2))
    parser.error(f"there is no command {word!r}{f' (is {near} meant?)' if near else ''}: --help lists all")


def words_of(name: str) -> Any:
    """Return the module that has the words and the examples of a command."""
    return importlib.import_module(f"launcher.commands.words.{name}" if name in WORDS_APART else COMMANDS[name][0])


def _describe(command: argparse.ArgumentParser, name: str, called: str) -> None:
    """Give a command its words and its examples."""
    found = words_of(name)
    found.add_arguments(command)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = "\n".join(["examples:", *(f"  {called} {example}" for example in found.EXAMPLES)])


def examples_of(name: str) -> list[list[str]]:
    """Return the words of a command's examples, its name first."""
    return [[name, *shlex.split(example)] for example in words_of(name).EXAMPLES]


def _listed(program: str) -> str:
    """List the commands by purpose."""
    lines = []
    for purpose, names in GROUPS.items():
        lines += [f"{purpose}:", *(f"    {name:<12}{COMMANDS[name][1]}" for name in names), ""]
    return "\n".join([*lines, f"`{program} COMMAND --help` has the words of a command, and examples."])


if __name__ == "__main__":
    program()

"""`sparring completion SHELL`: a script by which a shell completes commands, options, files and keys of recipes.

    sparring completion bash > ~/.local/share/bash-completion/completions/sparring
    sparring completion zsh > ~/.zfunc/_sparring          # with fpath+=~/.zfunc before compinit in ~/.zshrc
    sparring completion fish > ~/.config/fish/completions/sparring.fish

shtab makes it of the parsers, so that it is as complete as `--help`. It takes seconds, since all commands are imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

from engine.config.recipes import RECIPES
from engine.config.reference import options_of
from launcher.__main__ import command_line
from launcher.terminal.arguments import recipe_file, typed_path

EXAMPLES = (
    "bash > ~/.local/share/bash-completion/completions/sparring",
    "fish > ~/.config/fish/completions/sparring.fish",
)
_FOLDERS = {"run", "runs", "new"}
_KEYS = "_sparring_keys"
_WITHOUT_SPACE = """
# A key ends in =, and its value follows at once.
_sparring() {
    _shtab_sparring "$@"
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o bashdefault -F _sparring sparring
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def run_command(arguments: argparse.Namespace) -> None:
    """Print the script."""
    print(script_for(arguments.shell))


def script_for(shell: str) -> str:
    """Return the script for a shell.

    Args:
        shell: `bash`, `zsh` or `fish`.
    """
    parser = command_line(program="sparring")
    keys = _completion_of_keys()
    for action in _actions_below(parser):
        if action.dest == "overrides":
            vars(action)["complete"] = keys
        elif action.type in {typed_path, recipe_file}:
            vars(action)["complete"] = shtab.FILE
        elif action.dest in _FOLDERS:
            vars(action)["complete"] = shtab.DIRECTORY
    text: str = shtab.complete(parser, shell=shell)
    return text + _WITHOUT_SPACE if shell == "bash" else text


def _actions_below(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = "what to do"  # what the help lists by itself would be left out
            for command in action.choices.values():
                yield from _actions_below(command)
        else:
            yield action


def _completion_of_keys() -> shtab.CompleteType:
    """Return what shtab writes for words such as `run.seed=7`: the keys of all recipes stand in the script."""
    keys = sorted({use.key for option in options_of(RECIPES) for use in option.uses if "[" not in use.key})
    words = " ".join(f"{key}=" for key in keys)
    return {
        "bash": _KEYS,
        "zsh": _KEYS,
        "fish": f"({_KEYS})",
        "preamble": {
            "bash": f"{_KEYS}() {{\n    compgen -W '{words}' -- \"$1\"\n}}",
            "zsh": f"{_KEYS}() {{\n    compadd -S '' -- {words}\n}}",
            "fish": f"function {_KEYS}\n    string split ' ' '{words}'\nend",
        },
    }

"""What can be done with a finished run, as commands with its paths."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

_AFTER_A_RUN = ("search {run} {question}", "report {run}", "serve {run}", "export {run} --out {run}-export")
_LONGEST_QUESTION = 60


def installed_program() -> str:
    """Return what begins a command that somebody can type here."""
    return "sparring" if shutil.which("sparring") else "python -m launcher"


def next_steps(run: Path, question: str | None) -> str:
    """List commands to go on with, a line each.

    Args:
        run: The run folder.
        question: One of the data's; None for a run without questions, which is searched by nobody.
    """
    program = installed_program()
    given = {"run": shlex.quote(_as_short(run)), "question": shlex.quote(_shortened(question))}
    lines = [f"{program} {words.format(**given)}" for words in _AFTER_A_RUN if question is not None]
    lines += [f"tensorboard --logdir {shlex.quote(_as_short(run / 'tensorboard'))}"]
    return "\n".join(f"  {line}" for line in lines)


def _shortened(question: str | None) -> str:
    words, text = (question or "").split(), ""
    while words and len(text) + len(words[0]) < _LONGEST_QUESTION:
        text += f" {words.pop(0)}"
    return text.strip() or "a question"


def _as_short(path: Path) -> str:
    """Return a path as somebody in this folder would type it."""
    return os.fspath(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

"""What `python -m launcher preflight` starts on each host: answers questions, one JSON line each, until its input ends.

Nothing that it is asked for ever is a word of a command line. Answers carry a mark in front, since a login shell may
print what it likes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from engine.index.held.store import expanded
from launcher.preflight.facts import Needs, collect_facts
from launcher.preflight.folder import leave_mark, marks_in, remove_mark
from launcher.preflight.records import Facts, Listening, Mark, Seen
from launcher.world.greeting import greet, why_unreached
from launcher.world.interfaces import interfaces
from shards.files import parse_record

ANSWER = "sparring-preflight: "
"""In front of each answer."""


def answer_questions(questions: IO[str], answers: IO[str]) -> None:
    """Answer until the questions end.

    Args:
        questions: A JSON object a line; `do` names the function, the rest are its arguments.
        answers: Takes a line for each question: what the function returned, or `error`; before the first question one
            that says who answers.
    """
    _answer(answers, {"host": socket.gethostname()})
    for line in questions:
        try:
            question = json.loads(line)
            answer = _FUNCTIONS[question.pop("do")](**question)
            result = answer if isinstance(answer, dict) else asdict(answer)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        _answer(answers, result)


def _answer(answers: IO[str], result: dict[str, Any]) -> None:
    answers.write(f"{ANSWER}{json.dumps(result)}\n")
    answers.flush()


def _facts(needs: object, mark: object) -> Facts:
    asked = parse_record(needs, Needs, "the question for facts")
    return collect_facts(asked, parse_record(mark, Mark, "the mark"), thorough=True)


def _mark(path: str) -> Mark:
    return leave_mark(Path(path))


def _unmark(path: str, mark: object) -> dict[str, float]:
    remove_mark(Path(path), parse_record(mark, Mark, "the mark"), keep_folder=False)
    return {}


def _others(path: str, marks: object) -> Seen:
    asked = parse_record(marks, dict[str, Mark], "the marks of the other hosts")
    return Seen(marks_in(expanded(path), asked))


def _take_own(path: str, marks: object) -> dict[str, float]:
    for mark in parse_record(marks, dict[str, Mark], "the marks of all hosts").values():
        remove_mark(expanded(path), mark, keep_folder=False)
    return {}


def _time() -> dict[str, float]:
    return {"time": time.time()}


def _programs(names: list[str]) -> dict[str, str | None]:
    beside = str(Path(sys.executable).parent)
    return {name: shutil.which(name) or shutil.which(name, path=beside) for name in names}


def _listen(token: str) -> Listening:
    """Greet everybody who connects with the token, until this process ends."""
    server = greet(token)
    try:
        told = subprocess.run(
            ["hostname", "-I"], capture_output=True, encoding="utf-8", errors="replace", check=False
        ).stdout.split()
    except OSError:
        told = []
    offered = [(one.name, one.address) for one in interfaces() if one.name != "lo"]
    return Listening(server.getsockname()[1], offered, told[0] if told else None)


def _reach(addresses: list[str], port: int, token: str) -> dict[str, str | None]:
    """Try each address; the token tells that it is the one who listens, and not a namesake here."""
    with ThreadPoolExecutor(max(1, len(addresses))) as pool:
        reasons = pool.map(lambda address: why_unreached(address, port, token), addresses)
        return dict(zip(addresses, reasons, strict=True))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "facts": _facts,
    "mark": _mark,
    "unmark": _unmark,
    "others": _others,
    "take own": _take_own,
    "time": _time,
    "programs": _programs,
    "listen": _listen,
    "reach": _reach,
}


def main() -> None:
    """Answer on what was standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer_questions(sys.stdin, answers)
    sys.stderr.flush()
    os._exit(0)  # threads of libraries that were imported have nothing to finish


if __name__ == "__main__":
    main()

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
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from launcher.preflight.facts import Needs, collect_facts
from launcher.preflight.folder import leave_mark, remove_mark
from launcher.preflight.records import Facts, Listening, Mark
from launcher.world.interfaces import interfaces
from shards.files import parse_record

ANSWER = "sparring-preflight: "
"""In front of each answer."""
_REACH_SECONDS = 3.0


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


def _time() -> dict[str, float]:
    return {"time": time.time()}


def _programs(names: list[str]) -> dict[str, str | None]:
    beside = str(Path(sys.executable).parent)
    return {name: shutil.which(name) or shutil.which(name, path=beside) for name in names}


def _listen(token: str) -> Listening:
    """Listen on all interfaces and give everybody who connects the token, until this process ends."""
    server = socket.create_server(("", 0), backlog=256)

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(token.encode())

    threading.Thread(target=serve, name="listener", daemon=True).start()
    try:
        told = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        told = []
    offered = [(one.name, one.address) for one in interfaces() if one.name != "lo"]
    return Listening(server.getsockname()[1], offered, told[0] if told else None)


def _reach(addresses: list[str], port: int, token: str) -> dict[str, str | None]:
    """Try to connect to each address; the token tells that it is the one who listens, and not a namesake here."""
    reached: dict[str, str | None] = {}

    def connect(address: str) -> None:
        try:
            with socket.create_connection((address, port), timeout=_REACH_SECONDS) as connection:
                connection.settimeout(_REACH_SECONDS)
                answer = connection.recv(len(token)).decode("ascii", "replace")
            reached[address] = None if answer == token else "another process answers there"
        except OSError as error:
            reached[address] = error.strerror or str(error)

    threads = [threading.Thread(target=connect, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reached


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "facts": _facts,
    "mark": _mark,
    "unmark": _unmark,
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

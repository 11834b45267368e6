"""What a finished run names to go on with can be typed as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.__main__ import command_line
from launcher.terminal.next_steps import next_steps


@pytest.mark.parametrize("question", ["who wrote 'it'; $HOME?", "", "word " * 40, "x" * 200])
def test_each_command_is_one_of_ours_with_real_paths(
    question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, typed in ((tmp_path / "runs" / "a b", "runs/a b"), (Path("/elsewhere"), "/elsewhere")):
        lines = [shlex.split(line) for line in next_steps(folder, question).splitlines()]
        *ours, board = lines
        assert board == ["tensorboard", "--logdir", f"{typed}/tensorboard"]
        named = []
        for words in ours:
            words = words[1:] if words[0] == "sparring" else words[3:]
            arguments = command_line(words).parse_args(words)
            named.append(arguments.command)
            places = {"report": "runs", "serve": "path"}
            path = getattr(arguments, places.get(arguments.command, "run"))
            path = path[0] if isinstance(path, list) else path
            assert str(path) in {typed, f"{tmp_path}/{typed}"}
            if arguments.command == "search":
                assert arguments.question
                assert len(arguments.question) <= 60
        assert named == ["search", "report", "serve", "export"]


def test_a_run_without_questions_is_not_searched(tmp_path: Path) -> None:
    assert [line.split()[0] for line in next_steps(tmp_path, None).splitlines()] == ["tensorboard"]

"""The table of commands behind `python -m launcher`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_tells_its_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m launcher {name}")
    assert "[-h]\n\noptions" not in told, f"{name} has no words of its own"


def test_the_list_of_commands_needs_no_library() -> None:
    """To be told the names of the commands took two seconds, in which torch was imported."""
    script = """
import sys
from launcher.__main__ import COMMANDS, main
try:
    main(["--help"])
except SystemExit:
    pass
print("loaded:", {"torch", "numpy", "pydantic", "yaml", "engine", "shards"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: set()\n")
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


def test_a_word_that_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["nothing"])
    assert end.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err

"""What shells complete: commands, options and keys of recipes, out of the parsers themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import COMMANDS
from launcher.commands.completion import script_for


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: script_for(shell) for shell in ("bash", "zsh", "fish")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_knows_commands_options_and_keys(scripts: dict[str, str], shell: str) -> None:
    text = scripts[shell]
    assert all(name in text for name in COMMANDS)
    assert all(key in text for key in ("run.path=", "ar2.ranker.optim.lr=", "r2anker.student.optim.lr="))
    assert "gpus-per-node" in text


def completed(script: Path, *words: str) -> list[str]:
    """Ask bash what it would offer for the last word."""
    told = subprocess.run(
        [
            "bash", "-c",
            'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
            '_sparring sparring "${COMP_WORDS[$COMP_CWORD]}" "" 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"',
            str(script), *words,
        ],
        capture_output=True, text=True, check=True, cwd=script.parent,
    )  # fmt: skip
    return told.stdout.split()


def test_bash_completes(scripts: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(scripts["bash"], encoding="utf-8")
    (tmp_path / "recipe.yaml").touch()
    assert completed(script, "sparring", "tr") == ["train"]
    assert completed(script, "sparring", "train", "--co") == ["--config"]
    assert completed(script, "sparring", "train", "--config", "rec") == ["recipe.yaml"]
    assert completed(script, "sparring", "plan", "--config", "recipe.yaml", "ar2.top") == ["ar2.top_k="]

"""Every command at a terminal of any encoding, with nobody who reads, and with words that are no text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.__main__ import COMMANDS, ONLY_TELL
from tests.distributed.processes import ROOT
from tests.e2e.conftest import Finished
from tests.e2e.starts import TINY, Zygote, deepspeed_command, mpirun_command, on_the_cpu, start

STATUS_OF_A_FINISHED_RUN = 3


@pytest.fixture(scope="module")
def run(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("für #1") / "Lauf 中"
    shutil.copytree(tiny.folder, folder)
    return folder


def words_of(command: str, run: Path, place: Path) -> list[str]:
    """Words with which a command works, and tells something that is not ASCII."""
    data = place / "Daten 中"
    recipe = ["--config", str(TINY), f"run.path={place / 'ü'}"]
    return {
        "convert": ["convert", str(run / "data"), "--out", str(data)],
        "docstrings": ["docstrings", "--out", str(data), "--max-documents", "60"],
        "init": ["init", str(run / "data"), "--model", "random", "--out", str(place / "neu.yaml")],
        "options": ["options", "seed"],
        "plan": ["plan", *recipe, f"data.path={data}", "--documents", "2000", "--queries", "200"],
        "preflight": ["preflight", *recipe, "--no-world"],
        "train": ["train", *recipe, "--print"],
        "submit": ["submit", *recipe, "--nodes", "1", "--gpus-per-node", "1", "--dry-run"],
        "cancel": ["cancel", str(run)],
        "status": ["status", str(run)],
        "supervise": ["supervise", "--max-restarts", "0", "--", "true", "launcher/run.py", *recipe],
        "branch": ["branch", str(run), str(place / "neu"), "--before", "evaluate/2"],
        "sweep": ["sweep", str(TINY.parent / "sweeps" / "tiny.yaml"), "--print", "--out", str(place / "ü")],
        "search": ["search", str(run), "für 中文?", "--top-k", "2"],
        "serve": ["serve", str(place / "Lauf 中")],  # there is no such run: it would not end by itself
        "evaluate": ["evaluate", str(run), "--data", str(run / "data"), "--max-queries", "2"],
        "matrix": ["matrix", str(run), "--depth", "5", "--max-queries", "2", "--no-figure"],
        "analyse": ["analyse", "negatives", str(run), "--depth", "5", "--max-queries", "2", "--no-figure"],
        "compare": ["compare", str(run), "--no-figure"],
        "report": ["report", str(run), "--out", str(place / "ü.html"), "--queries", "2"],
        "export": ["export", str(run), "--out", str(data)],
        "completion": ["completion", "bash"],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_of_ascii(command: str, zygote: Zygote, run: Path, tmp_path: Path) -> None:
    """A document, a path or a question beyond the terminal's encoding ended in a UnicodeEncodeError."""
    ended = zygote.launcher(*words_of(command, run, tmp_path), encoding="ascii")
    assert "Traceback" not in ended.err
    own = {"status": {STATUS_OF_A_FINISHED_RUN}, "supervise": {1}, "preflight": {0, 2}, "serve": {2}}
    assert ended.code in own.get(command, {0})
    assert ended.out.isascii()
    if command in {"search", "submit", "train", "status", "cancel", "docstrings"}:
        assert "\\xfc" in ended.out or "\\u4e2d" in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_reads(command: str, zygote: Zygote, run: Path, tmp_path: Path) -> None:
    """`| head -1` ended every command in a BrokenPipeError, whatever it was about to do."""
    ended = zygote.launcher(*words_of(command, run, tmp_path), unread=True)
    assert ended.code == (141 if command in ONLY_TELL else {"supervise": 1, "serve": 2}.get(command, 0))
    if command in {"convert", "docstrings", "export"}:
        assert list((tmp_path / "Daten 中").iterdir()), "what it does is done"


@pytest.mark.parametrize("words", [("--help",), ("search", "--help"), ()])
def test_nobody_reads_the_help(zygote: Zygote, words: tuple[str, ...]) -> None:
    assert zygote.launcher(*words, unread=True).code == (141 if words else 2)


def test_a_question_that_is_no_text(zygote: Zygote, run: Path) -> None:
    """A question in Latin-1 ended in a traceback out of the tokenizer, on the command line and in the input."""
    ended = zygote.launcher("search", str(run), "f\udcfcr wen", "--top-k", "1")
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    assert "the question is no UTF-8" in ended.err
    assert "f\ufffdr wen" in ended.out
    ended = zygote.launcher("search", str(run), "--top-k", "1", stdin="f\udcfcr\nfür\n")
    assert ended.code == 0, ended.err
    assert ended.err.count("the question is no UTF-8") == 1
    assert "\nf\ufffdr\n" in ended.out
    assert "\nfür\n" in ended.out
    ended = zygote.launcher("search", str(run), "--top-k", "1", stdin="für\n", encoding="ascii")
    assert (ended.code, "no UTF-8" in ended.err) == (0, False), "the terminal is ASCII, what it sends is UTF-8"
    assert "\nf\\xfcr\n" in ended.out


def test_a_run_in_a_locale_of_ascii(run: Path) -> None:
    """`LC_ALL=C PYTHONUTF8=0` made errors of paths beyond ASCII, and torch could not be imported whole."""
    env = {**on_the_cpu(), "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "status", str(run)], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert done.returncode == STATUS_OF_A_FINISHED_RUN, done.stderr
    assert b"Lauf \\u4e2d" in done.stdout


HOSTILE = ('it\'s "#2" $HOME `x`; {a,b} *', " blanks  and\ttab ", "#x", "a\nb", "\\", "~", "für 中", "--x", "=")


def test_words_come_through_starters_as_they_are(tmp_path: Path) -> None:
    """What starts ranks on one host hands the words over without a shell; the recipe then tells what it was given."""
    words = [f"data.format={word}" for word in HOSTILE]
    ended = start([*deepspeed_command(1), "--config", str(TINY), *words, "run.device=cpu"])
    assert ended.code == 2, ended.err
    assert f"data.format: expected 'auto', 'beir', 'dpr' or 'msmarco', got {HOSTILE[-1]!r}" in ended.err
    script = tmp_path / "told.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    assert json.loads(start([*mpirun_command(1)[:-1], str(script), *words]).out) == words


def test_a_submitted_recipe_keeps_the_words(zygote: Zygote, tmp_path: Path) -> None:
    """The batch script names the recipe's file, and quotes its path for the shell."""
    place = tmp_path / 'it\'s "#2" $HOME `x`; {a,b} *'
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 7\n")
    sbatch.chmod(0o755)
    words = [f"run.path={place}", "data.template=a  'b' \"{text}\" #", "run.device=cpu"]
    env = {**on_the_cpu(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    options = ["--nodes", "1", "--gpus-per-node", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "submit", "--config", str(TINY), *options, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from engine.config.file import load_config

    assert load_config(place / "slurm" / "recipe.yaml") == load_config(TINY, words)
    line = next(line for line in (place / "slurm" / "job.sbatch").read_text().splitlines() if line.startswith("run="))
    told = subprocess.run(["bash", "-c", f'{line}; printf %s "$run"'], capture_output=True, text=True, check=True)
    assert told.stdout == str(place)

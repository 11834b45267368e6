"""The commands and the Python that the documentation shows: would each be taken, and do the cheap ones work?"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest

from engine.config.recipe import Config
from launcher.__main__ import COMMANDS, main
from shards.formats import open_dataset
from sparring import Recipe
from tests.distributed.processes import ROOT
from tests.e2e.conftest import Finished
from tests.e2e.documented import NOT_OURS, check, check_yaml, compiles, keys_named, known_keys, make_targets, placed
from tests.e2e.starts import Started, Zygote
from tests.site.blocks import SHELLS, Block, Command, blocks_of, commands_of

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS_SHOWN = [command for block in BLOCKS for command in commands_of(block)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
RECIPES = [block for block in BLOCKS if block.language == "yaml"]
STATUS_OF_A_FINISHED_RUN = 3
NO_KEYS = {
    ("architecture.md", "shards.files.read_record"),  # a function
    ("coming_from.md", "encoder.sequence_length"),  # DPR's
    ("pretraining.md", "encoder.layer"),  # of a checkpoint
    ("python.md", "recipe.run.seed"),  # an attribute
}
"""What looks like keys and is none."""
_SPAN = re.compile(r"`((?:sparring|python -m launcher) [^`\n]+)`")


@pytest.fixture(scope="module")
def place(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which commands can be typed as they stand: their runs are one that has ended, their data its data."""
    folder = tmp_path_factory.mktemp("documented")
    run = folder / "run"
    shutil.copytree(tiny.folder, run)
    words = [command.words for command in COMMANDS_SHOWN] + [tuple(block.lines) for block in PYTHON]
    placed(words, folder, run, run / "data", ROOT / "configs" / "tiny.yaml")
    # It is as if the run had been made of the data that the examples name.
    recipe = Recipe.load("tiny", data={"path": folder / "data/mine"}, run={"path": folder / "runs/mine"})
    recipe.save(run / "config.yaml")
    return folder


def of_page(name: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == name]


@pytest.mark.parametrize("page", sorted({command.place.split(":")[0] for command in COMMANDS_SHOWN}))
def test_each_command_would_be_taken(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options by the program's own parser, its recipe and `key=value` words by the loader of recipes."""
    monkeypatch.chdir(place)
    wrong = []
    for command in COMMANDS_SHOWN:
        if command.place.split(":")[0] == page:
            try:
                check(command.words)
            except (Exception, SystemExit) as error:
                wrong.append(f"{command.place}: {' '.join(command.words)}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_there_are_commands_and_no_idle_exceptions() -> None:
    shown = {command.words[0] for command in COMMANDS_SHOWN}
    assert {"sparring", "python", "deepspeed", "mpirun", "make"} <= shown
    ours = {
        words[words.index("launcher") + 1] for words in (list(c.words) for c in COMMANDS_SHOWN) if "launcher" in words
    }
    ours |= {command.words[1] for command in COMMANDS_SHOWN if command.words[0] == "sparring"}
    assert COMMANDS.keys() - ours == set(), "commands that no page shows"
    assert set(NOT_OURS) - shown == set(), "exceptions that nothing needs"


def extra_words(command: Command) -> list[str] | None:
    """Return what makes a command cheap and harmless, and still does its work; None for one that is not run here."""
    if any("wandb" in word for word in command.words):  # see NOT_INSTALLED
        return None
    name = command.words[1] if command.words[0] == "sparring" else command.words[3]
    always = {"options": [], "status": [], "train": ["--print"], "submit": ["--dry-run"], "search": ["--top-k", "1"]}
    if name == "plan":
        return [] if "--retriever-shape" in command.words else None
    if name == "sweep":
        return None if "--slurm" in command.words else ["--print"]
    return always.get(name)


CHEAP = {
    tuple(words): command.place
    for command in COMMANDS_SHOWN
    if command.words[0] == "sparring" or command.words[:3] == ("python", "-m", "launcher")
    if (more := extra_words(command)) is not None
    for words in [[*command.words[3 if command.words[0] == "python" else 1 :], *more]]
}
"""Words of commands that are really run -> where they stand."""


def test_cheap_commands_do_what_they_are_shown_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert {words[0] for words in CHEAP} == {"options", "status", "train", "submit", "search", "plan", "sweep"}
    searched: set[str] = set()
    for words, where in CHEAP.items():
        if words[0] == "search":
            if searched:
                continue
            searched.add(where)
        if words[0] == "status" and "sweep" in words[1]:
            continue  # a job array's
        code = main(list(words))
        told = capsys.readouterr()
        assert code == (STATUS_OF_A_FINISHED_RUN if words[0] == "status" else 0), f"{where}: {words}\n{told.err}"
        assert told.out.strip(), where


def test_options_that_are_named_in_sentences_exist() -> None:
    """`sparring COMMAND --option` outside of blocks."""
    spans = {(page.name, span) for page in PAGES for span in _SPAN.findall(page.read_text(encoding="utf-8"))}
    from tests.unit.launcher.test_commands import parser_of

    wrong = []
    for page, span in sorted(spans):
        words = span.removeprefix("sparring ").removeprefix("python -m launcher ").split()
        if words[0] in COMMANDS:
            known = parser_of(words[0])._option_string_actions
            own = words[: words.index("--")] if "--" in words else words
            wrong += [f"{page}: {span}" for word in own if word.startswith("--") and word not in known]
        elif not words[0].isupper() and not words[0].startswith("-"):
            wrong.append(f"{page}: {span}")
    assert len(spans) > 20
    assert wrong == []


def test_keys_that_are_named_in_sentences_exist() -> None:
    """`ranker.optim.lr`, which no recipe has, stood as the example of a number."""
    named = {(page.name, key) for page in PAGES for key in keys_named(page.read_text(encoding="utf-8"))}
    assert len(named) > 200
    strange = {(page, key) for page, key in named if key not in known_keys() and not key.endswith((".py", ".yaml"))}
    assert strange == NO_KEYS
    assert keys_named("`run.seed=7`, `ranker.optim.lr` and `x.y`") - known_keys() == {"ranker.optim.lr"}


def test_targets_of_make_that_are_named_exist() -> None:
    named = {
        (page.name, target)
        for page in [*PAGES, ROOT / ".ci" / "run"]
        for target in re.findall(
            r"\bmake ([a-z][\w-]*)(?=[`\s;]|$)", re.sub(r"(?<!`)make (?!\w+`)", "", page.read_text())
        )
    }
    assert len(named) > 3
    assert {(page, target) for page, target in named if target not in make_targets()} == set()


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: f"{block.page}:{block.line}")
def test_pieces_of_recipes_are_valid(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    check_yaml("\n".join(block.lines), place)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_compiles_and_imports_what_exists(block: Block) -> None:
    compiles("\n".join(block.lines), block.page)


def test_the_examples_of_python_run(zygote: Zygote, place: Path) -> None:
    """All blocks of docs/python.md, one after the other, over a run that is finished."""
    code = "\n".join("\n".join(block.lines) for block in of_page("python.md") if block.language == "python")
    script = place / "examples_of_python.py"
    script.write_text(f"import os\nos.chdir({str(place)!r})\n{code}\n")
    ended = Started([zygote.begin(str(script), module="")]).wait()
    assert ended.code == 0, ended.out[-1000:] + ended.err[-3000:]
    assert "MRR@10" in ended.out


def test_the_own_data_of_the_page_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The help desk of docs/own_data.md: its data are written, a recipe is drafted of them, and a run would start."""
    monkeypatch.chdir(tmp_path)
    blocks = of_page("own_data.md")
    (code,) = ["\n".join(block.lines) for block in blocks if block.language == "python"]
    exec(compile(code, "own_data.md", "exec"), {})
    shown = [command.words for block in blocks if block.language in SHELLS for command in commands_of(block)]
    (drafted,) = [words for words in shown if words[:2] == ("sparring", "init")]
    assert main(list(drafted[1:])) == 0
    recipe = Recipe.load("recipe.yaml")
    assert isinstance(recipe.config, Config)
    assert recipe.data.path == tmp_path / "data/desk"
    started = [words for words in shown if words[:2] == ("sparring", "train")]
    assert len(started) == 2
    for words in started:
        assert main([*words[1:], "--print"]) == 0


def test_the_pairs_of_the_page_become_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of two questions is one document, and neither is a negative of the other."""
    monkeypatch.chdir(tmp_path)
    (code,) = ["\n".join(block.lines) for block in of_page("coming_from.md") if block.language == "python"]
    exec(compile(code, "coming_from.md", "exec"), {})
    data = open_dataset(tmp_path / "data" / "pairs")
    answers = [docids for judged in data.qrels.values() for docids in judged.values()]
    assert (data.num_documents, len(answers), len({docid for docids in answers for docid in docids})) == (2, 3, 2)


def test_wrong_commands_are_seen(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    page = tmp_path / "page.md"
    page.write_text(
        textwrap.dedent("""\
        ```bash
        sparring train --config configs/tiny.yaml ar2.steps=3   # no such key
        X=1 sparring search RUN "a # question" --depth 3 | head
        deepspeed launcher/run.py --configs configs/tiny.yaml && make nothing
        mpirun -n 2 python launcher/run.py --config configs/tiny.yaml \\
            data.path=DIR run.seed=x
        python benchmarks/nothing.py
        unknown program > file
        ```
        ```
        $ sparring evaluate RUN --data DIR --set evaluation.metrics=[no]
        its output
        ```
        """)
    )
    commands = [command for block in blocks_of(page) for command in commands_of(block)]
    assert [command.place for command in commands] == [f"page.md:{line}" for line in (2, 3, 3, 4, 4, 5, 7, 8, 11)]
    assert commands[1].words == ("sparring", "search", "RUN", "a # question", "--depth", "3")
    assert commands[7].words == ("unknown", "program")
    for command in commands:
        if command.words != ("head",):
            with pytest.raises((Exception, SystemExit)):
                check(command.words)
    with pytest.raises(ImportError):
        compiles("from sparring import nothing", "x")
    with pytest.raises(SyntaxError):
        compiles("import", "x")

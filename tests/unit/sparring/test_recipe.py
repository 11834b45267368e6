"""Recipes as objects, and that the package is imported in a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparring
from engine.config.file import load_config
from tests.architecture.modules import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def test_the_package_needs_no_library() -> None:
    """All that is public is listed; nothing is imported before it is asked for."""
    script = (
        "import sys, sparring; sparring.__version__, dir(sparring); "
        "print(sorted({'torch', 'numpy', 'pydantic', 'engine', 'launcher', 'shards'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told == "[]\n"
    assert set(sparring._WHERE) | {"__version__"} == set(sparring.__all__)
    assert sparring.Recipe.__module__ == "sparring.recipe"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparring.nothing


def test_what_is_given_in_python_is_what_a_command_line_says(tmp_path: Path) -> None:
    recipe = sparring.Recipe.load(
        "tiny",
        run={"path": tmp_path / "a  b", "seed": 7, "preflight": False},
        ar2={"retriever": {"steps": 3, "optim": {"lr": 1e-5}}},
        evaluation={"metrics": ["R@1", "MRR@10"]},
        ranker={"num_layers": None},
    )
    words = [f"run.path={tmp_path / 'a  b'}", "run.seed=7", "run.preflight=false", "ar2.retriever.steps=3"]
    words += ["ar2.retriever.optim.lr=1e-5", "evaluation.metrics=[R@1, MRR@10]", "ranker.num_layers="]
    assert recipe.config == load_config(TINY, words)
    assert (recipe.run.seed, recipe.ar2.retriever.steps) == (7, 3)
    assert recipe.changed(run={"seed": 8}).changed(run={"seed": 7}) == recipe
    assert recipe.changed(run={"seed": 8}) != recipe
    assert sparring.Recipe.load(recipe.save(tmp_path / "recipe.yaml")) == recipe
    (tmp_path / "run").mkdir()
    recipe.save(tmp_path / "run" / "config.yaml")
    assert sparring.Recipe.load(tmp_path / "run") == recipe
    assert hash(sparring.Recipe.load(TINY)) == hash(sparring.Recipe.load("configs/tiny.yaml"))
    assert "ar2" in repr(recipe)


def test_a_recipe_never_changes() -> None:
    """`recipe.run = ...` hid the section behind another value, and the training was that of before."""
    recipe = sparring.Recipe.load("tiny")
    with pytest.raises(sparring.ConfigError, match=r"recipe\.changed\(run="):
        recipe.run = {"seed": 7}
    with pytest.raises(sparring.ConfigError, match=r"recipe\.changed\(SECTION={'seed': 7}\)"):
        recipe.run.seed = 7
    assert recipe.run.seed == 42


def test_numbers_of_numpy_are_numbers() -> None:
    recipe = sparring.Recipe.load("tiny", run={"seed": np.int64(7)}, ranker={"dropout": np.float32(0.5)})
    assert (recipe.run.seed, recipe.ranker.dropout) == (7, 0.5)
    betas = recipe.changed(ar2={"ranker": {"optim": {"betas": [np.float64(0.5), 0.75]}}}).ar2.ranker.optim.betas
    assert betas == (0.5, 0.75)


def test_a_section_is_left_out() -> None:
    recipe = sparring.Recipe.load("r2anker_tiny", lexical=None, student=None)
    assert (recipe.lexical, recipe.student) == (None, None)
    assert set(dir(recipe)) > {"r2anker", "ranker", "load", "save"}
    with pytest.raises(AttributeError, match="the recipe r2anker has no section 'ar2'"):
        _ = recipe.ar2


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("nothing", {}, "there is no configuration file nothing"),
        ("tiny", {"run": {"pth": 1}}, "did you mean 'run.path'"),
        ("tiny", {"runs": {"path": "x"}}, "unknown key 'runs'"),
        ("tiny", {"run": {"seed": "x"}}, "run.seed: "),
        ("tiny", {"run": {"seed": True}}, "run.seed: "),
        ("tiny", {"run": {"seed": object()}}, "run.seed is given a object"),
        ("tiny", {"run": {"seed": b"7"}}, "run.seed is given a bytes"),
        ("tiny", {"ar2": {"retriever": {"steps": -1}}}, "ar2.retriever.steps: "),
        ("tiny", {"ar2": {"retriever": {"steps": float("nan")}}}, "ar2.retriever.steps: "),
    ],
)
def test_a_wrong_recipe_is_refused(source: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sparring.ConfigError, match=message.replace(".", r"\.")):
        sparring.Recipe.load(source, **changes)


def test_what_is_no_recipe_is_not_trained() -> None:
    with pytest.raises(sparring.ConfigError, match="what Recipe"):
        sparring.train("tiny")  # type: ignore[arg-type]
    with pytest.raises(sparring.ConfigError, match="callbacks are"):
        sparring.train(sparring.Recipe.load("tiny"), callbacks=print)  # type: ignore[arg-type]
    with pytest.raises(sparring.DataError, match="there is no format 'tsv'"):
        sparring.load_data(ROOT / "configs", "tsv")  # type: ignore[arg-type]
    with pytest.raises(sparring.DataError, match="there is no folder"):
        sparring.load_data("/nonexistent")
    with pytest.raises(sparring.ConfigError, match="is no path"):
        sparring.load_data(None)  # type: ignore[arg-type]

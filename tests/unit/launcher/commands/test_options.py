"""The reference of all options: whole, right, found by words, and on the page as it is now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from engine.config.recipe import Config
from engine.config.recipes import RECIPES
from engine.config.reference import Option, options_of
from engine.config.sections import Section
from launcher.__main__ import main
from launcher.commands.options import page
from tests.test_architecture import fields_of

ROOT = Path(__file__).parents[4]


class Margin(Section):
    """Takes out near ones."""

    name: Literal["margin"]
    """The kind."""
    share: float = Field(0.5, gt=0, le=1)
    """A share."""


class Uniform(Section):
    """Takes all."""

    name: Literal["uniform"] = "uniform"
    """The kind."""


class Inner(Section):
    """Some numbers."""

    lr: float = Field(1e-5, gt=0)
    """Rate."""
    steps: int | None = Field(None, ge=1)
    """Steps
    in a row."""


class Recipe(Section):
    """All of it."""

    path: Path
    """Where."""
    one: Inner = Inner()
    """One."""
    two: Inner = Inner(lr=0.5)
    """Two."""
    mode: Literal["auto"] | bool = "auto"
    """Mode."""
    names: tuple[str, ...] = ("a", "b")
    """Names."""
    choice: Uniform | Margin = Uniform()
    """Choice."""


def told(option: Option) -> tuple[str, str, dict[str, str]]:
    return option.takes, option.text, {use.key: use.default for use in option.uses}


def test_each_field_says_what_it_takes() -> None:
    recipes: dict[str, type[Config]] = {"r": Recipe}  # type: ignore[dict-item]
    found = {option.name: told(option) for option in options_of(recipes)}
    assert found == {
        "path": ("path", "Where.", {"path": "must be given"}),
        "..lr": ("number above 0", "Rate.", {"one.lr": "1e-05", "two.lr": "0.5"}),
        "..steps": (
            "whole number of 1 or more", "Steps in a row.", {"one.steps": "left out", "two.steps": "left out"},
        ),
        "mode": ("`auto` or true or false", "Mode.", {"mode": "auto"}),
        "names": ("list, each text", "Names.", {"names": "[a, b]"}),
        "choice": ("section of the kind uniform or margin", "Choice.", {"choice": "{name: uniform}"}),
        "choice[uniform].name": ("`uniform`", "Takes all.", {"choice[uniform].name": "must be given"}),
        "choice[margin].name": ("`margin`", "Takes out near ones.", {"choice[margin].name": "must be given"}),
        "choice[margin].share": ("number above 0, up to 1", "A share.", {"choice[margin].share": "0.5"}),
    }  # fmt: skip


def test_no_option_is_missing_or_without_words() -> None:
    options = options_of(RECIPES)
    for name, recipe in RECIPES.items():
        keys = {re.sub(r"\[\w+\]", "", use.key) for one in options for use in one.uses if name in use.recipes}
        fields = {key for key, _ in fields_of(recipe)}
        sections = {key for key in fields if any(other.startswith(f"{key}.") for other in fields)}
        assert fields - sections <= keys
    without = [option.name for option in options if not option.text or "value" in option.takes.split()]
    assert not without, "a docstring under each field, and words for its type"
    assert len({use.key for option in options for use in option.uses}) > 400


def test_what_all_recipes_have_stands_there_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    out = capsys.readouterr().out
    assert out.count("run.seed\n") == 1
    assert "\x1b" not in out, "plain where it is no terminal"
    assert all(len(line) <= 100 for line in out.splitlines())


def test_search_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "LEARNING", "peak", "--recipe", "ar2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("..optim.lr\n    number above 0\n    Peak learning rate.\n")
    assert "default 1e-06: ar2.ranker.optim.lr" in out
    assert "r2anker" not in out
    assert main(["options", "top_q"]) == 2
    assert "near are ar2.top_k" in capsys.readouterr().err
    assert main(["options", "--recipe", "nothing"]) == 2
    assert "one of ar2, r2anker" in capsys.readouterr().err


def test_the_page_is_what_is_generated_now() -> None:
    generated = page(options_of(RECIPES), list(RECIPES))
    committed = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert committed == generated, "run `python -m launcher options --markdown docs/options.md`"

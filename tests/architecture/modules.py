"""The project's source files as syntax trees, which the rules look at."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("sparring", "launcher", "engine", "shards")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, its text and its syntax tree."""

    name: str
    text: str = field(repr=False)
    is_package: bool = False

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def at(self, line: int) -> str:
        return f"{self.name}:{line}"


Rule = Callable[[list[Module]], list[str]]
"""From modules to offences, so that a rule can be shown code that breaks it."""


def modules_of_the_project() -> list[Module]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return found


def words_of(node: ast.AST) -> list[str]:
    """The identifiers and the string literal that a syntax node itself holds."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [value for _, value in ast.iter_fields(node) if isinstance(value, str)]


def docstrings_of(module: Module) -> set[ast.AST]:
    """The texts that stand alone: docstrings, also those under fields."""
    return {
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }

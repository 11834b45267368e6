"""How large things get, what they are called, and what must be described."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.modules import Function, Module

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ENTRIES = {"engine": 23, "launcher": 10, "shards": 14}
"""Files and folders that a reader meets at first; more of them want a folder of their own."""
MAX_UNTYPED_RECORDS = 22
"""Functions that return a `dict[str, Any]`; only ever lowered."""
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def files_too_long(modules: list[Module]) -> list[str]:
    return [
        f"{module.name} has {lines} lines, more than {MAX_FILE_LINES}: split it by noun"
        for module in modules
        if (lines := len(module.text.splitlines())) > MAX_FILE_LINES
    ]


def docstring_node(node: Function) -> ast.stmt | None:
    first = node.body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text else None


def functions_too_long(modules: list[Module]) -> list[str]:
    offences = []
    for module in modules:
        for node in ast.walk(module.tree):
            if not isinstance(node, Function):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if docstring := docstring_node(node):
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                offences.append(
                    f"{module.at(node.lineno)} {node.name} has {lines} lines without its docstring, more than "
                    f"{MAX_FUNCTION_LINES}: name its parts"
                )
    return offences


def described_nodes(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions, classes and methods; what is inside a function is its own affair."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            if not any("overload" in ast.unparse(decorator) for decorator in child.decorator_list):
                yield child
            if isinstance(child, ast.ClassDef):
                yield from described_nodes(child)


def missing_docstrings(modules: list[Module]) -> list[str]:
    offences = []
    for module in modules:
        if not ast.get_docstring(module.tree):
            offences.append(f"{module.name} does not say what it is: it needs a module docstring")
        offences += [
            f"{module.at(node.lineno)} {node.name} is public and has no docstring"
            for node in described_nodes(module.tree)
            if not ast.get_docstring(node)
        ]
    return offences


def vague_module_names(modules: list[Module]) -> list[str]:
    return [
        f"{module.name} says nothing about what is inside: name the noun"
        for module in modules
        if VAGUE_NAMES & set(module.name.split("."))
    ]


def too_many_entries(modules: list[Module]) -> list[str]:
    offences = []
    for package, limit in MAX_ENTRIES.items():
        below = {module.name.split(".")[1] for module in modules if module.name.startswith(f"{package}.")}
        if len(below) > limit:
            offences.append(f"{package} has {len(below)} entries, more than {limit}: give one of its nouns a folder")
    return offences


def too_many_untyped_records(modules: list[Module]) -> list[str]:
    found = [
        module.at(node.lineno)
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and node.returns and ast.unparse(node.returns).startswith("dict[str, Any]")
    ]
    if len(found) <= MAX_UNTYPED_RECORDS:
        return []
    return [
        f"{len(found)} functions return a dict[str, Any], more than {MAX_UNTYPED_RECORDS}: return a dataclass "
        f"({', '.join(found)})"
    ]

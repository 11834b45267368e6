"""What may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.modules import Module

MAY_IMPORT = {
    "sparring": {"sparring", "launcher", "engine", "shards"},
    "launcher": {"launcher", "engine", "shards"},
    "engine": {"engine", "shards"},
    "shards": {"shards"},
}


def imported_modules(module: Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """Every import, also those inside functions, as (line, the most specific module that it names)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.name.split(".")
                keep = len(parents) - node.level + module.is_package
                base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node.lineno, submodule if submodule in known else base


def imports_against_the_direction(modules: list[Module]) -> list[str]:
    known = {module.name for module in modules}
    return [
        f"{module.at(line)} imports {target}: {module.package} may import {sorted(MAY_IMPORT[module.package])} only"
        for module in modules
        for line, target in imported_modules(module, known)
        if (root := target.split(".")[0]) in {*MAY_IMPORT, "tests"} and root not in MAY_IMPORT[module.package]
    ]


def import_cycles(modules: list[Module]) -> list[str]:
    known = {module.name for module in modules}
    graph = {
        module.name: {target for _, target in imported_modules(module, known) if target in known} for module in modules
    }
    finished: set[str] = set()
    cycles: list[str] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            cycles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in finished:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return cycles


def siblings_of(module: str, target: str) -> tuple[str, str]:
    """Where two modules part: what lies below the innermost package that holds both, on the way to each.

    That is a package or a loose module: of `engine.log` and `engine.reliability.run_lock` it is `engine.log` and
    `engine.reliability`. A package and what lies in it are not beside each other; one of the two comes out as it is.
    """
    own, others = module.split("."), target.split(".")
    shared = 0
    while shared < min(len(own), len(others)) and own[shared] == others[shared]:
        shared += 1
    return ".".join(own[: shared + 1]), ".".join(others[: shared + 1])


def mutual_imports(modules: list[Module]) -> list[str]:
    """Packages side by side that import each other, and packages and loose modules beside them that do.

    Imports for types alone count: who reads one of the two must read both. Loose modules among themselves are left to
    `import_cycles`.
    """
    return list(mutual_pairs(modules).values())


def mutual_pairs(modules: list[Module]) -> dict[tuple[str, str], str]:
    """The offences of `mutual_imports` by the pair of names."""
    known = {module.name for module in modules}
    packages = {name.rpartition(".")[0] for name in known}
    first_line: dict[tuple[str, str], str] = {}
    for module in modules:
        for line, target in imported_modules(module, known):
            own, other = siblings_of(module.name, target)
            apart = not f"{own}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{own}.")
            if target in known and apart and packages & {own, other}:
                first_line.setdefault((own, other), f"{module.at(line)} imports {target}")
    return {
        (own, other): f"{own} and {other} import each other: {line}; {first_line[other, own]}"
        for (own, other), line in first_line.items()
        if own < other and (other, own) in first_line
    }

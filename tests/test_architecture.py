"""The rules of the house that a machine can check: what may import what, how long things get, what must be described.

Each rule is a function from parsed modules to a list of offences, so that `test_each_rule_sees_an_offence` can show
it code that breaks it: a rule that finds nothing anywhere would be no rule.
"""

from __future__ import annotations

import ast
import json
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from pydantic import BaseModel

from engine.config.recipe import Config

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"launcher": {"launcher", "engine", "shards"}, "engine": {"engine", "shards"}, "shards": {"shards"}}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
DATA_SET_WORD = re.compile(r"nq|trivia(qa)?|(ms)?marco|wiki\w*")

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


def modules_of_the_project() -> list[Module]:
    found = []
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return found


# --- imports ---------------------------------------------------------------------------------------------------------


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


def packages_that_import_each_other(modules: list[Module]) -> list[str]:
    """Pairs of packages below the top level, such as `engine.data` and `engine.models`; a cycle of modules or not."""
    known = {module.name for module in modules}
    packages = {module.name for module in modules if module.is_package and module.name.count(".") == 1}
    seen: dict[tuple[str, str], str] = {}
    for module in modules:
        for line, target in imported_modules(module, known):
            here, there = (".".join(name.split(".")[:2]) for name in (module.name, target))
            if here != there and {here, there} <= packages:
                seen.setdefault((here, there), module.at(line))
    return [
        f"{place} imports {there}, and {seen[there, here]} imports {here}: let one of both know the other"
        for (here, there), place in sorted(seen.items())
        if here < there and (there, here) in seen
    ]


# --- size and description --------------------------------------------------------------------------------------------


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


# --- what the engine does not know or do -----------------------------------------------------------------------------


def prints(modules: list[Module]) -> list[str]:
    return [
        f"{module.at(node.lineno)} prints: log it, or return it to the launcher"
        for module in modules
        if module.package in {"engine", "shards"}
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def words_of(node: ast.AST) -> list[str]:
    """The identifiers and the string literal that a syntax node itself holds."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [value for _, value in ast.iter_fields(node) if isinstance(value, str)]


def data_set_names(modules: list[Module]) -> list[str]:
    offences = []
    for module in modules:
        if module.package != "engine":
            continue
        exempt: set[ast.AST] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                exempt.add(node.value)  # docstrings, also those under fields, may cite the papers' tables
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "format":
                exempt.update(ast.walk(node.annotation))  # the layouts of files that shards.formats reads
        for node in ast.walk(module.tree):
            if node in exempt:
                continue
            for text in words_of(node):
                snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
                if any(DATA_SET_WORD.fullmatch(word) for word in re.split(r"[^a-z0-9]+", snake)):
                    line = getattr(node, "lineno", 0)
                    offences.append(f"{module.at(line)} {text!r} names a data set: the engine knows none")
    return offences


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        imports_against_the_direction,
        import_cycles,
        packages_that_import_each_other,
        files_too_long,
        functions_too_long,
        missing_docstrings,
        vague_module_names,
        prints,
        data_set_names,
    )
}


@pytest.fixture(scope="module")
def project() -> list[Module]:
    modules = modules_of_the_project()
    assert {module.package for module in modules} == set(MAY_IMPORT), (
        "a package is missing: the rules would see nothing"
    )
    return modules


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps(rule: str, project: list[Module]) -> None:
    offences = RULES[rule](project)
    assert not offences, "\n" + "\n".join(offences)


# The bad code that each rule is shown, and a part of what it must say. Code that is alike but right stands in
# `test_no_rule_sees_an_offence_where_none_is`.
OFFENCES = [
    (imports_against_the_direction, {"shards.a": "from engine import b"}, "shards.a:1 imports engine"),
    (
        imports_against_the_direction,
        {"engine.a": "def f():\n    import launcher.run"},
        "engine.a:2 imports launcher.run",
    ),
    (imports_against_the_direction, {"launcher.a": "import tests.processes"}, "launcher.a:1 imports tests"),
    (import_cycles, {"engine.a": "import engine.b", "engine.b": "from engine import a"}, "a -> engine.b -> engine.a"),
    (import_cycles, {"engine.a": "from . import b", "engine.b": "from .a import x"}, "a -> engine.b -> engine.a"),
    (import_cycles, {"engine.a": "from engine.a import x"}, "engine.a -> engine.a"),
    (files_too_long, {"engine.a": "x = 1\n" * (MAX_FILE_LINES + 1)}, f"has {MAX_FILE_LINES + 1} lines"),
    (functions_too_long, {"engine.a": "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES}, "engine.a:1 f has 61 lines"),
    (missing_docstrings, {"engine.a": "x = 1"}, "engine.a does not say"),
    (missing_docstrings, {"engine.a": "'''A.'''\ndef f(): ..."}, "engine.a:2 f is public"),
    (
        missing_docstrings,
        {"engine.a": "'''A.'''\nclass C:\n    '''C.'''\n    async def f(self): ..."},
        "engine.a:4 f is",
    ),
    (vague_module_names, {"engine.utils": ""}, "engine.utils says nothing"),
    (prints, {"shards.a": "def f():\n    print(1)"}, "shards.a:2 prints"),
    (data_set_names, {"engine.a": "def f(name):\n    return name == 'nq'"}, "engine.a:2 'nq' names"),
    (data_set_names, {"engine.a": "load_ms_marco()"}, "engine.a:1 'load_ms_marco' names"),
    (data_set_names, {"engine.a": "x = f'data/wiki_{y}.tsv'"}, "'data/wiki_' names"),
    (data_set_names, {"engine.a": "class TriviaQA: ..."}, "'TriviaQA' names"),
    (data_set_names, {"engine.a": "f(is_triviaqa=True)"}, "'is_triviaqa' names"),
]


def test_packages_that_import_each_other_are_seen_without_a_cycle_of_modules() -> None:
    sources = {
        "engine.a.x": "from engine.b import y",
        "engine.b.z": "import engine.a.w",
        "engine.b.y": "",
        "engine.c.v": "",
    }
    modules = [Module(name, text) for name, text in sources.items()]
    modules += [Module(f"engine.{name}", "", is_package=True) for name in "abc"]
    (offence,) = packages_that_import_each_other(modules)
    assert "engine.a.x:1 imports engine.b, and engine.b.z:1 imports engine.a" in offence
    assert import_cycles(modules) == []


@pytest.mark.parametrize(("rule", "sources", "message"), OFFENCES)
def test_each_rule_sees_an_offence(rule: Rule, sources: dict[str, str], message: str) -> None:
    (offence,) = rule([Module(name, text) for name, text in sources.items()])
    assert message in offence


def test_no_rule_sees_an_offence_where_none_is() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    long_docstring = "    '''F.\n" + "    and more\n" * 20 + "    '''\n"
    modules = [
        Module("shards", "'''S.'''", is_package=True),
        Module("shards.a", "'''A.'''\nimport json\nfrom . import b"),
        Module("shards.b", "'''B, as in nq.'''\nx = 'nq'"),
        Module("engine.a", f"'''A, for nq.'''\nfrom shards.b import x\ndef f():\n{long_docstring}{body}"),
        Module("engine.b", "'''B.'''\nfrom engine import a\nfrom shards import a as c\ndef _g(trivial, unq): ..."),
        Module(
            "engine.c",
            "'''C.'''\nclass K:\n    '''K.'''\n    format: L['msmarco'] = 'auto'\n    def __len__(self): ...",
        ),
        Module("launcher.a", "'''A.'''\nimport engine.b\nprint(1)"),
    ]
    assert [offence for rule in RULES.values() for offence in rule(modules)] == []


# --- configuration ---------------------------------------------------------------------------------------------------


def sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The models in a field's annotation, also inside unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_in(argument)


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field below a section as (dotted key, field name)."""
    for name, info in section.model_fields.items():
        yield prefix + name, name
        for inner in sections_in(info.annotation):
            yield from fields_of(inner, f"{prefix}{name}.")


def attributes_read(modules: list[Module]) -> set[str]:
    """Names of all attributes read; those of `self` are no configuration's."""
    return {
        node.attr
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def unread_keys(section: type[BaseModel], modules: list[Module]) -> list[str]:
    read = attributes_read(modules)
    return [key for key, name in fields_of(section) if name not in read]


def test_every_configuration_field_is_read(project: list[Module]) -> None:
    readers = [module for module in project if module.package != "shards" and module.name != "engine.config.recipe"]
    unread = unread_keys(Config, readers)
    assert not unread, f"options that change nothing: {unread}; let the code read them, or remove them"


class InnerSection(BaseModel):
    lr: float
    steps: int


class OuterSection(BaseModel):
    inner: InnerSection | None
    seed: int


def test_an_unread_configuration_field_is_seen() -> None:
    read = Module("engine.a", "def f(self, config):\n    config.inner.lr; self.steps; config.seed = 3")
    assert unread_keys(OuterSection, [read]) == ["inner.steps", "seed"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_files_hold_only_what_our_configuration_does_not_own(stage: int) -> None:
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))
    assert set(settings) == {"zero_optimization", "zero_allow_untested_optimizer", "steps_per_print"}
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_allow_untested_optimizer"] is True
    # Without it, a model under ZeRO-3 cannot be gathered, and saving it writes nothing.
    assert settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)

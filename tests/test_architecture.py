"""The rules of the house that a machine can check: what may import what, how long things get, what must be described.

Each rule (`tests/architecture/`) is a function from parsed modules to a list of offences, so that
`test_each_rule_sees_an_offence` can show it code that breaks it: a rule that finds nothing anywhere would be no rule.
"""

from __future__ import annotations

import ast
import json
import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from engine.config.recipe import Config
from tests.architecture.engine import (
    algorithms_known_elsewhere,
    data_set_names,
    phases_without_their_parts,
    prints,
    starters_named,
    steps_elsewhere,
    verbs_from_elsewhere,
)
from tests.architecture.imports import (
    import_cycles,
    imports_against_the_direction,
    mutual_imports,
)
from tests.architecture.modules import PACKAGES, ROOT, Module, Rule, modules_of_the_project
from tests.architecture.size import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MAX_UNTYPED_RECORDS,
    files_too_long,
    functions_too_long,
    missing_docstrings,
    too_many_entries,
    too_many_untyped_records,
    vague_module_names,
)
from tests.conftest import LONGEST_FIRST

RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        imports_against_the_direction,
        import_cycles,
        mutual_imports,
        files_too_long,
        functions_too_long,
        too_many_entries,
        too_many_untyped_records,
        missing_docstrings,
        vague_module_names,
        prints,
        data_set_names,
        starters_named,
        verbs_from_elsewhere,
        phases_without_their_parts,
        steps_elsewhere,
        algorithms_known_elsewhere,
    )
}


@pytest.fixture(scope="module")
def project() -> list[Module]:
    modules = modules_of_the_project()
    assert {module.package for module in modules} == set(PACKAGES), "a package is missing: the rules would see nothing"
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
    (imports_against_the_direction, {"launcher.a": "import sparring"}, "launcher.a:1 imports sparring"),
    (import_cycles, {"engine.a": "import engine.b", "engine.b": "from engine import a"}, "a -> engine.b -> engine.a"),
    (import_cycles, {"engine.a": "from . import b", "engine.b": "from .a import x"}, "a -> engine.b -> engine.a"),
    (import_cycles, {"engine.a": "from engine.a import x"}, "engine.a -> engine.a"),
    (
        mutual_imports,
        {
            "engine.a.b": "import engine.c.d",
            "engine.c.e": "if TYPE_CHECKING:\n    from engine.a import f",
            "engine.a.f": "",
            "engine.c.d": "",
        },
        "engine.a and engine.c import each other: engine.a.b:1 imports engine.c.d; engine.c.e:2 imports engine.a.f",
    ),
    (
        mutual_imports,
        {
            "launcher.log": "from launcher.watch.now import x",
            "launcher.watch.now": "",
            "launcher.watch.then": "import launcher.log",
        },
        "launcher.log and launcher.watch import each other: launcher.log:1",
    ),
    (
        mutual_imports,
        {"shards.a.b.c": "from shards.a.d.e import x", "shards.a.d.e": "from shards.a.b.c import y"},
        "shards.a.b and shards.a.d import each other",
    ),
    (files_too_long, {"engine.a": "x = 1\n" * (MAX_FILE_LINES + 1)}, f"has {MAX_FILE_LINES + 1} lines"),
    (functions_too_long, {"engine.a": "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES}, "engine.a:1 f has 61 lines"),
    (too_many_entries, {f"engine.a{number}.b": "" for number in range(24)}, "engine has 24 entries"),
    (
        too_many_untyped_records,
        {"engine.a": "class C:\n" + "    def f(self) -> dict[str, Any] | None: ...\n" * (MAX_UNTYPED_RECORDS + 1)},
        f"{MAX_UNTYPED_RECORDS + 1} functions return a dict[str, Any]",
    ),
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
    (starters_named, {"engine.a": "x = os.environ['LOCAL_RANK']"}, "engine.a:1 'LOCAL_RANK' is the launcher's"),
    (starters_named, {"engine.a": "NAMES = {'data', 'slurm'}"}, "'slurm' is the launcher's"),
    (starters_named, {"engine.a": "from launcher import slurm_folder"}, "'slurm_folder' is the launcher's"),
    (starters_named, {"engine.a": "x = f'{a}:{b} is no MASTER_PORT'"}, "MASTER_PORT' is the launcher's"),
    (verbs_from_elsewhere, {"engine.ar2": "from engine.training.loop import train"}, "engine.ar2:1 takes train from"),
    (phases_without_their_parts, {"engine.phases": "from engine.training.state import train"}, "does not train by"),
    (
        phases_without_their_parts,
        {"engine.phases": "from engine.training.loop import train", "engine.objectives": ""},
        "takes no objective",
    ),
    (
        phases_without_their_parts,
        {
            "engine.phases": "import engine.objectives\nfrom engine.training.loop import train\nclass AnObjective: ...",
            "engine.objectives": "",
        },
        "engine.phases:3 AnObjective belongs into",
    ),
    (
        algorithms_known_elsewhere,
        {"launcher.a": "def f(config):\n    return config.ar2.iterations"},
        "launcher.a:2 reads the section 'ar2': only engine.ar2",
    ),
    (steps_elsewhere, {"engine.phases": "def f(model):\n    model.step(lr)"}, "engine.phases:2 takes a step"),
]


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
        Module(
            "engine.ar2", "'''A.'''\nfrom engine.data.d import Data\nfrom engine.refresh.refresh import refresh_index"
        ),
        Module(
            "engine.phases",
            "'''P.'''\nfrom engine.objectives import Contrastive\nfrom engine.training.loop import train",
        ),
        Module("engine.objectives", "'''O, for any WORLD_SIZE, under SLURM or not.'''"),
        Module("engine.training.loop", "'''L.'''\nfrom engine.data import d\nguards.step(rank, world_size)"),
        Module("engine.data.d", "'''D.'''\nimport engine.b\nfrom engine.data.e import f"),
        Module("engine.data.e", "'''E.'''\nfrom engine import data\ndef _f() -> dict[str, Any]: ..."),
        Module("launcher.a", "'''A.'''\nimport engine.b\nprint(1, 'RANK')\noptimizer.step()"),
        Module("sparring.a", "'''A.'''\nimport launcher.a\nimport engine.b\nimport shards"),
    ]
    assert [offence for rule in RULES.values() for offence in rule(modules)] == []


# --- configuration ---------------------------------------------------------------------------------------------------


RECIPE = "engine.config.recipe"


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
    """Names of all attributes read; those of `self` are no configuration's, but where a recipe makes its timetable."""
    return {
        node.attr
        for module in modules
        for tree in (timetables_in(module) if module.name == RECIPE else [module.tree])
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if module.name == RECIPE or not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def timetables_in(module: Module) -> list[ast.AST]:
    """Where a recipe hands its sections over to the timetable, from which everything else has their numbers."""
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef) and node.name == "timetable"]


def unread_keys(section: type[BaseModel], modules: list[Module]) -> list[str]:
    read = attributes_read(modules)
    return [key for key, name in fields_of(section) if name not in read]


def test_every_configuration_field_is_read(project: list[Module]) -> None:
    readers = [module for module in project if module.package != "shards"]
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


def test_what_the_timetable_is_made_of_is_read() -> None:
    """Sections whose numbers everything takes from the timetable were called options that change nothing."""
    recipe = Module(RECIPE, "def timetable(self):\n    made(self.seed)\ndef valid(self):\n    self.inner.lr")
    assert unread_keys(OuterSection, [recipe]) == ["inner", "inner.lr", "inner.steps"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_files_hold_only_what_our_configuration_does_not_own(stage: int) -> None:
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))
    assert set(settings) == {"zero_optimization", "zero_allow_untested_optimizer", "steps_per_print"}
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_allow_untested_optimizer"] is True
    # Without it, a model under ZeRO-3 cannot be gathered, and saving it writes nothing.
    assert settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)


def test_the_tests_that_are_begun_first_are_there() -> None:
    """A file that was renamed would come last again, and a process of the tests would wait for the other's."""
    assert [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).exists()] == []
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)

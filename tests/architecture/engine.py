"""What the engine does not know or do, and where a training step is to be found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.imports import imported_modules
from tests.architecture.modules import Module, docstrings_of, words_of

DATA_SET_WORD = re.compile(r"nq|trivia(qa)?|(ms)?marco|wiki\w*")
STARTER_WORD = re.compile(r"(?i:.*slurm.*)|OMPI_\w+|MASTER_ADDR|MASTER_PORT|LOCAL_RANK|RANK|WORLD_SIZE")
"""Schedulers, and the variables by which starters tell a process its place."""
ALGORITHMS = {
    "engine.ar2",
    "engine.r2anker",
    "engine.pretrain.edmlm",
    "engine.pretrain.ict",
    "engine.pretrain.cocondenser",
}
VERBS_FROM = ("engine.phases", "engine.refresh", "engine.evaluation", "engine.pretrain")
STEPS_IN = {
    "engine.training.loop",  # takes a step
    "engine.training.backend",  # hands it to DeepSpeed
}


def prints(modules: list[Module]) -> list[str]:
    return [
        f"{module.at(node.lineno)} prints: log it, or return it to the launcher"
        for module in modules
        if module.package in {"engine", "shards"}
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def data_set_names(modules: list[Module]) -> list[str]:
    offences = []
    for module in modules:
        if module.package != "engine":
            continue
        exempt = docstrings_of(module)  # they may cite the papers' tables
        for node in ast.walk(module.tree):
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


def starters_named(modules: list[Module]) -> list[str]:
    return [
        f"{module.at(getattr(node, 'lineno', 0))} {text!r} is the launcher's: let it tell the engine what is needed"
        for module in modules
        if module.package == "engine"
        for node in set(ast.walk(module.tree)) - docstrings_of(module)
        for text in words_of(node)
        if any(STARTER_WORD.fullmatch(word) for word in re.split(r"\W+", text))
    ]


def imported_names(module: Module) -> Iterator[tuple[int, str, str]]:
    """What a module imports by name, as (line, from where, name)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def verbs_from_elsewhere(modules: list[Module]) -> list[str]:
    """An algorithm's verbs are phases, refreshes and evaluations; nouns may come from anywhere."""
    return [
        f"{module.at(line)} takes {name} from {origin}: an algorithm is written in the verbs of {', '.join(VERBS_FROM)}"
        for module in modules
        if module.name in ALGORITHMS
        for line, origin, name in imported_names(module)
        if name[0].islower()
        and origin != "__future__"
        and not f"{origin}.".startswith(tuple(f"{f}." for f in VERBS_FROM))
    ]


def phases_without_their_parts(modules: list[Module]) -> list[str]:
    """A phase hands an objective of `engine.objectives` to the one loop."""
    offences = []
    for module in modules:
        if module.name != "engine.phases":
            continue
        if ("engine.training.loop", "train") not in {(origin, name) for _, origin, name in imported_names(module)}:
            offences.append(f"{module.name} does not train by engine.training.loop")
        known = {other.name for other in modules}
        taken = {f"{target}." for _, target in imported_modules(module, known)}
        if "engine.objectives" in known and not any(target.startswith("engine.objectives.") for target in taken):
            offences.append(f"{module.name} takes no objective from engine.objectives")
        offences += [
            f"{module.at(node.lineno)} {node.name} belongs into engine.objectives"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and "objective" in node.name.lower()
        ]
    return offences


def algorithms_known_elsewhere(modules: list[Module]) -> list[str]:
    """Only an algorithm's own file and the configuration read its section: all others read the timetable."""
    sections = {name.rpartition(".")[2]: name for name in ALGORITHMS}
    return [
        f"{module.at(node.lineno)} reads the section {node.attr!r}: only {sections[node.attr]} and engine.config do"
        for module in modules
        if module.name not in ALGORITHMS and not module.name.startswith("engine.config.")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and node.attr in sections
    ]


def steps_elsewhere(modules: list[Module]) -> list[str]:
    return [
        f"{module.at(node.lineno)} takes a step of an optimizer: only {', '.join(sorted(STEPS_IN))} do"
        for module in modules
        if module.package == "engine" and module.name not in STEPS_IN
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"
    ]

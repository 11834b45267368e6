"""What a turn of `benchmarks/train.py` has to do: operations over real tokens, and what padding adds to them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.train_recipe import Recipe
from benchmarks.work import flop
from engine.config.timetable import Visit
from engine.data.batches import Group, InputBuilder
from engine.models.template import Input, InputTemplate


@dataclass(frozen=True)
class Work:
    """What a turn has to do.

    Attributes:
        flop: Operations over real tokens.
        queries: How many.
        items: Passages or pairs, the queries of a retriever not counted.
        item: What is counted.
    """

    flop: float
    queries: int
    items: int
    item: str


def work_of(recipe: Recipe, visit: Visit) -> Work:
    """Return the work of a turn's steps."""
    groups, phase, shape = _groups(recipe, visit), visit.phase, _shape(recipe, visit.phase.model)
    pairs = flop(shape, [len(one.ids) for one in _inputs_of(recipe, "ranker").pairs(groups)])
    items = sum(len(group.documents) for group in groups)
    if phase.model == "ranker":
        return Work(3 * pairs, len(groups), items, "pairs")
    builder = _inputs_of(recipe, "retriever")
    texts = flop(shape, [len(one.ids) for one in (*builder.queries(groups), *builder.documents(groups))])
    if phase.pool == "none":
        return Work(3 * texts + pairs, len(groups), items, "passages")
    cached = phase.micro_batch_size < phase.batch_size
    return Work((4 if cached else 3) * texts, len(groups), items, "passages")


def work_of_scoring(recipe: Recipe, documents: Sequence[Sequence[int]]) -> Work:
    """Return the work of scoring documents for each of the first training queries."""
    groups = [Group(row, np.array(found)) for row, found in enumerate(documents)]
    lengths = [len(one.ids) for one in _inputs_of(recipe, "ranker").pairs(groups)]
    return Work(flop(_shape(recipe, "ranker"), lengths), len(groups), len(lengths), "pairs")


def lengths_of(recipe: Recipe, visits: Sequence[Visit]) -> str:
    """Say how long the inputs of turns are, and how much padding would add."""
    config, phase = recipe.run.config, visits[0].phase
    kinds = ["pairs"] if phase.model == "ranker" else ["queries", "documents"]
    if phase.opponent:
        kinds.append("pairs")
    full = {"queries": config.query_max_length, "documents": config.retriever.max_length}
    real = longest = places = 0
    said = []
    for kind in kinds:
        builder, lengths = _inputs_of(recipe, "ranker" if kind == "pairs" else "retriever"), []
        for visit in visits:
            groups = _groups(recipe, visit)
            for start in range(0, len(groups), phase.micro_batch_size):
                chunk = groups[start : start + phase.micro_batch_size]
                own = [len(one.ids) for one in getattr(builder, kind)(chunk)]
                longest += len(own) * -(-max(own) // 8) * 8
                lengths += own
        real += sum(lengths)
        places += len(lengths) * full.get(kind, config.ranker.max_length)
        said.append(f"{kind} of {np.mean(lengths):.0f} tokens (at most {max(lengths)})")
    return (
        f"{phase.batch_size} queries in micro-batches of {phase.micro_batch_size}; {', '.join(said)}; padding is "
        f"{1 - real / longest:.0%} of micro-batches and {1 - real / places:.0%} at full length"
    )


def _groups(recipe: Recipe, visit: Visit) -> list[Group]:
    samples, first = recipe.samples(visit), visit.first_step
    return [group for step in range(first, first + visit.phase.steps) for group in samples.groups(step)]


def _shape(recipe: Recipe, model: str) -> Any:
    settings = json.loads((recipe.folders[model] / "config.json").read_text(encoding="utf-8"))
    return argparse.Namespace(**settings)


class _AsTheyAre:
    """Stands for a collator: leaves inputs as they are, to be counted."""

    def __init__(self, template: InputTemplate) -> None:
        self.template = template

    def __call__(self, inputs: Sequence[Input]) -> Sequence[Input]:
        return inputs


def _inputs_of(recipe: Recipe, model: str) -> Any:
    """Return what makes a model's inputs of groups, one by one."""
    config, collate = recipe.run.config, _AsTheyAre(recipe.data.texts[model].template)
    lengths = {"max_length": config.models[model].max_length, "query_max_length": config.query_max_length}
    return InputBuilder(recipe.data, model, collate, **lengths)  # type: ignore[arg-type]

"""Drafting a recipe: lengths from the texts, batches from the memory, steps from the hours, with the reasons beside.

The numbers come from the same estimates as `plan`, so that what a drafted recipe takes can be looked at there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.file import parse_config
from engine.errors import ConfigError
from launcher.plan.corpus import Corpus
from launcher.plan.durations import Rates, clock
from launcher.plan.estimate import Plan, make_plan
from launcher.plan.models import ModelShape, shapes_of
from launcher.plan.phases import needed_bytes
from launcher.plan.survey import RANDOM, Machine, Start, Texts
from shards.records import Dataset

Tree = dict[str, Any]
PHASES = ("warmup_retriever", "warmup_ranker", "ar2.retriever", "ar2.ranker")
_SHARES = dict(zip(PHASES, (0.2, 0.25, 0.25, 0.3), strict=True))
"""Of the time for training."""
_MOST_EPOCHS = dict(zip(PHASES, (5.0, 5.0, 1.5, 1.0), strict=True))
"""Passes over the training queries, of one visit: about twice what AR2 takes on Natural Questions (Table 9)."""
_FEWEST_STEPS = 5
_MOST_ITERATIONS = 10
_USED = 0.85
"""Of the hours that are planned; the rest is for what the estimates leave out."""
_FULL = 0.85
"""Of a device's memory that is planned."""
_FLAT_DOCUMENTS = 50_000
_SMALL_HIDDEN = 512
_FEWEST_DOCUMENTS = 20
_STEP_SECONDS, _ITERATION_SECONDS, _START_SECONDS = 0.1, 10.0, 60.0
"""What a step, an iteration and a start take beside their arithmetic, which tiny models have none of (ours)."""
_DECLARED = 64
"""Steps of each phase in the plans from which the seconds of a step are read."""


@dataclass(frozen=True)
class Asked:
    """What a draft is made for."""

    dataset: Dataset
    texts: Texts
    retriever: Start
    ranker: Start
    machine: Machine
    hours: float
    data_path: str
    run_path: str
    shapes: Mapping[str, str]
    """Words for the shapes of models that are not at hand, by the model's name."""

    @property
    def train(self) -> int:
        """Training queries."""
        return len(self.dataset.qrels.get("train", {}))

    @property
    def small(self) -> bool:
        """Whether it is to run on processors."""
        return self.machine.device.is_cpu


@dataclass(frozen=True)
class Draft:
    """A recipe as a tree, with what is to be said of its keys, and its plan."""

    tree: Tree
    notes: dict[str, str]
    plan: Plan

    @property
    def seconds(self) -> float:
        """What the run takes: the plan's estimate, and what steps, iterations and starts take beside it."""
        table = self.plan.config.timetable
        steps = sum(phase.total_steps for phase in table.phases)
        beside = _START_SECONDS + _ITERATION_SECONDS * table.iterations + _STEP_SECONDS * steps
        return beside + sum(phase.seconds for phase in self.plan.hours)


def draft_recipe(asked: Asked) -> Draft:
    """Draft an AR2 recipe.

    Args:
        asked: What for.

    Raises:
        ConfigError: The data are too few, the models do not fit, or the hours are too short.
    """
    _require_enough(asked)
    tree, notes = _sections(asked)
    shapes = _shapes(asked, tree)
    if max(shape.hidden for shape in shapes.values()) <= _SMALL_HIDDEN:
        _raise_rates(tree, asked.retriever.name == RANDOM, notes)
    _set_lengths(tree, notes, asked, shapes)
    _fit_memory(tree, notes, asked, shapes)
    _spend_hours(tree, notes, asked, shapes)
    return Draft(tree, notes, _plan(tree, asked, shapes))


def _require_enough(asked: Asked) -> None:
    if asked.dataset.num_documents < _FEWEST_DOCUMENTS or asked.train < asked.machine.ranks:
        raise ConfigError(
            f"{asked.data_path} has {asked.dataset.num_documents} documents and {asked.train} training queries",
            expected=f"{_FEWEST_DOCUMENTS} documents and {asked.machine.ranks} judged training queries, or more",
            remedy="add documents: with so few there are no negatives to learn from"
            if asked.dataset.num_documents < _FEWEST_DOCUMENTS
            else "add judgements (qrels/train.tsv in the BEIR layout), or name another folder",
        )


def _sections(asked: Asked) -> tuple[Tree, dict[str, str]]:
    """Return a recipe whose lengths, micro-batches and steps are still to be found."""
    small, ranks, documents = asked.small, asked.machine.ranks, asked.dataset.num_documents
    negatives, top_k = (5, 50) if small else (15, 100)
    top_k = min(top_k, documents // 2)
    negatives = min(negatives, top_k // 2)
    batches = {"warmup_retriever": 32 if small else 128, "ar2.retriever": 16 if small else 64}
    sizes = {phase: _batch(batches.get(phase, 8 if small else 32), asked) for phase in PHASES}
    splits = asked.dataset.qrels
    metrics = ["R@1", "R@5", "R@20", "R@100", "MRR@10", "nDCG@10"]
    metrics += ["A@1", "A@5", "A@20", "A@100"] * any(query.answers for query in asked.dataset.queries.values())

    def phase(name: str, lr: float, **more: Any) -> Tree:
        size = {"steps": _DECLARED, "batch_size": sizes[name], "micro_batch_size": sizes[name] // ranks}
        return {**size, **more, "optim": {"lr": lr}}

    tree: Tree = {
        "run": {"path": asked.run_path, "checkpoint_every_steps": 50 if small else 200},
        "data": {"path": asked.data_path, "format": asked.dataset.format},
        "retriever": _model(
            asked.retriever, asked, pooling=asked.retriever.pooling, similarity=asked.retriever.similarity
        ),
        "ranker": _model(asked.ranker, asked),
        "index": {"factory": "Flat" if documents <= _FLAT_DOCUMENTS else "auto"},
        "warmup_retriever": phase("warmup_retriever", 1e-5, hard_negatives=1, bm25_depth=top_k),
        "warmup_ranker": phase("warmup_ranker", 1e-5, num_negatives=negatives),
        "ar2": {
            "iterations": 1,
            "num_negatives": negatives,
            "top_k": top_k,
            "mine": "sampled" if small else "all",
            "retriever": phase("ar2.retriever", 1e-5),
            "ranker": phase("ar2.ranker", 1e-6),
        },
        "evaluation": {
            "metrics": metrics,
            "depth": 100,
            "rerank_depth": 20 if small else 100,
            "max_dev_queries": min(len(splits.get("dev", {})), 100 if small else 500) or None,
            "max_test_queries": min(len(splits.get("test", {})), 250 if small else 2000) or None,
            "tokens_per_batch": 8192 if small else 65536,
        },
    }
    if asked.texts.language not in (None, "english"):
        tree["bm25"] = {"language": asked.texts.language}
    if asked.retriever.similarity == "cosine":
        tree["retriever"]["score_scale"] = 20.0
    if asked.ranker.name == asked.retriever.name:
        # An encoder without a ranker's head learns to rank in these few steps only from its retriever's level on.
        head = "last" if asked.retriever.pooling == "last" else "cls"
        tree["ranker"] |= {"head": head, "prior": 1.0, "bm25_prior": 10.0}
    elif asked.ranker.is_decoder:
        tree["ranker"]["head"] = "last"
    if "head" in tree["ranker"]:
        tree["warmup_ranker"]["optim"]["head_lr_scale"] = 10.0
    if any(grade > 0 for judged in splits.get("dev", {}).values() for grade in judged.values()):
        tree["evaluation"]["fuse"] = True
    evaluation = {name: value for name, value in tree["evaluation"].items() if value is not None}
    tree["evaluation"] = evaluation | ({} if "test" in splits else {"test_at_end": False})
    return tree, _first_notes(asked, tree)


def _model(start: Start, asked: Asked, **more: Any) -> Tree:
    precision = {} if asked.small else {"precision": asked.machine.precision}
    return {"name": start.name, **more, **precision, "zero_stage": 1}


def _batch(target: int, asked: Asked) -> int:
    """Return a power of two that the ranks divide where they are one, at most the target and the training queries."""
    per_rank = max(1, min(target, asked.train) // asked.machine.ranks)
    return int(asked.machine.ranks * (1 << (per_rank.bit_length() - 1)))


def _first_notes(asked: Asked, tree: Tree) -> dict[str, str]:
    documents = asked.dataset.num_documents
    exact = (
        "exact search, cheap for so few documents"
        if tree["index"]["factory"] == "Flat"
        else ("planned by the corpus and index.memory_gib when the run comes to it")
    )
    missing = [split for split in ("dev", "test") if split not in asked.dataset.qrels]
    return {
        "run.path": "from the folder in which the run is started",
        "data.format": "as its file names say",
        "bm25.language": "as the texts read; its stemmer and its stop words, where there are some",
        "retriever.pooling": "the last token has seen the whole text"
        if asked.retriever.pooling == "last"
        else "as the model's files say; a plain checkpoint does not say it, and gets AR2's",
        "ranker.head": "not trained yet: it begins at the scores of its retriever and BM25"
        if "prior" in tree["ranker"]
        else "a decoder's, not trained yet; `yes_no` where the model was trained to answer yes or no",
        "index.factory": f"{documents} documents: {exact}",
        "ar2.mine": "`sampled` searches only the queries that are drawn, and trains the same as `all`",
        "evaluation.fuse": "retriever, ranker and BM25 mixed, the weights fitted on dev: what `search` then orders by",
        "evaluation": f"the folder has no {' and no '.join(missing)} split, which is not measured" if missing else "",
    }  # fmt: skip


def _shapes(asked: Asked, tree: Tree) -> dict[str, ModelShape]:
    """Return the shapes of both models, read from their files or from words."""
    at_hand = {**tree, "retriever": {**tree["retriever"]}, "ranker": {**tree["ranker"]}}
    for name, start in (("retriever", asked.retriever), ("ranker", asked.ranker)):
        at_hand[name]["name"] = start.source
    return shapes_of(parse_config(at_hand, "the draft"), asked.shapes)


def _raise_rates(tree: Tree, random: bool, notes: dict[str, str]) -> None:
    """Set the learning rates of small models."""
    rates = (1e-3, 1e-3, 5e-4, 5e-4) if random else (5e-5, 1e-4, 2e-5, 5e-5)
    for name, lr in zip(PHASES, rates, strict=True):
        section_at(tree, name)["optim"]["lr"] = lr
    notes["warmup_retriever"] = "learning rates are those of the recipes for small models that come along"


def _set_lengths(tree: Tree, notes: dict[str, str], asked: Asked, shapes: Mapping[str, ModelShape]) -> None:
    """Choose the lengths by the texts, within what the models' positions allow."""
    documents, queries = asked.texts.documents, asked.texts.queries
    longest = {name: min(512, shape.longest or 512) for name, shape in shapes.items()}
    of_query = min(_up_to(queries.at(0.99), 8, 16), longest["retriever"] // 2)
    of_document = min(_up_to(documents.at(0.95), 16, 32), longest["retriever"])
    of_document = max(of_document, of_query)
    of_pair = min(_up_to(of_query + of_document, 16, 32), longest["ranker"])
    tree["retriever"] |= {"query_max_length": of_query, "max_length": of_document}
    tree["ranker"] |= {"max_length": of_pair}
    notes["retriever.query_max_length"] = (
        f"99 % of the queries have up to {queries.at(0.99)} tokens, half of them up to {queries.at(0.5)}"
    )
    notes["retriever.max_length"] = (
        f"95 % of the documents have up to {documents.at(0.95)} tokens, half of them up to {documents.at(0.5)}; "
        f"{100 * documents.longer_than(of_document):.1f} % are cut"
    )
    notes["ranker.max_length"] = "query and document together, as far as the model reads"


def _up_to(length: int, multiple: int, least: int) -> int:
    return max(least, math.ceil(length / multiple) * multiple)


def section_at(tree: Tree, key: str) -> Tree:
    """Return the section at a dotted key."""
    for part in key.split("."):
        tree = tree[part]
    return tree


def _plan(tree: Tree, asked: Asked, shapes: Mapping[str, ModelShape]) -> Plan:
    splits = {name: len(judged) for name, judged in asked.dataset.qrels.items()}
    corpus = Corpus(
        documents=asked.dataset.num_documents,
        train=asked.train,
        dev=splits.get("dev", 1),
        test=splits.get("test", 1),
        text_bytes=asked.texts.document_bytes,
        tokens=float(asked.texts.documents.tokens_N.mean()),
        sources=(),
    )
    rates = replace(Rates(), network_bytes=asked.machine.device.link_bytes)
    config = parse_config(tree, "the draft")
    return make_plan(
        config, corpus, shapes, asked.machine.device, nodes=1, ranks_per_node=asked.machine.ranks, rates=rates
    )


def _fit_memory(tree: Tree, notes: dict[str, str], asked: Asked, shapes: Mapping[str, ModelShape]) -> None:
    """Lower micro-batches, then recompute and partition, until all phases fit into a device."""
    limit = _FULL * asked.machine.device.memory_bytes
    while True:
        plan = _plan(tree, asked, shapes)
        need = {phase.name: needed_bytes(phase, plan.world_size, plan.gpu) for phase in plan.phases}
        if max(need.values()) <= limit:
            break
        works = {work.name: work.phase for work in plan.works}
        name = max(need, key=lambda one: need[one])
        phase = works.get(name)
        if phase is not None and (section := section_at(tree, phase.section))["micro_batch_size"] > 1:
            section["micro_batch_size"] //= 2
        elif phase is not None and not tree[phase.model].get("gradient_checkpointing"):
            tree[phase.model]["gradient_checkpointing"] = True
        elif phase is None and tree["evaluation"]["tokens_per_batch"] > 1024:
            tree["evaluation"]["tokens_per_batch"] //= 2
        elif (models := [model for model in shapes if tree[model]["zero_stage"] < 3]) and plan.world_size > 1:
            for model in models:
                tree[model]["zero_stage"] += 1
        else:
            raise ConfigError(
                f"the models do not fit: {name} takes {need[name] / 2**30:.1f} GiB of a rank, with the least batches",
                expected=f"{limit / 2**30:.1f} GiB or less, {_FULL:.0%} of what a rank has here",
                remedy="name smaller models by --model and --ranker, or begin where there is more memory",
            )
    fullest = max(need.values()) / 2**30
    memory = asked.machine.device.memory_bytes / 2**30
    notes["warmup_retriever.micro_batch_size"] = (
        f"all phases fit: {fullest:.2g} GiB of {memory:.3g} GiB of a rank in the fullest, by the plan"
    )


def _spend_hours(tree: Tree, notes: dict[str, str], asked: Asked, shapes: Mapping[str, ModelShape]) -> None:
    """Choose iterations and steps that the hours allow."""
    usable = _USED * 3600 * asked.hours
    fixed, each, step_seconds = _costs(tree, asked, shapes)
    shortest = fixed + each + _FEWEST_STEPS * sum(step_seconds.values())
    if shortest > usable:
        raise ConfigError(
            f"--hours {asked.hours:g} is too short: what is done once takes about {clock(fixed)}, the mining, indexing "
            f"and evaluation of an iteration {clock(each)}, and {_FEWEST_STEPS} steps of each phase "
            f"{clock(_FEWEST_STEPS * sum(step_seconds.values()))}",
            expected=f"--hours {math.ceil(100 * shortest / _USED / 3600) / 100:g} or more",
            remedy="give more hours, smaller models (--model, --ranker), or a GPU",
        )
    allowed = [count for count in range(1, _MOST_ITERATIONS + 1) if fixed + count * each <= 0.6 * usable]
    iterations = max(allowed, default=1)
    training = usable - fixed - iterations * each
    reasons = set()
    for name in PHASES:
        visits = iterations if name.startswith("ar2.") else 1
        section = section_at(tree, name)
        in_time = int(_SHARES[name] * training / visits / step_seconds[name])
        in_epochs = math.ceil(_MOST_EPOCHS[name] * asked.train / section["batch_size"])
        reasons.add("hours" if in_time < in_epochs else "queries")
        section["steps"] = max(_FEWEST_STEPS, min(in_time, in_epochs))
    tree["ar2"]["iterations"] = iterations
    notes["ar2.iterations"] = (
        f"of at most {_MOST_ITERATIONS}, as many as leave two fifths of the time and more to training; one takes "
        f"{clock(each)} beside its steps"
    )
    told = {
        "hours": f"as many as the hours allow, a step taking {clock(step_seconds['warmup_retriever'])} here and "
        f"{clock(step_seconds['warmup_ranker'])} in the ranker's warm-up",
        "queries": f"more than {_MOST_EPOCHS['warmup_retriever']:g} passes over {asked.train} training queries would "
        "learn them by heart, although there is time",
    }
    notes["warmup_retriever.steps"] = "; others: ".join(told[reason] for reason in sorted(reasons))


def _costs(tree: Tree, asked: Asked, shapes: Mapping[str, ModelShape]) -> tuple[float, float, dict[str, float]]:
    """Return the seconds beside training that there are once, those of each iteration, and those of a step."""
    beside: list[float] = []
    steps: dict[str, float] = {}
    for iterations in (1, 2):
        tree["ar2"]["iterations"] = iterations
        plan = _plan(tree, asked, shapes)
        training = {work.name if work.phase.is_warmup else f"{work.name} phase": work.phase for work in plan.works}
        beside.append(sum(phase.seconds for phase in plan.hours if phase.name not in training))
        steps = {
            training[phase.name].section: _STEP_SECONDS + phase.seconds / training[phase.name].total_steps
            for phase in plan.hours
            if phase.name in training
        }
    each = beside[1] - beside[0]
    return _START_SECONDS + beside[0] - each, _ITERATION_SECONDS + each, steps

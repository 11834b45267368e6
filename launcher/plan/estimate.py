"""Puts the parts of a plan together: from a recipe and machines to everything that the report prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.index.estimate import IndexEstimate
from engine.index.gpu import index_obstacle, not_on_gpus
from engine.index.plan import IndexPlan, plan_index
from launcher.plan.corpus import Corpus
from launcher.plan.durations import PhaseHours, Rates, phase_hours
from launcher.plan.hardware import Gpu
from launcher.plan.memory import STAGES, StepMemory
from launcher.plan.models import ModelShape, encoder_of
from launcher.plan.phases import NO_INDEX, PhaseMemory, Work, memory_of, needed_bytes, phases, training_work
from launcher.plan.postings import PostingsUse, postings_use
from launcher.plan.recomputation import decide_recomputation
from launcher.plan.storage import DiskUse, disk_use, host_memory, index_needs
from launcher.plan.traffic import Traffic, gradient_bytes, iteration_traffic


@dataclass(frozen=True, slots=True)
class StageRow:
    """One model under one ZeRO stage."""

    model: str
    stage: int
    work: str
    """The training phase that needs most."""
    memory: StepMemory
    needed: int
    """With context, NCCL's buffers and fragmentation."""
    sent: float
    """Bytes that a rank sends for this model's gradients and weights in the whole recipe."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a recipe on given machines."""

    config: Config
    gpu: Gpu
    nodes: int
    ranks_per_node: int
    corpus: Corpus
    shapes: Mapping[str, ModelShape]
    works: list[Work]
    index: IndexPlan
    needs: IndexEstimate
    postings: PostingsUse | None
    """None where no lexical retriever searches."""
    stage_rows: list[StageRow]
    recommended: Mapping[str, int | None]
    """Stage of each model; None where none fits."""
    phases: list[PhaseMemory]
    disk: DiskUse
    host: dict[str, tuple[int, str]]
    traffic: list[Traffic]
    hours: list[PhaseHours]
    rates: Rates

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def num_devices(self) -> int:
        """Devices of the ranks, and those that are kept for refreshes."""
        return self.nodes * (self.ranks_per_node + self.config.refresh_devices)

    def fits(self, num_bytes: int) -> bool:
        """Whether a device has as much."""
        return num_bytes <= self.gpu.memory_bytes


def make_plan(
    config: Config,
    corpus: Corpus,
    shapes: Mapping[str, ModelShape],
    gpu: Gpu,
    *,
    nodes: int,
    ranks_per_node: int,
    rates: Rates,
) -> Plan:
    """Estimate a recipe on given machines.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        shapes: Of all models, by name.
        gpu: The device of every rank.
        nodes: Hosts.
        ranks_per_node: Ranks on each.
        rates: What is assumed of the machines' speed.

    Raises:
        ConfigError: A number is below 1, the ranks cannot share a batch, an input is longer than a model takes, or
            the index cannot be built.
    """
    _require_ranks(nodes, ranks_per_node)
    world_size = nodes * ranks_per_node
    config = decide_recomputation(config.sized(corpus.sizes), shapes, gpu, world_size)
    _check_lengths(config, shapes)
    works = training_work(config, shapes, world_size)
    stages = {model: section.zero_stage for model, section in config.models.items()}
    dimension = shapes[encoder_of(config)].dimension
    plan = plan_index(config.index, num_documents=corpus.documents, dimension=dimension)
    needs = index_needs(config, corpus, plan, dimension, rates.gigaflops)
    postings, rates = postings_use(config, corpus, shapes), rates.of_hosts(config, nodes)
    disk = disk_use(config, corpus, shapes, needs, postings=postings.disk_bytes if postings else 0)
    rows = _stage_rows(config, shapes, works, stages, world_size, gpu)
    searched = _searched(config, plan, needs, dimension, gpu)
    listed = phases(config, shapes, works, stages, world_size, plan, gpu, searched)
    return Plan(
        config=config,
        gpu=gpu,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        corpus=corpus,
        shapes=shapes,
        works=works,
        index=plan,
        needs=needs,
        postings=postings,
        stage_rows=rows,
        recommended={model: recommend([row for row in rows if row.model == model], gpu) for model in shapes},
        phases=listed,
        disk=disk,
        host=host_memory(
            config,
            corpus,
            shapes,
            plan,
            needs,
            ranks_per_host=ranks_per_node,
            world_size=world_size,
            training=max(phase.tensors for phase in listed) if gpu.is_cpu else None,
            postings=postings.rank_bytes if postings else 0,
        ),
        traffic=iteration_traffic(config, corpus, shapes, works, stages, world_size, plan, needs, disk.shards),
        hours=phase_hours(
            config, corpus, shapes, works, stages, (nodes, ranks_per_node), plan, needs, postings, disk, gpu, rates
        ),
        rates=rates,
    )


def _searched(config: Config, plan: IndexPlan, needs: IndexEstimate, dimension: int, gpu: Gpu) -> int:
    """Return the bytes of an index that is searched on GPUs: where the recipe says so, as FAISS may have none.

    Raises:
        ConfigError: The recipe wants an index on GPUs that FAISS does not take there.
    """
    if config.index.gpu != "always" or plan.exact:
        return 0
    if gpu.is_cpu:
        raise not_on_gpus("the ranks are planned on CPUs", "plan with --gpu, or set index.gpu=auto")
    fact, remedy = index_obstacle(plan, dimension)
    if fact:
        raise not_on_gpus(fact, remedy)
    return needs.index_bytes


def recommend(rows: list[StageRow], gpu: Gpu) -> int | None:
    """Choose among the stages that fit: the least traffic, then the lowest; None where none fits."""
    fitting = [row for row in rows if row.needed <= gpu.memory_bytes]
    return min(fitting, key=lambda row: (row.sent, row.stage)).stage if fitting else None


def _stage_rows(
    config: Config,
    shapes: Mapping[str, ModelShape],
    works: list[Work],
    stages: Mapping[str, int],
    world_size: int,
    gpu: Gpu,
) -> list[StageRow]:
    """List the models that are trained under each ZeRO stage."""
    found = (
        _stage_row(config, shapes, works, model, stage, stages, world_size, gpu) for model in shapes for stage in STAGES
    )
    return [row for row in found if row is not None]


def _stage_row(
    config: Config,
    shapes: Mapping[str, ModelShape],
    works: list[Work],
    model: str,
    stage: int,
    stages: Mapping[str, int],
    world_size: int,
    gpu: Gpu,
) -> StageRow | None:
    """Find the training phase of a model that needs most under a stage, the other models as the recipe has them."""
    asked = {**stages, model: stage}
    own = [work for work in works if work.model == model]
    if not own:
        return None
    listed = phases(config, shapes, works, asked, world_size, NO_INDEX, gpu)
    by_name = {phase.name: needed_bytes(phase, world_size, gpu) for phase in listed}
    worst = max(own, key=lambda work: by_name[work.name])
    sent = sum(
        work.phase.total_steps
        * gradient_bytes(
            shapes[model],
            config.models[model].precision,
            stage=stage,
            world_size=world_size,
            micro_batches=work.micro_batches,
            forwards=1 + work.cached,
        )
        for work in own
    )
    memory = memory_of(config, shapes[model], worst, stage, world_size, gpu.is_cpu)
    return StageRow(model, stage, worst.name, memory, by_name[worst.name], sent)


def _require_ranks(nodes: int, ranks_per_node: int) -> None:
    for name, number in (("--nodes", nodes), ("--gpus-per-node", ranks_per_node)):
        if number < 1:
            raise ConfigError(f"{name} is {number}", expected="at least 1")


def _check_lengths(config: Config, shapes: Mapping[str, ModelShape]) -> None:
    for model, section in config.models.items():
        longest = shapes[model].longest
        if longest is not None and section.max_length > longest:
            raise ConfigError(
                f"{model}.max_length is {section.max_length}, but the model takes {longest} tokens",
                expected=f"at most {longest}",
                remedy=f"set {model}.max_length={longest}, or name a model for longer inputs",
            )

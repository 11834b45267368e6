"""What lies on a GPU in each phase of a recipe: the engine at work, and whatever else is there meanwhile.

The engine that is not trained is moved to the host (`engine.training.backend.Models`). Encoding, mining and evaluation
hold copies for inference instead, with both engines at rest; the retriever's phase holds the frozen ranker beside the
retriever. When a run starts, both engines are made before either is moved away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.index.plan import IndexPlan
from launcher.plan.activations import ELEMENT_BYTES, Inputs, Numerics, inference_bytes
from launcher.plan.hardware import GIB, Gpu
from launcher.plan.memory import StepMemory, buckets_of, idle_bytes, step_memory
from launcher.plan.models import ModelShape, Role

CONTEXT_BYTES = int(0.6 * GIB)
"""CUDA's context with its loaded kernels and cuBLAS's workspace (assumed)."""
NCCL_BYTES = int(0.5 * GIB)
"""NCCL's buffers where there is more than one rank (assumed)."""
FRAGMENTATION = 0.06
"""Of tensors, what torch's allocator cannot reuse (assumed)."""
_EXACT_SEARCH_BYTES = int(0.25 * GIB)
"""A block of documents, and the scores of a block of queries with it, in `engine.index.exact`."""
_POOL_COPIES, _SCORE_COPIES = 3, 4


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Bytes on one GPU."""

    name: str
    parts: Mapping[str, int]

    @property
    def tensors(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Work:
    """One training phase of one model, as a rank sees it."""

    name: str
    role: Role
    batches: tuple[Inputs, ...]
    """Of one micro-batch."""
    queries: int
    """Of a rank in a step."""
    micro_batches: int
    steps: int
    """In all iterations."""
    extra: int = 0
    """Bytes of the pool of representations."""
    frozen: int = 0
    """Bytes of the frozen ranker."""
    opponent: tuple[Inputs, ...] = ()
    """What the frozen ranker scores for a micro-batch."""

    @property
    def cached(self) -> bool:
        """Whether gradient caching computes every forward twice."""
        return self.name == "warm-up retriever" and self.micro_batches > 1


def training_work(config: Config, retriever: ModelShape, ranker: ModelShape, world_size: int) -> list[Work]:
    """List the four training phases.

    Args:
        config: The recipe.
        retriever: Its shape.
        ranker: Its shape.
        world_size: Ranks, which share each batch.

    Raises:
        ConfigError: A batch cannot be shared equally; all of them are named.
    """
    g, d, game = config.retriever, config.ranker, config.ar2
    warm_g, warm_d = config.warmup_retriever, config.warmup_ranker
    given = {
        "warmup_retriever": warm_g.batch_size,
        "warmup_ranker": warm_d.batch_size,
        "ar2.retriever": game.retriever.batch_size,
        "ar2.ranker": game.ranker.batch_size,
    }
    uneven = [f"{name}.batch_size={size}" for name, size in given.items() if size % world_size]
    if uneven:
        raise ConfigError(
            f"{world_size} ranks cannot share {', '.join(uneven)} equally",
            expected="batches that the number of ranks (nodes times GPUs a node) divides",
            remedy=f"use multiples of {world_size}, or other numbers of nodes and GPUs",
        )

    def cut(batch_size: int, micro_batch_size: int) -> tuple[int, int, int]:
        own = batch_size // world_size
        return own, min(own, micro_batch_size), math.ceil(own / micro_batch_size)

    works = []
    own, micro, count = cut(warm_g.batch_size, warm_g.micro_batch_size)
    width = 1 + warm_g.hard_negatives
    pool = (world_size if warm_g.gather_negatives else 1) * own * width
    extra = 4 * (_POOL_COPIES * pool * retriever.hidden + _SCORE_COPIES * own * pool)
    batches = (Inputs(micro, g.query_max_length), Inputs(micro * width, g.max_length))
    works.append(Work("warm-up retriever", "retriever", batches, own, count, warm_g.steps, extra))
    own, micro, count = cut(warm_d.batch_size, warm_d.micro_batch_size)
    pairs = (Inputs(micro * (1 + warm_d.num_negatives), d.max_length),)
    works.append(Work("warm-up ranker", "ranker", pairs, own, count, warm_d.steps))
    own, micro, count = cut(game.retriever.batch_size, game.retriever.micro_batch_size)
    rows = micro * (1 + game.num_negatives)
    batches = (Inputs(micro, g.query_max_length), Inputs(rows, g.max_length))
    frozen = ranker.parameters * ELEMENT_BYTES[d.precision]
    steps = game.retriever.steps * game.iterations
    scored = (Inputs(rows, d.max_length),)
    works.append(Work("retriever", "retriever", batches, own, count, steps, frozen=frozen, opponent=scored))
    own, micro, count = cut(game.ranker.batch_size, game.ranker.micro_batch_size)
    pairs = (Inputs(micro * (1 + game.num_negatives), d.max_length),)
    works.append(Work("ranker", "ranker", pairs, own, count, game.ranker.steps * game.iterations))
    return [work for work in works if work.steps]


def numerics_of(config: Config, role: Role, on_cpu: bool) -> Numerics:
    """Return the types and kernels that a model trains with."""
    section = config.retriever if role == "retriever" else config.ranker
    return Numerics(section.precision, section.attention, section.gradient_checkpointing, on_cpu)


def memory_of(config: Config, shape: ModelShape, work: Work, stage: int, world_size: int, on_cpu: bool) -> StepMemory:
    """Estimate a step of a training phase under a ZeRO stage."""
    section = config.retriever if work.role == "retriever" else config.ranker
    return step_memory(
        shape,
        work.batches,
        numerics_of(config, work.role, on_cpu),
        stage=stage,
        world_size=world_size,
        num_micro_batches=work.micro_batches,
        buckets=buckets_of(section, stage),
        extra=work.extra,
        opponent=work.frozen,
    )


def phases(
    config: Config,
    shapes: Mapping[Role, ModelShape],
    works: list[Work],
    stages: Mapping[Role, int],
    world_size: int,
    plan: IndexPlan,
    gpu: Gpu,
) -> list[PhaseMemory]:
    """List what lies on a GPU in each phase under given ZeRO stages; on a CPU, what a rank holds.

    Args:
        config: The recipe.
        shapes: Of both models.
        works: From `training_work`.
        stages: ZeRO stage of each model.
        world_size: Ranks.
        plan: Of the index.
        gpu: The device.
    """
    resident: dict[Role, int] = {}
    made = 0
    trained: list[PhaseMemory] = []
    for role, shape in shapes.items():
        of_role = [work for work in works if work.role == role] or []
        for work in of_role:
            memory = memory_of(config, shape, work, stages[role], world_size, gpu.is_cpu)
            resident[role] = memory.resident - memory.opponent
        made += resident.get(role, 0)
    for work in works:
        memory = memory_of(config, shapes[work.role], work, stages[work.role], world_size, gpu.is_cpu)
        other: Role = "ranker" if work.role == "retriever" else "retriever"
        parts = {
            f"{work.role} resident": memory.resident - memory.opponent,
            memory.worst_moment: memory.peak - memory.resident,
        }
        if memory.opponent:
            parts["frozen ranker"] = memory.opponent
        trained.append(PhaseMemory(work.name, parts | _idle(config, shapes, stages, resident, (other,), gpu)))
    idle = _idle(config, shapes, stages, resident, ("retriever", "ranker"), gpu)
    searching = {"exact search": _EXACT_SEARCH_BYTES} if plan.exact else {}
    return [
        PhaseMemory("start and resume", {"both engines": made}),
        *trained,
        PhaseMemory("encode, mine", _inference(config, shapes["retriever"], "retriever", gpu) | searching | idle),
        PhaseMemory("evaluate", _inference(config, shapes["ranker"], "ranker", gpu) | idle),
    ]


def needed_bytes(phase: PhaseMemory, world_size: int, gpu: Gpu) -> int:
    """Return what a phase takes of a device, with its context, NCCL's buffers and fragmentation."""
    if gpu.is_cpu:
        return phase.tensors
    return int(phase.tensors * (1 + FRAGMENTATION)) + CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def _inference(config: Config, shape: ModelShape, role: Role, gpu: Gpu) -> dict[str, int]:
    """Return the parts of a pass without gradients; the retriever encodes packed rows, the ranker scores pairs."""
    numerics = numerics_of(config, role, gpu.is_cpu)
    settings = config.evaluation
    if role == "retriever":
        tokens = min(settings.tokens_per_batch, 1024) if gpu.is_cpu else settings.tokens_per_batch
        inputs = Inputs(max(1, tokens // config.retriever.max_length), config.retriever.max_length)
    else:
        inputs = Inputs(min(settings.pairs_per_batch, settings.rerank_depth), config.ranker.max_length)
    copies = shape.parameters * numerics.element
    return {f"frozen {role}": copies, "a batch's activations": inference_bytes(shape, inputs, numerics)}


def _idle(
    config: Config,
    shapes: Mapping[Role, ModelShape],
    stages: Mapping[Role, int],
    resident: Mapping[Role, int],
    roles: tuple[Role, ...],
    gpu: Gpu,
) -> dict[str, int]:
    """Return what engines at rest leave on the device; on a CPU, where they stay, all of it."""
    sections = {"retriever": config.retriever, "ranker": config.ranker}
    left = 0
    for role in roles:
        if role in resident:
            left += resident[role] if gpu.is_cpu else idle_bytes(shapes[role], sections[role].precision, stages[role])
    return {"engines at rest": left} if left else {}

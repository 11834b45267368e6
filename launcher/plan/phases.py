"""What lies on a GPU in each phase of a recipe: the engine at work, and whatever else is there meanwhile.

Engines that are not trained are moved to the host (`engine.training.models`). Encoding, mining and evaluation hold
copies for inference instead, with all engines at rest; a phase with an opponent holds its frozen weights beside the
model in training. When a run starts, all engines are made before any is moved away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.models import BottleneckConfig, CondenserConfig, LexicalConfig, RankerConfig, RetrieverConfig
from engine.config.recipe import Config
from engine.config.timetable import AUTO, Phase
from engine.errors import ConfigError
from engine.index.plan import IndexPlan
from engine.models.lexical import LOGIT_BYTES
from launcher.plan.activations import ELEMENT_BYTES, Inputs, Numerics, inference_bytes
from launcher.plan.hardware import GIB, Gpu
from launcher.plan.memory import StepMemory, buckets_of, idle_bytes, step_memory
from launcher.plan.models import ModelShape, all_of, encoder_of, reranker_of

CONTEXT_BYTES = int(0.6 * GIB)
"""CUDA's context with its loaded kernels and cuBLAS's workspace (assumed)."""
NCCL_BYTES = int(0.5 * GIB)
"""NCCL's buffers where there is more than one rank (assumed)."""
FRAGMENTATION = 0.06
"""Of tensors, what torch's allocator cannot reuse (assumed)."""
_EXACT_SEARCH_BYTES = int(0.25 * GIB)
"""A block of documents, and the scores of a block of queries with it, in `engine.index.exact`."""
_FAISS_SCRATCH_BYTES = int(1.5 * GIB)
"""What FAISS reserves on a GPU of more than 8 GiB for its intermediate results, by its default."""
_POOL_COPIES, _SCORE_COPIES, _LOGIT_COPIES = 3, 4, 2
_PREDICTED, _PREDICTION_COPIES = 0.8, 3
"""Of the tokens, what a bottleneck model predicts: the encoder 30 %, the decoder half. A Condenser predicts 15 % of two
spans twice, which is less."""
NO_INDEX = IndexPlan("", 1, 0, 0, 0, "disk", None, None, 1.0)
"""Stands for the index's plan where only training is asked about."""


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
    """One training phase, as a rank sees it."""

    phase: Phase
    """The row of the timetable."""
    batches: tuple[Inputs, ...]
    """Of one micro-batch."""
    queries: int
    """Of a rank in a step."""
    micro_queries: int
    """Of a micro-batch."""
    micro_batches: int
    extra: int = 0
    """Bytes of the pool of representations, and of a lexical retriever's logits."""
    frozen: int = 0
    """Bytes of the opponent's weights."""
    scored: tuple[Inputs, ...] = ()
    """What the opponent scores for a micro-batch."""

    @property
    def name(self) -> str:
        """What people call the phase."""
        return self.phase.name.replace("warmup", "warm-up").replace("_", " ")

    @property
    def model(self) -> str:
        """Whom it trains."""
        return self.phase.model

    @property
    def visits(self) -> int:
        """How often the recipe comes to it."""
        return len(self.phase.visits)

    @property
    def cached(self) -> bool:
        """Whether gradient caching computes every forward twice: a pool's loss needs all micro-batches at once."""
        return self.phase.pool != "none" and self.micro_batches > 1


def training_work(config: Config, shapes: Mapping[str, ModelShape], world_size: int) -> list[Work]:
    """List the training phases that take steps, in the order of the timetable.

    Args:
        config: The recipe.
        shapes: Of all models, by name.
        world_size: Ranks, which share each batch.

    Raises:
        ConfigError: A batch cannot be shared equally; all of them are named.
    """
    phases = config.timetable.phases
    uneven = [f"{phase.section}.batch_size={phase.batch_size}" for phase in phases if phase.batch_size % world_size]
    if uneven:
        raise ConfigError(
            f"{world_size} ranks cannot share {', '.join(uneven)} equally",
            expected="batches that the number of ranks (nodes times GPUs a node) divides",
            remedy=f"use multiples of {world_size}, or other numbers of nodes and GPUs",
        )
    return [_work(config, shapes, phase, world_size) for phase in phases if phase.total_steps]


def _work(config: Config, shapes: Mapping[str, ModelShape], phase: Phase, world_size: int) -> Work:
    own, width = phase.batch_size // world_size, 1 + phase.num_negatives
    micro, opponent = min(own, _most_queries(config, phase, width)), phase.opponent
    pool = {"none": 0, "rank": own * width, "world": world_size * own * width}[phase.pool]
    return Work(
        phase,
        _inputs(config, phase.model, micro, width),
        queries=own,
        micro_queries=micro,
        micro_batches=math.ceil(own / micro),
        extra=4 * (_POOL_COPIES * pool * shapes[phase.model].dimension + _SCORE_COPIES * own * pool)
        + _logit_bytes(config, shapes, phase, micro, width)
        + _prediction_bytes(config, shapes[phase.model], phase, micro),
        frozen=shapes[opponent].weights * ELEMENT_BYTES[config.models[opponent].precision] if opponent else 0,
        scored=_inputs(config, opponent, micro, width) if opponent else (),
    )


def _logit_bytes(config: Config, shapes: Mapping[str, ModelShape], phase: Phase, queries: int, width: int) -> int:
    """Return what a lexical retriever's logits take in a backward: their gradient, twice."""
    section = config.models[phase.model]
    if not isinstance(section, LexicalConfig):
        return 0
    tokens = sum(inputs.rows * inputs.length for inputs in _inputs(config, phase.model, queries, width))
    return _LOGIT_COPIES * tokens * shapes[phase.model].dimension * ELEMENT_BYTES[section.precision]


def _prediction_bytes(config: Config, shape: ModelShape, phase: Phase, micro: int) -> int:
    """Return what predictions over the vocabulary take, of a model that makes some: in float32, with their gradient."""
    section = config.models[phase.model]
    if not isinstance(section, BottleneckConfig):
        return 0
    vocabulary = shape.embedding // shape.hidden
    return int(4 * _PREDICTION_COPIES * _PREDICTED * micro * section.max_length * vocabulary)


def _most_queries(config: Config, phase: Phase, width: int) -> int:
    """Return the queries of a micro-batch; where it is cut by tokens, those that fit with inputs of full length."""
    if phase.micro_batch_tokens is None or phase.micro_batch_tokens == AUTO:
        return phase.micro_batch_size  # what is found by trial is not known here
    tokens = sum(inputs.rows * inputs.length for inputs in _inputs(config, phase.model, 1, width))
    return max(1, phase.micro_batch_tokens // tokens)


def _inputs(config: Config, model: str, queries: int, width: int) -> tuple[Inputs, ...]:
    """Return what a model computes of queries with so many documents each: pairs, or both sides by themselves."""
    section = config.models[model]
    rows = queries * width * (2 if isinstance(section, CondenserConfig) else 1)  # two spans of a document
    documents = Inputs(rows, section.max_length)
    if isinstance(section, RankerConfig | BottleneckConfig):
        return (documents,)
    return Inputs(queries, config.query_max_length), documents


def numerics_of(config: Config, model: str, on_cpu: bool) -> Numerics:
    """Return the types and kernels that a model trains with."""
    section = config.models[model]
    return Numerics(section.precision, section.attention, section.gradient_checkpointing is True, on_cpu)


def memory_of(config: Config, shape: ModelShape, work: Work, stage: int, world_size: int, on_cpu: bool) -> StepMemory:
    """Estimate a step of a training phase under a ZeRO stage."""
    return step_memory(
        shape,
        work.batches,
        numerics_of(config, work.model, on_cpu),
        stage=stage,
        world_size=world_size,
        num_micro_batches=work.micro_batches,
        buckets=buckets_of(config.models[work.model], stage),
        extra=work.extra,
        opponent=work.frozen,
    )


def phases(
    config: Config,
    shapes: Mapping[str, ModelShape],
    works: list[Work],
    stages: Mapping[str, int],
    world_size: int,
    plan: IndexPlan,
    gpu: Gpu,
    searched: int = 0,
) -> list[PhaseMemory]:
    """List what lies on a GPU in each phase under given ZeRO stages; on a CPU, what a rank holds.

    Args:
        config: The recipe.
        shapes: Of all models, by name.
        works: From `training_work`.
        stages: ZeRO stage of each model.
        world_size: Ranks.
        plan: Of the index.
        gpu: The device.
        searched: Bytes of an index that FAISS searches on the device, 0 where it does not.
    """
    resident: dict[str, int] = {}
    at_rest: dict[str, int] = {}
    trained: list[PhaseMemory] = []
    for work in works:
        memory = memory_of(config, shapes[work.model], work, stages[work.model], world_size, gpu.is_cpu)
        resident[work.model] = memory.resident - memory.opponent
    for model, own in resident.items():
        left = idle_bytes(shapes[model], config.models[model].precision, stages[model])
        at_rest[model] = own if gpu.is_cpu else left
    for work in works:
        memory = memory_of(config, shapes[work.model], work, stages[work.model], world_size, gpu.is_cpu)
        parts = {
            f"{work.model} resident": memory.resident - memory.opponent,
            memory.worst_moment: memory.peak - memory.resident,
        }
        if memory.opponent:
            parts[f"frozen {work.phase.opponent}"] = memory.opponent
        shares_device = config.timetable.beside and not config.refresh_devices
        if shares_device and not work.phase.is_warmup and work.model == reranker_of(config):
            parts["the refresh beside it"] = _beside(config, shapes, gpu)
        others = sum(left for model, left in at_rest.items() if model != work.model)
        trained.append(PhaseMemory(work.name, parts | _idle(others)))
    idle = _idle(sum(at_rest.values()))
    start = PhaseMemory("start and resume", {f"{all_of(len(shapes))} engines": sum(resident.values())})
    if not config.learns_from_queries:
        measured = (PhaseMemory(f"measure {model}", _inference(config, shapes, model, gpu) | idle) for model in shapes)
        return [start, *trained, *measured]
    encoder, reranker = encoder_of(config), reranker_of(config)
    searching = {"exact search": _EXACT_SEARCH_BYTES} if plan.exact else {}
    if searched:
        searching = {"index": searched, "FAISS's scratch": _FAISS_SCRATCH_BYTES}
    return [
        start,
        *trained,
        *(
            PhaseMemory(f"encode, mine {model}", _inference(config, shapes, model, gpu) | idle)
            for model in config.timetable.encoders
            if isinstance(config.models[model], LexicalConfig) and model != encoder
        ),
        PhaseMemory("encode, mine", _inference(config, shapes, encoder, gpu) | searching | idle),
        PhaseMemory("evaluate", _inference(config, shapes, reranker or encoder, gpu) | idle),
    ]


def needed_bytes(phase: PhaseMemory, world_size: int, gpu: Gpu) -> int:
    """Return what a phase takes of a device, with its context, NCCL's buffers and fragmentation."""
    if gpu.is_cpu:
        return phase.tensors
    return int(phase.tensors * (1 + FRAGMENTATION)) + CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def _inference(config: Config, shapes: Mapping[str, ModelShape], model: str, gpu: Gpu) -> dict[str, int]:
    """Return the parts of a pass without gradients: packed rows, of one query's pairs where a ranker scores."""
    numerics, section = numerics_of(config, model, gpu.is_cpu), config.models[model]
    settings = config.evaluation
    named = config.index.tokens_per_batch if isinstance(section, RetrieverConfig | LexicalConfig) else None
    # What trials find fits by itself: planned is what they begin with.
    tokens = max(settings.tokens_per_batch, named if isinstance(named, int) else 0)
    tokens = min(tokens, 1024) if gpu.is_cpu else tokens
    rows = max(1, tokens // section.max_length)
    if isinstance(section, RankerConfig):
        rows = min(rows, settings.rerank_depth)
    inputs = Inputs(rows, section.max_length)
    copies = shapes[model].weights * numerics.element
    parts = {f"frozen {model}": copies, "a batch's activations": inference_bytes(shapes[model], inputs, numerics)}
    if isinstance(section, LexicalConfig):
        logits = rows * section.max_length * shapes[model].dimension * numerics.element
        parts["a batch's logits"] = min(LOGIT_BYTES, logits)
    return parts


def _beside(config: Config, shapes: Mapping[str, ModelShape], gpu: Gpu) -> int:
    """Return what a rank's companion holds: the encoder of the queries, and on a GPU a context of its own."""
    return sum(_inference(config, shapes, encoder_of(config), gpu).values()) + (0 if gpu.is_cpu else CONTEXT_BYTES)


def _idle(left: int) -> dict[str, int]:
    """Name what engines at rest leave on the device; on a CPU, where they stay, all of them."""
    return {"engines at rest": left} if left else {}

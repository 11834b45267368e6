"""What ranks send each other and what passes through the shared file system, in bytes.

Collectives are counted for ring algorithms: an all-reduce of B bytes sends 2 B (W - 1) / W from each rank, a gather or
a scatter half of that. What DeepSpeed does: without ZeRO and under ZeRO-1 gradients are reduced once a step; under
ZeRO-2 and 3 after every micro-batch. Under ZeRO-1 and 2 that is an all-reduce too, each rank keeping its part
(`use_multi_rank_bucket_allreduce`), and the new weights are gathered after the step. Under ZeRO-3 weights are gathered
for each forward pass and kept for its backward pass (1e9 live parameters), and gradients are scattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.recipe import Config
from engine.index.estimate import IndexEstimate
from engine.index.plan import IndexPlan
from launcher.plan.activations import ELEMENT_BYTES
from launcher.plan.corpus import Corpus
from launcher.plan.models import ModelShape, encoder_of
from launcher.plan.phases import Work
from launcher.plan.storage import mined_queries, refreshes

ASSUMED_REFINE = 4
"""Candidates re-scored for each document asked for, where tuning chooses."""
_CANDIDATE_BYTES = 12
_EXCHANGED_BYTES = 16
"""Of a candidate that goes to the host of its embedding (`engine.index.held.scores`): document, place, score."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one kind in one iteration."""

    what: str
    per_rank: float
    """Sent over the network by each rank, or read and written by it, on average."""
    total: float
    """By all ranks."""
    way: str
    """`network`, the shared file system (`files`), or the hosts' own disks (`local disks`)."""
    how: str


def gradient_bytes(
    shape: ModelShape, precision: str, *, stage: int, world_size: int, micro_batches: int, forwards: int = 1
) -> float:
    """Return what a rank sends in one optimizer step.

    Args:
        shape: The model.
        precision: Of weights, gradients and their reduction.
        stage: ZeRO stage.
        world_size: W; nothing is sent by a single rank.
        micro_batches: Of a rank in a step.
        forwards: Forward passes of a micro-batch, two with gradient caching; under ZeRO-3 each gathers the weights.
    """
    once = (world_size - 1) / world_size * shape.parameters * ELEMENT_BYTES[precision]
    return {
        0: 2 * once,
        1: 3 * once,
        2: (2 * micro_batches + 1) * once,
        3: micro_batches * (forwards + 1) * once,
    }[stage]


def pool_bytes(work: Work, dimension: int, world_size: int) -> float:
    """Return what a rank sends in one step to share document embeddings and their gradients with all ranks."""
    if work.phase.pool != "world":
        return 0.0
    pool = world_size * work.queries * (1 + work.phase.num_negatives) * dimension * 4
    return 2 * (world_size - 1) / world_size * pool


def iteration_traffic(
    config: Config,
    corpus: Corpus,
    shapes: Mapping[str, ModelShape],
    works: list[Work],
    stages: Mapping[str, int],
    world_size: int,
    plan: IndexPlan,
    needs: IndexEstimate,
    shards_bytes: int,
) -> list[Traffic]:
    """List what one iteration moves.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        shapes: Of all models, by name.
        works: The training phases.
        stages: ZeRO stage of each model.
        world_size: Ranks.
        plan: Of the index.
        needs: What the index takes.
        shards_bytes: Of the token shards.
    """
    rows: list[Traffic] = []
    for work in works:
        if work.phase.is_warmup:
            continue
        sent = gradient_bytes(
            shapes[work.model],
            config.models[work.model].precision,
            stage=stages[work.model],
            world_size=world_size,
            micro_batches=work.micro_batches,
            forwards=1 + work.cached,
        )
        steps = work.phase.steps
        how = f"{steps} steps of {_size(sent)} under ZeRO-{stages[work.model]}"
        rows.append(Traffic(f"gradients of the {work.model}", sent * steps, sent * steps * world_size, "network", how))
    rows += _refresh(config, corpus, plan, needs, shards_bytes, world_size)
    rows += _weights(config, shapes, works, world_size)
    return rows


def _refresh(
    config: Config, corpus: Corpus, plan: IndexPlan, needs: IndexEstimate, shards_bytes: int, world_size: int
) -> list[Traffic]:
    """List what encoding, index and mining read and write; nothing where no model's index is mined."""
    mined = refreshes(config.timetable)
    if not mined:
        return []
    embeddings = needs.embeddings_bytes
    width = embeddings / corpus.documents
    queries, depth = mined_queries(config.timetable, corpus, mined[-1]), mined[-1].top_k * 5 // 4
    refine, local = plan.refine_factor or ASSUMED_REFINE, config.index.embeddings == "local"
    at = "local disks" if local else "files"
    found: list[tuple[str, float, str, str]] = [("token shards", shards_bytes, "files", "read by the encoder")]
    if plan.exact:
        found.append(("embeddings", 3 * embeddings, at, "written, read for tuning, and read for mining"))
    else:
        found.append(("embeddings", 2 * embeddings, at, "written, and read for exact search at tuning"))
        built = 2 * needs.parts_bytes + needs.merged_bytes
        if local:
            found.append(("embeddings", embeddings, at, "read again to fill the index"))
        else:
            built += embeddings
        how = "parts written and read, merged file written"
        found.append(("index", built, "files", how if local else f"embeddings read again, {how}"))
        loads = 2 * world_size if plan.placement == "memory" else 0
        if loads:
            found.append(("index", loads * needs.merged_bytes, "files", "loaded by each rank to mine and to evaluate"))
        scored = queries * depth * refine
        found.append(("embeddings", scored * width, at, f"read at random to re-score {refine} x top_k"))
        if local:
            how = "candidates and scores that hosts exchange, written and read"
            found.append(("re-scoring", 2 * _EXCHANGED_BYTES * scored, "files", how))
    kept = queries * mined[-1].top_k * _CANDIDATE_BYTES
    found.append(
        ("candidates", (3 + world_size) * kept, "files", "written in blocks, joined, and checked by each rank")
    )
    return [Traffic(what, size / world_size, size, way, how) for what, size, way, how in found if size]


def _weights(config: Config, shapes: Mapping[str, ModelShape], works: list[Work], world_size: int) -> list[Traffic]:
    """List what publishing, loading and checkpointing weights moves."""
    rows, encoder = [], encoder_of(config)
    for model, shape in shapes.items():
        visited = [work.phase for work in works if work.model == model and not work.phase.is_warmup]
        if not visited:
            continue
        # Encoding, tuning, mining and evaluation load the encoder; evaluation and the next phase another model.
        loads = 4 if model == encoder else 2
        size = 4 * shape.weights
        published = size * (1 + loads * world_size)
        rows.append(
            Traffic(
                f"weights of the {model}", published / world_size, published, "files", f"1 write, {loads} loads a rank"
            )
        )
        saves = sum(-(-phase.steps // config.run.checkpoint_every_steps) for phase in visited)
        written = 2 * 12 * shape.parameters * saves
        how = f"{saves} written and read back"
        rows.append(Traffic(f"checkpoints of the {model}", written / world_size, written, "files", how))
    return rows


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"

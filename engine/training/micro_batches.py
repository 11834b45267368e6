"""Finding the largest micro-batches that fit the device, before a phase's first step (`micro_batch_tokens: auto`).

A trial is a whole step of the phase at learning rate 0: batches, passes, clipping and the optimizer's own memory are
those of training, and no weight changes. Memory grows with the tokens of a micro-batch along a straight line, so two
small trials tell how many tokens reach the limit, and a third confirms it. No trial is made to run out of memory: one
rank that does would leave the others in a collective, and DeepSpeed's buffers half filled.

What was found is written into the run folder, so that a resumed run cuts its batches in the same places, which dropout
depends on. Samples and loss are the same for any cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.timetable import AUTO, Phase
from engine.data.batches import StepSamples
from engine.data.prefetch import map_tensors
from engine.errors import ConfigError
from engine.log import get_logger
from engine.run import Stage
from engine.training.backend import TrainedModel
from engine.training.checkpoint import Checkpoints
from engine.training.loop import Objective
from shards.files import read_record, write_json

logger = get_logger(__name__)

USED = 0.9
"""Of the memory that this process can have, what a trial may reach; the rest is for batches that are longer."""
FIRST_TOKENS = 8192
"""Of the first trial."""
_GROWTH, _ENOUGH, _MOST_TRIALS = 8, 1.1, 5


@dataclass(frozen=True, slots=True)
class Found:
    """What fits, for one phase.

    Attributes:
        tokens: Of a micro-batch on one rank.
        bytes: Of device memory that it takes at the most, over all ranks.
        limit_bytes: What it may take, of the smallest device.
        bytes_per_token: By how much the need grows; 0 where one trial took a rank's whole share of the step.
    """

    tokens: int
    bytes: int
    limit_bytes: int
    bytes_per_token: float


class DeviceMemory:
    """A GPU's memory, as this process sees it.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reachable(self) -> int:
        """Return the bytes that this process has or can have, beside what other processes hold."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device))

    def forget(self) -> None:
        """Give back what is not in use, and begin to watch for the most."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def measure(self) -> tuple[int, int]:
        """Return the most bytes since `forget`, and what is in use now."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device), torch.cuda.memory_allocated(self._device)


def memory_of(device: torch.device) -> DeviceMemory | None:
    """Return a device's memory; None for a CPU, where taking too much is no error that could be told from a crash."""
    return DeviceMemory(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class _Record:
    """The file: what was found, by phase."""

    phases: dict[str, Found]


def fit_micro_batches(stage: Stage, model: TrainedModel, checkpoints: Checkpoints, objective: Objective) -> None:
    """Let an objective cut its batches into the largest micro-batches that fit, where the recipe leaves that to us.

    A collective. On a CPU, whose memory has no such limit, micro-batches are counted by `micro_batch_size`.

    Args:
        stage: Where this runs.
        model: The engine of the phase, on its device.
        checkpoints: Of this model, to know whether the phase has begun.
        objective: Its samples are replaced by samples that are cut.

    Raises:
        ConfigError: The phase has begun without a record of what fits.
    """
    visit = objective.samples.visit
    phase = visit.phase
    if phase.micro_batch_tokens != AUTO or not phase.steps:
        return
    memory = memory_of(model.device)
    if memory is None:
        logger.info("%s: on a CPU, micro-batches have the micro_batch_size=%d", phase.name, phase.micro_batch_size)
        objective.samples = _cut_by(objective.samples, None)
        return
    path = stage.run.folder.micro_batches
    known = stage.run.coordinator.only_rank_zero(f"{phase.name}: known micro-batches", lambda: _read(path, phase.name))
    if known is not None:
        found = _adapted(Found(**known), _limit_of_all(stage, memory), phase)
    else:
        _require_unbegun(phase, visit.number, checkpoints, stage.name)
        found = _try_out(stage, model, objective, memory)
        stage.run.coordinator.only_rank_zero(f"{phase.name}: micro-batches", lambda: _write(path, phase.name, found))
        logger.info(
            "%s: micro-batches of %d tokens take %.1f GiB of the %.1f GiB that they may",
            phase.name,
            found.tokens,
            found.bytes / 2**30,
            found.limit_bytes / 2**30,
        )
    objective.samples = _cut_by(objective.samples, found.tokens)


def next_tokens(tried: Mapping[int, int], limit_bytes: int, at_rest_bytes: int, whole_tokens: int) -> int | None:
    """Choose how many tokens to try next.

    Args:
        tried: Tokens of a micro-batch to the bytes that it took; at least one.
        limit_bytes: What it may take.
        at_rest_bytes: What the model takes between steps; one trial's need above it is put down to its tokens.
        whole_tokens: Tokens of a rank's whole share of a step, beyond which there is nothing to win.

    Returns:
        The next number; None where the largest that fits is known closely enough.
    """
    largest = max(tried)
    if tried[largest] > limit_bytes or largest >= whole_tokens or len(tried) >= _MOST_TRIALS:
        return None
    reached = largest + (limit_bytes - tried[largest]) / max(1.0, bytes_per_token(tried, at_rest_bytes))
    proposed = int(min(reached, largest * _GROWTH, whole_tokens))
    return proposed if proposed >= min(_ENOUGH * largest, whole_tokens) else None


def bytes_per_token(tried: Mapping[int, int], at_rest_bytes: int) -> float:
    """Return by how much the need grows with a token: between the two largest trials, or above the state at rest."""
    *others, largest = sorted(tried)
    if not others:
        return (tried[largest] - at_rest_bytes) / largest
    return (tried[largest] - tried[others[-1]]) / (largest - others[-1])


def _try_out(stage: Stage, model: TrainedModel, objective: Objective, memory: DeviceMemory) -> Found:
    """Take trial steps of growing micro-batches, and bring the model back to where it was."""
    samples, coordinator = objective.samples, stage.run.coordinator
    phase = samples.visit.phase
    model.begin_stage(phase.optim)
    model.train()
    whole = max(coordinator.gather(f"{phase.name}: tokens of a step", _tokens_of_share(objective)))
    tried: dict[int, int] = {}
    limit, at_rest, tokens = _limit_of_all(stage, memory), 0, min(FIRST_TOKENS, whole)
    while tokens is not None:
        objective.samples = _cut_by(samples, tokens)
        own = _take_trial_step(model, objective, memory)
        measured = coordinator.gather(f"{phase.name}: memory of {tokens} tokens", own)
        tried[tokens], at_rest = max(peak for peak, _ in measured), max(rest for _, rest in measured)
        tokens = next_tokens(tried, limit, at_rest, whole)
    fitting = [one for one in tried if tried[one] <= limit] or [min(tried)]
    best = max(fitting)
    return Found(best, tried[best], limit, bytes_per_token(tried, at_rest) if len(tried) > 1 else 0.0)


def _take_trial_step(model: TrainedModel, objective: Objective, memory: DeviceMemory) -> tuple[int, int]:
    """Take the phase's first step at learning rate 0, and return the most memory it took, and what stays."""
    device = model.device
    batch = map_tensors(objective.prepare(objective.samples.visit.first_step), lambda tensor: tensor.to(device))
    memory.forget()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        objective.backward(model, batch)
        model.rehearse_step()
    return memory.measure()


def _limit_of_all(stage: Stage, memory: DeviceMemory) -> int:
    """Return what a trial may take on the device with the least memory."""
    return int(min(stage.run.coordinator.gather("memory of the devices", int(USED * memory.reachable()))))


def _adapted(known: Found, limit_bytes: int, phase: Phase) -> Found:
    """Take what an earlier start found; on devices with less memory, as many tokens fewer as that needs."""
    excess = known.bytes - limit_bytes
    if excess <= 0:
        return known
    if not known.bytes_per_token:
        raise ConfigError(
            f"{phase.section}.micro_batch_tokens=auto took {known.bytes} bytes where the run began; here there are "
            f"{limit_bytes}",
            expected="devices of the same memory",
            remedy=f"set {phase.section}.micro_batch_tokens to a number",
        )
    tokens = max(1, int(known.tokens - excess / known.bytes_per_token))
    logger.warning(
        "%s: this run's micro-batches of %d tokens do not fit the devices here: %d tokens are taken",
        phase.name,
        known.tokens,
        tokens,
    )
    return dataclasses.replace(known, tokens=tokens)


def _tokens_of_share(objective: Objective) -> int:
    """Count the tokens of this rank's share of the first step, as micro-batches are cut by them."""
    samples = objective.samples
    groups = samples.share(samples.groups(samples.visit.first_step))
    return sum(max(count(group) for count in objective.token_counts) for group in groups)


def _require_unbegun(phase: Phase, visit_number: int, checkpoints: Checkpoints, stage: str) -> None:
    position = checkpoints.position
    if visit_number or (position is not None and position.stage == stage):
        raise ConfigError(
            f"{phase.section}.micro_batch_tokens is auto, but the phase has begun with micro-batches of a given size",
            expected="auto from the phase's first step on: trials forget the optimizer's moments",
            remedy=f"set {phase.section}.micro_batch_tokens to a number",
        )


def _cut_by(samples: StepSamples[Any], tokens: int | None) -> StepSamples[Any]:
    phase = dataclasses.replace(samples.visit.phase, micro_batch_tokens=tokens)
    return samples.of(dataclasses.replace(samples.visit, phase=phase))


def _read(path: Path, phase: str) -> dict[str, float] | None:
    if not path.exists():
        return None
    found = read_record(path, _Record, "the record of micro-batches").phases.get(phase)
    return None if found is None else dataclasses.asdict(found)


def _write(path: Path, phase: str, found: Found) -> None:
    known = read_record(path, _Record, "the record of micro-batches").phases if path.exists() else {}
    write_json(path, dataclasses.asdict(_Record({**known, phase: found})))

"""Where `gradient_checkpointing: auto` recomputes activations: only where a model's training would not fit without.

Recomputing costs a third of a step's time and changes no number beyond rounding, so it is decided by the estimate of
`launcher.plan.phases` for the devices at hand, and may be decided otherwise when a run goes on elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch

from engine.config.recipe import Config
from launcher.plan.hardware import Gpu, find_gpu
from launcher.plan.models import ModelShape
from launcher.plan.phases import NO_INDEX, needed_bytes, phases, training_work

USED = 0.9
"""Of a device's memory, what the estimate may reach."""


def device_here(device: torch.device, ranks_on_host: int) -> Gpu:
    """Describe the device of this rank by the memory that it has for itself.

    Args:
        device: Where its models run.
        ranks_on_host: Ranks that share the host's memory, where that is a CPU.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Gpu("gpu", memory, 0.0, 0.0, 0.0)
    cpu, memory = find_gpu("cpu"), psutil.virtual_memory().total // ranks_on_host
    return Gpu(cpu.name, memory, cpu.bf16_flops, cpu.fp32_flops, cpu.link_bytes)


def decide_recomputation(config: Config, shapes: Mapping[str, ModelShape], gpu: Gpu, world_size: int) -> Config:
    """Replace `auto` in all models' sections by what their memory needs.

    Args:
        config: The recipe.
        shapes: Of all models, by name.
        gpu: The device of each rank.
        world_size: Ranks.

    Returns:
        The recipe with true or false in each section.

    Raises:
        ConfigError: The ranks cannot share a batch.
    """
    undecided = [name for name, section in config.models.items() if section.gradient_checkpointing == "auto"]
    if not undecided:
        return config
    plain = _with(config, dict.fromkeys(undecided, False))
    works = training_work(plain, shapes, world_size)
    stages = {name: section.zero_stage for name, section in plain.models.items()}
    needed = {
        phase.name: needed_bytes(phase, world_size, gpu)
        for phase in phases(plain, shapes, works, stages, world_size, NO_INDEX, gpu)
    }
    full = {work.model for work in works if needed[work.name] > USED * gpu.memory_bytes}
    return _with(config, {name: name in full for name in undecided})


def _with(config: Config, decided: Mapping[str, bool]) -> Config:
    sections = {
        name: config.models[name].model_copy(update={"gradient_checkpointing": chosen})
        for name, chosen in decided.items()
    }
    return config.model_copy(update=sections)

"""Where an engine keeps its float32 weights and Adam's moments: the same picture of ZeRO 0 to 3.

DeepSpeed spreads this state over the ranks in a different way at each stage, and flattens and pads it. Here all of it
is a list of fragments: a run of a parameter's elements, counted in the flattened parameter, as views of the memory in
which this rank holds them. The fragments of all ranks together cover every trained parameter. So what is read from or
written to them says nothing about the number of ranks or the stage. F: elements of a fragment.

    stage 0, fp32            every rank holds every parameter whole (as does DeepSpeed's wrapper for bf16 and fp16)
    stages 1 and 2           a group's parameters lie end to end in one vector, of which a rank holds an equal part
    stage 3                  a rank holds an equal part of every parameter
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import (  # type: ignore[import-untyped]
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
)
from torch import Tensor

from engine.errors import TrainingError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each element."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of a parameter's elements with the state that trains them, as views: writing to them changes the engine.

    Attributes:
        name: The parameter.
        start: The first element's place in the flattened parameter.
        parts_F: `weights` (the float32 master copy), `exp_avg` and `exp_avg_sq`, each [F].
        steps: Optimizer steps that the moments have seen, a scalar; under ZeRO parameters share it.
    """

    name: str
    start: int
    parts_F: dict[str, Tensor]
    steps: Tensor

    @property
    def length(self) -> int:
        """Number of elements, F."""
        return self.parts_F["weights"].numel()

    def narrow(self, start: int, length: int) -> Fragment:
        """Return a part of this fragment, `start` counted from its own beginning."""
        parts = {part: tensor_F.narrow(0, start, length) for part, tensor_F in self.parts_F.items()}
        return Fragment(self.name, self.start + start, parts, self.steps)


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed's wrappers step.

    Raises:
        TrainingError: It is none of torch's.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainingError(f"DeepSpeed wraps an optimizer of type {type(optimizer).__name__}, not one of torch")
    return optimizer


def fragments(engine: Any) -> Iterator[Fragment]:
    """Show the state of an engine that this rank holds; the model must be on its device.

    Args:
        engine: A DeepSpeed engine around torch's AdamW. State that its first step would make is made here.

    Yields:
        Fragments in the order of the model's parameters; without ZeRO every rank yields all.
    """
    wrapper = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    parameters = [parameter for parameter in engine.module.parameters() if id(parameter) in names]
    if engine.zero_optimization_stage() == 3:
        found = (_of_stage_3(wrapper, names[id(parameter)], parameter) for parameter in parameters)
    elif engine.zero_optimization_stage() > 0:
        found = (_of_stage_1_or_2(wrapper, names[id(parameter)], parameter) for parameter in parameters)
    else:
        masters = _whole_masters(wrapper)
        found = (_whole(wrapper, names[id(p)], masters.get(id(p), p)) for p in parameters)
    yield from (fragment for fragment in found if fragment is not None)


def refresh_weights(engine: Any) -> None:
    """Bring the weights that the forward pass uses in line with the float32 master copies. A collective."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        wrapper.checkpoint_event_prologue()  # gives up whole parameters, which would be of before
        pairs = zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True)
        for number, (used, master) in enumerate(pairs):
            used.data.copy_(master.data)
            wrapper._unflatten_partitioned_parameters(number)
        wrapper.checkpoint_event_epilogue()  # gathers those again that stay whole between steps
    elif engine.zero_optimization_stage() > 0:
        wrapper.update_lp_params()
    else:
        masters = _whole_masters(wrapper)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.data.copy_(masters[id(parameter)].data)


def _of_stage_3(wrapper: Any, name: str, parameter: Any) -> Fragment | None:
    part = parameter.ds_tensor.ds_numel  # padded, so that all ranks hold equally many
    start = part * torch.distributed.get_rank()
    length = min(part, parameter.ds_numel - start)
    if length <= 0:
        return None
    group = wrapper.grad_position[wrapper.get_param_id(parameter)][0]
    state = _state_of(wrapper, wrapper.fp32_partitioned_groups_flat[group])
    parts = {"weights": safe_get_local_fp32_param(parameter)}
    parts |= {moment: safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
    return Fragment(name, start, {part: tensor.detach()[:length] for part, tensor in parts.items()}, state["step"])


def _of_stage_1_or_2(wrapper: Any, name: str, parameter: Any) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it lies in other ranks' parts
        return None
    (flat,) = torch_optimizer(wrapper).param_groups[mapping.param_group_index]["params"]
    state, place = _state_of(wrapper, flat), mapping.hp_fragment_address
    vectors = {"weights": flat.detach()} | {moment: state[moment] for moment in MOMENTS}
    parts = {part: vector.narrow(0, place.start, place.numel) for part, vector in vectors.items()}
    return Fragment(name, mapping.lp_fragment_address.start, parts, state["step"])


def _whole(wrapper: Any, name: str, master: Tensor) -> Fragment:
    state = _state_of(wrapper, master)
    parts = {"weights": master.detach()} | {moment: state[moment] for moment in MOMENTS}
    return Fragment(name, 0, {part: tensor.view(-1) for part, tensor in parts.items()}, state["step"])


def _whole_masters(wrapper: Any) -> dict[int, Tensor]:
    """Return the master copy of each 16-bit parameter by its id; empty where the parameters themselves are trained."""
    return {
        id(parameter): master
        for parameters, masters in zip(
            getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=True
        )
        for parameter, master in zip(parameters, masters, strict=True)
    }


def _state_of(wrapper: Any, trained: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of what it steps, made as its first step makes it where there was none yet."""
    state: dict[str, Tensor] = torch_optimizer(wrapper).state[trained]
    if not state:
        state["step"] = torch.zeros((), device=trained.device)  # where the fused kernel wants it
        state |= {moment: torch.zeros_like(trained, requires_grad=False) for moment in MOMENTS}
    return state

"""DeepSpeed engines: one for each model, each with its own configuration, optimizer and ZeRO stage.

All that depends on the ZeRO stage or the numeric type is in this file and in `engine.training.fragments`: how a model
is wrapped, stepped, saved, gathered and moved out of the way while the other model works. Batch sizes, learning rate
and clipping are ours and are written into DeepSpeed's configuration; a DeepSpeed file that sets one of them is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped]
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum  # type: ignore[import-untyped]
from torch import Tensor, nn

from engine.config.models import ModelConfig
from engine.config.shipped import SHIPPED
from engine.config.training import OptimConfig
from engine.errors import ConfigError, TrainingError
from engine.training.fragments import Fragment, fragments, refresh_weights, torch_optimizer
from engine.training.gradient_norm import look_once
from engine.training.muon import import_muon
from engine.training.parameter_groups import parameter_groups
from engine.training.state import rank_share

_OWNED_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
    }
)
_CONFIG_FOLDER = SHIPPED / "deepspeed"
_BUFFERS = (
    OffloadStateTypeEnum.lp_params,
    OffloadStateTypeEnum.lp_grads,
    OffloadStateTypeEnum.contiguous_grad_buffer,
)
_OFFLOADED = {
    1: (*_BUFFERS, OffloadStateTypeEnum.hp_params),
    2: (*_BUFFERS, OffloadStateTypeEnum.hp_params),
    3: _BUFFERS,
}
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        grad_norm: Global gradient norm before clipping; None where the step was skipped.
        applied: False where fp16's loss scaling found an overflow and skipped the update.
    """

    grad_norm: float | None
    applied: bool


class TrainedModel:
    """A model in a DeepSpeed engine.

    Args:
        name: The model's name in the recipe.
        module: The model on the CPU, in float32.
        config: Its ZeRO stage and numeric type.
        optim: Optimizer of its first stage; learning rates are set at every step.
        head: Names of the parameters that may have a learning rate of their own (`OptimConfig.head_lr_scale`); none
            where no stage gives them one.
    """

    def __init__(
        self, name: str, module: nn.Module, config: ModelConfig, optim: OptimConfig, head: Collection[str] = ()
    ) -> None:
        self.name = name
        self.zero_stage, self.precision = config.zero_stage, config.precision
        self._offloaded = False
        self._engine = _initialize(module, config, optim, head)
        if hasattr(self._loss_scaler, "raise_error_at_min_scale"):
            self._loss_scaler.raise_error_at_min_scale = (
                False  # steps skipped in a row are counted by `engine.training.guards`
            )

    @property
    def module(self) -> nn.Module:
        """The wrapped model; under ZeRO-3 its parameters are partitioned."""
        module: nn.Module = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return torch.device(self._engine.device)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model's forward. Under ZeRO-3 this is a collective: all ranks call it equally often."""
        return self._engine(**inputs)

    def train(self) -> None:
        """Switch dropout on."""
        self._engine.train()

    def begin_stage(self, optim: OptimConfig) -> None:
        """Take over a stage's clipping, weight decay, and the rate of the head beside that of all else."""
        self._engine._config.gradient_clipping = optim.max_grad_norm
        inner = self._engine.optimizer
        if hasattr(inner, "clip_grad"):
            inner.clip_grad = optim.max_grad_norm
        for group in inner.param_groups:
            group["betas"], group["eps"] = optim.betas, optim.eps
            if group.get("decayed", True):
                group["weight_decay"] = optim.weight_decay
            group["lr_scale"] = optim.head_lr_scale if group.get("of_head", False) else 1.0

    def backward(self, loss: Tensor, *, last: bool, share: float = 1.0) -> None:
        """Accumulate the gradient of one micro-batch's loss.

        Args:
            loss: Scalar, mean over the micro-batch.
            last: Whether the optimizer step follows; only then gradients are reduced over the ranks.
            share: What this micro-batch weighs in the step, 1 / number of micro-batches for a mean over all.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss.float() * (share * self._own_scale), scale_wrt_gas=False)

    def step(self, lr: float) -> StepReport:
        """Update the weights with the accumulated gradients, unless these are not finite.

        Args:
            lr: Learning rate of this step; the head's is this times the stage's `head_lr_scale`.

        Raises:
            TrainingError: They are not, in fp32 or bf16; the weights are as before. In fp16 the step is skipped.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        plain = self.zero_stage == 0 and self.precision == "fp32"  # where DeepSpeed looks at no norm
        norm = self._reduced_grad_norm() if plain else None
        self._require_finite(norm)
        scale = self._own_scale
        self._engine.step()
        if norm is None and (reported := self._engine.get_global_grad_norm()) is not None:
            norm = float(reported) / scale
        if not self._engine.was_step_applied():
            if self.precision != "fp16":
                self._require_finite(math.nan if norm is None else norm)
            return StepReport(None, applied=False)
        self._require_finite(norm)
        return StepReport(norm, applied=True)

    def rehearse_step(self) -> None:
        """Go through the optimizer's step for the memory it takes: no weight changes, its moments are forgotten."""
        scale = self.loss_scale_state
        self.step(0.0)
        self.restore_loss_scale(scale)
        self.reset_optimizer()

    def _require_finite(self, norm: float | None) -> None:
        if norm is not None and not math.isfinite(norm):
            raise TrainingError(
                f"the {self.name}'s gradient is not finite (norm {norm})",
                expected="finite gradients at every step; no checkpoint was taken since",
                remedy="lower the learning rate, or train in bf16 or fp32",
            )

    def _reduced_grad_norm(self) -> float:
        """Return the norm that DeepSpeed does not report without ZeRO; the gradients are already averaged."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments and step count, as a freshly made optimizer would have none."""
        for state in torch_optimizer(self._engine.optimizer).state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Gather all weights on the CPU of rank 0. A collective.

        Returns:
            Parameter name to tensor on rank 0, an empty mapping elsewhere.
        """
        keep = not dist.is_initialized() or dist.get_rank() == 0
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            whole = (
                deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
                if self.zero_stage == 3
                else contextlib.nullcontext()
            )
            with whole:
                if keep:
                    gathered[name] = parameter.detach().to("cpu", copy=True)
        if keep:
            gathered |= {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}
        return gathered

    def parameter_sizes(self) -> dict[str, int]:
        """Return the trained parameters with their numbers of elements, the same on all ranks."""
        return {
            name: int(getattr(parameter, "ds_numel", parameter.numel()))
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }

    def fragments(self) -> list[Fragment]:
        """Show the float32 weights and moments that this rank holds; the model is on its device."""
        return list(fragments(self._engine))

    def own_fragments(self) -> list[Fragment]:
        """Show those that it alone answers for: the ranks' together are the whole state, each element once."""
        if self.zero_stage > 0 or not dist.is_initialized():
            return self.fragments()
        return list(rank_share(self.fragments(), dist.get_rank(), dist.get_world_size()))

    def refresh_weights(self) -> None:
        """Take over float32 weights that were written to `fragments`. A collective."""
        refresh_weights(self._engine)

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take over other weights and forget the moments; the model is on its device. A collective.

        Args:
            state: Parameters by this module's names, whole, on any device.

        Raises:
            TrainingError: One is missing or of another size.
        """
        for fragment in self.fragments():
            found = state.get(fragment.name)
            if found is None or found.numel() < fragment.start + fragment.length:
                raise TrainingError(
                    f"the {self.name}'s {fragment.name} cannot be taken over: "
                    + ("it is missing" if found is None else f"there are {found.numel()} elements"),
                    expected="the weights of the same model",
                )
            part_F = found.detach().reshape(-1).narrow(0, fragment.start, fragment.length)
            fragment.parts_F["weights"].copy_(part_F)
        self.refresh_weights()
        self.reset_optimizer()

    @property
    def loss_scale_state(self) -> dict[str, float]:
        """How far fp16's dynamic loss scaling is; empty for other numeric types."""
        scaler = self._loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER_STATE if hasattr(scaler, name)}

    def restore_loss_scale(self, state: Mapping[str, float]) -> None:
        """Go on with a loss scaling that `loss_scale_state` described, as far as this ZeRO stage has the same."""
        scaler = self._loss_scaler
        for name, value in state.items():
            if hasattr(scaler, name):  # DeepSpeed without ZeRO knows no hysteresis
                setattr(scaler, name, value)

    @property
    def _own_scale(self) -> float:
        """What the loss is scaled by here: in fp16 without ZeRO, DeepSpeed divides by it but never multiplies."""
        return float(self._loss_scaler.cur_scale) if self.precision == "fp16" and self.zero_stage == 0 else 1.0

    @property
    def _loss_scaler(self) -> Any:
        if self.precision != "fp16":
            return None
        wrapper = self._engine.optimizer
        return wrapper.loss_scaler if self.zero_stage > 0 else wrapper.loss_scale_config

    def offload(self) -> None:
        """Move weights, gradients and optimizer to host memory; `reload` brings them back.

        DeepSpeed moves what it holds under ZeRO 1 to 3, but under ZeRO-3 the float32 copies and the moments only for
        an optimizer of its own, so these are moved here; without ZeRO everything is.
        """
        if self._offloaded:
            return
        if self.zero_stage == 0:
            self.module.to("cpu")
        else:
            pinned = self.device.type != "cpu"
            self._engine.offload_states(include=_OFFLOADED[self.zero_stage], pin_memory=pinned)
        self._move_optimizer(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._offloaded = True

    def reload(self) -> None:
        """Bring back what `offload` moved away."""
        if not self._offloaded:
            return
        if self.zero_stage == 0:
            self.module.to(self.device)
        else:
            self._engine.reload_states()
        self._move_optimizer(self.device)
        self._offloaded = False

    def _move_optimizer(self, device: torch.device) -> None:
        for state in torch_optimizer(self._engine.optimizer).state.values():
            for key, value in state.items():
                if torch.is_tensor(value) and value.dim():  # the step count stays where the kernel wants it
                    state[key] = value.to(device)
        if self.zero_stage == 3:
            for master in self._engine.optimizer.fp32_partitioned_groups_flat:
                master.data = master.data.to(device)


def _initialize(module: nn.Module, config: ModelConfig, optim: OptimConfig, head: Collection[str]) -> Any:
    # Fused: one pass over weights, gradients and moments, on a CPU several times as fast as tensor operations in turn.
    groups = parameter_groups(module, optim, head)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    import_muon()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, optim))
    if config.zero_stage in (1, 2) and engine.device.type == "cuda":
        look_once(engine.optimizer)
    return engine


def deepspeed_config(config: ModelConfig, optim: OptimConfig) -> dict[str, Any]:
    """Merge the DeepSpeed file of a model with the numbers that our configuration owns.

    Raises:
        ConfigError: The file is missing, is no JSON object, sets a number that we own, or names another ZeRO stage.
    """
    path = config.deepspeed or _CONFIG_FOLDER / f"zero{config.zero_stage}.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"the DeepSpeed file {path} cannot be read: {error}", remedy="name a JSON file") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"the DeepSpeed file {path} holds no JSON object", remedy="begin from configs/deepspeed")
    clash = sorted(_OWNED_KEYS & settings.keys())
    if clash:
        raise ConfigError(
            f"the DeepSpeed file {path} sets {', '.join(clash)}",
            expected="these in the recipe, which writes them into DeepSpeed's configuration",
            remedy="remove them from the file",
        )
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage != config.zero_stage:
        raise ConfigError(
            f"the DeepSpeed file {path} has stage {stage}, the recipe zero_stage {config.zero_stage}",
            expected="the same stage in both",
            remedy=f"set zero_stage={stage}, or correct the file",
        )
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # accumulation boundaries are set at every backward instead
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return dict(settings)


def require_precision(config: ModelConfig, name: str) -> None:
    """Refuse a numeric type in which DeepSpeed does not train on this machine.

    Args:
        config: Of the model.
        name: Of its section.

    Raises:
        ConfigError: It does not.
    """
    here = get_accelerator()
    supported = {"fp32": True, "bf16": bool(here.is_bf16_supported()), "fp16": bool(here.is_fp16_supported())}
    if not supported[config.precision]:
        others = [precision for precision, found in reversed(supported.items()) if found]
        raise ConfigError(
            f"{name}.precision is {config.precision}, in which DeepSpeed does not train on the {here.device_name()} of "
            f"{socket.gethostname()}",
            expected=" or ".join(others),
            remedy=f"set {name}.precision={others[0]}, or run on a device that computes in {config.precision}",
        )

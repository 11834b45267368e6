"""The norm of a step's gradients under ZeRO 1 and 2, found in few launches.

DeepSpeed looks at every gradient by itself, first for numbers that are not finite, then for its norm: some ten launches
each, while the device is idle. A norm that is not finite tells the same, and DeepSpeed skips the step for it, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def look_once(wrapper: Any) -> None:
    """Let DeepSpeed's optimizer of ZeRO 1 or 2 find the norm of its gradients at once, and skip steps by it alone.

    Args:
        wrapper: DeepSpeed's, which checks gradients (`check_grad_overflow`) and computes their norm.
    """

    def none_found() -> Tensor:
        return torch.zeros(1, dtype=torch.bool, device=wrapper.device)

    def norm(gradients: Iterable[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        return norm_over_ranks(gradients, wrapper.dp_process_group, wrapper.device)

    wrapper.has_overflow_partitioned_grads_serial = none_found
    wrapper.get_grad_norm_direct = norm


def norm_over_ranks(gradients: Iterable[Tensor], group: Any, device: torch.device | str) -> Tensor:
    """Return the L2 norm of gradients that lie in parts on several ranks. A collective.

    Args:
        gradients: This rank's parts, of any floating type; DeepSpeed's padding among them is zeros.
        group: Of the ranks.
        device: Where the collective's backend works.

    Returns:
        A float32 scalar; -1 where a gradient is not finite, which DeepSpeed takes for a step to be skipped.
    """
    own = [gradient.detach() for gradient in gradients]
    squares = torch.zeros((), dtype=torch.float32, device=device)
    if own:
        squares += torch.stack(torch._foreach_norm(own, 2, dtype=torch.float32)).square().sum()
    dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)

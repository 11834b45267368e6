"""Turns query-document pairs into the ranker's scores, as fast as the device allows.

As in `engine.models.encode`, nothing here is a collective operation, inputs are batched by length, and every thread of
a CPU computes batches of its own.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.models.batch import PackedBatch
from engine.models.inference import compute_by_length
from engine.models.packed import Scorer
from engine.models.template import Collator, Input


def score_inputs(
    scorer: Scorer, collator: Collator, inputs: Sequence[Input], *, tokens_per_batch: int, device: torch.device
) -> npt.NDArray[np.float64]:
    """Score pairs by frozen weights.

    Args:
        scorer: `Ranker.scorer()`, built once for many calls: on a CPU it lays out the weights anew.
        collator: `Ranker.collator()` of the same ranker.
        inputs: The pairs, in any order.
        tokens_per_batch: Tokens of a forward at most, padding included; a longer pair has a forward of its own. On a
            CPU 1024 at most, which is faster.
        device: Where the scorer is.

    Returns:
        Raw logits [N], in the order of the inputs.
    """
    scores_N = np.empty(len(inputs), dtype=np.float64)

    def forward(places: list[int]) -> Tensor:
        batch = collator([inputs[place] for place in places])
        if isinstance(batch, PackedBatch):
            batch = batch.pin_memory() if device.type == "cuda" else batch
            return scorer(batch.to(device, non_blocking=True))
        return scorer({name: tensor.to(device) for name, tensor in batch.items()})

    def keep(places: list[int], scores: Tensor) -> None:
        scores_N[places] = scores.numpy()

    lengths = [len(one.ids) for one in inputs]
    compute_by_length(
        forward, lengths, keep, tokens_per_batch=tokens_per_batch, padded=not collator.packs, device=device
    )
    return scores_N

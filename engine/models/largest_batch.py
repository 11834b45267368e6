"""Finding by trial how many tokens a device encodes at once, where `index.tokens_per_batch` is auto.

Batches are doubled until the device runs out of memory or encodes no faster. A forward without gradients is no
collective, and running out of memory leaves nothing half done, so that, unlike in training
(`engine.training.micro_batches`), the limit may be touched. What an embedding is does not depend on the batch but for
rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.errors import ModelError
from engine.models.template import InputTemplate

_GAIN = 1.05
"""By how much a batch of twice the size must be faster, for a token, to be taken."""
_LEAST_TOKENS = 128
_MOST_TOKENS = 2**20
_REPEATS = 2
"""Forwards that are timed, after one that is not."""


@dataclass(frozen=True, slots=True)
class BatchTrial:
    """How a device took a batch.

    Attributes:
        tokens: Of the batch.
        tokens_per_second: At which it was encoded; None where the device ran out of memory.
    """

    tokens: int
    tokens_per_second: float | None


def try_batches(forward: Callable[[int], None], device: torch.device, *, first: int) -> list[BatchTrial]:
    """Encode larger and larger batches until the device has no memory for one, or a larger one is no faster.

    Where the first does not fit, smaller and smaller ones, until one does.

    Args:
        forward: Encodes a batch of about so many tokens.
        device: Where; what a failed trial has left in its memory is given back.
        first: Tokens to begin with.

    Returns:
        The trials in their order.

    Raises:
        ModelError: There is no memory for the smallest batch.
    """
    trials = [_try(forward, device, first)]
    while trials[-1].tokens_per_second is None:
        if trials[-1].tokens <= _LEAST_TOKENS:
            raise ModelError(
                f"{device} has no memory to encode {trials[-1].tokens} tokens at once",
                expected="memory for the encoder and a batch",
                remedy="free the device of other work, lower the model's max_length, or choose a smaller model",
            )
        trials.append(_try(forward, device, max(_LEAST_TOKENS, trials[-1].tokens // 2)))
    if len(trials) > 1:
        return trials
    rate = trials[0].tokens_per_second
    while rate is not None and 2 * trials[-1].tokens <= _MOST_TOKENS:
        before, rate = rate, None
        trials.append(_try(forward, device, 2 * trials[-1].tokens))
        if (found := trials[-1].tokens_per_second) is not None and found >= _GAIN * before:
            rate = found
    return trials


def fastest_of(trials: Sequence[BatchTrial]) -> int:
    """Return the tokens of the fastest batch that fits; of those that are as fast but for a twentieth, the smallest."""
    fitting = [(trial.tokens, trial.tokens_per_second) for trial in trials if trial.tokens_per_second is not None]
    best = max(rate for _, rate in fitting)
    return min(tokens for tokens, rate in fitting if _GAIN * rate > best)


def full_inputs(
    documents: Sequence[Sequence[int]], template: InputTemplate, max_length: int, tokens: int
) -> list[list[int]]:
    """Make the token ids of inputs that are as long as may be, and of about so many tokens together.

    Args:
        documents: Token ids of some documents, without special tokens, which are repeated; one at least is not empty.
        template: Counts the special tokens.
        max_length: Tokens of an input, special tokens included.
        tokens: Of all inputs, at least of one.
    """
    length = max(1, max_length - template.num_special_single)
    ids = [token for document in documents for token in document] or [0]
    whole = ids * -(-length // len(ids))
    return [whole[:length] for _ in range(max(1, tokens // max_length))]


def _try(forward: Callable[[int], None], device: torch.device, tokens: int) -> BatchTrial:
    try:
        forward(tokens)
        _wait(device)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            forward(tokens)
        _wait(device)
        return BatchTrial(tokens, _REPEATS * tokens / max(time.perf_counter() - start, 1e-9))
    except torch.OutOfMemoryError:
        pass  # outside of the handler, which holds the failed batch, its memory is given back
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return BatchTrial(tokens, None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

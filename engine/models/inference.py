"""Computes inputs in batches of similar length, whatever a forward makes of them.

On CPUs every thread computes batches of its own: operations so small lose more time where threads meet than they win,
and activations of few tokens stay in the core's cache. Batches are formed by lengths alone and each is computed by one
thread, so that a result's bytes do not depend on the number of threads. On a GPU a batch is prepared while the one
before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

PAD_TO_MULTIPLE_OF = 8
"""Padded lengths are multiples of this."""
CPU_TOKENS_PER_BATCH = 1024
"""A thread's activations of more tokens leave its cache: slower, measured by benchmarks/encode.py."""


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int, *, padded: bool = True) -> Iterator[list[int]]:
    """Group inputs of similar length under a budget of tokens.

    Args:
        lengths: Tokens of each input, special tokens included.
        tokens_per_batch: Tokens of a batch at most; an input that exceeds it alone is a batch of its own.
        padded: Count every input as long as the longest of its batch, rounded up.

    Yields:
        Places in `lengths`, longest first, so that a batch that does not fit into memory fails at the start. Every
        place is in one batch; the grouping depends on the lengths alone.
    """
    batch: list[int] = []
    tokens = padded_length = 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        counted = padded_length if padded else lengths[place]
        if batch and tokens + counted > tokens_per_batch:
            yield batch
            batch, tokens = [], 0
        if not batch:
            padded_length = -(-lengths[place] // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
            counted = padded_length if padded else lengths[place]
        batch.append(place)
        tokens += counted
    if batch:
        yield batch


def compute_by_length(
    forward: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    keep: Callable[[list[int], Tensor], None],
    *,
    tokens_per_batch: int,
    padded: bool,
    device: torch.device,
) -> None:
    """Compute inputs in batches of similar length, as fast as the device allows.

    Args:
        forward: Takes places in `lengths` and gives one row an input, on the device; called by threads on a CPU, so
            it switches inference mode on itself.
        lengths: Tokens of each input, special tokens included.
        keep: Takes the places and the rows, on the CPU, in any order of the batches; called by one thread.
        tokens_per_batch: Tokens of a batch at most, padding included; a longer input is a batch of its own. On a CPU
            1024 at most, which is faster.
        padded: Whether the batches are padded.
        device: Where `forward` computes.
    """
    on_cpu = device.type == "cpu"
    budget = min(tokens_per_batch, CPU_TOKENS_PER_BATCH) if on_cpu else tokens_per_batch
    batches = batches_by_length(lengths, budget, padded=padded)
    (_compute_by_threads if on_cpu else _compute_queued)(forward, batches, keep)


def _compute_by_threads(
    forward: Callable[[list[int]], Tensor],
    batches: Iterable[list[int]],
    keep: Callable[[list[int], Tensor], None],
) -> None:
    """Compute batches on the CPU, each by one thread, and keep each as it is finished."""
    num_threads = torch.get_num_threads()
    # The setting is each thread's own, but also what threads to come begin with.
    executor = ThreadPoolExecutor(num_threads, "encode", initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = {executor.submit(forward, places): places for places in batches}
        for future in as_completed(running):
            keep(running.pop(future), future.result())
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def _compute_queued(
    forward: Callable[[list[int]], Tensor],
    batches: Iterable[list[int]],
    keep: Callable[[list[int], Tensor], None],
) -> None:
    """Compute batches on a GPU, and prepare each while the one before it is computed."""
    waiting: tuple[list[int], Tensor, torch.cuda.Event] | None = None
    for places in batches:
        rows_ND = forward(places).to("cpu", non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        if waiting:
            waiting[2].synchronize()
            keep(*waiting[:2])
        waiting = places, rows_ND, copied
    if waiting:
        waiting[2].synchronize()
        keep(*waiting[:2])

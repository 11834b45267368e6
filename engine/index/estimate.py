"""What an index will take: memory, disk, minutes, estimated and logged before anything is built."""

from __future__ import annotations

import time
from dataclasses import dataclass

import faiss
import torch

from engine.index.plan import IndexPlan, factory_sizes
from shards.files.sizes import size

_MATRIX, _LEAST_SECONDS = 1024, 0.1
_SHARE = 0.5
"""Share of a matrix product's rate that k-means and assignment reach (measured: 0.4 to 0.8)."""
_CODEBOOK_SHARE = 0.12
"""The same for codebooks, whose products are a few numbers wide."""
_CODEBOOK_POINTS = 256
_DISK_BYTES_PER_SECOND = 500e6
_GRAPH_VISITS = 1500
"""Centroids that a document is compared with on its way through a graph over them."""
_BLOCK_BYTES = 64 * 2**20
_UNIT_ROWS, _ROTATED_ROWS = 8192, 2**16
"""Rows of a unit of the sample, and those that OPQ learns from, at most."""
_CENTROID_BYTES, _ROW_BYTES, _EXCHANGED_BYTES = 20, 24, 20
"""Of a number of a centroid in a rank's memory (twice float32, a float64 sum, the new one), of a number of a row of a
unit (float32, sorted, and rounded in float64), and of a number of a centroid in files that a rank writes and reads."""
WARM_SHARE = 3
"""A warm start takes at most one part in so many of the iterations of a training from nothing, at least one."""


@dataclass(frozen=True, slots=True)
class IndexEstimate:
    """What an index takes; bytes and minutes."""

    codes_bytes: int
    ids_bytes: int
    lists_bytes: int
    """Centroids, graph, codebooks: the trained, empty index; and the padding of interleaved codes."""
    training_bytes: int
    """Of a rank while it trains: centroids, a copy and sums, a unit of the sample."""
    rotation_bytes: int
    """Of rank 0 more than that, at its start: the rows that OPQ or PCA learns from."""
    rank_bytes: int
    """Of a rank while it adds: the trained index, one part, a block of embeddings."""
    embeddings_bytes: int
    """On disk."""
    parts_bytes: int
    """On disk, until the merge is done or for good."""
    merged_bytes: int
    """On disk."""
    sample_bytes: int
    """On disk, while it trains."""
    train_minutes: float
    """Of one rank alone, from nothing; ranks share it."""
    warm_minutes: float
    """The same from the last index's lists, with as many iterations as are done at most."""
    rotate_minutes: float
    """Of OPQ, which is rank 0's work, from nothing."""
    exchange_bytes: int
    """Written and read by each rank in an iteration of k-means: sums and centroids."""
    add_minutes: float
    """Of one rank alone; ranks share it."""
    merge_minutes: float
    gigaflops: float
    """Rate of a matrix product that the minutes follow from."""

    @property
    def index_bytes(self) -> int:
        """Memory of the searchable index, or its mapped size."""
        return self.codes_bytes + self.ids_bytes + self.lists_bytes

    def lines(self, plan: IndexPlan) -> list[str]:
        """Say what was planned, why, and what it takes, in aligned lines."""
        lines = [("plan", f"{plan.factory}, placement {plan.placement}")]
        lines += [("because" if not place else "", reason) for place, reason in enumerate(plan.reasons)]
        disk = f"embeddings {size(self.embeddings_bytes)}"
        rotation = f"rotation {_time(self.rotate_minutes)} on rank 0, " if self.rotate_minutes else ""
        if not plan.exact:
            lines += [
                (
                    "index",
                    f"{size(self.index_bytes)}: codes {size(self.codes_bytes)}, ids {size(self.ids_bytes)}, lists and "
                    f"codebooks {size(self.lists_bytes)}",
                ),
                (
                    "memory",
                    f"training {size(self.training_bytes)}, adding {size(self.rank_bytes)} on each rank",
                ),
                (
                    "time",
                    f"train {_time(self.train_minutes)} (from the last index {_time(self.warm_minutes)} at most) and "
                    f"add {_time(self.add_minutes)} divided by the ranks, {rotation}merge {_time(self.merge_minutes)}, "
                    f"at {self.gigaflops:.0f} GFLOP/s of a matrix product",
                ),
            ]
            disk += f", parts {size(self.parts_bytes)}, merged {size(self.merged_bytes)}"
        return [f"{name:<8} {text}" for name, text in [*lines, ("disk", disk)]]


def estimate_index(
    plan: IndexPlan,
    *,
    num_documents: int,
    dimension: int,
    num_parts: int,
    embedding_bytes: int = 4,
    gigaflops: float = 50.0,
) -> IndexEstimate:
    """Estimate what a plan takes.

    Args:
        plan: From `plan_index`.
        num_documents: N.
        dimension: D.
        num_parts: Index parts, from `cut_parts`.
        embedding_bytes: Of one number of a stored embedding: 2 or 4.
        gigaflops: Rate of a float32 matrix product on one rank's device, such as `measured_gigaflops` returns.

    Returns:
        The estimate.
    """
    embeddings = num_documents * dimension * embedding_bytes
    if plan.exact:
        return IndexEstimate(0, 0, 0, 0, 0, _BLOCK_BYTES, embeddings, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, gigaflops)
    sizes = factory_sizes(plan.factory, dimension)
    rate, slow = gigaflops * 1e9 * _SHARE, gigaflops * 1e9 * _CODEBOOK_SHARE
    width, rotated = sizes.list_dimension, sizes.transform_bytes > 0
    clustering = 2 * plan.train_size * plan.num_lists * width * plan.num_iterations
    points = min(plan.train_size, _CODEBOOK_POINTS * sizes.num_codes)
    codebooks = 2 * points * sizes.num_codes * width * plan.num_iterations
    rotation = 0.0
    if plan.factory.startswith("OPQ"):  # it trains small codebooks anew for each of its steps
        rotation = (
            2
            * plan.num_iterations
            * (4 * points * dimension**2 / rate + 2 * points * sizes.num_codes * width * 4 / slow)
        )
    centroids = plan.num_lists * width
    rows = min(plan.train_size, _ROTATED_ROWS)
    train = (clustering / rate + codebooks / slow) / 60
    compared = min(_GRAPH_VISITS, plan.num_lists) if sizes.link_bytes else plan.num_lists
    coding = 2 * sizes.num_codes * width / slow + 2 * compared * width / (slow if sizes.link_bytes else rate)
    part = num_documents // num_parts * (plan.code_bytes + 8)
    lists_on_disk = num_documents * (plan.code_bytes + 8)
    merged = 0 if plan.placement == "parts" else lists_on_disk + sizes.trained_bytes + sizes.padding_bytes
    return IndexEstimate(
        num_documents * plan.code_bytes,
        8 * num_documents,
        sizes.trained_bytes + sizes.padding_bytes,
        _CENTROID_BYTES * centroids + min(plan.train_size, _UNIT_ROWS) * _ROW_BYTES * width,
        2 * 4 * rows * dimension * rotated,
        sizes.trained_bytes + 2 * part + 2 * _BLOCK_BYTES,
        embeddings,
        lists_on_disk,
        merged,
        4 * plan.train_size * width,
        train,
        train * max(1, plan.num_iterations // WARM_SHARE) / plan.num_iterations,
        rotation / 60,
        _EXCHANGED_BYTES * centroids,
        num_documents * (coding + 2 * dimension * width / rate * rotated) / 60,
        2 * (lists_on_disk + merged) / _DISK_BYTES_PER_SECOND / 60,
        gigaflops,
    )


def measured_gigaflops() -> float:
    """Measure the rate of a float32 matrix product for a tenth of a second, where k-means will run."""
    device = "cuda" if faiss.get_num_gpus() > 0 and torch.cuda.is_available() else "cpu"
    matrix = torch.ones(_MATRIX, _MATRIX, device=device)
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _LEAST_SECONDS or not done:
        float((matrix @ matrix)[0, 0])
        done += 1
    return done * 2 * _MATRIX**3 / max(seconds, _LEAST_SECONDS) / 1e9


def _time(minutes: float) -> str:
    if minutes >= 60:
        return f"{minutes / 60:.2g} h"
    return f"{minutes:.2g} min" if minutes >= 1 else f"{max(60 * minutes, 0.1):.2g} s"

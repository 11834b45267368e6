"""FAISS on a rank's own GPU: which indexes it takes there, and their copies.

Lists are searched there in training (`engine.index.kmeans`), parts are filled (`engine.index.train`), and a merged
index is searched (`engine.index.probe`), each rank on its own device. What FAISS takes on GPUs is known beforehand, so
that it is told before a run begins (`require_gpu_index`) and not in the middle of it; results agree to rounding. Both
packages with GPUs work by FAISS's own kernels, so that the limits are the same; those of cuVS are switched off.

Source: FAISS's wiki, "Faiss on the GPU", and its `GpuIndexIVFPQ`: the numbers of codes for which there are kernels, 8
bits each, the tables of which must fit into a block's shared memory, and at most 2,048 hits or lists of a query.

Shapes: D embedding dimension, M codes of a document.
"""

from __future__ import annotations

from typing import Any

import faiss
import torch

from engine.config.sections import IndexConfig
from engine.errors import ConfigError
from engine.index.plan import IndexPlan, empty_index
from engine.log import get_logger

log = get_logger(__name__)
NUM_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""M for which FAISS has kernels."""
MOST_SELECTED = 2048
"""Hits of a query, and lists that it visits, at most."""
_SHARED_BYTES = 48 * 1024
"""Of a block of threads, on every GPU that FAISS runs on."""
_ENTRIES = 256
"""Of a codebook of 8 bits."""


def num_gpus() -> int:
    """Return how many GPUs FAISS sees: 0 for a FAISS without GPU support."""
    return int(faiss.get_num_gpus())


def refusal_of(index: faiss.Index) -> str:
    """Return why FAISS has no form of an index for GPUs, in words; empty where it has one.

    Args:
        index: Trained or not.
    """
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexFlat):
        return ""
    coarse = faiss.downcast_index(inner.quantizer) if isinstance(inner, faiss.IndexIVF) else None
    if coarse is None:
        return f"it has no form of {type(inner).__name__} there"
    if not isinstance(coarse, faiss.IndexFlat):
        return f"it finds lists there by comparing all of them, and not through {type(coarse).__name__}"
    if type(inner) is faiss.IndexIVFFlat:
        return ""
    if type(inner) is not faiss.IndexIVFPQ:
        return f"it has no form of {type(inner).__name__} there"
    return _refusal_of_codes(int(inner.pq.M), int(inner.pq.nbits), int(inner.d), residual=bool(inner.by_residual))


def _refusal_of_codes(num_codes: int, bits: int, dimension: int, *, residual: bool) -> str:
    if bits != 8:
        return f"it takes codes of 8 bits there, these have {bits}"
    if num_codes not in NUM_CODES:
        return f"it takes {', '.join(map(str, NUM_CODES))} codes there, these are {num_codes}"
    if dimension % num_codes:
        return f"{num_codes} codes do not divide the {dimension} dimensions"
    if not residual:
        return "it takes codes of what is left of a vector beside its list's centroid there, these are of vectors"
    return ""


def needs_half_tables(num_codes: int) -> bool:
    """Tell whether the tables of M codes fit into shared memory in float16 alone: beyond 48 codes.

    Args:
        num_codes: M, one of `NUM_CODES`.
    """
    return 4 * _ENTRIES * num_codes > _SHARED_BYTES


def on_gpu(index: faiss.Index, device: torch.device | str) -> Any:
    """Return an index's copy on a rank's GPU where this FAISS has one and takes the kind, else the index itself.

    Args:
        index: Trained, with or without documents.
        device: The rank's. On a CPU, the index stays what it is.
    """
    device = torch.device(device)
    if device.type != "cuda" or num_gpus() == 0:
        return index
    if reason := refusal_of(index):
        log.info("FAISS keeps this index on the CPU: %s", reason)
        return index
    number = torch.cuda.current_device() if device.index is None else device.index
    resources = getattr(faiss, "StandardGpuResources")()  # noqa: B009 - the CPU build has no such name
    options = getattr(faiss, "GpuClonerOptions")()  # noqa: B009
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    # Of an index with codes, this is the type of their tables alone; of one without, that of its vectors.
    options.useFloat16 = isinstance(inner, faiss.IndexIVFPQ) and needs_half_tables(int(inner.pq.M))
    options.use_cuvs = False
    try:
        copy = getattr(faiss, "index_cpu_to_gpu")(resources, number, index, options)  # noqa: B009
    except RuntimeError as error:
        log.warning("FAISS cannot hold this index on GPU %d, it stays on the CPU: %s", number, _last_line(error))
        return index
    copy.referenced_resources = resources  # as long as the copy
    return copy


def from_gpu(copy: Any) -> faiss.Index:
    """Return the CPU's copy of an index on a GPU."""
    index: faiss.Index = getattr(faiss, "index_gpu_to_cpu")(copy)  # noqa: B009 - the CPU build has no such name
    return index


def require_gpu_index(settings: IndexConfig, plan: IndexPlan, dimension: int, device: torch.device) -> str:
    """Tell before a run where its index will be filled and searched, and refuse one that cannot be where it must.

    Args:
        settings: Says whether it must be on GPUs.
        plan: The index.
        dimension: D.
        device: This rank's.

    Returns:
        A line for the log; empty where there is nothing to tell.

    Raises:
        ConfigError: `index.gpu` is always, and the rank has no GPU, FAISS has none, or it takes no such index there.
    """
    if settings.gpu == "auto" and (device.type != "cuda" or num_gpus() == 0):
        return ""
    fact, remedy = _obstacle(plan, dimension, device)
    if fact and settings.gpu == "always":
        raise not_on_gpus(fact, remedy)
    if fact:
        return f"the index is filled and searched on CPUs, its lists are trained on each rank's GPU: {fact}"
    return f"the index {plan.factory} is trained, filled and searched by FAISS on each rank's GPU"


def not_on_gpus(fact: str, remedy: str) -> ConfigError:
    """Return the error of an index that must be on GPUs and cannot be, by what `index_obstacle` says of it."""
    return ConfigError(f"index.gpu is always, but {fact}", expected="an index on each rank's GPU", remedy=remedy)


def _obstacle(plan: IndexPlan, dimension: int, device: torch.device) -> tuple[str, str]:
    """Return what keeps an index from a rank's GPU, and what to do; empty where nothing does."""
    if device.type != "cuda":
        return f"this rank computes on {device}", "start where each rank has a GPU, or set index.gpu=auto"
    if num_gpus() <= (device.index or 0):
        packages = "install faiss-gpu or faiss-gpu-cuvs in place of faiss-cpu (the extras gpu and gpu-cuvs)"
        return f"FAISS {faiss.__version__} sees {num_gpus()} GPUs", f"{packages}, or set index.gpu=auto"
    return index_obstacle(plan, dimension)


def index_obstacle(plan: IndexPlan, dimension: int) -> tuple[str, str]:
    """Return what of an index keeps it from any GPU, and what to do; empty where nothing does.

    Args:
        plan: The index.
        dimension: D.
    """
    if plan.exact:
        return "", ""  # searched by torch, on the rank's device
    if plan.placement != "memory":
        return (
            f"the index is searched in {plan.placement}, where FAISS reads it from disk",
            "raise index.memory_gib, or set index.gpu=auto",
        )
    if reason := refusal_of(empty_index(plan.factory, dimension)):
        fitting = max(number for number in NUM_CODES if dimension % number == 0)
        return (
            f"FAISS does not take {plan.factory} on GPUs: {reason}",
            f"set index.factory=IVF{plan.num_lists},PQ{fitting}, or index.gpu=auto",
        )
    return "", ""


def _last_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]

"""Plans the index of a corpus: factory string, lists, codes, training and placement, by size and memory.

A plan is a function of the corpus's size and the settings alone, so a run that is resumed elsewhere plans the same.

Shapes: N documents, D embedding dimension, L inverted lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import faiss

from engine.config.sections import IndexConfig
from engine.errors import ConfigError

GIB = 2**30
FLAT = "Flat"
POINTS_PER_LIST = 39
"""Training points a centroid of k-means needs at least, by FAISS's guideline."""
FAST_SCAN = re.compile(r"x4fsr?(_\d+)?$")
"""Ending of the factory string of 4-bit codes that are interleaved in memory for vector instructions."""
_LEAST_PER_LIST = 128
"""Documents a list holds at least on average: shorter ones cost more in centroids and padding than they save."""
_EXACT_BELOW = 1000
"""Documents below which an index saves nothing."""
_GRAPH_FROM = 10_000_000
"""Documents from which centroids are found through a graph (HNSW), and codes have 8 bits behind a rotation (OPQ)."""
_HIGH_RECALL = 0.97
_WIDTHS = (4, 8, 12)
"""Dimensions of an 8-bit sub-quantizer, the widest code first; the first only for a recall target above the last."""
_DOCUMENTS_PER_PART, _LEAST_PARTS, _MOST_PARTS = 250_000, 8, 64
_CODES_PER_BLOCK = 32
"""Interleaved 4-bit codes that lie in one block."""
_LIST_OVERHEAD_BYTES = 24
"""Of a list in memory, beside its codes and ids: its place and lengths."""

Placement = Literal["memory", "disk", "parts"]


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """How an index is built and searched."""

    factory: str
    """FAISS factory string; `Flat` has no index at all: the stored embeddings are searched exactly."""
    num_lists: int
    """Inverted lists."""
    code_bytes: int
    """Bytes of a document's code."""
    train_size: int
    """Embeddings that train it."""
    num_iterations: int
    """Iterations of k-means."""
    placement: Placement
    """Merged and loaded; merged and mapped from disk; or not merged, its parts mapped from disk."""
    nprobe: int | None
    """Lists visited for a query; None: tuned after the build."""
    refine_factor: int | None
    """`refine_factor * top_k` candidates are re-scored exactly; None: tuned after the build."""
    recall_target: float
    """What tuning aims at."""
    reasons: tuple[str, ...] = field(default=(), compare=False)
    """Why, in words."""

    @property
    def exact(self) -> bool:
        """Whether there is no index."""
        return self.factory == FLAT


@dataclass(frozen=True, slots=True)
class FactorySizes:
    """What FAISS makes of a factory string."""

    num_lists: int
    num_codes: int
    """Entries in a codebook; 0 without product quantizer."""
    code_bytes: int
    list_dimension: int
    """Dimensions after OPQ or PCA, in which lists have their centroids."""
    link_bytes: int
    """Of a list in the graph over the centroids, if there is one."""
    transform_bytes: int
    """Of OPQ's or PCA's matrix."""
    fast_scan: bool

    @property
    def trained_bytes(self) -> int:
        """The memory of the trained, empty index: centroids, graph, codebooks, rotation."""
        lists = self.num_lists * (4 * self.list_dimension + self.link_bytes + _LIST_OVERHEAD_BYTES)
        return lists + 4 * self.num_codes * self.list_dimension + self.transform_bytes

    def index_bytes(self, num_documents: int) -> int:
        """Return the memory of the filled index."""
        return num_documents * (self.code_bytes + 8) + self.trained_bytes + self.padding_bytes

    @property
    def padding_bytes(self) -> int:
        """The memory of the empty places in the last block of each list, half a block on average."""
        return self.num_lists * self.code_bytes * _CODES_PER_BLOCK // 2 if self.fast_scan else 0


def plan_index(settings: IndexConfig, *, num_documents: int, dimension: int) -> IndexPlan:
    """Choose what is left open, by the size of the corpus and the memory, and check what is given.

    Called early too, so that an index that cannot be built stops a run before any work.

    Args:
        settings: What is asked for. `nprobe` is cut to the number of lists, `train_documents` to N.
        num_documents: N, at least 1.
        dimension: D.

    Returns:
        The plan.

    Raises:
        ConfigError: FAISS refuses the factory string, it has no inverted lists, the corpus (or `train_documents`) is
            smaller than the number of lists or of a codebook's entries, the index does not fit into the memory that is
            allowed where it must, or the floor lies above the target.

    Source:
        FAISS wiki, "Guidelines to choose an index", for the number of lists and of training points.
    """
    _check_goals(settings)
    factory, placement, memory_gib = settings.factory, settings.placement, settings.memory_gib
    reasons: list[str] = []
    if factory == "auto":
        factory, reasons = _choose_factory(num_documents, dimension, memory_gib, placement, settings.recall_target)
    if factory == FLAT:
        _refuse_for_flat(settings)
        reasons = reasons or ["exact search, as asked for"]
        return IndexPlan(FLAT, 1, 4 * dimension, 0, 0, "disk", None, None, settings.recall_target, tuple(reasons))
    sizes = factory_sizes(factory, dimension)
    points = 64 if num_documents < 1_000_000 else POINTS_PER_LIST + 1
    available = min(num_documents, settings.train_documents or points * max(sizes.num_lists, sizes.num_codes))
    _check_training(factory, sizes, available, num_documents)
    chosen, reason = _place(placement, factory, sizes, num_documents, dimension, memory_gib)
    return IndexPlan(
        factory,
        sizes.num_lists,
        sizes.code_bytes,
        available,
        settings.kmeans_iterations,
        chosen,
        min(settings.nprobe, sizes.num_lists) if settings.nprobe else None,
        settings.refine_factor,
        settings.recall_target,
        (*(reasons or [f"{factory}, as asked for"]), reason),
    )


def for_other_corpus(settings: IndexConfig, *, num_documents: int, dimension: int) -> IndexConfig:
    """Return the settings of an index for another corpus than they were made for, such as one to be evaluated on.

    Args:
        settings: Of the run.
        num_documents: N of the other corpus, at least 1.
        dimension: D.

    Returns:
        The same; or those of exact search, where N is too small to train such an index or for any to save something.
    """
    factory = settings.factory
    if factory != FLAT and num_documents >= _EXACT_BELOW:
        if factory == "auto":
            placement, memory_gib = settings.placement, settings.memory_gib
            factory, _ = _choose_factory(num_documents, dimension, memory_gib, placement, settings.recall_target)
        sizes = factory_sizes(factory, dimension)
        if min(num_documents, settings.train_documents or num_documents) >= max(sizes.num_lists, sizes.num_codes):
            return settings
    open_fields: dict[str, object] = {"nprobe": None, "refine_factor": None, "train_documents": None}
    return settings.model_copy(update={"factory": FLAT, "placement": "auto"} | open_fields)


def factory_sizes(factory: str, dimension: int) -> FactorySizes:
    """Ask FAISS what a factory string means.

    Args:
        factory: FAISS factory string.
        dimension: D.

    Raises:
        ConfigError: FAISS refuses it, or it has no inverted lists of its own.
    """
    index = empty_index(factory, dimension)  # kept alive: what is extracted from it does not own it
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    fast_scan = FAST_SCAN.search(factory) is not None
    quantizer, coarse = getattr(ivf, "pq", None), faiss.downcast_index(ivf.quantizer)
    # The graph has twice its degree of links at the bottom, where nearly all of it is, each 4 bytes.
    links = 4 * coarse.hnsw.nb_neighbors(0) if hasattr(coarse, "hnsw") else 0
    num_codes = int(quantizer.ksub) if quantizer is not None else 0
    transform = 4 * dimension * int(ivf.d) if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform) else 0
    return FactorySizes(int(ivf.nlist), num_codes, int(ivf.code_size), int(ivf.d), int(links), transform, fast_scan)


def empty_index(factory: str, dimension: int) -> Any:
    """Make an untrained index whose lists can be filled in parts.

    FAISS merges lists of interleaved 4-bit codes wrongly and beyond the end of its memory, so these are built as plain
    4-bit codes of the same meaning, and are interleaved after the merge.

    Args:
        factory: FAISS factory string.
        dimension: D.

    Raises:
        ConfigError: FAISS refuses it, or it has no inverted lists of its own.
    """
    try:
        index = faiss.index_factory(dimension, FAST_SCAN.sub("x4", factory), faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(index)
        outer: Any = faiss.downcast_index(index)
        if isinstance(outer, faiss.IndexPreTransform):
            outer = faiss.downcast_index(outer.index)
        if not isinstance(outer, faiss.IndexIVF):
            raise RuntimeError("the inverted lists lie inside another index")
        lists: Any = outer.invlists
        if not isinstance(faiss.downcast_InvertedLists(lists), faiss.ArrayInvertedLists):
            raise RuntimeError("its inverted lists cannot be merged")
        if isinstance(faiss.downcast_index(outer.quantizer), faiss.IndexIVF):
            raise RuntimeError("its lists lie in lists themselves, which FAISS cannot train")
        if "IVFPQR" in factory or (FAST_SCAN.search(factory) and not hasattr(outer, "pq")):
            raise RuntimeError("its codes cannot be merged")
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"FAISS cannot make {factory!r} for embeddings of {dimension} dimensions: {detail}",
            expected="auto, Flat, or a factory string with inverted lists, such as IVF128,PQ48x4fs or "
            "OPQ64,IVF16384,PQ64, in which the PQ number divides the dimensions",
            remedy="correct index.factory, or leave it out",
        ) from error
    if ending := FAST_SCAN.search(factory):
        outer.by_residual = ending.group().startswith("x4fsr")
    return index


def cut_parts(sizes: Sequence[int]) -> list[range]:
    """Cut the shards of a corpus into index parts, the units that ranks fill: a function of the corpus alone.

    Args:
        sizes: Documents in each shard.

    Returns:
        Ranges of shard numbers, contiguous and complete, about 250,000 documents each; at least 8 where there are as
        many shards, at most 64.
    """
    total = sum(sizes)
    wanted = min(_MOST_PARTS, max(_LEAST_PARTS, math.ceil(total / _DOCUMENTS_PER_PART)), len(sizes))
    parts: list[range] = []
    first = done = 0
    for number, size in enumerate(sizes):
        done += size
        left, shards_left = wanted - len(parts) - 1, len(sizes) - number - 1
        full = done * wanted >= total * (len(parts) + 1)
        if number == len(sizes) - 1 or shards_left == left or (full and left):
            parts.append(range(first, number + 1))
            first = number + 1
    return parts


def _choose_factory(
    num_documents: int,
    dimension: int,
    memory_gib: float,
    placement: Placement | Literal["auto"],
    recall_target: float,
) -> tuple[str, list[str]]:
    """Return the FAISS factory string for N documents of D dimensions, and why.

    Lists are 4 * sqrt(N) at any size, by what training, filling and searching them cost together (docs/scale.md).
    FAISS's guideline has more of them from ten million documents, for many searches of one index; here an index is
    trained at each refresh, and k-means costs as the square of their number.

    Below ten million documents codes have 4 bits, one for two dimensions: they train in seconds on one core (8-bit ones
    take ten times as long), take D/4 bytes a document and are scanned by vector instructions.
    """
    if num_documents < _EXACT_BELOW and placement == "auto":
        return FLAT, [f"exact search: fewer than {_EXACT_BELOW} documents, of which an index would save nothing"]
    num_lists = max(1, min(4 * math.isqrt(num_documents), num_documents // _LEAST_PER_LIST))
    lists = f"IVF{num_lists}" + ("_HNSW32" if num_documents >= _GRAPH_FROM else "")
    why = f"{num_lists} lists: 4 * sqrt(N), or what leaves {_LEAST_PER_LIST} documents in each"
    budget = memory_gib * GIB
    if num_documents < _GRAPH_FROM and placement in ("auto", "memory"):
        codes = _largest_divisor(dimension, dimension // 2)
        factory = f"{lists},PQ{codes}x4fs"
        if factory_sizes(factory, dimension).index_bytes(num_documents) <= budget:
            return factory, [why, f"{codes} codes of 4 bits: quick to train, scanned by vector instructions"]
    for width in _WIDTHS if recall_target > _HIGH_RECALL else _WIDTHS[1:]:
        codes = _largest_divisor(dimension, dimension // width)
        factory = f"OPQ{codes},{lists},PQ{codes}"
        if factory_sizes(factory, dimension).index_bytes(num_documents) <= budget:
            break
    goal = f"for recall {recall_target:g} within {memory_gib:g} GiB, as far as codes can"
    return factory, [why, f"{codes} codes of 8 bits, one for {dimension // codes} dimensions: {goal}"]


def _place(
    placement: Placement | Literal["auto"],
    factory: str,
    sizes: FactorySizes,
    num_documents: int,
    dimension: int,
    memory_gib: float,
) -> tuple[Placement, str]:
    needed = sizes.index_bytes(num_documents) / GIB
    size = f"the index takes {needed:.3g} GiB of the {memory_gib:g} allowed (index.memory_gib)"
    fits = needed <= memory_gib
    if placement == "memory" and not fits:
        raise ConfigError(
            f"index.placement is memory, but {size}",
            expected="an index that fits",
            remedy="set index.placement=auto, raise index.memory_gib, or name an index.factory with shorter codes",
        )
    if sizes.fast_scan and (placement in ("disk", "parts") or not fits):
        why = f"index.placement is {placement}" if fits else size
        raise ConfigError(
            f"{why}, but the 4-bit codes of {factory} are searched in memory only",
            expected="an index in memory, or codes that can be mapped from disk",
            remedy="leave index.factory out, or write x4 instead of x4fs in it",
        )
    if placement != "auto":
        return placement, f"placement {placement}, as asked for; {size}"
    return ("memory", f"in memory: {size}") if fits else ("parts", f"parts mapped from disk: {size}")


def _check_goals(settings: IndexConfig) -> None:
    if settings.recall_floor > settings.recall_target and None in (settings.nprobe, settings.refine_factor):
        raise ConfigError(
            f"index.recall_floor {settings.recall_floor} is above index.recall_target {settings.recall_target}, at "
            "which tuning stops",
            expected="a floor that is at most the target",
            remedy="raise index.recall_target, or lower index.recall_floor",
        )


def _check_training(factory: str, sizes: FactorySizes, available: int, num_documents: int) -> None:
    for needed, what in ((sizes.num_lists, "inverted lists"), (sizes.num_codes, "entries in a codebook")):
        if available < needed:
            raise ConfigError(
                f"the index {factory} has {needed} {what}, but {available} embeddings to train them "
                f"(the corpus has {num_documents} documents)",
                expected=f"at least {needed}, better {POINTS_PER_LIST * needed}",
                remedy="set index.factory=Flat, leave index.factory and index.train_documents out, or name smaller "
                "ones",
            )


def _refuse_for_flat(settings: IndexConfig) -> None:
    """Refuse what only a FAISS index has, all of it at once: the keys may stand in a file that comes along."""
    names = ("nprobe", "refine_factor", "train_documents", "placement")
    given = [name for name in names if getattr(settings, name) not in (None, "auto")]
    if given:
        are = ", ".join(f"index.{name} is {getattr(settings, name)!r}" for name in given)
        words = " ".join(f"index.{name}={'auto' if name == 'placement' else 'null'}" for name in given)
        raise ConfigError(
            f"{are} for exact search, which has no FAISS index",
            expected="none of what a FAISS index alone has",
            remedy=f"give {words}, too, or name another index.factory",
        )


def _largest_divisor(dimension: int, at_most: int) -> int:
    return next(number for number in range(max(1, at_most), 0, -1) if dimension % number == 0)

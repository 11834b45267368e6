"""AR2's warm-ups, which make the players' starting states.

Source: Zhang et al. 2022, "Adversarial Retriever-Ranker for Dense Text Retrieval", Algorithm 1, Table 9.
"""

from __future__ import annotations

from pydantic import Field

from engine.config.pools import BM25
from engine.config.sections import Section
from engine.config.training import OptimConfig, Tokens


class WarmupRetrieverConfig(Section):
    """G0: contrastive warm-up with in-batch and BM25's (or other) negatives (Algorithm 1 line 2, Eq. 2)."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps; 0 leaves the pre-trained retriever as G0."""
    batch_size: int = Field(128, ge=1)
    """Queries of a step over all ranks; their positives and hard negatives are shared in one pool."""
    micro_batch_size: int = Field(128, ge=1)
    """Queries a rank holds in memory at once; more are taken by gradient caching, which changes no number."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one forward on one rank, in place of `micro_batch_size`: as many queries as fit, at least one. `auto`:
    the most that a GPU's memory allows, found by trial before the phase's first step and recorded in the run folder."""
    hard_negatives: int = Field(1, ge=0)
    """Negatives of each query, added to the shared pool."""
    candidates: str = BM25
    """What they are drawn from: `bm25`; `zero_shot`, what the retriever itself finds before any training; `given`, the
    data's own negatives, as DPR's files have them; `given@NAME`, those of them that NAME proposed; or the path of a
    TREC run file that ranks the training queries. Where there is no BM25 (`bm25.enabled`), `bm25` stands for nothing,
    which is enough for `hard_negatives: 0`."""
    bm25_depth: int = Field(100, ge=1)
    """Best candidates from which they are drawn, whoever found them."""
    gather_negatives: bool = True
    """Share the pool across ranks (with gradients); without it, each rank has the pool of its own queries."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of this warm-up."""

    @property
    def draws(self) -> bool:
        """Whether it draws candidates."""
        return self.steps > 0 and self.hard_negatives > 0


class WarmupRankerConfig(Section):
    """D0: listwise warm-up on negatives from G0 (Algorithm 1 line 5, Eq. 7)."""

    steps: int = Field(2000, ge=0)
    """Optimizer steps; 0 leaves the ranker's head untrained."""
    batch_size: int = Field(64, ge=1)
    """Queries of a step over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one forward on one rank, in place of `micro_batch_size`: as many queries as fit, at least one. `auto`:
    the most that a GPU's memory allows, found by trial before the phase's first step and recorded in the run folder."""
    num_negatives: int = Field(15, ge=1)
    """Negatives of a query (n)."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of this warm-up."""

"""The sections of a lexical retriever's training: SPLADE's numbers.

Source: Formal et al. 2021, "SPLADE v2" (arXiv 2109.10086), and the configuration of its released code (naver/splade,
conf/train/config/splade.yaml).
"""

from __future__ import annotations

from pydantic import Field

from engine.config.sections import Section
from engine.config.training import CountedPhaseConfig, OptimConfig


class FlopsConfig(Section):
    """How sparse a lexical retriever's vectors are made."""

    query_flops: float = Field(0.5, ge=0)
    """Weight of the FLOPS penalty of queries (lambda_q; released configuration: 0.5). Higher: fewer words a query, and
    a faster search."""
    document_flops: float = Field(0.4, ge=0)
    """Weight of the FLOPS penalty of documents (lambda_d; released configuration: 0.4). Higher: fewer words a document,
    and a smaller index."""
    flops_steps: int = Field(50_000, ge=0)
    """Steps in which both rise from 0 with the square of the steps taken (T; released configuration: 50,000). 0: full
    weights from the start, which may empty all vectors. A phase of fewer steps does not come to the full weights."""


class LexicalPhaseConfig(FlopsConfig, CountedPhaseConfig):
    """The training of a lexical retriever: the contrast of the batch and hard negatives, and the FLOPS penalty."""

    steps: int | None = Field(150_000, ge=0)
    """Optimizer steps (released configuration: 150,000); null for `epochs`."""
    batch_size: int = Field(128, ge=1)
    """Queries of a step over all ranks (released configuration: 128); their positives and hard negatives are shared in
    one pool."""
    micro_batch_size: int = Field(16, ge=1)
    """Queries a rank holds in memory at once; more are taken by gradient caching, which changes no number. Logits weigh
    most: a number for each token and each word of the vocabulary."""
    hard_negatives: int = Field(1, ge=0)
    """Negatives of each query from its candidates, added to the shared pool (SPLADE: 1)."""
    gather_negatives: bool = True
    """Share the pool across ranks (with gradients); without it, each rank has the pool of its own queries. The penalty
    is of all ranks' texts in either case."""
    optim: OptimConfig = OptimConfig(lr=2e-5, weight_decay=0.01, warmup_ratio=0.04)
    """Optimizer (released configuration: 2e-5, decay 0.01, 6,000 of 150,000 steps of linear warm-up)."""

"""AR2's sections, and the timetable that their numbers make.

Source: Zhang et al. 2022, "Adversarial Retriever-Ranker for Dense Text Retrieval", Algorithm 1, Table 9.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from engine.config.models import RankerConfig, RetrieverConfig
from engine.config.negatives import NegativesConfig
from engine.config.pools import Pools
from engine.config.recipe import Config
from engine.config.sections import Section
from engine.config.timetable import Mining, Phase, Pool, Sizes, Timetable, WeightsOf, iteration_name
from engine.config.training import OptimConfig, PhaseConfig, Tokens

BM25, DENSE = "bm25", "dense"
"""The kinds of retriever that the game draws its negatives from."""


class WarmupRetrieverConfig(Section):
    """G0: contrastive warm-up with in-batch and BM25 negatives (Algorithm 1 line 2, Eq. 2)."""

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
    """BM25 negatives of each query, added to the shared pool."""
    bm25_depth: int = Field(100, ge=1)
    """BM25 hits from which they are drawn."""
    gather_negatives: bool = True
    """Share the pool across ranks (with gradients); without it, each rank has the pool of its own queries."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of this warm-up."""


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


class Ar2Config(Section):
    """The adversarial game (AR2 Algorithm 1 lines 6-16, Table 9)."""

    order: Literal["paper", "released"] = "paper"
    """`paper`: retriever, refresh, ranker. `released`: ranker and retriever on the same candidates, then refresh."""
    iterations: int = Field(10, ge=0, le=10000)
    """Iterations of the game (AR2: 10)."""
    num_negatives: int = Field(15, ge=1)
    """Negatives of a query, drawn afresh at every step (n)."""
    top_k: int = Field(100, ge=1)
    """Depth of the candidates from which they are drawn, positives taken out."""
    mine: Literal["all", "sampled"] = "all"
    """Training queries searched at a refresh: all, or those that the next phases draw (trains the same)."""
    further_retrievers: tuple[str, ...] = ()
    """Whose candidates are drawn from together with the retriever's own, `top_k` of each: `bm25`, and paths of TREC run
    files that rank the training queries. Left out, none, as in the paper."""
    negatives: NegativesConfig = NegativesConfig()
    """Filters and sampler of the game's negatives (docs/negatives.md). The default is the paper's: uniform, unfiltered.
    G0's warm-up draws from BM25's candidates as they are."""
    remove_answers: bool = True
    """Also take out documents that contain an answer, where the query has answers."""
    adversarial: Literal["paper", "with_positive", "released"] = "paper"
    """Form of Eq. 9: as printed (softmax over the negatives), with the positive in it, or as AR2's code has it."""
    adversarial_reduction: Literal["mean", "sum"] = "mean"
    """Mean over the queries, or the sum of the released code (which grows with the batch)."""
    adversarial_weight: float = Field(1.0, ge=0)
    """Weight of Eq. 9. The paper gives none; 1.0 is our reading. Released README: 0.5."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of Eq. 12. The paper gives none; 1.0 is our reading. Released README: 0.5."""
    reference_batch_size: int = Field(8, ge=1)
    """Queries to which `sum` is scaled, so that the form does not depend on the number of ranks (README: 8 a GPU)."""
    retriever: PhaseConfig = PhaseConfig(steps=1500, optim=OptimConfig(lr=1e-5))
    """The retriever's phase (lines 7-10)."""
    ranker: PhaseConfig = PhaseConfig(steps=500, optim=OptimConfig(lr=1e-6))
    """The ranker's phase (lines 12-15)."""

    @model_validator(mode="after")
    def _teaches(self) -> Ar2Config:
        if not self.iterations or not self.retriever.steps:
            return self
        if not self.distillation_weight and not self.adversarial_weight:
            raise ValueError(
                "adversarial_weight and distillation_weight are 0, so the retriever would learn nothing: raise one, or "
                "set retriever.steps to 0"
            )
        if not self.distillation_weight and self.num_negatives == 1 and self.adversarial == "paper":
            raise ValueError(
                "with num_negatives 1 and distillation_weight 0 the gradient of Eq. 9 as printed is 0: the retriever "
                "would learn nothing: raise one of them, or set adversarial to with_positive or released"
            )
        return self


class Ar2Recipe(Config):
    """AR2: a retriever and a ranker that play against each other."""

    algorithm: ClassVar[str] = "engine.ar2"

    recipe: Literal["ar2"] = "ar2"
    """The algorithm's name."""
    retriever: RetrieverConfig
    """G."""
    ranker: RankerConfig
    """D."""
    warmup_retriever: WarmupRetrieverConfig = WarmupRetrieverConfig()
    """G0."""
    warmup_ranker: WarmupRankerConfig = WarmupRankerConfig()
    """D0."""
    ar2: Ar2Config = Ar2Config()
    """The game."""

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out Algorithm 1, which depends on no size of the data."""
        return ar2_timetable(self.ar2, self.warmup_retriever, self.warmup_ranker)


def ar2_timetable(game: Ar2Config, warm_retriever: WarmupRetrieverConfig, warm_ranker: WarmupRankerConfig) -> Timetable:
    """Lay out Algorithm 1: what its lines train, and on what.

    Args:
        game: The iterations.
        warm_retriever: G0.
        warm_ranker: D0.
    """
    names = [iteration_name(iteration) for iteration in range(game.iterations + 1)]
    pools = _pools(game, warm_retriever.bm25_depth, names)
    fresh = names[1:] if game.order == "paper" else names[:-1]
    phases = (
        _phase(
            "warmup_retriever",
            "retriever",
            warm_retriever,
            num_negatives=warm_retriever.hard_negatives,
            candidates=(BM25,),
            pool="world" if warm_retriever.gather_negatives else "rank",
        ),
        _phase(
            "warmup_ranker",
            "ranker",
            warm_ranker,
            num_negatives=warm_ranker.num_negatives,
            candidates=(names[0],),
        ),
        _phase(
            "retriever",
            "retriever",
            game.retriever,
            num_negatives=game.num_negatives,
            candidates=tuple(names[:-1]),
            section="ar2.retriever",
            first_iteration=1,
            opponent="ranker",
        ),
        _phase(
            "ranker",
            "ranker",
            game.ranker,
            num_negatives=game.num_negatives,
            candidates=tuple(fresh),
            section="ar2.ranker",
            first_iteration=1,
        ),
    )
    return Timetable(
        phases=phases,
        minings=tuple(pools.minings.values()),
        iterations=game.iterations,
        in_each_iteration=(
            *("retriever", "encode", "index", "candidates"),
            *(["negatives"] if names[-1] in pools.joint and game.order == "paper" else []),
            *("ranker", "evaluate"),
        ),
        joint=pools.joint,
        mine_all=game.mine == "all",
        remove_answers=game.remove_answers,
        names={
            WeightsOf(model, iteration): letter + "0" * (iteration == 0)
            for model, letter in (("retriever", "G"), ("ranker", "D"))
            for iteration in range(game.iterations + 1)
        },
    )


def _pools(game: Ar2Config, bm25_depth: int, names: list[str]) -> Pools:
    """Gather what is mined: BM25's candidates for G0, and each iteration's, with what joins them in a pool."""
    alone = [Mining(BM25, BM25, None, bm25_depth, "warmup_retriever.bm25_depth")]
    alone += [
        Mining(name, DENSE, WeightsOf("retriever", iteration), game.top_k, "ar2.top_k")
        for iteration, name in enumerate(names)
    ]
    pools = Pools({mining.name: mining for mining in alone}, "ar2.top_k")
    for name in names:
        pools.add(name, (name, *game.further_retrievers), game.top_k, game.negatives)
    return pools


def _phase(
    name: str,
    model: str,
    settings: WarmupRetrieverConfig | WarmupRankerConfig | PhaseConfig,
    *,
    num_negatives: int,
    candidates: tuple[str, ...],
    section: str = "",
    first_iteration: int = 0,
    opponent: str | None = None,
    pool: Pool = "none",
) -> Phase:
    """Make a row of a section's numbers."""
    return Phase(
        name=name,
        section=section or name,
        model=model,
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        num_negatives=num_negatives,
        optim=settings.optim,
        candidates=candidates,
        first_iteration=first_iteration,
        opponent=opponent,
        pool=pool,
    )

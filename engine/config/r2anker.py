"""R2ANKER's sections, and the timetable that their numbers make.

Source: Zhou et al. 2023, "Towards Robust Ranker for Text Retrieval", section 3.4, appendices B and C. Where the paper
is silent, the field says what was chosen.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from engine.config.ar2 import BM25, DENSE
from engine.config.models import RankerConfig, RetrieverConfig
from engine.config.recipe import Config
from engine.config.sections import Section
from engine.config.timetable import Mining, Phase, Pool, Sizes, Timetable, WeightsOf, steps_of
from engine.config.training import CountedPhaseConfig, OptimConfig

JOINT = "joint"
"""Name of the pool that the ranker's negatives are drawn from."""
FIRST, SECOND = 1, 2
"""The states of a retriever: trained on BM25's negatives (D1, L1), then on its own (D2, L2)."""
RANKER_STATE = 1
"""The ranker's one state."""


class RetrieverStageConfig(CountedPhaseConfig):
    """A retriever on negatives of BM25 (the first stage) or of itself (the second; section 4.2)."""

    batch_size: int = Field(64, ge=1)
    """Queries of a step over all ranks; their positives and hard negatives are shared in one pool."""
    micro_batch_size: int = Field(64, ge=1)
    """Queries a rank holds in memory at once; more are taken by gradient caching, which changes no number."""
    epochs: float = Field(3.0, gt=0, le=1000)
    """Passes over the training queries, where `steps` is left out (coCondenser: 3)."""
    hard_negatives: int = Field(7, ge=0)
    """Candidates of each query, added to the shared pool (coCondenser's training: groups of 8)."""
    gather_negatives: bool = True
    """Share the pool across ranks (with gradients); without it, each rank has the pool of its own queries."""
    optim: OptimConfig = OptimConfig(lr=5e-6)
    """Optimizer (coCondenser: 5e-6)."""


class RankerStageConfig(CountedPhaseConfig):
    """The ranker on negatives of all retrievers together (Eq. 8, Appendix C)."""

    batch_size: int = Field(12, ge=1)
    """Queries of a step over all ranks. The paper's "batch size 12" is read as queries, each with its negatives."""
    micro_batch_size: int = Field(4, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    epochs: float = Field(2.0, gt=0, le=1000)
    """Passes over the training queries, where `steps` is left out (Appendix C: 2)."""
    num_negatives: int = Field(40, ge=1)
    """Negatives of a query (Appendix C: 40)."""
    optim: OptimConfig = OptimConfig(lr=1e-5, weight_decay=0.1)
    """Optimizer (Appendix C: 1e-5, weight decay 0.1, warm-up 0.1)."""


class R2ankerConfig(Section):
    """A ranker hardened by several retrievers (section 3)."""

    retrievers: tuple[str, ...] = Field(("bm25", "dense"), min_length=1)
    """Whose candidates make the joint pool (Eq. 9): `bm25`, names of models that search (`dense`, in their last state;
    `dense@1` in their first), and paths of TREC run files that rank the training queries. The paper's best set is
    BM25, D2 and L2."""
    top_k: int = Field(200, ge=1)
    """Candidates of each retriever in the pool, positives taken out (N of Appendix B: 200)."""
    bm25_depth: int = Field(200, ge=1)
    """BM25 hits that the retrievers' first stage draws from."""
    second_stage: Literal["mined", "mined_and_bm25"] = "mined"
    """What the second stage of a retriever draws from: what its first state retrieves, or that and BM25's together
    (as coCondenser's training data has it)."""
    remove_answers: bool = False
    """Also take documents out that contain an answer, where the query has answers. The paper has none."""
    mine: Literal["all", "sampled"] = "all"
    """Training queries searched for candidates: all, or those that the phases draw (trains the same)."""
    dense_1: RetrieverStageConfig = RetrieverStageConfig()
    """D1: the dense retriever on BM25's negatives."""
    dense_2: RetrieverStageConfig = RetrieverStageConfig()
    """D2: from the pre-trained weights again, on hard negatives of D1."""
    ranker: RankerStageConfig = RankerStageConfig()
    """The ranker."""


class R2ankerRecipe(Config):
    """R2ANKER: retrievers of several kinds, and a ranker that learns from their joint negatives."""

    algorithm: ClassVar[str] = "engine.r2anker"

    recipe: Literal["r2anker"] = "r2anker"
    """The algorithm's name."""
    dense: RetrieverConfig
    """The dense retriever (D1, D2)."""
    ranker: RankerConfig
    """The ranker."""
    r2anker: R2ankerConfig = R2ankerConfig()
    """How they are trained."""

    @property
    def counts_epochs(self) -> bool:
        """Whether a phase is counted in epochs."""
        game = self.r2anker
        return any(phase.steps is None for phase in (game.dense_1, game.dense_2, game.ranker))

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out sections 3.4 and 4.2 and Appendix B for data of some size."""
        return r2anker_timetable(self.r2anker, None if sizes is None else sizes.queries)

    @model_validator(mode="after")
    def _retrievers_are_there(self) -> Self:
        for name in self.r2anker.retrievers:
            model, _, state = name.partition("@")
            if state and (model not in self.models or state not in ("1", "2")):
                raise ValueError(
                    f"r2anker.retrievers names {name!r}: expected bm25, a model that searches, such as dense or "
                    "dense@1, or the path of a run file"
                )
        return self


def r2anker_timetable(game: R2ankerConfig, num_queries: int | None) -> Timetable:
    """Lay out what is trained on what: D1, D2, the ranker.

    Args:
        game: Its numbers.
        num_queries: Training queries, for phases that are counted in epochs; None where that is not known.

    Raises:
        ConfigError: A phase is counted in epochs, and the queries are not.
    """
    minings = {BM25: Mining(BM25, BM25, None, max(game.bm25_depth, game.top_k), "r2anker.bm25_depth")}
    joint: dict[str, tuple[str, ...]] = {}
    phases = _retriever_phases("dense", DENSE, game.dense_1, game.dense_2, game, num_queries, minings, joint)
    joint[JOINT] = tuple(_member(name, game, minings) for name in game.retrievers)
    ranker = WeightsOf("ranker", RANKER_STATE)
    phases.append(
        Phase(
            name="ranker",
            section="r2anker.ranker",
            model="ranker",
            steps=_steps(game.ranker, num_queries, "r2anker.ranker"),
            batch_size=game.ranker.batch_size,
            micro_batch_size=game.ranker.micro_batch_size,
            micro_batch_tokens=game.ranker.micro_batch_tokens,
            num_negatives=game.ranker.num_negatives,
            optim=game.ranker.optim,
            candidates=(JOINT,),
            first_iteration=RANKER_STATE,
            single=True,
        )
    )
    states = [WeightsOf("dense", FIRST), WeightsOf("dense", SECOND)]
    names = {weights: f"{weights.model[0].upper()}{weights.iteration}" for weights in states}
    return Timetable(
        phases=tuple(phases),
        minings=tuple(minings.values()),
        iterations=0,
        in_each_iteration=(),
        mine_all=game.mine == "all",
        remove_answers=game.remove_answers,
        names=names | {ranker: "R"},
        several_search=True,
        joint=joint,
        ends=(WeightsOf("dense", SECOND), ranker),
        measured=(*states, ranker),
        reranked=(BM25, "dense-002"),
    )


def _retriever_phases(
    model: str,
    kind: str,
    first: RetrieverStageConfig,
    second: RetrieverStageConfig,
    game: R2ankerConfig,
    num_queries: int | None,
    minings: dict[str, Mining],
    joint: dict[str, tuple[str, ...]],
) -> list[Phase]:
    """Make a retriever's two rows, with the minings and the pool that they draw from or that are drawn of them."""
    names = {state: f"{model}-{WeightsOf(model, state).state}" for state in (FIRST, SECOND)}
    for state, name in names.items():
        minings[name] = Mining(name, kind, WeightsOf(model, state), game.top_k, "r2anker.top_k")
    mined = names[FIRST]
    if game.second_stage == "mined_and_bm25":
        mined = f"{model}-hard"
        joint[mined] = (BM25, names[FIRST])
    return [
        _retriever_phase(model, state, stage, candidates, num_queries)
        for state, stage, candidates in ((FIRST, first, BM25), (SECOND, second, mined))
    ]


def _retriever_phase(
    model: str, state: int, stage: RetrieverStageConfig, candidates: str, num_queries: int | None
) -> Phase:
    pool: Pool = "world" if stage.gather_negatives else "rank"
    name = f"{model}_{state}"
    return Phase(
        name=name,
        section=f"r2anker.{name}",
        model=model,
        steps=_steps(stage, num_queries, f"r2anker.{name}"),
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        micro_batch_tokens=stage.micro_batch_tokens,
        num_negatives=stage.hard_negatives,
        optim=stage.optim,
        candidates=(candidates,),
        first_iteration=state,
        single=True,
        restarts=state == SECOND,
        pool=pool,
    )


def _member(name: str, game: R2ankerConfig, minings: dict[str, Mining]) -> str:
    """Return the name of the candidates that a member of the pool stands for; a run file's mining is added."""
    model, _, state = name.partition("@")
    if name in minings:
        return name
    found = f"{model}-{WeightsOf(model, int(state or SECOND)).state}" if state.isdigit() or not state else name
    if found in minings:
        return found
    number = sum(one.retriever == "run_file" for one in minings.values())
    minings[f"run-file-{number}"] = Mining(f"run-file-{number}", "run_file", None, game.top_k, "r2anker.top_k", name)
    return f"run-file-{number}"


def _steps(phase: CountedPhaseConfig, num_queries: int | None, section: str) -> int:
    return steps_of(phase.steps, phase.epochs, phase.batch_size, num_queries, section)

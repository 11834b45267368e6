"""R2ANKER's sections, and the timetable that their numbers make.

Source: Zhou et al. 2023, "Towards Robust Ranker for Text Retrieval", section 3.4, appendices B and C. Where the paper
is silent, the field says what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from engine.config.ar2 import DENSE
from engine.config.distillation import DistillationConfig, student_phase
from engine.config.lexical import FlopsConfig, LexicalPhaseConfig
from engine.config.models import LexicalConfig, RankerConfig, RetrieverConfig
from engine.config.negatives import NegativesConfig
from engine.config.pools import BM25, GIVEN, START, Pools, drawn_from_bm25, first_from_bm25, mining_of
from engine.config.recipe import Config
from engine.config.schedule import steps_of
from engine.config.sections import Section
from engine.config.timetable import ZERO_SHOT, Mining, Phase, Pool, Sizes, Timetable, WeightsOf
from engine.config.training import CountedPhaseConfig, OptimConfig

JOINT = "joint"
"""Name of the pool that the ranker's negatives are drawn from."""
FIRST, SECOND = 1, 2
"""The states of a retriever: trained on BM25's negatives (D1, L1), then on its own (D2, L2)."""
RANKER_STATE = STUDENT_STATE = 1
"""The one state of the ranker, and of its student."""


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

    retrievers: tuple[str, ...] | None = Field(None, min_length=1)
    """Whose candidates make the joint pool (Eq. 9): `bm25`, names of models that search (`dense` and `lexical`, in
    their last state; `dense@1` in their first), `given` (the data's own negatives; `given@NAME`: those that NAME
    proposed), and paths of TREC run files that rank the training queries. Left out, BM25 and the last states of all
    models that search: the paper's best set, BM25, D2 and L2. What `candidates` names stands in for
    BM25."""
    top_k: int = Field(200, ge=1)
    """Candidates of each retriever in the pool, positives taken out (N of Appendix B: 200)."""
    candidates: str = BM25
    """What the retrievers' first stage draws from: `bm25`, or what stands in for it: `given`, `given@NAME` or the path
    of a TREC run file, as for `retrievers`."""
    bm25_depth: int = Field(200, ge=1)
    """Best candidates from which they are drawn, whoever found them."""
    second_stage: Literal["mined", "mined_and_bm25"] = "mined"
    """What the second stage of a retriever draws from: what its first state retrieves, or that and `candidates`
    together (as coCondenser's training data has BM25's)."""
    negatives: NegativesConfig = NegativesConfig()
    """Filters and sampler of the ranker's negatives (docs/negatives.md). The default is Appendix B's: uniform over all
    lists together. The retrievers' phases draw uniformly and unfiltered."""
    remove_answers: bool = False
    """Also take documents out that contain an answer, where the query has answers. The paper has none."""
    search_deeper: int = Field(1, ge=1)
    """Where less than `top_k` is left of a query's hits, it is searched deeper until `top_k` are found, to this many
    times `top_k` at most. 1: no deeper than the negatives of a step need."""
    mine: Literal["all", "sampled"] = "all"
    """Training queries searched for candidates: all, or those that the phases draw (trains the same)."""
    dense_1: RetrieverStageConfig = RetrieverStageConfig()
    """D1: the dense retriever on BM25's negatives."""
    dense_2: RetrieverStageConfig = RetrieverStageConfig()
    """D2: from the pre-trained weights again, on hard negatives of D1."""
    lexical_1: LexicalPhaseConfig = LexicalPhaseConfig()
    """L1: the lexical retriever on BM25's negatives."""
    lexical_2: LexicalPhaseConfig = LexicalPhaseConfig()
    """L2: from the pre-trained weights again, on hard negatives of L1."""
    ranker: RankerStageConfig = RankerStageConfig()
    """The ranker."""
    student: DistillationConfig = DistillationConfig()
    """The student, where the recipe has one: a retriever that learns from the ranker (Appendix C)."""

    def penalty(self, phase: str) -> FlopsConfig | None:
        """Return what makes the vectors of a retriever's phase sparse; None of a dense one."""
        return {"lexical_1": self.lexical_1, "lexical_2": self.lexical_2}.get(phase)


class R2ankerRecipe(Config):
    """R2ANKER: retrievers of several kinds, and a ranker that learns from their joint negatives."""

    algorithm: ClassVar[str] = "engine.r2anker"

    recipe: Literal["r2anker"] = "r2anker"
    """The algorithm's name."""
    dense: RetrieverConfig | None = None
    """The dense retriever (D1, D2); left out, there is none."""
    lexical: LexicalConfig | None = None
    """The lexicon-weighting retriever (L1, L2); left out, there is none."""
    ranker: RankerConfig
    """The ranker."""
    student: RetrieverConfig | None = None
    """The retriever that the ranker is distilled into; left out, there is none. The paper begins it from the weights
    that the dense retriever begins from."""
    r2anker: R2ankerConfig = R2ankerConfig()
    """How they are trained."""

    @property
    def counts_epochs(self) -> bool:
        """Whether a phase is counted in epochs."""
        game = self.r2anker
        stages: list[CountedPhaseConfig] = [game.ranker]
        stages += [game.dense_1, game.dense_2] if self.dense else []
        stages += [game.lexical_1, game.lexical_2] if self.lexical else []
        stages += [game.student] if self.student else []
        return any(stage.steps is None for stage in stages)

    @property
    def distillation(self) -> DistillationConfig | None:
        """How the student is taught."""
        return self.r2anker.student if self.student else None

    @property
    def asks_for_bm25(self) -> dict[str, str]:
        """What cannot do without BM25's index."""
        game = self.r2anker
        return (
            super().asks_for_bm25
            | first_from_bm25("r2anker.candidates", game.candidates)
            | drawn_from_bm25("r2anker.retrievers", game.retrievers or (), game.negatives)
        )

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out sections 3.4 and 4.2 and Appendix B for data of some size."""
        searching = tuple(model for model in ("dense", "lexical") if model in self.models)
        return r2anker_timetable(
            self.r2anker, searching, None if sizes is None else sizes.queries, with_student=self.student is not None
        )

    @model_validator(mode="after")
    def _retrievers_are_there(self) -> Self:
        searching = [model for model in ("dense", "lexical") if model in self.models]
        if not searching:
            raise ValueError("neither dense nor lexical is given: expected a retriever that is trained")
        known = {BM25, *searching, *(f"{model}@{state}" for model in searching for state in (FIRST, SECOND))}
        for name in self.r2anker.retrievers or ():
            if name.partition("@")[0] in (BM25, START, "dense", "lexical") and name not in known:
                raise ValueError(
                    f"r2anker.retrievers names {name!r}: expected of {', '.join(sorted(known))} or the path of a run "
                    "file, since the recipe has no other models"
                )
        if self.r2anker.candidates == START:
            raise ValueError(
                f"r2anker.candidates is {START}: expected {BM25}, given or the path of a run file, since each of the "
                f"recipe's retrievers begins at a state of its own ({START} is a word of AR2's recipe)"
            )
        return self


def r2anker_timetable(
    game: R2ankerConfig, searching: tuple[str, ...], num_queries: int | None, *, with_student: bool = False
) -> Timetable:
    """Lay out what is trained on what: D1, D2, L1, L2, the ranker, its student.

    Args:
        game: Its numbers.
        searching: The models that search, of `dense` and `lexical`.
        num_queries: Training queries, for phases that are counted in epochs; None where that is not known.
        with_student: Whether the ranker is distilled.

    Raises:
        ConfigError: A phase is counted in epochs, and the queries are not.
    """
    rows = _Rows(game, num_queries)
    for model in searching:
        rows.add_retriever(model)
    pools = rows.pools(searching)
    ranker = WeightsOf("ranker", RANKER_STATE)
    rows.add(
        "ranker", "ranker", game.ranker, JOINT, num_negatives=game.ranker.num_negatives, first_iteration=RANKER_STATE
    )
    ends = [ranker]
    if with_student:
        ends.append(WeightsOf("student", STUDENT_STATE))
        rows.phases.append(
            student_phase(
                game.student,
                model="student",
                candidates=JOINT,
                iteration=STUDENT_STATE,
                num_queries=num_queries,
                section="r2anker.student",
            )
        )
    states = [WeightsOf(model, state) for model in searching for state in (FIRST, SECOND)]
    last = [weights for weights in states if weights.iteration == SECOND]
    return Timetable(
        phases=tuple(rows.phases),
        minings=tuple(pools.minings.values()),
        iterations=0,
        in_each_iteration=(),
        mine_all=game.mine == "all",
        remove_answers=game.remove_answers,
        search_deeper=game.search_deeper,
        names={weights: f"{weights.model[0].upper()}{weights.iteration}" for weights in states}
        | {weights: weights.model[0].upper() for weights in ends},
        several_search=True,
        joint=pools.joint,
        ends=(*last, *ends),
        measured=(*states, *ends),
        reranked=(
            *([BM25] if BM25 in pools.minings else []),
            *(f"{weights.model}-{weights.state}" for weights in last),
        ),
        rivals={WeightsOf("student", STUDENT_STATE): last[0]} if with_student else {},
    )


class _Rows:
    """The rows of the timetable while they are laid out.

    Args:
        game: Their numbers.
        num_queries: As of `r2anker_timetable`.
    """

    def __init__(self, game: R2ankerConfig, num_queries: int | None) -> None:
        self.phases: list[Phase] = []
        self._found = mining_of(game.candidates, game.bm25_depth, "r2anker.bm25_depth")
        self.minings = {self._found.name: self._found}
        self._game, self._num_queries = game, num_queries

    def add_retriever(self, model: str) -> None:
        """Add a retriever's two phases, and the minings of both its states."""
        game, kind = self._game, {"dense": DENSE}.get(model, model)
        names = {state: f"{model}-{WeightsOf(model, state).state}" for state in (FIRST, SECOND)}
        for state, name in names.items():
            self.minings[name] = Mining(name, kind, WeightsOf(model, state), game.top_k, "r2anker.top_k")
        mined = names[FIRST]
        if game.second_stage == "mined_and_bm25":
            mined = f"{model}-hard"
        for state, candidates in ((FIRST, self._found.name), (SECOND, mined)):
            stage: RetrieverStageConfig | LexicalPhaseConfig = getattr(game, f"{model}_{state}")
            self.add(
                f"{model}_{state}",
                model,
                stage,
                candidates,
                num_negatives=stage.hard_negatives,
                first_iteration=state,
                restarts=ZERO_SHOT if state == SECOND else None,
                pool="world" if stage.gather_negatives else "rank",
            )

    def add(
        self,
        name: str,
        model: str,
        stage: CountedPhaseConfig,
        candidates: str,
        *,
        num_negatives: int,
        first_iteration: int,
        restarts: str | None = None,
        pool: Pool = "none",
    ) -> None:
        """Add a phase of one visit."""
        section = f"r2anker.{name}"
        self.phases.append(
            Phase(
                name=name,
                section=section,
                model=model,
                steps=steps_of(stage.steps, stage.epochs, stage.batch_size, self._num_queries, section),
                batch_size=stage.batch_size,
                micro_batch_size=stage.micro_batch_size,
                micro_batch_tokens=stage.micro_batch_tokens,
                num_negatives=num_negatives,
                optim=stage.optim,
                candidates=(candidates,),
                first_iteration=first_iteration,
                single=True,
                restarts=restarts,
                pool=pool,
            )
        )

    def pools(self, searching: Sequence[str]) -> Pools:
        """Make the pools of what has been added: the ranker's, and those of second stages that draw from two."""
        game = self._game
        pools = Pools(self.minings, "r2anker.top_k", meant=lambda word: _meant(word, self.minings))
        for model in searching if game.second_stage == "mined_and_bm25" else ():
            pools.add(f"{model}-hard", (game.candidates, f"{model}@{FIRST}"), game.top_k, NegativesConfig())
        pools.add(JOINT, game.retrievers or (game.candidates, *searching), game.top_k, game.negatives)
        return pools


def _meant(word: str, minings: Mapping[str, Mining]) -> str:
    """Return the name of the candidates that a word for a retriever stands for; a path stays one."""
    model, _, state = word.partition("@")
    is_state = state in ("", "1", "2") and model != GIVEN
    name = f"{model}-{WeightsOf(model, int(state or SECOND)).state}" if is_state else word
    return name if word not in minings and name in minings else word

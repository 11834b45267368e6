"""AR2's sections, and the timetable that their numbers make.

Source: Zhang et al. 2022, "Adversarial Retriever-Ranker for Dense Text Retrieval", Algorithm 1, Table 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import PrivateAttr, model_validator

from engine.config.game import Ar2Config
from engine.config.models import ModelConfig, RankerConfig, RetrieverConfig
from engine.config.pools import BM25, START, Pools, drawn_from_bm25, first_from_bm25, mining_of
from engine.config.recipe import Config, Prior
from engine.config.refreshes import Refreshes
from engine.config.timetable import ZERO_SHOT, Mining, Phase, Pool, Sizes, Timetable, WeightsOf, iteration_name
from engine.config.training import PhaseConfig
from engine.config.warmups import WarmupRankerConfig, WarmupRetrieverConfig

__all__ = ["DENSE", "Ar2Config", "Ar2Recipe", "WarmupRankerConfig", "WarmupRetrieverConfig", "ar2_timetable"]

_FOUND_AT_START = f"{START} (what the retriever finds before any training)"
DENSE = "dense"
"""The kind of retriever that the game draws its negatives from."""


class Ar2Recipe(Config):
    """AR2: a retriever and a ranker that play against each other; or what the paper compares it with."""

    algorithm: ClassVar[str] = "engine.ar2"

    recipe: Literal["ar2"] = "ar2"
    """The algorithm's name."""
    retriever: RetrieverConfig
    """G."""
    ranker: RankerConfig | None = None
    """D. With `ar2.objective: ance` it is not loaded, and may be left out."""
    warmup_retriever: WarmupRetrieverConfig = WarmupRetrieverConfig()
    """G0."""
    warmup_ranker: WarmupRankerConfig = WarmupRankerConfig()
    """D0."""
    ar2: Ar2Config = Ar2Config()
    """The game."""

    _ended: int | None = PrivateAttr(None)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The sections of the models that the game trains."""
        sections = super().models
        return {name: sections[name] for name in sections if name != "ranker" or self.ar2.has_ranker}

    @property
    def priors(self) -> tuple[Prior, ...]:
        """G0's score inside D's, and BM25's."""
        if self.ranker is None or not self.ranker.prior or not self.ar2.has_ranker:
            return super().priors
        scale = self.ranker.prior * self.retriever.score_scale
        return Prior(DENSE, scale, WeightsOf("retriever", 0)), *super().priors

    @property
    def unread(self) -> dict[str, tuple[str, ...]]:
        """Of the measurements and of the game."""
        return super().unread | self.ar2.unread

    @property
    def untrained_teacher(self) -> Literal["never", "first", "always"]:
        """Of the game: D0 teaches first in the paper's order, the first iteration's D in the released one."""
        game = self.ar2
        plays = game.has_ranker and game.iterations > 0 and game.retriever.steps > 0
        if not plays or self.warmup_ranker.steps or (game.ranker.steps and game.order == "released"):
            return "never"
        return "first" if game.ranker.steps else "always"

    @property
    def decided_on_dev(self) -> list[str]:
        """Of the game."""
        return self.ar2.decided_on_dev

    @property
    def refresh_devices(self) -> int:
        """Devices of each host that are kept for the refreshes of the game."""
        return self.ar2.refresh_devices

    @model_validator(mode="after")
    def _ranker_is_there(self) -> Self:
        if self.ar2.has_ranker and self.ranker is None:
            raise ValueError(
                f"'ranker.name' is not given, and the objective {self.ar2.objective} trains a ranker: give it, or set "
                "ar2.objective to ance"
            )
        return self

    @property
    def asks_for_bm25(self) -> dict[str, str]:
        """What cannot do without BM25's index."""
        first = self.warmup_retriever.candidates if self.warmup_retriever.draws else ""
        in_batch = "or set warmup_retriever.hard_negatives=0 for in-batch negatives alone"
        return (
            super().asks_for_bm25
            | first_from_bm25("warmup_retriever.candidates", first, also=[_FOUND_AT_START], otherwise=in_batch)
            | drawn_from_bm25("ar2.further_retrievers", self.ar2.further_retrievers, self.ar2.negatives)
        )

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out Algorithm 1, which depends on no size of the data."""
        return ar2_timetable(
            self.ar2, self.warmup_retriever, self.warmup_ranker, ended=self._ended, with_bm25=self.bm25.enabled
        )

    def with_measured(self, kept: Mapping[int, float | None]) -> Self:
        """Return the same recipe, its refreshes ended where they are measured to change little (`refresh_until`)."""
        until = self.ar2.refresh_until
        few = [t for t, share in kept.items() if until is not None and share is not None and share >= until]
        found = self.model_copy()
        found._ended = min(few, default=None)
        return found


def ar2_timetable(
    game: Ar2Config,
    warm_retriever: WarmupRetrieverConfig,
    warm_ranker: WarmupRankerConfig,
    *,
    ended: int | None = None,
    with_bm25: bool = True,
) -> Timetable:
    """Lay out Algorithm 1: what its lines train, and on what.

    Args:
        game: The iterations.
        warm_retriever: G0.
        warm_ranker: D0.
        ended: The refresh after which a measurement has ended them; None while none has.
        with_bm25: Whether there is BM25; without, a warm-up that draws nothing names no candidates. Nor does it name
            those that the start would have to encode the corpus for.
    """
    refreshes = Refreshes.of(game.iterations, game.refresh_every, may_end=game.refresh_until is not None, ended=ended)
    # Of each iteration, what its newest refresh found.
    names = [iteration_name(refreshes.newest(iteration)) for iteration in range(game.iterations + 1)]
    word, depth = warm_retriever.candidates, warm_retriever.bm25_depth
    warm: Mining | None = _mining_of(word, depth, "warmup_retriever.bm25_depth")
    if not warm_retriever.draws and (word == START or (word == BM25 and not with_bm25)):
        warm = None
    pools = _pools(game, warm, names)
    of_retriever = _phases_of_retriever(game, warm_retriever, warm.name if warm else "", names)
    of_ranker = _phases_of_ranker(game, warm_ranker, names) if game.has_ranker else (None, None)
    phases = tuple(phase for pair in zip(of_retriever, of_ranker, strict=True) for phase in pair if phase is not None)
    ends_in_pool = names[-1] in pools.joint and any(names[-1] in phase.candidates for phase in phases)
    return Timetable(
        phases=phases,
        minings=tuple(pools.minings.values()),
        iterations=game.iterations,
        in_each_iteration=(
            *("retriever", "encode", "index", "candidates"),
            *(["negatives"] if ends_in_pool else []),
            *(["ranker"] if game.has_ranker else []),
            "evaluate",
        ),
        joint=pools.joint,
        mine_all=game.mine == "all",
        remove_answers=game.remove_answers,
        search_deeper=game.search_deeper,
        refreshes=None if refreshes.is_plain else refreshes,
        beside=_beside(game, ends_in_pool=ends_in_pool),
        names={
            WeightsOf(model, iteration): letter + "0" * (iteration == 0)
            for model, letter in (("retriever", "G"), ("ranker", "D"))
            for iteration in range(game.iterations + 1)
        },
    )


def _beside(game: Ar2Config, *, ends_in_pool: bool) -> tuple[str, ...]:
    """Name the kinds of stages that run beside the ranker's phase."""
    if game.overlap == "none":
        return ()
    first = ("encode",) if game.overlap == "split" else ()
    return (*first, "index", "candidates", *(["negatives"] if ends_in_pool else []))


def _phases_of_retriever(
    game: Ar2Config, warmup: WarmupRetrieverConfig, found: str, names: list[str]
) -> tuple[Phase, Phase]:
    """Make the rows of G0, whose negatives are those of some candidates (or none), and of G, of what it found."""
    return (
        _phase(
            "warmup_retriever",
            "retriever",
            warmup,
            num_negatives=warmup.hard_negatives,
            candidates=(found,),
            pool="world" if warmup.gather_negatives else "rank",
        ),
        _phase(
            "retriever",
            "retriever",
            game.retriever,
            num_negatives=game.num_negatives,
            candidates=tuple(names[:-1]),
            section="ar2.retriever",
            first_iteration=1,
            opponent="ranker" if game.has_ranker else None,
            pool=game.in_batch_negatives,
            objective=game.minimised,
            rescored_by=_rescored(game, names[:-1], range(game.iterations)),
        ),
    )


def _phases_of_ranker(game: Ar2Config, warmup: WarmupRankerConfig, names: list[str]) -> tuple[Phase, Phase]:
    """Make the rows of D0 and D."""
    fresh = names[1:] if game.order == "paper" and game.overlap == "none" else names[:-1]
    first = 1 if game.order == "paper" else 0  # which retriever is the newest when its first phase begins
    restarts = {"never": None, "warmup": names[0], "pretrained": ZERO_SHOT}[game.ranker_restarts]
    return (
        _phase(
            "warmup_ranker",
            "ranker",
            warmup,
            num_negatives=warmup.num_negatives,
            candidates=(names[0],),
            objective=game.minimised,
        ),
        _phase(
            "ranker",
            "ranker",
            game.ranker,
            num_negatives=game.num_negatives,
            candidates=tuple(fresh),
            section="ar2.ranker",
            first_iteration=1,
            restarts=restarts,
            objective=game.minimised,
            rescored_by=_rescored(game, fresh, range(first, first + game.iterations)),
        ),
    )


def _pools(game: Ar2Config, warm: Mining | None, names: list[str]) -> Pools:
    """Gather what is mined: candidates for G0, and each iteration's, with what joins them in a pool."""
    alone = [warm] if warm else []
    refreshed = [iteration for iteration, name in enumerate(names) if name == iteration_name(iteration)]
    alone += [
        Mining(iteration_name(iteration), DENSE, WeightsOf("retriever", iteration), game.top_k, "ar2.top_k")
        for iteration in refreshed
    ]
    pools = Pools({mining.name: mining for mining in alone}, "ar2.top_k", mined_by=_mining_of)
    for name in dict.fromkeys(names):
        pools.add(name, (name, *game.further_retrievers), game.top_k, game.negatives)
    return pools


def _mining_of(word: str, top_k: int, section: str, number: int = 0) -> Mining:
    """Return what a word stands for, as `mining_of`; here it may be the retriever before any training."""
    if word == START:
        return Mining(ZERO_SHOT, DENSE, WeightsOf("retriever", None), top_k, section)
    return mining_of(word, top_k, section, number)


def _rescored(game: Ar2Config, names: Sequence[str], newest: Sequence[int]) -> tuple[WeightsOf | None, ...]:
    """Name the weights that score each visit's candidates anew: the newest, where older ones have found them.

    Args:
        game: Whether that is done.
        names: Of each visit's candidates.
        newest: Iteration of the retriever that is there when each visit begins.
    """
    if not game.rescores:
        return ()
    return tuple(
        WeightsOf("retriever", iteration) if name != iteration_name(iteration) else None
        for name, iteration in zip(names, newest, strict=True)
    )


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
    restarts: str | None = None,
    objective: Literal["", "irgan"] = "",
    rescored_by: tuple[WeightsOf | None, ...] = (),
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
        restarts=restarts,
        objective=objective,
        rescored_by=rescored_by,
    )

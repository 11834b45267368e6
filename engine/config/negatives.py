"""Which of the retrieved documents serve as negatives: what is filtered out, and how n of the rest are drawn.

A section that any algorithm can have. Its defaults are AR2's: all candidates, each as likely as any other, none
filtered. `docs/negatives.md` tells what is drawn from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config.sections import Section, StoredPath


class UniformConfig(Section):
    """Every candidate is as likely as any other (AR2 section 3.1, R2ANKER appendix B)."""

    name: Literal["uniform"] = "uniform"
    """The sampler."""
    top_k: int | None = Field(None, ge=1)
    """Best candidates of each retriever that are drawn from; left out, all that were mined. R2ANKER: 200."""

    def window(self, depth: int) -> range:
        """Return the ranks of a list of some depth that are drawn from."""
        return range(1, min(depth, self.top_k or depth) + 1)


class RankWindowConfig(Section):
    """Uniform over a window of ranks, which leaves out the very best: they are the likeliest false negatives."""

    name: Literal["rank_window"]
    """The sampler."""
    first_rank: int = Field(1, ge=1)
    """First rank of each retriever's list that is drawn from; ranks count from 1, positives taken out."""
    last_rank: int = Field(ge=1)
    """Last rank, included."""

    def window(self, depth: int) -> range:
        """Return the ranks of a list of some depth that are drawn from."""
        return range(self.first_rank, min(depth, self.last_rank) + 1)

    @model_validator(mode="after")
    def _is_a_window(self) -> RankWindowConfig:
        if self.last_rank < self.first_rank:
            raise ValueError(f"last_rank {self.last_rank} is above first_rank {self.first_rank}: no rank is left")
        return self


class SimAnsConfig(Section):
    """Candidates that score about as high as the positive are the likeliest (SimANS, Zhou et al. 2022).

    With s the scores of one retriever, a candidate weighs exp(-a (s_neg - s_pos + b)^2) in the form `squared` and
    exp(-a |s_neg - s_pos|) in the form `absolute`, which the released code has for passages. Of a retriever that did
    not find the positive, its last n candidates are drawn from, as in the released code.
    """

    name: Literal["simans"]
    """The sampler."""
    form: Literal["squared", "absolute"] = "squared"
    """Which of the two weights. Released code: `squared` for Wikipedia questions and documents, else `absolute`."""
    a: float = Field(gt=0)
    """How fast weights fall with the distance. Released code: 0.5 with `squared`, 3 with `absolute`."""
    b: float = 0.0
    """Shift: the likeliest score is s_pos - b, in the retriever's numbers; of `squared` alone. Released code: 1, 0."""

    def window(self, depth: int) -> range:
        """Return the ranks of a list of some depth that are drawn from."""
        return range(1, depth + 1)

    @model_validator(mode="after")
    def _shift_is_of_squared(self) -> SimAnsConfig:
        if self.form == "absolute" and self.b:
            raise ValueError(f"b is {self.b}, but the form `absolute` has no shift: take b out, or set form to squared")
        return self


class AnswersFilterConfig(Section):
    """Takes out documents that contain an answer of the query (as mining does where `remove_answers` is on)."""

    name: Literal["answers"]
    """The filter."""


class AdditionsFilterConfig(Section):
    """Takes out what a file judges relevant besides the data's judgements (SimANS: `qrels.train.addition.tsv`)."""

    name: Literal["additions"]
    """The filter."""
    file: StoredPath
    """Two columns (query, document), or four as in qrels (query, 0, document, grade; above 0 is taken out)."""


class RelabelsFilterConfig(Section):
    """Takes out what a file says was labelled wrongly; a document that becomes a positive is trained on as one."""

    name: Literal["relabels"]
    """The filter."""
    file: StoredPath
    """Three columns: query, document, and `positive` or `out`."""


class MarginFilterConfig(Section):
    """Takes out what scores nearly as high as a positive, or higher (positive-aware mining, NV-Retriever)."""

    name: Literal["margin"]
    """The filter."""
    scores: Literal["retriever", "teacher"] = "retriever"
    """Whose scores: of each retriever that found both, or the teacher's."""
    share: float = Field(0.95, gt=0)
    """Of a positive's score that a negative may reach (NV-Retriever's TopK-PercPos: 0.95). A negative score s_pos is
    lowered as far as a positive one is: to s_pos - (1 - share) |s_pos|."""
    difference: float = Field(0.0, ge=0)
    """By which it must stay below that besides (TopK-MarginPos, there with `share: 1`: 0.05)."""


class RankerThresholdsFilterConfig(Section):
    """Takes out what the teacher takes for relevant (RocketQA's denoised hard negatives)."""

    name: Literal["ranker_thresholds"]
    """The filter."""
    reject_above: float = Field(0.9, gt=0, lt=1)
    """Probability above which a document is a false negative: the sigmoid of the teacher's logit."""
    keep_below: float | None = Field(None, gt=0, lt=1)
    """Keep only documents below this probability; left out, all that are not rejected. RocketQA: 0.1."""


class ConstrainedFilterConfig(Section):
    """Keeps only what another retriever found too (R2ANKER Table 6: negatives within BM25's top 1000)."""

    name: Literal["constrained"]
    """The filter."""
    within: str = "bm25"
    """Name of that retriever's candidates."""
    top_k: int = Field(1000, ge=1)
    """Its best candidates that count."""


class RedistributedFilterConfig(Section):
    """Keeps what the teacher scores highest of all retrievers' candidates, each once (R2ANKER Table 7)."""

    name: Literal["redistributed"]
    """The filter."""
    top_k: int = Field(200, ge=1)
    """Documents kept for a query. The paper gives no number; 200 is what it takes of a retriever (appendix B)."""


SamplerConfig = Annotated[UniformConfig | RankWindowConfig | SimAnsConfig, Field(discriminator="name")]
FilterConfig = Annotated[
    AnswersFilterConfig
    | AdditionsFilterConfig
    | RelabelsFilterConfig
    | MarginFilterConfig
    | RankerThresholdsFilterConfig
    | ConstrainedFilterConfig
    | RedistributedFilterConfig,
    Field(discriminator="name"),
]


class NegativesConfig(Section):
    """From candidates to the negatives of a step: filters in their order, then a sampler."""

    filters: tuple[FilterConfig, ...] = ()
    """What takes documents out of a query's candidates, one after the other, each with its numbers."""
    sampler: SamplerConfig = UniformConfig()
    """How n of the rest are drawn, with its numbers."""
    teacher_scores: StoredPath | None = None
    """A ranker's scores for the filters that ask for them: a folder of scores that a run has published for this corpus.
    Every document that such a filter judges must have one."""
    repeats: bool = False
    """Whether a document that several retrievers found can stand twice among a query's negatives. `false`: it is as
    many times as likely to be drawn, but once (R2ANKER Eq. 3 and 4 are about a set). `true`: the concatenated lists are
    drawn from as they are (appendix B by the letter), and such a document may count twice in the loss."""

    @field_validator("sampler", mode="before")
    @classmethod
    def _uniform_by_default(cls, sampler: Any) -> Any:
        """Read numbers without a name as those of the sampler that is taken without any."""
        return {"name": "uniform"} | sampler if isinstance(sampler, dict) else sampler

    @model_validator(mode="after")
    def _ranks_mean_something(self) -> NegativesConfig:
        names = [one.name for one in self.filters]
        if "redistributed" in names and (names[-1] != "redistributed" or self.sampler != UniformConfig()):
            raise ValueError(
                "the filter redistributed keeps a ranker's best, where retrievers' ranks and scores mean nothing: it "
                "must be the last filter, with the sampler uniform without a top_k"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_named(self) -> NegativesConfig:
        if self.needs_teacher and self.teacher_scores is None:
            raise ValueError(
                "a filter asks for a teacher's scores: name them by teacher_scores, take the filter out, or let margin "
                "go by the retriever's scores"
            )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether one retriever's candidates are drawn from as they were mined."""
        return not self.filters and self.sampler == UniformConfig()

    @property
    def asks_retriever(self) -> bool:
        """Whether a sampler or a filter goes by a retriever's scores, or by the ranks that they make."""
        by_margin = any(isinstance(one, MarginFilterConfig) and one.scores == "retriever" for one in self.filters)
        return by_margin or self.sampler != UniformConfig()

    @property
    def needs_teacher(self) -> bool:
        """Whether a filter asks for a ranker's scores."""
        return any(map(_asks_teacher, self.filters))

    @property
    def asks_teacher_first(self) -> bool:
        """Whether the first filter does, so that it judges all that was found for a query."""
        return any(map(_asks_teacher, self.filters[:1]))


def _asks_teacher(one: FilterConfig) -> bool:
    """Tell whether a filter goes by a ranker's scores."""
    by_margin = isinstance(one, MarginFilterConfig) and one.scores == "teacher"
    return by_margin or isinstance(one, RankerThresholdsFilterConfig | RedistributedFilterConfig)


@dataclass(frozen=True, slots=True)
class Joint:
    """What is drawn from otherwise than as it was mined: from several candidates, or not to their depth, or filtered.

    Attributes:
        members: Names of the candidates.
        top_k: Best candidates of each that are drawn from; None for all.
        negatives: Filters and sampler.
    """

    members: tuple[str, ...]
    top_k: int | None = None
    negatives: NegativesConfig = field(default_factory=NegativesConfig)

    @property
    def is_cut(self) -> bool:
        """Whether it is nothing but the best of one retriever's candidates."""
        return len(self.members) == 1 and self.negatives.is_plain

    @property
    def within(self) -> tuple[str, ...]:
        """Names of candidates that a filter keeps to; nothing is drawn from these."""
        return tuple(dict.fromkeys(one.within for one in self.negatives.filters if one.name == "constrained"))

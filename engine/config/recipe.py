"""What every recipe has: a run, data, models, measurements; and the timetable that its algorithm makes of its numbers.

Each algorithm's recipe is a class of its own (`engine.config.recipes` lists them), with the sections of its models and
of its phases; `engine.config.file` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import PrivateAttr, model_validator

from engine.config.bm25 import Bm25Config
from engine.config.distillation import DistillationConfig
from engine.config.models import EncoderConfig, ModelConfig, RankerConfig
from engine.config.pools import BM25, GIVEN
from engine.config.sections import (
    DataConfig,
    EvaluationConfig,
    IndexConfig,
    RandomModelConfig,
    RunConfig,
    Section,
    ShardsConfig,
)
from engine.config.timetable import Sizes, Timetable, WeightsOf
from engine.errors import ConfigError

M = TypeVar("M", bound=ModelConfig)


@dataclass(frozen=True, slots=True)
class Prior:
    """A retriever's score inside a ranker's.

    Attributes:
        retriever: Its kind.
        scale: What its score is multiplied by: the inner product of a dense one's vectors, BM25's share of what the
            query's words are worth.
        weights: Whose vectors a dense one's are.
    """

    retriever: str
    scale: float
    weights: WeightsOf | None = None


class Config(Section):
    """A recipe: what all of them have, and what is asked of each."""

    algorithm: ClassVar[str] = ""
    """The module of `engine` that carries it out: its function `train(models, data, run)`."""

    learns_from_queries: ClassVar[bool] = True
    """Whether it trains on judged queries and is measured by retrieval; without, a corpus is enough."""

    reads_parts: ClassVar[bool] = False
    """Whether parts of documents are read as texts of their own."""

    recipe: str
    """The algorithm's name."""
    run: RunConfig
    """Where the run lives."""
    data: DataConfig = DataConfig()
    """Corpus, queries, judgements."""
    shards: ShardsConfig = ShardsConfig()
    """Copies of the shards."""
    random_model: RandomModelConfig = RandomModelConfig()
    """Shape of models named `random`."""
    bm25: Bm25Config = Bm25Config()
    """BM25's words and formula."""
    index: IndexConfig = IndexConfig()
    """The document index."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""

    _sizes: Sizes | None = PrivateAttr(None)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The sections of all models, by the models' names, which are the sections'."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, ModelConfig)}

    def model(self, name: str, kind: type[M]) -> M:
        """Return the section of a model that must be of some kind.

        Args:
            name: The model's.
            kind: Class of its section.

        Raises:
            ConfigError: There is no such model, or it is of another kind.
        """
        section = self.models.get(name)
        if isinstance(section, kind):
            return section
        those = [other for other, one in self.models.items() if isinstance(one, kind)]
        raise ConfigError(
            f"the recipe has no {kind.kind or 'encoder'} {name!r}" + (f": that is a {section.kind}" if section else ""),
            expected=f"one of {', '.join(those)}" if those else f"a section of a {kind.kind or 'encoder'}",
            remedy="name one of them" if those else "take a recipe that trains one",
        )

    @property
    def timetable(self) -> Timetable:
        """What the algorithm trains, on what, for how long.

        Raises:
            ConfigError: A phase is counted in epochs of data that nobody has counted (`sized`).
        """
        return self.timetable_for(self._sizes)

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out the timetable for data of some size; None where it is not known."""
        raise NotImplementedError

    @property
    def priors(self) -> tuple[Prior, ...]:
        """What the ranker's score has of retrievers'."""
        rankers = [section for section in self.models.values() if isinstance(section, RankerConfig)]
        return tuple(Prior(BM25, section.bm25_prior) for section in rankers if section.bm25_prior)

    @property
    def unread(self) -> dict[str, tuple[str, ...]]:
        """Options that were given other values than their defaults and that nothing reads, by why, as it is told."""
        return self.evaluation.unread

    @property
    def untrained_teacher(self) -> Literal["never", "first", "always"]:
        """In which iterations a ranker that no step has trained teaches the retriever."""
        return "never"

    @property
    def decided_on_dev(self) -> list[str]:
        """The options that ask how good models were on dev, as they would be written."""
        return []

    @property
    def distillation(self) -> DistillationConfig | None:
        """How a student is taught; None where the recipe has none."""
        return None

    @property
    def refresh_devices(self) -> int:
        """Devices of each host on which no rank trains, since they are kept for refreshes beside training."""
        return 0

    @property
    def asks_for_bm25(self) -> dict[str, str]:
        """What of the recipe cannot do without BM25's index, as `option=value`, and what to do where there is none."""
        if not self.learns_from_queries:
            return {}
        found = {f"ranker.bm25_prior={one.scale:g}": "set it to 0" for one in self.priors if one.retriever == BM25}
        if self.data.fallback_positive != "none":
            option = f"data.fallback_positive={self.data.fallback_positive}"
            found[option] = "leave it out, so that these questions are not trained on"
        if self.data.without_given == BM25 and any(
            one.retriever == GIVEN for one in self.timetable_for(Sizes(1, 1)).minings
        ):
            found["data.without_given=bm25"] = "set it to random"
        return found

    @property
    def counts_epochs(self) -> bool:
        """Whether the timetable depends on the size of the data."""
        return False

    def sized(self, sizes: Sizes) -> Self:
        """Return the same recipe for data of some size."""
        found = self.model_copy()
        found._sizes = sizes
        return found

    def with_measured(self, kept: Mapping[int, float | None]) -> Self:
        """Return the same recipe, its timetable as measurements leave it.

        Args:
            kept: Iteration of a refresh to the share of candidates that it kept; None where that is not known.
        """
        return self

    @property
    def query_max_length(self) -> int:
        """Tokens of a query at most, special tokens included, whichever model reads it."""
        encoders = [model.query_max_length for model in self.models.values() if isinstance(model, EncoderConfig)]
        return max(encoders, default=min(model.max_length for model in self.models.values()))

    @model_validator(mode="before")
    @classmethod
    def _index_by_name(cls, values: Any) -> Any:
        """Read `index: auto` (or a factory string) as the section with that factory."""
        if isinstance(values, dict) and isinstance(values.get("index"), str):
            return values | {"index": {"factory": values["index"]}}
        return values

    @model_validator(mode="after")
    def _does_without_bm25(self) -> Config:
        if not self.bm25.enabled and (asked := self.asks_for_bm25):
            raise ValueError(
                "bm25.enabled is false, but BM25 is asked for by "
                + "; and by ".join(f"{option}: {remedy}" for option, remedy in asked.items())
                + " (or leave bm25.enabled out)"
            )
        return self

    @model_validator(mode="after")
    def _a_prior_has_its_model(self) -> Config:
        for name, section in self.models.items():
            if isinstance(section, RankerConfig) and section.prior and all(one.weights is None for one in self.priors):
                raise ValueError(f"{name}.prior is {section.prior:g}, but {self.recipe} has no G0: leave it out")
        return self

    @model_validator(mode="after")
    def _only_a_head_has_its_learning_rate(self) -> Config:
        for phase in self.timetable_for(Sizes(1, 1)).phases:
            if phase.optim.head_lr_scale == 1:
                continue
            model = self.models.get(phase.model)
            if not isinstance(model, RankerConfig):
                raise ValueError(
                    f"{phase.section}.optim.head_lr_scale is {phase.optim.head_lr_scale:g}, but {phase.name} trains "
                    f"the {phase.model}, which is no ranker and has no head of its own: leave it out"
                )
            if model.head == "yes_no":
                raise ValueError(
                    f"{phase.section}.optim.head_lr_scale is {phase.optim.head_lr_scale:g}, but the "
                    f"{phase.model}'s head is yes_no, which has no layer of its own: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _there_are_as_many_candidates_as_are_drawn(self) -> Config:
        table = self.timetable_for(Sizes(1, 1))
        for phase in table.phases:
            for mining in table.minings:
                if mining.name in phase.candidates and phase.num_negatives > mining.top_k:
                    raise ValueError(
                        f"{phase.num_negatives} negatives are drawn from the top {mining.top_k} candidates by "
                        f"{phase.name}: they must be at most {mining.section}"
                    )
            for name in set(phase.candidates) & table.joint.keys():
                if phase.num_negatives > (most := table.most_drawn(name)):
                    raise ValueError(
                        f"{phase.num_negatives} negatives are drawn by {phase.name} from {most} candidates of "
                        f"{', '.join(table.joint[name].members)}: lower num_negatives, or raise top_k or the sampler's "
                        "window"
                    )
        return self

    @model_validator(mode="after")
    def _a_batch_has_negatives(self) -> Config:
        for phase in self.timetable_for(Sizes(1, 1)).phases:
            alone = phase.pool != "none" and phase.batch_size == 1 and not phase.num_negatives and phase.steps > 0
            if alone and isinstance(self.models.get(phase.model), EncoderConfig):
                raise ValueError(
                    f"{phase.section}.batch_size is 1 and {phase.name} draws no negatives, so that each positive would "
                    "stand alone and the model would learn nothing: raise the batch_size"
                    + (", or hard_negatives" if self.learns_from_queries else "")
                )
        return self

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> Config:
        if self.index.embeddings == "local":
            self._require_no_scattered_reads()
        if self.evaluation.rerank_depth > self.evaluation.search_depth:
            raise ValueError(
                f"evaluation.rerank_depth {self.evaluation.rerank_depth} is deeper than evaluation.depth "
                f"{self.evaluation.depth} and all evaluation.metrics"
            )
        if self.run.keep_best is not None and self.run.keep_best not in self.evaluation.metrics:
            raise ValueError(
                f"run.keep_best {self.run.keep_best!r} is none of evaluation.metrics "
                f"({', '.join(self.evaluation.metrics)})"
            )
        return self

    @model_validator(mode="after")
    def _no_query_is_longer_than_a_document(self) -> Config:
        for name, model in self.models.items():
            if isinstance(model, EncoderConfig) and model.query_max_length > model.max_length:
                raise ValueError(
                    f"{name}.query_max_length {model.query_max_length} exceeds {name}.max_length "
                    f"{model.max_length}, the length of a document"
                )
        return self

    def _require_no_scattered_reads(self) -> None:
        """Refuse what reads single documents' embeddings on any rank at any time, where each host has only its own."""
        if any(one.weights is not None for one in self.priors):
            raise ValueError(
                "index.embeddings is local, but the ranker's prior reads embeddings of all documents at every step: "
                "set index.embeddings=shared, or ranker.prior=0"
            )
        if self.evaluation.fuse:
            raise ValueError(
                "index.embeddings is local, but evaluation.fuse scores what others found by its embeddings: set "
                "evaluation.fuse=false, or index.embeddings=shared"
            )

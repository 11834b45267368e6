"""A whole recipe: which algorithm, on which data, with which models; `engine.config.file` reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from engine.config.ar2 import Ar2Config, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.bm25 import Bm25Config
from engine.config.models import ModelConfig, RankerConfig, RetrieverConfig
from engine.config.sections import (
    DataConfig,
    EvaluationConfig,
    IndexConfig,
    RandomModelConfig,
    RunConfig,
    Section,
    ShardsConfig,
)
from engine.config.timetable import Timetable


class Config(Section):
    """A whole recipe."""

    recipe: Literal["ar2"] = "ar2"
    """The algorithm: the module of `engine` that plays it, and the section with its numbers."""
    run: RunConfig
    """Where the run lives."""
    data: DataConfig = DataConfig()
    """Corpus, queries, judgements."""
    shards: ShardsConfig = ShardsConfig()
    """Copies of the shards."""
    retriever: RetrieverConfig
    """G."""
    ranker: RankerConfig
    """D."""
    random_model: RandomModelConfig = RandomModelConfig()
    """Shape of models named `random`."""
    bm25: Bm25Config = Bm25Config()
    """BM25's words and formula."""
    index: IndexConfig = IndexConfig()
    """The document index."""
    warmup_retriever: WarmupRetrieverConfig = WarmupRetrieverConfig()
    """G0."""
    warmup_ranker: WarmupRankerConfig = WarmupRankerConfig()
    """D0."""
    ar2: Ar2Config = Ar2Config()
    """The game."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The sections of all models, by the models' names, which are the sections'."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, ModelConfig)}

    @property
    def timetable(self) -> Timetable:
        """What the algorithm trains, on what, for how long."""
        return ar2_timetable(self.ar2, self.warmup_retriever, self.warmup_ranker)

    @property
    def query_max_length(self) -> int:
        """Tokens of a query at most, special tokens included, whichever model reads it."""
        return max(model.query_max_length for model in self.models.values() if isinstance(model, RetrieverConfig))

    @model_validator(mode="before")
    @classmethod
    def _index_by_name(cls, values: Any) -> Any:
        """Read `index: auto` (or a factory string) as the section with that factory."""
        if isinstance(values, dict) and isinstance(values.get("index"), str):
            return values | {"index": {"factory": values["index"]}}
        return values

    @model_validator(mode="after")
    def _values_agree(self) -> Config:
        for phase in self.timetable.phases:
            for mining in self.timetable.minings:
                if mining.name in phase.candidates and phase.num_negatives > mining.top_k:
                    raise ValueError(
                        f"{phase.num_negatives} negatives are drawn from the top {mining.top_k} candidates by "
                        f"{phase.name}: they must be at most {mining.section}"
                    )
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
        for name, model in self.models.items():
            if isinstance(model, RetrieverConfig) and model.query_max_length > model.max_length:
                raise ValueError(
                    f"{name}.query_max_length {model.query_max_length} exceeds {name}.max_length "
                    f"{model.max_length}, the length of a document"
                )
        return self

"""The section of distillation: a retriever learns from a ranker's scores.

Source: R2ANKER (Zhou et al. 2023) Appendix C: the contrastive loss of the retriever's second stage is replaced by "a
simple KL divergence loss" to the ranker's scores.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config.schedule import steps_of
from engine.config.sections import StoredPath
from engine.config.timetable import Phase
from engine.config.training import CountedPhaseConfig, OptimConfig

ScoresAre = Literal["logits", "probabilities"]
"""What the numbers of a file are: as they are to be compared, or what a sigmoid made of that."""


class DistillationConfig(CountedPhaseConfig):
    """A retriever that learns from a ranker's scores (R2ANKER Appendix C)."""

    batch_size: int = Field(16, ge=1)
    """Queries of a step over all ranks, each with its own documents (Appendix C: 16)."""
    micro_batch_size: int = Field(16, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    epochs: float = Field(4.0, gt=0, le=1000)
    """Passes over the training queries, where `steps` is left out (Appendix C: 4)."""
    num_negatives: int = Field(10, ge=1)
    """Negatives of a query, drawn afresh at every step (Appendix C: 10)."""
    optim: OptimConfig = OptimConfig(lr=5e-5)
    """Optimizer (Appendix C: 5e-5; the rest is not given)."""
    loss: Literal["kl", "margin_mse", "mse"] = "kl"
    """`kl` (Appendix C): of the teacher's distribution over a query's documents to the student's. `margin_mse`: squared
    differences of how far the positive is above each negative (Hofstaetter et al. 2020). `mse`: of the scores."""
    teacher_score_scale: float = Field(1.0, gt=0)
    """Multiplies the teacher's raw logits: a temperature T is 1 / T. Appendix C names none. What multiplies the
    student's scores is `score_scale` of its own section."""
    contrastive_weight: float = Field(0.0, ge=0)
    """Weight of the contrastive loss beside it. Appendix C replaces it: 0. SimLM: 0.2."""
    contrastive_negatives: Literal["own", "batch"] = "own"
    """Whose documents are negatives of that loss: the query's own, or those of the batch of all ranks (SimLM)."""
    score: Literal["all", "drawn"] = "all"
    """Pairs that the run's ranker scores: positives and all candidates, for whoever reads the scores later, or those
    that this phase draws (trains the same, up to rounding)."""
    scores: StoredPath | None = None
    """Scores that another teacher gave, in place of the run's ranker: a file, or a folder of files, in one of the forms
    of docs/distillation.md; or a folder of scores of another run."""
    scores_are: ScoresAre | None = None
    """What the numbers of `scores` are: `logits` are taken as they are, `probabilities` are turned back by the logit.
    Left out, numbers that all lie within 0 and 1 are refused, as a sigmoid's."""
    trust_pickle: bool = False
    """Read `scores` from a pickle, too; plain numbers, texts, lists and dicts alone, whatever it holds."""

    @model_validator(mode="after")
    def _contrast_has_a_weight(self) -> DistillationConfig:
        if self.contrastive_negatives == "batch" and not self.contrastive_weight:
            raise ValueError(
                "contrastive_negatives is batch, and contrastive_weight 0 leaves that loss out: give it a weight "
                "(SimLM: 0.2), or leave contrastive_negatives out"
            )
        return self

    @model_validator(mode="after")
    def _scores_are_read(self) -> DistillationConfig:
        for name in ("scores_are", "trust_pickle"):
            if self.scores is None and getattr(self, name):
                raise ValueError(f"{name} says how `scores` is read: name a file by `scores`, or leave {name} out")
        return self


def student_phase(
    settings: DistillationConfig,
    *,
    model: str,
    candidates: str,
    iteration: int,
    num_queries: int | None,
    section: str,
) -> Phase:
    """Make the timetable's row of a student.

    Args:
        settings: Its numbers.
        model: Its name in the recipe, and of the phase.
        candidates: What its negatives are drawn from, unless scores from files say.
        iteration: Of its one state.
        num_queries: Training queries, for a phase that is counted in epochs; None where that is not known.
        section: Key of `settings` in the configuration.

    Raises:
        ConfigError: The phase is counted in epochs, and the queries are not.
    """
    return Phase(
        name=model,
        section=section,
        model=model,
        steps=steps_of(settings.steps, settings.epochs, settings.batch_size, num_queries, section),
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        num_negatives=settings.num_negatives,
        optim=settings.optim,
        candidates=(candidates,),
        first_iteration=iteration,
        single=True,
        pool="world" if settings.contrastive_negatives == "batch" else "none",
    )

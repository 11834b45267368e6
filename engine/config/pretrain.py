"""The sections of pre-training, and the timetables that their numbers make.

Source of ED-MLM: Zhou et al. 2023 (R2ANKER), Appendix C "Retriever Pre-training"; for what that leaves to it, Wang et
al. 2022, "SimLM: Pre-training with Representation Bottleneck for Dense Passage Retrieval", section 3.1, and its
released code. Of ICT: Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering". Of
coCondenser: Gao and Callan 2021 and 2022.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from engine.config.models import BottleneckConfig, CondenserConfig, RetrieverConfig
from engine.config.recipe import Config
from engine.config.schedule import steps_of
from engine.config.sections import Section
from engine.config.timetable import Phase, Pool, Sizes, Timetable
from engine.config.training import OptimConfig, Tokens


class PretrainConfig(Section):
    """What pre-training on documents has, whatever is learnt from them: epochs, batches, documents held out."""

    epochs: int = Field(20, ge=1, le=1000)
    """Passes over the documents; after each the weights are published and measured."""
    steps: int | None = Field(None, ge=0)
    """Optimizer steps of an epoch; left out, as many as take every document once."""
    batch_size: int = Field(2048, ge=1)
    """Documents of a step over all ranks."""
    micro_batch_size: int = Field(64, ge=1)
    """Documents of one forward on one rank; the rest is accumulated or cached, which changes no number."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one forward on one rank, in place of `micro_batch_size`: as many documents as fit, at least one.
    `auto`: the most that a GPU's memory allows, found by trial before the first step."""
    held_out: int = Field(1000, ge=0)
    """Documents that no step takes and the losses are measured on, drawn by the seed (ours)."""
    optim: OptimConfig = OptimConfig(lr=1e-4)
    """Optimizer; its schedule goes over all epochs."""


class EdMlmConfig(PretrainConfig):
    """ED-MLM: encoder and decoder predict masked tokens (Appendix C; SimLM section 3.1 without its generator)."""

    epochs: int = Field(20, ge=1, le=1000)
    """Passes over the documents (Appendix C: 20); after each the weights are published and measured."""
    batch_size: int = Field(2048, ge=1)
    """Documents of a step over all ranks (Appendix C: 2048)."""
    micro_batch_size: int = Field(64, ge=1)
    """Documents of one forward on one rank; the rest is accumulated, which changes no number (SimLM's code: 64)."""
    encoder_mask: float = Field(0.3, gt=0, lt=1)
    """Share of a document's tokens that the encoder does not see (SimLM: 30 %)."""
    decoder_mask: float = Field(0.5, gt=0, lt=1)
    """Share that the decoder does not see, the encoder's among them (SimLM: 50 %)."""
    optim: OptimConfig = OptimConfig(lr=1e-4, warmup_ratio=0.05)
    """Optimizer (Appendix C: 1e-4; SimLM's code: no weight decay, 4000 of 80000 steps of warm-up, norms clipped to 1,
    and a rate of 3e-4)."""

    @model_validator(mode="after")
    def _masks_contain_each_other(self) -> Self:
        if self.decoder_mask < self.encoder_mask:
            raise ValueError(
                f"decoder_mask {self.decoder_mask} is less than encoder_mask {self.encoder_mask}: what is masked for "
                "the encoder is masked for the decoder too"
            )
        return self


class IctConfig(PretrainConfig):
    """ICT: a sentence of a document is a query, and finds the rest of it among the documents of the batch.

    AR2 names the task and none of its numbers. What is not Lee et al.'s (arXiv 1906.00300) is ours.
    """

    epochs: int = Field(20, ge=1, le=1000)
    """Passes over the documents; after each the weights are published and measured (ours: with 21 million passages in
    batches of 4096 about the 100,000 steps of Lee et al.)."""
    batch_size: int = Field(4096, ge=1)
    """Documents of a step over all ranks, each with the others' for negatives (Lee et al.: 4096)."""
    keep: float = Field(0.1, ge=0, le=1)
    """Share of the documents that keep the sentence that is their query (Lee et al.: 10 %)."""
    shortest_query: int = Field(8, ge=1)
    """Tokens of a sentence at least; what ends earlier goes on into the next one, so that no abbreviation and no number
    is a query (ours)."""
    optim: OptimConfig = OptimConfig(lr=1e-4, warmup_ratio=0.1)
    """Optimizer (Lee et al.: 1e-4; the warm-up is ours)."""


class CoCondenserConfig(PretrainConfig):
    """coCondenser: masked tokens are predicted late and by a Condenser's head, and two spans of a document are near.

    Numbers are of Condenser's released code (arXiv 2104.08253) and of coCondenser (arXiv 2108.05540) where they are
    said to be, and ours where not.
    """

    epochs: int = Field(8, ge=1, le=1000)
    """Passes over the documents (Condenser's code: 8); after each the weights are published and measured."""
    batch_size: int = Field(2048, ge=1)
    """Documents of a step over all ranks, each with two spans (coCondenser: about 2048)."""
    micro_batch_size: int = Field(32, ge=1)
    """Documents of one forward on one rank, each with two spans; gradients are cached, which changes no number."""
    mask: float = Field(0.15, gt=0, lt=1)
    """Share of a span's tokens that are masked (Condenser's code: 15 % of them, by whole words)."""
    shortest_span: int = Field(16, ge=1)
    """Tokens of a span at least, where the document has as many for both (ours)."""
    optim: OptimConfig = OptimConfig(lr=1e-4, weight_decay=0.01, warmup_ratio=0.1)
    """Optimizer (Condenser's code: 1e-4, a weight decay of .01, 10 % of warm-up)."""


class PretrainRecipe(Config):
    """What recipes of pre-training share: one phase with a visit each epoch, on the corpus alone."""

    learns_from_queries: ClassVar[bool] = False
    pool: ClassVar[Pool] = "none"
    """Whose documents a document is contrasted with."""

    @property
    def settings(self) -> PretrainConfig:
        """The section of the phase, which has the recipe's name."""
        found: PretrainConfig = getattr(self, self.recipe)
        return found

    @property
    def counts_epochs(self) -> bool:
        """Whether an epoch's steps follow from the number of documents."""
        return self.settings.steps is None

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        """Lay out the epochs for data of some size."""
        (model,) = self.models
        documents = None if sizes is None else sizes.documents
        return epochs_timetable(self.recipe, model, self.settings, documents, pool=self.pool)

    @model_validator(mode="after")
    def _keeps_what_is_measured(self) -> Self:
        if self.run.keep_best is not None:
            raise ValueError(
                f"run.keep_best is {self.run.keep_best!r}, which pre-training does not measure: leave it out; the "
                "weights of every epoch are kept"
            )
        return self


class EdMlmRecipe(PretrainRecipe):
    """ED-MLM: bottleneck pre-training on the corpus alone."""

    algorithm: ClassVar[str] = "engine.pretrain.edmlm"

    recipe: Literal["edmlm"] = "edmlm"
    """The algorithm's name."""
    encoder: BottleneckConfig
    """The model that is pre-trained."""
    edmlm: EdMlmConfig = EdMlmConfig()
    """How."""


class IctRecipe(PretrainRecipe):
    """ICT: a dual encoder is pre-trained on the corpus alone, by queries that are its sentences."""

    algorithm: ClassVar[str] = "engine.pretrain.ict"
    reads_parts: ClassVar[bool] = True
    pool: ClassVar[Pool] = "world"

    recipe: Literal["ict"] = "ict"
    """The algorithm's name."""
    retriever: RetrieverConfig
    """The model that is pre-trained."""
    ict: IctConfig = IctConfig()
    """How."""

    @model_validator(mode="after")
    def _draws_within_a_query(self) -> Self:
        if self.ict.shortest_query > self.retriever.query_max_length:
            raise ValueError(
                f"ict.shortest_query {self.ict.shortest_query} exceeds retriever.query_max_length "
                f"{self.retriever.query_max_length}, the length of a query"
            )
        return self


class CoCondenserRecipe(PretrainRecipe):
    """coCondenser: an encoder is pre-trained on the corpus alone, by masked spans and their contrast."""

    algorithm: ClassVar[str] = "engine.pretrain.cocondenser"
    pool: ClassVar[Pool] = "world"

    recipe: Literal["cocondenser"] = "cocondenser"
    """The algorithm's name."""
    encoder: CondenserConfig
    """The model that is pre-trained."""
    cocondenser: CoCondenserConfig = CoCondenserConfig()
    """How."""


def epochs_timetable(
    name: str, model: str, settings: PretrainConfig, num_documents: int | None, *, pool: Pool = "none"
) -> Timetable:
    """Lay out the epochs: one phase with a visit each.

    Args:
        name: Of the recipe, of its section and of its phase.
        model: Whom it trains.
        settings: Its numbers.
        num_documents: Of the corpus; None where that is not known.
        pool: Whose documents a document is contrasted with.

    Raises:
        ConfigError: The steps of an epoch are left out, and the documents have not been counted.
    """
    left = None if num_documents is None else max(0, num_documents - settings.held_out)
    phase = Phase(
        name=name,
        section=name,
        model=model,
        steps=steps_of(settings.steps, 1.0, settings.batch_size, left, name),
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        num_negatives=0,
        optim=settings.optim,
        candidates=("",) * settings.epochs,
        first_iteration=1,
        pool=pool,
    )
    return Timetable(
        phases=(phase,),
        minings=(),
        iterations=settings.epochs,
        in_each_iteration=(name, "held_out"),
        mine_all=False,
        remove_answers=False,
        held_out=settings.held_out,
    )

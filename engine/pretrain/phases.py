"""The phases of pre-training that its algorithms name: each gives the loop its documents and its objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from engine.config.models import BottleneckConfig, CondenserConfig, RetrieverConfig
from engine.config.timetable import Visit, WeightsOf
from engine.data.corpus import Data
from engine.models.template import Collator
from engine.phases import Trained, train_by
from engine.pretrain.cloze import ClozeBuilder, ClozeRates
from engine.pretrain.condensing import SpanContrast
from engine.pretrain.contrast import ClozeContrast
from engine.pretrain.documents import DocumentSamples, MaskedInputBuilder, ReadingSamples, Split, split_documents
from engine.pretrain.masking import MaskRates
from engine.pretrain.reconstruction import BottleneckReconstruction
from engine.pretrain.spans import SpanBuilder, SpanRates
from engine.run import Run, Stage
from engine.training.loop import Objective
from engine.training.models import Models
from engine.training.publishing import publish_weights

S = TypeVar("S", DocumentSamples, ReadingSamples)


@dataclass(frozen=True, slots=True)
class Started:
    """What a model was before any step.

    Attributes:
        documents: Documents that steps take.
        held_out: Documents that none takes.
    """

    documents: int
    held_out: int


def publish_start(stage: Stage, models: Models, data: Data, split: Split, *, model: str) -> Started:
    """Publish a model as it came, to be measured before its first step.

    Args:
        stage: Where this runs.
        models: All models.
        data: How the model reads text.
        split: The corpus, in two.
        model: Its name in the recipe.
    """
    with models.training(model) as engine:
        publish_weights(stage.run, engine, data.texts[model], WeightsOf(model, None).state)
    return Started(len(split.train), len(split.held_out))


def reconstruct(stage: Stage, models: Models, data: Data, split: Split, rates: MaskRates) -> Trained:
    """Train encoder and decoder to predict what is masked of documents, for one epoch (SimLM section 3.1).

    Args:
        stage: Of an epoch.
        models: All models.
        data: The corpus.
        split: Which documents may be taken.
        rates: How much of a document is masked.
    """
    visit = stage.run.timetable.visit(stage.name)
    name = visit.phase.model

    def reconstruction() -> Objective:
        section = stage.run.config.model(name, BottleneckConfig)
        collate = _collator(models, data, name)
        builder = MaskedInputBuilder.of(data, name, collate, rates, max_length=section.max_length, seed=stage.seed)
        return BottleneckReconstruction(_samples(DocumentSamples, stage, data, split, visit), builder)

    return train_by(stage, models, data, reconstruction, visit)


def contrast_clozes(stage: Stage, models: Models, data: Data, split: Split, rates: ClozeRates) -> Trained:
    """Train a retriever to find the documents that sentences were taken from, for one epoch (Lee et al. 2019).

    Args:
        stage: Of an epoch.
        models: All models.
        data: The corpus.
        split: Which documents may be taken.
        rates: How the sentences are drawn.
    """
    visit = stage.run.timetable.visit(stage.name)
    name = visit.phase.model

    def contrast() -> Objective:
        section = stage.run.config.model(name, RetrieverConfig)
        collate = _collator(models, data, name)
        lengths = section.max_length, section.query_max_length
        builder = ClozeBuilder.of(data, name, collate, rates, lengths=lengths, seed=stage.seed)
        samples = _samples(ReadingSamples, stage, data, split, visit)
        return ClozeContrast(samples, builder, score_scale=section.score_scale)

    return train_by(stage, models, data, contrast, visit)


def condense(stage: Stage, models: Models, data: Data, split: Split, rates: SpanRates) -> Trained:
    """Train an encoder by masked spans and by their contrast, for one epoch (Gao and Callan 2022).

    Args:
        stage: Of an epoch.
        models: All models.
        data: The corpus.
        split: Which documents may be taken.
        rates: How spans are drawn and masked.
    """
    visit = stage.run.timetable.visit(stage.name)
    name = visit.phase.model

    def contrast() -> Objective:
        section = stage.run.config.model(name, CondenserConfig)
        collate = _collator(models, data, name)
        lengths = section.max_length, section.stored_length
        builder = SpanBuilder.of(data, name, collate, rates, lengths=lengths, seed=stage.seed)
        samples = _samples(ReadingSamples, stage, data, split, visit)
        return SpanContrast(samples, builder, score_scale=section.score_scale)

    return train_by(stage, models, data, contrast, visit)


def split_of(data: Data, run: Run) -> Split:
    """Hold documents of a run's corpus out, as many as its timetable says; see `split_documents`."""
    return split_documents(data.shards.num_documents, run.timetable.held_out, run.config.run.seed)


def _collator(models: Models, data: Data, name: str) -> Collator:
    """Return what joins inputs of a model in training, in its texts' template."""
    collate: Collator = models.engines[name].module.collator(data.texts[name].template)  # type: ignore[operator]
    return collate


def _samples(kind: type[S], stage: Stage, data: Data, split: Split, visit: Visit) -> S:
    """Draw from the documents that steps may take, this rank's share."""
    coordinator = stage.run.coordinator
    return kind(visit, stage.seed, split.train, data.shards.docids, coordinator.rank, coordinator.world_size)

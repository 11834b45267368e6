"""Documents in place of queries: which ones a step takes, which are held out, and how they become masked inputs.

The order is a fresh permutation of the documents for each epoch, a function of seed and epoch; documents are read as
the tokens that the shards hold, cut to the recipe's length.

Shapes: M masked tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config.timetable import Visit
from engine.data.batches import G, StepSamples, require_equal_shares, shuffled_rows
from engine.data.corpus import Data
from engine.data.negatives import step_rng
from engine.models.batch import PackedBatch
from engine.models.bottleneck import MaskedInputs
from engine.models.template import Batch, Collator, Input
from engine.models.tokenizer_checks import require_mask_token
from engine.pretrain.masking import MaskRates, draw_masks, mask_rng, ordinary_ids
from shards.docids import Docids
from shards.reader import CorpusShards


@dataclass(frozen=True, slots=True)
class SampledDocument:
    """A document of a step by name, for the post-mortem of one that must not be taken."""

    rank: int
    document: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A document as an epoch reads it, where each epoch draws something else of it.

    Attributes:
        document: Its index in the corpus.
        epoch: How often all documents had their turn before.
    """

    document: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CorpusSamples(StepSamples[G]):
    """What the steps of one visit to a phase of pre-training are made of: documents, in what form a class says.

    Attributes:
        visit: The phase, and which of its visits.
        seed: Of the run.
        documents: Those that may be taken, int64.
        docids: Names of all.
        rank: This rank.
        world_size: Number of ranks.
    """

    visit: Visit
    seed: int
    documents: NDArray[np.int64]
    docids: Docids | Sequence[str]
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_equal_shares(self.visit.phase, self.world_size)

    def taken(self, step: int) -> list[int]:
        """Return the whole step's documents, by their index in the corpus, the same on every rank.

        Args:
            step: Number of the step in the phase's schedule.

        Returns:
            `batch_size` documents in the order of the batch; within an epoch none repeats.
        """
        phase = self.visit.phase
        first = step * phase.batch_size
        rows = shuffled_rows(self.seed, phase.name, first, phase.batch_size, len(self.documents))
        found: list[int] = self.documents[rows].tolist()
        return found

    def names(self, step: int) -> list[SampledDocument]:
        """Name the documents of a step, rank by rank."""
        documents = self.taken(step)
        share = len(documents) // self.world_size
        return [SampledDocument(place // share, self.docids[one]) for place, one in enumerate(documents)]


@dataclass(frozen=True, slots=True)
class DocumentSamples(CorpusSamples[int]):
    """Documents by their index in the corpus, of which each step draws something else."""

    def groups(self, step: int) -> list[int]:
        """Take the whole step's documents."""
        return self.taken(step)


@dataclass(frozen=True, slots=True)
class ReadingSamples(CorpusSamples[Reading]):
    """Documents of which each epoch draws something else."""

    def groups(self, step: int) -> list[Reading]:
        """Take the whole step's documents, each with the epoch whose turn it is; a step may begin an epoch."""
        first, num_documents = step * self.visit.phase.batch_size, len(self.documents)
        return [Reading(one, (first + place) // num_documents) for place, one in enumerate(self.taken(step))]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The corpus in two: what is trained on, and what is not.

    Attributes:
        train: Documents that steps take, ascending, int64.
        held_out: Documents that no step takes, ascending, int64.
    """

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_documents(num_documents: int, num_held_out: int, seed: int) -> Split:
    """Hold documents out, drawn by the seed.

    Args:
        num_documents: Of the corpus.
        num_held_out: How many, fewer than all (`engine.data.requirements.require_enough_documents`).
        seed: Of the run.

    """
    order = step_rng(seed, "held_out", 0, 0).permutation(num_documents)
    return Split(np.sort(order[num_held_out:]), np.sort(order[:num_held_out]))


@dataclass(frozen=True, slots=True)
class MaskedPair:
    """What encoder and decoder read of the same documents.

    Attributes:
        encoder: The encoder's inputs.
        decoder: The decoder's, with more masked.
        num_tokens: Of one of them, padding left out.
    """

    encoder: MaskedInputs
    decoder: MaskedInputs
    num_tokens: int


class MaskedInputBuilder:
    """Makes masked inputs of documents.

    Args:
        shards: The corpus.
        stream: Its token stream that fits the model.
        tokenizer: The model's, for the mask token and for what is never masked.
        collate: Makes batches in the form that the model takes.
        rates: How much is masked.
        max_length: Tokens of a document, special tokens included.
        seed: Of the run.

    Raises:
        ModelError: The tokenizer has no mask token.
    """

    def __init__(
        self,
        shards: CorpusShards,
        stream: str,
        tokenizer: Any,
        collate: Collator,
        rates: MaskRates,
        *,
        max_length: int,
        seed: int,
    ) -> None:
        self._shards, self._stream, self._collate = shards, stream, collate
        self._template, self._rates, self._max_length, self._seed = collate.template, rates, max_length, seed
        self._mask_id = require_mask_token(tokenizer)
        self._ordinary_V = ordinary_ids(tokenizer)

    @classmethod
    def of(
        cls, data: Data, name: str, collate: Collator, rates: MaskRates, *, max_length: int, seed: int
    ) -> MaskedInputBuilder:
        """Build for a model of a recipe.

        Args:
            data: The corpus, and how the models read it.
            name: The model.
            collate: As in the class.
            rates: As in the class.
            max_length: As in the class.
            seed: As in the class.
        """
        text = data.texts[name]
        return cls(data.shards, text.stream, text.tokenizer, collate, rates, max_length=max_length, seed=seed)

    def __call__(self, documents: Iterable[int], stream: str, step: int) -> MaskedPair:
        """Mask documents and join them.

        Args:
            documents: By index in the corpus, at least one.
            stream: Of the random numbers, such as the phase's name.
            step: Number of the step in the phase's schedule.
        """
        inputs, masks = [], []
        for document in documents:
            one = self._template.single(self._shards.tokens(document, self._stream), self._max_length)
            inputs.append(one)
            ids_L = np.asarray(one.ids, dtype=np.int64)
            rng = mask_rng(self._seed, stream, step, document)
            masks.append(draw_masks(self._ordinary_V[ids_L], self._rates, rng))
        encoder = masked_inputs(inputs, [mask.encoder for mask in masks], self._mask_id, self._collate)
        decoder = masked_inputs(inputs, [mask.decoder for mask in masks], self._mask_id, self._collate)
        return MaskedPair(encoder, decoder, sum(len(one.ids) for one in inputs))

    def num_tokens(self, document: int) -> int:
        """Count the tokens of a document's input."""
        length = self._shards.num_tokens(document, self._stream) + self._template.num_special_single
        return min(length, self._max_length)


def masked_inputs(
    inputs: Sequence[Input], places: Sequence[NDArray[np.int64]], mask_id: int, collate: Collator
) -> MaskedInputs:
    """Put the mask's token where tokens are masked, and join inputs.

    Args:
        inputs: At least one.
        places: Of each, which of its tokens are masked, ascending.
        mask_id: Of the mask's token.
        collate: Makes batches in the form that the model takes.
    """
    labels, masked = [], []
    for one, where in zip(inputs, places, strict=True):
        ids_L = np.array(one.ids, dtype=np.int64)
        labels.append(ids_L[where])
        ids_L[where] = mask_id
        masked.append(Input(ids_L, one.type_ids))
    batch = collate(masked)
    starts_N = _starts(batch)
    places_M = np.concatenate([start + where for start, where in zip(starts_N, places, strict=True)])
    return MaskedInputs(batch, torch.from_numpy(places_M.astype(np.int64)), torch.from_numpy(np.concatenate(labels)))


def _starts(batch: Batch) -> list[int]:
    """Return where each input begins when a batch's tokens are laid in one row, in the order they were given."""
    if isinstance(batch, PackedBatch):
        starts: list[int] = batch.first_N.tolist()
        return starts
    num_inputs, length = batch["input_ids"].shape
    return list(range(0, num_inputs * length, length))

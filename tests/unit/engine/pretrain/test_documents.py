"""Which documents a step takes, and the inputs that encoder and decoder get of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.data.batches import rows_drawn
from engine.errors import ConfigError, ModelError
from engine.models.bottleneck import MaskedInputs
from engine.models.tokenizer_checks import require_mask_token
from engine.pretrain.documents import DocumentSamples, MaskedInputBuilder, split_documents
from shards.reader import CorpusShards
from tests.unit.engine.pretrain.conftest import TEXTS

Builder = Callable[..., MaskedInputBuilder]


def samples(rank: int = 0, world_size: int = 1, *, batch_size: int = 4, tokens: int | None = None) -> DocumentSamples:
    phase = Phase("edmlm", "edmlm", "encoder", 5, batch_size, 2, 0, OptimConfig(), ("documents",) * 4, 1, tokens)
    documents = np.arange(100, 110)
    return DocumentSamples(phase.visits[1], 42, documents, [f"d{number}" for number in range(200)], rank, world_size)


def test_an_epoch_takes_every_document_once_and_the_next_in_another_order() -> None:
    taken = [document for step in range(5) for document in samples().groups(step)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(100, 110))
    assert taken[:10] != taken[10:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_takes_the_same_documents_in_the_same_order(world_size: int) -> None:
    whole = samples().groups(3)
    ranks = [samples(rank, world_size) for rank in range(world_size)]
    assert [one for rank in ranks for one in rank.share(rank.groups(3))] == whole
    pieces = [list(rank.micro_batches(rank.groups(3), 3, [lambda document: 1])) for rank in ranks]
    assert [one for rank in pieces for micro in rank for one in micro.groups] == whole
    assert all([micro.last for micro in rank] == [False] * (len(rank) - 1) + [True] for rank in pieces)
    assert [(one.rank, one.document) for one in ranks[0].names(3)] == [
        (place // (4 // world_size), f"d{document}") for place, document in enumerate(whole)
    ]


def test_micro_batches_are_cut_by_the_tokens_of_documents() -> None:
    found = samples(tokens=10)
    micros = list(found.micro_batches(found.groups(0), 0, [lambda document: 4]))
    assert [len(micro.groups) for micro in micros] == [2, 2]


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"edmlm\.batch_size is 4, which 3 ranks cannot share"):
        samples(0, 3)


def test_what_is_held_out_is_drawn_by_the_seed_and_never_trained_on() -> None:
    split, same, other = (split_documents(50, 8, seed) for seed in (1, 1, 2))
    assert sorted([*split.train, *split.held_out]) == list(range(50))
    assert len(split.held_out) == 8
    np.testing.assert_array_equal(split.held_out, same.held_out)
    assert split.held_out.tolist() != other.held_out.tolist()


def rows_of(inputs: MaskedInputs, packs: bool) -> list[list[int]]:
    """The token ids of each input, as the model reads them."""
    batch: Any = inputs.batch
    if not packs:
        return [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    row, bounds = batch.input_ids[0], batch.bounds_N.tolist()
    return [row[bounds[place] : bounds[place + 1]].tolist() for place in batch.places_N.tolist()]


@pytest.mark.parametrize("packs", [False, True])
def test_inputs_are_the_tokenizers_with_masked_tokens_in_the_places_that_are_told(
    builder_of: Builder, tokenizer: Any, packs: bool
) -> None:
    documents = range(len(TEXTS))
    pair = builder_of(packs=packs)(documents, "edmlm", 3)
    whole: list[list[int]] = tokenizer(list(TEXTS))["input_ids"]
    assert pair.num_tokens == sum(map(len, whole))
    for inputs, rate in ((pair.encoder, 0.3), (pair.decoder, 0.5)):
        batch: Any = inputs.batch
        row = (batch.input_ids if packs else batch["input_ids"]).flatten()
        assert (row[inputs.places_M] == tokenizer.mask_token_id).all()
        assert (row == tokenizer.mask_token_id).sum() == len(inputs.places_M)
        found = rows_of(inputs, packs)
        labels = iter(inputs.labels_M.tolist())
        restored = [[next(labels) if one == tokenizer.mask_token_id else one for one in read] for read in found]
        assert restored == whole, "labels come document by document, place by place"
        ordinary = [sum(one not in tokenizer.all_special_ids for one in text) for text in whole]
        assert [read.count(tokenizer.mask_token_id) for read in found] == [
            max(1, round(rate * count)) if count else 0 for count in ordinary
        ]
    seen_by_decoder = rows_of(pair.decoder, packs)
    for read, below in zip(rows_of(pair.encoder, packs), seen_by_decoder, strict=True):
        hidden = {place for place, one in enumerate(read) if one == tokenizer.mask_token_id}
        assert hidden <= {place for place, one in enumerate(below) if one == tokenizer.mask_token_id}


def test_documents_are_cut_to_the_length(builder_of: Builder, tokenizer: Any) -> None:
    builder = builder_of(max_length=12)
    pair = builder([8], "edmlm", 0)
    assert pair.num_tokens == builder.num_tokens(8) == 12
    assert builder.num_tokens(0) == len(tokenizer(TEXTS[0])["input_ids"])
    (read,) = rows_of(pair.decoder, True)
    assert (read[0], read[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_a_batch_with_nothing_to_mask_is_whole(builder_of: Builder) -> None:
    pair = builder_of()([9], "edmlm", 0)
    assert len(pair.encoder.labels_M) == len(pair.decoder.places_M) == 0


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="has no mask token"):
        require_mask_token(SimpleNamespace(mask_token_id=None))


def test_documents_are_shuffled_as_queries_are(corpus: CorpusShards) -> None:
    """One order serves both, so that what is known of it (no rank, no state) holds for documents."""
    phase = samples().visit.phase
    taken = {document - 100 for document in samples().groups(0)}
    first = rows_drawn([phase.visits[0]], 42, 10)
    assert taken <= set(first.tolist())
    assert corpus.num_documents == len(TEXTS)

"""The bottleneck model: its decoder knows of a text what the encoder's first state and its own input hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from engine.errors import ModelError
from engine.models.batch import PackedBatch
from engine.models.bottleneck import BottleneckLM, MaskedInputs
from engine.models.loading import load_tokenizer
from engine.models.template import Collator, Input, InputTemplate

MASK = 4
TEXTS = ([2, 11, 12, 13, 14, 15, 3], [2, 21, 22, 3], [2, 31, 32, 33, 34, 3])
HIDDEN = {"encoder": ([1, 3], [2], [4]), "decoder": ([1, 2, 3], [1, 2], [2, 4])}
"""Places that are masked in each text; no place is a special token's."""


@pytest.fixture(scope="module")
def model(random_model: Path) -> BottleneckLM:
    return BottleneckLM.load(str(random_model))


@pytest.fixture(scope="module")
def template(random_model: Path) -> InputTemplate:
    return InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))


def masked(collate: Collator, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> MaskedInputs:
    """Mask by hand, and find the places in the row by what stands there."""
    rows = [
        [MASK if place in hidden else one for place, one in enumerate(text)]
        for text, hidden in zip(texts, places, strict=True)
    ]
    batch = collate([Input(row, [0] * len(row)) for row in rows])
    if isinstance(batch, PackedBatch):
        starts = batch.first_N.tolist()
    else:
        starts = [number * batch["input_ids"].shape[1] for number in range(len(texts))]
    where = [start + place for start, hidden in zip(starts, places, strict=True) for place in hidden]
    labels = [text[place] for text, hidden in zip(texts, places, strict=True) for place in hidden]
    return MaskedInputs(batch, torch.tensor(where, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


def predict(
    model: BottleneckLM, template: InputTemplate, packs: bool, texts: Any = TEXTS, hidden: Any = HIDDEN
) -> tuple[Tensor, Tensor]:
    collate = replace(model.collator(template), packs=packs)
    with torch.no_grad():
        return model(**{side: masked(collate, texts, hidden[side]) for side in ("encoder", "decoder")})


def by_hand(
    model: BottleneckLM, texts: Any = TEXTS, hidden: Any = HIDDEN, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute text by text, with transformers' own forward for the encoder and its head."""
    lm = model.masked_lm
    encoded, decoded = [], []
    with torch.no_grad():
        for text, of_encoder, of_decoder in zip(texts, hidden["encoder"], hidden["decoder"], strict=True):
            read = torch.tensor([[MASK if place in of_encoder else one for place, one in enumerate(text)]])
            output = lm(input_ids=read, output_hidden_states=True)
            encoded.append(output.logits[0, list(of_encoder)])
            state = output.hidden_states[-1][:, :1] if first is None else first[None, None]
            below = torch.tensor([[MASK if place in of_decoder else one for place, one in enumerate(text)]])
            states = torch.cat([state, lm.bert.embeddings(below)[:, 1:]], 1)
            for layer in model.decoder:
                states = layer(states)
            decoded.append(lm.cls(states)[0, list(of_decoder)])
    return torch.cat(encoded), torch.cat(decoded)


@pytest.mark.parametrize("packs", [False, True])
def test_predictions_are_those_of_each_text_by_itself(
    model: BottleneckLM, template: InputTemplate, packs: bool
) -> None:
    """Neither padding nor the neighbours in a row reach a text, and what is predicted stands where it was masked."""
    assert model.packs
    for ours, expected in zip(predict(model, template, packs), by_hand(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_begins_as_the_last_layers_and_shares_embeddings_and_head(random_model: Path) -> None:
    model = BottleneckLM.load(str(random_model), num_decoder_layers=1)
    own = model.masked_lm.bert.encoder.layer[-1].state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.decoder[0].state_dict().items())
    assert model.decoder[0] is not model.masked_lm.bert.encoder.layer[-1]
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.startswith("decoder.") for name in names) == len(own), "the decoder has layers of its own alone"
    assert sum("word_embeddings" in name for name in names) == 1


@pytest.mark.parametrize("packs", [False, True])
def test_what_is_masked_reaches_no_prediction(model: BottleneckLM, template: InputTemplate, packs: bool) -> None:
    """Other tokens under the masks give the same predictions, bit by bit; others beside them do not."""
    before = predict(model, template, packs)
    hidden_from_both = [[*text] for text in TEXTS]
    hidden_from_both[0][1], hidden_from_both[2][4] = 77, 78  # masked in both inputs
    assert all(map(torch.equal, before, predict(model, template, packs, hidden_from_both)))
    seen = [[*text] for text in TEXTS]
    seen[0][5] = 77  # read by both
    changed = predict(model, template, packs, seen)
    assert not torch.equal(before[0][:2], changed[0][:2])
    assert not torch.equal(before[1][:3], changed[1][:3])
    assert torch.equal(before[0][2:], changed[0][2:]), "another text's predictions changed"
    assert torch.equal(before[1][3:], changed[1][3:]), "another text's predictions changed"


def test_the_decoder_knows_what_it_does_not_read_through_the_first_state_alone(
    model: BottleneckLM, template: InputTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that only the encoder reads changes the decoder's predictions, but not where the first state is fixed."""
    collate, seen = model.collator(template), [[*text] for text in TEXTS]
    seen[0][2] = 77  # the encoder reads it, from the decoder it is hidden
    before, after = predict(model, template, True), predict(model, template, True, seen)
    assert not torch.equal(before[1], after[1])
    fixed = torch.randn(len(TEXTS), 32, generator=torch.Generator().manual_seed(1))
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda _first_NH, batch: decode(fixed, batch))
    ablated = [predict(model, template, True, texts)[1] for texts in (TEXTS, seen)]
    assert torch.equal(*ablated), "other states of the encoder reach the decoder"
    assert not torch.allclose(ablated[0], before[1], atol=1e-3), "the decoder does not use the first state"
    labels = masked(collate, TEXTS, HIDDEN["decoder"]).labels_M
    losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in (before[1], ablated[0])]
    assert float((losses[0] - losses[1]).abs()) > 1e-3


def test_the_decoders_loss_teaches_the_encoder_through_the_first_state(
    model: BottleneckLM, template: InputTemplate
) -> None:
    collate = model.collator(template)
    inputs = {side: masked(collate, TEXTS, HIDDEN[side]) for side in ("encoder", "decoder")}
    _, decoded = model(**inputs)
    loss = torch.nn.functional.cross_entropy(decoded, inputs["decoder"].labels_M)
    (gradient,) = torch.autograd.grad(loss, [model.masked_lm.bert.encoder.layer[0].output.dense.weight])
    assert float(gradient.abs().max()) > 0


def test_nothing_masked_is_no_error(model: BottleneckLM, template: InputTemplate) -> None:
    none = {"encoder": ([], [], []), "decoder": ([], [], [])}
    assert [one.shape for one in predict(model, template, True, hidden=none)] == [
        (0, model.masked_lm.config.vocab_size)
    ] * 2


def test_padding_beyond_the_last_position_moves_no_prediction(
    random_model: Path, template: InputTemplate, tmp_path: Path
) -> None:
    """A batch is padded to a multiple of eight, which may be more than the model has positions."""
    config = BertConfig.from_pretrained(random_model, max_position_embeddings=7)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    load_tokenizer(str(random_model)).save_pretrained(tmp_path)
    short = BottleneckLM.load(str(tmp_path))
    for ours, expected in zip(predict(short, template, False), by_hand(short), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_saved_and_opened_it_is_the_same(
    model: BottleneckLM, template: InputTemplate, random_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    trained = BottleneckLM.load(str(random_model))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    trained.save(tmp_path / "w", load_tokenizer(str(random_model)), metadata={"attention": "sdpa", "max_length": 20})
    opened = BottleneckLM.open(tmp_path / "w")
    assert all(map(torch.equal, predict(trained, template, True), predict(opened, template, True)))
    again = BottleneckLM.load(str(tmp_path / "w"))
    assert all(map(torch.equal, predict(trained, template, True), predict(again, template, True)))
    assert json.loads((tmp_path / "w" / "sparring.json").read_text())["decoder_layers"] == 2
    with pytest.raises(ModelError, match=r"decoder of 2 layers, encoder\.decoder_layers is 1") as error:
        BottleneckLM.load(str(tmp_path / "w"), num_decoder_layers=1)
    assert "encoder.decoder_layers=2" in str(error.value)
    ids = torch.tensor([TEXTS[0]])
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "w").eval()
    assert torch.equal(plain(ids).logits, trained.masked_lm(ids).logits)
    encoder = AutoModel.from_pretrained(tmp_path / "w").eval()
    assert torch.equal(encoder(ids).last_hidden_state, trained.masked_lm.bert(ids).last_hidden_state)


def test_a_checkpoint_without_a_head_is_refused(random_model: Path, tmp_path: Path) -> None:
    """Predictions by a random head would be learnt, but nobody asked for that."""
    BertModel.from_pretrained(random_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no masked-LM head") as error:
        BottleneckLM.load(str(tmp_path))
    assert "encoder.name" in str(error.value)


def test_more_decoder_layers_than_the_encoder_has_are_refused(random_model: Path) -> None:
    with pytest.raises(ModelError, match="which has 2") as error:
        BottleneckLM.load(str(random_model), num_decoder_layers=3)
    assert "encoder.decoder_layers" in str(error.value)


SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_a_roberta_is_of_the_form_too(random_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=40, pad_token_id=1)).save_pretrained(tmp_path)
    model = BottleneckLM.load(str(tmp_path))
    template = InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))
    padded, packed = (predict(model, replace(template, pad_id=1), packs) for packs in (False, True))
    for one, other in zip(padded, packed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_layers_that_give_other_states_one_by_one_are_refused(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = BertModel.forward

    def doubled(self: Any, *words: Any, **settings: Any) -> Any:
        output = forward(self, *words, **settings)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    monkeypatch.setattr(BertModel, "forward", doubled)
    with pytest.raises(ModelError, match="BertForMaskedLM, which gives other states when its layers"):
        BottleneckLM.load(str(random_model))


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        (MPNetConfig(**SMALL), MPNetForMaskedLM, "relative_attention_bias"),
        (ElectraConfig(**SMALL, embedding_size=16), ElectraForMaskedLM, "head in none of cls or lm_head"),
    ],
)
def test_other_forms_are_refused_by_name(config: Any, kind: Any, reason: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is a {kind.__name__}, which .*{reason}"):
        BottleneckLM.load(str(tmp_path), attention=None)

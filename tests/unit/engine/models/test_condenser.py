"""A Condenser: its head reads an inner layer's states and the last first one; what is kept is the plain encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from engine.errors import ModelError
from engine.models.bottleneck import BottleneckLM
from engine.models.condenser import CondenserLM
from engine.models.export import export_model
from engine.models.loading import load_tokenizer
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from shards.files import read_json
from tests.unit.engine.models.test_bottleneck import HIDDEN, MASK, TEXTS, masked


@pytest.fixture(scope="module")
def model(random_model: Path) -> CondenserLM:
    return CondenserLM.load(str(random_model), skip_from=1)


@pytest.fixture(scope="module")
def template(random_model: Path) -> InputTemplate:
    return InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))


@pytest.fixture(scope="module")
def saved(model: CondenserLM, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("condenser") / "weights"
    model.save(folder, load_tokenizer(str(random_model)), metadata={"max_length": 24})
    return folder


@pytest.mark.parametrize("packs", [False, True])
def test_predictions_are_those_of_each_text_by_itself(model: CondenserLM, template: InputTemplate, packs: bool) -> None:
    """Computed with transformers' own forward: its hidden states behind layer 1 and behind the last."""
    spans = masked(replace(model.collator(template), packs=packs), TEXTS, HIDDEN["encoder"])
    lm = model.masked_lm
    firsts, late, head = [], [], []
    with torch.no_grad():
        first_NH, predictions = model(spans)
        for text, hidden in zip(TEXTS, HIDDEN["encoder"], strict=True):
            read = torch.tensor([[MASK if place in hidden else one for place, one in enumerate(text)]])
            output = lm(input_ids=read, output_hidden_states=True)
            states = torch.cat([output.hidden_states[-1][:, :1], output.hidden_states[1][:, 1:]], 1)
            for layer in model.decoder:
                states = layer(states)
            firsts.append(output.hidden_states[-1][0, 0])
            late.append(output.logits[0, list(hidden)])
            head.append(lm.cls(states)[0, list(hidden)])
    assert predictions is not None
    for ours, expected in zip(
        (first_NH, *predictions), (torch.stack(firsts), *map(torch.cat, (late, head))), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(predictions[0], predictions[1], atol=1e-3)


def test_first_states_are_the_same_without_predictions_dropout_included(
    random_model: Path, template: InputTemplate
) -> None:
    """Gradient caching represents a chunk without predictions first, and with them again."""
    model = CondenserLM.load(str(random_model), skip_from=1, dropout=0.2).train()
    spans, firsts = masked(model.collator(template), TEXTS, HIDDEN["encoder"]), []
    for predicts in (False, True):
        torch.manual_seed(3)
        firsts.append(model(spans, predicts=predicts)[0].detach())
    assert torch.equal(*firsts)
    assert not torch.equal(firsts[0], model(spans, predicts=False)[0])


def test_it_is_read_back_with_its_head(model: CondenserLM, saved: Path) -> None:
    opened = CondenserLM.open(saved)
    assert isinstance(opened, CondenserLM)
    assert (opened.skip_from, len(opened.decoder)) == (1, 2)
    own = model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in opened.state_dict().items())


def test_the_export_is_the_plain_encoder(model: CondenserLM, saved: Path, tmp_path: Path) -> None:
    assert export_model(saved, tmp_path / "export") <= 1e-4
    assert not (tmp_path / "export" / "decoder").exists()
    assert "skip_from" not in read_json(tmp_path / "export" / "sparring.json", "metadata")
    own = model.masked_lm.bert.state_dict()
    loaded = AutoModel.from_pretrained(tmp_path / "export", add_pooling_layer=False).state_dict()
    assert loaded.keys() <= own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.items())
    start = Retriever.load(str(tmp_path / "export"), pooling="cls", similarity="dot", tied=True)
    assert all(
        torch.equal(own[name.removeprefix("towers.shared.")], weight) for name, weight in start.named_parameters()
    )


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda random, saved, edmlm: CondenserLM.load(random, skip_from=2), r"skip_from is 2.*has 2 layers.*1 to 1"),
        (
            lambda random, saved, edmlm: BottleneckLM.load(saved),
            "has a Condenser's head, which reads states of layer 1",
        ),
        (lambda random, saved, edmlm: CondenserLM.load(edmlm, skip_from=1), "has a decoder that reads embeddings"),
    ],
)
def test_what_does_not_fit_is_refused(load: Any, message: str, random_model: Path, saved: Path, tmp_path: Path) -> None:
    BottleneckLM.load(str(random_model)).save(tmp_path / "edmlm", load_tokenizer(str(random_model)))
    with pytest.raises(ModelError, match=message):
        load(str(random_model), str(saved), str(tmp_path / "edmlm"))


def test_a_head_of_another_layer_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CondenserLM, "require_own", lambda self, *_: setattr(self, "skip_from", 5))
    with pytest.raises(ModelError, match=r"reads states of layer 5, encoder\.skip_from is 1.*skip_from=5"):
        CondenserLM.load(str(saved), skip_from=1)

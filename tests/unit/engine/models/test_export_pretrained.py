"""A pre-trained encoder as others load it: transformers, and recipes of ours that start from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from engine.config.models import LexicalConfig, RankerConfig, RetrieverConfig
from engine.errors import ArtifactError
from engine.models.agreement import require_agreement
from engine.models.bottleneck import BottleneckLM
from engine.models.export import export_model, verify_export
from engine.models.lexical import Lexical
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever

METADATA = {"max_length": 24, "query_max_length": 24, "template": "{text}", "attention": "sdpa", "base": "a BERT"}


@pytest.fixture(scope="module")
def weights(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that has left its start, decoder and all."""
    folder = tmp_path_factory.mktemp("pretrained") / "weights"
    model = BottleneckLM.load(str(random_model))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 30)
    model.save(folder, load_tokenizer(str(random_model)), metadata=METADATA)
    return folder


def test_an_export_gives_our_states_and_predictions(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    assert export_model(weights, target) < 1e-6
    assert not (target / "decoder").exists()
    ours, text = BottleneckLM.open(weights), "the retriever embeds a query [MASK] a document"
    batch = AutoTokenizer.from_pretrained(target)(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(target).eval()(**batch).last_hidden_state
        torch.testing.assert_close(states[:, 0], ours.first_states(dict(batch)))
        predicted = AutoModelForMaskedLM.from_pretrained(target).eval()(**batch).logits
        torch.testing.assert_close(predicted, ours.masked_lm(**batch).logits)
    assert "bottleneck" in (target / "README.md").read_text()


def test_models_of_other_recipes_start_from_it(weights: Path, tmp_path: Path) -> None:
    """What `retriever.name` and `ranker.name` load has the encoder's weights; and pre-training may go on from it."""
    target = tmp_path / "export"
    export_model(weights, target)
    own = BottleneckLM.open(weights).masked_lm.bert.state_dict()
    retriever = Retriever.load(str(target), pooling="cls", similarity="dot", tied=True)
    ranker = Ranker.load(str(target), seed=1)
    again = BottleneckLM.load(str(target), num_decoder_layers=1)
    lexical = Lexical.load(str(target)).towers["shared"]
    for backbone in (retriever.towers["shared"], ranker.classifier.bert, again.masked_lm.bert, lexical.bert):
        found = backbone.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in own.items())
    head = BottleneckLM.open(weights).masked_lm.cls.state_dict()
    for masked_lm in (again.masked_lm, lexical):
        assert all(torch.equal(masked_lm.cls.state_dict()[name], weight) for name, weight in head.items())
    name = str(target)
    for section in (LexicalConfig(name=name), RetrieverConfig(name=name)):
        assert not require_agreement(section, name, section.kind), "it starts them as any checkpoint would"
    (note,) = require_agreement(RankerConfig(name=name), name, "ranker")
    assert not note.warns


def test_an_export_that_was_changed_is_refused(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    export_model(weights, target)
    stored = load_file(target / "model.safetensors")
    stored["cls.predictions.transform.dense.weight"][0] += 1
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="differs from ours"):
        verify_export(weights, target)

"""The ranker's head in float32 whatever its weights, and the ranker's scores from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from engine.models.fused import FusedLinear
from engine.models.head import Float32LayerNorm, Float32Linear, compute_head_in_float32
from engine.models.loading import load_tokenizer
from engine.models.packed import ModelError, Scorer
from engine.models.ranker import Ranker
from engine.models.score import score_inputs
from engine.models.template import Batch, Input, InputTemplate

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 1}


@pytest.fixture(scope="module")
def template(random_model: Path) -> InputTemplate:
    return InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))


def pairs(template: InputTemplate, count: int = 40) -> list[Input]:
    rng = np.random.default_rng(0)
    return [
        template.pair(rng.integers(5, 50, rng.integers(1, 9)), rng.integers(5, 50, rng.integers(1, 30)), 32)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("kind", "layers"), [("Bert", 2), ("Roberta", 2), ("Electra", 2), ("DistilBert", 2), ("Albert", 2)]
)
def test_the_head_computes_in_float32(kind: str, layers: int) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **({"dim": 32, "n_heads": 4} if kind[0] == "D" else {}))
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    names = list(classifier.state_dict())
    compute_head_in_float32(classifier)
    compute_head_in_float32(classifier)  # harmless
    head = [module for module in classifier.modules() if type(module) is Float32Linear]
    assert len(head) == layers
    assert list(classifier.state_dict()) == names
    classifier.bfloat16()
    for module in head:
        assert module(torch.ones(2, module.in_features, dtype=torch.bfloat16)).dtype == torch.float32


def test_float64_stays_float64() -> None:
    ones = torch.ones(2, 4, dtype=torch.float64)
    assert Float32Linear(4, 3).double()(ones).dtype == torch.float64
    assert Float32LayerNorm(4).double()(ones).dtype == torch.float64


def test_a_head_with_a_normalisation_meets_one_type() -> None:
    config = transformers.ModernBertConfig(**SIZES, vocab_size=50, pad_token_id=0)
    classifier = transformers.ModernBertForSequenceClassification(config).eval()
    compute_head_in_float32(classifier)
    assert isinstance(classifier.head.norm, Float32LayerNorm)
    logits = classifier.bfloat16()(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
    assert logits.dtype == torch.float32


def test_a_head_of_an_unknown_kind_stays_as_it_is() -> None:
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=50))
    classifier.extra = nn.Bilinear(2, 2, 2)
    compute_head_in_float32(classifier)
    assert type(classifier.classifier) is nn.Linear


def test_a_head_adds_no_rounding_of_its_own(random_model: Path, template: InputTemplate) -> None:
    """Symptom: a head in bfloat16 put scores on a grid of three digits, coarser than what separates good candidates."""
    ranker = Ranker.load(str(random_model)).bfloat16()
    with torch.no_grad():
        ranker.classifier.classifier.bias.fill_(8.0)
    batch, bert = template.pad(pairs(template)), ranker.classifier.bert
    with torch.inference_mode():
        found_N = ranker(batch)
        first_NH = bert(**batch).last_hidden_state[:, 0].double()
        pooled_NH = torch.tanh(nn.functional.linear(first_NH, bert.pooler.dense.weight.double()))
        by_hand_N = nn.functional.linear(pooled_NH, ranker.classifier.classifier.weight.double())[:, 0] + 8.0
        for module in ranker.modules():
            if type(module) is Float32Linear:
                module.__class__ = nn.Linear
        before_N = ranker(batch)
    assert found_N.dtype == torch.float32
    assert float((found_N - by_hand_N).abs().max()) < 1e-5
    assert float((before_N - by_hand_N).abs().max()) > 1e-2


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [64, 10_000])
def test_a_scorer_gives_the_scores_of_the_ranker(
    random_model: Path, template: InputTemplate, packs: bool, tokens_per_batch: int
) -> None:
    ranker, inputs = Ranker.load(str(random_model)), pairs(template)
    assert ranker.packs
    ranker.packs = packs
    device = torch.device("cpu")
    scorer = ranker.scorer()
    found_N = score_inputs(scorer, ranker.collator(template), inputs, tokens_per_batch=tokens_per_batch, device=device)
    with torch.inference_mode():
        expected_N = ranker(template.pad(inputs))
    np.testing.assert_allclose(found_N, expected_N.numpy(), atol=1e-5)
    assert found_N.std() > 1e-3
    assert any(isinstance(module, FusedLinear) for module in scorer._classifier.modules())
    assert not any(isinstance(module, FusedLinear) for module in ranker.modules())


def test_a_scorer_keeps_no_graph_and_takes_no_model_in_training(random_model: Path, template: InputTemplate) -> None:
    ranker = Ranker.load(str(random_model))
    batch: Batch = ranker.collator(template)(pairs(template))
    assert not ranker.scorer()(batch).requires_grad
    assert ranker(batch).requires_grad
    with pytest.raises(ModelError, match="training mode"):
        Scorer(ranker.train().classifier, packs=True)


def test_packed_scores_of_a_saved_ranker(random_model: Path, template: InputTemplate, tmp_path: Path) -> None:
    """What packing does to a model must leave no trace in its files."""
    tokenizer = load_tokenizer(str(random_model))
    ranker, inputs = Ranker.load(str(random_model), seed=3), pairs(template)
    batch = ranker.collator(template)(inputs)
    ranker.save(tmp_path, tokenizer)
    assert "packed" not in (tmp_path / "config.json").read_text()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected_N = theirs(**template.pad(inputs)).logits[:, 0]
        for one in (ranker, Ranker.open(tmp_path)):
            torch.testing.assert_close(one(batch), expected_N, atol=1e-5, rtol=1e-5)

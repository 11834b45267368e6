from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from engine.errors import ModelError
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate

PAIRS = [("what is a container?", "lists, tuples and dictionaries"), ("the query", "the document " * 9)]


@pytest.fixture(scope="module")
def tokenizer(random_model: Path) -> Any:
    return load_tokenizer(str(random_model))


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> dict[str, Tensor]:
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in PAIRS]
    return template.pad([template.pair(a, b, 32) for a, b in ids])


def test_scores_are_the_raw_logits_in_float32(random_model: Path, pairs: dict[str, Tensor]) -> None:
    ranker = Ranker.load(str(random_model))
    with torch.inference_mode():
        scores_N = ranker(pairs)
        states_NLH = ranker.classifier.bert(**pairs).last_hidden_state
        pooled_NH = torch.tanh(ranker.classifier.bert.pooler.dense(states_NLH[:, 0]))
        by_hand_N = pooled_NH @ ranker.classifier.classifier.weight[0] + ranker.classifier.classifier.bias
    assert scores_N.shape == (2,)
    assert torch.allclose(scores_N, by_hand_N, atol=1e-6)
    assert scores_N[0] != scores_N[1]
    assert ranker.to(torch.bfloat16)(pairs).dtype == torch.float32
    assert ranker.longest_input == 512


def test_the_seed_decides_the_fresh_head_and_nothing_else(random_model: Path) -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (Ranker.load(str(random_model), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), undisturbed)
    head = "classifier.classifier.weight"
    assert torch.equal(one.state_dict()[head], same.state_dict()[head])
    assert one.state_dict()[head].abs().sum() > 0
    differing = [name for name, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[name])]
    assert differing == [head]


def test_a_missing_pooler_comes_from_the_seed_too(random_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The retriever has no pooler, so weights saved by it carry none."""
    retriever = Retriever.load(str(random_model), pooling="cls", similarity="dot", tied=True)
    retriever.save(tmp_path, tokenizer)
    one, same = (Ranker.load(str(tmp_path), seed=7).state_dict() for _ in range(2))
    assert "classifier.bert.pooler.dense.weight" in one
    assert all(torch.equal(value, same[name]) for name, value in one.items())


def test_gradients_reach_every_parameter_also_with_checkpointing(random_model: Path, pairs: dict[str, Tensor]) -> None:
    gradients = []
    for checkpointing in (False, True):
        ranker = Ranker.load(str(random_model), dropout=0.0, gradient_checkpointing=checkpointing).train()
        ranker(pairs).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in ranker.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_a_saved_ranker_comes_back_whatever_the_seed(
    random_model: Path, pairs: dict[str, Tensor], tmp_path: Path, tokenizer: Any
) -> None:
    ranker = Ranker.load(str(random_model), num_layers=1, seed=4)
    ranker.save(tmp_path, tokenizer, metadata={"max_length": 32})
    weights = ranker.state_dict()
    for again in (Ranker.open(tmp_path), Ranker.load(str(tmp_path), seed=9)):
        assert again.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    with torch.inference_mode():
        # Some processors' kernels round otherwise where weights lie otherwise aligned in memory.
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**pairs).logits[:, 0]
        torch.testing.assert_close(theirs, ranker(pairs), atol=1e-6, rtol=1e-6)


def test_a_saved_ranker_without_its_head_is_refused(random_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    """A pre-trained backbone may lack a head, a trained ranker may not: it would get a random one."""
    Ranker.load(str(random_model)).save(tmp_path, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 parameters .*: classifier\.weight"):
        Ranker.open(tmp_path)


def test_a_head_with_more_logits_is_refused(random_model: Path, tmp_path: Path) -> None:
    """The message was that of any failed load, "check the name"; the remedy given now is followed here."""
    folder = shutil.copytree(random_model, tmp_path / "three")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"gives 3 logits .* Expected: 1 logit.* duel\.name=FOLDER") as refusal:
        Ranker.load(str(folder), section="duel")
    assert f'AutoModel.from_pretrained("{folder}").save_pretrained(FOLDER)' in refusal.value.remedy
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    assert Ranker.load(str(tmp_path / "base")).classifier.config.num_labels == 1


def test_half_a_head_is_refused(random_model: Path, tmp_path: Path) -> None:
    """A head whose weight is there and whose bias is not is a damaged checkpoint, not a base model."""
    folder = shutil.copytree(random_model, tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("classifier.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 parameters .*: classifier\.bias"):
        Ranker.load(str(folder))

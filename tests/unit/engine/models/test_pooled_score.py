"""Rankers whose head is a linear layer on raw token states: scores by hand, files, starts and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from engine.config.models import RankerConfig
from engine.errors import ModelError
from engine.models.agreement import require_agreement
from engine.models.export import export_ranker
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.template import Input, InputTemplate
from tests.unit.engine.models.test_head import SIZES, pairs

LENGTH = 24
HEADS: Any = pytest.mark.parametrize("head", ["cls", "mean"])
TEXTS = [("what is a container?", "lists, tuples and dictionaries"), ("the query", "the document " * 3)]


@pytest.fixture(scope="module")
def tokenizer(random_model: Path) -> Any:
    return load_tokenizer(str(random_model))


@pytest.fixture(scope="module")
def inputs(tokenizer: Any) -> list[Input]:
    return pairs(InputTemplate.from_tokenizer(tokenizer), 6)


@pytest.fixture(scope="module")
def padded(tokenizer: Any, inputs: list[Input]) -> dict[str, Tensor]:
    return InputTemplate.from_tokenizer(tokenizer).pad(inputs)


def load(folder: Path, head: Any, **options: Any) -> Ranker:
    """Load a ranker whose scores are well apart."""
    ranker = Ranker.load(str(folder), head=head, **options)
    with torch.no_grad():
        ranker.classifier.head[0].linear.weight.mul_(20)
        ranker.classifier.head[0].linear.bias.fill_(0.25)
    return ranker


def save(ranker: Ranker, folder: Path, tokenizer: Any) -> Path:
    ranker.save(folder, tokenizer, metadata={"max_length": LENGTH})
    return folder


def scores(ranker: Ranker, folder: Path) -> Tensor:
    tokenizer = load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = [tokenizer(list(pair), add_special_tokens=False)["input_ids"] for pair in TEXTS]
    with torch.inference_mode():
        return ranker(template.pad([template.pair(*pair, LENGTH) for pair in ids]))


@HEADS
def test_scores_are_a_linear_layer_on_raw_states(
    random_model: Path, tokenizer: Any, inputs: list[Input], padded: dict[str, Tensor], head: str
) -> None:
    ranker = load(random_model, head)
    linear = ranker.classifier.head[0].linear
    with torch.inference_mode():
        states_NLH = ranker.backbone(**padded).last_hidden_state.double()
        mask_NL1 = padded["attention_mask"][..., None]
        pooled_NH = states_NLH[:, 0] if head == "cls" else (states_NLH * mask_NL1).sum(1) / mask_NL1.sum(1)
        by_hand_N = (pooled_NH @ linear.weight.double().T)[:, 0] + linear.bias.double()
        packed = ranker.collator(InputTemplate.from_tokenizer(tokenizer))(inputs)
        assert ranker.packs
        for found_N in (ranker(padded), ranker(packed), ranker.scorer()(packed), ranker.scorer()(padded)):
            assert found_N.dtype == torch.float32
            torch.testing.assert_close(found_N.double(), by_hand_N, atol=1e-5, rtol=1e-5)
        assert by_hand_N.std() > 0.1
    assert (ranker.head, ranker.longest_input) == (head, 512)
    assert ranker.head_names == {"classifier.head.0.linear.weight", "classifier.head.0.linear.bias"}
    assert not any("pooler" in name for name in ranker.state_dict())


def test_the_head_adds_no_rounding_of_its_own(random_model: Path, padded: dict[str, Tensor]) -> None:
    ranker = load(random_model, "cls").bfloat16()
    linear = ranker.classifier.head[0].linear
    with torch.inference_mode():
        first_NH = ranker.backbone(**padded).last_hidden_state[:, 0].double()
        by_hand_N = (first_NH @ linear.weight.double().T)[:, 0] + linear.bias.double()
        torch.testing.assert_close(ranker(padded).double(), by_hand_N, atol=1e-5, rtol=1e-5)


def test_the_seed_decides_the_head_and_nothing_else(random_model: Path) -> None:
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (Ranker.load(str(random_model), head="cls", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), undisturbed)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["classifier.head.0.linear.weight"]


def test_gradients_reach_every_parameter_also_with_checkpointing(random_model: Path, padded: dict[str, Tensor]) -> None:
    gradients = []
    for checkpointing in (False, True):
        ranker = load(random_model, "mean", dropout=0.0, gradient_checkpointing=checkpointing).train()
        ranker(padded).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in ranker.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


# --- files -----------------------------------------------------------------------------------------------------------


@HEADS
def test_an_exported_ranker_gives_our_scores_to_everybody(
    random_model: Path, tmp_path: Path, tokenizer: Any, head: str
) -> None:
    """In CrossEncoder, as a start of ours, and after CrossEncoder has saved it anew; the README has its own tests."""
    library = pytest.importorskip("sentence_transformers")
    ranker = load(random_model, head)
    expected_N = scores(ranker, random_model)
    export_ranker(save(ranker, tmp_path / "w", tokenizer), tmp_path / "e")
    model = library.CrossEncoder(str(tmp_path / "e"), device="cpu")
    torch.testing.assert_close(model.predict(TEXTS, convert_to_tensor=True).clone(), expected_N, atol=1e-5, rtol=1e-5)
    assert expected_N.abs().max() > 1  # what no sigmoid could give
    assert model.max_seq_length == LENGTH
    model.save_pretrained(str(tmp_path / "s"))
    for folder in (tmp_path / "w", tmp_path / "e", tmp_path / "s"):
        section = RankerConfig(name=str(folder), max_length=LENGTH, head=head)  # type: ignore[arg-type]
        assert not require_agreement(section, str(folder), "ranker")
        again = Ranker.load(str(folder), head=head, seed=9)  # type: ignore[arg-type]
        torch.testing.assert_close(scores(again, folder), expected_N, atol=1e-6, rtol=1e-6)
        assert Ranker.load(str(folder)).head == head  # where nobody asks, the form that there is


def test_nobody_takes_the_folder_for_a_classifier(random_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    """With the backbone beside sparring.json, transformers put a fresh standard head on it, with a warning alone."""
    export_ranker(save(load(random_model, "cls"), tmp_path / "w", tokenizer), tmp_path / "e")
    for folder in ("w", "e"):
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)


def test_a_retriever_starts_from_its_transformer(random_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    ranker = load(random_model, "cls")
    with torch.no_grad():
        ranker.backbone.encoder.layer[0].output.dense.bias.add_(0.1)
    export_ranker(save(ranker, tmp_path / "w", tokenizer), tmp_path / "e")
    for folder in ("w", "e"):
        retriever = Retriever.load(str(tmp_path / folder), pooling="cls", similarity="dot", tied=True)
        own = ranker.backbone.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in retriever.towers["shared"].state_dict().items())


@pytest.mark.parametrize("lost", ["linear.bias", "linear.weight"])
def test_a_saved_ranker_without_its_head_is_refused(
    random_model: Path, tmp_path: Path, tokenizer: Any, lost: str
) -> None:
    file = save(load(random_model, "cls"), tmp_path, tokenizer) / "head" / "model.safetensors"
    weights = load_file(file)
    weights.pop(lost)
    save_file(weights, file)
    with pytest.raises(ModelError, match="the Dense layer head"):
        Ranker.open(tmp_path)


# --- forms that differ -----------------------------------------------------------------------------------------------


def test_a_trained_head_of_another_form_is_refused_and_the_remedy_helps(
    random_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    save(load(random_model, "cls"), tmp_path / "cls", tokenizer)
    save(Ranker.load(str(random_model)), tmp_path / "pooler", tokenizer)
    for trained, asked in (("cls", "pooler"), ("cls", "mean"), ("pooler", "cls")):
        within = {"subfolder": "transformer"} if trained == "cls" else {}
        folder = str(tmp_path / trained)
        section = RankerConfig(name=folder, max_length=LENGTH, head=asked)  # type: ignore[arg-type]
        said = rf"has a trained head of the form {trained}, duel\.head is {asked}.*set duel\.head={trained}"
        with pytest.raises(ModelError, match=said):
            require_agreement(section, folder, "duel")
        with pytest.raises(ModelError, match=said) as refusal:
            Ranker.load(folder, head=asked, section="duel")  # type: ignore[arg-type]
        words = "".join(f', {key}="{value}"' for key, value in within.items())
        assert f'AutoModel.from_pretrained("{folder}"{words}).save_pretrained(FOLDER)' in refusal.value.remedy
        bare = tmp_path / f"bare-{trained}-{asked}"
        AutoModel.from_pretrained(folder, **within).save_pretrained(bare)
        load_tokenizer(folder).save_pretrained(bare)
        assert Ranker.load(str(bare), head=asked).head == asked  # type: ignore[arg-type]


def test_a_cross_encoder_keeps_its_trained_head_and_no_other(random_model: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(1)
    model = library.CrossEncoder(str(random_model), device="cpu", num_labels=1, max_length=LENGTH)
    model.save_pretrained(str(tmp_path / "c"))
    expected = model.predict(TEXTS, activation_fn=torch.nn.Identity(), convert_to_tensor=True).clone()
    ranker = Ranker.load(str(tmp_path / "c"), head="pooler", seed=5)
    torch.testing.assert_close(scores(ranker, tmp_path / "c"), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"trained head of the form pooler, ranker\.head is cls"):
        require_agreement(RankerConfig(name=str(tmp_path / "c"), head="cls"), str(tmp_path / "c"), "ranker")


def test_a_cross_encoder_whose_head_gives_no_logit_is_refused(
    random_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    pytest.importorskip("sentence_transformers")
    export_ranker(save(load(random_model, "cls"), tmp_path / "w", tokenizer), tmp_path / "e")
    (tmp_path / "e" / "sparring.json").unlink()
    assert Ranker.load(str(tmp_path / "e")).head == "cls"
    config = tmp_path / "e" / "head" / "config.json"
    config.write_text(config.read_text().replace("linear.Identity", "activation.Tanh"))
    with pytest.raises(ModelError, match=r"the head head of .* gives 1 scores by .*Tanh"):
        Ranker.load(str(tmp_path / "e"))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Electra", "ModernBert", "DebertaV2"])
def test_a_trained_classifier_of_transformers_is_no_base_for_another_head(kind: str, tmp_path: Path) -> None:
    """Symptom: the weights of its head would be left out without a word. A masked language model has none."""
    sizes = {**SIZES, "vocab_size": 60, "pad_token_id": 0, "num_labels": 3}
    sizes |= {"dim": 32, "n_heads": 4, "n_layers": 2} if kind == "DistilBert" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "c")
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"c has a trained head of the form pooler, ranker\.head is cls"):
        Ranker.load(str(tmp_path / "c"), head="cls", attention=None)
    ranker = Ranker.load(str(tmp_path / "m"), head="cls", attention=None)
    ids = torch.tensor(np.arange(5, 17).reshape(2, 6))
    with torch.inference_mode():
        scores_N = ranker({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        by_hand_N = ranker.classifier.head(ranker.backbone(input_ids=ids).last_hidden_state[:, 0])[:, 0]
    torch.testing.assert_close(scores_N, by_hand_N, atol=1e-6, rtol=1e-6)


def test_three_logits_are_refused_under_any_head(random_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_model, tmp_path / "three")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    with pytest.raises(ModelError, match="gives 3 logits"):
        Ranker.load(str(folder), head="pooler")
    with pytest.raises(ModelError, match="trained head of the form pooler"):
        Ranker.load(str(folder), head="mean")

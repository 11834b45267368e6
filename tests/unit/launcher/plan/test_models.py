from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    MPNetConfig,
    T5Config,
)

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.errors import ConfigError, ModelError
from engine.models.projection import DenseLayer
from launcher.plan.activations import Inputs
from launcher.plan.flops import forward_flops, training_flops
from launcher.plan.models import describe, named_settings, shape_of

ROOT = Path(__file__).parents[4]


def tiny(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.yaml", overrides)


def small() -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def test_counts_are_those_of_the_real_models() -> None:
    retriever = BertModel(small(), add_pooling_layer=False)
    ranker = BertForSequenceClassification(BertConfig(**{**small().to_dict(), "num_labels": 1}))
    count = sum(p.numel() for p in retriever.parameters())
    assert describe(small(), "retriever", name="").parameters == count
    assert describe(small(), "retriever", name="", tied=False).parameters == 2 * count
    assert describe(small(), "ranker", name="").parameters == sum(p.numel() for p in ranker.parameters())
    assert describe(small(), "ranker", name="", head="cls").parameters == count + 32 + 1  # no pooler, one linear layer
    assert shape_of(tiny("ranker.head=mean"), "ranker").parameters < shape_of(tiny(), "ranker").parameters


def test_a_lexical_retrievers_head_counts_and_its_vector_has_a_number_for_each_word() -> None:
    model = BertForMaskedLM(small())
    found = describe(small(), "lexical", name="")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.head_parameters == 32 * 32 + 50 * 32
    assert (found.dimension, found.towers) == (50, 1)
    two = describe(small(), "lexical", name="", tied=False)
    assert (two.parameters, two.head_parameters, two.towers) == (2 * found.parameters, found.head_parameters, 2)


def test_the_layers_above_a_pooling_count_and_give_an_embeddings_length() -> None:
    layers = [DenseLayer("2_Dense", 32, 8, True, "torch.nn.modules.linear.Identity")]
    plain, found = (describe(small(), "retriever", name="", tied=False, dense=dense) for dense in ([], layers))
    assert (plain.dimension, found.dimension) == (32, 8)
    assert found.parameters == plain.parameters + 2 * (32 * 8 + 8)


def test_no_weight_is_made() -> None:
    """Planning a model of billions of parameters filled the memory of the login node."""
    huge = describe(named_settings("48x4096"), "ranker", name="huge")
    assert huge.parameters > 9e9


@pytest.mark.parametrize(("words", "millions"), [("bert-base", 108.9), ("bert-large", 334.1), ("minilm-l6", 22.6)])
def test_named_shapes_have_their_known_sizes(words: str, millions: float) -> None:
    found = describe(named_settings(words), "retriever", name=words)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.2)


def test_a_random_model_follows_the_recipe() -> None:
    found = shape_of(tiny("random_model.hidden_size=48", "random_model.num_layers=3"), "retriever")
    assert (found.hidden, found.layers, found.longest) == (48, 3, 512)
    assert shape_of(tiny("retriever.num_layers=1"), "retriever").layers == 1
    assert shape_of(tiny("retriever.dropout=0.3"), "retriever").attention_dropout == 0.3


@pytest.mark.parametrize("words", ["bert-bas", "0x64", "2x65x2", "12", "x"])
def test_words_that_name_no_shape_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"shape"):
        shape_of(tiny(), "ranker", words)


def test_a_model_that_cannot_be_had_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the plan ended in a traceback of the hub's client."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ModelError, match="--shape ranker=bert-base"):
        shape_of(tiny("ranker.name=someone/some-model"), "ranker")


def test_a_model_that_a_run_would_refuse_is_refused_in_a_plan(tmp_path: Path) -> None:
    """A plan was made for an encoder-decoder, and for an attention that the architecture does not have."""
    (tmp_path / "model.safetensors").touch()
    T5Config(num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        shape_of(tiny(f"ranker.name={tmp_path}"), "ranker")
    MPNetConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no sdpa attention.*set ranker\.attention=eager"):
        shape_of(tiny(f"ranker.name={tmp_path}"), "ranker")
    assert shape_of(tiny(f"ranker.name={tmp_path}", "ranker.attention=eager"), "ranker").layers == 1


def test_a_width_that_has_another_name_is_found(tmp_path: Path) -> None:
    """DistilBERT's configuration has no intermediate_size, and was refused where memory was to be planned."""
    (tmp_path / "model.safetensors").touch()
    DistilBertConfig(n_layers=1, dim=16, n_heads=2, hidden_dim=40, vocab_size=50).save_pretrained(tmp_path)
    shape = shape_of(tiny(f"retriever.name={tmp_path}", "retriever.dropout=0.3"), "retriever")
    assert (shape.intermediate, shape.dropout, shape.attention_dropout) == (40, 0.3, 0.3)


@pytest.mark.parametrize("kind", ["retriever", "lexical"])
def test_forward_and_backward_are_counted_as_torch_counts_them(kind: str) -> None:
    settings, inputs = small(), Inputs(3, 16)
    settings._attn_implementation = "eager"  # the counter does not see inside fused attention on a CPU
    model = BertModel(settings, add_pooling_layer=False) if kind == "retriever" else BertForMaskedLM(settings)
    shape = describe(small(), kind, name="")
    with FlopCounterMode(display=False) as counter:
        states = model.train()(input_ids=torch.randint(0, 50, (3, 16)))[0]
        forward = counter.get_total_flops()
        states.sum().backward()
    assert forward_flops(shape, [inputs]) == pytest.approx(forward, rel=0.01)
    assert training_flops(shape, [inputs], checkpointing=False) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_recomputing_and_caching_each_cost_a_forward_pass() -> None:
    shape, inputs = describe(small(), "retriever", name=""), [Inputs(3, 16)]
    forward = forward_flops(shape, inputs)
    assert training_flops(shape, inputs, checkpointing=False) == 3 * forward
    assert training_flops(shape, inputs, checkpointing=True, cached=True) == 5 * forward

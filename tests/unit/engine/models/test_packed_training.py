"""Models that are trained on packed batches learn what they learn from padded ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from engine.errors import ModelError
from engine.models import attention
from engine.models.batch import PackedBatch, pack
from engine.models.dual import DualEncoder
from engine.models.lexical import Lexical
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever

LONGEST, VOCABULARY = 40, 90
# Weights this large make attention and positions matter: with the usual 0.02 a wrong one would hardly show.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST + 2,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "num_labels": 1,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "classifier_dropout_prob",
)
RAGGED = (5, 1, 40, 2, 5, 5, 17, 40, 30, 3)
KINDS = ["Bert", "Roberta", "Electra", "DistilBert"]


def untrained(kind: str, auto_class: Any, dropout: float = 0.0, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | (DISTILBERT if kind == "DistilBert" else {}) | dict.fromkeys(DROPOUTS, dropout) | changes
    return auto_class.from_config(getattr(transformers, f"{kind}Config")(**sizes)).double().eval()


def retriever(
    kind: str = "Bert", pooling: Any = "cls", similarity: Any = "dot", tied: bool = True, **changes: Any
) -> Retriever:
    tower = untrained(kind, transformers.AutoModel, **changes)
    if getattr(tower, "pooler", None) is not None:
        tower.pooler = None
    towers = {"shared": tower} if tied else {"query": tower, "document": copy.deepcopy(tower)}
    return Retriever(towers, pooling=pooling, similarity=similarity).train()


def ranker(kind: str = "Bert", **changes: Any) -> Ranker:
    return Ranker(untrained(kind, transformers.AutoModelForSequenceClassification, **changes)).train()


def lexical(kind: str = "Bert", tied: bool = True) -> Lexical:
    tower = untrained(kind, transformers.AutoModelForMaskedLM)
    return Lexical({"shared": tower} if tied else {"query": tower, "document": copy.deepcopy(tower)}).train()


def _first_position(config: Any) -> int:
    return int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0


def both_forms(config: Any, lengths: tuple[int, ...] = RAGGED, seed: int = 1) -> tuple[PackedBatch, dict[str, Tensor]]:
    """Make the same inputs packed and padded."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, VOCABULARY, length) for length in lengths]
    has_types = getattr(config, "type_vocab_size", 1) > 1
    types = [rng.integers(0, 2, length) for length in lengths] if has_types else None
    padded = {"input_ids": torch.full((len(ids), LONGEST), int(config.pad_token_id))}
    padded["attention_mask"] = torch.zeros(len(ids), LONGEST, dtype=torch.long)
    if types:
        padded["token_type_ids"] = torch.zeros(len(ids), LONGEST, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded["input_ids"][row, :length] = torch.from_numpy(ids[row])
        padded["attention_mask"][row, :length] = 1
        if types:
            padded["token_type_ids"][row, :length] = torch.from_numpy(types[row])
    return pack(ids, types, _first_position(config)), padded


def gradients(model: torch.nn.Module, outcome: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Weigh every number that comes out differently, so that no order and no sign can be mistaken."""
    model.zero_grad()
    found = outcome()
    weights = torch.linspace(-1.0, 2.0, found.numel(), dtype=found.dtype).view_as(found)
    (found * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    return {"outcome": found.detach()} | {
        name: gradient.clone() for name, gradient in gradients.items() if gradient is not None
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def embeddings(model: DualEncoder, queries: Any, documents: Any) -> Tensor:
    queries_BD, documents_ND = model(queries=queries, documents=documents)
    return torch.cat([queries_BD, documents_ND])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pooling", "similarity", "tied"), [("cls", "dot", True), ("mean", "cosine", False), ("mean", "dot", True)]
)
def test_the_gradients_of_a_retriever(
    kind: str, pooling: Any, similarity: Any, tied: bool, checkpointing: bool
) -> None:
    model = retriever(kind, pooling, similarity, tied)
    assert model.packs
    config = next(iter(model.towers.values())).config
    (packed_q, padded_q), (packed_d, padded_d) = both_forms(config, (4, 9, 2), seed=2), both_forms(config)
    expected = gradients(model, lambda: embeddings(model, padded_q, padded_d))
    if checkpointing:
        checkpoint(*model.towers.values())
    assert_equal(gradients(model, lambda: embeddings(model, packed_q, packed_d)), expected)
    assert float(expected["outcome"].std()) > 0.1


@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_a_lexical_retriever(kind: str, tied: bool, checkpointing: bool) -> None:
    model = lexical(kind, tied)
    assert model.packs
    config = next(iter(model.towers.values())).config
    (packed_q, padded_q), (packed_d, padded_d) = both_forms(config, (4, 9, 2), seed=2), both_forms(config)
    expected = gradients(model, lambda: embeddings(model, padded_q, padded_d))
    if checkpointing:
        checkpoint(*model.towers.values())
    assert_equal(gradients(model, lambda: embeddings(model, packed_q, packed_d)), expected)
    share = float((expected["outcome"] > 0).double().mean())
    assert 0.3 < share < 0.999  # both sides of relu


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "Camembert", "Albert"])
def test_the_gradients_of_a_ranker(kind: str, checkpointing: bool) -> None:
    """The head must see each pair's first token, whatever the model does between its layers and its logits."""
    model = ranker(kind)
    assert model.packs
    packed, padded = both_forms(model.classifier.config)
    expected = gradients(model, lambda: model(padded))
    if checkpointing and model.classifier.supports_gradient_checkpointing:
        checkpoint(model.classifier)
    assert_equal(gradients(model, lambda: model(packed)), expected)
    assert float(expected["outcome"].std()) > 0.1


def checkpoint(*models: Any) -> None:
    for model in models:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def test_recomputed_layers_attend_within_their_own_batch() -> None:
    """Two forwards before one backward, as for a pair of towers: each layer's second pass needs its own layout."""
    model = retriever()
    one, other = both_forms(model.towers["shared"].config), both_forms(model.towers["shared"].config, (7, 7, 9), seed=3)
    calls = []
    attend = attention._attend_by_runs

    def noted(*words: Any) -> Tensor:
        calls.append(words[3].num_inputs)
        return attend(*words)

    expected = gradients(model, lambda: embeddings(model, one[1], other[1]))
    checkpoint(model.towers["shared"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_kernel", lambda *_: noted)
        assert_equal(gradients(model, lambda: embeddings(model, one[0], other[0])), expected)
    assert sorted(calls) == [3] * 4 + [10] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_draws_from_the_seed(checkpointing: bool) -> None:
    model = ranker(dropout=0.2)
    packed, _ = both_forms(model.classifier.config)
    if checkpointing:
        checkpoint(model.classifier)

    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return gradients(model, lambda: model(packed))

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(same[name], gradient) for name, gradient in one.items())
    assert float((one["outcome"] - other["outcome"]).abs().max()) > 1e-3


def test_checkpointing_draws_the_dropout_that_the_forward_drew() -> None:
    model = ranker(dropout=0.2)
    packed, _ = both_forms(model.classifier.config)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(gradients(model, lambda: model(packed)))
        checkpoint(model.classifier)
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_attention_dropout_is_that_of_the_padded_batch(form: str) -> None:
    """Weights of attention are dropped and the others scaled up, so that the mean over draws is the plain result."""
    query_TAE, key_TAE, value_TAE = (torch.randn(12, 2, 8, generator=torch.manual_seed(n)) for n in range(3))
    batch = pack([np.arange(4)] * 3, None, 0)
    attend = functools.partial(attention._attend_by_runs, query_TAE, key_TAE, value_TAE, batch, None)
    plain_TAE = attend(0.0)
    if form == "padded":
        states = [one.view(3, 4, 2, 8).transpose(1, 2) for one in (query_TAE, key_TAE, value_TAE)]
        draw = functools.partial(torch.nn.functional.scaled_dot_product_attention, *states)
        draws = torch.stack([draw(dropout_p=0.3).transpose(1, 2).reshape(12, 2, 8) for _ in range(4000)])
    else:
        draws = torch.stack([attend(0.3) for _ in range(4000)])
    noise = draws.std(0) / 4000**0.5
    assert float(((draws.mean(0) - plain_TAE) / noise).abs().max()) < 5.0
    weights_AGLL = (
        query_TAE.view(3, 4, 2, 8).permute(2, 0, 1, 3) @ key_TAE.view(3, 4, 2, 8).permute(2, 0, 3, 1)
    ) / 8**0.5
    squares = weights_AGLL.softmax(-1).square() @ value_TAE.view(3, 4, 2, 8).permute(2, 0, 1, 3).square()
    expected_TAE = (squares * 0.3 / 0.7).permute(1, 2, 0, 3).reshape(12, 2, 8)
    torch.testing.assert_close(draws.var(0), expected_TAE, rtol=0.2, atol=1e-3)


def test_the_mean_over_draws_of_dropout_is_near_the_plain_scores() -> None:
    model = ranker(dropout=0.02, initializer_range=0.1)
    packed, padded = both_forms(model.classifier.config)
    with torch.no_grad():
        draws = torch.stack([model(packed) for _ in range(400)])
        plain_N = model.eval()(padded)
    assert float((draws.std(0)).min()) > 1e-4
    assert float((draws.mean(0) - plain_N).abs().max()) < float(draws.std(0).max())
    torch.testing.assert_close(draws.mean(0), plain_N, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("kind", ["ModernBert", "DebertaV2"])
def test_what_cannot_be_packed_is_padded(kind: str) -> None:
    changes = {"ModernBert": {"local_attention": 8}, "DebertaV2": {}}[kind]
    for model in (retriever(kind, **changes), ranker(kind, **changes)):
        assert not model.packs
        packed, padded = both_forms(transformers.BertConfig(**SIZES))
        padded.pop("token_type_ids")
        assert all(torch.isfinite(one).all() for one in model(padded) if one is not None)
        with pytest.raises(ModelError, match="was given a packed batch"):
            model(packed)


class WithMeanHead(transformers.BertForSequenceClassification):
    """A head that reads more than the first token."""

    def forward(self, *words: Any, **settings: Any) -> Any:
        output = super().forward(*words, **settings)
        output.logits = output.logits + self.bert(*words, **settings)[0].mean(1)[:, :1]
        return output


def test_a_head_that_differs_is_not_packed() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    assert Ranker(transformers.BertForSequenceClassification(config).eval()).packs
    assert not Ranker(WithMeanHead(config).eval()).packs


def test_eager_attention_is_padded() -> None:
    model = untrained("Bert", transformers.AutoModel, attn_implementation="eager")
    assert not Retriever({"shared": model}, pooling="cls", similarity="dot").packs


def test_a_model_of_shapes_alone_is_not_tried() -> None:
    """Symptom: planning the memory of a run failed, because models without numbers were to compute a batch."""
    with torch.device("meta"):
        assert not Retriever(
            {"shared": untrained("Bert", transformers.AutoModel)}, pooling="cls", similarity="dot"
        ).packs


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_of_other_models_are_computed_as_before(kind: str) -> None:
    """The attention that looks for a layout stands in for transformers' own, for every model of the process."""
    model = untrained(kind, transformers.AutoModel)
    _, padded = both_forms(model.config)
    attention.register_packed_attention()
    registered = transformers.AttentionInterface()["sdpa"]
    with torch.no_grad():
        found = model(**padded)[0]
        transformers.AttentionInterface.register("sdpa", registered.__wrapped__)
        try:
            expected = model(**padded)[0]
        finally:
            transformers.AttentionInterface.register("sdpa", registered)
    assert torch.equal(found, expected)


def test_dropout_reaches_the_kernel_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    seen = []

    def kernel(query_TAE: Tensor, *words: Any) -> tuple[Tensor, ...]:
        seen.append(words[2:])
        return (query_TAE, query_TAE)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    batch = pack([np.arange(4), np.arange(2)], None, 0)
    states_TAE = torch.ones(6, 2, 8)
    for causal in (False, True):
        attention._attend_by_varlen(states_TAE, states_TAE, states_TAE, batch, None, 0.25, causal)
    for found, causal in zip(seen, (False, True), strict=True):
        assert found[0].tolist() == found[1].tolist() == [0, 2, 6]
        assert found[2:] == (4, 4, 0.25, causal, False)

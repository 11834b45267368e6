"""What is encoded packed is what is encoded padded, or the backbone is not packed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from engine.models import attention, packed
from engine.models.encode import encode_queries
from engine.models.packed import PackedEncoder, packed_encoder
from engine.models.retriever import Retriever
from engine.models.template import Input

LONGEST, VOCABULARY = 60, 90
# Weights this large make attention and positions matter: with the usual 0.02 a wrong one would hardly show.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST + 2,
    "initializer_range": 0.3,
}
RAGGED = (5, 1, 60, 2, 5, 5, 17, 60, 30, 3)


def backbone(kind: str = "Bert", **changes: Any) -> Any:
    """Build an untrained model; RoBERTa counts its positions from pad_token_id + 1."""
    torch.manual_seed(0)
    if kind == "Roberta":
        changes = {"type_vocab_size": 1} | changes
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return transformers.AutoModel.from_config(config).eval()


def retriever(kind: str = "Bert", pooling: Any = "mean", similarity: Any = "dot", **changes: Any) -> Retriever:
    return Retriever({"shared": backbone(kind, **changes)}, pooling=pooling, similarity=similarity).eval()


def texts(lengths: Sequence[int], types: int = 1) -> list[Input]:
    rng = np.random.default_rng(1)
    return [
        Input(rng.integers(4, VOCABULARY, length).tolist(), rng.integers(0, types, length).tolist())
        for length in lengths
    ]


def pad(inputs: Sequence[Input], pad_id: int) -> dict[str, Tensor]:
    longest = max(len(one.ids) for one in inputs)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for one in inputs:
        missing = longest - len(one.ids)
        rows["input_ids"].append(one.ids + [pad_id] * missing)
        rows["token_type_ids"].append(one.type_ids + [0] * missing)
        rows["attention_mask"].append([1] * len(one.ids) + [0] * missing)
    return {name: torch.tensor(values) for name, values in rows.items()}


@torch.inference_mode()
def both(model: Retriever, inputs: Sequence[Input]) -> tuple[Tensor, Tensor]:
    encoder = model.document_encoder()
    assert isinstance(encoder, PackedEncoder)
    pad_id = model.towers["shared"].config.pad_token_id
    return encoder(inputs), model.encode_documents(pad(inputs, pad_id))


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_packed_equals_padded(kind: str, pooling: str, similarity: str) -> None:
    packed_ND, padded_ND = both(retriever(kind, pooling, similarity), texts(RAGGED))
    assert packed_ND.dtype == torch.float32
    torch.testing.assert_close(packed_ND, padded_ND, atol=1e-5, rtol=1e-5)
    assert float((padded_ND[0] - padded_ND[4]).abs().max()) > 0.1


@pytest.mark.parametrize(
    "lengths", [range(1, LONGEST + 1), [LONGEST], [1], [7] * 9, [1, LONGEST]], ids=["all", "long", "one", "equal", "2"]
)
def test_any_mix_of_lengths(lengths: Sequence[int]) -> None:
    packed_ND, padded_ND = both(retriever("Roberta"), texts(lengths))
    torch.testing.assert_close(packed_ND, padded_ND, atol=1e-5, rtol=1e-5)


def test_segments_of_tokens_reach_the_backbone() -> None:
    inputs = texts(RAGGED, types=2)
    packed_ND, padded_ND = both(retriever(), inputs)
    torch.testing.assert_close(packed_ND, padded_ND, atol=1e-5, rtol=1e-5)
    without_ND, _ = both(retriever(), [one._replace(type_ids=[0] * len(one.ids)) for one in inputs])
    assert float((packed_ND - without_ND).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["Electra", "Albert", "Camembert", "DistilBert"])
def test_other_backbones_are_packed_too(kind: str) -> None:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if kind == "DistilBert" else {}
    model, inputs = retriever(kind, **sizes), texts(RAGGED)
    batch = pad(inputs, model.towers["shared"].config.pad_token_id)
    if kind == "DistilBert":
        del batch["token_type_ids"]
    encoder = model.document_encoder()
    assert isinstance(encoder, PackedEncoder)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(inputs), model.encode_documents(batch), atol=1e-5, rtol=1e-5)


def test_bfloat16_gives_float32_embeddings() -> None:
    whole_ND, _ = both(retriever(), texts(RAGGED))
    packed_ND, padded_ND = both(retriever().to(torch.bfloat16), texts(RAGGED))
    assert packed_ND.dtype == torch.float32
    assert float((packed_ND - padded_ND).abs().max()) < 0.1
    assert 1e-4 < float((packed_ND - whole_ND).abs().max()) < 0.2


def test_each_side_has_its_tower() -> None:
    towers = {"query": backbone(), "document": backbone()}
    with torch.no_grad():
        towers["document"].embeddings.word_embeddings.weight.mul_(2.0)
    model, inputs = Retriever(towers, pooling="cls", similarity="dot").eval(), texts([4, 9])
    with torch.inference_mode():
        for side, encode in (("query", model.encode_queries), ("document", model.encode_documents)):
            encoder = getattr(model, f"{side}_encoder")()
            torch.testing.assert_close(encoder(inputs), encode(pad(inputs, 0)), atol=1e-5, rtol=1e-5)
        assert float((model.query_encoder()(inputs) - model.document_encoder()(inputs)).abs().max()) > 0.1


def test_the_backbone_stays_as_it_was() -> None:
    """The attention's name lies in the configuration: changed there, padded batches would lose their mask."""
    model = retriever()
    tower = model.towers["shared"]
    before = model.encode_documents(pad(texts(RAGGED), 0))
    encoder = model.document_encoder()
    assert tower.config._attn_implementation == "sdpa"
    assert type(tower.encoder.layer[0].intermediate.dense) is nn.Linear
    assert torch.equal(model.encode_documents(pad(texts(RAGGED), 0)), before)
    assert isinstance(encoder, PackedEncoder)
    own = {parameter.data_ptr() for parameter in tower.parameters()}
    assert {parameter.data_ptr() for parameter in encoder._backbone.parameters()} <= own


class WithoutPositions(transformers.BertModel):
    """Takes positions, and does not use them."""

    def forward(self, *words: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        return super().forward(*words, **options)


class WithBidirectionalContext(transformers.BertModel):
    """Shifts its states by one token after the layers, over the bounds of documents."""

    def forward(self, *words: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        output = super().forward(*words, position_ids=position_ids, **options)
        output.last_hidden_state = output.last_hidden_state.roll(1, dims=1)
        return output


@pytest.mark.parametrize("broken", [WithoutPositions, WithBidirectionalContext])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backbone_that_differs_is_not_packed(broken: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = broken(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval().to(dtype)
    with pytest.raises(packed.ModelError, match="differ"):
        PackedEncoder(model, pooling="mean", normalize=False)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    root = logging.getLogger("sparring")
    before = root.propagate, root.level
    root.propagate = True
    packed._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sparring"):
        yield caplog
    root.propagate, root.level = before


@pytest.mark.parametrize(
    ("kind", "reason", "changes"),
    [
        ("MPNet", "attention interface", {}),
        ("DebertaV2", "attention interface", {}),
        ("ModernBert", "sliding_window", {"pad_token_id": 0, "local_attention": 8}),
    ],
)
def test_what_cannot_be_packed_is_padded_and_said(
    log: pytest.LogCaptureFixture, kind: str, reason: str, changes: dict[str, Any]
) -> None:
    model = retriever(kind, **changes)
    for _ in range(2):
        assert model.document_encoder() == model.encode_documents
    said = [record.getMessage() for record in log.records if record.name.startswith("sparring")]
    assert len(said) == 1
    assert re.search(f"are padded.*({reason})", said[0])


def test_a_model_in_training_is_not_packed() -> None:
    """Dropout in an encoder would show in no error."""
    assert packed_encoder(backbone().train(), pooling="mean", normalize=False) is None


def varlen_by_hand(
    query_TAE: Tensor,
    key_TAE: Tensor,
    value_TAE: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Compute what the GPU's kernel computes."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert max_q == max_k == int(bounds_q.diff().max())
    assert int(bounds_q[-1]) == len(query_TAE)
    rows = []
    for first, last in zip(bounds_q.tolist(), bounds_k.tolist()[1:], strict=False):
        scores_ALL = torch.einsum("qae,kae->aqk", query_TAE[first:last], key_TAE[first:last])
        if window_size == (-1, 0):
            ahead_LL = torch.ones(scores_ALL.shape[1:], dtype=torch.bool).triu(1)
            scores_ALL = scores_ALL.masked_fill(ahead_LL, -torch.inf)
        weights_ALL = (scores_ALL * query_TAE.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("aqk,kae->qae", weights_ALL, value_TAE[first:last]))
    return torch.cat(rows)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_kernel_for_gpus_is_given_bounds_and_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    model = retriever()
    for layer in model.towers["shared"].encoder.layer:
        layer.attention.self.scaling *= scale
    expected_ND, _ = both(model, texts(RAGGED))
    used = []

    def attend(*words: Any) -> Tensor:
        used.append(1)
        return varlen_by_hand(*words)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(attention, "_kernel", lambda *_: attention._attend_by_varlen)
    found_ND, padded_ND = both(model, texts(RAGGED))
    assert used
    torch.testing.assert_close(found_ND, expected_ND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_ND, padded_ND, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_the_kernel_for_gpus_attends_causally_for_a_decoder(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    model = retriever(kind, "last", num_key_value_heads=2, head_dim=8, pad_token_id=0)
    expected_ND, _ = both(model, texts(RAGGED))
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr(attention, "_kernel", lambda *_: attention._attend_by_varlen)
    found_ND, padded_ND = both(model, texts(RAGGED))
    torch.testing.assert_close(found_ND, expected_ND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_ND, padded_ND, atol=1e-5, rtol=1e-5)


def test_a_kernel_is_chosen_by_what_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = attention._kernel.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose("cuda", torch.bfloat16, 64) is attention._attend_by_varlen
    for device, dtype, size in (("cpu", torch.bfloat16, 64), ("cuda", torch.float32, 64), ("cuda", torch.float16, 4)):
        assert choose(device, dtype, size) is attention._attend_by_runs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose("cuda", torch.bfloat16, 64) is attention._attend_by_runs


class Plain:
    """A template that adds nothing."""

    num_special_single = 0

    def single(self, ids: Sequence[int], max_length: int) -> Input:
        return Input(list(ids[:max_length]), [0] * len(ids[:max_length]))


def encode(encoder: Any, inputs: Sequence[Input], tokens_per_batch: int) -> np.ndarray:
    ids, options = [one.ids for one in inputs], {"max_length": LONGEST, "device": torch.device("cpu")}
    return encode_queries(encoder, Plain(), ids, tokens_per_batch=tokens_per_batch, **options)  # type: ignore[arg-type]


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    """Layouts of batches that are computed at the same time must not mix, nor may a sum be split otherwise."""
    model, inputs = retriever(), texts(np.random.default_rng(2).integers(1, LONGEST + 1, 150).tolist())
    encoder, before = model.document_encoder(), torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(encode(encoder, inputs, 150).tobytes())
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    with torch.inference_mode():
        padded_ND = model.encode_documents(pad(inputs, 0)).numpy()
    np.testing.assert_allclose(np.frombuffer(found[0], np.float32).reshape(150, -1), padded_ND, atol=1e-5, rtol=1e-5)


def test_batches_are_filled_with_tokens_not_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, call = [], PackedEncoder.__call__

    def noted(self: PackedEncoder, inputs: Sequence[Input]) -> Tensor:
        seen.append(sum(len(one.ids) for one in inputs))
        return call(self, inputs)

    monkeypatch.setattr(PackedEncoder, "__call__", noted)
    encode(retriever().document_encoder(), texts([9] * 20), 90)
    assert sorted(seen) == [90, 90]


def test_a_document_beyond_the_budget_is_encoded_alone() -> None:
    model, inputs = retriever(), texts([3, LONGEST, 8, 2])
    with torch.inference_mode():
        padded_ND = model.encode_documents(pad(inputs, 0)).numpy()
    np.testing.assert_allclose(encode(model.document_encoder(), inputs, 12), padded_ND, atol=1e-5, rtol=1e-5)

"""The lexical retriever: weights of words as SPLADE has them, whatever lies beside a text in its batch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, GPT2Config

import engine.models.lexical
from engine.config.models import LexicalConfig
from engine.errors import ModelError
from engine.models.agreement import require_agreement
from engine.models.batch import PackedBatch, pack
from engine.models.export import export_model
from engine.models.kinds import load_untrained
from engine.models.lexical import Lexical, weigh, weigh_packed
from engine.models.loading import load_tokenizer
from engine.models.packed import PackedEncoder
from engine.models.prompts import prompts_of
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import resolve_model
from engine.models.template import Input, InputTemplate
from engine.models.trial import Proof, require_forward
from tests.distributed.tiny_architectures import ARCHITECTURES, LONGEST, make

VOCABULARY = 13
QUERIES = ["what is a container?", "which documents does the retriever like?"]
DOCUMENTS = [
    "Lists, tuples and dictionaries are containers.",
    "Negatives are drawn from the hundred documents that the retriever likes best. " * 2,
    "tables",
]
METADATA = {"max_length": 24, "query_max_length": 12, "template": "{title} {text}"}


def by_hand(logits: Any) -> list[float]:
    """Weigh one text's words: a loop over its tokens and its words."""
    return [max(math.log(1 + max(0.0, float(token[word]))) for token in logits) for word in range(VOCABULARY)]


def logits_of(lengths: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [3 * rng.standard_normal((length, VOCABULARY)) - 1 for length in lengths]


def inputs_of(source: str | Path, texts: list[str], max_length: int = 24) -> tuple[list[Input], InputTemplate]:
    tokenizer = load_tokenizer(str(source))
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [template.single(row, max_length) for row in ids], template


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e30, 0.0])
def test_what_lies_in_the_padding_has_no_weight(fill: float) -> None:
    """A mask that multiplies turns infinity into NaN, and lets a NaN win the maximum."""
    lengths = (4, 1, 7)
    rows = logits_of(lengths)
    logits_NLV = torch.full((3, 7, VOCABULARY), fill, dtype=torch.float64)
    mask_NL = torch.zeros(3, 7, dtype=torch.int64)
    for number, row in enumerate(rows):
        logits_NLV[number, : len(row)] = torch.from_numpy(row)
        mask_NL[number, : len(row)] = 1
    expected_NV = torch.tensor([by_hand(row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(weigh(logits_NLV, mask_NL), expected_NV, rtol=1e-12, atol=0)
    assert 0 < int((expected_NV == 0).sum()) < expected_NV.numel()  # words with and without a weight


@pytest.mark.parametrize("loud", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("neighbour", range(6))
def test_a_neighbour_in_a_packed_batch_has_no_weight_either(neighbour: int, loud: float) -> None:
    rows = logits_of((5, 1, 5, 3, 9, 1))
    expected = [by_hand(row) for row in rows]
    rows[neighbour][:] = loud
    batch = pack([list(range(len(row))) for row in rows], None, 0)
    order = np.argsort(batch.places_N.numpy())
    weights_NV = weigh_packed(torch.from_numpy(np.concatenate([rows[place] for place in order])), batch)
    for place, row in enumerate(expected):
        if place != neighbour:
            assert weights_NV[place].tolist() == pytest.approx(row, rel=1e-12)
    assert not bool(weights_NV[neighbour].isfinite().all()) or float(weights_NV[neighbour].min()) > 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float32_or_wider(dtype: torch.dtype) -> None:
    batch = pack([[1, 2, 3]], None, 0)
    logits_TV = torch.linspace(-2, 90, 3 * VOCABULARY).view(3, VOCABULARY).to(dtype)
    wide = torch.promote_types(torch.float32, dtype)
    packed = weigh_packed(logits_TV, batch)
    padded = weigh(logits_TV[None], torch.ones(1, 3, dtype=torch.int64))
    assert packed.dtype == padded.dtype == wide
    assert torch.equal(packed, padded)
    assert torch.equal(packed[0], torch.log1p(logits_TV.to(wide).amax(0).relu()))


def test_the_gradient_goes_to_the_token_that_won() -> None:
    logits_TV = torch.tensor([[1.0, -3.0], [2.0, -1.0], [5.0, 7.0]], dtype=torch.float64, requires_grad=True)
    batch = pack([[1, 2], [3]], None, 0)
    weigh_packed(logits_TV, batch).sum().backward()
    first = batch.runs[0][1]  # tokens of the shorter text, which lies first in the row
    assert first == 1
    # Row 0 is the text of one token, rows 1 and 2 are the other.
    assert logits_TV.grad is not None
    expected = [[1 / 2, 0.0], [0.0, 0.0], [1 / 6, 1 / 8]]
    torch.testing.assert_close(logits_TV.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_logits_are_not_kept_for_the_backward(form: str) -> None:
    """They would be the most of a micro-batch's memory; the places of the maxima are enough."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    logits_NLV = torch.randn(3, 50, VOCABULARY, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if form == "padded":
            weigh(logits_NLV, torch.ones(3, 50))
        else:
            weigh_packed(logits_NLV.flatten(0, 1), pack([list(range(50))] * 3, None, 0))
    assert 3 * VOCABULARY in kept
    assert max(kept) <= 3 * 50  # the mask


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(random_model: Path) -> Lexical:
    return Lexical.load(str(random_model))


def test_all_ways_to_a_texts_weights_are_one(model: Lexical, random_model: Path) -> None:
    inputs, template = inputs_of(random_model, DOCUMENTS)
    encoder = model.document_encoder()
    assert model.packs
    assert isinstance(encoder, PackedEncoder)
    batch = model.collator(template)(inputs)
    assert isinstance(batch, PackedBatch)
    with torch.inference_mode():
        padded_NV = model.encode_documents(template.pad(inputs))
        for found_NV in (encoder(inputs), model.encode_documents(batch), model(documents=batch)[1]):
            assert found_NV.shape == (3, model.dimension)
            torch.testing.assert_close(found_NV, padded_NV, rtol=1e-5, atol=1e-5)
        alone_NV = torch.cat([model.encode_documents(template.pad([one])) for one in inputs])
    torch.testing.assert_close(padded_NV, alone_NV, rtol=1e-5, atol=1e-5)
    assert float(padded_NV.min()) == 0.0
    assert len(model.towers["shared"].get_input_embeddings().weight) == model.dimension


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_a_texts_weights_do_not_depend_on_its_neighbours(model: Lexical, random_model: Path, form: str) -> None:
    one, other = (inputs_of(random_model, [DOCUMENTS[0], text])[0] for text in (DOCUMENTS[1], "tuples " * 30))
    template = inputs_of(random_model, DOCUMENTS)[1]
    make: Callable[[list[Input]], Any] = model.collator(template) if form == "packed" else template.pad
    with torch.inference_mode():
        first_NV, second_NV = (model.encode_documents(make(inputs)) for inputs in (one, other))
    torch.testing.assert_close(first_NV[0], second_NV[0], rtol=1e-5, atol=1e-5)
    assert float((first_NV[1] - second_NV[1]).abs().max()) > 0.1


@pytest.mark.parametrize("form", ["encoder", "padded"])
def test_a_pass_without_gradients_cuts_its_logits(
    model: Lexical, random_model: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """30,000 tokens at once would take 3.4 GiB of logits."""
    inputs, template = inputs_of(random_model, DOCUMENTS)

    def encode() -> tuple[Tensor, int]:
        seen: list[int] = []
        run = (
            model.document_encoder() if form == "encoder" else lambda given: model.encode_documents(template.pad(given))
        )
        tower = run._backbone if isinstance(run, PackedEncoder) else model.towers["shared"]
        hook = tower.register_forward_hook(lambda *words: seen.append(words[2].logits.shape[:-1].numel()))
        try:
            with torch.inference_mode():
                return run(inputs), max(seen)
        finally:
            hook.remove()

    whole_NV, most = encode()
    monkeypatch.setattr(engine.models.lexical, "LOGIT_BYTES", 30 * 4 * model.dimension)
    cut_NV, tokens = encode()
    assert most > 30 >= tokens
    torch.testing.assert_close(cut_NV, whole_NV, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(engine.models.lexical, "LOGIT_BYTES", 1)  # one input at a time
    torch.testing.assert_close(encode()[0], whole_NV, rtol=1e-5, atol=1e-5)


def test_in_training_a_padded_batch_is_one_forward(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 ranks that call a tower unequally often wait for each other for ever."""
    model = Lexical.load(str(random_model), dropout=0.0).train()
    inputs, template = inputs_of(random_model, DOCUMENTS)
    calls: list[int] = []
    model.towers["shared"].register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(engine.models.lexical, "LOGIT_BYTES", 1)
    with torch.no_grad():  # as the first pass of gradient caching
        model.encode_documents(template.pad(inputs))
    assert len(calls) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_opened_again(random_model: Path, tmp_path: Path, tied: bool) -> None:
    model = Lexical.load(str(random_model), tied=tied)
    for number, tower in enumerate(model.towers.values()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(tower.bert.encoder.layer[0].output.dense.weight, std=0.3, generator=generator)
        torch.nn.init.normal_(tower.cls.predictions.bias, generator=generator)
    model.save(tmp_path / "m", load_tokenizer(str(random_model)), metadata=METADATA)
    again = Lexical.open(tmp_path / "m")
    assert again.tied == tied
    inputs, template = inputs_of(random_model, DOCUMENTS)
    with torch.inference_mode():
        for found, expected in zip(
            again(template.pad(inputs), template.pad(inputs)),
            model(template.pad(inputs), template.pad(inputs)),
            strict=True,
        ):
            assert torch.equal(found, expected)
        differ = not torch.equal(
            model.encode_queries(template.pad(inputs)), model.encode_documents(template.pad(inputs))
        )
    assert differ is not tied
    with pytest.raises(ModelError, match=r"holds a lexical retriever\. Expected: a retriever"):
        Retriever.open(tmp_path / "m")
    if not tied:
        with pytest.raises(ModelError, match=r"two towers.*lexical\.tied to false"):
            Lexical.load(str(tmp_path / "m"))


def test_a_dense_retriever_and_a_ranker_start_from_a_lexical_one(random_model: Path, tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tmp_path / str(tied)
        Lexical.load(str(random_model), tied=tied).save(folder, load_tokenizer(str(random_model)))
        retriever = Retriever.load(str(folder), pooling="cls", similarity="dot", tied=tied)
        backbone = Retriever.load(str(random_model), pooling="cls", similarity="dot", tied=tied)
        for name, parameter in backbone.named_parameters():
            assert torch.equal(retriever.get_parameter(name), parameter), name
    assert Ranker.load(str(tmp_path / "True")) is not None


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_model_without_a_trained_head_is_refused_by_name(random_model: Path, tmp_path: Path, minilm: str) -> None:
    """transformers would make a random head and warn of it."""
    backbone = AutoModel.from_pretrained(random_model)
    backbone.save_pretrained(tmp_path / "m")
    load_tokenizer(str(random_model)).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"no masked-LM head: its weights lack cls\.predictions") as refused:
        Lexical.load(str(tmp_path / "m"), section="words")
    assert "name a checkpoint of a masked language model by words.name" in str(refused.value)
    with pytest.raises(ModelError, match="holds a SentenceTransformer, which has no masked-LM head"):
        Lexical.load(minilm)


def test_a_part_of_a_head_is_no_head(random_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "transform.dense.bias" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no masked-LM head: its weights lack cls\.predictions\.transform\.dense\.bias"
    ):
        Lexical.load(str(folder))


def test_a_lost_layer_is_another_matter_than_a_lost_head(random_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.1.output.dense" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 2 parameters of BertForMaskedLM"):
        Lexical.load(str(folder))


def test_models_of_ours_without_a_head_are_refused(random_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(random_model))
    for tied in (True, False):
        Retriever.load(str(random_model), pooling="cls", similarity="dot", tied=tied).save(
            tmp_path / f"{tied}", tokenizer
        )
        with pytest.raises(ModelError, match="holds a retriever of ours, which has no masked-LM head"):
            Lexical.load(str(tmp_path / f"{tied}"))
    Ranker.load(str(random_model)).save(tmp_path / "ranker", tokenizer)
    with pytest.raises(ModelError, match="holds a ranker of ours"):
        Lexical.load(str(tmp_path / "ranker"))


def test_an_architecture_without_masked_language_models_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no masked language model of the architecture .*gpt2.*lexical\.name"):
        Lexical.load(str(tmp_path))


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "modernbert", "mpnet"])
def test_an_architecture_goes_from_its_head_to_an_export(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path / "base")
    with pytest.raises(ModelError, match="no masked-LM head"):
        Lexical.load(str(base), attention=None)
    tokenizer, attention = load_tokenizer(str(base)), ARCHITECTURES[name].attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    section = LexicalConfig(
        name=str(tmp_path / "m"),
        max_length=LONGEST,
        query_max_length=16,
        attention=attention,  # type: ignore[arg-type]
    )
    model = load_untrained(section, section.name, seed=0)
    assert isinstance(model, Lexical)
    template = InputTemplate.from_tokenizer(tokenizer)
    require_forward(model, Proof("lexical", section, 16, tokenizer, template, torch.device("cpu")))
    model.save(tmp_path / "w", tokenizer, metadata={"max_length": LONGEST, "query_max_length": 16})
    assert export_model(tmp_path / "w", tmp_path / "e") < 1e-5


def test_a_lexical_model_is_proved_before_work(random_model: Path) -> None:
    tokenizer = load_tokenizer(str(random_model))
    template = InputTemplate.from_tokenizer(tokenizer)
    for attention in ("sdpa", "eager"):
        section = LexicalConfig(name=str(random_model), max_length=24, precision="bf16", attention=attention)
        model = load_untrained(section, str(random_model), seed=0)
        assert isinstance(model, Lexical)
        require_forward(model, Proof("lexical", section, 12, tokenizer, template, torch.device("cpu")))
    with torch.no_grad():
        model.towers["shared"].cls.predictions.bias.fill_(math.nan)
    with pytest.raises(ModelError, match=r"lexical\.name: the weights of this one are not finite"):
        require_forward(model, Proof("lexical", section, 12, tokenizer, template, torch.device("cpu")))


# --- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trained_weights_give_the_vectors_of_sentence_transformers(splade: str, attention: Any) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = Lexical.load(splade, attention=attention)
    reader = library.SparseEncoder(str(resolve_model(splade)), device="cpu")
    reader.max_seq_length = 40
    texts = [*DOCUMENTS, "word " * 60, "naïve café 東京 42%"]
    theirs_NV = reader.encode_document(texts, convert_to_sparse_tensor=False, show_progress_bar=False)
    inputs, template = inputs_of(splade, texts, 40)
    encoder: Any = model.document_encoder()
    with torch.inference_mode():
        found = [model.encode_documents(template.pad(inputs))]
        found += [model.encode_documents(model.collator(template)(inputs)), encoder(inputs)] if model.packs else []
    assert len(found) == (3 if attention == "sdpa" else 1)
    for ours_NV in found:
        torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-5, atol=1e-5)
    terms_N = (theirs_NV > 0).sum(1)
    assert 1 <= int(terms_N.min()) <= int(terms_N.max()) < 1000  # it was trained to be sparse
    tokenizer = load_tokenizer(splade)
    assert tokenizer.convert_ids_to_tokens(int(theirs_NV[2].argmax())) in ("tables", "table")


def sparse_folder(base: Path, folder: Path, version: int = 6, **pooling: Any) -> Path:
    """Write a SparseEncoder's folder in the form of version 5 or 6."""
    shutil.copytree(base, folder)
    package = "sentence_transformers.sparse_encoder."
    old = version < 6
    kinds = [
        f"{package}models.MLMTransformer" if old else "sentence_transformers.base.modules.transformer.Transformer",
        f"{package}{'models' if old else 'modules.splade_pooling'}.SpladePooling",
    ]
    listing = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(("", "1_SpladePooling"), kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    task = {} if old else {"transformer_task": "fill-mask", "module_output_name": "token_embeddings"}
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24} | task))
    (folder / "1_SpladePooling").mkdir()
    settings = {"pooling_strategy": "max", "activation_function": "relu"} | pooling
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(settings))
    settings_file(folder)
    return folder


def settings_file(folder: Path, **settings: Any) -> None:
    found = {"model_type": "SparseEncoder", "prompts": {}, "similarity_fn_name": "dot"} | settings
    (folder / "config_sentence_transformers.json").write_text(json.dumps(found))


@pytest.mark.parametrize("version", [5, 6])
def test_a_sparse_encoders_folder_is_a_start(random_model: Path, tmp_path: Path, version: int) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = sparse_folder(random_model, tmp_path / "s", version)
    settings_file(folder, prompts={"query": "retriever ", "document": ""})
    section = LexicalConfig(name=str(folder), max_length=24, query_max_length=12)
    notes = [note.text for note in require_agreement(section, str(folder), "lexical")]
    assert any("query texts get the prompt 'retriever '" in text for text in notes)
    assert any("takes 24 tokens, lexical.query_max_length is 12" in text for text in notes)
    prompts = prompts_of(section, folder)
    assert prompts == {"query": "retriever "}
    model = Lexical.load(str(folder))
    assert model.prompts == prompts
    tokenizer = load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer, prompts)
    ids = tokenizer(QUERIES, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        queries_BV = model.encode_queries(template.pad([template.for_queries().single(row, 24) for row in ids]))
    theirs = library.SparseEncoder(str(folder), device="cpu")
    expected_BV = theirs.encode_query(QUERIES, convert_to_sparse_tensor=False, show_progress_bar=False)
    torch.testing.assert_close(queries_BV, expected_BV, rtol=1e-5, atol=1e-5)
    assert Ranker.load(str(folder)) is not None  # the transformer alone
    with pytest.raises(ModelError, match="is a sparse encoder"):
        Retriever.load(str(folder), pooling="cls", similarity="dot", tied=True)


@pytest.mark.parametrize(
    ("pooling", "settings", "message"),
    [
        ({"pooling_strategy": "sum"}, {}, r"pools by sum with the activation relu.*the maximum"),
        ({"activation_function": "log1p_relu"}, {}, r"pools by max with the activation log1p_relu"),
        ({}, {"max_active_dims": 64}, r"keeps the 64 largest weights.*take max_active_dims out"),
        ({}, {"similarity_fn_name": "cosine"}, r"compares its vectors by cosine.*Expected: dot"),
    ],
)
def test_a_sparse_encoder_that_weighs_otherwise_is_refused(
    random_model: Path, tmp_path: Path, pooling: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    folder = sparse_folder(random_model, tmp_path / "s", **pooling)
    settings_file(folder, **settings)
    with pytest.raises(ModelError, match=message):
        require_agreement(LexicalConfig(name=str(folder)), str(folder), "lexical")


def test_queries_without_a_model_are_refused(random_model: Path, tmp_path: Path) -> None:
    """An encoder without inference for queries looks their weights up in a table."""
    folder = tmp_path / "s"
    sparse_folder(random_model, folder / "document_0_Transformer")
    pooling = "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling"
    table = "sentence_transformers.sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding"
    router = {
        "types": {
            "query_0_SparseStaticEmbedding": table,
            "document_0_Transformer": "sentence_transformers.base.modules.transformer.Transformer",
            "document_1_SpladePooling": pooling,
        },
        "structure": {
            "query": ["query_0_SparseStaticEmbedding"],
            "document": ["document_0_Transformer", "document_1_SpladePooling"],
        },
        "parameters": {},
    }
    (folder / "router_config.json").write_text(json.dumps(router))
    listing = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}]
    (folder / "modules.json").write_text(json.dumps(listing))
    settings_file(folder)
    with pytest.raises(ModelError, match=r"one side of .* is SparseStaticEmbedding"):
        Lexical.load(str(folder))


def test_a_dense_folder_is_no_lexical_start(made_folder: Any, tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "dense")
    with pytest.raises(ModelError, match="a SentenceTransformer, which has no masked-LM head"):
        Lexical.load(str(folder))

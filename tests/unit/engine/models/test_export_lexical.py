"""A lexical retriever in the libraries that others load it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.models import LexicalConfig
from engine.errors import ArtifactError
from engine.models.agreement import require_agreement
from engine.models.export import export_lexical, export_model, verify_export
from engine.models.lexical import Lexical, weigh
from engine.models.loading import load_tokenizer
from engine.models.template import InputTemplate

METADATA = {"max_length": 24, "query_max_length": 12, "template": "{title} {text}"}
QUERIES = ["what is a container?", "which documents does the retriever like best of all the hundred documents here?"]
DOCUMENTS = ["Lists.", "Negatives are drawn from documents that the retriever likes. " * 5]


def saved(base: Path | str, folder: Path, *, tied: bool = True, prompts: dict[str, str] | None = None) -> Path:
    """Save a lexical retriever whose towers, where it has two, differ."""
    model = Lexical.load(str(base), tied=tied)
    model.prompts = prompts or {}
    for number, tower in enumerate(model.towers.values()):
        torch.nn.init.normal_(tower.cls.predictions.bias, generator=torch.Generator().manual_seed(number))
    model.save(folder, load_tokenizer(str(base)), metadata=METADATA)
    return folder


def ours(folder: Path, side: str, texts: list[str], max_length: int) -> torch.Tensor:
    model, tokenizer = Lexical.open(folder), load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer, model.prompts)
    template = template.for_queries() if side == "query" else template.for_documents()
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    inputs = template.pad([template.single(row, max_length) for row in ids])
    with torch.inference_mode():
        return model.encode_queries(inputs) if side == "query" else model.encode_documents(inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_gives_our_vectors_in_sentence_transformers(random_model: Path, tmp_path: Path, tied: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    weights = saved(random_model, tmp_path / "w", tied=tied, prompts={"query": "retriever "})
    assert export_model(weights, tmp_path / "e") < 1e-5
    model = library.SparseEncoder(str(tmp_path / "e"), device="cpu")
    options: dict[str, Any] = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    # One tower has one length in that library, the document's.
    queries_BV = ours(weights, "query", QUERIES, 24 if tied else 12)
    torch.testing.assert_close(model.encode_query(QUERIES, **options), queries_BV, rtol=1e-5, atol=1e-5)
    documents_NV = ours(weights, "document", DOCUMENTS, 24)
    torch.testing.assert_close(model.encode_document(DOCUMENTS, **options), documents_NV, rtol=1e-5, atol=1e-5)
    assert model.similarity_fn_name == "dot"
    assert bool((ours(weights, "query", DOCUMENTS, 12) != ours(weights, "document", DOCUMENTS, 12)).any())


def test_towers_are_plain_masked_language_models_of_their_own_lengths(random_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    weights = saved(random_model, tmp_path / "w", tied=False)
    export_lexical(weights, tmp_path / "e")
    folder, limit = tmp_path / "e" / "query", 12
    model, reader = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = reader(QUERIES, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == min(limit, 24)
    with torch.inference_mode():
        found_BV = weigh(model(**batch).logits, batch["attention_mask"])
    torch.testing.assert_close(found_BV, ours(weights, "query", QUERIES, limit), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_a_start_like_others(random_model: Path, tmp_path: Path, tied: bool) -> None:
    weights = saved(random_model, tmp_path / "w", tied=tied, prompts={"document": "lists "})
    export_lexical(weights, tmp_path / "e")
    (tmp_path / "e" / "sparring.json").unlink()  # as somebody else would have it
    section = LexicalConfig(name=str(tmp_path / "e"), max_length=24, query_max_length=24 if tied else 12, tied=tied)
    (note,) = require_agreement(section, section.name, "lexical")
    assert "document texts get the prompt 'lists '" in note.text
    again, first = Lexical.load(section.name, tied=tied), Lexical.open(weights)
    assert again.prompts == first.prompts
    for name, parameter in first.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("1_SpladePooling/config.json", {"pooling_strategy": "sum"}),
        ("1_SpladePooling/config.json", {"activation_function": "log1p_relu"}),
        ("sentence_bert_config.json", {"max_seq_length": 16}),
        ("tokenizer_config.json", {"model_max_length": 16}),
    ],
)
def test_an_export_that_would_weigh_otherwise_is_noticed(
    random_model: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    pytest.importorskip("sentence_transformers")
    weights = saved(random_model, tmp_path / "w")
    export_lexical(weights, tmp_path / "e")
    path = tmp_path / "e" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ArtifactError, match=r"exported to .* (differs from ours by|cuts a long text to other)"):
        verify_export(weights, tmp_path / "e")


def test_trained_weights_export_with_equal_vectors(splade: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    Lexical.load(splade).save(tmp_path / "w", load_tokenizer(splade), metadata=METADATA)
    assert export_model(tmp_path / "w", tmp_path / "e") < 1e-5

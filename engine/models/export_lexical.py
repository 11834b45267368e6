"""A lexical retriever as others load it: transformers' AutoModelForMaskedLM, sentence-transformers' SparseEncoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from engine.models.dual import DOCUMENT, QUERY
from engine.models.export_parts import (
    MODULES,
    compare_sides,
    describe_tower,
    padded_documents,
    padded_queries,
    require_alone_cut,
    write_modules,
    write_router,
    write_settings,
)
from engine.models.lexical import Lexical, weigh
from engine.models.loading import load_tokenizer
from engine.models.source import read_metadata
from engine.models.template import InputTemplate
from shards.files import write_json

_SPARSE_MODULES = "sentence_transformers.sparse_encoder.models."


def describe_lexical(folder: Path, metadata: dict[str, Any]) -> None:
    """Write what makes saved weights a SparseEncoder.

    Args:
        folder: Holds what `Lexical.save` wrote.
        metadata: What it wrote down beside the weights.
    """
    lengths = {QUERY: metadata["query_max_length"], DOCUMENT: metadata["max_length"]}
    if metadata["tied"]:
        describe_tower(folder, lengths[DOCUMENT])
        chain = [("", f"{_SPARSE_MODULES}MLMTransformer"), _described_pooling(folder, "1_SpladePooling", "")]
        write_modules(folder, chain)
    else:
        routes = {}
        for tower, length in lengths.items():
            describe_tower(folder / tower, length)
            pooling = _described_pooling(folder, f"{tower}_splade_pooling", tower)
            routes[tower] = [(tower, f"{_SPARSE_MODULES}MLMTransformer"), pooling]
        write_router(folder, routes)
        write_modules(folder, [("", f"{MODULES}Router")])
    prompts = metadata.get("prompts", {})
    write_settings(folder, library="5.0.0", prompts=prompts, similarity="dot", model_type="SparseEncoder")


def compare_lexical(weights_folder: Path, target: Path, queries: list[str], documents: list[str]) -> dict[str, float]:
    """Compare the weights of words that our model and the libraries give texts.

    Args:
        weights_folder: Where our own model is.
        target: The export.
        queries: Texts.
        documents: Texts.

    Returns:
        Largest difference by library, as `engine.models.export_parts.compare_sides` measures it.
    """
    metadata = read_metadata(weights_folder, "lexical")
    ours, tokenizer = Lexical.open(weights_folder), load_tokenizer(str(weights_folder))
    prompts = metadata.get("prompts", {})
    template = InputTemplate.from_tokenizer(tokenizer, prompts)
    query_length = metadata["max_length"] if metadata["tied"] else metadata["query_max_length"]
    lengths = {QUERY: query_length, DOCUMENT: metadata["max_length"]}
    queries_BV = ours.encode_queries(padded_queries(template, tokenizer, queries, lengths[QUERY]))
    documents_NV = ours.encode_documents(padded_documents(template, tokenizer, documents, lengths[DOCUMENT]))

    def by_transformers(tower: str, texts: list[str]) -> Tensor:
        folder = target if metadata["tied"] else target / tower
        reader = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False).eval()
        prompt = prompts.get(tower, "")
        require_alone_cut(target, reader, template, tokenizer, tower, lengths[tower], prompt)
        prompted = [prompt + text for text in texts]
        batch = reader(prompted, padding=True, truncation=True, return_tensors="pt")
        return weigh(model(**batch).logits, batch["attention_mask"])

    def by_library() -> Any:
        from sentence_transformers import SparseEncoder

        return SparseEncoder(str(target), device="cpu", local_files_only=True)

    ours_of, texts = {QUERY: queries_BV, DOCUMENT: documents_NV}, {QUERY: queries, DOCUMENT: documents}
    return compare_sides(ours_of, texts, by_transformers, by_library, convert_to_sparse_tensor=False)


def _described_pooling(folder: Path, path: str, tower: str) -> tuple[str, str]:
    config = transformers.AutoConfig.from_pretrained(folder / tower, trust_remote_code=False)
    (folder / path).mkdir()
    settings = {
        "pooling_strategy": "max",
        "activation_function": "relu",
        "word_embedding_dimension": config.vocab_size,
    }
    write_json(folder / path / "config.json", settings)
    return path, f"{_SPARSE_MODULES}SpladePooling"

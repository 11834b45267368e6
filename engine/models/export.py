"""Trained models as others load them: transformers, sentence-transformers, CrossEncoder.

An export is written under a temporary name, loaded again by the library that will read it, compared with our own
scores on raw text, and only then renamed: what is there has been tried. The libraries' files are written by hand, so
that exporting does not need sentence-transformers; without it, the comparison is made with transformers alone.

What an export cannot carry: the recipe's score scale (it changes no order), and the template that joins a document's
title and text. `engine.models.export_usage` says in the README how it is used; `engine.evaluation.exported` completes a
run's exports by what the run knows of them.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.errors import ArtifactError
from engine.models.dual import DOCUMENT, QUERY, SHARED
from engine.models.export_lexical import compare_lexical, describe_lexical
from engine.models.export_parts import (
    MODULES,
    compare_sides,
    describe_tower,
    is_read_by_library,
    largest_difference,
    long_text,
    padded_documents,
    padded_queries,
    require_alone_cut,
    require_same_cut,
    write_modules,
    write_pooling,
    write_router,
    write_settings,
)
from engine.models.export_pretrained import compare_masked_lm, describe_masked_lm
from engine.models.export_ranker import describe_pooled_ranker, pooled_logits
from engine.models.export_usage import readme
from engine.models.export_yes_no import describe_yes_no, yes_no_scores
from engine.models.failures import quiet_transformers
from engine.models.loading import load_tokenizer
from engine.models.projection import load_projection
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever, pool
from engine.models.sides import limit_tokenizer
from engine.models.source import BOTTLENECK, METADATA_FILE, POOLER, kind_in_words, read_metadata, saved_metadata
from engine.models.start import read_ranker, read_retriever
from engine.models.template import Input, InputTemplate
from engine.models.yes_no import YES_NO
from shards.files import copy_folder, fsync, read_json, write_json

MAX_DIFFERENCE = 1e-4
"""Largest difference between our numbers and a library's; relative to the largest number where that is above 1.

Of scores, which may all be near 0, it is relative to the largest where that is above `_LEAST_SCORE`.
"""
_LEAST_SCORE = 0.3
"""Sums over the layers of a deep model are exact to some 1e-5 in float32, however small the logit that they give."""

Completion = Callable[[Path], None]
"""Is given the folder of an export under its temporary name, tried and without a README."""
_LEFT_BEHIND = ("weights.json", "decoder")
"""What is of no use to others: the record of the weights, and the decoder that served pre-training alone."""
_QUERIES = ("what is this?", "Who wrote the second letter, and when?", "tables", "naïve café 東京 42%")
_DOCUMENTS = (
    "A short one.",
    "Lists, tuples and dictionaries are containers. " * 40,
    "The café in Tōkyō opens at 8:30; on Sundays it's closed (except in May).",
    "word " * 600,
)


def export_retriever(weights_folder: Path, target: Path, complete: Completion | None = None) -> float:
    """Export a retriever for transformers (AutoModel) and sentence-transformers (SentenceTransformer).

    A tied retriever is one Hugging Face folder. One with two towers has a plain Hugging Face folder for each, `query`
    and `document`, joined by a Router, so that `encode_query` and `encode_document` take the right one. Where the
    library knows one length for both sides, it is the document's.

    Args:
        weights_folder: A folder that `Retriever.save` wrote, with `max_length` and `query_max_length` in its metadata.
        target: Folder to make; an earlier export there is replaced.
        complete: Adds to it before it is there: its README, and more of its forms. None for a README of no more than
            what lies in it.

    Returns:
        The largest difference found by `verify_export`.

    Raises:
        ArtifactError: The weights are missing or damaged, the reloaded export gives other numbers, or something that
            is no export lies at `target`.
    """
    metadata = read_metadata(weights_folder, "retriever")
    _require_lengths(metadata, weights_folder, "max_length", "query_max_length")
    return _publish(weights_folder, target, lambda folder: _describe_retriever(folder, metadata), complete)


def export_ranker(weights_folder: Path, target: Path, complete: Completion | None = None) -> float:
    """Export a ranker for transformers and sentence-transformers' CrossEncoder, which then gives raw logits.

    CrossEncoder cuts the longer of two texts, we cut the document: scores differ for queries longer than half of the
    input. Heads that are no transformers classifier's are described in `engine.models.export_ranker` and
    `engine.models.export_yes_no`.

    Args:
        weights_folder: A folder that `Ranker.save` wrote, with `max_length` in its metadata.
        target: Folder to make; an earlier export there is replaced.
        complete: Adds to it before it is there: its README, and more of its forms. None for a README of no more than
            what lies in it.

    Returns:
        The largest difference found by `verify_export`.

    Raises:
        ArtifactError: As in `export_retriever`.
    """
    metadata = read_metadata(weights_folder, "ranker")
    _require_lengths(metadata, weights_folder, "max_length")
    return _publish(weights_folder, target, lambda folder: _describe_ranker(folder, metadata), complete)


def export_lexical(weights_folder: Path, target: Path, complete: Completion | None = None) -> float:
    """Export a lexical retriever for transformers (AutoModelForMaskedLM) and sentence-transformers (SparseEncoder).

    Towers are laid out as in `export_retriever`.

    Args:
        weights_folder: A folder that `Lexical.save` wrote, with `max_length` and `query_max_length` in its metadata.
        target: Folder to make; an earlier export there is replaced.
        complete: Adds to it before it is there: its README, and more of its forms. None for a README of no more than
            what lies in it.

    Returns:
        The largest difference found by `verify_export`.

    Raises:
        ArtifactError: As in `export_retriever`.
    """
    metadata = read_metadata(weights_folder, "lexical")
    _require_lengths(metadata, weights_folder, "max_length", "query_max_length")
    return _publish(weights_folder, target, lambda folder: describe_lexical(folder, metadata), complete)


def export_masked_lm(weights_folder: Path, target: Path, complete: Completion | None = None) -> float:
    """Export a pre-trained encoder with its masked-language-model head for transformers, without its decoder.

    AutoModel and AutoModelForMaskedLM load it, and so do recipes that name it as the start of a model.

    Args:
        weights_folder: A folder that `BottleneckLM.save` wrote, with `max_length` in its metadata.
        target: Folder to make; an earlier export there is replaced.
        complete: Adds to it before it is there: its README, and more of its forms. None for a README of no more than
            what lies in it.

    Returns:
        The largest difference found by `verify_export`.

    Raises:
        ArtifactError: As in `export_retriever`.
    """
    metadata = saved_metadata(weights_folder)
    _require_lengths(metadata, weights_folder, "max_length")
    return _publish(weights_folder, target, lambda folder: describe_masked_lm(folder, metadata), complete)


def export_model(weights_folder: Path, target: Path, complete: Completion | None = None) -> float:
    """Write a model of whatever kind, by the function for it."""
    exports = {"ranker": export_ranker, "lexical": export_lexical, BOTTLENECK: export_masked_lm}
    export = exports.get(saved_metadata(weights_folder).get("model", ""), export_retriever)
    return export(weights_folder, target, complete)


def verify_export(
    weights_folder: Path,
    target: Path,
    queries: Sequence[str] = _QUERIES,
    documents: Sequence[str] = _DOCUMENTS,
) -> float:
    """Load an export with the libraries it is made for and compare it with our own model on raw text.

    Retrievers are compared by the components of their vectors, rankers by the scores of all pairs, encoders that were
    pre-trained by their states of first tokens and by what they predict at every token. Both sides' batches have the
    same padding, of which the result of some architectures depends a little. Of a text longer than the limit, whatever
    it is, the tokens that are left are compared.

    Args:
        weights_folder: Where our own model is.
        target: The export.
        queries: Texts of queries; for a ranker, those longer than half of its input are left out (`export_ranker`).
        documents: Texts of documents.

    Returns:
        Largest absolute difference, divided by the largest of our numbers where that is above 1; of scores, where
        that is above `_LEAST_SCORE`, else by that.

    Raises:
        ArtifactError: It is above `MAX_DIFFERENCE`, or the export cuts long texts to other tokens.
    """
    kind = str(saved_metadata(weights_folder).get("model"))
    comparisons = {"ranker": _compare_ranker, "lexical": compare_lexical, BOTTLENECK: compare_masked_lm}
    compare = comparisons.get(kind, _compare_retriever)
    with torch.inference_mode(), quiet_transformers():
        differences = compare(weights_folder, target, list(queries), list(documents))
    library, difference = max(differences.items(), key=lambda item: item[1])
    if not difference <= MAX_DIFFERENCE:  # also where it is NaN
        raise ArtifactError(
            f"the {kind_in_words(kind)} exported to {target} differs from ours by {difference:.3g} when {library} "
            "loads it",
            expected=f"at most {MAX_DIFFERENCE}",
            remedy=f"check that the installed version of {library} is one this project supports; what was trained is "
            f"whole in {weights_folder}, and the same start, or `export`, writes its export once more",
        )
    return difference


def _publish(
    weights_folder: Path, target: Path, describe: Callable[[Path], None], complete: Completion | None
) -> float:
    if target.exists() and not (target / METADATA_FILE).exists():
        raise ArtifactError(
            f"{target} exists and is no export",
            expected="a new folder or an earlier export",
            remedy="name another folder",
        )
    nonce = secrets.token_hex(6)
    temporary = target.parent / f".{target.name}.tmp-{nonce}"
    replaced = target.parent / f".{target.name}.old-{nonce}"
    try:
        copy_folder(weights_folder, temporary, leave_out=_LEFT_BEHIND)
        describe(temporary)
        difference = verify_export(weights_folder, temporary)
        (complete or _write_readme)(temporary)
        for path in temporary.rglob("*"):
            fsync(path)
        fsync(temporary)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return difference


def _write_readme(folder: Path) -> None:
    (folder / "README.md").write_text(readme(folder, saved_metadata(folder)), encoding="utf-8")


def _describe_retriever(folder: Path, metadata: dict[str, Any]) -> None:
    lengths = {QUERY: metadata["query_max_length"], DOCUMENT: metadata["max_length"]}
    dense: dict[str, list[str]] = metadata.get("dense", {})
    if metadata["tied"]:
        describe_tower(folder, lengths[DOCUMENT])
        write_pooling(folder / "1_Pooling", folder, metadata["pooling"])
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        modules += [(path, "Dense") for path in dense.get(SHARED, ())]
    else:
        routes = {}
        for tower, length in lengths.items():
            pooling = f"{tower}_pooling"
            describe_tower(folder / tower, length)
            write_pooling(folder / pooling, folder / tower, metadata["pooling"])
            route = [(tower, "Transformer"), (pooling, "Pooling"), *((path, "Dense") for path in dense.get(tower, ()))]
            routes[tower] = [(path, MODULES + kind) for path, kind in route]
        write_router(folder, routes)
        modules = [("", "Router")]
    if metadata["similarity"] == "cosine":
        number = len(modules)
        (folder / f"{number}_Normalize").mkdir()
        modules.append((f"{number}_Normalize", "Normalize"))
    write_modules(folder, [(path, MODULES + kind) for path, kind in modules])
    library, prompts = "3.0.0" if metadata["tied"] else "5.0.0", metadata.get("prompts", {})
    write_settings(folder, library=library, prompts=prompts, similarity=metadata["similarity"])


def _describe_ranker(folder: Path, metadata: dict[str, Any]) -> None:
    if metadata.get("head", POOLER) != POOLER:
        (describe_yes_no if metadata["head"] == YES_NO else describe_pooled_ranker)(folder, metadata)
        return
    config = read_json(folder / "config.json", "the ranker's configuration")
    # Without an activation named here, CrossEncoder applies a sigmoid to a single logit.
    config["sentence_transformers"] = {"version": "4.0.0", "activation_fn": "torch.nn.modules.linear.Identity"}
    write_json(folder / "config.json", config)
    limit_tokenizer(folder, metadata["max_length"])


def _require_lengths(metadata: dict[str, Any], folder: Path, *names: str) -> None:
    missing = [name for name in names if not isinstance(metadata.get(name), int)]
    if missing:
        raise ArtifactError(
            f"{folder / METADATA_FILE} does not tell {' and '.join(missing)}", remedy="save the model again with them"
        )


def _compare_retriever(
    weights_folder: Path, target: Path, queries: list[str], documents: list[str]
) -> dict[str, float]:
    metadata = read_metadata(weights_folder, "retriever")
    ours = Retriever.open(weights_folder)
    tokenizer = load_tokenizer(str(weights_folder))
    prompts = metadata.get("prompts", {})
    template = InputTemplate.from_tokenizer(tokenizer, prompts)
    query_length = metadata["max_length"] if metadata["tied"] else metadata["query_max_length"]
    lengths = {QUERY: query_length, DOCUMENT: metadata["max_length"]}
    queries_BD = ours.encode_queries(padded_queries(template, tokenizer, queries, lengths[QUERY]))
    documents_ND = ours.encode_documents(padded_documents(template, tokenizer, documents, lengths[DOCUMENT]))

    def by_transformers(tower: str, texts: list[str]) -> Tensor:
        folder = target if metadata["tied"] else target / tower
        reader = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
        prompt = prompts.get(tower, "")
        require_alone_cut(target, reader, template, tokenizer, tower, lengths[tower], prompt)
        prompted = [prompt + text for text in texts]
        batch = reader(prompted, padding=True, truncation=True, return_tensors="pt")
        embeddings = pool(model(**batch).last_hidden_state, batch["attention_mask"], metadata["pooling"])
        start = read_retriever(target)
        layers = (start.query if tower == QUERY else start.document).dense
        if layers:
            embeddings = load_projection(target, layers, embeddings.shape[-1])(embeddings)
        cosine = metadata["similarity"] == "cosine"
        return torch.nn.functional.normalize(embeddings, dim=-1) if cosine else embeddings

    def by_library() -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(target), device="cpu", local_files_only=True)

    ours_of, texts = {QUERY: queries_BD, DOCUMENT: documents_ND}, {QUERY: queries, DOCUMENT: documents}
    return compare_sides(ours_of, texts, by_transformers, by_library, convert_to_tensor=True)


def _compare_ranker(weights_folder: Path, target: Path, queries: list[str], documents: list[str]) -> dict[str, float]:
    metadata = read_metadata(weights_folder, "ranker")
    tokenizer = load_tokenizer(str(weights_folder))
    template = InputTemplate.from_tokenizer(tokenizer, pair_words=metadata.get("pair_template"))
    longest = (metadata["max_length"] - template.num_special_pair) // 2
    queries = [*queries, "?"]  # one that is short enough in any vocabulary
    tokenized = zip(queries, template.queries.token_ids(tokenizer, queries), strict=True)
    asked = [(query, ids) for query, ids in tokenized if len(ids) <= longest]
    pairs = [(query, document) for query, _ in asked for document in documents]
    long = long_text(metadata["max_length"])
    *document_ids, long_ids = template.documents.token_ids(tokenizer, [*documents, long])
    inputs = [template.pair(ids, other, metadata["max_length"]) for _, ids in asked for other in document_ids]
    own = template.pad(inputs, 1)
    ours_N = Ranker.open(weights_folder)(own)
    query, query_ids = asked[-1]
    cut = template.pair(query_ids, long_ids, metadata["max_length"])
    theirs_N = _scores_by_transformers(target, pairs, own, cut, (query, long))
    differences = {"transformers": largest_difference(ours_N, theirs_N, _LEAST_SCORE)}
    if is_read_by_library():
        from sentence_transformers import CrossEncoder

        scores = CrossEncoder(str(target), device="cpu", local_files_only=True).predict(
            pairs, batch_size=len(pairs), convert_to_tensor=True, show_progress_bar=False
        )
        differences["sentence-transformers"] = largest_difference(ours_N, scores, _LEAST_SCORE)
    return differences


def _scores_by_transformers(
    target: Path, pairs: list[tuple[str, str]], own: dict[str, Tensor], cut: Input, long_pair: tuple[str, str]
) -> Tensor:
    """Score pairs with transformers alone; a language model is given our own inputs of them, which it cannot cut."""
    start = read_ranker(target)
    if start.form == YES_NO:
        return yes_no_scores(target, own, list(saved_metadata(target)["answers"]))
    reader = transformers.AutoTokenizer.from_pretrained(target / start.transformer, trust_remote_code=False)
    require_same_cut(target, reader, cut, *long_pair)
    batch = reader(*map(list, zip(*pairs, strict=True)), padding=True, truncation=True, return_tensors="pt")
    if start.layer is not None:
        return pooled_logits(target, start, batch).squeeze(-1)
    auto_class = transformers.AutoModelForSequenceClassification
    logits_N1: Tensor = auto_class.from_pretrained(target, trust_remote_code=False).eval()(**batch).logits
    return logits_N1.squeeze(-1)

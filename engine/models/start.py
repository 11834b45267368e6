"""What a model starts from: towers, layers, prompts and similarity as its folder says them.

A start is a folder that describes its model: one of sentence-transformers, one that a run of ours published, or an
export of ours. A plain transformers checkpoint says nothing. `engine.models.agreement` compares what is read here with
a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from engine.config.models import Head
from engine.errors import ModelError
from engine.models.logit_score import read_logit_score
from engine.models.projection import IDENTITY, SCORES, DenseLayer
from engine.models.sentence_transformers import (
    ALONE,
    MODULES_FILE,
    Chains,
    Module,
    Tower,
    is_sentence_transformers,
    read_chains,
    read_dense,
    read_splade,
    read_tower,
    read_transformer,
)
from engine.models.source import (
    BOTTLENECK,
    HEAD,
    MASKED_LM,
    METADATA_FILE,
    POOLER,
    WHOLE_MODELS,
    kind_in_words,
    saved_metadata,
    transformer_paths,
)

_SPARSE = frozenset({"MLMTransformer", "SpladePooling", "SparseAutoEncoder", "CSRSparsity", "IDF"}) | {
    "SparseStaticEmbedding"
}
_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
_CLASSIFIER, _GENERATION = "sequence-classification", "text-generation"
_POOLINGS: Mapping[tuple[str, ...], Head] = {("cls",): "cls", ("mean",): "mean", ("last",): "last"}


@dataclass(frozen=True, slots=True)
class RetrieverStart:
    """What a folder says of the retriever in it, a dense or a lexical one.

    Attributes:
        origin: The file that says so; empty for a plain checkpoint, of which nothing is said.
        query: The queries' tower.
        document: The documents' tower.
        tied: Whether both are one.
        similarity: How embeddings are compared; None where nothing says so.
        prompts: What is put before the texts of each side; sides without a prompt are left out.
        truncate_dim: Numbers of an embedding that are kept, the first or, of a lexical one, the largest; None for all.
        head: What of the checkpoint is no part of a retriever and is left out.
    """

    origin: str = ""
    query: Tower = field(default_factory=Tower)
    document: Tower = field(default_factory=Tower)
    tied: bool = True
    similarity: str | None = None
    prompts: Mapping[str, str] | None = None
    truncate_dim: int | None = None
    head: str = ""


def read_retriever(source: str | Path) -> RetrieverStart:
    """Read what a retriever's start says.

    Args:
        source: What `local_source` found.

    Raises:
        ModelError: It is a sparse or a multi-vector encoder, or has a module or a setting that is not kept.
        ArtifactError: A description of ours is damaged.
    """
    if not isinstance(source, Path):
        return RetrieverStart()
    saved = saved_metadata(source)
    if saved.get("model") in (BOTTLENECK, MASKED_LM):
        return RetrieverStart()
    if saved:
        return _of_ours(source, saved)
    if not is_sentence_transformers(source):
        return RetrieverStart()
    chains = read_chains(source)
    _require_dense(source, chains)
    if is_cross_encoder(chains):
        _, transformer = read_classifier(source, chains)
        return RetrieverStart(MODULES_FILE, transformer, transformer, head="its head")
    query, document = (read_tower(source, chains.sides[side]) for side in ("query", "document"))
    settings = chains.settings
    return RetrieverStart(
        origin=MODULES_FILE,
        query=query,
        document=document,
        tied=query == document,
        similarity=settings.get("similarity_fn_name"),
        prompts=_prompts(settings),
        truncate_dim=settings.get("truncate_dim"),
    )


def read_lexical(source: str | Path) -> RetrieverStart:
    """Read what a lexical retriever's start says.

    Args:
        source: What `local_source` found.

    Raises:
        ModelError: It is another kind of model, without a head for masked language modelling, or has a module or a
            setting that is not kept.
        ArtifactError: A description of ours is damaged.
    """
    if not isinstance(source, Path):
        return RetrieverStart()
    saved = saved_metadata(source)
    if saved.get("model") in (BOTTLENECK, MASKED_LM):
        return RetrieverStart()
    if saved:
        if saved.get("model") != "lexical":
            _refuse_headless(source, f"a {kind_in_words(saved.get('model'))} of ours")
        query, document = (
            Tower(transformer="" if saved["tied"] else side, pooling=("max",), max_length=saved.get(length))
            for side, length in (("query", "query_max_length"), ("document", "max_length"))
        )
        return RetrieverStart(METADATA_FILE, query, document, saved["tied"], "dot", dict(saved.get("prompts", {})))
    if not is_sentence_transformers(source):
        return RetrieverStart()
    chains = read_chains(source)
    kinds = {one.kind for chain in chains.sides.values() for one in chain}
    if chains.model_type != "SparseEncoder" and not kinds & _SPARSE:
        _refuse_headless(source, f"a {chains.model_type}")
    query, document = (read_splade(source, chains.sides[side]) for side in ("query", "document"))
    settings = chains.settings
    return RetrieverStart(
        origin=MODULES_FILE,
        query=query,
        document=document,
        tied=query == document,
        similarity=settings.get("similarity_fn_name"),
        prompts=_prompts(settings),
        truncate_dim=settings.get("max_active_dims"),
    )


def _refuse_headless(source: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{source} holds {what}, which has no masked-LM head",
        expected="a masked language model, whose trained head weighs the words of the vocabulary, or a SPLADE",
        remedy="name the masked language model that it was made from",
    )


@dataclass(frozen=True, slots=True)
class RankerStart:
    """What a folder says of the ranker in it; None and empty where it says nothing."""

    form: Head | None = None
    """Of its trained head, as `ranker.head` calls it."""
    layer: DenseLayer | None = None
    """The head, where it is a linear layer on pooled token states."""
    max_length: int | None = None
    """Tokens of a pair."""
    transformer: str = ""
    """The transformer's folder, below the model's; empty for the model's own."""
    answers: tuple[str, str] | None = None
    """The words of the form `yes_no`."""
    pair_words: str | None = None
    """What it puts pairs into."""


def read_ranker(source: str | Path) -> RankerStart:
    """Read what a ranker's start says of its head.

    Args:
        source: What `local_source` found.

    Raises:
        ModelError: The head has a setting that is not kept.
        ArtifactError: A description of ours is damaged.
    """
    if not isinstance(source, Path):
        return RankerStart()
    saved = saved_metadata(source)
    if saved.get("model") == "ranker":
        form: Head = saved.get("head", POOLER)
        layer = None if form in WHOLE_MODELS else read_dense(source, HEAD, SCORES)
        answers = tuple(saved["answers"]) if "answers" in saved else None
        path = transformer_paths(source)[0]
        return RankerStart(form, layer, saved.get("max_length"), path, answers, saved.get("pair_template"))
    if saved or not is_sentence_transformers(source):
        return RankerStart()
    chains = read_chains(source)
    if not is_cross_encoder(chains):
        return RankerStart()
    more, tower = read_classifier(source, chains)
    if not more:
        return RankerStart(POOLER, None, tower.max_length, tower.transformer)
    chain = chains.sides["document"]
    if [one.kind for one in chain] == ["Transformer", "LogitScore"] and tower.task == _GENERATION:
        return _of_language_model(source, chain, tower)
    if [one.kind for one in chain] != ["Transformer", "Pooling", "Dense"]:
        return RankerStart()
    return _of_pooled_cross_encoder(source, chain)


def _of_language_model(source: Path, chain: Sequence[Module], tower: Tower) -> RankerStart:
    """Read a CrossEncoder that asks a language model; its answers are the vocabulary's words of two ids."""
    answers, words = read_logit_score(source, chain[0].path, chain[1].path)
    return RankerStart("yes_no", None, tower.max_length, tower.transformer, answers, words)


def _of_pooled_cross_encoder(source: Path, chain: Sequence[Module]) -> RankerStart:
    """Read a CrossEncoder of a transformer, a pooling and a linear layer that gives the score."""
    tower, layer = read_tower(source, chain[:2]), read_dense(source, chain[2].path, SCORES)
    form: Head | None = _POOLINGS.get(tower.pooling)
    if form is None:
        return RankerStart()
    if layer.out_features != 1 or layer.activation != IDENTITY:
        raise ModelError(
            f"the head {layer.path} of {source} gives {layer.out_features} scores by {layer.activation}",
            expected=f"1 score, by {IDENTITY}",
            remedy=f"name another model; or, for a new head, {ALONE}",
        )
    return RankerStart(form, layer, tower.max_length, tower.transformer)


def require_head_form(start: RankerStart, asked: str, model: str, section: str) -> None:
    """Refuse to go on from a trained head with a head of another form.

    Args:
        start: What there is.
        asked: The recipe's form.
        model: As the recipe names it.
        section: The recipe's section.

    Raises:
        ModelError: The forms differ.
    """
    if start.form in (None, asked):
        return
    within = f', subfolder="{start.transformer}"' if start.transformer else ""
    raise ModelError(
        f"{model} has a trained head of the form {start.form}, {section}.head is {asked}",
        expected="one form: weights of one mean nothing in another",
        remedy=f"set {section}.head={start.form} to go on from the trained head; or, for a new head of the form "
        f'{asked}, name the model without its head: transformers\' AutoModel.from_pretrained("{model}"{within})'
        f".save_pretrained(FOLDER), its tokenizer saved there too, and {section}.name=FOLDER",
    )


def transformers_of(source: str | Path) -> tuple[Tower, ...]:
    """Return the transformers of a start, whatever else is in it: one, or one for each tower.

    Args:
        source: What `local_source` found.

    Returns:
        Towers of which the transformer, its length and its case alone are set.

    Raises:
        ModelError: A transformer has a setting that is not kept, or there is none.
    """
    if not isinstance(source, Path):
        return (Tower(),)
    paths = transformer_paths(source)
    if not paths:
        kinds = sorted({one.kind for chain in read_chains(source).sides.values() for one in chain})
        raise ModelError(
            f"{source} has no transformer: its modules are {', '.join(kinds)}",
            expected="a model with a Transformer among its modules",
            remedy="name another model",
        )
    if saved_metadata(source) or not is_sentence_transformers(source):
        return tuple(Tower(transformer=path) for path in paths)
    return tuple(_transformer(source, path) for path in paths)


def _of_ours(source: Path, saved: Mapping[str, Any]) -> RetrieverStart:
    """Read what stands beside weights that we saved."""
    if saved.get("model") != "retriever":
        paths = transformer_paths(source)
        query, document = (Tower(transformer=path) for path in (paths[0], paths[-1]))
        return RetrieverStart(METADATA_FILE, query, document, len(paths) == 1, head="its head")
    query, document = (
        Tower(
            transformer="" if saved["tied"] else side,
            pooling=(saved["pooling"],),
            dense=tuple(read_dense(source, path) for path in saved.get("dense", {}).get(tower, ())),
            normalize=saved["similarity"] == "cosine",
            max_length=saved.get(length),
        )
        for side, length in (("query", "query_max_length"), ("document", "max_length"))
        for tower in ("shared" if saved["tied"] else side,)
    )
    prompts = dict(saved.get("prompts", {}))
    return RetrieverStart(METADATA_FILE, query, document, saved["tied"], saved["similarity"], prompts)


def _prompts(settings: Mapping[str, Any]) -> dict[str, str]:
    given = {key: value for key, value in dict(settings.get("prompts") or {}).items() if value}
    found = {side: next((given[name] for name in names if name in given), "") for side, names in _PROMPT_NAMES.items()}
    default = settings.get("default_prompt_name")
    if default in given and given[default] not in found.values():
        raise ModelError(
            f"every text gets the prompt {default!r}, {given[default]!r}, by default_prompt_name",
            expected="prompts named query and document",
            remedy="in a copy of the folder, name them so in config_sentence_transformers.json",
        )
    return {side: prompt for side, prompt in found.items() if prompt}


def _require_dense(source: Path, chains: Chains) -> None:
    """Refuse what gives no vector, or many, of a text."""
    kinds = {one.kind for chain in chains.sides.values() for one in chain}
    sparse = sorted(kinds & _SPARSE)
    if chains.model_type == "SparseEncoder" or sparse:
        raise ModelError(
            f"{source} is a sparse encoder ({', '.join(sparse) or chains.model_type}): it weighs words of a vocabulary",
            expected="a dense retriever, which gives a text one embedding",
            remedy=f"name a dense model; or, to train one from its transformer, {ALONE}",
        )
    if chains.model_type not in ("SentenceTransformer", "CrossEncoder"):
        raise ModelError(
            f"{source} is a {chains.model_type}",
            expected="a SentenceTransformer, which gives a text one embedding",
            remedy=f"name one; or, to train one from its transformer, {ALONE}",
        )


def is_cross_encoder(chains: Chains) -> bool:
    """Tell whether a folder was saved from a CrossEncoder."""
    return chains.model_type == "CrossEncoder"


def read_classifier(source: Path, chains: Chains) -> tuple[list[str], Tower]:
    """Return the modules of a CrossEncoder that are more than its classifier, and the classifier.

    Args:
        source: Its folder.
        chains: Its modules.

    Raises:
        ModelError: It has no transformer, or one with a setting that is not kept.
    """
    chain = chains.sides["document"]
    transformer = next((one for one in chain if one.kind == "Transformer"), None)
    if transformer is None:
        raise ModelError(f"{source} has no transformer among its modules", remedy="name another model")
    found = _transformer(source, transformer.path)
    more = [one.kind for one in chain if one is not transformer]
    return (more if found.task == _CLASSIFIER else [*more, f"Transformer ({found.task})"]), found


def _transformer(source: Path, path: str) -> Tower:
    task, max_length, lower_case = read_transformer(source, path)
    return Tower(transformer=path, task=task, max_length=max_length, lower_case=lower_case)

"""Whether a recipe goes on with its starts as they are.

What a folder says of its model is compared with the recipe's section before any work. What would silently change an
embedding or a score is refused by its name; what is a choice that a recipe may make is told. Of a plain transformers
checkpoint nothing is said, and the recipe alone decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import huggingface_hub
from huggingface_hub import errors as hub
from torch import nn

from engine.config.models import EncoderConfig, LexicalConfig, ModelConfig, RankerConfig, RetrieverConfig
from engine.config.recipe import Config
from engine.errors import ModelError
from engine.models.packed import Pooling
from engine.models.ranker import Ranker
from engine.models.sentence_transformers import ALONE, MODULES_FILE, Tower, is_sentence_transformers, read_chains
from engine.models.sides import PADDING_SIDE, TOKENIZER_FILE, TRUNCATION_SIDE, left_sides
from engine.models.source import local_source, saved_metadata
from engine.models.start import (
    RankerStart,
    RetrieverStart,
    is_cross_encoder,
    read_classifier,
    read_lexical,
    read_ranker,
    read_retriever,
    require_head_form,
    transformers_of,
)
from shards.files import read_json

_RISING = frozenset({"Identity", "Sigmoid", "Tanh", "Softplus", "LogSigmoid", "Softsign", "LeakyReLU"})
"""Activations that keep the order of scores."""


class Note(NamedTuple):
    """Something about a start that is told.

    Attributes:
        text: A sentence without its end.
        warns: Whether it changes what is computed.
    """

    text: str
    warns: bool


def require_agreement(section: ModelConfig, source: str, name: str) -> list[Note]:
    """Compare a recipe's section with what its start says.

    Args:
        section: Of the model.
        source: Where the weights are: a hub id, a folder, or `package:NAME`.
        name: Of the section.

    Returns:
        What is to be told.

    Raises:
        ModelError: The recipe contradicts the start, or the start has what is not kept.
        ArtifactError: A description of ours is damaged.
    """
    found = local_source(source)
    return [*_compare(found, section, name), *_told_of_sides(found, section)]


def _compare(found: str | Path, section: ModelConfig, name: str) -> list[Note]:
    if isinstance(section, RetrieverConfig):
        start = read_retriever(found)
        return _compare_retriever(start, section, name) if start.origin else _traces(found, section, name)
    if isinstance(section, LexicalConfig):
        return _compare_lexical(read_lexical(found), section, name)
    if isinstance(section, RankerConfig):
        if isinstance(found, Path):
            return _compare_ranker(found, section, name)
        config = _file_on_hub(found, "config.json")
        return [] if config is None else _compare_activation(_stated_activation(config), section, name)
    return []


def require_trained_teachers(config: Config, modules: Mapping[str, nn.Module]) -> list[Note]:
    """Compare rankers' heads with when the recipe lets them teach. Models named `random` teach nothing anyway.

    Args:
        config: The recipe.
        modules: All models by name, as they are before any training.

    Returns:
        What is to be told.

    Raises:
        ModelError: A head is of random numbers, no step trains it, and it alone scores.
    """
    rankers = [name for name, module in modules.items() if isinstance(module, Ranker) and module.has_fresh_head]
    fresh = [name for name in rankers if config.models[name].name != "random"]
    return [note for name in fresh for note in _untrained_teacher(config, name)]


def _untrained_teacher(config: Config, name: str) -> list[Note]:
    """Tell when a ranker with a fresh head teaches before a step has trained it; refuse one that always would."""
    if config.untrained_teacher == "never":
        return []
    section = config.models[name]
    of_it = [f"{phase.section}.steps" for phase in config.timetable.phases_of(name)]
    idle = " and ".join(f"{phase.section}.steps=0" for phase in config.timetable.phases_of(name) if not phase.steps)
    fact = f"{section.name} has no head of a ranker, so that a new one of random numbers stands there, and with {idle} "
    if config.untrained_teacher == "always" and not config.priors:
        raise ModelError(
            f"{fact}no step trains it: the retriever would learn from random numbers",
            expected="a trained ranker, or a phase that trains it",
            remedy=f"name a trained cross-encoder by {name}.name, or raise {' or '.join(of_it)}",
        )
    when = "in the first iteration" if config.untrained_teacher == "first" else "in every iteration"
    beside = ", beside its prior" if config.priors else ""
    return [Note(f"{fact}it teaches the retriever {when} as it is{beside}", warns=True)]


def _traces(source: str | Path, section: RetrieverConfig, name: str) -> list[Note]:
    """Tell of modules that lie beside a plain checkpoint, without the list that would make them part of it."""
    found = sorted(path.name for path in source.glob("[0-9]_*")) if isinstance(source, Path) else []
    if not found:
        return []
    text = f"{section.name} has {', '.join(found)}, but no {MODULES_FILE}: {name} starts from its transformer alone"
    return [Note(text, warns=True)]


def _file_on_hub(name: str, file: str) -> Path | None:
    """Return a file of a hub's model; None where it cannot be had, which is said when the model is loaded."""
    with contextlib.suppress(hub.HfHubHTTPError, hub.HFValidationError, hub.EntryNotFoundError, OSError):
        return Path(huggingface_hub.hf_hub_download(name, file))
    return None


def _told_of_sides(found: str | Path, section: ModelConfig) -> list[Note]:
    """Tell of a tokenizer that cuts texts, or fills inputs, on another side than is done here."""
    if isinstance(found, Path):
        file: Path | None = found / transformers_of(found)[-1].transformer / TOKENIZER_FILE
    else:
        file = _file_on_hub(found, TOKENIZER_FILE)
    sides = left_sides(file) if file is not None else ()
    said = "what is saved and exported says so"
    texts = {
        TRUNCATION_SIDE: f"cuts long texts on the left, here they are cut on the right, from their end; {said}",
        PADDING_SIDE: f"fills short inputs on the left, here they are filled on the right; {said}",
    }
    return [Note(f"the tokenizer of {section.name} {texts[side]}", warns=side == TRUNCATION_SIDE) for side in sides]


def _compare_retriever(start: RetrieverStart, section: RetrieverConfig, name: str) -> list[Note]:
    _require_both_towers(start, section, name)
    if start.head:
        return [Note(f"{name} starts from the transformer of {section.name}, without {start.head}", warns=True)]
    for side, tower in (("query", start.query), ("document", start.document)):
        _require_pooling(tower, section, name)
        if not tower.include_prompt and (start.prompts or {}).get(side) and section.prompts[side] != "":
            raise ModelError(
                f"the Pooling of {section.name} leaves out the {side}'s prompt (include_prompt is false)",
                expected="a Pooling of all tokens",
                remedy=f"name another model by {name}.name; or {ALONE}",
            )
    _require_width(start, section, name)
    return [
        *_compare_similarity(start, section, name),
        *_told_of_texts(start, section, name),
        *_told_of_layers(start, section, name),
    ]


def _compare_lexical(start: RetrieverStart, section: LexicalConfig, name: str) -> list[Note]:
    _require_both_towers(start, section, name)
    if start.similarity not in (None, "dot"):
        raise ModelError(
            f"{section.name} compares its vectors by {start.similarity} (similarity_fn_name)",
            expected="dot, the inner product that an inverted index computes",
            remedy=f"name another model by {name}.name; or, in a copy of the folder, set similarity_fn_name to dot in "
            "config_sentence_transformers.json",
        )
    if start.truncate_dim is not None:
        raise ModelError(
            f"{section.name} keeps the {start.truncate_dim} largest weights of a text (max_active_dims)",
            expected="all weights",
            remedy="take max_active_dims out of config_sentence_transformers.json in a copy of the folder, or name "
            f"another model by {name}.name",
        )
    return _told_of_texts(start, section, name)


def _require_both_towers(start: RetrieverStart, section: EncoderConfig, name: str) -> None:
    if not start.tied and section.tied:
        raise ModelError(
            f"{section.name} has one tower for queries and another for documents, {name}.tied is true",
            expected="both towers to be trained",
            remedy=f"set {name}.tied=false, or name the folder of one of its towers by {name}.name",
        )


def _told_of_texts(start: RetrieverStart, section: EncoderConfig, name: str) -> list[Note]:
    return [
        *_compare_length(start.document.max_length, section.max_length, f"{name}.max_length", section.name),
        *_compare_length(start.query.max_length, section.query_max_length, f"{name}.query_max_length", section.name),
        *(
            _compare_prompt(side, (start.prompts or {}).get(side, ""), asked, f"{name}.{side}_prompt", section.name)
            for side, asked in section.prompts.items()
            if (start.prompts or {}).get(side) or asked
        ),
    ]


def _compare_prompt(side: str, stated: str, asked: str | None, field: str, source: str) -> Note:
    if asked in (None, stated):
        return Note(f"{side} texts get the prompt {stated!r} of {source}", warns=False)
    before = f"the prompt {stated!r}" if stated else "no prompt"
    return Note(f"{source} gives {side} texts {before}, {field} is {asked!r}: embeddings begin as others", warns=True)


def _require_pooling(tower: Tower, section: RetrieverConfig, name: str) -> None:
    if tower.pooling == (section.pooling,):
        return
    stated = " + ".join(tower.pooling)
    known = get_args(Pooling)
    if tower.pooling and tower.pooling[0] in known and len(tower.pooling) == 1:
        raise ModelError(
            f"{section.name} pools by {stated}, {name}.pooling is {section.pooling}: its embeddings would be others",
            expected=f"{name}.pooling={stated}",
            remedy=f"set {name}.pooling={stated}; or, to pool otherwise, {ALONE}",
        )
    raise ModelError(
        f"{section.name} pools by {stated}, which no retriever here does",
        expected=f"a pooling by {' or '.join(known)}",
        remedy=f"name such a model by {name}.name; or, to train one from its transformer, {ALONE}",
    )


def _require_width(start: RetrieverStart, section: RetrieverConfig, name: str) -> None:
    query, document = ([layer.out_features for layer in tower.dense] for tower in (start.query, start.document))
    if query and document and query[-1] != document[-1]:
        raise ModelError(
            f"{section.name} gives queries {query[-1]} numbers and documents {document[-1]}",
            expected="embeddings of one length",
            remedy=f"name another model by {name}.name",
        )
    if start.truncate_dim is not None:
        raise ModelError(
            f"{section.name} keeps the first {start.truncate_dim} numbers of an embedding (truncate_dim)",
            expected="whole embeddings",
            remedy="take truncate_dim out of config_sentence_transformers.json in a copy of the folder, or name "
            f"another model by {name}.name",
        )


def _compare_similarity(start: RetrieverStart, section: RetrieverConfig, name: str) -> list[Note]:
    if start.query.normalize != start.document.normalize:
        raise ModelError(
            f"{section.name} normalises the embeddings of one side alone",
            expected="both or neither",
            remedy=f"name another model by {name}.name",
        )
    cosine = section.similarity == "cosine"
    if start.document.normalize and not cosine:
        raise ModelError(
            f"{section.name} normalises its embeddings, {name}.similarity is {section.similarity}: they would change",
            expected=f"{name}.similarity=cosine",
            remedy=f"set {name}.similarity=cosine; with embeddings that are not normalised, {ALONE}",
        )
    stated = start.similarity
    if stated not in (None, "dot", "cosine"):
        raise ModelError(
            f"{section.name} compares embeddings by {stated} (similarity_fn_name)",
            expected="dot or cosine",
            remedy=f"name another model by {name}.name; or, in a copy of the folder, set similarity_fn_name to the one "
            "that is to be trained in config_sentence_transformers.json",
        )
    if stated == "dot" and cosine and not start.document.normalize:
        raise ModelError(
            f"{section.name} compares embeddings by dot, {name}.similarity is cosine: its order of documents would be "
            "another",
            expected=f"{name}.similarity=dot",
            remedy=f"set {name}.similarity=dot; to train by cosine all the same, {ALONE}",
        )
    if stated == "cosine" and not cosine:
        text = f"{section.name} compares embeddings by cosine, {name}.similarity is dot: set it to cosine to go on so"
        return [Note(text, warns=True)]
    return []


def _compare_length(stated: int | None, asked: int, field: str, source: str) -> list[Note]:
    if stated is None or stated == asked:
        return []
    longer = asked > stated
    outcome = "are read further than it was made for" if longer else "are cut earlier than it cuts them"
    return [Note(f"{source} takes {stated} tokens, {field} is {asked}: long texts {outcome}", warns=longer)]


def _told_of_layers(start: RetrieverStart, section: RetrieverConfig, name: str) -> list[Note]:
    layers = dict.fromkeys((*start.query.dense, *start.document.dense))
    if not layers:
        return []
    sizes = ", ".join(f"{one.path} ({one.in_features} to {one.out_features})" for one in layers)
    return [Note(f"{name} has the Dense layers of {section.name}: {sizes}", warns=False)]


def _compare_ranker(source: Path, section: RankerConfig, name: str) -> list[Note]:
    saved = saved_metadata(source)
    if len(transformers_of(source)) > 1:
        raise ModelError(
            f"{section.name} has two transformers, for queries and for documents",
            expected="one, which reads both together",
            remedy=f"name the folder of one of them by {name}.name, such as "
            f"{source}/{transformers_of(source)[-1].transformer}",
        )
    start = read_ranker(source)
    require_head_form(start, section.head, section.name, name)
    told = _compare_words(start, section, name)
    if saved.get("model") == "ranker":
        return [*told, *_compare_length(start.max_length, section.max_length, f"{name}.max_length", section.name)]
    chains = read_chains(source) if not saved and is_sentence_transformers(source) else None
    if saved or (chains is not None and not is_cross_encoder(chains)):
        text = f"{name} starts from the transformer of {section.name}, under a head of its own"
        return [Note(text, warns=False)]
    if chains is not None:
        more, _ = read_classifier(source, chains)
        if start.form is None:
            raise ModelError(
                f"the CrossEncoder {section.name} scores by {', '.join(more)}",
                expected="a sequence classifier with one logit and nothing above it; or a Transformer, a Pooling by "
                "cls or mean, and a Dense layer",
                remedy=f"name such a model by {name}.name",
            )
        default = (chains.settings.get("prompts") or {}).get(chains.settings.get("default_prompt_name"))
        if default and start.pair_words is None:
            raise ModelError(
                f"the CrossEncoder {section.name} puts {default!r} before its texts (default_prompt_name)",
                expected="query and document as they are",
                remedy=f"name another model by {name}.name; or take the prompt out of a copy of the folder",
            )
        length = _compare_length(start.max_length, section.max_length, f"{name}.max_length", section.name)
        return [*told, *length, *_compare_activation(chains.settings.get("activation_fn"), section, name)]
    return _compare_activation(_stated_activation(source / "config.json"), section, name)


def _compare_words(start: RankerStart, section: RankerConfig, name: str) -> list[Note]:
    """Compare what a language model was asked with what the recipe asks it."""
    if start.form != "yes_no":
        return []
    if start.answers != section.answers:
        raise ModelError(
            f"{section.name} answers {start.answers}, {name} expects {section.answers}",
            expected=f"the answers that it has learnt: yes_word {start.answers and start.answers[0]!r}, no_word "
            f"{start.answers and start.answers[1]!r}",
            remedy=f"set {name}.yes_word and {name}.no_word to them",
        )
    if start.pair_words is None:
        text = f"{section.name} does not say how it puts a pair into words: {name}.pair_template does"
        return [Note(text, warns=True)]
    if start.pair_words != section.pair_words:
        raise ModelError(
            f"{section.name} puts a pair into the words {start.pair_words!r}, {name} into {section.pair_words!r}: its "
            "scores would be others",
            expected="the words that it was trained with",
            remedy=f"set {name}.pair_template (and {name}.instruction) to them; or, to train it on others, name a copy "
            "of the language model alone (config.json, weights, tokenizer)",
        )
    return []


def _stated_activation(file: Path) -> str | None:
    """Return what versions of the library up to 5 wrote into a CrossEncoder's config.json, up to 3 by another name."""
    config = read_json(file, "the model's configuration")
    stated: str | None = (config.get("sentence_transformers") or {}).get("activation_fn")
    return stated or config.get("sbert_ce_default_activation_function")


def _compare_activation(stated: str | None, section: RankerConfig, name: str) -> list[Note]:
    """Compare what stands above a CrossEncoder's logit with a raw logit."""
    kind = (stated or "Identity").rpartition(".")[2]
    if kind not in _RISING:
        raise ModelError(
            f"{section.name} scores by {stated} of its logit",
            expected=f"the logit itself, or what keeps its order: {', '.join(sorted(_RISING))}",
            remedy="in a copy of the folder, set activation_fn to torch.nn.modules.linear.Identity if the logit is to "
            f"be the score, or name another model by {name}.name",
        )
    if kind == "Identity":
        return []
    text = f"scores of {name} are logits, to which {section.name} applies {kind}: the order is the same"
    return [Note(text, warns=False)]

"""What the exports of all kinds of model have in common: sentence-transformers' files, and the comparison of numbers.

The files are written by hand in the form that the library wrote up to its version 5, which later versions read too.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.errors import ArtifactError
from engine.log import get_logger
from engine.models.dual import DOCUMENT, QUERY
from engine.models.packed import Pooling
from engine.models.sides import limit_tokenizer
from engine.models.template import Input, InputTemplate
from shards.files import write_json

log = get_logger(__name__)
MODULES = "sentence_transformers.models."
"""Where the library's modules for dense models are, and those that all kinds of model have."""

_LIBRARY, _OLDEST = "sentence-transformers", (6, 2)
"""By which exports are tried, and from which version on: that of the extra `export`."""

Chain = Sequence[tuple[str, str]]
"""The modules that a text goes through: folder below the model's, and the library's class."""


def write_modules(folder: Path, chain: Chain) -> None:
    """Write the list of a model's modules."""
    write_json(
        folder / "modules.json",
        [{"idx": number, "name": str(number), "path": path, "type": kind} for number, (path, kind) in enumerate(chain)],
    )


def write_pooling(folder: Path, model_folder: Path, pooling: Pooling) -> None:
    """Write the module that pools token states.

    Args:
        folder: To make for it.
        model_folder: The transformer's.
        pooling: First token, last token, or mean over the tokens.
    """
    config = transformers.AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
    folder.mkdir()
    write_json(
        folder / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            **({"pooling_mode_lasttoken": True} if pooling == "last" else {}),
        },
    )


def write_router(folder: Path, routes: Mapping[str, Chain]) -> None:
    """Write the settings of a Router, by which queries and documents go through modules of their own.

    Args:
        folder: The model's, where the Router's is too.
        routes: Chain of each side.
    """
    router = {
        "types": {path: kind for chain in routes.values() for path, kind in chain},
        "structure": {side: [path for path, _ in chain] for side, chain in routes.items()},
        "parameters": {"default_route": DOCUMENT, "allow_empty_key": True},
    }
    write_json(folder / "router_config.json", router)


def write_settings(folder: Path, *, library: str, prompts: Mapping[str, str], similarity: str, **more: Any) -> None:
    """Write what stands beside the list of modules.

    Args:
        folder: The model's.
        library: The first version of sentence-transformers that reads such a model.
        prompts: What texts begin with, by side.
        similarity: `dot` or `cosine`.
        more: Other settings.
    """
    versions = {
        "sentence_transformers": library,
        "transformers": transformers.__version__,
        "pytorch": str(torch.__version__),
    }
    settings = {
        "__version__": versions,
        "prompts": dict(prompts),
        "default_prompt_name": None,
        "similarity_fn_name": similarity,
    }
    write_json(folder / "config_sentence_transformers.json", settings | more)


def describe_tower(folder: Path, max_length: int) -> None:
    """Write the length of a transformer's inputs, where the libraries look for it."""
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    limit_tokenizer(folder, max_length)


def compare_sides(
    ours: Mapping[str, Tensor],
    texts: Mapping[str, list[str]],
    by_transformers: Callable[[str, list[str]], Tensor],
    by_library: Callable[[], Any],
    **options: Any,
) -> dict[str, float]:
    """Compare our vectors of queries and documents with those that the libraries make of the same texts.

    Args:
        ours: Vectors [N, D] by side.
        texts: What they are of.
        by_transformers: Makes vectors of a side's texts by transformers alone.
        by_library: Loads the export as sentence-transformers does; called where that is installed.
        options: Of the loaded model's `encode_query` and `encode_document`.

    Returns:
        Largest difference by library.
    """

    def over_sides(theirs_of: Callable[[str, list[str]], Tensor]) -> float:
        return max(largest_difference(ours[side], theirs_of(side, texts[side])) for side in (QUERY, DOCUMENT))

    differences = {"transformers": over_sides(by_transformers)}
    if is_read_by_library():
        model = by_library()
        encoders = {QUERY: model.encode_query, DOCUMENT: model.encode_document}
        differences["sentence-transformers"] = over_sides(
            lambda side, given: encoders[side](given, batch_size=len(given), show_progress_bar=False, **options)
        )
    return differences


def is_read_by_library() -> bool:
    """Tell whether sentence-transformers is installed here in a version that reads exports of every form.

    Older ones cannot load some forms, which says nothing about the export: the log tells that it was not tried.
    """
    try:
        found = importlib.metadata.version(_LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return False
    numbers = tuple(int(one) for one in re.findall(r"\d+", found)[:2])
    if numbers < _OLDEST:
        log.warning(
            "%s %s is installed, and exports are read by %s on: it is not tried",
            _LIBRARY,
            found,
            ".".join(map(str, _OLDEST)),
        )
    return numbers >= _OLDEST


def padded_queries(template: InputTemplate, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Make our own inputs of queries, as one batch that is as long as the longest, as the libraries make it."""
    single = template.for_queries().single
    return template.pad([single(ids, max_length) for ids in template.queries.token_ids(tokenizer, texts)], 1)


def padded_documents(template: InputTemplate, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, Tensor]:
    """Make our own inputs of documents, as `padded_queries` does."""
    single = template.for_documents().single
    return template.pad([single(ids, max_length) for ids in template.documents.token_ids(tokenizer, texts)], 1)


def require_alone_cut(
    target: Path, reader: Any, template: InputTemplate, tokenizer: Any, side: str, max_length: int, prompt: str = ""
) -> None:
    """Compare how a text alone is cut, as `require_same_cut` does.

    Args:
        target: The export.
        reader: Its tokenizer, as transformers loads it.
        template: Of our own tokenizer.
        tokenizer: Our own.
        side: The text's.
        max_length: Tokens of an input.
        prompt: What such a text begins with.

    Raises:
        ArtifactError: The tokenizer keeps other tokens.
    """
    text = long_text(max_length)
    form, wording = template.for_documents(), template.documents
    if side == QUERY:
        form, wording = template.for_queries(), template.queries
    require_same_cut(target, reader, form.single(wording.token_ids(tokenizer, [text])[0], max_length), prompt + text)


def require_same_cut(target: Path, reader: Any, own: Input, *texts: str) -> None:
    """Compare which tokens are left of what is too long; a forward of the longest inputs would be dear.

    Args:
        target: The export.
        reader: Its tokenizer, as transformers loads it.
        own: Our own input.
        texts: What it is of, one or two.

    Raises:
        ArtifactError: The tokenizer keeps others.
    """
    theirs = list(reader(*texts, truncation=True)["input_ids"])
    if theirs != [int(one) for one in own.ids]:
        raise ArtifactError(
            f"the tokenizer exported to {target} cuts a long text to other tokens than we do: it keeps "
            f"{len(theirs)}, we {len(own.ids)}, and it cuts on the {reader.truncation_side}",
            expected=f"the first {len(own.ids)} tokens, special tokens included",
            remedy="compare truncation_side and model_max_length of its tokenizer_config.json with those beside our "
            "weights",
        )


def long_text(max_length: int) -> str:
    """Return a text whose first half and second half have more than so many tokens, and differ in any vocabulary."""
    half = max_length + 1
    return " ".join(f"{'a' if number < half else 'the'} {number}" for number in range(2 * half))


def largest_difference(ours: Tensor, theirs: Tensor, least: float = 1.0) -> float:
    """Return the largest difference of two tensors, divided by the largest of our numbers, or by `least`."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=least))

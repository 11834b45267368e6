"""Where a model's files are, which of them are missing, and what was written down beside its weights.

A model is named by a hub id, by a local folder, or as `package:NAME`, an installed package that carries weights. What
a local folder lacks is said by its name before any library opens it: transformers makes an empty tokenizer where it
finds none, and takes a pointer of Git LFS for weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import errors as hub

from engine.errors import ModelError
from engine.models.sentence_transformers import MODULES_FILE, is_sentence_transformers, transformer_folders
from shards.errors import listed
from shards.files import read_json, write_json

METADATA_FILE = "sparring.json"
"""Beside the weights that we save: pooling, similarity, lengths, and whatever else gives the same scores elsewhere."""
BOTTLENECK, MASKED_LM = "bottleneck", "masked_lm"
"""What descriptions call a pre-trained model with its decoder, and its export: both start others as a checkpoint of a
masked language model does, of which nothing is said."""
POOLER: Literal["pooler"] = "pooler"
"""The form of a ranker's head that transformers' own classifiers have; a description without a form means it."""
WHOLE_MODELS = (POOLER, "yes_no")
"""Forms of which a saved ranker is a model of transformers with its head."""
TRANSFORMER, HEAD = "transformer", "head"
"""Where a saved ranker has its backbone and its head, if the head is of another form."""

PACKAGE = "package:"
_WEIGHTS = ("*.safetensors", "*.bin")
_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.vocab", "*.tiktoken", "tekken.json", "bpe.codes")
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin"})
"""What training leaves beside weights."""
_LFS_POINTER = b"version https://git-lfs"
_FETCHED = ["*.json", "*.txt", "*.model", "*.vocab", "*.safetensors"]
_NOT_FETCHED = ["onnx/*", "openvino/*", "**/onnx/*", "**/openvino/*"]
"""What others compute the same model with."""
_TRACES = ("config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*", "router_config.json")
_LISTED = 3


def resolve_model(name: str) -> str | Path:
    """Find where a model's files are.

    Args:
        name: `package:NAME`, a local folder, or a hub id.

    Returns:
        A folder, or the hub id as it was given.

    Raises:
        ModelError: The package is not installed or carries no weights; the folder is missing, or lacks config.json or
            weights.
    """
    if name.startswith(PACKAGE):
        return _package_folder(name.removeprefix(PACKAGE))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_model_files(folder)
        return folder
    if folder.exists():
        raise ModelError(f"{name} is a file", expected="a folder", remedy=f"name {folder.parent}, where it lies")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name}", remedy="correct the path, or name a hub id or package:NAME"
        )
    return name


def local_source(name: str) -> str | Path:
    """Find a model's files as `resolve_model` does; those of a sentence-transformers model on the hub are fetched.

    Such a model is more than the one transformer that transformers would fetch, so all of its files are brought into
    the hub's cache, by its own client and rules, and read from there as from any folder.

    Args:
        name: As in `resolve_model`.

    Returns:
        A folder; or the hub id as it was given, for a model that is a transformers checkpoint and nothing more.

    Raises:
        ModelError: As in `resolve_model`; or the cache holds a part of such a model, and the rest cannot be had.
    """
    source = resolve_model(name)
    if isinstance(source, Path):
        return source
    return _fetched(source) or source


def cached_source(name: str) -> str | Path:
    """Find a model's files as `local_source` does, without fetching anything.

    Raises:
        ModelError: As in `resolve_model`.
    """
    source = resolve_model(name)
    if isinstance(source, str):
        with contextlib.suppress(hub.HFValidationError):
            listing = huggingface_hub.try_to_load_from_cache(source, MODULES_FILE)
            return Path(listing).parent if isinstance(listing, str) else source
    return source


def require_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer, for which transformers would make one that knows no word.

    Raises:
        ModelError: There is no vocabulary in it.
    """
    if not any(path.is_file() for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise ModelError(
            f"the model folder {folder} has no tokenizer",
            expected="tokenizer.json, or a vocabulary such as vocab.txt, beside its config.json",
            remedy="copy the tokenizer's files there from where the model comes from; transformers writes them by "
            "tokenizer.save_pretrained",
        )


def damaged_files(folder: Path) -> list[str]:
    """Return the names of a model's files that cannot be read as what they are.

    Args:
        folder: Holds the weights; only their headers are read.
    """
    damaged = []
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            damaged.append(path.name)
    whole = {".safetensors": _is_safetensors, ".bin": _is_torch_file}
    return damaged + [path.name for path in weight_files_of(folder) if not whole[path.suffix](path)]


def weight_files_of(folder: Path) -> list[Path]:
    """Return the files of weights that lie in a folder itself."""
    found = {path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NO_WEIGHTS)


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write what must travel with a model's weights."""
    write_json(folder / METADATA_FILE, dict(metadata))


def saved_metadata(source: str | Path) -> dict[str, Any]:
    """Return what `write_metadata` wrote where `resolve_model` pointed; empty for a model from elsewhere.

    Raises:
        ArtifactError: It is damaged.
    """
    if not isinstance(source, Path) or not (source / METADATA_FILE).exists():
        return {}
    return dict(read_json(source / METADATA_FILE, "the description of the model"))


def kind_in_words(kind: str | None) -> str:
    """Return how a person calls a kind of model."""
    return "lexical retriever" if kind == "lexical" else str(kind)


def added_to_logit(metadata: Mapping[str, Any]) -> list[str]:
    """Say what the score of a ranker has besides its logit (`ranker.prior`, `ranker.bm25_prior`), a term each.

    Args:
        metadata: What was saved beside the ranker.
    """
    told = {
        "prior": "inner product of the vectors of query and document by the retriever after its warm-up",
        "bm25_prior": "BM25's score / what it gives the query's words at most",
    }
    return [f"{metadata[name]:g} * {term}" for name, term in told.items() if metadata.get(name)]


def read_metadata(folder: Path, model: Literal["retriever", "lexical", "ranker"]) -> dict[str, Any]:
    """Read what `write_metadata` wrote.

    Args:
        folder: A folder saved by a model of ours.
        model: The kind that it must be.

    Raises:
        ArtifactError: There is none, or it is damaged.
        ModelError: The folder holds another kind of model.
    """
    metadata: dict[str, Any] = read_json(folder / METADATA_FILE, f"the description of the {kind_in_words(model)}")
    if metadata.get("model") != model:
        raise ModelError(
            f"{folder} holds a {kind_in_words(metadata.get('model'))}", expected=f"a {kind_in_words(model)}"
        )
    return metadata


def transformer_paths(folder: Path) -> tuple[str, ...]:
    """Return where a model's transformers lie, below its folder: one, or one for each tower.

    Raises:
        ArtifactError: A description beside the weights is damaged.
        ModelError: A list of modules is damaged, or in no known form.
    """
    saved = saved_metadata(folder)
    if saved.get("model") == "ranker" and saved.get("head", POOLER) not in WHOLE_MODELS:
        return (TRANSFORMER,)
    if saved:
        return ("query", "document") if saved.get("tied") is False else ("",)
    return transformer_folders(folder) if is_sentence_transformers(folder) else ("",)


@functools.cache
def _fetched(name: str) -> Path | None:
    """Return the folder of a sentence-transformers model of the hub; None for a plain checkpoint."""
    try:
        folder = Path(huggingface_hub.hf_hub_download(name, MODULES_FILE)).parent
    except hub.LocalEntryNotFoundError:  # no answer, and not in the cache
        _require_no_traces(name)
        return None
    except (hub.EntryNotFoundError, hub.HfHubHTTPError, hub.HFValidationError, OSError):
        return None  # there is none; what else is wrong is said by whoever loads the model
    with contextlib.suppress(hub.HfHubHTTPError, OSError):  # what is missing then is said by its name
        huggingface_hub.snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED)
        if not all(any((folder / path).glob("*.safetensors")) for path in transformer_folders(folder)):
            huggingface_hub.snapshot_download(name, allow_patterns="*.bin", ignore_patterns=_NOT_FETCHED)
    _require_model_files(folder)
    return folder


def _require_no_traces(name: str) -> None:
    """Refuse a model of which the hub's cache holds modules, but not their list."""
    with contextlib.suppress(hub.HFValidationError, hub.LocalEntryNotFoundError, OSError):
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        traces = sorted(path.name for pattern in _TRACES for path in folder.glob(pattern))
        if traces:
            raise ModelError(
                f"{name} is a sentence-transformers model, for {traces[0]} is in the cache {folder}, but its "
                f"{MODULES_FILE} is not, and the hub does not answer",
                remedy=f"run `hf download {name}` where there is a network, and copy the cache",
            )


def _package_folder(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the package {package} is not installed", remedy=f"pip install {package}, or name another model"
        ) from None
    # The package's own code is not imported: where its files lie is enough.
    folders = sorted({Path(str(file.locate())).parent for file in files if file.name == "config.json"})
    usable = [folder for folder in folders if weight_files_of(folder)]
    if len(usable) != 1:
        raise ModelError(
            f"the package {package} carries {len(usable)} models",
            expected="exactly one folder with config.json and weights in it",
            remedy="name the folder itself" if usable else "name a package that carries weights",
        )
    return usable[0]


def _require_model_files(folder: Path) -> None:
    for path in transformer_paths(folder):
        _require_files_here(folder / path)


def _require_files_here(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {folder} has no config.json", remedy="name a Hugging Face model folder")
    weights = weight_files_of(folder)
    if not weights:
        raise ModelError(
            f"the model folder {folder} has no weights",
            expected=f"a file {' or '.join(_WEIGHTS)} beside its config.json",
            remedy="complete the folder; a clone without Git LFS, for one, has none",
        )
    pointers = [path.name for path in weights if _starts_with(path, _LFS_POINTER)]
    if pointers:
        raise ModelError(
            f"{listed(pointers, _LISTED)} in {folder} is a pointer of Git LFS, not the weights themselves",
            remedy=f"run `git lfs pull` in {folder}, or download the model again",
        )
    _require_parts(folder, {path.name for path in weights})


def _require_parts(folder: Path, present: set[str]) -> None:
    """Refuse weights in several files of which one is missing."""
    if present & {"model.safetensors", "pytorch_model.bin"}:
        return  # whole in one file, which is what is loaded
    for index in (path for pattern in _INDEXES for path in sorted(folder.glob(pattern))):
        named = set(read_json(index, "the list of the weights' files").get("weight_map", {}).values())
        missing = sorted(named - present)
        if missing:
            raise ModelError(
                f"{len(missing)} of the {len(named)} files of weights that {index.name} names are not in {folder}: "
                f"{listed(missing, _LISTED)}",
                remedy="complete the folder: copy or download these files again",
            )
        return  # the first list is the one that is loaded


def _starts_with(path: Path, beginning: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(beginning)) == beginning


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _is_torch_file(path: Path) -> bool:
    import zipfile

    # Written since torch 1.6; older files are pickles, of which only the first bytes are known.
    return zipfile.is_zipfile(path) or _starts_with(path, b"\x80\x02")

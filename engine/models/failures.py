"""Why a model cannot be loaded, and what helps in that very case.

The libraries raise many kinds of exceptions for one cause, and one kind for many causes. Here the cause is looked for:
in the chain of exceptions where the hub is asked, in the files where a folder is read. What is left is told with the
library's own words.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import constants
from huggingface_hub import errors as hub
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from engine.errors import ModelError
from engine.models.source import damaged_files
from shards.errors import SparringError, listed

FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that cannot compute what it is given."""
_LISTED = 3
_NO_ANSWER = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What config.json says of the code that computes a model."""

    model_type: str | None
    code: dict[str, str]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and reports that transformers writes while it loads a model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def loading(name: str, what: str, source: str | Path, section: str) -> Iterator[None]:
    """Turn whatever the body's libraries raise into an error that says what to do.

    Args:
        name: The model, as the recipe names it.
        what: Which part of it the body loads.
        source: What `resolve_model` found.
        section: The recipe's section, for remedies.

    Raises:
        ModelError: The body raised anything that is not an error of ours.
    """
    try:
        with quiet_transformers():
            yield
    except (SparringError, MemoryError):
        raise
    except Exception as error:
        raise _explained(error, name, what, source, section) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _explained(error: Exception, name: str, what: str, source: str | Path, section: str) -> ModelError:
    found = _of_files(name, source, section) if isinstance(source, Path) else _of_hub(_chain(error), name, section)
    found = found or _of_configuration(name, source, section)
    if found is not None:
        return found
    if isinstance(error, ImportError):
        return ModelError(
            f"the {what} of {name} needs what is not installed here: {reason_of(error)}",
            remedy=f"install it, or name another model by {section}.name",
        )
    return ModelError(
        f"the {what} of {name} cannot be loaded: {type(error).__name__}: {reason_of(error)}",
        expected="a checkpoint that transformers loads without code of its own",
        remedy=f'see what AutoModel.from_pretrained("{source}") says in Python, or name another model by '
        f"{section}.name",
    )


def _of_hub(chain: Sequence[BaseException], name: str, section: str) -> ModelError | None:
    """Say what the hub answered, or that it did not."""
    gated, absent, invalid, silent = (
        next((one for one in chain if isinstance(one, kind)), None)
        for kind in (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.HFValidationError, _NO_ANSWER)
    )
    answer = next((one for one in chain if _status(one) is not None), None)
    if gated is not None:
        return ModelError(
            f"the hub gives {name} only to those whom its owner has let in",
            remedy=f"ask for access at {constants.ENDPOINT}/{name}, then log in by `hf auth login` or set HF_TOKEN",
        )
    if absent is not None:
        return ModelError(
            f"the hub has no model {name}, or shows it to its owner alone",
            remedy=f"correct {section}.name; for a private model log in by `hf auth login` or set HF_TOKEN; a folder "
            f"is named by a path that exists, such as ./{name}",
        )
    if invalid is not None:
        return ModelError(
            f"{name!r} is neither a folder nor the id of a model on the hub: {reason_of(invalid)}",
            remedy=f"correct {section}.name",
        )
    if any(isinstance(one, hub.EntryNotFoundError) for one in chain if not isinstance(one, _NO_ANSWER)):
        return _lacks_a_file(name, reason_of(chain[0]), section)
    if answer is not None:
        return _of_answer(answer, name, section)
    if silent is None and not any(type(one).__name__.endswith(("ConnectError", "Timeout")) for one in chain):
        return None
    why = (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
        else f"{constants.ENDPOINT} cannot be reached: {reason_of(chain[-1])}"
    )
    return ModelError(
        f"{name} is no folder here and not in the cache {constants.HF_HUB_CACHE}, and {why}",
        remedy=f"run `hf download {name}` where there is a network and copy the cache, or name a local folder by "
        f"{section}.name",
    )


def _of_answer(answer: BaseException, name: str, section: str) -> ModelError:
    status = _status(answer)
    remedy = (
        f"correct {section}.name; for a private model log in by `hf auth login`, or correct or unset HF_TOKEN"
        if status in (401, 403)
        else "try again later, or name a local folder"
    )
    return ModelError(f"the hub answers {status} for {name}: {reason_of(answer)}", remedy=remedy)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _lacks_a_file(name: str, what: str, section: str) -> ModelError:
    return ModelError(
        f"{name} on the hub lacks a file that a model has: {what}",
        expected="config.json, weights and a tokenizer",
        remedy=f"name another model by {section}.name",
    )


def _of_files(name: str, folder: Path, section: str) -> ModelError | None:
    """Name the files that are damaged, in a folder or in its towers."""
    damaged = [
        str(place.relative_to(folder) / file)
        for place in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir()))
        for file in damaged_files(place)
    ]
    if not damaged:
        return None
    return ModelError(
        f"{listed(damaged, _LISTED)} of {folder} is damaged: it is cut off, or another kind of file",
        remedy=f"copy or download {name} again, or name another model by {section}.name",
    )


def _of_configuration(name: str, source: str | Path, section: str) -> ModelError | None:
    """Say what of the configuration transformers does not know."""
    if isinstance(source, str) and _is_known_to_lack(source, "config.json"):
        return _lacks_a_file(name, "config.json", section)
    settings = _settings(source)
    if settings is None or settings.model_type in CONFIG_MAPPING:
        return None
    kind = settings.model_type
    if settings.code:
        files = sorted({str(value).split(".")[0].rpartition("--")[2] for value in settings.code.values()})
        return ModelError(
            f"{name} (model_type {kind}) is computed by code of its own ({listed(files, _LISTED)}), which is never run",
            expected=f"an architecture that transformers {transformers.__version__} has",
            remedy=f"name a model of one by {section}.name",
        )
    if kind is None:
        return ModelError(
            f"config.json of {name} names no model_type, so that nothing says what it is a model of",
            remedy=f"add the model_type, such as bert, or name another model by {section}.name",
        )
    return ModelError(
        f"transformers {transformers.__version__} has no architecture {kind}, which {name} is of",
        remedy=f"name another model by {section}.name, or install a transformers that has it",
    )


def _settings(source: str | Path) -> _Settings | None:
    """Read config.json, from a folder or from the hub's cache; None where there is none."""
    path: Any = source / "config.json" if isinstance(source, Path) else None
    if isinstance(source, str):
        with contextlib.suppress(hub.HFValidationError):
            path = huggingface_hub.try_to_load_from_cache(source, "config.json")
    with contextlib.suppress(OSError, ValueError, TypeError):
        settings = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        return _Settings(settings.get("model_type"), dict(settings.get("auto_map") or {}))
    return None


def _is_known_to_lack(repository: str, file: str) -> bool:
    with contextlib.suppress(hub.HFValidationError):
        return not isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str | None)
    return False


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain

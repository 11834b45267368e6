"""Under which licence a model came from which another one starts: as its own files state it, never guessed from a text.

Asked in this order: the card of the model (its README's front matter), in its folder, in the hub's cache or at the hub;
what an installed package says of itself; a LICENSE file, which is then taken along as it is. Where none of these states
one, that is what is said.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard, constants
from huggingface_hub import errors as hub

from engine.errors import ModelError
from engine.models.source import PACKAGE, resolve_model

UNKNOWN = "unknown"
"""What the hub calls the licence of a model of which none is known."""
_CARD = "README.md"
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
HUB_ERRORS: tuple[type[Exception], ...] = (getattr(hub, "HTTPError"), OSError, ValueError)  # noqa: B009
"""What the hub's client raises: errors of the HTTP library below it, whichever that is, of the system, of names."""
_SECONDS = 10.0
"""How long the hub may take to answer; an export does not wait for it longer."""


@dataclass(frozen=True, slots=True)
class StartModel:
    """What a card says of the model that another one began as.

    Attributes:
        license: Identifier as the hub has it; `other` where a file has the terms, `unknown` where nothing states any.
        told: Where that was found, or why it is not known: a sentence.
        license_name: What the start calls terms that are `other`.
        license_link: Where it says that they are.
        license_file: File with the terms, to be taken along; None where they have an identifier.
        base_model: Its name on the hub, or that of the model that it says it comes from; None where there is none.
    """

    license: str
    told: str
    license_name: str | None = None
    license_link: str | None = None
    license_file: Path | None = None
    base_model: str | None = None


def start_model(name: str) -> StartModel:
    """Find out what a model was, from which another one started.

    Args:
        name: As a recipe names it: a hub id, a folder, `package:NAME`, or `random`.

    Returns:
        Its licence and its name on the hub, as far as they are stated; a model that is gone has none.
    """
    if name == "random":
        return StartModel(UNKNOWN, "The weights began at random: no start model's licence comes with them.")
    try:
        source = resolve_model(name)
    except ModelError:
        return StartModel(
            UNKNOWN, "The licence of the start model is not known: its files are no longer where they were."
        )
    if isinstance(source, str):
        return _of_the_hub(source)
    return _of_a_folder(source, name)


def _of_the_hub(name: str) -> StartModel:
    cached, page = _cached_card(name), f"{constants.ENDPOINT}/{name}/blob/main/"
    if cached is not None and (
        found := _of_card(_card_data(cached), f"the card of {name}", base_model=name, page=page)
    ):
        return found
    told = f"The licence of the start model {name} is not known: "
    if constants.HF_HUB_OFFLINE:
        return StartModel(UNKNOWN, f"{told}its card is not in the cache, and the hub is switched off.", base_model=name)
    try:
        data: Any = huggingface_hub.model_info(name, timeout=_SECONDS).card_data
    except HUB_ERRORS as error:
        why = f"its card is not in the cache, and the hub did not answer ({type(error).__name__})."
        return StartModel(UNKNOWN, told + why, base_model=name)
    stated = {} if data is None else data.to_dict()
    return _of_card(stated, f"the card of {name}", base_model=name, page=page) or StartModel(
        UNKNOWN, f"{told}its card states none.", base_model=name
    )


def _of_a_folder(folder: Path, name: str) -> StartModel:
    data = _card_data(folder / _CARD)
    called = name if name.startswith(PACKAGE) else folder.name
    base = data.get("base_model")
    base_model = base[0] if isinstance(base, list) and base else base if isinstance(base, str) else None
    if found := _of_card(data, f"the card of the start model ({called})", base_model=base_model, folder=folder):
        return found
    if name.startswith(PACKAGE):
        stated = importlib.metadata.metadata(name.removeprefix(PACKAGE))
        if words := next(iter(stated.get_all("License-Expression") or ()), None):
            told = f"Licence as the package {called.removeprefix(PACKAGE)} states it, in which the start model came."
            return StartModel(str(words).lower(), told, base_model=base_model)
    file = next((folder / one for one in _FILES if (folder / one).is_file()), None)
    if file is not None:
        told = f"The terms of the start model ({called}) are in `{file.name}`, a copy of the file that came with it."
        return StartModel("other", told, "as-of-the-start-model", file.name, file, base_model)
    told = f"The licence of the start model ({called}) is not known: no card and no "
    told += "LICENSE file beside its weights states one."
    return StartModel(UNKNOWN, told, base_model=base_model)


def _of_card(
    data: Mapping[str, Any], where: str, *, base_model: str | None, folder: Path | None = None, page: str = ""
) -> StartModel | None:
    """Return what a card states; None where it states no licence.

    Args:
        data: Its front matter.
        where: What it is called.
        base_model: As of `StartModel`.
        folder: Where it lies; None at the hub.
        page: Address that a link without one is below.
    """
    stated = data.get("license")
    if isinstance(stated, list):
        stated = stated[0] if len(stated) == 1 else None
    if not isinstance(stated, str) or not stated or stated == UNKNOWN:
        return None
    name, link = data.get("license_name"), data.get("license_link")
    file = None
    if isinstance(link, str) and "://" not in link:
        file = folder / link if folder and (folder / link).is_file() else None
        link = file.name if file else f"{page}{link}" if page else None
    return StartModel(stated, f"Licence as {where} states it.", name and str(name), link, file, base_model)


def _cached_card(name: str) -> Path | None:
    try:
        found = huggingface_hub.try_to_load_from_cache(name, _CARD)
    except hub.HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _card_data(path: Path) -> Mapping[str, Any]:
    """Return a card's front matter; nothing where there is none, or none that can be read."""
    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever YAML and the hub's checks say of somebody else's file
        return {}

"""What a finished stage returned: as the ledger keeps it, as its caller gets it, and as the log tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from shards.files import parse_record

R = TypeVar("R")


def plain_of(result: object) -> Any:
    """Return a result as JSON holds it."""
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def in_form(function: Callable[..., R], plain: Any, name: str) -> R:
    """Return a stage's result as its function's annotation has it: what JSON holds, or a dataclass.

    Args:
        function: The stage's.
        plain: What the ledger or another rank has.
        name: The stage's, for the error.

    Raises:
        ArtifactError: The annotation names a dataclass, and this is none of that form.
    """
    annotation: Any = getattr(function, "__annotations__", {}).get("return")
    if annotation is not None:
        # Alone: the annotations of arguments may name what is imported for type checks only.
        own = SimpleNamespace(__annotations__={"return": annotation})
        annotation = get_type_hints(own, getattr(function, "__globals__", {}))["return"]
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        return plain  # type: ignore[no-any-return]
    remedy = "choose another run.path: other code recorded it"
    typed: Any = parse_record(plain, annotation, f"the result of {name} in the ledger", remedy=remedy)
    return typed  # type: ignore[no-any-return]


def one_line(result: object) -> str:
    """Return what the log tells of a stage's result: its numbers and texts, or what its `shown` returns."""
    if is_dataclass(result):
        if hasattr(result, "shown"):
            values: Mapping[str, Any] = result.shown()
        else:
            values = {one.name: getattr(result, one.name) for one in fields(result) if one.metadata.get("shown", True)}
    else:
        values = result if isinstance(result, dict) else {}
    shown = {key: value for key, value in values.items() if isinstance(value, (int, float, str)) and key[0] != "_"}
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )

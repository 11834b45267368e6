"""What pre-training asks of a tokenizer, beyond what any recipe does; asked before any work."""

from __future__ import annotations

from typing import Any

from engine.errors import ModelError
from engine.models.template import InputTemplate


def require_mask_token(tokenizer: Any) -> int:
    """Return the id of a tokenizer's mask token.

    Raises:
        ModelError: It has none.
    """
    found = getattr(tokenizer, "mask_token_id", None)
    if found is None:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} has no mask token",
            expected="the tokenizer of a masked language model",
            remedy="name such a model by encoder.name",
        )
    return int(found)


def require_parts(template: InputTemplate, name: str) -> None:
    """Refuse a tokenizer that joins a prompt with the text behind it, where parts of texts are read alone.

    Args:
        template: Of the tokenizer, with the prompts.
        name: The model, as the recipe calls it.

    Raises:
        ModelError: It does.
    """
    if template.queries or template.documents:
        raise ModelError(
            f"the tokenizer of {name} makes other tokens of a text behind a prompt than of the text alone, of "
            "which parts are drawn",
            expected="texts without prompts, or a tokenizer that begins anew behind one",
            remedy=f"set {name}.query_prompt and {name}.document_prompt to an empty text in the recipe's file",
        )

"""Which end of a text is cut, and on which side a short input is filled: the right, whatever a tokenizer's files say.

`engine.models.template` builds inputs by itself, and so no side of a tokenizer is ever asked. What is saved with a
model says the sides that were computed with, so that who loads it cuts and fills alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.files import read_json, write_json

TOKENIZER_FILE = "tokenizer_config.json"
TRUNCATION_SIDE, PADDING_SIDE = "truncation_side", "padding_side"
_RIGHT = "right"


def on_the_right(tokenizer: Any) -> Any:
    """Let a Hugging Face tokenizer cut and fill on the right; saved copies do so too.

    Args:
        tokenizer: It is changed, where it has another side.

    Returns:
        The same tokenizer.
    """
    for side in (TRUNCATION_SIDE, PADDING_SIDE):
        if getattr(tokenizer, side, _RIGHT) != _RIGHT:
            setattr(tokenizer, side, _RIGHT)
            tokenizer.init_kwargs[side] = _RIGHT  # what is saved are the words that it was made with
    return tokenizer


def left_sides(file: Path) -> tuple[str, ...]:
    """Return which sides a tokenizer's settings put on the left.

    Args:
        file: Its `tokenizer_config.json`, which need not be there.
    """
    if not file.is_file():
        return ()
    stated = read_json(file, "the tokenizer's configuration")
    return tuple(side for side in (TRUNCATION_SIDE, PADDING_SIDE) if stated.get(side) == "left")


def limit_tokenizer(folder: Path, max_length: int) -> None:
    """Make the length and the sides part of a saved tokenizer, from which transformers and CrossEncoder take them."""
    path = folder / TOKENIZER_FILE
    stated = read_json(path, "the tokenizer's configuration")
    sides = {TRUNCATION_SIDE: _RIGHT, PADDING_SIDE: _RIGHT}
    write_json(path, {**stated, "model_max_length": max_length, **sides})

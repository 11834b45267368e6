"""What stands around a text, cut into what is tokenised once and what has to be tokenised together with the text.

Documents are tokenised once, and their token ids are stored without what stands around them. That gives the ids of the
whole only where a tokenizer begins anew at the text's borders, as a WordPiece does. A byte-pair tokenizer makes one
token of a space and the word behind it, or of a question mark and the line break behind it. So what the text grows
together with is made part of what is tokenised, as little of it as does, and the rest is fixed. That the two are the
tokens of the whole is proved on texts that begin and end in different ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import ModelError

_PROBES = ("what", "Who wrote it?", "42 %", "(a)", "'s", "naïve", "東京", "x", "string", "self.", "the end.)")
_ENDS_IN_WORD = re.compile(r"\S+\s*$")


@dataclass(frozen=True, slots=True)
class Wording:
    """What a text is tokenised together with; nothing where a tokenizer begins anew at its borders.

    Attributes:
        lead: Stands before the text.
        trail: Stands behind it, and is kept where the text is cut.
    """

    lead: str = ""
    trail: str = ""

    def __bool__(self) -> bool:
        return bool(self.lead or self.trail)

    def token_ids(self, tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Tokenise texts, without special tokens.

        Args:
            tokenizer: A Hugging Face tokenizer.
            texts: Any number.
            limit: Tokens that are kept, the first; None for all.

        Returns:
            Of each text its ids, those of `lead` and `trail` among them.
        """
        if not texts:
            return []
        words = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        cut = words if limit is None else words | {"truncation": True, "max_length": limit}
        if not self.trail or limit is None:
            found: list[list[int]] = tokenizer([self.lead + text + self.trail for text in texts], **cut)["input_ids"]
            return found
        whole = tokenizer([self.lead + text + self.trail for text in texts], **words)["input_ids"]
        (trail,) = tokenizer([self.trail], **words)["input_ids"]
        long = [row for row, ids in enumerate(whole) if len(ids) > limit]
        if long:
            begun = tokenizer([self.lead + texts[row] for row in long], **words)["input_ids"]
            for row, ids in zip(long, begun, strict=True):
                whole[row] = [*ids[: max(0, limit - len(trail))], *trail]
        return list(whole)


PLAIN = Wording()
"""A text alone."""


class Around(NamedTuple):
    """What stands around a text: words that are fixed, their ids, what the text is tokenised with, ids behind it."""

    fixed: str
    before: tuple[int, ...]
    wording: Wording
    behind: tuple[int, ...]


def take_apart(tokenizer: Any, before: str, behind: str = "", *, what: str, remedy: str, trails: bool = True) -> Around:
    """Cut what stands around a text so that fixed ids and those of the text are the tokens of the whole.

    Args:
        tokenizer: A Hugging Face tokenizer.
        before: What stands before the text; empty for nothing.
        behind: What stands behind it.
        what: How errors call the two.
        remedy: Of errors.
        trails: Whether the text may take along what stands behind it.

    Raises:
        ModelError: There is no such cut.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    wholes = [ids(before + probe + behind) for probe in _PROBES]
    for fixed, wording in _cuts(before, behind if trails else ""):
        found = _proved(ids, wholes, fixed, wording)
        if found is not None:
            return found
    raise ModelError(
        f"the tokenizer {type(tokenizer).__name__} makes other tokens of a text within {what} than of the text with "
        "the white space around it",
        expected="white space, a line break or a special token where a text begins and ends",
        remedy=remedy,
    )


def _cuts(before: str, behind: str) -> Iterator[tuple[str, Wording]]:
    """Yield fixed words before a text, and what goes with the text: the least of it first."""
    bare = before.rstrip()
    heads = [(before, ""), (bare, ""), (bare, before[len(bare) :])]
    word = _ENDS_IN_WORD.search(before)
    if word:
        heads.append((before[: word.start()], before[word.start() :]))
    heads.append(("", before))
    space = behind[: len(behind) - len(behind.lstrip())]
    for trail in dict.fromkeys(("", space)):
        for fixed, lead in dict.fromkeys(heads):
            yield fixed, Wording(lead, trail)


def _proved(
    ids: Callable[[str], tuple[int, ...]], wholes: Sequence[tuple[int, ...]], fixed: str, wording: Wording
) -> Around | None:
    """Return what stands around all probes alike; None where it is not alike, or a probe's tokens are others."""
    before, rests = ids(fixed) if fixed else (), set()
    for probe, whole in zip(_PROBES, wholes, strict=True):
        begun = (*before, *ids(wording.lead + probe + wording.trail))
        if whole[: len(begun)] != begun:
            return None
        rests.add(whole[len(begun) :])
    return Around(fixed, before, wording, rests.pop()) if len(rests) == 1 else None

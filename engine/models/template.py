"""Where a tokenizer puts its special tokens, so that stored token ids become inputs without tokenising again.

The shards hold token ids without special tokens. An `InputTemplate` is learnt once from a tokenizer, by looking at
what it adds around a sentinel pair, and then builds the very inputs that the tokenizer would have built from the text.

Shapes: N inputs, L tokens of the longest of them, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import ModelError

_SENTINEL = "a b"
_IGNORED_TYPE = 0


class Input(NamedTuple):
    """One input of a model, not padded yet."""

    ids: list[int]
    """Token ids with special tokens."""
    type_ids: list[int]
    """Segment of each token, as long as `ids`."""


@dataclass(frozen=True, slots=True)
class _Special:
    """A run of special tokens and the segment each of them belongs to."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class InputTemplate:
    """The form of a tokenizer's inputs: `[prefix] A [suffix]` and `[prefix] A [middle] B [suffix]`.

    Attributes:
        pad_id: Token id that fills short inputs.
        has_type_ids: Whether the model takes `token_type_ids`.
    """

    pad_id: int
    has_type_ids: bool
    _single: tuple[_Special, _Special]
    _pair: tuple[_Special, _Special, _Special]
    _single_type: int
    _pair_types: tuple[int, int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> InputTemplate:
        """Learn the form from what a tokenizer adds to a text and to a pair of texts.

        Args:
            tokenizer: A Hugging Face tokenizer.

        Raises:
            ModelError: It has no padding token, or places its special tokens in another way than described above.
        """
        name = type(tokenizer).__name__
        if tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer {name} has no padding token", remedy="name a model of an encoder")
        single = _segments(tokenizer, _SENTINEL)
        pair = _segments(tokenizer, _SENTINEL, _SENTINEL)
        if len(single) != 3 or len(pair) != 5:
            raise ModelError(
                f"the tokenizer {name} places special tokens in an unknown way: {len(single)} runs of tokens for a "
                f"text and {len(pair)} for a pair",
                expected="[prefix] A [suffix], and [prefix] A [middle] B [suffix] with a token in the middle",
                remedy="name a model whose tokenizer does so, such as a BERT, RoBERTa or ELECTRA",
            )
        return cls(
            pad_id=int(tokenizer.pad_token_id),
            has_type_ids="token_type_ids" in tokenizer.model_input_names,
            _single=(single[0], single[2]),
            _pair=(pair[0], pair[2], pair[4]),
            _single_type=single[1].type_ids[0],
            _pair_types=(pair[1].type_ids[0], pair[3].type_ids[0]),
        )

    @property
    def num_special_single(self) -> int:
        """Special tokens around one text."""
        return sum(map(len, self._single))

    @property
    def num_special_pair(self) -> int:
        """Special tokens around and between two texts."""
        return sum(map(len, self._pair))

    def single(self, ids: Sequence[int], max_length: int) -> Input:
        """Build the input of one text.

        Args:
            ids: Token ids without special tokens; the end is cut where they do not fit.
            max_length: Tokens of the input at most, special tokens included.

        Raises:
            ModelError: `max_length` leaves no room for a token.
        """
        self._require_room(max_length, self.num_special_single, texts=1)
        prefix, suffix = self._single
        kept = list(ids[: max_length - self.num_special_single])
        return Input(
            [*prefix.ids, *kept, *suffix.ids],
            [*prefix.type_ids, *[self._single_type] * len(kept), *suffix.type_ids],
        )

    def pair(self, ids_a: Sequence[int], ids_b: Sequence[int], max_length: int) -> Input:
        """Build the input of a query and a document.

        Only the document is cut, down to one token at the least; a query that leaves no room for that token is cut
        too (AR2's released code never cuts queries, and so lets a long one push the document out).

        Args:
            ids_a: Token ids of the query, without special tokens.
            ids_b: Token ids of the document, without special tokens.
            max_length: Tokens of the input at most, special tokens included.

        Raises:
            ModelError: `max_length` leaves no room for a token of each.
        """
        self._require_room(max_length, self.num_special_pair, texts=2)
        prefix, middle, suffix = self._pair
        room = max_length - self.num_special_pair
        kept_a = list(ids_a[: room - min(1, len(ids_b))])
        kept_b = list(ids_b[: room - len(kept_a)])
        type_a, type_b = self._pair_types
        return Input(
            [*prefix.ids, *kept_a, *middle.ids, *kept_b, *suffix.ids],
            [
                *prefix.type_ids,
                *[type_a] * len(kept_a),
                *middle.type_ids,
                *[type_b] * len(kept_b),
                *suffix.type_ids,
            ],
        )

    def pad(self, inputs: Sequence[Input], pad_to_multiple_of: int = 8) -> dict[str, Tensor]:
        """Fill inputs on the right to one length and stack them.

        Args:
            inputs: At least one.
            pad_to_multiple_of: L is rounded up to a multiple of this, in which GPUs compute fastest; 1 for none.

        Returns:
            `input_ids` [N, L], `attention_mask` [N, L] and, where the model has them, `token_type_ids` [N, L], int64.
        """
        longest = max(len(item.ids) for item in inputs)
        length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        ids_NL = torch.full((len(inputs), length), self.pad_id, dtype=torch.long)
        mask_NL = torch.zeros((len(inputs), length), dtype=torch.long)
        types_NL = torch.full((len(inputs), length), _IGNORED_TYPE, dtype=torch.long)
        for row, item in enumerate(inputs):
            size = len(item.ids)
            ids_NL[row, :size] = torch.tensor(item.ids, dtype=torch.long)
            types_NL[row, :size] = torch.tensor(item.type_ids, dtype=torch.long)
            mask_NL[row, :size] = 1
        batch = {"input_ids": ids_NL, "attention_mask": mask_NL}
        return batch | {"token_type_ids": types_NL} if self.has_type_ids else batch

    def _require_room(self, max_length: int, num_special: int, texts: int) -> None:
        if max_length < num_special + texts:
            raise ModelError(
                f"max_length is {max_length}, of which {num_special} are special tokens",
                expected=f"at least {num_special + texts}",
                remedy="raise max_length (or query_max_length)",
            )


def _segments(tokenizer: Any, *texts: str) -> list[_Special]:
    """Encode texts and cut the result where special and ordinary tokens meet; ends with special runs, maybe empty."""
    encoded = tokenizer(
        *texts, add_special_tokens=True, return_special_tokens_mask=True, return_token_type_ids=True, truncation=False
    )
    ids, types = encoded["input_ids"], encoded.get("token_type_ids") or [0] * len(encoded["input_ids"])
    runs: list[tuple[list[int], list[int]]] = [([], [])]
    was_special = True
    for token, segment, special in zip(ids, types, encoded["special_tokens_mask"], strict=True):
        if bool(special) != was_special:
            runs.append(([], []))
            was_special = bool(special)
        runs[-1][0].append(token)
        runs[-1][1].append(segment)
    if not was_special:
        runs.append(([], []))
    return [_Special(tuple(run_ids), tuple(run_types)) for run_ids, run_types in runs]

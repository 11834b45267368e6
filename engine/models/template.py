"""Where a tokenizer puts its special tokens, so that stored token ids become inputs without tokenising again.

The shards hold token ids without special tokens. An `InputTemplate` is learnt once from a tokenizer, by looking at
what it adds around a sentinel pair, and then builds the very inputs that the tokenizer would have built from the text.

Shapes: N inputs, L tokens of the longest of them, padding included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.batch import PackedBatch, TokenIds, pack
from engine.models.wording import PLAIN, Wording, take_apart

Batch = PackedBatch | dict[str, Tensor]
"""What a model's forward takes: inputs end to end, or padded to one length (`input_ids` [N, L] and so on)."""

_SENTINEL = "a b"
_IGNORED_TYPE = 0
QUERY_PLACE, DOCUMENT_PLACE = "{query}", "{document}"
"""Where the texts go in the words of a pair."""
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")
_PROBED_PAIRS = (("what is it?", "It (a) is 42."), ("x", "naïve"), ("a list", "'s \n end"))


class Input(NamedTuple):
    """One input of a model, in no batch yet."""

    ids: TokenIds
    """Token ids with special tokens."""
    type_ids: TokenIds
    """Segment of each token, as long as `ids`."""


@dataclass(frozen=True, slots=True)
class _Special:
    """A run of special tokens and the segment each of them belongs to."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    ids_array: npt.NDArray[np.int64] = field(init=False, compare=False, repr=False)
    type_ids_array: npt.NDArray[np.int64] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids_array", np.array(self.ids, dtype=np.int64))
        object.__setattr__(self, "type_ids_array", np.array(self.type_ids, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class InputTemplate:
    """The form of a tokenizer's inputs: `[prefix] A [suffix]` and `[prefix] A [middle] B [suffix]`.

    Attributes:
        pad_id: Token id that fills short inputs.
        has_type_ids: Whether the model takes `token_type_ids`.
        queries: What queries have to be tokenised together with.
        documents: Likewise for documents.
    """

    pad_id: int
    has_type_ids: bool
    _single: tuple[_Special, _Special]
    _pair: tuple[_Special, _Special, _Special] | None
    _single_type: int
    _pair_types: tuple[int, int]
    _prompts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    queries: Wording = PLAIN
    documents: Wording = PLAIN
    _is_one_segment: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # All tokens of one text have the same segment, those around it too, as in a BERT.
        alike = all(segment == self._single_type for special in self._single for segment in special.type_ids)
        object.__setattr__(self, "_is_one_segment", alike)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, prompts: Mapping[str, str] | None = None, pair_words: str | None = None
    ) -> InputTemplate:
        """Learn the form from what a tokenizer adds to a text and to a pair of texts.

        Args:
            tokenizer: A Hugging Face tokenizer.
            prompts: What a query alone (`query`) and a document alone (`document`) begin with; None for nothing. A pair
                has none.
            pair_words: The words of a pair, with `{query}` and `{document}` where the texts go, and all special tokens
                that there are to be; None for what the tokenizer itself makes of a pair.

        Raises:
            ModelError: It has no padding token, or places its special tokens in another way than described above; or
                the words of a pair have markers that are no tokens, or cannot be cut into fixed ids and texts.
        """
        name = type(tokenizer).__name__
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"the tokenizer {name} has no padding token",
                expected="one, which fills short inputs and is never read",
                remedy="give a copy of the model's folder one: tokenizer.pad_token = tokenizer.eos_token; "
                "tokenizer.save_pretrained(FOLDER), pad_token_id set to its id in FOLDER/config.json; and name that",
            )
        single = _segments(tokenizer, _SENTINEL)
        if len(single) != 3:
            raise ModelError(
                f"the tokenizer {name} places special tokens in an unknown way: in a text {len(single)} runs of tokens",
                expected="[prefix] A [suffix]",
                remedy="name a model whose tokenizer does so, such as a BERT, RoBERTa or ELECTRA",
            )
        pair = _segments(tokenizer, _SENTINEL, _SENTINEL)
        # Where no token stands in the middle, as in a decoder, a pair has no form but by words.
        found = ((pair[0], pair[2], pair[4]), (pair[1].type_ids[0], pair[3].type_ids[0])) if len(pair) == 5 else None
        plain = cls(
            pad_id=int(tokenizer.pad_token_id),
            has_type_ids="token_type_ids" in tokenizer.model_input_names,
            _single=(single[0], single[2]),
            _pair=found[0] if found else None,
            _single_type=single[1].type_ids[0],
            _pair_types=found[1] if found else (0, 0),
        )
        if pair_words is not None:
            return plain._with_pair(tokenizer, pair_words)
        return plain._with_prompts(tokenizer, prompts or {})

    def for_queries(self) -> InputTemplate:
        """Return the form of a query alone, which begins with its prompt where there is one."""
        return self._with_prompt("query")

    def for_documents(self) -> InputTemplate:
        """Return the form of a document alone, as `for_queries` does."""
        return self._with_prompt("document")

    def _with_prompts(self, tokenizer: Any, prompts: Mapping[str, str]) -> InputTemplate:
        around = {
            side: take_apart(tokenizer, prompt, what=f"the prompt {prompt!r}", remedy="change the prompt")
            for side, prompt in prompts.items()
        }
        wordings = {side: one.wording for side, one in around.items()}
        return replace(
            self,
            _prompts=tuple((side, one.before) for side, one in around.items()),
            queries=wordings.get("query", PLAIN),
            documents=wordings.get("document", PLAIN),
        )

    def _with_pair(self, tokenizer: Any, words: str) -> InputTemplate:
        """Return the form whose pairs have these words, which is proved on some pairs."""
        known, markers = tokenizer.get_vocab(), dict.fromkeys(_MARKER.findall(words))
        strange = [marker for marker in markers if marker not in known]
        if strange:
            raise ModelError(
                f"pair_template has {', '.join(strange)}, which the tokenizer {type(tokenizer).__name__} has no token "
                "for",
                expected="special tokens of this tokenizer",
                remedy="write the template with them, as the model was trained; or name the model that it is for",
            )
        first, rest = words.split(QUERY_PLACE)
        between, last = rest.split(DOCUMENT_PLACE)
        what, remedy = f"pair_template {words!r}", "put a line break or a special token around the texts in it"
        document = take_apart(tokenizer, between, last, what=what, remedy=remedy, trails=False)
        query = take_apart(tokenizer, first, document.fixed, what=what, remedy=remedy)
        runs = (query.before, query.behind, document.behind)
        found = replace(
            self,
            _pair=tuple(_Special(ids, (0,) * len(ids)) for ids in runs),  # type: ignore[arg-type]
            _pair_types=(0, 0),
            queries=query.wording,
            documents=document.wording,
        )
        for texts in _PROBED_PAIRS:
            whole = tokenizer(
                first + texts[0] + between + texts[1] + last, add_special_tokens=False, truncation=False, verbose=False
            )["input_ids"]
            (ours,), (theirs,) = (
                wording.token_ids(tokenizer, [text])
                for wording, text in zip((query.wording, document.wording), texts, strict=True)
            )
            if list(found.pair(ours, theirs, len(whole) + len(ours)).ids) != list(whole):
                raise ModelError(
                    f"the tokenizer {type(tokenizer).__name__} makes other tokens of {what} than of its parts",
                    expected="a line break or a special token around the texts in it",
                    remedy=remedy,
                )
        return found

    @property
    def num_special_single(self) -> int:
        """Special tokens around one text, those of a prompt included."""
        return sum(map(len, self._single))

    @property
    def num_special_pair(self) -> int:
        """Special tokens around and between two texts, or words that stand there.

        Raises:
            ModelError: The tokenizer has no form of a pair.
        """
        return sum(map(len, self._of_pair))

    def single(self, ids: TokenIds, max_length: int) -> Input:
        """Build the input of one text.

        Args:
            ids: Token ids without special tokens; the end is cut where they do not fit. An array is much faster than
                a list, and gives an input of arrays.
            max_length: Tokens of the input at most, special tokens included.

        Raises:
            ModelError: `max_length` leaves no room for a token.
        """
        self._require_room(max_length, self.num_special_single, texts=1)
        kept = ids[: max_length - self.num_special_single]
        if isinstance(kept, np.ndarray) and self._is_one_segment:
            prefix, suffix = self._single
            whole = np.concatenate((prefix.ids_array, kept, suffix.ids_array), dtype=np.int64)
            return Input(whole, _segment(self._single_type, len(whole)))
        return _joined(self._single, ((kept, self._single_type),))

    def pair(self, ids_a: TokenIds, ids_b: TokenIds, max_length: int) -> Input:
        """Build the input of a query and a document.

        Only the document is cut, down to one token at the least; a query that leaves no room for that token is cut
        too (AR2's released code never cuts queries, and so lets a long one push the document out).

        Args:
            ids_a: Token ids of the query, without special tokens.
            ids_b: Token ids of the document, without special tokens. Where one of the two is an array, the input is
                made of arrays, which is much faster.
            max_length: Tokens of the input at most, special tokens included.

        Raises:
            ModelError: `max_length` leaves no room for a token of each, or the tokenizer has no form of a pair.
        """
        self._require_room(max_length, self.num_special_pair, texts=2)
        room = max_length - self.num_special_pair
        kept_a = ids_a[: room - min(1, len(ids_b))]
        kept_b = ids_b[: room - len(kept_a)]
        type_a, type_b = self._pair_types
        return _joined(self._of_pair, ((kept_a, type_a), (kept_b, type_b)))

    def pad(self, inputs: Sequence[Input], pad_to_multiple_of: int = 8) -> dict[str, Tensor]:
        """Fill inputs on the right to one length and stack them.

        Args:
            inputs: At least one.
            pad_to_multiple_of: L is rounded up to a multiple of this, in which GPUs compute fastest; 1 for none.

        Returns:
            `input_ids` [N, L], `attention_mask` [N, L] and, where the model has them, `token_type_ids` [N, L], int64.
        """
        lengths_N = np.fromiter((len(one.ids) for one in inputs), np.int64, len(inputs))
        length = -(-int(lengths_N.max()) // pad_to_multiple_of) * pad_to_multiple_of
        real_NL = np.arange(length) < lengths_N[:, None]
        batch = {
            "input_ids": _filled(real_NL, [one.ids for one in inputs], self.pad_id),
            "attention_mask": torch.from_numpy(real_NL.astype(np.int64)),
        }
        if self.has_type_ids:
            batch["token_type_ids"] = _filled(real_NL, [one.type_ids for one in inputs], _IGNORED_TYPE)
        return batch

    def pack(self, inputs: Sequence[Input], first_position: int) -> PackedBatch:
        """Lay inputs end to end, without padding.

        Args:
            inputs: At least one.
            first_position: Position of an input's first token, which depends on the model.
        """
        return pack(
            [one.ids for one in inputs], [one.type_ids for one in inputs] if self.has_type_ids else None, first_position
        )

    @property
    def _of_pair(self) -> tuple[_Special, _Special, _Special]:
        if self._pair is None:
            raise ModelError(
                "the tokenizer puts no token between the two texts of a pair",
                expected="[prefix] A [middle] B [suffix] with a token in the middle",
                remedy="set the ranker's head to last, which ends both texts, or to yes_no, with a pair_template; or "
                "name a model whose tokenizer does so, such as a BERT, RoBERTa or ELECTRA",
            )
        return self._pair

    def _with_prompt(self, side: str) -> InputTemplate:
        ids = dict(self._prompts).get(side, ())
        prefix, suffix = self._single
        types = (*prefix.type_ids, *[self._single_type] * len(ids))
        return replace(self, _single=(_Special((*prefix.ids, *ids), types), suffix), _prompts=())

    def _require_room(self, max_length: int, num_special: int, texts: int) -> None:
        if max_length < num_special + texts:
            raise ModelError(
                f"max_length is {max_length}, of which {num_special} are special tokens or a prompt's",
                expected=f"at least {num_special + texts}",
                remedy="raise max_length (or query_max_length)",
            )


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches in the form that a model takes; `Retriever.collator` and `Ranker.collator` return one.

    Attributes:
        template: Of the model's tokenizer.
        packs: Lay inputs end to end; else they are padded.
        first_position: Position of an input's first token.
    """

    template: InputTemplate
    packs: bool
    first_position: int

    def __call__(self, inputs: Sequence[Input]) -> Batch:
        """Make a batch on the CPU of at least one input; what is computed from it is in the order of the inputs."""
        return self.template.pack(inputs, self.first_position) if self.packs else self.template.pad(inputs)


def count_tokens(*batches: Batch) -> int:
    """Count the tokens of batches, padding left out."""
    return sum(
        batch.num_tokens if isinstance(batch, PackedBatch) else int(batch["attention_mask"].sum()) for batch in batches
    )


@lru_cache(maxsize=4096)
def _segment(number: int, length: int) -> npt.NDArray[np.int64]:
    """Return the segments of that many tokens of one segment; shared, and so not to be written to."""
    segments = np.full(length, number)
    segments.flags.writeable = False
    return segments


def _joined(specials: Sequence[_Special], texts: Sequence[tuple[TokenIds, int]]) -> Input:
    """Put special tokens before, between and behind texts, each of which has one segment."""
    first, *others = specials
    if any(isinstance(ids, np.ndarray) for ids, _ in texts):
        id_parts: list[TokenIds] = [first.ids_array]
        type_parts: list[TokenIds] = [first.type_ids_array]
        for (ids, segment), special in zip(texts, others, strict=True):
            # A list may be empty, which numpy would take for floating point.
            id_parts += (ids if isinstance(ids, np.ndarray) else np.array(ids, np.int64), special.ids_array)
            type_parts += (np.full(len(ids), segment), special.type_ids_array)
        return Input(np.concatenate(id_parts, dtype=np.int64), np.concatenate(type_parts))
    all_ids, all_types = list(first.ids), list(first.type_ids)
    for (ids, segment), special in zip(texts, others, strict=True):
        all_ids += [*ids, *special.ids]
        all_types += [*[segment] * len(ids), *special.type_ids]
    return Input(all_ids, all_types)


def _filled(real_NL: npt.NDArray[np.bool_], rows: Sequence[TokenIds], filling: int) -> Tensor:
    values_NL = np.full(real_NL.shape, filling, dtype=np.int64)
    values_NL[real_NL] = np.concatenate(rows, dtype=np.int64)
    return torch.from_numpy(values_NL)


def special_runs(tokenizer: Any, num_texts: int) -> list[list[int]]:
    """Return what a tokenizer adds before, between and behind so many texts, each run maybe empty.

    Texts that nothing stands between count as one.
    """
    return [list(run.ids) for run in _segments(tokenizer, *[_SENTINEL] * num_texts)[::2]]


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

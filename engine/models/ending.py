"""Tokenizers that end a text with its end-of-text token, whose state is what a decoder makes of the whole text.

Some decoders' tokenizers put that token behind every text, most put nothing there. Such a tokenizer is given a
post-processor that does, so that what is saved with a model ends texts for whoever loads it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from engine.errors import ModelError
from engine.models.template import special_runs

_RUNS_OF_PAIR = 3
"""Before, between and behind its two texts."""


def with_end(tokenizer: Any, name: str, section: str) -> Any:
    """Return a tokenizer that puts a special token behind every text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        name: The model, as the recipe names it.
        section: The recipe's section, for remedies.

    Returns:
        The tokenizer itself where it does so already. Else a copy with its end-of-text token there, also behind a pair;
        where nothing stands between the two texts of a pair, what ends a text stands there, too.

    Raises:
        ModelError: It has no such token, or no tokenizer.json.
    """
    single, pair = special_runs(tokenizer, num_texts=1), special_runs(tokenizer, num_texts=2)
    if single[-1] and len(pair) == _RUNS_OF_PAIR:
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    end = single[-1] or [one for one in (tokenizer.eos_token_id,) if one is not None]
    if not end or backend is None:
        raise ModelError(
            f"{name} is pooled by the last token, but its tokenizer {type(tokenizer).__name__} puts none behind a text "
            + ("and has no tokenizer.json that could say so" if end else "and has no end-of-text token"),
            expected="an end-of-text token, whose state has seen the whole text",
            remedy="set tokenizer.eos_token, and save the tokenizer into a copy of the model's folder; or pool "
            f"otherwise, by {section}.pooling or {section}.head",
        )
    before = single[0]
    middle = pair[1] if len(pair) == _RUNS_OF_PAIR else end

    def words(*parts: list[int] | str) -> list[str]:
        return [
            word
            for part in parts
            for word in ([part] if isinstance(part, str) else tokenizer.convert_ids_to_tokens(part))
        ]

    ids = {*before, *middle, *end}
    copied = Tokenizer.from_str(backend.to_str())
    copied.post_processor = processors.TemplateProcessing(
        single=words(before, "$A", end),
        pair=words(before, "$A", middle, "$B", end),
        special_tokens=[(tokenizer.convert_ids_to_tokens(one), one) for one in sorted(ids)],
    )
    ending = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=copied,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )
    ending.chat_template = tokenizer.chat_template
    return ending

"""What a sentence-transformers folder says of a CrossEncoder that asks a language model.

Its LogitScore names two ids of the vocabulary, and a chat template puts a pair into words. Both are read as the words
that a recipe has for them, so that the two can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from engine.errors import ModelError
from engine.models.failures import loading
from shards.files import read_json

_SETTINGS = "config_sentence_transformers.json"


def read_logit_score(folder: Path, transformer: str, score: str) -> tuple[tuple[str, str], str | None]:
    """Read the two answers, and the words of a pair.

    Args:
        folder: The model's.
        transformer: The language model's folder, below it.
        score: The LogitScore's.

    Returns:
        The words for yes and for no; and those of a pair with `{query}` and `{document}` in the texts' places, None
        where the folder has no template for pairs.

    Raises:
        ModelError: It has one answer alone.
        ArtifactError: Its settings are missing or damaged.
    """
    found = read_json(folder / score / "config.json", "the settings of a LogitScore")
    ids = found.get("true_token_id"), found.get("false_token_id")
    if None in ids:
        raise ModelError(
            f"{folder} scores by the logit of one token ({ids[0]})",
            expected="the logit of yes less that of no",
            remedy="name another model",
        )
    with loading(str(folder), "tokenizer", folder / transformer, "ranker"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / transformer, trust_remote_code=False)
    yes, no = tokenizer.convert_ids_to_tokens(list(ids))
    return (yes, no), _words_of_pair(folder, tokenizer)


def _words_of_pair(folder: Path, tokenizer: Any) -> str | None:
    """Put the places of two texts through the chat template, behind the prompt that texts get by default."""
    settings = read_json(folder / _SETTINGS, "the model's settings") if (folder / _SETTINGS).is_file() else {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    messages = [{"role": "system", "content": prompt}] if prompt else []
    messages += [{"role": "query", "content": "{query}"}, {"role": "document", "content": "{document}"}]
    if tokenizer.chat_template is None:
        return None
    try:
        words = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):
        return None
    return words if words.count("{query}") == words.count("{document}") == 1 else None

"""The export of a ranker that asks a language model: a CrossEncoder of a Transformer and a LogitScore.

The folder is a causal language model as transformers reads it. How a pair is put into words is a chat template with the
roles query and document, by which sentence-transformers 6 makes the very tokens that the ranker was trained on.

Shapes: N pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from engine.models.export_parts import write_modules
from engine.models.loading import load_tokenizer
from engine.models.projection import IDENTITY
from engine.models.sentence_transformers import SETTINGS_FILE
from engine.models.sides import limit_tokenizer
from engine.models.template import DOCUMENT_PLACE, QUERY_PLACE
from engine.models.yes_no import find_answers
from shards.files import read_json, write_json

_SCORE = "1_LogitScore"
_CHAT_TEMPLATE = "chat_template.jinja"
_LIBRARY = "sentence_transformers."


def describe_yes_no(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write beside a language model what a CrossEncoder reads.

    Args:
        folder: Holds the model and its tokenizer.
        metadata: The ranker's, with its `answers`, `pair_template` and `max_length`.
    """
    forward = {"method": "forward", "method_output_name": "logits"}
    settings = {
        "max_seq_length": metadata["max_length"],
        "do_lower_case": False,
        "transformer_task": "text-generation",
        "modality_config": {"text": forward, "message": {**forward, "format": "flat"}},
        "module_output_name": "causal_logits",
    }
    write_json(folder / "sentence_bert_config.json", settings)
    limit_tokenizer(folder, metadata["max_length"])
    told = folder / "tokenizer_config.json"
    kept = {key: value for key, value in read_json(told, "the tokenizer").items() if key != "chat_template"}
    write_json(told, kept)
    (folder / _CHAT_TEMPLATE).write_text(_chat_template(metadata["pair_template"]), encoding="utf-8")
    yes, no = find_answers(load_tokenizer(str(folder)), metadata["answers"], "ranker").ids
    (folder / _SCORE).mkdir()
    score = {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"}
    write_json(folder / _SCORE / "config.json", score)
    chain = (
        ("", f"{_LIBRARY}base.modules.transformer.Transformer"),
        (_SCORE, f"{_LIBRARY}cross_encoder.modules.logit_score.LogitScore"),
    )
    write_modules(folder, chain)
    versions = {"__version__": {"sentence_transformers": "6.0.0"}, "model_type": "CrossEncoder"}
    write_json(folder / SETTINGS_FILE, {**versions, "activation_fn": IDENTITY, "prompts": {}})


def yes_no_scores(folder: Path, batch: Mapping[str, Tensor], words: list[str]) -> Tensor:
    """Score pairs with transformers alone, as the README of an export says.

    Args:
        folder: The export.
        batch: Inputs of N pairs, padded on the right.
        words: For yes and for no.

    Returns:
        Scores [N].
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words)
    auto_class: Any = transformers.AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, trust_remote_code=False).eval()
    logits_NLV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last_N = batch["attention_mask"].sum(1) - 1
    logits_NV = logits_NLV[range(len(last_N)), last_N]
    scores_N: Tensor = logits_NV[:, yes] - logits_NV[:, no]
    return scores_N


def _chat_template(words: str) -> str:
    """Write the words of a pair as a template of messages with the roles query and document."""
    first, rest = words.split(QUERY_PLACE)
    between, last = rest.split(DOCUMENT_PLACE)
    parts = [json.dumps(part, ensure_ascii=False) for part in (first, between, last)]

    def content(role: str) -> str:
        return f'(messages | selectattr("role", "eq", "{role}") | first)["content"]'

    return f"{{{{- {parts[0]} + {content('query')} + {parts[1]} + {content('document')} + {parts[2]} -}}}}"

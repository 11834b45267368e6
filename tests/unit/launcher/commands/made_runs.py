"""Run folders as finished runs leave them, with made-up rankings: what commands on finished runs read, and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.config.file import dump_config, load_config
from engine.config.metric_names import ENTROPY
from engine.config.recipe import Config
from engine.data.corpus import sample_queries
from engine.data.trec import write_trec
from engine.evaluation.measures import query_entropies, score_run
from engine.evaluation.summary import Row, add_row
from engine.evaluation.systems import RANKER, System, every_system, fused_system, trained_systems
from engine.reliability.starts import Start, record_start
from shards.formats import open_dataset
from shards.made.generated import generate_dataset
from shards.records import Dataset
from tests.distributed.processes import ROOT

TINY = ROOT / "configs" / "tiny.yaml"
DEPTH = 20


def made_data(folder: Path) -> Dataset:
    """A small data folder in the BEIR layout."""
    generate_dataset(folder, num_documents=80, num_queries=80, seed=1)
    return open_dataset(folder)


class MadeRun:
    """A finished run of the smallest recipe: retrievers find a positive the sooner, the better they are.

    Args:
        folder: Of the run.
        dataset: Its data.
        words: Overrides of the recipe.
        better: Added to the score of every positive, besides what later iterations gain.
        on: Seed of the noise; the run's own is `run.seed` among the words.
    """

    def __init__(self, folder: Path, dataset: Dataset, *words: str, better: float = 0.0, on: int | None = None) -> None:
        given = [f"run.path={folder}", f"data.path={dataset.path}", "evaluation.max_dev_queries=null", *words]
        self.folder, self.dataset = folder, dataset
        self.config: Config = load_config(TINY, given)
        self.better, self.noise = better, np.random.default_rng(self.config.run.seed if on is None else on)
        self.curve: list[dict[str, object]] = []
        (folder / "results").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(self.config))
        record_start(folder, Start.now("0", 2, "store", []))
        last = self.config.timetable.iterations
        for system in trained_systems(self.config, range(last + 1)):
            self.record(system, "dev", gain=0.3 * (system.iteration or 0))
        self.record(fused_system(self.config, taken=last), "dev", gain=1.0)
        for system in every_system(self.config, taken=last):
            self.record(system, "test")
        self.finish()

    def record(
        self, system: System, split: str, *, gain: float = 0.0, limit: int | None = None, file: str = ""
    ) -> dict[str, float]:
        """Write a ranking of at most so many queries, and its row; under a file name that is given, or its own."""
        usual = self.config.evaluation.most_queries(split)
        limit = limit or usual
        queries = sample_queries(self.dataset, split, limit, self.config.run.seed)
        docids = [document.id for document in self.dataset.documents()]
        ranking: dict[str, dict[str, float]] = {}
        for query in queries:
            scores = self.noise.normal(size=len(docids))
            positives = set(self.dataset.positives(split, query.id))
            for place, docid in enumerate(docids):
                if docid in positives:
                    scores[place] += 1.5 + gain + self.better + (system.kind == RANKER)
            best = np.argsort(-scores)[:DEPTH]
            ranking[query.id] = {docids[place]: float(scores[place]) for place in best}
        file = file or system.run_file_name(split, limit if limit != usual else None)
        write_trec(self.folder / "results" / file, ranking, tag=system.name)
        qrels = {qid: self.dataset.qrels[split][qid] for qid in ranking}
        metrics = score_run(ranking, qrels, ("R@1", "R@5", "MRR@10"))
        row = Row.of(
            *(system, split, metrics),
            num_queries=len(ranking),
            split_queries=len(self.dataset.qrels[split]),
            rerank_depth=10,
        )
        add_row(self.folder / "results" / "summary.json", row)
        if system.weights and not system.over:
            own = query_entropies(ranking, self.config.models[system.weights.model].score_scale)
            self.curve.append({"split": split, "system": system.name, ENTROPY: sum(own.values()) / len(own)})
        return metrics

    def finish(self, stages: Sequence[str] = (), *, last: str = "export") -> None:
        """Write the ledger: shards, every visit of training, and what refreshes take."""
        shards = {"documents": 80, "shards": 1, "tokens": {}, "reused_shards": 0, "prepared": None}
        done = {"shards": {"seconds": 1.0, "result": {**shards, "dataset_sha256": self.dataset.fingerprint}}}
        lines = []
        for number, visit in enumerate(self.config.timetable.visits):
            done[visit.stage] = {"seconds": 10.0 + number, "result": {"steps": visit.phase.steps, "loss": 1.0}}
            loss, peak = (f"{visit.phase.name}/{name}" for name in ("loss", "peak_gib"))
            lines += [
                {"time": 1000.0 * number + 0.25 * step, "stage": visit.stage, "step": step, loss: 1.0, peak: step / 4}
                for step in (2, 4, 6)
            ]
        for iteration in range(self.config.timetable.iterations + 1):
            encoded = {"encoded": 80, "documents_per_second": 40.0}
            done[f"encode/{iteration:03d}"] = {"seconds": 2.0, "result": encoded}
            done[f"index/{iteration:03d}"] = {"seconds": 3.0, "result": {"milliseconds_per_query": 0.5 + iteration}}
            done[f"candidates/{iteration:03d}"] = {"seconds": 4.0, "result": {"queries": 60}}
            done[f"evaluate/{iteration}"] = {"seconds": 5.0, "result": {"scores": []}}
        done |= {name: {"seconds": 1.0, "result": None} for name in (*stages, last)}  # type: ignore[dict-item]
        (self.folder / "ledger.json").write_text(json.dumps({"stages": done}))
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

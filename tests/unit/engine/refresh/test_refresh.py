"""The refresh keeps the indexes that are still needed, and refuses an index that the corpus cannot fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config.bm25 import Bm25Config
from engine.data.corpus import Data, TrainingQueries
from engine.errors import ConfigError
from engine.index.plan import plan_index
from engine.refresh.refresh import candidates_of, drop_old_indexes
from engine.results import Measured, Score
from engine.run import Run, RunFolder
from shards.records import Document, Query

Open = Callable[..., Run]


def indexes_after(run: Run, iteration: int) -> list[str]:
    for name in ("zero-shot", *(f"{number:03d}" for number in range(iteration + 1))):
        run.folder.index(name).mkdir(parents=True, exist_ok=True)
        (run.folder.index(name) / "index.faiss").write_text("an index")
    drop_old_indexes(run, run.folder, iteration)
    return sorted(path.name for path in run.folder.index("000").parent.iterdir())


def test_old_indexes_go_but_those_of_the_last_table_stay(open_run: Open) -> None:
    assert indexes_after(open_run(), 5) == ["000", "004", "005", "zero-shot"]


def test_more_are_kept_where_asked_for(open_run: Open) -> None:
    assert indexes_after(open_run("run.keep_indexes=3"), 5) == ["000", "003", "004", "005", "zero-shot"]


def test_the_index_of_the_iteration_that_would_be_taken_stays(open_run: Open) -> None:
    """Symptom: the best iteration is exported, and nobody can search with it: its index went two iterations later."""
    for words, kept in (
        (["evaluation.iteration=best"], ["000", "002", "004", "005", "zero-shot"]),
        ([], ["000", "004", "005", "zero-shot"]),
    ):
        run = open_run(*words, "run.force_resume=true")
        for iteration, value in enumerate((0.3, 0.4, 0.6, 0.5)):
            score = Score("G", "retriever", "retriever", iteration, {"MRR@10": value})
            run.once(f"evaluate/{iteration}", lambda stage, score=score: asdict(Measured((score,))))
        assert indexes_after(run, 5) == kept


def test_nothing_goes_before_there_are_too_many(open_run: Open) -> None:
    assert indexes_after(open_run(), 1) == ["000", "001", "zero-shot"]


def test_without_an_index_nothing_goes(open_run: Open) -> None:
    """Symptom: BM25 was measured on another corpus, and the table was a traceback."""
    run = open_run()
    drop_old_indexes(run, RunFolder(run.folder.path / "evaluations" / "other"), 1)


def test_candidates_by_other_settings_of_bm25_are_mined_anew(open_run: Open, tmp_path: Path) -> None:
    """Symptom guarded against: G0 warms up on the hits of another language, or is stopped by them at every start."""
    texts = ["die Häuser", "ein Haus", "ein Hund", "the cat"]
    shards = SimpleNamespace(
        manifest=SimpleNamespace(sha256="c" * 64, shards=[SimpleNamespace(num_documents=len(texts))]),
        folder=tmp_path / "shards",
        num_documents=len(texts),
        documents=lambda _: (Document(f"d{row}", "", text) for row, text in enumerate(texts)),
    )
    train = TrainingQueries([Query("q", "Häuser")], [np.array([0])], {"retriever": [[1]]})
    data = Data(None, shards, {}, train)  # type: ignore[arg-type]
    run = open_run()
    drawn = candidates_of(run, data, "bm25")
    assert drawn.counts["drawn"] == 1, "no stem of the query is in another document"
    run.config = run.config.model_copy(update={"bm25": Bm25Config(language="de")})
    assert candidates_of(run, data, "bm25").row("q").tolist() == [1]
    before = (run.folder.candidates("bm25") / "candidates.json").stat().st_mtime_ns
    assert candidates_of(run, data, "bm25").row("q").tolist() == [1]
    assert (run.folder.candidates("bm25") / "candidates.json").stat().st_mtime_ns == before


def test_indexes_that_are_newer_than_the_last_finished_iteration_stay(open_run: Open) -> None:
    """An evaluation between two starts of a run must not cost the run what it goes on with."""
    run = open_run()
    run.folder.index("007").mkdir(parents=True)
    assert indexes_after(run, 5) == ["000", "004", "005", "007", "zero-shot"]


def test_the_plan_follows_the_configuration(open_run: Open) -> None:
    plan = plan_index(open_run().config.index, num_documents=300, dimension=32)
    assert (plan.factory, plan.num_lists, plan.nprobe, plan.refine_factor) == ("IVF8,PQ8x4", 8, 8, 8)
    assert plan.num_iterations == 5


def test_a_corpus_smaller_than_the_lists_is_refused(open_run: Open) -> None:
    with pytest.raises(ConfigError, match=r"8 inverted lists, but 7 embeddings.*index\.factory=Flat"):
        plan_index(open_run().config.index, num_documents=7, dimension=32)

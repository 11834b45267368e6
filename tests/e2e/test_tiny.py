"""The smallest recipe through the real launchers: what a run leaves behind, and that no way of starting it matters."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config.file import load_config
from engine.metrics.board import NOT_TAGS, is_measured_once
from tests.e2e.conftest import Finished, finished
from tests.e2e.made import ledger_of, losses_of, measured, metrics_of, ranking_of, summary_of, weights_of
from tests.e2e.starts import ROOT, TINY, Zygote, mpirun_command

METRICS = ("R@1", "R@5", "R@10", "R@20", "R@50", "R@100", "R@1000", "MRR@10", "nDCG@10")
TRAINING = {
    "warmup_retriever": ["warmup_retriever"],
    "warmup_ranker": ["warmup_ranker"],
    "retriever": ["retriever/1", "retriever/2"],
    "ranker": ["ranker/1", "ranker/2"],
}


def stages_in_which(folder: Path, name: str) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in metrics_of(folder) if name in line))


# --- the run folder --------------------------------------------------------------------------------------------------


def test_the_stages_are_those_of_the_paper_in_its_order(tiny: Finished) -> None:
    lines = [name for name in ledger_of(tiny.folder) if name.split("/")[0] not in {"encode", "bm25", "generate"}]
    assert lines == [
        *("shards", "index/zero-shot", "evaluate/yardsticks", "candidates/bm25"),
        *("warmup_retriever", "index/000", "candidates/000", "warmup_ranker", "evaluate/0"),
        *("retriever/1", "index/001", "candidates/001", "staleness/1", "ranker/1", "evaluate/1"),
        *("retriever/2", "index/002", "candidates/002", "staleness/2", "ranker/2", "evaluate/2"),
        *("take", "fusion/dev", "evaluate/test", "fusion/test", "export"),
    ]


def test_the_resolved_config_reads_back_to_the_same_run(tiny: Finished) -> None:
    words = [f"run.path={tiny.folder}", "run.device=cpu"]
    assert load_config(tiny.folder / "config.yaml") == load_config(TINY, words)
    recorded = yaml.safe_load((tiny.folder / "config.yaml").read_text())
    assert recorded["ar2"]["ranker"]["optim"]["betas"] == [0.9, 0.999], "defaults are written too"


def test_each_start_is_recorded_with_versions_and_command_line(tiny: Finished) -> None:
    (start,) = yaml.safe_load((tiny.folder / "starts.json").read_text())
    assert start["argv"][0] == "launcher/run.py"
    assert f"run.path={tiny.folder}" in start["argv"]
    assert (start["num_ranks"], start["coordinator"]) == (2, "store")
    versions = start["versions"]
    assert all(versions[name] for name in ("torch", "deepspeed", "transformers", "faiss", "webdataset", "mpi4py"))
    assert bool(start["git"]) == (ROOT / ".git").exists()


@pytest.mark.parametrize("tag", TRAINING)
@pytest.mark.parametrize(
    "name", ["loss", "accuracy", "lr", "grad_norm", "tokens_per_second", "peak_gib", "skipped_steps"]
)
def test_training_is_measured(tiny: Finished, tag: str, name: str) -> None:
    assert stages_in_which(tiny.folder, f"{tag}/{name}") == TRAINING[tag]
    values = [line[f"{tag}/{name}"] for line in metrics_of(tiny.folder) if f"{tag}/{name}" in line]
    assert all(math.isfinite(value) for value in values)
    if name in {"grad_norm", "tokens_per_second", "peak_gib", "lr"}:
        assert min(values) > 0


def test_the_retrievers_loss_is_logged_by_part(tiny: Finished) -> None:
    lines = [line for line in metrics_of(tiny.folder) if "retriever/loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12], "the steps count on over the iterations"
    for line in lines:
        parts = 0.3 * line["retriever/adversarial"] + line["retriever/distillation"] + line["retriever/label"]
        assert line["retriever/loss"] == pytest.approx(parts, abs=1e-5)
        assert line["retriever/adversarial"] < 0
        assert 0 < line["retriever/lead"] == line["retriever/taught"] < 1, "untrained, neither model leads far"
        assert 0 <= line["retriever/ranker_leads"] <= 1
        assert line["retriever/reward"] < 0
        assert 0 < line["retriever/entropy"] <= math.log(5) + 1e-6, "five documents a query"
        assert 0 <= line["retriever/ranker_accuracy"] <= 1


def test_learning_rates_carry_on_over_the_iterations(tiny: Finished) -> None:
    for tag in ("retriever", "ranker"):
        rates = [line[f"{tag}/lr"] for line in metrics_of(tiny.folder) if f"{tag}/lr" in line]
        assert rates == sorted(rates, reverse=True)
        assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("name", ["index/recall", "candidates/removed_positives", "candidates/removed_answers"])
def test_refreshes_are_measured(tiny: Finished, name: str) -> None:
    stages = stages_in_which(tiny.folder, name)
    kind = name.split("/")[0]
    assert [stage for stage in stages if stage[-3:].isdigit()] == [f"{kind}/000", f"{kind}/001", f"{kind}/002"]
    values = [line[name] for line in metrics_of(tiny.folder) if name in line]
    assert all(0.3 <= value <= 1 for value in values) if kind == "index" else sum(values) > 0


def test_indexes_after_the_first_begin_from_the_last(tiny: Finished) -> None:
    begun = {name: stage["result"]["warm_start"] for name, stage in ledger_of(tiny.folder).items() if "index/" in name}
    assert begun == {"index/zero-shot": False, "index/000": False, "index/001": True, "index/002": True}
    assert all(line["index/train_iterations"] <= 5 for line in metrics_of(tiny.folder) if "index/recall" in line)


def test_times_of_all_phases_are_measured(tiny: Finished) -> None:
    timed = {name for line in metrics_of(tiny.folder) for name in line if name.startswith("seconds/")}
    phases = {stage.split("/")[0] for stage in ledger_of(tiny.folder)}
    assert timed == {f"seconds/{phase}" for phase in phases}


def test_dev_is_measured_at_every_iteration_and_test_only_at_the_end(tiny: Finished) -> None:
    for name in ("dev/retriever/MRR@10", "dev/retriever/entropy@15", "dev/ranker/nDCG@10"):
        lines = [line for line in metrics_of(tiny.folder) if name in line]
        assert [(line["stage"], line["step"]) for line in lines] == [(f"evaluate/{t}", t) for t in range(3)], name
    assert stages_in_which(tiny.folder, "dev/BM25/MRR@10") == ["evaluate/yardsticks"]
    on_test = {line["stage"] for line in metrics_of(tiny.folder) if any(name.startswith("test/") for name in line)}
    assert on_test == {"evaluate/test", "fusion/test"}


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(tiny: Finished) -> None:
    board = EventAccumulator(str(tiny.folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    logged: dict[str, list[tuple[int, float]]] = {}
    for line in metrics_of(tiny.folder):
        for name, value in line.items():
            if name not in {"time", "stage", "step"}:
                logged.setdefault(name, []).append((line["step"], value))
    once = {
        name
        for line in metrics_of(tiny.folder)
        for name in line.keys() - NOT_TAGS
        if is_measured_once(name, line["stage"])
    }
    assert set(board.Tags()["scalars"]) == set(logged) - once
    assert {"test/ranker/MRR@10", "dev/BM25/MRR@10", "seconds/warmup_ranker"} <= once
    assert not {"dev/ranker/MRR@10", "retriever/loss", "seconds/retriever", "index/recall"} & once
    logged = {name: points for name, points in logged.items() if name not in once}
    for name, points in logged.items():
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in points], name
        assert [value for _, value in shown] == pytest.approx([value for _, value in points], rel=1e-6), name
    tables = {
        tag.split("/text_summary")[0]: board.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in board.Tags()["tensors"]
        if "text_summary" in tag
    }
    rows = summary_of(tiny.folder)
    (row,) = (row for row in rows if (row["split"], row["system"], row["over"]) == ("test", "D", "G"))
    assert f"{row['metrics']['MRR@10']:.4g} |" in tables["measured once/evaluate/test"]
    assert "| dev: BM25 |" in tables["measured once/evaluate/yardsticks"]
    assert "| seconds/warmup_ranker |" in tables["measured once/seconds"]
    assert "    num_negatives: 4" in tables["settings"]
    texts = [tag for tag in board.Tags()["tensors"] if tag.startswith("examples/")]
    assert len(texts) == 3
    events = board.Tensors(texts[0])
    assert [event.step for event in events] == [0, 1, 2]
    text = events[-1].tensor_proto.string_val[0].decode()
    assert "| G | D | document |" in text
    assert text.count("| - |") >= 4, text


def test_the_summary_has_every_system_with_values_from_0_to_1(tiny: Finished) -> None:
    rows = summary_of(tiny.folder)
    found = sorted((row["split"], row["iteration"] or 0, row["system"], row["retriever"]) for row in rows)
    assert found == sorted(
        [
            *((split, 0, name, name) for split in ("dev", "test") for name in ("BM25", "zero-shot", "G0")),
            *((split, 0, "D0", "G0") for split in ("dev", "test")),
            *(("dev", iteration, name, "G") for iteration in (1, 2) for name in ("G", "D")),
            *(("test", 2, name, "G") for name in ("G", "D")),
            *((split, 2, name, "hybrid") for split in ("dev", "test") for name in ("hybrid", "D", "fused")),
        ]
    )
    for row in rows:
        named = {"system", "retriever", "iteration", "split", "metrics", "kind", "over", "over_iteration"}
        assert set(row) == named | {"rerank_depth", "num_queries", "split_queries", "relevance_threshold", "headline"}
        assert (row["num_queries"], row["split_queries"]) == (16, 90), "a sample of the split"
        assert (row["iteration"] is None) == (row["system"] in {"BM25", "zero-shot"})
        metrics = row["metrics"]
        assert set(METRICS) <= set(metrics)
        assert all(0 <= value <= 1 for value in metrics.values())
        assert metrics["R@1"] <= metrics["R@5"] <= metrics["R@20"] <= metrics["R@100"]
        assert metrics["A@1"] <= metrics["A@100"], "half of the queries have answers"
    compared = {(row["split"], row["system"], row["over"]): row["headline"]["to"] for row in rows}
    for split in ("dev", "test"):
        expected = {
            **{("G0", None): "zero-shot", ("D0", "G0"): "G0", ("G", None): "G0", ("D", "G"): "G"},
            **{("hybrid", None): "G", ("D", "hybrid"): "D over G", ("fused", "hybrid"): "D over G"},
            **{("BM25", None): None, ("zero-shot", None): None},
        }
        own = {row: to for (of, *row_), to in compared.items() if of == split for row in [tuple(row_)]}
        assert own == expected, "each row is compared with what it builds on"
    at_hundred = {(row["split"], row["iteration"], row["system"], row["over"]): row["metrics"]["R@100"] for row in rows}
    assert at_hundred["dev", 2, "D", "G"] == at_hundred["dev", 2, "G", None], "a ranker only re-orders"
    for ordered in ("D", "fused"):
        assert at_hundred["test", 2, ordered, "hybrid"] == at_hundred["test", 2, "hybrid", None], (
            "and so does a mixture"
        )
    assert at_hundred["dev", None, "BM25", None] > 0.9, "the names in a query are in its document"


def test_rankings_are_trec_files_that_give_the_summarys_numbers(tiny: Finished) -> None:
    files = {path.name for path in (tiny.folder / "results").glob("*.trec")}
    systems = ("test-BM25", "test-zero-shot", "test-G-002", "test-D-002", "dev-D0-000")
    assert {f"{system}.trec" for system in systems} <= files
    relevant: dict[str, set[str]] = {}
    for line in (tiny.folder / "data" / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        qid, docid, grade = line.split("\t")
        if int(grade) > 0:
            relevant.setdefault(qid, set()).add(docid)
    for name, system, iteration in (("test-BM25", "BM25", None), ("test-D-002", "D", 2)):
        reciprocal: dict[str, float] = {}
        for line in (tiny.folder / "results" / f"{name}.trec").read_text().splitlines():
            qid, q0, docid, rank, score, _ = line.split()
            assert (q0, math.isfinite(float(score))) == ("Q0", True)
            reciprocal.setdefault(qid, 0.0)
            if docid in relevant[qid] and int(rank) <= 10:
                reciprocal[qid] = max(reciprocal[qid], 1 / int(rank))
        (row,) = (
            row
            for row in summary_of(tiny.folder)
            if (row["system"], row["iteration"], row["split"]) == (system, iteration, "test")
            and row["over"] != "hybrid"
        )
        assert len(reciprocal) == 16
        assert sum(reciprocal.values()) / 16 == pytest.approx(row["metrics"]["MRR@10"], abs=1e-9)


def test_a_copy_of_the_exported_function_gives_the_order_of_the_engine(tiny: Finished, tmp_path: Path) -> None:
    """From the rankings alone: BM25's has every document that shares a word with the query, D's all that are fused.

    G's does not have all that BM25 has found, so a query is looked at where it has, or where G has no weight.
    """
    shutil.copytree(tiny.folder / "export" / "fusion", tmp_path / "fusion")
    copied: Any = runpy.run_path(str(tmp_path / "fusion" / "fuse.py"))
    names = {"G": "G-002", "D": "D-002-over-hybrid-002", "BM25": "BM25", "hybrid": "hybrid-002", "fused": "fused-002"}
    rankings = {name: ranking_of(tiny.folder / "results" / f"test-{file}.trec") for name, file in names.items()}
    fitted = copied["read_weights"](tmp_path / "fusion" / "fusion.json")
    assert list(fitted) == ["G", "D", "BM25"]
    record = json.loads((tmp_path / "fusion" / "fusion.json").read_text())
    assert (record["candidates"], record["rerank_depth"]) == ("hybrid", 10)
    compared = 0
    for qid, found in rankings["G"].items():
        lists = [[docid for docid, _ in own] for own in (found, rankings["BM25"][qid])]
        docids = [docid for docid, _ in rankings["hybrid"][qid]]
        assert copied["interleave"](lists, len(docids)) == docids
        of = {name: dict(rankings[name][qid]) for name in fitted}
        if fitted["G"] and not set(docids[:10]) <= of["G"].keys():
            continue
        scores = {name: [of[name].get(docid, 0.0) for docid in docids[:10]] for name in fitted if fitted[name]}
        order = [docids[place] for place in copied["fuse"](scores, fitted)]
        assert [docid for docid, _ in rankings["fused"][qid]] == [*order, *docids[10:]]
        compared += 1
    assert compared


def test_the_terminal_shows_stages_the_coordinator_and_the_table(tiny: Finished) -> None:
    shown = tiny.ended.out + tiny.ended.err
    assert "coordinator: a store of torch.distributed" in shown
    assert "2 ranks on 1 host" in shown
    assert "\r" not in shown, "into a pipe there are lines, not bars"
    assert "%|" not in shown
    for rank in (0, 1):
        log = (tiny.folder / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "evaluate/test" in log, "each rank's own lines in full"
    own, _, further = shown[shown.index("results (") :].partition("to go on with:\n")
    assert re.findall(r"\n(dev|test), 16 of 90 queries +iteration ", own) == ["dev", "test"]
    tables = dict(zip(("dev", "test"), own.split("\n\n")[1:3], strict=True))
    for row in summary_of(tiny.folder):
        assert any(
            line.split()[:1] == [row["system"]] and f"{row['metrics']['MRR@10']:.3f}" in line
            for line in tables[row["split"]].splitlines()
        ), row
    assert f"search {tiny.folder} " in further
    assert f"tensorboard --logdir {tiny.folder}/tensorboard" in further


# --- the exports, loaded by other libraries --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tiny: Finished) -> tuple[list[str], list[str], list[str]]:
    """Queries, documents as the template joins them, and the documents' ids."""
    import json

    queries = [json.loads(line) for line in (tiny.folder / "data" / "queries.jsonl").read_text().splitlines()[:4]]
    documents = [json.loads(line) for line in (tiny.folder / "data" / "corpus.jsonl").read_text().splitlines()[:6]]
    joined = [f"{document['title']} {document['text']}" for document in documents]
    return [query["text"] for query in queries], joined, [document["_id"] for document in documents]


def our_scores(tiny: Finished, queries: list[str], docids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both models' scores [queries, documents], by the code that serves a search."""
    from engine.config.timetable import WeightsOf
    from engine.evaluation.pairs import PairScorer
    from engine.retrievers.kinds import dense, open_searcher
    from launcher.commands.finished import data_of, open_run
    from shards.records import Query

    run = open_run(tiny.folder)
    data = data_of(run, 2)
    documents = [data.shards.index_of(docid) for docid in docids]
    asked = [Query(f"{number}", text) for number, text in enumerate(queries)]
    searcher = open_searcher(run, data, run.folder, dense(WeightsOf("retriever", 2)))
    hits = searcher.search(asked, data.shards.num_documents)
    retrieved = np.array(
        [
            [float(hits.scores_QK[row][hits.documents_QK[row] == document][0]) for document in documents]
            for row in range(len(asked))
        ]
    )
    scorer = PairScorer.open(run, data, "ranker", "002")
    ranked = np.array(scorer.score(asked, [documents] * len(asked)))
    return retrieved, ranked


def test_exports_give_our_own_scores_in_other_libraries(
    tiny: Finished, texts: tuple[list[str], list[str], list[str]]
) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    queries, documents, docids = texts
    retrieved, ranked = our_scores(tiny, queries, docids)
    retriever = SentenceTransformer(str(tiny.folder / "export" / "retriever"), device="cpu")
    theirs = retriever.similarity(retriever.encode_query(queries), retriever.encode_document(documents)).numpy()
    np.testing.assert_allclose(theirs, retrieved, rtol=1e-4, atol=1e-4)
    ranker = CrossEncoder(str(tiny.folder / "export" / "ranker"), device="cpu")
    pairs = [(query, document) for query in queries for document in documents]
    np.testing.assert_allclose(np.asarray(ranker.predict(pairs)).reshape(ranked.shape), ranked, rtol=1e-4, atol=1e-4)


def test_exports_load_in_transformers(tiny: Finished, texts: tuple[list[str], list[str], list[str]]) -> None:
    import torch
    import transformers

    queries, documents, docids = texts
    retrieved, ranked = our_scores(tiny, queries[:1], docids)
    folder = tiny.folder / "export"

    def embed(strings: list[str]) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "retriever")
        model = transformers.AutoModel.from_pretrained(folder / "retriever").eval()
        batch = tokenizer(strings, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][:, :, None].bool()
        return torch.where(mask, model(**batch).last_hidden_state, 0.0).sum(1) / mask.sum(1)

    with torch.inference_mode():
        theirs = (embed(queries[:1]) @ embed(documents).T).numpy()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ranker")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "ranker").eval()
        batch = tokenizer(
            queries[:1] * len(documents), documents, padding=True, truncation="only_second", return_tensors="pt"
        )
        logits = model(**batch).logits.view(1, -1).numpy()
    np.testing.assert_allclose(theirs, retrieved, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, ranked, rtol=1e-4, atol=1e-4)


# --- other ways to start the same recipe -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_mpi(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(mpirun_command(2), tmp_path_factory.mktemp("mpi") / "run")


def test_under_mpirun_mpi_coordinates_and_every_number_is_the_same(tiny: Finished, by_mpi: Finished) -> None:
    assert "coordinator: MPI" in by_mpi.ended.out + by_mpi.ended.err
    assert yaml.safe_load((by_mpi.folder / "starts.json").read_text())[0]["coordinator"] == "mpi"
    assert measured(by_mpi.folder) == measured(tiny.folder)
    assert summary_of(by_mpi.folder) == summary_of(tiny.folder)
    assert weights_of(by_mpi.folder) == weights_of(tiny.folder)


def test_one_rank_trains_the_same_as_two(tiny: Finished, alone: Finished) -> None:
    """Both see the same samples in the same order; only the order in which numbers are added differs.

    That moves weights in their last digits. In this recipe it changes no neighbour of any query, so that the losses
    stay together to the end; were a candidate to differ, they would part from there on by much more than this.
    """
    assert "coordinator: none needed" in alone.ended.err
    one, two = losses_of(alone.folder), losses_of(tiny.folder)
    assert list(one) == list(two)
    assert len(one) > 30
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)
    assert weights_of(alone.folder)["retriever/zero-shot"] == weights_of(tiny.folder)["retriever/zero-shot"]


def test_the_same_command_on_a_finished_folder_only_shows_the_table(
    zygote: Zygote, alone: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone.folder, folder)
    again = zygote.recipe(f"run.path={folder}").wait()
    assert again.code == 0, again.err
    assert measured(folder) == measured(alone.folder)
    assert weights_of(folder) == weights_of(alone.folder)
    assert "finished earlier, skipped" in again.err
    assert "%|" not in again.err, "nothing ran that would show a bar"
    shown = alone.ended.err[alone.ended.err.index("results (") :].strip()
    said = again.err[again.err.index("results (") :].strip()
    assert said.replace(str(folder), str(alone.folder)) == shown
    assert len(yaml.safe_load((folder / "starts.json").read_text())) == 2

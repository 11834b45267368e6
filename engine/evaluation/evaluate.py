"""Evaluation: the retriever alone, the ranker over what the retriever found, and BM25 as the yardstick.

Source: AR2 section 4.1, Tables 2, 3 and 7. The dev split is used inside the loop; the test split once at the end or
on command. All ranks take part, each with its share of the queries; every ranking is kept as a TREC run file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tabulate import tabulate

from engine.data.answers import AnswerMatcher
from engine.data.corpus import Data
from engine.data.trec import read_trec, write_trec
from engine.evaluation.measures import answer_measures, score_run
from engine.log import get_logger, progress_bar
from engine.models.ranker import Ranker
from engine.models.weights import ZERO_SHOT, frozen_ranker, iteration_name, publish_weights
from engine.retrievers.kinds import BM25, build, dense, open_searcher
from engine.run import Run, RunFolder, Stage
from engine.search import Searcher
from shards.files import read_json, write_json
from shards.partition import split_range
from shards.records import Query

if TYPE_CHECKING:  # search and evaluation need no DeepSpeed, which takes seconds to import
    from engine.training.backend import Models

log = get_logger(__name__)
Ranking = dict[str, dict[str, float]]
"""Query id to docid to score."""
_CURVES = {"G0": "retriever", "G": "retriever", "D0": "ranker", "D": "ranker"}
"""Systems whose points are one curve over the iterations, which begins with the warm-up at 0 (Figure 3)."""
ENTROPY_DEPTH = 15
"""Documents over which the entropy of the retriever's distribution is taken (Table 6)."""


def evaluate_yardsticks(stage: Stage, models: Models, data: Data) -> dict[str, float]:
    """Measure BM25 and the retriever before any training on the dev split."""
    run = stage.run
    build(run, data, run.folder, BM25)
    measured = evaluate_bm25(stage, data, run.folder, "dev")
    if run.config.evaluation.zero_shot:
        with models.training(models.retriever) as retriever:
            publish_weights(run, retriever, data.retriever_text, ZERO_SHOT)
        build(run, data, run.folder, dense(ZERO_SHOT))
        measured |= evaluate_retriever(stage, data, run.folder, "zero-shot", None, "dev")
    return measured


def evaluate_iteration(stage: Stage, data: Data, *, iteration: int) -> dict[str, float]:
    """Measure both models of an iteration on the dev split."""
    g, d = ("G0", "D0") if iteration == 0 else ("G", "D")
    folder = stage.run.folder
    measured = evaluate_retriever(stage, data, folder, g, iteration, "dev")
    measured |= evaluate_ranker(stage, data, folder, d, g, iteration, "dev")
    if measured:
        _show_examples(stage, data, iteration)
    return measured


def evaluate_systems(stage: Stage, data: Data, folder: RunFolder, split: str, *, last: int) -> dict[str, float]:
    """Measure everything on a split: BM25, zero-shot, G0 and D0, and the last iteration's G and D.

    Args:
        stage: Where this runs.
        data: The run's own data, or another corpus.
        folder: Takes indexes and results: the run's own folder, or one below it for another corpus.
        split: Usually `test`, scored once at the end or on command.
        last: The newest finished iteration.
    """
    run = stage.run
    build(run, data, folder, BM25)
    measured = evaluate_bm25(stage, data, folder, split)
    if run.config.evaluation.zero_shot:
        build(run, data, folder, dense(ZERO_SHOT))
        measured |= evaluate_retriever(stage, data, folder, "zero-shot", None, split)
    for iteration in sorted({0, last}):
        g, d = ("G0", "D0") if iteration == 0 else ("G", "D")
        build(run, data, folder, dense(iteration_name(iteration)))
        measured |= evaluate_retriever(stage, data, folder, g, iteration, split)
        measured |= evaluate_ranker(stage, data, folder, d, g, iteration, split)
    return measured


def evaluate_bm25(stage: Stage, data: Data, folder: RunFolder, split: str) -> dict[str, float]:
    """Measure BM25 on a split and record the row."""
    queries = split_queries(stage.run, data, split)
    if not queries:
        return {}
    ranking = retrieve(stage, data, open_searcher(stage.run, data, folder, BM25), queries, "BM25")
    return _record(stage, data, folder, ranking, "BM25", "BM25", None, split)


def evaluate_retriever(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    system: str,
    iteration: int | None,
    split: str,
) -> dict[str, float]:
    """Measure a retriever on a split and record the row.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        folder: Holds index and results; weights are the run's.
        system: `zero-shot`, `G0` or `G`.
        iteration: Whose weights and index; None for the state before training.
        split: `dev` or `test`.
    """
    run, queries = stage.run, split_queries(stage.run, data, split)
    if not queries:
        return {}
    name = ZERO_SHOT if iteration is None else iteration_name(iteration)
    searcher = open_searcher(run, data, folder, dense(name))
    ranking = retrieve(stage, data, searcher, queries, system)
    entropy = _mean_entropy(ranking, run.config.retriever.score_scale)
    run.metrics.write(
        stage.name, iteration or 0, {f"{split}/{_CURVES.get(system, system)}/entropy@{ENTROPY_DEPTH}": entropy}
    )
    return _record(stage, data, folder, ranking, system, system, iteration, split)


def evaluate_ranker(
    stage: Stage, data: Data, folder: RunFolder, system: str, retriever: str, iteration: int, split: str
) -> dict[str, float]:
    """Measure a ranker over what the retriever of the same iteration found, and record the row.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        folder: Holds the retriever's ranking; weights are the run's.
        system: `D0` or `D`.
        retriever: The retriever's name in the table, `G0` or `G`.
        iteration: Whose weights.
        split: `dev` or `test`.
    """
    run, queries = stage.run, split_queries(stage.run, data, split)
    if not queries:
        return {}
    found = read_trec(_trec_path(folder, split, retriever, iteration))
    ranker = frozen_ranker(run.config, run.folder.weights("ranker", iteration_name(iteration)), run.device)
    ranking = rerank(stage, data, ranker, queries, found, system)
    return _record(stage, data, folder, ranking, system, retriever, iteration, split)


def split_queries(run: Run, data: Data, split: str) -> list[Query]:
    """Return the queries that a split is measured on."""
    settings = run.config.evaluation
    limit = settings.max_dev_queries if split == "dev" else settings.max_test_queries
    return data.queries_of(split, limit, run.config.run.seed)


def retrieve(stage: Stage, data: Data, searcher: Searcher, queries: Sequence[Query], label: str) -> Ranking:
    """Search queries on all ranks.

    Returns:
        The ranking of every query, on every rank.
    """
    coordinator, depth = stage.run.coordinator, stage.run.config.evaluation.depth
    share = split_range(len(queries), coordinator.rank, coordinator.world_size)
    own = [queries[place] for place in share]
    ranking: Ranking = {}
    with coordinator.agreement(f"{stage.name}: search {label}"):
        hits = searcher.search(own, min(depth, data.shards.num_documents)) if own else None
        for place, query in enumerate(own):
            documents, scores = hits.documents_QK[place], hits.scores_QK[place]  # type: ignore[union-attr]
            ranking[query.id] = {
                data.shards.docids[document]: float(score)
                for document, score in zip(documents.tolist(), scores.tolist(), strict=True)
                if document >= 0
            }
    return _together(stage, f"ranking {label}", ranking)


def rerank(stage: Stage, data: Data, ranker: Ranker, queries: Sequence[Query], found: Ranking, label: str) -> Ranking:
    """Re-order the top of a ranking by the ranker, on all ranks; what lies deeper keeps its order below.

    Returns:
        The new ranking of every query, on every rank.
    """
    coordinator, config = stage.run.coordinator, stage.run.config
    share = split_range(len(queries), coordinator.rank, coordinator.world_size)
    own, ranking = [queries[place] for place in share], {}
    with (
        coordinator.agreement(f"{stage.name}: rerank {label}"),
        progress_bar(f"{stage.name} {label}", len(own), "query", shown=stage.run.is_main) as bar,
    ):
        for query in own:
            docids = sorted(found[query.id], key=lambda docid: -found[query.id][docid])
            top, rest = docids[: config.evaluation.rerank_depth], docids[config.evaluation.rerank_depth :]
            scores = score_pairs(stage.run, data, ranker, query, [data.shards.index_of(docid) for docid in top])
            below = min(scores, default=0.0)
            ranking[query.id] = dict(zip(top, scores, strict=True)) | {
                docid: below - place for place, docid in enumerate(rest, start=1)
            }
            bar.update()
    return _together(stage, f"ranking {label}", ranking)


def score_pairs(run: Run, data: Data, ranker: Ranker, query: Query, documents: Sequence[int]) -> list[float]:
    """Score documents for a query by the ranker.

    Args:
        run: For lengths and batch size.
        data: Corpus and the ranker's template.
        ranker: Frozen weights on the run's device.
        query: The query.
        documents: Corpus indices [K].

    Returns:
        Raw logits [K].
    """
    text, settings = data.ranker_text, run.config
    (query_tokens,) = text.tokenize_queries([query])
    pairs = [
        text.template.pair(query_tokens, data.shards.tokens(document, text.stream).tolist(), settings.ranker.max_length)
        for document in documents
    ]
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][0]))
    scores = np.empty(len(pairs), dtype=np.float64)
    with torch.inference_mode():
        for start in range(0, len(order), settings.evaluation.pairs_per_batch):
            chosen = order[start : start + settings.evaluation.pairs_per_batch]
            batch = text.template.pad([pairs[place] for place in chosen])
            logits = ranker({key: tensor.to(run.device) for key, tensor in batch.items()})
            scores[chosen] = logits.double().cpu().numpy()
    return [float(score) for score in scores]


def summary_table(folder: RunFolder) -> str:
    """Format the recorded rows as a table, system by metric, in the order of the run."""
    rows: list[dict[str, Any]] = read_json(folder.summary, "the summary of results") if folder.summary.exists() else []
    order = ["BM25", "zero-shot", "G0", "D0", "G", "D"]
    rows = sorted(rows, key=lambda row: (row["split"], row["iteration"] or 0, order.index(row["system"])))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = [
        [row["split"], row["iteration"], row["system"], f"{row['retriever']} top" if row["system"][0] == "D" else ""]
        + [row["metrics"].get(name) for name in metrics]
        for row in rows
    ]
    text: str = tabulate(
        table, headers=["split", "iteration", "system", "re-ranks", *metrics], floatfmt=".3f", missingval=""
    )
    return text


def _record(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    ranking: Ranking,
    system: str,
    retriever: str,
    iteration: int | None,
    split: str,
) -> dict[str, float]:
    qrels = {qid: data.dataset.qrels[split][qid] for qid in ranking}
    metrics = score_run(ranking, qrels) if any(qrels.values()) else {}  # some splits have answers, no judgements
    answered = _answered(stage, data, ranking, system)
    if answered:
        metrics |= answer_measures(ranking, answered)
    row = {"system": system, "retriever": retriever, "iteration": iteration, "split": split, "metrics": metrics}

    def write() -> None:
        folder.results.mkdir(parents=True, exist_ok=True)
        write_trec(_trec_path(folder, split, system, iteration), ranking, tag=system)
        rows = read_json(folder.summary, "the summary of results") if folder.summary.exists() else []
        key = ("system", "retriever", "iteration", "split")
        rows = [old for old in rows if any(old[name] != row[name] for name in key)]
        write_json(folder.summary, [*rows, row])

    stage.run.coordinator.only_rank_zero(f"{stage.name}: record {system}", write)
    values = {f"{split}/{_CURVES.get(system, system)}/{name}": value for name, value in metrics.items()}
    stage.run.metrics.write(stage.name, iteration or 0, values)
    return {f"{system} {name}": metrics[name] for name in ("MRR@10", "R@1", "A@1") if name in metrics}


def _answered(stage: Stage, data: Data, ranking: Ranking, label: str) -> dict[str, set[str]]:
    """Find the retrieved documents that hold an answer, for the queries that have answers."""
    coordinator = stage.run.coordinator
    qids = [qid for qid in ranking if data.dataset.queries[qid].answers]
    found: dict[str, list[str]] = {}
    with coordinator.agreement(f"{stage.name}: answers {label}"):
        for place in split_range(len(qids), coordinator.rank, coordinator.world_size):
            matcher = AnswerMatcher(data.dataset.queries[qids[place]].answers)
            found[qids[place]] = [
                docid
                for docid in ranking[qids[place]]
                if matcher.has(data.shards.document(data.shards.index_of(docid)).text)
            ]
    return {qid: set(docids) for qid, docids in _together(stage, f"answers {label}", found).items()}


def _together(stage: Stage, what: str, own: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in stage.run.coordinator.gather(f"{stage.name}: {what}", own):
        whole |= part
    return whole


def _trec_path(folder: RunFolder, split: str, system: str, iteration: int | None) -> Path:
    suffix = "" if iteration is None else f"-{iteration_name(iteration)}"
    return folder.results / f"{split}-{system}{suffix}.trec"


def _mean_entropy(ranking: Ranking, score_scale: float) -> float:
    entropies = []
    for scores in ranking.values():
        top = np.sort(np.array(list(scores.values())))[::-1][:ENTROPY_DEPTH] * score_scale
        p = np.exp(top - top.max())
        p /= p.sum()
        entropies.append(float(-(p * np.log(np.maximum(p, 1e-30))).sum()))
    return sum(entropies) / max(1, len(entropies))


def _show_examples(stage: Stage, data: Data, iteration: int) -> None:
    """Write a few dev queries with their hardest negatives and both models' scores to TensorBoard."""
    run = stage.run
    if not run.is_main:
        return
    g, d = ("G0", "D0") if iteration == 0 else ("G", "D")
    by_retriever = read_trec(_trec_path(run.folder, "dev", g, iteration))
    by_ranker = read_trec(_trec_path(run.folder, "dev", d, iteration))
    for number, query in enumerate(split_queries(run, data, "dev")[: run.config.evaluation.examples]):
        positives = set(data.dataset.positives("dev", query.id))
        docids = sorted(by_retriever[query.id], key=lambda docid: -by_retriever[query.id][docid])
        shown = [docid for docid in docids if docid in positives][:1]
        shown += [docid for docid in docids if docid not in positives][:5]
        lines = [f"**{query.text}**", "", "| | G | D | document |", "|---|---|---|---|"]
        for docid in shown:
            document = data.shards.document(data.shards.index_of(docid))
            words = " ".join(f"{document.title} {document.text}".split())[:160].replace("|", "\\|")
            mark = "+" if docid in positives else "-"
            # Below the depth of re-ranking the ranker gave no score; what the ranking has there only keeps the order.
            reranked = docids.index(docid) < run.config.evaluation.rerank_depth
            judged = f"{by_ranker[query.id][docid]:.2f}" if reranked else ""
            lines.append(f"| {mark} | {by_retriever[query.id][docid]:.2f} | {judged} | {words} |")
        run.metrics.write_text(f"examples/{number}", iteration, "\n".join(lines))

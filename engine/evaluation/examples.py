"""A few dev queries with what both models make of them, for a person to look at in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.corpus import Data
from engine.data.trec import best_first, read_trec
from engine.evaluation.systems import System
from engine.run import Run
from shards.records import Query


def show_examples(run: Run, data: Data, queries: Sequence[Query], retriever: System, ranker: System) -> None:
    """Write a few dev queries with their hardest negatives and both models' scores to TensorBoard.

    Args:
        run: Whose rankings and metrics.
        data: The corpus.
        queries: Of the dev split.
        retriever: Has been measured on the dev split.
        ranker: Has re-ordered the retriever's ranking.
    """
    if not run.is_main:
        return
    threshold = run.config.evaluation.relevance_threshold
    by_retriever = read_trec(run.folder.results / retriever.run_file_name("dev"))
    by_ranker = read_trec(run.folder.results / ranker.run_file_name("dev"))
    for number, query in enumerate(queries[: run.config.evaluation.examples]):
        grades = data.dataset.qrels["dev"][query.id]
        positives = {docid for docid, grade in grades.items() if grade >= threshold}
        docids = best_first(query.id, by_retriever.get(query.id, {}))
        shown = [docid for docid in docids if docid in positives][:1]
        shown += [docid for docid in docids if docid not in positives][:5]
        lines = [f"**{query.text}**", "", f"| | {retriever.name} | {ranker.name} | document |", "|---|---|---|---|"]
        for docid in shown:
            document = data.shards.document(data.shards.index_of(docid))
            words = " ".join(f"{document.title} {document.text}".split())[:160].replace("|", "\\|")
            mark = "+" if docid in positives else "-"
            # Below the depth of re-ranking the ranker gave no score; what the ranking has there only keeps the order.
            reranked = docids.index(docid) < run.config.evaluation.rerank_depth
            judged = f"{by_ranker[query.id][docid]:.2f}" if reranked else ""
            lines.append(f"| {mark} | {by_retriever[query.id][docid]:.2f} | {judged} | {words} |")
        run.metrics.write_text(f"examples/{number}", ranker.iteration or 0, "\n".join(lines))

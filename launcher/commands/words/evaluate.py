"""The words of `evaluate`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import positive_whole_number, typed_path

EXAMPLES = (
    "runs/nq --split dev --retriever all --ranker none",
    "runs/nq --data data/other --split test",
    "runs/nq --data data/nq --split dev --candidates bm25 --depth 1000 --max-queries 500",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument("--data", type=typed_path, metavar="DIR", help="data folder, BEIR layout or others (the run's)")
    parser.add_argument("--format", default="auto", choices=("auto", "beir", "dpr", "msmarco"), help="its layout")
    parser.add_argument("--split", default="test", metavar="SPLIT", help="split to score (test)")
    parser.add_argument(
        "--max-queries",
        type=positive_whole_number,
        metavar="N",
        help="score a sample of so many queries, its rows beside those of the recipe's",
    )
    parser.add_argument("--retriever", metavar="T", help="retrievers of these iterations: 0, 0,3, 0..3, last or all")
    parser.add_argument(
        "--ranker", metavar="T", help="rankers of these iterations, over each of these retrievers; or none"
    )
    parser.add_argument(
        "--candidates",
        metavar="FILE",
        help="what rankers re-order: bm25 for what BM25 finds, or a file with lines of qid, docid, query and passage",
    )
    parser.add_argument(
        "--depth", type=positive_whole_number, metavar="N", help="documents found and re-ranked for a query"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the sections evaluation and, on another corpus, index: evaluation.metrics=[R@10,MRR@10]",
    )

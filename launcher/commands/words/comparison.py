"""The words that all comparisons have."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import positive_whole_number, typed_path

FOLDER = "comparisons"
"""Where the first run keeps them."""


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the words that all comparisons have."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, NAME=RUN to name it, NAME=RUN,RUN for seeds"
    )
    parser.add_argument("--data", type=typed_path, metavar="DIR", help="where the runs' data folder lies now")
    parser.add_argument("--split", default="dev", metavar="SPLIT", help="split to measure (dev)")
    parser.add_argument(
        "--metric", default="MRR@10", metavar="METRIC", help="measured, by judgements, such as nDCG@10 (MRR@10)"
    )
    parser.add_argument(
        "--depth", type=positive_whole_number, default=1000, metavar="N", help="documents re-ranked for a query (1000)"
    )
    parser.add_argument("--max-queries", type=positive_whole_number, metavar="N", help="queries: a sample of the split")
    parser.add_argument(
        "--ranker", metavar="T", help="rankers of these iterations: 0, 0,3, 0..3, last, all or none (last)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the section evaluation")
    parser.add_argument("--out", type=typed_path, metavar="DIR", help=f"results folder (the first RUN's {FOLDER}/)")
    parser.add_argument("--no-figure", action="store_true", help="print and write the table alone")

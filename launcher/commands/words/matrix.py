"""The words of `matrix`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.commands.words.comparison import add_comparison_arguments

EXAMPLES = (
    "runs/ar2 runs/r2anker",
    "bm25=runs/a,runs/a43 joint=runs/b,runs/b43 --depth 100 --metric nDCG@10 --against joint:R",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    add_comparison_arguments(parser)
    parser.add_argument(
        "--retriever", metavar="T", help="retrievers of these iterations: 0, 0,3, 0..3, last or all (last)"
    )
    parser.add_argument(
        "--run-file",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a TREC run file of this split as a further retriever; may be repeated",
    )
    parser.add_argument("--against", metavar="ROW", help="test all rows against this one (the best of each column)")

"""The words of `report`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import typed_path, whole_number

NAME = "report.html"
MOST_QUERIES = 20
EXAMPLES = (
    "runs/ar2",
    "first=runs/a second=runs/b --out both.html --queries 20",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or NAME=FOLDER to name it in the report")
    parser.add_argument("--out", type=typed_path, metavar="FILE", help=f"the page (the first RUN's {NAME})")
    parser.add_argument("--data", type=typed_path, metavar="DIR", help="where the runs' data folder lies now")
    parser.add_argument("--metric", metavar="NAME", help="by which rows are compared (run.keep_best, else MRR@10)")
    parser.add_argument(
        "--queries", type=whole_number, default=12, metavar="N", help=f"example queries, at most {MOST_QUERIES} (12)"
    )

"""The words of `search`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import positive_whole_number, typed_path

EXAMPLES = (
    'runs/nq "who wrote the origin of species" --top-k 5',
    "runs/nq --no-fusion < questions.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument("question", nargs="?", help="left out, questions are read from the terminal")
    parser.add_argument(
        "--top-k", type=positive_whole_number, metavar="K", default=10, help="documents to print for a question (10)"
    )
    parser.add_argument(
        "--shards", type=typed_path, metavar="DIR", help="shards prepared beside the data, where they were moved since"
    )
    parser.add_argument(
        "--no-fusion", action="store_true", help="the ranker's order, although weights of a mixture were fitted"
    )

"""The words of `export`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import typed_path, whole_number

EXAMPLES = (
    "runs/nq",
    "runs/nq --iteration 1 --out exported",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--iteration", type=whole_number, metavar="T", help="0 is the warm-up; left out, the best on dev"
    )
    parser.add_argument("--out", type=typed_path, metavar="DIR", help="folder to write; left out, RUN/export")

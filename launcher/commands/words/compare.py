"""The words of `compare`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from engine.config.metric_names import ENTROPY, family_of
from engine.errors import ConfigError
from launcher.commands.words.comparison import FOLDER
from launcher.terminal.arguments import positive_whole_number, typed_path

EXAMPLES = (
    "ar2=runs/a,runs/a43,runs/a44 ance=runs/b,runs/b43,runs/b44",
    "runs/array/* --split test --metric nDCG@10 --efficiency",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, NAME=RUN,RUN for seeds, a folder of runs, or a pattern"
    )
    parser.add_argument("--against", metavar="NAME", help="compare the others with this one (the first)")
    parser.add_argument("--split", metavar="NAME", default="dev", help="split that the runs have measured (dev)")
    parser.add_argument(
        "--metric",
        metavar="NAMES",
        default=f"MRR@10,{ENTROPY}",
        help=f"one or more, the first in the figures (MRR@10,{ENTROPY})",
    )
    parser.add_argument(
        "--relevance-threshold", type=positive_whole_number, metavar="G", help="grade of a relevant document"
    )
    parser.add_argument(
        "--queries", type=positive_whole_number, metavar="N", help="rankings of so many queries (the most there are)"
    )
    parser.add_argument("--data", type=typed_path, metavar="DIR", help="where the runs' data folder lies now")
    parser.add_argument("--efficiency", action="store_true", help="what the runs took, by kind of work")
    parser.add_argument("--unfinished", action="store_true", help="the curves of runs so far, finished or not")
    parser.add_argument("--out", type=typed_path, metavar="DIR", help=f"results folder (the first RUN's {FOLDER}/)")
    parser.add_argument("--no-figure", action="store_true", help="print and write the tables alone")


def metrics_of(words: str) -> tuple[str, ...]:
    """Read the value of `--metric`.

    Args:
        words: Names with commas between them.

    Raises:
        ConfigError: There is no such metric.
    """
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    for name in names:
        if name != ENTROPY:
            try:
                family_of(name)
            except ValueError as error:
                raise ConfigError(f"--metric: {error}; or {ENTROPY}, of retrievers") from error
    return names

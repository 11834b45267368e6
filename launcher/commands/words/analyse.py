"""The words of `analyse`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from engine.evaluation.distributions import Form
from launcher.commands.words.comparison import add_comparison_arguments
from launcher.terminal.arguments import positive_number, positive_whole_number

ANALYSES = ("divergence", "negatives", "progress", "shift")
EXAMPLES = (
    "divergence bm25=runs/a joint=runs/b --top 200",
    "progress runs/ar2 --train-queries 2000 --max-queries 2000",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("name", choices=ANALYSES, metavar="NAME", help=", ".join(ANALYSES))
    add_comparison_arguments(parser)
    parser.add_argument(
        "--against", metavar="RANKER", help="label of the ranker against which all others are tested (the best)"
    )
    parser.add_argument(
        "--train-queries",
        type=positive_whole_number,
        metavar="N",
        help="a sample of so many training queries (as of dev)",
    )
    form, group = Form(), parser.add_argument_group("distributions (divergence, shift)")
    group.add_argument(
        "--top", type=positive_whole_number, default=form.top, metavar="N", help="best documents of a list (200)"
    )
    group.add_argument("--weights", choices=("softmax", "uniform"), default=form.weights, help="of the top N (softmax)")
    group.add_argument(
        *("--normalisation",),
        choices=("zscore", "minmax", "none"),
        default=form.normalisation,
        help="of scores before the softmax (zscore)",
    )
    group.add_argument(
        "--temperature",
        type=positive_number,
        default=form.temperature,
        metavar="T",
        help="what scores are divided by before the softmax (1)",
    )
    group.add_argument(
        "--epsilon",
        type=positive_number,
        default=form.epsilon,
        metavar="E",
        help="share of the uniform distribution that is mixed in, below 1 (0.01)",
    )

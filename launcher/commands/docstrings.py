"""`python -m launcher docstrings --out OUT`: quickstart data, made of the docstrings of the installed packages."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import positive_whole_number, typed_path, whole_number

EXAMPLES = (
    "--out data/docstrings",
    "--out data/docstrings --max-documents 1000 --seed 1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument(
        "--out", type=typed_path, required=True, metavar="OUT", help="folder to write, in the BEIR layout"
    )
    parser.add_argument(
        "--max-documents",
        type=positive_whole_number,
        default=4000,
        metavar="N",
        help="documents of the corpus at most (4000)",
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="seed that draws documents and splits (0)"
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Write the data folder and print what is in it.

    Raises:
        DataError: The packages hold too few docstrings.
    """
    from shards.made.docstrings import build_docstring_dataset

    counts = build_docstring_dataset(arguments.out, max_documents=arguments.max_documents, seed=arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))

"""`python -m launcher docstrings --out OUT`: quickstart data, made of the docstrings of the installed packages."""

from __future__ import annotations

import argparse

from shards.made.docstrings import build_docstring_dataset


def docstrings_command(arguments: argparse.Namespace) -> None:
    """Run the command and print how much was found.

    Args:
        arguments: Folder, size and seed.

    Raises:
        DataError: The packages hold too few docstrings.
    """
    counts = build_docstring_dataset(arguments.out, max_documents=arguments.max_documents, seed=arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))

"""The words of `export`, apart from what it does: its help needs no model."""

from __future__ import annotations

import argparse

from launcher.terminal.arguments import typed_path, whole_number

EXAMPLES = (
    "runs/nq",
    "runs/nq --iteration 1 --out exported",
    "runs/nq --out exported --onnx --index",
    "runs/nq --push OWNER/NAME",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--iteration", type=whole_number, metavar="T", help="0 is the warm-up; left out, the best on dev"
    )
    parser.add_argument("--out", type=typed_path, metavar="DIR", help="folder to write; left out, RUN/export")
    parser.add_argument(
        "--models", type=_names, metavar="M,M", help="models by their names in the recipe; left out, all"
    )
    parser.add_argument("--onnx", action="store_true", help="also what onnxruntime reads (the extra onnx)")
    parser.add_argument("--index", action="store_true", help="also the index as a file that FAISS opens, with its ids")
    parser.add_argument("--shards", type=typed_path, metavar="DIR", help="with --index: where the run's shards lie now")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="publish the models on the hub, privately; of several, each as OWNER/NAME-MODEL",
    )
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]

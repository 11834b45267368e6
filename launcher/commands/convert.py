"""`python -m launcher convert SOURCE... --out OUT`: public downloads to one data folder that any recipe can read.

Streamed in constant memory, compressed files read as they are. Killed, the same command goes on where it stopped; done
already, it says so. `docs/data.md` lists the formats and what is special about each.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from tabulate import tabulate

from engine.log import get_logger
from engine.reliability.progress import ProgressBar, progress_bar
from launcher.terminal.arguments import positive_whole_number, recipe_file, typed_path
from shards.convert.conversion import Report, convert
from shards.convert.options import FORMATS, Options
from shards.errors import DataError
from shards.formats.tables import fetch_from_hub

log = get_logger(__name__)


EXAMPLES = (
    "downloads/ --out data/nq",
    "corpus.jsonl --out data/mine --id url --text body --on-error drop",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    default = Options()
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folder with the downloads, or a single file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="words",
        metavar="KEY=VALUE",
        help="over the recipe of --tokenize-for",
    )
    parser.add_argument("--out", type=typed_path, required=True, metavar="OUT", help="data folder to write")
    parser.add_argument("--format", choices=FORMATS, default=default.format, help="whose file names to look for (auto)")
    for name, what in (("id", "ids"), ("title", "titles"), ("text", "texts")):
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"field of documents' {what} in jsonl, Parquet, hf")
    parser.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        default=default.split,
        help="split of judgements and questions whose file name says none (test)",
    )
    parser.add_argument(
        "--questions",
        choices=("judged", "all"),
        default=default.questions,
        help="of DPR's questions for training and dev: those with a positive passage, or also those with answers alone",
    )
    parser.add_argument(
        "--on-error",
        choices=("error", "drop"),
        default=default.on_error,
        help="a bad record (malformed, repeated id, no text, too long) stops all, or is dropped and counted (error)",
    )
    parser.add_argument(
        "--on-unknown-docid",
        choices=("error", "drop"),
        default=default.on_unknown_docid,
        help="the same for judgements, negatives and run rows of documents that the corpus lacks (error)",
    )
    parser.add_argument(
        "--max-document-characters",
        type=positive_whole_number,
        default=default.max_document_characters,
        metavar="N",
        help=f"a longer document is a bad record ({default.max_document_characters})",
    )
    parser.add_argument(
        "--tokenize-for",
        type=recipe_file,
        metavar="RECIPE",
        help="also write token shards and the BM25 index for a recipe's models into OUT/shards, for all runs to share",
    )
    parser.add_argument("--force", action="store_true", help="replace what was made of other sources or options")


def run_command(arguments: argparse.Namespace) -> None:
    """Run the command and print what was kept and what was dropped.

    Args:
        arguments: What `add_arguments` describes.

    Raises:
        DataError: A source is not usable.
        DiskFullError: There is no more space.
    """
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    paths = [_source_path(name, arguments.format) for name in arguments.sources]
    with _Bars() as bars:
        report = convert(paths, arguments.out, options, force=arguments.force, progress=bars)
    print(summary(report))
    if arguments.tokenize_for is not None:
        from launcher.commands.prepare import (
            prepare_shards,  # loads models' libraries, which a conversion alone does not need
        )

        print(f"shards: {prepare_shards(report.path, arguments.tokenize_for, arguments.words)}")


def _source_path(name: str, format: str) -> Path:
    """Return a source's path; a name that is no path is one on the hub, where the user said so."""
    path = Path(os.path.expanduser(name))
    if format != "hf" or path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"there is no {name}", expected="a folder that exists, or the name of a data set on the hub")
    log.info("fetching the data set %s from the hub", name)
    return fetch_from_hub(name)


class _Bars:
    """One progress bar after the other, in bytes."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: ProgressBar | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, stage: str, total_bytes: int) -> None:
        """Show a new bar in the place of the last one."""
        self._stack.close()
        self._bar = self._stack.enter_context(progress_bar(stage, total_bytes, "B", shown=True))

    def advance(self, num_bytes: int) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(num_bytes)


def summary(report: Report) -> str:
    """Return what was kept and what was left out, as tables."""
    description, parts = report.description, []
    parts.append(
        f"{report.path} is there already, made of these {len(description.inputs)} files in the same way: nothing to do"
        if report.was_there
        else f"{report.path} is done (fingerprint {description.fingerprint[:16]})"
    )
    rows = [(name, count, description.files[name].bytes) for name, count in description.kept.items()]
    parts.append(tabulate(rows, ("kept", "records", "bytes"), tablefmt="simple", intfmt=","))
    if description.dropped:
        rows_dropped = list(description.dropped.items())
        parts.append(tabulate(rows_dropped, ("dropped", "records"), tablefmt="simple", intfmt=","))
    else:
        parts.append("Nothing was dropped.")
    if description.ignored:
        parts.append(tabulate(list(description.ignored.items()), ("not read", "because it is"), tablefmt="simple"))
    return "\n\n".join(parts)

"""`python -m launcher report RUN...`: runs on one page of HTML, to be opened anywhere, without a network.

    python -m launcher report RUN                                          # RUN/report.html
    python -m launcher report first=runs/a second=runs/b --out both.html   # side by side, under other names

Everything is read from the run folders and the data; no model is loaded, and nothing of a run is changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.config.metric_names import family_of
from engine.errors import ConfigError
from launcher.commands.comparison import named_paths
from launcher.commands.finished import place_for
from launcher.commands.report.opened import Opener
from launcher.commands.report.page import Wanted, render
from launcher.commands.words.report import MOST_QUERIES, NAME
from shards.files import write_atomically


def run_command(arguments: argparse.Namespace) -> None:
    """Write the page and say where it is.

    Raises:
        ConfigError: A folder holds no run, or a word is of another form.
        ArtifactError: A file of a run is damaged.
        DataError: A ranking or the data are.
    """
    named = named_paths(arguments.runs, "RUN")
    out: Path = arguments.out or next(iter(named.values())) / NAME
    _require_words(arguments, out)
    place_for(arguments.out and out.parent, out.parent)
    opener = Opener(arguments.data)
    runs = [opener.open(name, path) for name, path in named.items()]
    page = render(runs, Wanted(arguments.metric, arguments.queries))
    with write_atomically(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a folder's name need not be UTF-8
    print(out, flush=True)


def _require_words(arguments: argparse.Namespace, out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ConfigError(f"--out {out} is no page", expected="a file whose name ends with .html")
    if arguments.queries > MOST_QUERIES:
        raise ConfigError(f"--queries {arguments.queries} is too many for a page", expected=f"0 to {MOST_QUERIES}")
    if arguments.metric is not None:
        try:
            family_of(arguments.metric)
        except ValueError as error:
            raise ConfigError(f"--metric: {error}") from error

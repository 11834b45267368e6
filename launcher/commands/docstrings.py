"""Quickstart data: real text that every machine has, the docstrings of the installed Python packages.

A query is the summary sentence of a docstring, its one relevant document the rest of it under the qualified name, so
that what is trained on it is a search over one's own libraries. Sources are parsed, never imported.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.errors import DataError
from shards.formats.beir import write_folder
from shards.made.docstring_text import is_useful, normal_form, split_docstring
from shards.made.python_sources import Documented, read_package, top_level_packages
from shards.records import Document, Qrels, Query

PREFERRED = ("torch", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "networkx", "transformers")
"""Packages of wide interest: each gets `PREFERENCE` times the share of another, where it is installed."""
PREFERENCE = 4
TEST_SHARE, DEV_SHARE = 0.15, 0.10
# A package is read until it has this many times its equal share, which small packages leave a part of to others.
_MARGIN = 3.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One document and its query.

    Attributes:
        name: Qualified name: the document's id and title.
        group: What is never split between train, dev and test: the defining module.
        summary: The query.
        body: The document's text.
    """

    name: str
    group: str
    summary: str
    body: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in the BEIR layout")
    parser.add_argument("--max-documents", type=int, default=4000, help="size of the corpus (4000)")
    parser.add_argument("--seed", type=int, default=0, help="draws documents and splits (0)")


def run_command(arguments: argparse.Namespace) -> None:
    """Write the data folder and print what is in it."""
    counts = build_docstring_dataset(arguments.out, max_documents=arguments.max_documents, seed=arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))


def build_docstring_dataset(
    out: Path,
    *,
    max_documents: int = 4000,
    seed: int = 0,
    site_packages: Sequence[Path] | None = None,
    preferred: Sequence[str] = PREFERRED,
) -> dict[str, int]:
    """Write the docstrings of installed packages as a data folder in the BEIR layout.

    The same packages, limit and seed give the same bytes.

    Args:
        out: The folder to make, or to replace where an earlier call made it.
        max_documents: Size of the corpus at most; packages share it fairly.
        seed: Draws documents and splits.
        site_packages: Folders of installed packages; left out, those of the running Python.
        preferred: Top-level packages that get a larger share.

    Returns:
        Counts of packages, documents, and queries of each split.

    Raises:
        DataError: The packages hold too few docstrings for three splits.
    """
    folders = list(site_packages) if site_packages is not None else _installed()
    dropped: Counter[str] = Counter()
    by_package = _collect(folders, max_documents, preferred, dropped)
    shares = fair_shares(
        {package: len(entries) for package, entries in by_package.items()},
        max_documents,
        dict.fromkeys(preferred, PREFERENCE),
    )
    entries = [entry for package, number in shares.items() for entry in _choose(by_package[package], number, seed)]
    entries.sort(key=lambda entry: entry.name)
    queries, qrels = _judge(entries, seed)
    if missing := [split for split, judged in qrels.items() if not judged]:
        raise DataError(
            f"only {len(entries)} usable docstrings were found in {', '.join(map(str, folders))}, none for "
            f"{' and '.join(missing)}",
            expected="enough for three splits",
            remedy="install more packages, or use data of your own (data.path)",
        )
    counts = {"packages": sum(number > 0 for number in shares.values()), "documents": len(entries)}
    counts |= {f"{split} queries": len(judged) for split, judged in qrels.items()}
    provenance = {
        "made of": "docstrings of installed Python packages",
        "python": platform.python_version(),
        "max_documents": max_documents,
        "seed": seed,
        "counts": counts,
        "dropped": dict(sorted(dropped.items())),
        "documents of packages": {package: number for package, number in shares.items() if number},
        "installed": {found.name: found.version for found in metadata.distributions(path=[*map(str, folders)])},
    }
    documents = (Document(entry.name, entry.name, entry.body) for entry in entries)
    write_folder(out, documents, queries, qrels, provenance)
    return counts


def fair_shares(available: Mapping[str, int], limit: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Share a limit: each package gets in proportion to its weight; what one cannot use goes to the others.

    Args:
        available: Package -> number of its documents.
        limit: Documents in all, >= 0.
        weights: Package -> weight, 1 where it is not named.

    Returns:
        Package -> number of documents, at most what it has; together the limit, or all there are.
    """
    shares = dict.fromkeys(available, 0)
    left = min(limit, sum(available.values()))
    while left:
        hungry = [package for package in shares if shares[package] < available[package]]
        unit = max(1, left // sum(weights.get(package, 1) for package in hungry))
        for package in hungry:
            given = min(unit * weights.get(package, 1), available[package] - shares[package], left)
            shares[package] += given
            left -= given
    return shares


def _installed() -> list[Path]:
    paths = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return sorted(path for path in paths if path.is_dir())


def _collect(
    folders: list[Path], max_documents: int, preferred: Sequence[str], dropped: Counter[str]
) -> dict[str, list[Entry]]:
    packages = top_level_packages(folders)
    weights = {package: PREFERENCE if package in preferred else 1 for package in packages}
    seen_summaries: set[str] = set()
    seen_bodies: set[str] = set()
    found: dict[str, list[Entry]] = {}
    for package, path in packages.items():
        entries = found[package] = []
        enough = math.ceil(_MARGIN * max_documents * weights[package] / sum(weights.values()))
        for documented in read_package(path):
            if len(entries) >= enough:
                break
            entry = _entry(documented)
            if entry is None:
                dropped["too short, or nothing a person would search for"] += 1
                continue
            # Two documents with one summary are two right answers, of which only one would be judged right.
            summary, body = normal_form(entry.summary), normal_form(entry.body)[:200]
            if summary in seen_summaries or body in seen_bodies:
                dropped["summary or text of another docstring"] += 1
                continue
            seen_summaries.add(summary)
            seen_bodies.add(body)
            entries.append(entry)
    return found


def _entry(documented: Documented) -> Entry | None:
    parts = split_docstring(documented.docstring)
    if parts is None or not is_useful(*parts, documented.name):
        return None
    return Entry(documented.name, documented.module, *parts)


def _choose(entries: list[Entry], number: int, seed: int) -> list[Entry]:
    """Take the names nearest to the package's top, where its users look first, and among equals draw."""
    return sorted(entries, key=lambda entry: (entry.name.count("."), _draw(seed, entry.name)))[:number]


def _judge(entries: list[Entry], seed: int) -> tuple[list[Query], dict[str, Qrels]]:
    queries: list[Query] = []
    qrels: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
    for entry in entries:
        draw = _draw(seed, entry.group)
        split = "test" if draw < TEST_SHARE else "dev" if draw < TEST_SHARE + DEV_SHARE else "train"
        query = Query(f"q-{entry.name}", entry.summary)
        queries.append(query)
        qrels[split][query.id] = {entry.name: 1}
    return queries, qrels


def _draw(seed: int, word: str) -> float:
    """Return a number in [0, 1) that depends on nothing but seed and word."""
    digest = hashlib.sha256(f"{seed}:{word}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

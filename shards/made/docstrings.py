"""Quickstart data: real text that every machine has, the docstrings of the installed Python packages.

A query is the first sentence of a docstring, its one relevant document the rest of it under the qualified name, so that
what is trained on it is a search over one's own libraries. Sources are parsed with `ast`, never imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import math
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from shards.errors import DataError
from shards.formats.beir import write_folder
from shards.made.docstring_text import is_useful, normal_form, split_docstring
from shards.records import Document, Qrels, Query

PREFERRED = ("torch", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "networkx", "transformers")
"""Packages of wide interest: each gets `PREFERENCE` times the share of another, where it is installed."""
PREFERENCE = 4
TEST_SHARE, DEV_SHARE = 0.15, 0.10
# A package is read until it has this many times its equal share, which small packages leave a part of to others.
_MARGIN = 3.0
_UNWANTED = re.compile(
    r"(?:test|testing)(?:_.*|s|data)?|.*_tests?|conftest|demos?|benchmarks?|docs?|examples?|extern(?:als)?|scripts"
    r"|templates|third_party|vendor(?:ed)?|__main__",
    re.IGNORECASE,
)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Entry:
    """One document and its query.

    Attributes:
        name: Qualified name, that of the defining module included: the document's id and title.
        module: The defining module, which is never split between train, dev and test.
        query: The first sentence.
        body: The document's text.
    """

    name: str
    module: str
    query: str
    body: str


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
    installed = sorted({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})
    folders = [path for path in (installed if site_packages is None else site_packages) if path.is_dir()]
    dropped: Counter[str] = Counter()
    weights = dict.fromkeys(preferred, PREFERENCE)
    entries = _choose(_collect(folders, max_documents, weights, dropped), max_documents, weights, seed)
    shares = Counter(entry.module.split(".")[0] for entry in entries)
    qrels: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
    for entry in entries:
        draw = _draw(seed, entry.module)
        split = "test" if draw < TEST_SHARE else "dev" if draw < TEST_SHARE + DEV_SHARE else "train"
        qrels[split][f"q-{entry.name}"] = {entry.name: 1}
    if missing := [split for split, judged in qrels.items() if not judged]:
        raise DataError(
            f"only {len(entries)} usable docstrings were found in {', '.join(map(str, folders))}, none for "
            f"{' and '.join(missing)}",
            expected="enough for three splits",
            remedy="install more packages, or use data of your own (data.path)",
        )
    counts = {"packages": len(shares), "documents": len(entries)}
    counts |= {f"{split} queries": len(judged) for split, judged in qrels.items()}
    provenance = {
        "made of": "docstrings of installed Python packages",
        "python": platform.python_version(),
        "max_documents": max_documents,
        "seed": seed,
        "counts": counts,
        "dropped": dict(sorted(dropped.items())),
        "documents of packages": dict(sorted(shares.items())),
        "installed": {item.name: item.version for item in metadata.distributions(path=[*map(str, folders)])},
    }
    documents = (Document(entry.name, entry.name, entry.body) for entry in entries)
    queries = (Query(f"q-{entry.name}", entry.query) for entry in entries)
    write_folder(out, documents, queries, qrels, provenance)
    return counts


def read_package(folder: Path, package: str) -> Iterator[tuple[str, str, str]]:
    """Read what a package defines and documents under names without an underscore, file by file.

    Modules such as `_solvers.py` are read, since packages define in them what they offer to users; private folders are
    not.

    Args:
        folder: Where packages are installed.
        package: Name of a package's folder or of a single module.

    Yields:
        Qualified name, defining module and docstring, in a fixed order, files near the package's top first. A file is
        opened when its turn comes.
    """
    files = [folder / f"{package}.py"] if (folder / f"{package}.py").is_file() else [*(folder / package).rglob("*.py")]
    for path in sorted(files, key=lambda path: (len(path.parts), path)):
        parts = [*path.relative_to(folder).with_suffix("").parts]
        if not all(_is_wanted(part) for part in parts) or any(part.startswith("_") for part in parts[:-1]):
            continue
        if parts[-1] == "__init__":
            parts.pop()
        module = ".".join(parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a package's invalid escape sequences are none of ours
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a template, or source for another version of Python
        if not parts[-1].startswith("_") and (docstring := ast.get_docstring(tree)):
            yield module, module, docstring
        yield from ((f"{module}.{name}", module, docstring) for name, docstring in _definitions(tree))


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With):
            yield from _definitions(child, prefix)
        elif isinstance(child, _Definition) and not child.name.startswith("_"):
            if docstring := ast.get_docstring(child):
                yield prefix + child.name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}{child.name}.")


def _is_wanted(part: str) -> bool:
    return part.isidentifier() and not _UNWANTED.fullmatch(part)


def _collect(
    folders: Sequence[Path], max_documents: int, weights: Mapping[str, int], dropped: Counter[str]
) -> list[list[Entry]]:
    packages: dict[str, Path] = {}
    for folder in folders:
        for path in folder.iterdir():
            is_package = path.suffix == ".py" or (path / "__init__.py").is_file()
            if is_package and _is_wanted(path.stem) and not path.stem.startswith("_"):
                packages.setdefault(path.stem, folder)
    total = sum(weights.get(package, 1) for package in packages)
    found: list[list[Entry]] = []
    seen: set[tuple[str, str]] = set()
    for package in sorted(packages):
        entries: list[Entry] = []
        enough = math.ceil(_MARGIN * max_documents * weights.get(package, 1) / total)
        for name, module, docstring in read_package(packages[package], package):
            if len(entries) >= enough:
                break
            query, body = split_docstring(docstring)
            if not is_useful(query, body, name):
                dropped["too short, or nothing a person would search for"] += 1
                continue
            # Two documents with one query are two right answers, of which only one would be judged right.
            keys = {("name", name), ("query", normal_form(query)), ("body", normal_form(body)[:200])}
            if keys & seen:
                dropped["name, first sentence or text of another docstring"] += 1
                continue
            seen |= keys
            entries.append(Entry(name, module, query, body))
        found.append(entries)
    return found


def _choose(found: list[list[Entry]], limit: int, weights: Mapping[str, int], seed: int) -> list[Entry]:
    """Let packages take turns, each as many documents a turn as its weight; what one lacks goes to the others.

    A package gives first the names nearest to its top, where its users look first, and among equals draws.
    """
    turns: list[tuple[int, float, Entry]] = []
    for entries in found:
        ordered = [(sum(part[0] != "_" for part in e.name.split(".")), _draw(seed, e.name), e) for e in entries]
        for place, (_, draw, entry) in enumerate(sorted(ordered, key=lambda item: item[:2])):
            turns.append((place // weights.get(entry.module.split(".")[0], 1), draw, entry))
    turns.sort(key=lambda item: item[:2])
    return sorted((entry for _, _, entry in turns[:limit]), key=lambda entry: entry.name)


def _draw(seed: int, word: str) -> float:
    """Return a number in [0, 1) that depends on nothing but seed and word."""
    digest = hashlib.sha256(f"{seed}:{word}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

"""Which files are read, and as what: downloads are known by their names, jsonl and tables by what their records hold.

Nothing is passed over in silence: a file that is not read is listed with the reason. Sources are data and never code:
no archive is unpacked, no pickle loaded, no address opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.convert.options import Options
from shards.errors import DataError
from shards.formats.compressed import SUFFIXES, plain_name
from shards.formats.lines import read_jsonl
from shards.formats.tables import hf_files


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        path: The file.
        name: Its path below the folder that was named, for messages and `dataset.json`.
        kind: What it holds and in which form; a key of `shards.convert.read.READERS`.
        split: The split of its judgements, questions or rows.
        beside: A second file read along with it: the titles of the passages.
        known: The file with the questions of the split that have passages; of the answers, others alone are taken.
    """

    path: Path
    name: str
    kind: str
    split: str
    beside: Path | None = None
    known: Path | None = None

    @property
    def run_name(self) -> str:
        """The name of the run that it gives, if it gives one."""
        base = re.sub(r"\.(trec|run|tsv|txt)$", "", plain_name(self.path.name))
        return re.sub(r"[^\w.+-]", "_", base).lstrip(".") or "run"


# (families, pattern of the path in lower case without .gz and .zst, kind); the first that matches counts.
_RULES = [
    ("beir", r"(^|/)(corpus|queries)\.jsonl$", "jsonl"),
    ("jsonl", r"\.jsonl$", "jsonl"),
    ("parquet hf", r"\.parquet$", "table"),
    ("hf", r"\.arrow$", "table"),
    ("dpr", r"(^|/)(psgs|corpus)[^/]*\.tsv$", "passages"),
    ("dpr", r"(^|/)biencoder-[^/]*\.json$", "questions"),
    ("dpr", r"(\.qa\.csv|-(train|dev|test)\.csv)$", "answers"),
    ("msmarco trec", r"(^|/)collection[^/]*\.tsv$", "collection"),
    ("msmarco", r"(^|/)para\.txt$", "collection"),
    ("msmarco", r"(^|/)para\.title\.txt$", "titles"),
    ("msmarco trec", r"(queries[^/]*\.tsv|(^|/)(train|dev|test)\.query\.txt)$", "queries"),
    ("msmarco", r"(^|/)qidpidtriples[^/]*$", "triples"),
    ("msmarco trec", r"top1000[^/]*$", "top1000"),
    ("beir", r"(^|/)qrels/[^/]*\.tsv$", "beir judgements"),
    ("beir", r"(^|/)exclusions/[^/]*\.tsv$", "beir exclusions"),
    # RocketQA's further positives, found by matching texts: good enough to be no negatives, not to be trained on.
    ("msmarco", r"qrels?[^/]*addition[^/]*$", "exclusions"),
    ("msmarco trec", r"(qrels?[^/]*(\.tsv|\.txt)?|\.qrels?)$", "judgements"),
    ("trec", r"topics[^/]*$", "topics"),
    ("trec msmarco", r"(\.(trec|run)$|(^|/)runs?[./])", "run"),
]
NAMES = (
    "corpus.jsonl, queries.jsonl, qrels/test.tsv, psgs_w100.tsv, biencoder-nq-train.json, nq-test.csv, collection.tsv, "
    "queries.train.tsv, qidpidtriples.train.tsv, topics.dl19.txt, qrels.dl19.txt, bm25.trec, train.parquet"
)
"""A name of each kind, for messages."""
_REFUSED = [
    (r"\.(pkl|pickle|pt|pth|bin|npy|npz|joblib)$", "a pickle, or may hold one: loading it can run any code"),
    (r"\.(tar|tgz|zip|bz2|xz|7z|rar)$", "an archive, or compressed in another way than .gz and .zst: unpack it first"),
    (r"(^|/)train_ce_[^/]*$", "numbers its passages by their place, from 0, instead of by their ids"),
    (r"(^|/)ann_training_data[^/]*$", "numbers its passages by their place in a cache instead of by their ids"),
]
_ROLES = {
    "judgements": r"qrel|judge?ments",
    "documents": r"corpus|docu|passage|psgs|collection",
    "queries": r"quer|question",
}
_LINES = {"documents": "collection", "queries": "queries", "judgements": "judgements"}
# What a single file of any name is, once the user has said its format.
_BY_ROLE = {"dpr": {"documents": "passages"}, "msmarco": _LINES, "trec": _LINES}
# Documents are read before what names them, and judgements before training records and runs.
_RANKS = {
    "passages": 0,
    "collection": 0,
    "documents": 0,
    "table documents": 0,
    "queries": 1,
    "answers": 1,
    "topics": 1,
    "json queries": 1,
    "table queries": 1,
    "judgements": 2,
    "exclusions": 2,
    "beir judgements": 2,
    "beir exclusions": 2,
    "table judgements": 2,
    "json judgements": 2,
}


def find_sources(paths: list[Path], options: Options, out: Path) -> tuple[list[Source], dict[str, str]]:
    """Decide what is read from the folders and files that a user named.

    Args:
        paths: Folders, looked through with their folders, and files.
        options: The conversion's options.
        out: The folder to write, which is no source even where it lies in one.

    Returns:
        The files in the order in which they are read; and of each file that is not read, name -> reason.

    Raises:
        DataError: A path is not there, a file is of no known kind, or no file is.
    """
    found: list[Source] = []
    ignored: dict[str, str] = {}
    for path in paths:
        if re.match(r"[a-z0-9+.-]+:", os.fspath(path), re.IGNORECASE) and not path.exists():
            raise DataError(f"{path} is an address", expected="a file or a folder", remedy="fetch it first")
        if not path.exists():
            raise DataError(
                f"there is no {path}", expected="a file or a folder with the downloads", remedy="check the path"
            )
        for file, name in _files(path, out):
            # The folder's own name counts, too: `queries/` may hold a table of no telling name.
            kind = _kind_of(file, f"{path.name}/{name}" if path.is_dir() else name, options, is_named=path.is_file())
            if kind in _RANKS or kind in ("questions", "triples", "top1000", "run", "titles", "json training"):
                default = "train" if kind in ("json training", "triples", "questions") else options.split
                found.append(Source(file, name, kind, split_of(name, default)))
            elif path.is_file():
                raise DataError(f"{path} is not read: it is {kind}", remedy="name the form of the file by --format")
            else:
                ignored[name] = kind
    found = _with_titles(_preferred(found, ignored, options))
    if not found:
        listed = ", ".join(f"{name} ({why})" for name, why in list(ignored.items())[:8])
        raise DataError(
            f"{', '.join(map(str, paths))} holds no file that can be read{': ' + listed if listed else ''}",
            expected=f"downloads under their own names, such as {NAMES}",
            remedy="name single files, and their form by --format",
        )
    return sorted(found, key=lambda source: _rank(source.kind)), ignored


def _rank(kind: str) -> int:
    return _RANKS.get(kind, 4 if kind in ("run", "top1000") else 3)


def _files(path: Path, out: Path) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        yield path, path.name
        return
    for folder, folders, files in os.walk(path):
        if listed := hf_files(Path(folder)):
            folders[:] = []
            yield from ((file, file.relative_to(path).as_posix()) for file in listed)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _absolute(folder, name) != out)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name), Path(folder, name).relative_to(path).as_posix()


def _absolute(*parts: str) -> Path:
    return Path(os.path.abspath(os.path.join(*parts)))


def _kind_of(file: Path, name: str, options: Options, *, is_named: bool) -> str:
    """Return the kind of a file, or words that say why it has none; the user may have named it and its format."""
    plain = plain_name(name.lower())
    for pattern, reason in _REFUSED:
        if re.search(pattern, plain):
            return reason
    families = {options.format} | ({"hf", "parquet", "jsonl"} if options.format == "hf" else set())
    for family, pattern, kind in _RULES:
        if (options.format == "auto" or families & set(family.split())) and re.search(pattern, plain):
            if kind == "jsonl":
                return _jsonl_kind(file, name)
            if kind == "table":
                if file.suffix in SUFFIXES:
                    return "a table that is compressed once more: decompress it first"
                return "table " + _role(name, {})
            return kind
    if is_named and options.format in _BY_ROLE:
        return _BY_ROLE[options.format].get(_role(name, {}), "of no known name for its format")
    if is_named and options.format == "jsonl":
        return _jsonl_kind(file, name)
    return "of no known name" + ("" if options.format == "auto" else f" for --format {options.format}")


def _jsonl_kind(file: Path, name: str) -> str:
    """Look at the first record: training records of several makers are told by their fields."""
    try:
        record = next((record for _, record in read_jsonl(file)), {})
    except DataError:
        record = {}  # met again, and told or counted, when the file is read
    training = ("positive_passages", "positive_document_ids")
    if any(name in record for name in training) or ("qid" in record and isinstance(record.get("neg"), dict)):
        return "json training"
    if "query" in record and "pos" in record:
        return "training texts without ids, of which no corpus can be made"
    role = _role(name, record)
    return role if role == "documents" else f"json {role}"


def _role(name: str, record: dict[str, Any]) -> str:
    """Tell documents, queries and judgements apart by the file's name, or that of the nearest folder that says it."""
    if "corpus-id" in record and "query-id" in record:
        return "judgements"
    for part in reversed(name.lower().split("/")):
        for role, words in _ROLES.items():
            if re.search(words, part):
                return role
    return "documents"


def split_of(name: str, default: str) -> str:
    """Read the split out of a file's name, such as `queries.dev.small.tsv`; a name without one has the default."""
    words = re.findall(r"[a-z]+", name.lower())
    for split, meant in (("train", "train"), ("dev", "dev val valid validation"), ("test", "test eval passagetest")):
        if set(meant.split()) & set(words):
            return split
    return default


def _preferred(found: list[Source], ignored: dict[str, str], options: Options) -> list[Source]:
    """Leave out what another file stands for: the large dev split, and answers of a split that has passages."""
    names = {plain_name(source.path.name) for source in found}
    passages = {source.split: source.path for source in found if source.kind == "questions"}
    kept = []
    for source in found:
        plain = plain_name(source.path.name)
        if (small := re.sub(r"\.dev\.", ".dev.small.", plain)) != plain and ".small." not in plain and small in names:
            ignored[source.name] = f"{small} goes before it"
        elif source.kind == "answers" and options.questions == "all":
            kept.append(replace(source, known=passages.get(source.split)))
        elif source.kind == "answers" and (source.split in passages or source.split == "train"):
            ignored[source.name] = (
                "answers without passages, of a split that is trained on or has passages (--questions all takes them)"
            )
        else:
            kept.append(source)
    return kept


def _with_titles(found: list[Source]) -> list[Source]:
    titles = {source.path.parent: source for source in found if source.kind == "titles"}
    kept = []
    for source in found:
        if source.kind == "collection" and plain_name(source.path.name) == "para.txt" and source.path.parent in titles:
            beside = titles.pop(source.path.parent).path
            kept.append(Source(source.path, source.name, source.kind, source.split, beside))
        elif source.kind != "titles":
            kept.append(source)
    if titles:
        name = next(iter(titles.values())).name
        raise DataError(f"{name} has titles, but there is no para.txt beside it", remedy="name the folder of both")
    return kept

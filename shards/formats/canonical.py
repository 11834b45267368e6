"""The folder that `python -m launcher convert` writes: a BEIR layout, and `dataset.json` that vouches for it.

    corpus.jsonl              {"_id", "title", "text"}
    queries.jsonl             {"_id", "text", "answers"?, "metadata"?: {"split"}}
    qrels/SPLIT.tsv           query-id TAB corpus-id TAB score, under a header
    exclusions/SPLIT.tsv      the same columns: documents that are no negatives of the query
    training/SPLIT.jsonl      {"query_id", "positive_ids", "negative_ids", "scores"?, "sources"?}
    runs/NAME.trec            qid Q0 docid rank score tag
    dataset.json              written last: inputs, options, counts, and each file's bytes and SHA-256

Ids were found unique and judged documents present when the folder was written, so that opening it neither streams nor
hashes the corpus: sizes are compared, and only what is read (queries, judgements) is hashed. `metadata.split` names the
split of a query of which answers alone are known, which no judgement can say.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shards.errors import ArtifactError, DataError
from shards.files import parse_record, sha256_file
from shards.formats import beir
from shards.formats.layout import Judgements, Layout, add_query
from shards.formats.lines import read_jsonl
from shards.formats.stream import place
from shards.records import GivenNegatives, Query

DESCRIPTION_NAME = "dataset.json"
PARTIAL_NAME = ".partial"
"""The folder in the folder in which an unfinished conversion lies."""
FORMAT, VERSION = "sparring-dataset", 1
CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
TRAINING = "training/train.jsonl"
_NOT_OURS = ("shards",)  # made of the folder, and with manifests of their own
_REMEDY = "convert the sources again, with --force"
_HASHED = (QUERIES, "qrels/", "exclusions/")


@dataclass(frozen=True)
class Contents:
    """What a file held when it was looked at."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class NamedContents:
    """What a source file held; its name is its path below the folder that was named."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says of a folder.

    Attributes:
        inputs: The source files, in the order in which they were read.
        options: The options that shaped the result.
        kept: Output file -> number of records.
        dropped: Reason -> number of records left out.
        ignored: Name of a file beside the sources -> why it was not read.
        answer_splits: Splits with queries of which answers alone are known.
        files: Output file -> what it holds.
    """

    inputs: list[NamedContents]
    options: dict[str, Any]
    kept: dict[str, int]
    dropped: dict[str, int]
    ignored: dict[str, str]
    answer_splits: list[str]
    files: dict[str, Contents]

    @property
    def num_documents(self) -> int:
        """Number of documents of the corpus."""
        return self.kept.get(CORPUS, 0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents of all output files."""
        return fingerprint_of({name: file.sha256 for name, file in self.files.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into `dataset.json`."""
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        return head | {"num_documents": self.num_documents} | asdict(self)


def fingerprint_of(sha256_by_name: Mapping[str, str]) -> str:
    """Hash the names and contents of a data set's files.

    Args:
        sha256_by_name: Path below the folder, with slashes -> the file's SHA-256.

    Returns:
        A SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(sha256_by_name, key=lambda name: name.split("/")):
        digest.update(f"{name}\0{sha256_by_name[name]}\n".encode())
    return digest.hexdigest()


def read_description(path: Path) -> Description | None:
    """Read a folder's `dataset.json`.

    Args:
        path: The folder.

    Returns:
        The description; None where there is none, or one that another program wrote.

    Raises:
        DataError: It is damaged or of another version, or the folder holds a conversion that has not finished.
    """
    file = path / DESCRIPTION_NAME
    if not file.is_file():
        if (path / PARTIAL_NAME).is_dir():
            raise DataError(
                f"{path} holds a conversion that has not finished",
                expected=f"{DESCRIPTION_NAME}, which is written last",
                remedy="run the same convert command again: it goes on where it stopped",
            )
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    if record.get("version") != VERSION:
        raise _damaged(file, f"it has version {record.get('version')!r}, this program reads {VERSION}")
    try:
        description = parse_record(record, Description, str(file))
    except ArtifactError as error:
        raise DataError(error.fact, remedy=_REMEDY) from None
    if record.get("fingerprint") != description.fingerprint:
        raise _damaged(file, "its fingerprint is not that of the files that it lists")
    return description


def _damaged(file: Path, what: str) -> DataError:
    return DataError(f"{file} is damaged: {what}", remedy=_REMEDY)


def check_files(path: Path, description: Description, *, hashed: bool) -> None:
    """Compare a folder with its description.

    Args:
        path: The folder.
        description: What it should hold.
        hashed: Whether the files that a reader holds in memory (queries, judgements) are hashed too.

    Raises:
        DataError: A file is missing, has another size or content, or is not one of those described.
    """
    there = {
        file.relative_to(path).as_posix(): file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    there = {name: file for name, file in there.items() if name.split("/")[0] not in _NOT_OURS}
    there.pop(DESCRIPTION_NAME, None)
    remedy = "restore the folder, or convert the sources again with --force"
    if missing := sorted(description.files.keys() - there.keys()):
        raise DataError(f"{path} lacks {', '.join(missing)}, which {DESCRIPTION_NAME} lists", remedy=remedy)
    if extra := sorted(there.keys() - description.files.keys()):
        raise DataError(
            f"{path} holds {', '.join(extra[:5])}, which {DESCRIPTION_NAME} does not list",
            expected="the files that were converted, and no others",
            remedy=f"remove what was added; or remove {DESCRIPTION_NAME}, and the folder is checked in full like any",
        )
    for name, file in there.items():
        wanted, found = description.files[name].bytes, file.stat().st_size
        if wanted != found:
            raise DataError(f"{file} has {found} bytes, {DESCRIPTION_NAME} says {wanted}", remedy=remedy)
        if hashed and name.startswith(_HASHED) and sha256_file(file) != description.files[name].sha256:
            raise DataError(f"{file} was changed since it was converted: its SHA-256 is another", remedy=remedy)


def read_layout(path: Path, description: Description, *, needs_queries: bool = True, hashed: bool = True) -> Layout:
    """Read queries and judgements of a converted folder.

    Args:
        path: The folder.
        description: Its `dataset.json`.
        needs_queries: Whether a corpus alone is refused.
        hashed: Whether the files of queries and judgements are hashed; another process has, where they are not.

    Raises:
        DataError: The folder is not as described, or has nothing to train on or to score.
    """
    check_files(path, description, hashed=hashed)
    queries: dict[str, Query] = {}
    lines: dict[str, int] = {}
    judgements = Judgements(queries)
    splits = {split: path / "qrels" / f"{split}.tsv" for split in beir.SPLITS}
    splits = {split: file for split, file in splits.items() if file.exists()}
    judgements.qrels.update({split: {} for split in beir.SPLITS if split in {*splits, *description.answer_splits}})
    if needs_queries and (not judgements.qrels or QUERIES not in description.files):
        raise DataError(
            f"{path} holds {', '.join(description.files)}: nothing to train on or to score",
            expected="queries, and judgements or answers of at least one split",
            remedy="convert the corpus together with its queries and judgements",
        )
    for line, record in read_jsonl(path / QUERIES) if QUERIES in description.files else ():
        query = beir.query_of(record, place(path / QUERIES, line))
        add_query(queries, lines, query, path / QUERIES, line)
        metadata = record.get("metadata")
        if isinstance(metadata, dict) and metadata.get("split") in description.answer_splits:
            judgements.qrels[metadata["split"]][query.id] = {}
    for split, file in splits.items():
        beir.read_judgements(file, split, judgements)
    return Layout(
        corpus=path / CORPUS,
        files=[],
        queries=queries,
        judgements=judgements,
        read_corpus=lambda: beir.read_corpus(path / CORPUS),
        answer_splits=frozenset(description.answer_splits),
        dropped=Counter(description.dropped),
        exclusions=beir.read_exclusions(path),
        read_given=partial(read_given, path, description) if TRAINING in description.files else None,
    )


def read_given(path: Path, description: Description) -> Iterator[GivenNegatives]:
    """Stream the negatives that a converted folder's training records give.

    Args:
        path: The folder.
        description: Its `dataset.json`.

    Raises:
        DataError: The records are not those that were converted.
    """
    file = path / TRAINING
    if sha256_file(file) != description.files[TRAINING].sha256:
        raise DataError(f"{file} was changed since it was converted: its SHA-256 is another", remedy=_REMEDY)
    for _, record in read_jsonl(file):
        docids: list[str] = record["negative_ids"]
        yield GivenNegatives(record["query_id"], docids, record.get("sources") or [[] for _ in docids])

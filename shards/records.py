"""The one form that every data set is read into: documents, queries, judgements by split.

Nothing here knows a file format; `shards.formats` reads each layout into a `Dataset`, checked as a whole before any
work begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of the corpus, such as a passage."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Query:
    """One question, with the strings that answer it where the data has them."""

    id: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GivenNegatives:
    """The negatives that the data themselves give a query.

    Attributes:
        qid: The query.
        docids: Documents, in the order of the data.
        proposed_by: Of each the retrievers that proposed it; empty where the data do not say.
    """

    qid: str
    docids: list[str]
    proposed_by: list[list[str]]


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file as it was when it was read; it is taken for unchanged while all of this is the same.

    Attributes:
        name: Its path below the data folder, with slashes.
        bytes: Its size.
        modified_ns: When its content was last written, as the file system has it.
        changed_ns: When anything of it was changed last, which no program can set back.
    """

    name: str
    bytes: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check of a whole data folder has found, for other processes that open it, and for a later start.

    Attributes:
        fingerprint: As of `Dataset`.
        num_documents: As of `Dataset`.
        dropped: Documents that were left out, by reason.
        files: The files that were read, as they were before the check; empty where nobody looked.
    """

    fingerprint: str
    num_documents: int
    dropped: dict[str, int] = field(default_factory=dict)
    files: tuple[SeenFile, ...] = ()


Qrels = dict[str, dict[str, int]]
"""qid -> docid -> grade; a grade above 0 is a positive."""


@dataclass
class Dataset:
    """A data folder that was read and found valid. The corpus stays on disk.

    Attributes:
        path: The folder.
        format: Its layout: `beir`, `dpr` or `msmarco`.
        queries: qid -> query, for the queries of all splits.
        qrels: split (`train`, `dev`, `test`) -> judgements. A query without any stands in a split only where answers
            alone are known of it.
        dropped: reason -> number of records that are left out of the above.
        fingerprint: SHA-256 over the source files, as 64 hexadecimal digits: equal exactly for equal data.
        num_documents: Number of documents that `documents` yields.
        read_documents: Starts a pass over the corpus file.
        exclusions: split -> qid -> docids that are known to be no negatives of the query, though no judgement calls
            them relevant: what other annotators or a stronger model found.
        read_given: Starts a pass over the negatives that the data give the queries of the train split; None where they
            give none.
        checked: What the check of the folder has found.
        find_blocks: Takes a number of documents and returns where each block of so many begins in the corpus file, in
            bytes; None where that file must be read in one go, and so may what it returns be.
        read_block: Starts a pass over the corpus file at such a place; takes the bytes and the documents before it.
    """

    path: Path
    format: str
    queries: dict[str, Query]
    qrels: dict[str, Qrels]
    dropped: Counter[str]
    fingerprint: str
    num_documents: int
    read_documents: Callable[[], Iterator[Document]] = field(repr=False)
    exclusions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    read_given: Callable[[], Iterator[GivenNegatives]] | None = field(default=None, repr=False)
    checked: Checked | None = field(default=None, repr=False)
    find_blocks: Callable[[int], list[int] | None] | None = field(default=None, repr=False)
    read_block: Callable[[int, int], Iterator[Document]] | None = field(default=None, repr=False)

    def documents(self) -> Iterator[Document]:
        """Stream the corpus; each call starts a new pass with the same documents in the same order.

        Raises:
            DataError: The file changed since it was checked, and can no longer be read.
        """
        return self.read_documents()

    def positives(self, split: str, qid: str) -> list[str]:
        """Return the docids that a split judges relevant to a query, in the order of the judgements.

        Args:
            split: `train`, `dev` or `test`.
            qid: The query.

        Returns:
            Docids with a grade above 0; empty for a split or a query that the data does not have.
        """
        return [docid for docid, grade in self.qrels.get(split, {}).get(qid, {}).items() if grade > 0]

"""Scores from a file: what another teacher says, brought to the queries and documents of this data.

Records by id are looked up by id, records by text by exactly that text. What does not belong to the training queries
or to the corpus is left out and counted:

- a record whose query is no training query;
- a score of a document that the corpus lacks;
- a pair that is scored again: the first score stays. Where the second differs, it is counted apart;
- a margin against another positive of a query than its first: the two are known up to a constant each.

A text that several queries or documents have stands for all of them. Everything else that is wrong with a file stops
the reading: an unknown form, a score that is no finite number, scores that a sigmoid has made.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config.distillation import DistillationConfig, ScoresAre
from engine.data.corpus import Data
from engine.data.teacher_scores import TeacherScores, is_published
from engine.errors import ConfigError, DataError
from engine.reliability.preemption import PREEMPTION
from shards.embeddings import Stamp
from shards.errors import listed
from shards.files import canonical_json, sha256_file
from shards.formats.lines import id_of, text_of
from shards.formats.scored import ScoredRecord, read_records, read_scored, scored_files, text_tables

CLIPPED = 1e-6
"""Probabilities nearer to 0 or 1 than this are taken as this near, before the logit: 13.8 is its largest number."""
_RECORDS_A_LOOK = 10_000


def require_readable(settings: DistillationConfig) -> None:
    """Refuse a path of scores at which there are none, or none in a known form, before any work is done.

    Of each file the first record is read; of pickles, which are read whole, none.

    Args:
        settings: Names the path, and says whether a pickle may be read.

    Raises:
        DataError: There are none, a pickle is not trusted, or a first record has an unknown form.
    """
    if settings.scores is None or is_published(settings.scores):
        return
    for file in scored_files(settings.scores):
        if not settings.trust_pickle:
            next(read_scored(file), None)


def require_comparable(scores: TeacherScores, settings: DistillationConfig) -> None:
    """Refuse scores that are known up to a constant a query, where the loss compares the scores themselves.

    Args:
        scores: A teacher's.
        settings: With the loss.

    Raises:
        ConfigError: It does.
    """
    if scores.margins_only and settings.loss == "mse":
        raise ConfigError(
            f"the scores of {scores.source} are margins between a query's documents, and loss mse compares scores",
            expected="a loss that a constant added to a query's scores does not change",
            remedy="set loss to kl or margin_mse, or score the pairs anew",
        )


def scores_stamp(settings: DistillationConfig, corpus_sha256: str) -> Stamp:
    """Return what scores from files come from: a hash of the files, and of how they are read, in place of weights.

    Args:
        settings: Names them.
        corpus_sha256: Of the corpus that they are brought to.

    Raises:
        DataError: There are none.
    """
    assert settings.scores is not None, "asked of scores from files alone"
    files = [
        *scored_files(settings.scores),
        *(file for files in text_tables(settings.scores).values() for file in files),
    ]
    read = {"files": [sha256_file(file) for file in files], "scores_are": settings.scores_are}
    return Stamp(settings.scores.name, hashlib.sha256(canonical_json(read).encode()).hexdigest(), corpus_sha256)


def import_scores(data: Data, settings: DistillationConfig, stamp: Stamp) -> TeacherScores:
    """Read scores from files; in about 100 bytes of memory for each score that is kept.

    Args:
        data: Training queries and corpus.
        settings: Names the files, and says how they are read.
        stamp: From `scores_stamp`.

    Returns:
        The scores, with counts of what was left out.

    Raises:
        DataError: A file cannot be read, its scores were made by a sigmoid, or none of them belongs to the data.
    """
    assert settings.scores is not None, "asked of scores from files alone"
    found = _Found(data, settings.scores)
    for number, record in enumerate(read_scored(settings.scores, trust_pickle=settings.trust_pickle)):
        if number % _RECORDS_A_LOOK == 0:
            PREEMPTION.require_none(f"read {settings.scores}")
        found.add(record)
    return found.scores(stamp, settings.scores_are)


class _Found:
    """What was found in records so far.

    Args:
        data: Training queries and corpus.
        path: Of the files.
    """

    def __init__(self, data: Data, path: Path) -> None:
        self._data, self._path = data, path
        self._lookup = _Lookup(data, path)
        self._rows, self._documents, self._values = array("q"), array("q"), array("d")
        self._counts: Counter[str] = Counter()
        self._first_positives: dict[int, str] = {}
        self._are_margins: bool | None = None

    def add(self, record: ScoredRecord) -> None:
        """Take a record in."""
        if self._are_margins not in (None, record.are_margins):
            raise DataError(
                f"{record.where} has {_kind(record.are_margins)}, "
                f"the records before it {_kind(not record.are_margins)}",
                expected="one of the two in all files",
                remedy="read them in two runs, or write scores for all",
            )
        self._are_margins = record.are_margins
        rows = self._lookup.rows(record)
        if not rows:
            self._counts["records of queries that are not trained on"] += 1
            return
        documents = [self._lookup.documents(record, place) for place in range(len(record.documents))]
        if record.are_margins and not documents[0]:
            self._counts["margins whose positive the corpus lacks"] += len(documents) - 1
            return
        for row in rows:
            if record.are_margins and self._first_positives.setdefault(row, record.documents[0]) != record.documents[0]:
                self._counts["margins against another positive of the query"] += len(documents) - 1
                continue
            for own, score in zip(documents, record.scores, strict=True):
                if not own:
                    self._counts["scores of documents that the corpus lacks"] += 1
                for document in own:
                    self._rows.append(row)
                    self._documents.append(document)
                    self._values.append(score)

    def scores(self, stamp: Stamp, scores_are: ScoresAre | None) -> TeacherScores:
        """Lay out what was found."""
        if not self._rows:
            raise DataError(
                f"no score of {self._path} belongs to the {len(self._data.train)} training queries and the "
                f"{self._data.shards.num_documents} documents of this data ({_told(self._counts)})",
                expected="scores of its training queries and of its documents, by its ids or by exactly its texts",
                remedy="check that the file was made for this corpus; ids of another copy of it may differ",
            )
        rows_P = np.frombuffer(self._rows, dtype=np.int64)
        documents_P = np.frombuffer(self._documents, dtype=np.int64)
        values_P = np.frombuffer(self._values, dtype=np.float64)
        logits_P = self._logits(values_P, scores_are)
        order_P = np.lexsort((documents_P, rows_P))  # stable: of equal pairs, the first of the files comes first
        rows_P, documents_P, logits_P = rows_P[order_P], documents_P[order_P], logits_P[order_P]
        again_P = np.zeros(len(rows_P), dtype=bool)
        again_P[1:] = (rows_P[1:] == rows_P[:-1]) & (documents_P[1:] == documents_P[:-1])
        differs_P = again_P & np.append(False, logits_P[1:] != logits_P[:-1])
        for what, count in (
            ("pairs scored again", int((again_P & ~differs_P).sum())),
            ("pairs scored again with another score", int(differs_P.sum())),
        ):
            self._counts[what] += count
        rows_P, documents_P, logits_P = rows_P[~again_P], documents_P[~again_P], logits_P[~again_P]
        rows_Q, firsts_Q = np.unique(rows_P, return_index=True)
        return TeacherScores(
            self._path.name,
            stamp,
            [self._data.train.queries[row].id for row in rows_Q.tolist()],
            np.append(firsts_Q, len(rows_P)).astype(np.int64),
            documents_P,
            logits_P.astype(np.float32),
            +self._counts,
            bool(self._are_margins),
        )

    def _logits(self, values_P: NDArray[np.float64], scores_are: ScoresAre | None) -> NDArray[np.float64]:
        """Return raw logits, or refuse what is none."""
        lowest, highest, margins = float(values_P.min()), float(values_P.max()), bool(self._are_margins)
        if scores_are == "probabilities":
            if margins or lowest < 0 or highest > 1:
                raise DataError(
                    f"{self._path} has {_kind(margins)} from {lowest:g} to {highest:g}; scores_are says probabilities",
                    expected="scores within 0 and 1, each of one document",
                    remedy="set scores_are to logits"
                    + (", or score the pairs by the ranker itself" if margins else ""),
                )
            clipped_P = np.clip(values_P, CLIPPED, 1 - CLIPPED)
            self._counts[f"probabilities clipped to {CLIPPED:g} from 0 or 1"] += int((clipped_P != values_P).sum())
            return np.log(clipped_P) - np.log1p(-clipped_P)
        # Margins stand here as what a negative lacks: two probabilities are 1 apart at most.
        squashed = highest <= 1 and lowest >= (-1 if margins else 0)
        if squashed and scores_are is None:
            raise _squashed(self._path, margins, lowest, highest)
        return values_P


def _squashed(path: Path, margins: bool, lowest: float, highest: float) -> DataError:
    """Describe scores that a sigmoid has made, whose softmax is nearly flat: a student would learn next to nothing."""
    turned_back = "" if margins else "; or set scores_are to probabilities, and they are turned back by the logit"
    return DataError(
        f"all {_kind(margins)} of {path} lie within {lowest:g} and {highest:g}, as those of a sigmoid do",
        expected="raw logits, whose differences are not pressed together",
        remedy="score again without the activation (of a CrossEncoder of sentence-transformers: activation_fn="
        f"torch.nn.Identity()){turned_back}; or set scores_are to logits where that is how this teacher scores",
    )


def _kind(are_margins: bool) -> str:
    return "margins" if are_margins else "scores"


def _told(counts: Mapping[str, int]) -> str:
    return listed([f"{count} {what}" for what, count in counts.items()], 5) or "it has no record"


class _Lookup:
    """From the ids or texts of records to training rows and documents.

    Args:
        data: Training queries and corpus.
        path: Of the files; where tables of texts lie in it, its ids are those of the tables, and not the data's.
    """

    def __init__(self, data: Data, path: Path) -> None:
        self._data = data
        self._row_of = {query.id: row for row, query in enumerate(data.train.queries)}
        self._rows_of_text: defaultdict[str, list[int]] = defaultdict(list)
        for row, query in enumerate(data.train.queries):
            self._rows_of_text[query.text].append(row)
        self._texts: _DocumentTexts | None = None
        tables = text_tables(path)
        self._rows_by_table = self._read_table(tables.get("query"), "query")
        self._documents_by_table = self._read_table(tables.get("document"), "document")

    def rows(self, record: ScoredRecord) -> list[int]:
        """Return the training rows of a record's query; none where it is not trained on."""
        if record.by_text:
            return self._rows_of_text.get(record.query, [])
        if self._rows_by_table is not None:
            return self._rows_by_table.get(record.query, [])
        row = self._row_of.get(record.query)
        return [] if row is None else [row]

    def documents(self, record: ScoredRecord, place: int) -> list[int]:
        """Return the documents that a record names at a place; none where the corpus lacks it."""
        name = record.documents[place]
        if record.by_text:
            return self._of_text(name)
        if self._documents_by_table is not None:
            return self._documents_by_table.get(name, [])
        document = self._data.shards.docids.index_of(name)
        return [] if document is None else [document]

    def _of_text(self, text: str) -> list[int]:
        if self._texts is None:
            self._texts = _DocumentTexts(self._data)
        return self._texts.documents(text)

    def _read_table(self, files: Iterable[Path] | None, what: str) -> dict[str, list[int]] | None:
        """Read which queries or documents of the data the ids of a table stand for, by their texts."""
        if files is None:
            return None
        found: dict[str, list[int]] = {}
        for file in files:
            for where, record in read_records(file):
                names = [name for name in (f"{what}_id", "_id", "id", "qid", "docid", "pid") if name in record]
                identifier = id_of(record[names[0]] if names else None, f"{what}_id", where)
                text = text_of(record, "text" if "text" in record else what, where)
                own = self._rows_of_text.get(text, []) if what == "query" else self._of_text(text)
                if own:
                    found[identifier] = own
        return found


class _DocumentTexts:
    """From exact texts to documents, in 16 bytes of memory for each text; made by one pass over the corpus.

    A document is known by its text, and where it has a title, also by title and text with a space between them.

    Args:
        data: The corpus.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        hashes, documents = array("Q"), array("q")
        for document in range(data.shards.num_documents):
            if document % _RECORDS_A_LOOK == 0:
                PREEMPTION.require_none("look texts up")
            for text in self._texts_of(document):
                hashes.append(_hash(text))
                documents.append(document)
        hashes_T = np.frombuffer(hashes, dtype=np.uint64)
        order_T = np.argsort(hashes_T, kind="stable")
        self._hashes_T, self._documents_T = hashes_T[order_T], np.frombuffer(documents, dtype=np.int64)[order_T]

    def documents(self, text: str) -> list[int]:
        """Return all documents with a text."""
        wanted = np.uint64(_hash(text))
        first = int(np.searchsorted(self._hashes_T, wanted, "left"))
        end = int(np.searchsorted(self._hashes_T, wanted, "right"))
        near = self._documents_T[first:end].tolist()
        return [document for document in near if text in self._texts_of(document)]  # two texts rarely share a hash

    def _texts_of(self, document: int) -> Iterator[str]:
        found = self._data.shards.document(document)
        yield found.text
        if found.title:
            yield f"{found.title} {found.text}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def choose_taught(
    data: Data, scores: TeacherScores, num_negatives: int
) -> tuple[list[int], list[NDArray[np.int64]], Counter[str]]:
    """Choose the queries that scores from a file are enough for: a positive, and as many negatives as a step draws.

    Args:
        data: Training queries.
        scores: Of a file.
        num_negatives: Of a step.

    Returns:
        Training rows; of each the documents that may be drawn as negatives, best first by the teacher; and how many
        queries are left out, by reason.

    Raises:
        DataError: No query is left.
    """
    rows, negatives, counts = list[int](), list[NDArray[np.int64]](), Counter[str]()
    for row, query in enumerate(data.train.queries):
        if query.id not in scores:
            counts["queries without any score"] += 1
            continue
        documents = scores.documents(query.id)
        if not np.isin(data.train.positives[row], documents).any():
            counts["queries without a scored positive"] += 1
            continue
        others = documents[~np.isin(documents, list(data.train.known(row)))]
        if len(others) < num_negatives:
            counts[f"queries with fewer than {num_negatives} scored negatives"] += 1
            continue
        rows.append(row)
        negatives.append(others[np.argsort(-scores.of(query.id, others), kind="stable")])
    if not rows:
        raise DataError(
            f"the scores of {scores.source} teach none of the {len(data.train)} training queries ({_told(counts)})",
            expected=f"for each query to train on a scored positive and at least {num_negatives} scored negatives",
            remedy="lower num_negatives to what the file has, or check that its positives are those of the qrels",
        )
    return rows, negatives, counts

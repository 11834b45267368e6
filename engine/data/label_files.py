"""Files that say more of the training queries' documents than the data's judgements: additions and relabels.

Both are read whole and checked before any work: an id that the data do not have is refused with its line, because a
file of another corpus would otherwise filter nothing without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.config.negatives import AdditionsFilterConfig, RelabelsFilterConfig
from engine.config.timetable import Timetable
from engine.data.corpus import Data, no_positive_left
from engine.data.teacher_scores import is_published
from engine.errors import ArtifactError, DataError
from engine.log import get_logger
from engine.run import Run, Stage
from shards.errors import listed
from shards.files import sha256_file
from shards.formats.lines import read_lines
from shards.records import Dataset

log = get_logger(__name__)
_NAMED = 3
"""Examples named in an error."""
_LABELS = ("positive", "out")


@dataclass(frozen=True, slots=True)
class Labels:
    """What a file says of documents, by query id.

    Attributes:
        positive: Documents that become positives: qid -> global document indices, in the file's order.
        out: Documents that are neither positive nor negative.
        num_other_queries: Lines about queries of the data that are not trained on.
    """

    positive: dict[str, list[int]] = field(default_factory=dict)
    out: dict[str, list[int]] = field(default_factory=dict)
    num_other_queries: int = 0


def read_additions(path: Path, dataset: Dataset, index_of: Callable[[str], int | None]) -> Labels:
    """Read judgements that the data do not hold: documents that are no negatives.

    Args:
        path: Two columns (query, document) or four (query, 0, document, grade); a grade of 0 says nothing.
        dataset: For its queries.
        index_of: Gives the global index of a docid; None for one that the corpus does not have.

    Returns:
        Labels, all of them `out`.

    Raises:
        DataError: The file is missing, empty or malformed, or names a query or document that the data do not have.
    """
    return _labels(path, _additions(path), dataset, index_of)


def read_relabels(path: Path, dataset: Dataset, index_of: Callable[[str], int | None]) -> Labels:
    """Read corrections of labels: three columns, query, document, and `positive` or `out`.

    Args:
        path: The file.
        dataset: For its queries.
        index_of: As for `read_additions`.

    Raises:
        DataError: As `read_additions`; or a document of a query has both labels.
    """
    return _labels(path, _relabels(path), dataset, index_of)


def require_label_files(timetable: Timetable, dataset: Dataset) -> None:
    """Refuse files of labels, rankings or scores that are not there or do not fit the queries, before any work.

    Documents are looked up later (`with_labels`), when the corpus has been read.

    Raises:
        DataError: As `read_additions`; a query is left without a positive; or a run file that candidates come from, or
            a folder of scores, does not exist.
    """
    _require_positives(timetable, dataset)
    for joint in timetable.joint.values():
        folder = joint.negatives.teacher_scores
        if folder is not None and not is_published(folder):
            raise DataError(
                f"{folder} holds no teacher scores",
                expected="a folder of scores that a run has published",
                remedy="correct the path, or leave it out",
            )
    for mining in timetable.minings:
        if mining.path and not Path(mining.path).is_file():
            raise DataError(
                f"{mining.path} does not exist, and candidates are to be read from it",
                expected="a TREC run file",
                remedy="correct the path, or put the file there",
            )


def _require_positives(timetable: Timetable, dataset: Dataset) -> None:
    """Read all files, and refuse those that would leave a judged training query without a positive."""
    numbers: dict[str, int] = {}

    def number_of(docid: str) -> int:
        return numbers.setdefault(docid, len(numbers))

    positives: dict[str, set[int]] = {}
    relabels = _files(timetable, RelabelsFilterConfig)
    for path, labels in _read_all(timetable, dataset, number_of).items():
        for qid in labels.positive.keys() | labels.out.keys() if path in relabels else ():
            judged, out = dataset.positives("train", qid), labels.out.get(qid, [])
            own = positives.setdefault(qid, set(map(number_of, judged)))
            own.update(labels.positive.get(qid, ()))
            own.difference_update(out)
            if judged and not own:
                raise no_positive_left(qid, len(out))


def with_labels(data: Data, timetable: Timetable) -> Data:
    """Let documents that files relabel be positives, or neither positives nor negatives, for whoever trains.

    Args:
        data: With the labels of the judgements.
        timetable: Whose pools name the files; those of additions are checked.

    Returns:
        The data with other training queries, or the same where no file relabels anything.

    Raises:
        DataError: A file does not fit the data, or a query is left without a positive.
    """
    for path, labels in _read_all(timetable, data.dataset, data.shards.docids.index_of).items():
        log.info(
            "%s: %d documents become positives, %d are taken out, %d lines are about queries that are not trained on",
            path,
            sum(map(len, labels.positive.values())),
            sum(map(len, labels.out.values())),
            labels.num_other_queries,
        )
        if path in _files(timetable, RelabelsFilterConfig):
            data = replace(data, train=data.train.relabelled(labels.positive, labels.out))
    return data


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """Result of the stage `labels`: which files the run began with."""

    sha256: dict[str, str]
    """By path."""


def require_same_labels(run: Run) -> None:
    """Record the files of labels at a run's first start, and refuse to go on with others.

    Raises:
        ArtifactError: A file has changed since.
    """
    paths = _files(run.timetable, AdditionsFilterConfig) + _files(run.timetable, RelabelsFilterConfig)
    if not paths:
        return
    recorded = run.once("labels", _hash_files, paths).sha256
    now: dict[str, str] = run.coordinator.only_rank_zero("labels: look", lambda: _hashes(paths))
    if changed := sorted(path for path in now if now[path] != recorded.get(path)):
        raise ArtifactError(
            f"{', '.join(changed)} changed since the run began",
            expected="the labels that its models have been trained on so far",
            remedy="restore the file, or choose another run.path",
        )


def _hash_files(stage: Stage, paths: list[Path]) -> LabelFiles:
    hashes: dict[str, str] = stage.run.coordinator.only_rank_zero(f"{stage.name}: hash", lambda: _hashes(paths))
    return LabelFiles(hashes)


def _hashes(paths: list[Path]) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in paths}


def _read_all(timetable: Timetable, dataset: Dataset, index_of: Callable[[str], int | None]) -> dict[Path, Labels]:
    found = {path: read_additions(path, dataset, index_of) for path in _files(timetable, AdditionsFilterConfig)}
    return found | {path: read_relabels(path, dataset, index_of) for path in _files(timetable, RelabelsFilterConfig)}


def _files(timetable: Timetable, kind: type[AdditionsFilterConfig | RelabelsFilterConfig]) -> list[Path]:
    filters = (one for joint in timetable.joint.values() for one in joint.negatives.filters)
    return list(dict.fromkeys(one.file for one in filters if isinstance(one, kind)))


def _additions(path: Path) -> Iterator[tuple[int, str, str, str]]:
    for line, text in read_lines(path):
        columns = text.split()
        grade = columns[3] if len(columns) == 4 else "1"
        if columns and (len(columns) not in (2, 4) or not grade.lstrip("-").isdecimal()):
            raise DataError(
                f"{path}, line {line} reads {text.strip()!r}",
                expected="two columns (query, document) or four (query, 0, document, whole grade)",
                remedy="write the line again; ids have no blanks in them",
            )
        if columns and int(grade) > 0:
            yield line, columns[0], columns[2 if len(columns) == 4 else 1], "out"


def _relabels(path: Path) -> Iterator[tuple[int, str, str, str]]:
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for line, text in read_lines(path):
        columns = text.split()
        if not columns:
            continue
        if len(columns) != 3 or columns[2] not in _LABELS:
            raise DataError(
                f"{path}, line {line} reads {text.strip()!r}",
                expected=f"three columns: query, document, and one of {', '.join(_LABELS)}",
                remedy="write the line again; ids have no blanks in them",
            )
        qid, docid, label = columns
        earlier, other = first.setdefault((qid, docid), (line, label))
        if other != label:
            raise DataError(
                f"{path} calls document {docid!r} of query {qid!r} {other!r} in line {earlier} and {label!r} in line "
                f"{line}",
                expected="one label for a document of a query",
                remedy="delete one of the two lines",
            )
        if earlier == line:
            yield line, qid, docid, label


def _labels(
    path: Path,
    rows: Iterator[tuple[int, str, str, str]],
    dataset: Dataset,
    index_of: Callable[[str], int | None],
) -> Labels:
    trained = dataset.qrels.get("train", {})
    labels, others = {label: dict[str, list[int]]() for label in _LABELS}, 0
    unknown_queries: list[str] = []
    unknown_documents: list[str] = []
    for line, qid, docid, label in rows:
        document = index_of(docid)
        if qid not in dataset.queries:
            unknown_queries.append(f"{qid!r} in line {line}")
        elif document is None:
            unknown_documents.append(f"{docid!r} in line {line}")
        elif qid not in trained:
            others += 1
        elif document not in (of_query := labels[label].setdefault(qid, [])):
            of_query.append(document)
    for what, unknown in (("queries", unknown_queries), ("documents", unknown_documents)):
        if unknown:
            raise DataError(
                f"{path} names {len(unknown)} {what} that the data do not have: {listed(unknown, _NAMED)}",
                expected="ids of these data",
                remedy="name the file that belongs to them, or delete these lines",
            )
    return Labels(labels["positive"], labels["out"], others)

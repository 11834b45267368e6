"""One training record a query: rows of a query may lie anywhere in the sources, so they meet in a bucket on disk.

Positives that a source does not give (a `top1000`, a run) come from the judgements of the split, and a negative that
is judged relevant is none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from shards.convert.appended import Appended, lines_of
from shards.files import write_atomically

_BUCKET_BYTES, _MAX_BUCKETS = 4 << 20, 256
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RawTraining:
    """A training record as one place of a source gives it, without documents that the corpus lacks.

    Attributes:
        qid: The query.
        positives: Docids.
        negatives: Docids.
        scores: Of each negative, or None.
        proposed_by: Of each negative the retrievers that proposed it.
        had_positives: Whether the source named positives, all of which may have been left out.
    """

    qid: str
    positives: list[str]
    negatives: list[str]
    scores: list[float | None]
    proposed_by: list[list[str]]
    had_positives: bool


@dataclass
class _Joined:
    positives: dict[str, None] = field(default_factory=dict)
    negatives: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    judged: dict[str, None] = field(default_factory=dict)
    is_given: bool = False
    from_judgements: bool = False

    def join(self, record: RawTraining) -> None:
        """Take a record; the first score of a negative counts, and the retrievers that proposed it add up."""
        self.is_given = True
        self.from_judgements |= not record.had_positives
        self.positives |= dict.fromkeys(record.positives)
        for docid, score, retrievers in zip(record.negatives, record.scores, record.proposed_by, strict=True):
            known = self.negatives.setdefault(docid, [])
            known += [retriever for retriever in retrievers if retriever not in known]
            if score is not None:
                self.scores.setdefault(docid, score)


def regroup(records: Iterable[RawTraining], qrels: Path, out: Path, *, size: int) -> tuple[int, Counter[str]]:
    """Join the records of each query and write `training/SPLIT.jsonl`.

    Args:
        records: Records in any order.
        qrels: The judgements of the split, with a header; may be missing.
        out: The file to write.
        size: About how many bytes the records have, by which the number of buckets is chosen.

    Returns:
        Number of records written, and reason -> number dropped.
    """
    dropped: Counter[str] = Counter()
    kept, folder = 0, out.with_name(out.name + ".buckets")
    number = min(_MAX_BUCKETS, max(1, -(-size // _BUCKET_BYTES)))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _spread(records, qrels, folder, number)
        with write_atomically(out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for bucket in range(number):
                for record in _joined(folder / str(bucket), dropped):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    kept += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kept, dropped


def _spread(records: Iterable[RawTraining], qrels: Path, folder: Path, number: int) -> None:
    with ExitStack() as stack:
        files = [Appended(folder / str(bucket), buffer_bytes=_BUFFER_BYTES) for bucket in range(number)]
        for file in files:
            stack.callback(file.close)

        def put(qid: str, row: tuple[Any, ...]) -> None:
            bucket = int.from_bytes(hashlib.blake2b(qid.encode(), digest_size=8).digest(), "big") % number
            files[bucket].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

        for line, row in enumerate(lines_of(qrels)) if qrels.exists() else ():
            qid, docid, grade = row.decode().rstrip("\n").split("\t")
            if line and int(grade) > 0:  # the first line is the header
                put(qid, (qid, docid))
        for record in records:
            put(record.qid, astuple(record))
        for file in files:
            file.flush()


def _joined(bucket: Path, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    queries: dict[str, _Joined] = {}
    for line in lines_of(bucket):
        record = json.loads(line)
        joined = queries.setdefault(record[0], _Joined())
        if len(record) == 2:
            joined.judged[record[1]] = None
        else:
            joined.join(RawTraining(*record))
    for qid, joined in queries.items():
        if not joined.is_given:
            continue
        if joined.from_judgements:
            joined.positives |= joined.judged
        negatives = [docid for docid in joined.negatives if docid not in joined.positives | joined.judged]
        if lost := len(joined.negatives) - len(negatives):
            dropped["negative that is judged relevant"] += lost
        if not joined.positives:
            dropped["training record without a positive"] += 1
            continue
        record = {"query_id": qid, "positive_ids": list(joined.positives), "negative_ids": negatives}
        if any(docid in joined.scores for docid in negatives):
            record["scores"] = [joined.scores.get(docid) for docid in negatives]
        if any(joined.negatives[docid] for docid in negatives):
            record["sources"] = [joined.negatives[docid] for docid in negatives]
        yield record

"""Where items go while the sources are read: one raw file for each output, and a log for each kind of id in it.

    raw/corpus.jsonl            ids: key (and same, where a document may rightly be given again)
    raw/queries.jsonl           ids: key, same
    raw/qrels/SPLIT.tsv         ids: query, document, pair, same
    raw/exclusions/SPLIT.tsv    likewise
    raw/training/SPLIT.jsonl    ids: query, document (several a row)
    raw/runs/NAME.trec          ids: query, document, pair

`same` is the hash of the whole record: a record that repeats as it is does no harm, one that contradicts an earlier one
does. What the logs say of repeated and unknown ids is worked out when all sources are read (`shards.convert.finish`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from json.encoder import encode_basestring as quoted
from pathlib import Path

from shards.convert.appended import Appended
from shards.convert.ids import IdLog
from shards.convert.options import Options
from shards.formats.canonical import CORPUS, QUERIES
from shards.formats.items import AnsweredQuery, Dropped, Item, Judgement, RunRow, Training
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, place
from shards.records import Document, Query

RAW, IDS = "raw", "ids"


def id_log(output: str, role: str) -> str:
    """Return the path of a log below the partial folder."""
    return f"{IDS}/{output}.{role}"


class Outputs:
    """All raw files and logs of a conversion.

    Args:
        folder: The partial folder.
        lengths: Path below it -> bytes that are known to be whole.
        rows: Output -> number of its records so far.
        dropped: Reason -> number of records dropped so far.
        options: The conversion's options.
        documents_may_repeat: Whether texts stand beside the training records, the same one beside many.
    """

    def __init__(
        self,
        folder: Path,
        lengths: dict[str, int],
        rows: dict[str, int],
        dropped: dict[str, int],
        options: Options,
        *,
        documents_may_repeat: bool,
    ) -> None:
        self.folder, self.rows, self.dropped = folder, Counter(rows), Counter(dropped)
        self._limit, self._documents_may_repeat = options.max_document_characters, documents_may_repeat
        self._files: dict[str, Appended] = {}
        self._logs: dict[str, IdLog] = {}
        for name, length in lengths.items():
            if name.startswith(IDS):
                self._logs[name] = IdLog(folder / name, length)
            else:
                self._files[name] = Appended(folder / name, length)

    @property
    def written_bytes(self) -> int:
        """Bytes handed to the operating system so far."""
        return sum(self.lengths().values())

    def lengths(self) -> dict[str, int]:
        """Return the present length of each file."""
        files = self._files | {name: log.file for name, log in self._logs.items()}
        return {name: file.length for name, file in sorted(files.items())}

    def sync(self) -> None:
        """Make all that was added survive a power cut."""
        for file in (*self._files.values(), *(log.file for log in self._logs.values())):
            file.sync()

    def close(self) -> None:
        """Close all files."""
        for file in (*self._files.values(), *(log.file for log in self._logs.values())):
            file.close()

    def check(self, items: Sequence[Item], path: Path, line: int) -> None:
        """Look at all items of a record before one of them is added.

        Raises:
            BadRecord: A document or query has no text, or a document too much.
        """
        for item in items:
            if isinstance(item, Document):
                if (not item.text or item.text.isspace()) and (not item.title or item.title.isspace()):
                    raise BadRecord(
                        "empty text",
                        f"{place(path, line)}: document {item.id!r} has neither text nor title",
                        remedy=f"give it one of them, {OR_LEAVE_OUT}",
                    )
                if len(item.text) + len(item.title) > self._limit:
                    raise BadRecord(
                        "document too long",
                        f"{place(path, line)}: document {item.id!r} has {len(item.text) + len(item.title)} characters",
                        expected=f"at most {self._limit}",
                        remedy="raise --max-document-characters, or look at that line: line ends may be lost",
                    )
            elif isinstance(item, (Query, AnsweredQuery)):
                query = item.query if isinstance(item, AnsweredQuery) else item
                if not query.text.strip():
                    raise BadRecord(
                        "empty text",
                        f"{place(path, line)}: query {query.id!r} has no text",
                        remedy=f"give it one, {OR_LEAVE_OUT}",
                    )

    def add(self, item: Item, source: int, line: int) -> None:
        """Write an item.

        Args:
            item: The item.
            source: Number of the source file, and
            line: line in it, for errors that show later.
        """
        if isinstance(item, Document):
            row = f'{{"_id": {quoted(item.id)}, "title": {quoted(item.title)}, "text": {quoted(item.text)}}}'
            if self._documents_may_repeat:
                self._write(CORPUS, row, source, line, key=item.id, same=row)
            else:
                self._write(CORPUS, row, source, line, key=item.id)
        elif isinstance(item, Query):
            self._write_query(item, None, source, line)
        elif isinstance(item, AnsweredQuery):
            self._write_query(item.query, item.split, source, line)
        elif isinstance(item, Judgement):
            row = f"{item.qid}\t{item.docid}\t{item.grade}"
            pair = f"{item.qid}\t{item.docid}"
            name = f"{item.folder}/{item.split}.tsv"
            self._write(name, row, source, line, query=item.qid, document=item.docid, pair=pair, same=row)
        elif isinstance(item, RunRow):
            row = f"{item.qid} Q0 {item.docid} {item.rank} {item.score} {item.tag}"
            pair = f"{item.qid}\t{item.docid}"
            self._write(f"runs/{item.name}.trec", row, source, line, query=item.qid, document=item.docid, pair=pair)
        elif isinstance(item, Training):
            self._write_training(item, source, line)
        elif isinstance(item, Dropped):
            self.dropped[item.reason] += 1

    def _write_query(self, query: Query, split: str | None, source: int, line: int) -> None:
        record: dict[str, object] = {"_id": query.id, "text": query.text}
        if query.answers:
            record["answers"] = list(query.answers)
        if split is not None:
            record["metadata"] = {"split": split}
        row = json.dumps(record, ensure_ascii=False)
        self._write(QUERIES, row, source, line, key=query.id, same=row)

    def _write_training(self, item: Training, source: int, line: int) -> None:
        name = f"training/{item.split}.jsonl"
        fields = [item.qid, item.positives, item.negatives, item.scores, item.proposed_by]
        self._write(name, json.dumps(fields, ensure_ascii=False), source, line, query=item.qid)
        log = self._log(name, "document")
        for docid in (*item.positives, *item.negatives):
            log.add(docid, source, line)

    def _write(self, name: str, row: str, source: int, line: int, **ids: str) -> None:
        path = f"{RAW}/{name}"
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = Appended(self.folder / path)
        file.write(row.encode() + b"\n")
        self.rows[name] += 1
        for role, identifier in ids.items():
            self._log(name, role).add(identifier, source, line)

    def _log(self, name: str, role: str) -> IdLog:
        path = id_log(name, role)
        log = self._logs.get(path)
        if log is None:
            log = self._logs[path] = IdLog(self.folder / path)
        return log

"""Records with named fields, JSON objects and rows of tables, to items: documents, queries, judgements, training.

The form of each training record is told by its fields:

    {"query_id", "query", "positive_passages": [{"docid", "title", "text"}], "negative_passages"}    texts inline
    {"query_id", "query_text", "positive_document_ids", "negative_document_ids"}                     by id
    {"qid", "pos": [ids], "neg": {retriever: [ids]}}                                                 by id, no text

Source: tevatron's formats (the first two), and the hard negatives published for MS MARCO by Sentence Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shards.convert.options import Options
from shards.convert.sources import Source
from shards.errors import DataError
from shards.formats.items import Item, Judgement, Training
from shards.formats.lines import answers_of, id_of, text_of
from shards.formats.stream import OR_LEAVE_OUT, BadRecord
from shards.records import Document, Query

_USUAL = {
    "document": (
        ("_id", "id", "docid", "doc_id", "pid", "passage_id", "document_id", "corpus_id"),
        ("text", "contents", "passage", "body", "content"),
    ),
    "query": (("_id", "id", "query_id", "qid", "query-id"), ("text", "query", "query_text", "question")),
    "judgement": (("query-id", "query_id", "qid"), ("corpus-id", "corpus_id", "docid", "doc_id", "pid", "document_id")),
}
_GRADES = ("score", "grade", "relevance", "label")


@dataclass(frozen=True)
class RecordParser:
    """Turns a record with named fields into items.

    Attributes:
        source: The file.
        what: `document`, `query` or `judgement`.
        first: The field of the id; of a judgement, of the query's id.
        second: The field of the text; of a judgement, of the document's id.
        third: The field of the title, of the answers or of the grade.
    """

    source: Source
    what: str
    first: str
    second: str
    third: str

    @property
    def columns(self) -> list[str]:
        """The fields that are read."""
        return [self.first, self.second, self.third, *(["metadata"] if self.what == "query" else [])]

    def __call__(self, record: dict[str, Any], where: str) -> list[Item]:
        """Return the record's items.

        Raises:
            BadRecord: A field is missing or malformed.
        """
        identifier = id_of(record.get(self.first), self.first, where)
        if self.what == "judgement":
            docid = id_of(record.get(self.second), self.second, where)
            return [Judgement(self.source.split, identifier, docid, _grade(record.get(self.third, 1), where))]
        # A null text is a document without text; a missing one is a record of another form.
        text = text_of(record, self.second, where, default="" if self.second in record else None)
        if self.what == "document":
            return [Document(identifier, text_of(record, self.third, where, default=""), text)]
        answers = record.get(self.third)
        if answers is None and isinstance(metadata := record.get("metadata"), dict):
            answers = metadata.get("answers")
        return [Query(identifier, text, answers_of(answers, where))]


def _grade(value: object, where: str) -> int:
    is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]  # one of the three, as was just found
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise BadRecord(
            "malformed grade",
            f"{where} has the grade {str(value)[:40]!r}",
            expected="a whole number; above 0 is relevant",
            remedy=f"write 1 for what is relevant and 0 for what is not, or whole grades, {OR_LEAVE_OUT}",
        )
    return int(number)


def record_parser(source: Source, names: list[str], options: Options) -> RecordParser:
    """Choose the fields of a file's records.

    Args:
        source: The file.
        names: The fields of its first record, or the columns of the table.
        options: The conversion's options, which may name the fields of documents.

    Raises:
        DataError: A field that is needed is not there.
    """
    what = source.kind.split()[-1].removesuffix("s").replace("querie", "query")
    ids, texts = _USUAL[what]
    if what != "document":
        thirds = _GRADES if what == "judgement" else ("answers",)
        third = next((name for name in thirds if name in names), thirds[0])
        return RecordParser(source, what, _field(source, names, ids, None), _field(source, names, texts, None), third)
    if options.title is not None and options.title not in names and source.kind.startswith("table"):
        raise _no_field(source, names, [options.title])
    return RecordParser(
        source,
        what,
        _field(source, names, ids, options.id, "--id"),
        _field(source, names, texts, options.text, "--text"),
        options.title or "title",
    )


def _field(source: Source, names: list[str], usual: tuple[str, ...], chosen: str | None, option: str = "") -> str:
    wanted = [chosen] if chosen is not None else list(usual)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise _no_field(source, names, wanted, option)
    return found


_QUESTIONS = {"query", "anchor", "question", "sentence1"}
_ANSWERS = {"positive", "answer", "passage", "context", "sentence2"}
"""What columns of pairs are called."""


def _no_field(source: Source, names: list[str], wanted: list[str], option: str = "") -> DataError:
    remedy = f"name the field by {option}" if option else "rename the field"
    if _QUESTIONS & {*names} and _ANSWERS & {*names}:
        remedy = (
            "these are pairs without ids: write each text of the one side to corpus.jsonl and of the other to "
            "queries.jsonl, as {_id, text}, and the pairs' ids to qrels/train.tsv as query-id, corpus-id, score"
        )
    return DataError(
        f"{source.path} has the fields {', '.join(map(repr, names)) or 'of no record'}",
        expected=f"one of {', '.join(map(repr, wanted))}",
        remedy=remedy,
    )


def training_of(record: dict[str, Any], split: str, where: str) -> list[Item]:
    """Turn a training record of one of the three forms into documents, a query, judgements and negatives.

    Raises:
        BadRecord: A field is missing or malformed.
    """
    if "qid" in record and "pos" in record:
        return [_hard_negatives(record, split, where)]
    qid = id_of(record.get("query_id"), "query_id", where)
    text = text_of(record, "query" if "query" in record else "query_text", where)
    items: list[Item] = [Query(qid, text, answers_of(record.get("answers"), where))]
    training = Training(split, qid)
    for name in ("positive_passages", "negative_passages"):
        for passage in _list(record, name, where):
            if not isinstance(passage, dict):
                raise BadRecord(
                    "malformed field",
                    f"{where} has {str(passage)[:40]!r} in {name!r}",
                    expected="passages, each an object with docid, title and text",
                    remedy=f"write the record again, {OR_LEAVE_OUT}",
                )
            docid = id_of(passage.get("docid"), "docid", where)
            items.append(Document(docid, text_of(passage, "title", where, default=""), text_of(passage, "text", where)))
            _add(training, docid, is_positive=name.startswith("positive"))
    for name in ("positive_document_ids", "negative_document_ids"):
        for value in _list(record, name, where):
            _add(training, id_of(value, name, where), is_positive=name.startswith("positive"))
    items += [Judgement(split, qid, docid, 1) for docid in training.positives]
    return [*items, training]


def _add(training: Training, docid: str, *, is_positive: bool) -> None:
    if is_positive:
        training.positives.append(docid)
    else:
        training.add_negative(docid, None, [])


def _hard_negatives(record: dict[str, Any], split: str, where: str) -> Training:
    training = Training(split, id_of(record["qid"], "qid", where))
    training.positives = [id_of(value, "pos", where) for value in _list(record, "pos", where)]
    proposed = record.get("neg")
    if not isinstance(proposed, dict):
        raise BadRecord(
            "malformed field",
            f"{where} has no object in 'neg'",
            expected="retriever -> ids",
            remedy=f'write the ids under a name, such as {{"bm25": [...]}}, {OR_LEAVE_OUT}',
        )
    places: dict[str, int] = {}
    for retriever in proposed:
        for value in _list(proposed, retriever, where):
            # Newer files pair each id with its score.
            docid = id_of(value.get("pid") if isinstance(value, dict) else value, "neg", where)
            if docid in places:
                training.proposed_by[places[docid]].append(retriever)
            else:
                places[docid] = len(training.negatives)
                training.add_negative(docid, None, [retriever])
    return training


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRecord(
            "malformed field",
            f"{where} has {str(value)[:40]!r} in {name!r}",
            expected="a list",
            remedy=f"write a single one in brackets, too, {OR_LEAVE_OUT}",
        )
    return value

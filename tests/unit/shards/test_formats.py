"""Every layout comes out in one form, and bad data stops at once with the file and the line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.convert.conversion import convert
from shards.convert.options import Options
from shards.errors import DataError
from shards.files import sha256_file
from shards.formats import canonical, json_list, open_dataset
from shards.formats.beir import write_folder
from shards.formats.json_list import read_json_list
from shards.records import Document, Query

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

WIKI_QA = Path(__file__).parents[4] / "shared" / "data" / "wiki-qa"

CORPUS = [
    {"_id": "d1", "title": "One", "text": "first text"},
    {"_id": "d2", "text": "second text"},
    {"_id": "d3", "title": "Three", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "one?", "answers": ["first"]},
    {"_id": "q2", "text": "two?", "metadata": {"answers": ["second", "2"]}},
    {"_id": "q3", "text": "three?"},
]
HEADER = "query-id\tcorpus-id\tscore\n"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "queries.jsonl", QUERIES)
    (folder / "qrels" / "train.tsv").write_text(f"{HEADER}q1\td1\t1\nq1\td2\t0\nq2\td2\t2\nq2\td3\t1\n")
    (folder / "qrels" / "test.tsv").write_text(f"{HEADER}q3\td3\t1\n")
    return folder


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(path, **options)
    assert caught.value.remedy, f"what to do about it is not told: {caught.value}"
    return str(caught.value)


# --- BEIR ------------------------------------------------------------------------------------------------------------


def test_beir_comes_out_in_the_one_form(beir: Path) -> None:
    dataset = open_dataset(beir)
    assert (dataset.format, dataset.num_documents) == ("beir", 3)
    assert list(dataset.documents()) == [
        Document("d1", "One", "first text"),
        Document("d2", "", "second text"),
        Document("d3", "Three", ""),  # its title is all its text
    ]
    assert list(dataset.documents()) == list(dataset.documents())
    assert dataset.queries["q1"] == Query("q1", "one?", ("first",))
    assert dataset.queries["q2"].answers == ("second", "2")
    assert dataset.qrels == {"train": {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2, "d3": 1}}, "test": {"q3": {"d3": 1}}}
    assert dataset.positives("train", "q1") == ["d1"]
    assert dataset.positives("train", "q2") == ["d2", "d3"]
    assert dataset.positives("dev", "q1") == []
    assert not dataset.dropped


def test_what_cannot_be_used_is_dropped_and_counted(beir: Path) -> None:
    write_jsonl(
        beir / "corpus.jsonl", [*CORPUS, {"_id": "d4", "title": " ", "text": None}, {"_id": "d5", "text": "\n"}]
    )
    write_jsonl(beir / "queries.jsonl", [*QUERIES, {"_id": "q4", "text": "four?"}, {"_id": "q5", "text": "five?"}])
    with open(beir / "qrels" / "train.tsv", "a") as file:
        file.write("q4\td1\t0\nq1\td1\t1\n\n")
    dataset = open_dataset(beir)
    assert dataset.dropped == {
        "document without text": 2,
        "query without a positive (train)": 1,
        "query without a judgement": 1,
        "judgement given twice": 1,
    }
    assert dataset.num_documents == 3 == len(list(dataset.documents()))
    assert sorted(dataset.queries) == ["q1", "q2", "q3"]
    assert sorted(dataset.qrels["train"]) == ["q1", "q2"]


def test_a_judgement_file_without_a_header_loses_no_row(beir: Path) -> None:
    """Readers that skip the first line silently lose a query of such files."""
    (beir / "qrels" / "test.tsv").write_text("q3\td3\t1\nq1\td1\t1\n")
    assert list(open_dataset(beir).qrels["test"]) == ["q3", "q1"]


def test_whole_numbers_are_ids_and_a_byte_order_mark_is_no_text(beir: Path) -> None:
    (beir / "corpus.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": 7, "text": "x"}\r\n')
    (beir / "qrels" / "train.tsv").write_text(f"{HEADER}q1\t7\t1.0\n")
    (beir / "qrels" / "test.tsv").unlink()
    dataset = open_dataset(beir)
    assert [document.id for document in dataset.documents()] == ["7"]
    assert dataset.qrels == {"train": {"q1": {"7": 1}}}


def test_a_line_ends_at_a_line_feed_only(beir: Path) -> None:
    """A passage with U+2028 or U+0085 shifted all records after it."""
    text = "before\u2028middle\x85after\x0b"
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({**record, "text": text}, ensure_ascii=False) + "\n" for record in CORPUS), encoding="utf-8"
    )
    assert [document.text for document in open_dataset(beir).documents()] == [text] * 3


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def appended(name: str, data: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.write(data if isinstance(data, bytes) else data.encode())

    return change


def emptied(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"") and None


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (removed("corpus.jsonl"), ["no file", "corpus.jsonl"]),
        (removed("queries.jsonl"), ["no file", "queries.jsonl"]),
        (emptied("corpus.jsonl"), ["corpus.jsonl is empty"]),
        (emptied("queries.jsonl"), ["queries.jsonl is empty"]),
        (emptied("qrels/test.tsv"), ["test.tsv is empty"]),
        (appended("corpus.jsonl", '{"_id": "d4", "text": \n'), ["corpus.jsonl line 4 is malformed JSON", "column"]),
        (appended("queries.jsonl", '["q4", "x"]\n'), ["queries.jsonl line 4", "list in place of an object"]),
        (appended("corpus.jsonl", '{"_id": "d4"}\n'), ["corpus.jsonl line 4 has no field 'text'", "'_id'"]),
        (
            appended("corpus.jsonl", '{"text": "x"}\n'),
            ["corpus.jsonl line 4 has no field '_id'", "there are 'text'", "--id"],
        ),
        (appended("queries.jsonl", '{"_id": "q4"}\n'), ["queries.jsonl line 4 has no field 'text'"]),
        (appended("corpus.jsonl", '{"_id": "d4", "text": 3}\n'), ["line 4 has 3 in field 'text'", "a string"]),
        (
            appended("corpus.jsonl", '{"_id": "d 4", "text": "x"}\n'),
            ["line 4", "'d 4'", "without white space", "_ for each blank", "run files are split"],
        ),
        (appended("corpus.jsonl", '{"_id": "", "text": "x"}\n'), ["line 4", "not empty"]),
        (appended("corpus.jsonl", '{"_id": true, "text": "x"}\n'), ["line 4 has True in field '_id'"]),
        (appended("corpus.jsonl", '{"_id": "d4", "text": "\\ud83d"}\n'), ["line 4", "surrogate"]),
        (
            appended("queries.jsonl", '{"_id": "q4", "text": "x", "answers": "a"}\n'),
            ["line 4", "list of strings", "in brackets"],
        ),
        (appended("corpus.jsonl", b'{"_id": "d4", "text": "\xff"}\n'), ["corpus.jsonl line 4 is not UTF-8", "0xff"]),
        (appended("corpus.jsonl", '{"_id": "d2", "text": "x"}\n'), ["document id 'd2'", "line 2", "line 4"]),
        (appended("queries.jsonl", '{"_id": "q3", "text": "x"}\n'), ["query id 'q3'", "line 3", "line 4"]),
        (appended("queries.jsonl", '{"_id": "q4", "text": " "}\n'), ["line 4", "'q4' has no text"]),
        (appended("qrels/train.tsv", "q9\td1\t1\n"), ["train.tsv line 6", "query 'q9'", "3 queries"]),
        (appended("qrels/train.tsv", "q1\td9\t1\n"), ["train.tsv line 6", "document 'd9'", "3 documents"]),
        (appended("qrels/train.tsv", "q1 d1 1\n"), ["train.tsv line 6 has 1 columns", "put tabs where the blanks are"]),
        (appended("qrels/train.tsv", "q1\td1\n"), ["train.tsv line 6 has 2 columns", "add the score", "convert"]),
        (appended("qrels/train.tsv", "q1\t0\td1\t1\n"), ["train.tsv line 6 has 4 columns", "let `sparring convert`"]),
        (appended("qrels/train.tsv", "q1\t0\td1\t1\t2\n"), ["train.tsv line 6 has 5 columns", "--on-error drop"]),
        (appended("qrels/train.tsv", "q1\td1\tyes\n"), ["train.tsv line 6", "'yes'", "whole number"]),
        (appended("qrels/train.tsv", "q1\td1\t1.5\n"), ["train.tsv line 6", "'1.5'", "whole grades"]),
        (appended("qrels/train.tsv", "q1\td1\t2\n"), ["train.tsv line 6", "grade 2", "1"]),
        (replaced("qrels/test.tsv", "d3\t1", "d3\t0"), ["split 'test'", "no usable query"]),
        (replaced("qrels/test.tsv", "q3\td3\t1\n", ""), ["split 'test'", "no usable query"]),
        (replaced("corpus.jsonl", '"title": "Three", ', ""), ["corpus.jsonl line 3", "'d3'", "train.tsv line 5"]),
    ],
)
def test_bad_data_is_refused_with_file_and_line(beir: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    change(beir)
    message = refusal(beir)
    assert [part for part in parts if part not in message] == [], message


def test_a_first_row_of_another_form_is_not_taken_for_a_header(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text("q3 d3 1\n")
    assert "test.tsv line 1 has 1 columns" in refusal(beir)


def test_documents_that_the_corpus_lacks_can_be_dropped(beir: Path) -> None:
    appended("qrels/train.tsv", "q1\td9\t1\nq3\td8\t1\n")(beir)
    dataset = open_dataset(beir, on_unknown_docid="drop")
    assert dataset.qrels["train"] == {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2, "d3": 1}}
    assert dataset.dropped["judgement of a document that the corpus lacks"] == 2
    assert dataset.dropped["query without a positive (train)"] == 1


def test_ids_with_one_hash_are_told_apart(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.formats.hash", lambda text: 1, raising=False)
    assert open_dataset(beir).num_documents == 3
    appended("corpus.jsonl", '{"_id": "d1", "text": "x"}\n')(beir)
    assert "'d1' is on line 1 and on line 4" in refusal(beir)


def test_the_fingerprint_changes_with_every_file_and_with_nothing_else(beir: Path, tmp_path: Path) -> None:
    before = open_dataset(beir).fingerprint
    assert len(before) == 64
    beir = beir.rename(tmp_path / "elsewhere")
    (beir / "notes.txt").write_text("not data")
    os.utime(beir / "corpus.jsonl", (0, 0))
    seen = {before}
    assert open_dataset(beir).fingerprint == before
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"):
        appended(name, "\n")(beir)
        seen.add(open_dataset(beir).fingerprint)
    assert len(seen) == 5


def test_no_split_no_folder_and_no_layout_are_errors(beir: Path, tmp_path: Path) -> None:
    for file in (beir / "qrels").iterdir():
        file.unlink()
    assert "none of train.tsv, dev.tsv, test.tsv" in refusal(beir)
    assert "no folder" in refusal(tmp_path / "missing")
    assert "data.path" in refusal(beir / "corpus.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    assert "no known layout" in refusal(tmp_path)
    assert f"name {beir}, which has one" in refusal(tmp_path), "an archive is often unpacked into a folder of its own"
    (beir / "collection.tsv").write_text("1\tx\n")
    assert "data.format" in refusal(beir)
    shutil.rmtree(beir)
    assert f"sparring convert {tmp_path} --out DIR" in refusal(tmp_path)
    assert "no file" in refusal(tmp_path, format="beir")


@pytest.mark.parametrize(("name", "meant"), [("validation.tsv", "dev.tsv"), ("training.tsv.gz", "train.tsv.gz")])
def test_a_split_by_another_name_is_not_left_out(beir: Path, name: str, meant: str) -> None:
    """A run with qrels/validation.tsv had no dev split, and chose its models by nothing, without a word."""
    (beir / "qrels" / "train.tsv").rename(beir / "qrels" / name.removesuffix(".gz"))
    if name.endswith(".gz"):
        plain = beir / "qrels" / name.removesuffix(".gz")
        plain.with_name(name).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert f"rename it to {meant}" in refusal(beir)


def test_a_written_folder_reads_back_and_replaces_only_its_like(tmp_path: Path) -> None:
    documents = [Document("d1", "Tïtle", "a\tb\n"), Document("d2", "", "text")]
    queries = [Query("q1", "one?", ("a",)), Query("q2", "two?")]
    qrels = {"train": {"q1": {"d1": 1, "d2": 0}}, "test": {"q2": {"d2": 3}}}
    folder = tmp_path / "data"
    for _ in range(2):
        write_folder(folder, documents, queries, qrels, {"made of": "nothing"})
    dataset = open_dataset(folder)
    assert list(dataset.documents()) == documents
    assert list(dataset.queries.values()) == queries
    assert dataset.qrels == qrels
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="choose another folder"):
        write_folder(tmp_path / "mine", documents, queries, qrels, {})
    assert (tmp_path / "mine" / "precious.txt").exists()


def test_a_folder_whose_writing_fails_is_not_there(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "data", [Document("d1", "", "old")], [Query("q1", "one?")], {"train": {"q1": {"d1": 1}}}, {}
    )
    with pytest.raises(UnicodeEncodeError):
        write_folder(tmp_path / "data", [Document("d1", "", "\ud83d")], [], {}, {})
    assert [document.text for document in open_dataset(tmp_path / "data").documents()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "data", os.rename
    qrels = {"train": {"q1": {"d1": 1}}}
    write_folder(folder, [Document("d1", "", "old")], [Query("q1", "one?")], qrels, {})

    def rename_all_but_the_new_one(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr("shards.formats.beir.os.rename", rename_all_but_the_new_one)
    with pytest.raises(OSError, match="no"):
        write_folder(folder, [Document("d1", "", "new")], [Query("q1", "one?")], qrels, {})
    assert [document.text for document in open_dataset(folder).documents()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.skipif(not WIKI_QA.is_dir(), reason="the shared data set is not here")
def test_wiki_qa_opens_whole() -> None:
    dataset = open_dataset(WIKI_QA)
    assert dataset.num_documents == 8561
    assert len(dataset.queries) == sum(map(len, dataset.qrels.values())) == 17501
    assert set(dataset.qrels) == {"train", "dev", "test"}
    assert not dataset.dropped


# --- MS MARCO --------------------------------------------------------------------------------------------------------


@pytest.fixture
def msmarco(tmp_path: Path) -> Path:
    folder = tmp_path / "msmarco"
    folder.mkdir()
    (folder / "collection.tsv").write_text('0\t"An open quote\n1\tA "quoted" word\tand a tab\n2\tplain\n')
    (folder / "queries.train.tsv").write_text("10\tone\n11\ttwo\n12\tnever judged\n")
    (folder / "qrels.train.tsv").write_text("10\t0\t0\t1\n11\t0\t1\t1\n11\t0\t2\t1\n")
    (folder / "queries.dev.small.tsv").write_text("20\tdev\n")
    (folder / "qrels.dev.small.tsv").write_text("20 0 2 3\n")
    return folder


def test_msmarco_comes_out_in_the_one_form(msmarco: Path) -> None:
    """Read as CSV, the open quote swallows the passages after it."""
    dataset = open_dataset(msmarco)
    assert dataset.format == "msmarco"
    assert [document.text for document in dataset.documents()] == [
        '"An open quote',
        'A "quoted" word and a tab',
        "plain",
    ]
    assert dataset.qrels == {"train": {"10": {"0": 1}, "11": {"1": 1, "2": 1}}, "dev": {"20": {"2": 3}}}
    assert dataset.dropped == {"query without a judgement": 1}
    assert sorted(dataset.queries) == ["10", "11", "20"]


def test_judgements_of_two_columns_are_read(msmarco: Path) -> None:
    (msmarco / "qrels.train.tsv").write_text("10\t0\n11\t2\n")
    assert open_dataset(msmarco).qrels["train"] == {"10": {"0": 1}, "11": {"2": 1}}


def test_the_small_dev_split_goes_before_the_large_one(msmarco: Path) -> None:
    (msmarco / "queries.dev.tsv").write_text("21\tlarge\n")
    (msmarco / "qrels.dev.tsv").write_text("21\t0\t2\t1\n")
    assert list(open_dataset(msmarco).qrels["dev"]) == ["20"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (appended("collection.tsv", "3 no tab\n"), ["collection.tsv line 4 has no tab"]),
        (appended("collection.tsv", "1\tagain\n"), ["document id '1'", "line 2", "line 4"]),
        (appended("qrels.train.tsv", "10 0 1\n"), ["qrels.train.tsv line 4 has 3 columns"]),
        (appended("qrels.train.tsv", "10\t0\t99\t1\n"), ["qrels.train.tsv line 4", "'99'"]),
        (appended("qrels.train.tsv", "99\t0\t1\t1\n"), ["qrels.train.tsv line 4", "'99'"]),
        (appended("queries.dev.small.tsv", "10\tanother text\n"), ["queries.dev.small.tsv line 2", "another text"]),
        (removed("queries.train.tsv"), ["no file", "queries.train.tsv"]),
        (removed("collection.tsv"), ["no known layout"]),
    ],
)
def test_bad_msmarco_is_refused(msmarco: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    change(msmarco)
    message = refusal(msmarco)
    assert [part for part in parts if part not in message] == [], message


# --- DPR -------------------------------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {
        "dataset": "nq",
        "question": "who\u2019s first\nthen",
        "answers": ["One"],
        "positive_ctxs": [
            {"title": "A", "text": "a", "score": 1000, "title_score": 1, "passage_id": "1"},
            {"title": "B", "text": "b", "score": 2000, "title_score": 0, "passage_id": "2"},
        ],
        "negative_ctxs": [],
        "hard_negative_ctxs": [{"psg_id": "3", "text": '[{"', "title": "", "score": 1}],
    },
    {"question": "nothing found", "answers": ["x"], "positive_ctxs": [], "hard_negative_ctxs": []},
    {"question": "second", "answers": ["Two"], "positive_ctxs": [{"psg_id": "2", "title": "", "text": ""}]},
    {"question": "third", "answers": [], "positive_ctxs": [{"id": 3, "title": "", "text": ""}]},
]


@pytest.fixture
def dpr(tmp_path: Path) -> Path:
    folder = tmp_path / "dpr"
    folder.mkdir()
    (folder / "psgs_w100.tsv").write_text(
        'id\ttext\ttitle\n1\t"say ""so"", twice"\tA\n2\tplain "word"\t"B ""b"""\n3\t"over\ntwo lines"\tC\n'
    )
    (folder / "biencoder-nq-train.json").write_text(json.dumps(RECORDS, indent=4))
    (folder / "nq-dev.qa.csv").write_text("who is it\t['One', \"O'Two\"]\n")
    (folder / "nq-test.qa.csv").write_text('what\u2019s that\t"[""Thr\u00e9e"", ""3""]"\nunknown\t[]\n')
    return folder


def test_dpr_comes_out_in_the_one_form(dpr: Path) -> None:
    dataset = open_dataset(dpr)
    assert dataset.format == "dpr"
    assert list(dataset.documents()) == [
        Document("1", "A", 'say "so", twice'),
        Document("2", 'B "b"', 'plain "word"'),
        Document("3", "C", "over two lines"),
    ]
    # The first positive is the gold one; the others only contain an answer, whatever their BM25 score.
    assert dataset.qrels["train"] == {"train-1": {"1": 1}, "train-3": {"2": 1}, "train-4": {"3": 1}}
    assert dataset.queries["train-1"] == Query("train-1", "who's first then", ("One",))
    assert dataset.dropped == {
        "question without a positive passage (train)": 1,
        "question without an answer (test)": 1,
    }


def test_questions_with_answers_only_stay_to_be_scored_by_answer_match(dpr: Path) -> None:
    dataset = open_dataset(dpr)
    assert dataset.qrels["dev"] == {"dev-1": {}}
    assert dataset.qrels["test"] == {"test-1": {}}
    assert dataset.queries["dev-1"].answers == ("One", "O'Two")
    assert dataset.queries["test-1"] == Query("test-1", "what's that", ("Thr\u00e9e", "3"))
    assert dataset.positives("dev", "dev-1") == []


def test_where_a_split_has_passages_its_answer_file_is_not_read(dpr: Path) -> None:
    (dpr / "biencoder-nq-dev.json").write_text(json.dumps(RECORDS[2:]))
    dataset = open_dataset(dpr)
    assert dataset.qrels["dev"] == {"dev-1": {"2": 1}, "dev-2": {"3": 1}}


def test_answers_are_read_as_literals_and_never_run(dpr: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (dpr / "nq-test.qa.csv").write_text(f"who\t[open('{ran}', 'w').name]\n")
    assert "nq-test.qa.csv line 1" in refusal(dpr)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (replaced("biencoder-nq-train.json", '"question": "second"', '"query": "second"'), ["line 42", "'question'"]),
        (replaced("biencoder-nq-train.json", '"psg_id": "2"', '"pid": "2"'), ["line 42", "gold", "passage_id"]),
        (replaced("biencoder-nq-train.json", '"psg_id": "2"', '"psg_id": "9"'), ["line 42", "document '9'"]),
        (replaced("biencoder-nq-train.json", '"score": 2000,', '"score": 2000'), ["line 20 is malformed JSON"]),
        (appended("biencoder-nq-train.json", "]"), ["after the end of the list"]),
        (appended("psgs_w100.tsv", "4\tonly\n"), ["psgs_w100.tsv line 6 has 2 columns", "id, text, title"]),
        (appended("psgs_w100.tsv", '4\t"never closed\tD\n5\tx\tE\n'), ["psgs_w100.tsv line 7", "quote"]),
        (appended("psgs_w100.tsv", "2\tagain\tD\n"), ["document id '2'"]),
        (replaced("psgs_w100.tsv", "id\ttext", "id\tbody"), ["line 1 is the header"]),
        (appended("nq-test.qa.csv", "three\tcolumns\there\n"), ["nq-test.qa.csv line 3 has 3 columns"]),
        (appended("nq-test.qa.csv", "who\t'not a list'\n"), ["nq-test.qa.csv line 3", "list of strings"]),
        (removed("psgs_w100.tsv"), ["no passages"]),
        (lambda folder: (folder / "biencoder-trivia-train.json").write_text("[]") and None, ["one data set"]),
        (lambda folder: (folder / "biencoder-nq-train.json").write_text("[]") and None, ["'train'", "no usable query"]),
        (lambda folder: (folder / "biencoder-nq-train.json").write_text("{}") and None, ["'{' in place of '['"]),
    ],
)
def test_bad_dpr_is_refused(dpr: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    change(dpr)
    message = refusal(dpr)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 4])
def test_a_json_list_is_streamed_the_same_for_any_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    """Chunks cut objects, strings, escapes, numbers and characters of several bytes in two."""
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", chunk)
    records = [{"a": '\u00e9\u2028\U0001f600]},{"\\', "b": [{}, -1.5e-7, None, float("inf")]}, {}, *RECORDS]
    path = tmp_path / "list.json"
    for ensure_ascii in (True, False):
        path.write_text(json.dumps(records, indent=indent, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
        found = list(read_json_list(path))
        assert [record for _, record in found] == records
        lines = path.read_text(encoding="utf-8").split("\n")
        assert all(lines[line - 1].lstrip(" ,[").startswith("{") for line, _ in found)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b'[{"a": 1}', "line 1 is malformed JSON: the file ends early"),
        (b'[{"a": 1},\n{"a": "x', "line 2 is malformed JSON: Unterminated string"),
        (b'[{"a": 1}\n\n{"a": 2}]', "line 3 is malformed JSON: '{' in place of ',' or ']'"),
        (b'[{"a": 1},\n]', "line 2 is malformed JSON: ']' in place of an object"),
        (b"[1]", "'1' in place of an object"),
        (
            b'[{"a":\n' + b" " * 100 + b"oops, and much more text after it" * 9,
            "line 2 is malformed JSON: Expecting value",
        ),
        (b'[{"a": 1},\n{"a": "\xff"}]', "line 2 is not UTF-8: it has the byte 0xff"),
        (b"  \n ", "line 2 is malformed JSON: the file ends early"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_broken_json_list_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, part: str, chunk: int
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", chunk)
    path = tmp_path / "list.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_json_list(path))
    assert part in str(caught.value)


def test_an_empty_json_list_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(" [ ] \n")
    assert list(read_json_list(tmp_path / "list.json")) == []


# --- compressed and converted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("layout", ["beir", "msmarco", "dpr"])
def test_a_layout_of_compressed_files_is_the_same_data(
    request: pytest.FixtureRequest, layout: str, suffix: str
) -> None:
    folder = request.getfixturevalue(layout)
    plain = open_dataset(folder)
    documents = list(plain.documents())
    compress = gzip.compress if suffix == ".gz" else zstd.compress
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(path.name + suffix).write_bytes(compress(path.read_bytes()))
        path.unlink()
    packed = open_dataset(folder)
    assert list(packed.documents()) == documents
    assert (packed.queries, packed.qrels, packed.dropped) == (plain.queries, plain.qrels, plain.dropped)
    assert packed.format == layout


def test_a_file_and_its_compressed_form_cannot_both_be_meant(beir: Path) -> None:
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert "corpus.jsonl and corpus.jsonl.gz" in refusal(beir)


def test_several_compressed_parts_in_one_file_are_all_read(beir: Path) -> None:
    """Some tools compress in blocks; a reader that stops at the first one's end loses the rest."""
    lines = (beir / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    (beir / "corpus.jsonl").unlink()
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstd.compress)):
        path = beir / f"corpus.jsonl{suffix}"
        path.write_bytes(b"".join(compress(line) for line in lines))
        assert open_dataset(beir).num_documents == 3
        path.write_bytes(b"".join(compress(line) for line in lines)[:-3])
        assert "is cut short" in refusal(beir)
        path.unlink()


def describe(folder: Path) -> dict[str, Any]:
    """Write what a conversion would say of a folder in the BEIR layout."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    description = canonical.Description(
        inputs=[],
        options={},
        kept={"corpus.jsonl": 3},
        dropped={"document given twice": 4},
        ignored={},
        answer_splits=[],
        files={name: canonical.Contents(path.stat().st_size, sha256_file(path)) for name, path in files.items()},
    )
    record = description.as_dict()
    (folder / "dataset.json").write_text(json.dumps(record))
    return record


def test_a_converted_folder_is_opened_without_a_look_at_its_corpus(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a corpus of 13 GB the look took minutes, on every rank of every start."""
    checked = open_dataset(beir)
    describe(beir)
    opened: list[str] = []
    sha256 = sha256_file
    monkeypatch.setattr(
        "shards.formats.canonical.sha256_file", lambda path: (opened.append(path.name), sha256(path))[1]
    )
    monkeypatch.setattr("shards.formats.beir.read_corpus", lambda path: opened.append("the corpus"))
    dataset = open_dataset(beir)
    assert "corpus.jsonl" not in opened
    assert "the corpus" not in opened
    assert "queries.jsonl" in opened
    assert dataset.num_documents == 3
    assert (dataset.fingerprint, dataset.qrels, dataset.queries) == (
        checked.fingerprint,
        checked.qrels,
        checked.queries,
    )
    assert dataset.dropped == {"document given twice": 4}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (appended("corpus.jsonl", "\n"), "corpus.jsonl has 134 bytes, dataset.json says 133"),
        (removed("qrels/test.tsv"), "lacks qrels/test.tsv"),
        (appended("qrels/dev.tsv", "q1\td1\t1\n"), "holds qrels/dev.tsv, which dataset.json does not list"),
        (replaced("qrels/train.tsv", "d1\t1", "d1\t2"), "train.tsv was changed since it was converted"),
        (replaced("dataset.json", '"version": 1', '"version": 2'), "is damaged: it has version 2"),
        (replaced("dataset.json", '"sha256": "', '"sha256": "0'), "its fingerprint is not that of the files"),
        (replaced("dataset.json", '"kept"', '"lost"'), "is damaged: kept: Field required"),
        (replaced("dataset.json", '"bytes": 133', '"bytes": "133"'), "is damaged: files.corpus.jsonl.bytes"),
        (appended("dataset.json", "}"), "is damaged"),
    ],
)
def test_a_converted_folder_that_was_changed_is_refused(beir: Path, change: Callable[[Path], None], part: str) -> None:
    describe(beir)
    change(beir)
    assert part in refusal(beir)


def test_what_is_made_of_a_converted_folder_or_said_by_another_program_does_not_count(beir: Path) -> None:
    describe(beir)
    (beir / "shards" / "model").mkdir(parents=True)
    (beir / "shards" / "model" / "manifest.json").write_text("{}")
    (beir / ".hidden").write_text("x")
    assert open_dataset(beir).num_documents == 3
    (beir / "dataset.json").write_text('{"name": "of another program"}')
    assert open_dataset(beir).dropped == {}


# --- a corpus alone --------------------------------------------------------------------------------------------------


def corpora(folder: Path) -> dict[str, Path]:
    """A corpus in each layout, without queries or judgements."""
    found = {name: folder / name for name in ("beir", "dpr", "msmarco", "converted")}
    for path in found.values():
        path.mkdir()
    write_jsonl(found["beir"] / "corpus.jsonl", CORPUS)
    (found["dpr"] / "psgs_w100.tsv").write_text("id\ttext\ttitle\nd1\tfirst text\tOne\nd2\tsecond text\t\n")
    (found["msmarco"] / "collection.tsv").write_text("d1\tfirst text\nd2\tsecond text\n")
    found["converted"].rmdir()
    convert([found["beir"] / "corpus.jsonl"], found["converted"], Options())
    return found


@pytest.mark.parametrize("layout", ["beir", "dpr", "msmarco", "converted"])
def test_a_corpus_alone_is_read_where_no_queries_are_needed(tmp_path: Path, layout: str) -> None:
    path = corpora(tmp_path)[layout]
    assert refusal(path)
    dataset = open_dataset(path, needs_queries=False)
    assert (dataset.queries, dataset.qrels) == ({}, {})
    assert [document.id for document in dataset.documents()][:2] == ["d1", "d2"]
    assert dataset.num_documents == len(list(dataset.documents()))


def test_queries_that_are_there_are_read_though_none_are_needed(beir: Path) -> None:
    """So that a folder has one fingerprint, and its prepared shards serve every recipe."""
    with_them, without = open_dataset(beir), open_dataset(beir, needs_queries=False)
    assert with_them.fingerprint == without.fingerprint
    assert with_them.qrels == without.qrels

"""Every format of the public downloads comes out as the one folder, with nothing lost in silence."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from shards.convert.conversion import Report, convert
from shards.convert.options import Options
from shards.errors import DataError
from shards.formats import open_dataset
from shards.records import Document, GivenNegatives, Query

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Write files; a list is jsonl, a name in .gz or .zst is compressed."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        data = content.encode()
        compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix)
        path.write_bytes(compress(data) if compress else data)
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


pytestmark = pytest.mark.usefixtures("no_fsync")


def converted(source: Path, **options: Any) -> Report:
    return convert([source], source.parent / "out", Options(**options))


MSMARCO = {
    "collection.tsv": '0\t"An open quote\n1\tA "quoted" word\tand a tab\n2\tplain\n3\tfour\n',
    "queries.train.tsv": "10\tone\n11\ttwo\n12\tnever judged\n",
    "qrels.train.tsv": "10\t0\t0\t1\n11\t0\t1\t1\n11\t0\t2\t1\n",
    "queries.dev.small.tsv": "20\tdev\n",
    "qrels.dev.small.tsv": "20 0 2 3\n",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_msmarco_comes_out_as_a_reader_of_the_downloads_sees_it(source: Path, suffix: str) -> None:
    write(source, {name + suffix: content for name, content in MSMARCO.items()})
    raw = open_dataset(source)
    report = converted(source)
    dataset = open_dataset(report.path)
    assert list(dataset.documents()) == list(raw.documents())
    assert (dataset.qrels, dataset.queries, dataset.format) == (raw.qrels, raw.queries, "beir")
    assert dataset.num_documents == 4
    assert dataset.dropped == raw.dropped == {"query without a judgement": 1}
    assert report.description.dropped == {}
    assert [entry.name for entry in report.description.inputs] == [
        f"collection.tsv{suffix}",
        f"queries.dev.small.tsv{suffix}",
        f"queries.train.tsv{suffix}",
        f"qrels.dev.small.tsv{suffix}",
        f"qrels.train.tsv{suffix}",
    ]
    assert not (report.path / ".partial").exists()


def test_the_folder_is_a_beir_layout_that_checks_in_full_without_its_description(source: Path) -> None:
    """The fingerprint is the one that a full check gives, so that runs made from either are the same."""
    report = converted(write(source, MSMARCO))
    dataset = open_dataset(report.path)
    (report.path / "dataset.json").unlink()
    checked = open_dataset(report.path)
    assert checked.fingerprint == dataset.fingerprint == report.description.fingerprint
    assert (checked.num_documents, checked.qrels) == (dataset.num_documents, dataset.qrels)


def test_rows_of_one_query_meet_wherever_they_lie(source: Path) -> None:
    """A top1000 is sorted by passage: read row after row, each candidate would be a query's only negative."""
    write(source, MSMARCO)
    write(
        source,
        {
            "top1000.dev": "".join(f"20\t{pid}\tdev\ttext\n" for pid in (3, 0, 2)) + "20\t3\tdev\ttext\n",
            "qidpidtriples.train.full.2.tsv.gz": "11\t1\t3\n10\t0\t2\n11\t2\t0\n11\t1\t3\n11\t1\t2\n",
        },
    )
    report = converted(source)
    assert read_jsonl(report.path / "training" / "dev.jsonl") == [
        {"query_id": "20", "positive_ids": ["2"], "negative_ids": ["3", "0"], "sources": [["bm25"], ["bm25"]]}
    ]
    records = {record["query_id"]: record for record in read_jsonl(report.path / "training" / "train.jsonl")}
    assert records["10"] == {
        "query_id": "10",
        "positive_ids": ["0"],
        "negative_ids": ["2"],
        "sources": [["triples"]],
    }
    assert (records["11"]["positive_ids"], records["11"]["negative_ids"]) == (["1", "2"], ["3", "0"])
    assert report.description.dropped == {"negative that is judged relevant": 2}
    assert open_dataset(report.path).num_documents == 4


def test_further_positives_become_exclusions_and_no_positives(source: Path) -> None:
    """Symptom: passages that merely match a text are trained on as positives; or, left out, as hard negatives."""
    files = {
        "collection.tsv": "1\ta\n2\tb\n3\tc\n",
        "queries.train.tsv": "q1\tone\nq2\ttwo\n",
        "qrels.train.tsv": "q1\t0\t1\t1\nq2\t0\t2\t1\n",
        "qrels.train.addition.tsv": "q1\t3\nq1\t2\n",
    }
    write(source, files)
    report = converted(source)
    assert report.description.kept["exclusions/train.tsv"] == 2
    dataset = open_dataset(report.path)
    assert dataset.qrels["train"] == {"q1": {"1": 1}, "q2": {"2": 1}}
    assert dataset.exclusions == {"train": {"q1": ["3", "2"]}}
    again = convert([report.path], source.parent / "again", Options())
    assert open_dataset(again.path).exclusions == dataset.exclusions
    (report.path / "dataset.json").unlink()
    assert open_dataset(report.path).exclusions == dataset.exclusions
    (report.path / "exclusions" / "train.tsv").write_text("q1\t3\n")
    with pytest.raises(DataError, match=r"exclusions/train\.tsv line 1 has 2 columns"):
        open_dataset(report.path)


def test_titles_in_a_file_of_their_own_are_put_to_their_passages(source: Path) -> None:
    write(
        source,
        {
            "para.txt": "0\ta\n1\tb\n2\tc\n3\td\n",
            "para.title.txt": "0\tZero\n2\t-\n3\tThree\n",
            "train.query.txt": "5\tfive\n",
            "dev.query.txt": "6\tsix\n",
            "qrels.train.tsv": "5\t0\n",
            "qrels.train.addition.tsv": "5\t1\n",
            "qrels.dev.tsv": "6\t3\n",
        },
    )
    dataset = open_dataset(converted(source).path)
    assert [(document.id, document.title) for document in dataset.documents()] == [
        ("0", "Zero"),
        ("1", ""),
        ("2", ""),
        ("3", "Three"),
    ]
    assert dataset.qrels == {"train": {"5": {"0": 1}}, "dev": {"6": {"3": 1}}}
    assert dataset.exclusions == {"train": {"5": ["1"]}}
    write(source, {"para.title.txt": "3\tThree\n0\tZero\n"})
    with pytest.raises(DataError, match="title of passage '0'"):
        convert([source], source.parent / "other", Options())


QUESTIONS: list[dict[str, Any]] = [
    {
        "question": "who\u2019s first\nthen",
        "answers": ["One"],
        "positive_ctxs": [{"passage_id": "1", "score": 1000}, {"passage_id": "2"}],
        "negative_ctxs": [{"passage_id": "3", "score": 0}],
        "hard_negative_ctxs": [{"passage_id": "3", "score": 14.5}, {"psg_id": "2", "score": "12"}, {"text": "no id"}],
    },
    {"question": "nothing found", "answers": ["x"], "positive_ctxs": [], "hard_negative_ctxs": []},
    {"question": "second", "answers": ["Two"], "positive_ctxs": [{"id": 2}]},
]
DPR = {
    "psgs_w100.tsv": 'id\ttext\ttitle\n1\t"say ""so"", twice"\tA\n'
    '2\tplain "word"\t"B ""b"""\n3\t"over\ntwo lines"\tC\n',
    "biencoder-nq-train.json": json.dumps(QUESTIONS, indent=4),
    "nq-dev.qa.csv": "who is it\t['One', \"O'Two\"]\n",
    "nq-test.qa.csv": 'what\u2019s that\t"[""Thr\u00e9e"", ""3""]"\nunknown\t[]\n',
    "nq-train.qa.csv": "who's first\t['One']\n",
}


def test_questions_with_answers_alone_are_kept_where_that_is_asked_for(source: Path) -> None:
    """The papers train and choose on all questions of the .qa.csv, of which only some have a gold passage."""
    rows = "who\u2019s first then\t['One']\nnothing found\t['x']\nonly here\t['Four']\nonly here too\t[]\n"
    developed = json.dumps([QUESTIONS[2]])
    write(source, DPR | {"nq-train.qa.csv": rows, "biencoder-nq-dev.json": developed})
    write(source, {"nq-dev.qa.csv": "second\t['Two']\nwho is it\t['One']\n"})
    dataset = open_dataset(converted(source, questions="all").path)
    assert dataset.qrels["train"] == {"train-2": {}, "train-qa-3": {}, "train-1": {"1": 1}, "train-3": {"2": 1}}
    assert dataset.queries["train-2"] == Query("train-2", "nothing found", ("x",))
    assert dataset.queries["train-qa-3"] == Query("train-qa-3", "only here", ("Four",))
    assert dataset.qrels["dev"] == {"dev-qa-2": {}, "dev-1": {"2": 1}}, "all of dev is measured by answers"
    assert dataset.dropped == {
        "negative passage without an id": 1,
        "question that has passages in another file (train)": 2,
        "question that has passages in another file (dev)": 1,
        "question without an answer (train)": 1,
        "question without an answer (test)": 1,
    }
    assert [qid for qid in dataset.qrels["train"] if dataset.positives("train", qid)] == ["train-1", "train-3"]


def test_a_folder_of_before_there_was_an_option_is_still_done(source: Path) -> None:
    """Symptom guarded against: every converted folder is refused after an update, since one option more exists."""
    write(source, DPR)
    report = converted(source)
    described = json.loads((report.path / "dataset.json").read_text())
    del described["options"]["questions"]
    (report.path / "dataset.json").write_text(json.dumps(described))
    assert converted(source).was_there
    with pytest.raises(DataError, match="questions is 'all' now, 'judged' then"):
        converted(source, questions="all")


def test_given_negatives_are_read_from_downloads_and_from_the_data_folder(source: Path) -> None:
    """Symptom: DPR's hard negatives were converted and then read by nobody."""
    write(source, DPR)
    raw, report = open_dataset(source), converted(source)
    assert raw.read_given is not None
    assert list(raw.read_given()) == [
        GivenNegatives("train-1", ["3", "2", "3"], [["bm25"], ["bm25"], ["random"]]),
    ]
    opened = open_dataset(report.path)
    assert opened.read_given is not None
    assert list(opened.read_given()) == [GivenNegatives("train-1", ["3", "2"], [["bm25", "random"], ["bm25"]])]
    training = report.path / "training" / "train.jsonl"
    training.write_bytes(training.read_bytes().replace(b'"3"', b'"1"'))
    with pytest.raises(DataError, match=r"train\.jsonl was changed since it was converted"):
        list(opened.read_given())
    (source / "biencoder-nq-train.json").unlink()
    assert open_dataset(source).read_given is None


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_dpr_keeps_its_answers_and_its_hard_negatives(source: Path, suffix: str) -> None:
    write(source, {name + suffix: content for name, content in DPR.items()})
    raw = open_dataset(source)
    report = converted(source)
    dataset = open_dataset(report.path)
    assert list(dataset.documents()) == list(raw.documents())
    assert dataset.queries == raw.queries
    assert dataset.qrels == raw.qrels
    assert dataset.qrels["test"] == {"test-1": {}}
    assert read_jsonl(report.path / "training" / "train.jsonl") == [
        {
            "query_id": "train-1",
            "positive_ids": ["1"],
            "negative_ids": ["3", "2"],
            "scores": [14.5, 12.0],
            "sources": [["bm25", "random"], ["bm25"]],
        }
    ]
    assert report.description.dropped == {
        "question without a positive passage (train)": 1,
        "question without an answer (test)": 1,
        "negative passage without an id": 1,
    }
    assert list(report.description.ignored) == [f"nq-train.qa.csv{suffix}"]


TOPICS = """<top>
<num> Number: 301
<title> International Organized Crime & a < b
<desc> Description:
Not this.
</top>

<top>
<num> Number: 302 </num>
<title>
Poliomyelitis
and more
</title>
</top>
"""


def test_trec_topics_judgements_and_runs(source: Path) -> None:
    write(
        source,
        {
            "collection.tsv": "d1\tone\nd2\ttwo\nd3\tthree\n",
            "topics.robust.txt": TOPICS,
            "2019qrels-pass.txt": "301 0 d1 3\n302 0 d2 0\n302 0 d3 2\n",
            "run.bm25.txt": "301 Q0 d2 1 9.50 bm25\n301 Q0 d1 2 9 bm25\n",
            "ance.train.run.gz": "301\td3\t1\n301\td2\t2\n",
        },
    )
    report = converted(source)
    dataset = open_dataset(report.path)
    assert dataset.queries["301"] == Query("301", "International Organized Crime & a < b")
    assert dataset.queries["302"].text == "Poliomyelitis and more"
    assert dataset.qrels == {"test": {"301": {"d1": 3}, "302": {"d2": 0, "d3": 2}}}
    runs = report.path / "runs"
    assert (runs / "run.bm25.trec").read_text() == "301 Q0 d2 1 9.50 bm25\n301 Q0 d1 2 9 bm25\n"
    assert (runs / "ance.train.trec").read_text() == "301 Q0 d3 1 -1 ance.train\n301 Q0 d2 2 -2 ance.train\n"
    # A run of the training split proposes negatives, but no judgement of that split names a positive.
    assert report.description.dropped == {"training record without a positive": 1}


BEIR = {
    "corpus.jsonl": [{"_id": "d1", "text": "one"}, {"_id": "d2", "title": "Two", "text": None}],
    "queries.jsonl": [{"_id": "q1", "text": "one?", "metadata": {"answers": ["1"]}}, {"_id": "q2", "text": "two?"}],
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    "qrels/test.tsv": "q2\td2\t2\n",
}


def test_beir_stays_what_it_is(source: Path) -> None:
    write(source, {**BEIR, "notes.txt": "x", "scores.pkl.gz": "x", "raw.tar.gz": "x"})
    raw = open_dataset(source)
    report = converted(source)
    dataset = open_dataset(report.path)
    assert list(dataset.documents()) == [Document("d1", "", "one"), Document("d2", "Two", "")]
    assert (dataset.queries, dataset.qrels) == (raw.queries, raw.qrels)
    assert "pickle" in report.description.ignored["scores.pkl.gz"]
    assert "archive" in report.description.ignored["raw.tar.gz"]
    assert "no known name" in report.description.ignored["notes.txt"]


def test_training_records_with_their_texts_give_a_corpus(source: Path) -> None:
    passage = {"docid": "a", "title": "A", "text": "aa"}
    other = {"docid": "b", "title": "B", "text": "bb"}
    write(
        source,
        {
            "train.jsonl.gz": [
                {"query_id": "1", "query": "x", "positive_passages": [passage], "negative_passages": [other]},
                {"query_id": 2, "query": "y", "positive_passages": [other], "negative_passages": [passage]},
            ]
        },
    )
    report = converted(source)
    dataset = open_dataset(report.path)
    assert [document.id for document in dataset.documents()] == ["a", "b"]
    assert dataset.qrels == {"train": {"1": {"a": 1}, "2": {"b": 1}}}
    assert report.description.dropped == {"document given twice": 2}
    assert len(read_jsonl(report.path / "training" / "train.jsonl")) == 2


def test_training_records_by_id_and_hard_negatives_by_retriever(source: Path) -> None:
    write(
        source,
        {
            "corpus.jsonl": [{"docid": f"d{number}", "title": "", "text": "t"} for number in range(5)],
            "train.jsonl": [
                {
                    "query_id": "q1",
                    "query_text": "x",
                    "positive_document_ids": ["d1"],
                    "negative_document_ids": ["d2", "d3"],
                }
            ],
            "msmarco-hard-negatives.jsonl.gz": [
                {"qid": "q1", "pos": ["d1"], "neg": {"bm25": ["d2", "d4"], "ance": ["d4", "d0"]}}
            ],
        },
    )
    report = converted(source)
    assert read_jsonl(report.path / "training" / "train.jsonl") == [
        {
            "query_id": "q1",
            "positive_ids": ["d1"],
            "negative_ids": ["d2", "d4", "d0", "d3"],
            "sources": [["bm25"], ["bm25", "ance"], ["ance"], []],
        }
    ]
    assert open_dataset(report.path).queries["q1"].text == "x"


def test_columns_of_jsonl_and_parquet_are_named_by_the_user(source: Path) -> None:
    rows = {"key": [1, 2, 3], "head": ["A", None, "C"], "body": ["a", "b\u2028b", "c"], "unused": [[1], [], []]}
    source.mkdir()
    pyarrow.parquet.write_table(pa.table(rows), source / "part.parquet", row_group_size=2)
    options = {"id": "key", "title": "head", "text": "body"}
    with pytest.raises(DataError, match=r"'key'.*--id"):
        converted(source, title="head", text="body")
    from_parquet = converted(source, **options)
    records = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    write(source.parent / "lines", {"part.jsonl": records})
    from_lines = convert([source.parent / "lines"], source.parent / "lines-out", Options(**options))
    corpus = (from_parquet.path / "corpus.jsonl").read_bytes()
    assert corpus == (from_lines.path / "corpus.jsonl").read_bytes()
    assert read_jsonl(from_lines.path / "corpus.jsonl")[:1] == [{"_id": "1", "title": "A", "text": "a"}]
    with pytest.raises(DataError, match="nothing to train on"):
        open_dataset(from_parquet.path)


def save_arrow(folder: Path, columns: dict[str, list[Any]]) -> None:
    """Write what the library `datasets` writes: Arrow streams, listed in state.json."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_format_type": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_hugging_face_data_sets_are_read_without_running_them(source: Path) -> None:
    save_arrow(source / "corpus" / "train", {"docid": list("abcde"), "text": ["1", "2", "3", "4", "5"]})
    (source / "corpus" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    save_arrow(source / "queries", {"_id": ["q"], "text": ["one?"]})
    save_arrow(source / "qrels", {"query-id": ["q"], "corpus-id": ["c"], "score": [1]})
    dataset = open_dataset(converted(source).path)
    assert "".join(document.id + document.text for document in dataset.documents()) == "a1b2c3d4e5"
    assert dataset.qrels == {"test": {"q": {"c": 1}}}
    (source / "corpus" / "dataset_dict.json").write_text('{"splits": ["../../elsewhere"]}')
    with pytest.raises(DataError, match="name of a file or folder inside it"):
        convert([source], source.parent / "other", Options())


@pytest.mark.parametrize("name", ["pipe:cat x", "https://example.org/collection.tsv", "s3://bucket/x"])
def test_addresses_and_commands_are_no_sources(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is an address"):
        convert([Path(name)], tmp_path / "out", Options())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("scores.pickle", "a pickle"),
        ("collectionandqueries.tar.gz", "an archive"),
        ("train_ce_0.tsv", "by their place"),
        ("notes.txt", "no known name"),
    ],
)
def test_a_single_file_that_is_not_read_is_an_error(tmp_path: Path, name: str, part: str) -> None:
    write(tmp_path / "in", {name: "x"})
    with pytest.raises(DataError, match=part):
        convert([tmp_path / "in" / name], tmp_path / "out", Options())


def test_pairs_without_ids_are_told_how_they_become_data(tmp_path: Path) -> None:
    """`--id` was the advice, and no field of theirs is an id."""
    write(tmp_path / "in", {"pairs.jsonl": [{"anchor": "a question", "positive": "an answer"}]})
    with pytest.raises(DataError, match=r"'anchor', 'positive'.*corpus\.jsonl.*queries\.jsonl.*qrels/train\.tsv"):
        convert([tmp_path / "in" / "pairs.jsonl"], tmp_path / "out", Options())
    as_told = {
        "corpus.jsonl": [{"_id": "d1", "text": "an answer"}],
        "queries.jsonl": [{"_id": "q1", "text": "a question"}],
        "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    }
    assert open_dataset(write(tmp_path / "told", as_told)).qrels["train"] == {"q1": {"d1": 1}}


def test_the_larger_dev_split_gives_way_to_the_small_one(source: Path) -> None:
    write(source, {**MSMARCO, "queries.dev.tsv": "20\tdev\n21\tlarge\n", "qrels.dev.tsv": "21\t0\t2\t1\n"})
    report = converted(source)
    assert list(open_dataset(report.path).qrels["dev"]) == ["20"]
    assert set(report.description.ignored) == {"queries.dev.tsv", "qrels.dev.tsv"}


def test_files_of_any_name_are_read_as_the_user_says(tmp_path: Path) -> None:
    write(tmp_path / "in", {"my-passages.txt": "1\tone\n", "my-questions": "q\tone?\n"})
    write(tmp_path / "in", {"lines.json": [{"_id": "x", "text": "y"}]})
    names = [tmp_path / "in" / name for name in ("my-passages.txt", "my-questions")]
    report = convert(names, tmp_path / "out", Options(format="msmarco"))
    assert report.description.kept == {"corpus.jsonl": 1, "queries.jsonl": 1}
    report = convert([tmp_path / "in" / "lines.json"], tmp_path / "other", Options(format="jsonl"))
    assert report.description.num_documents == 1
    with pytest.raises(DataError, match="no known name for its format"):
        convert([tmp_path / "in" / "my-questions"], tmp_path / "third", Options(format="dpr"))


def test_a_folder_below_the_sources_can_be_written_again(tmp_path: Path) -> None:
    """The output of the last time would be read as a source."""
    source = write(tmp_path / "in", MSMARCO)
    convert([source], source / "out", Options())
    assert convert([source], source / "out", Options()).was_there

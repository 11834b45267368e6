"""Each kind of bad input stops the conversion with file and line, or is dropped and counted where the user says so."""

from __future__ import annotations

import gzip
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.convert.conversion import Report, convert
from shards.convert.options import Options
from shards.convert.sources import _RULES, NAMES
from shards.errors import DataError
from shards.formats import open_dataset
from tests.unit.shards.convert.test_conversion import BEIR, DPR, MSMARCO, QUESTIONS, write, zstd

pytestmark = pytest.mark.usefixtures("no_fsync")


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert([source], source.parent / "refused", Options(**options))
    assert caught.value.remedy, f"what to do about it is not told: {caught.value}"
    return str(caught.value)


def dropping(source: Path, **options: Any) -> Report:
    return convert([source], source.parent / "out", Options(on_error="drop", on_unknown_docid="drop", **options))


def added(name: str, data: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.write(data if isinstance(data, bytes) else data.encode())

    return change


BAD = [
    (MSMARCO, added("collection.tsv", "4 no tab\n"), ["collection.tsv line 5", "no tab"], "wrong number of columns"),
    (MSMARCO, added("collection.tsv", b"4\t\xff\n"), ["collection.tsv line 5 is not UTF-8", "0xff"], "not UTF-8"),
    (MSMARCO, added("collection.tsv", "4\t \n"), ["line 5", "'4'", "neither text nor title"], "empty text"),
    (MSMARCO, added("collection.tsv", "a b\tx\n"), ["line 5", "without white space"], "malformed id"),
    (MSMARCO, added("collection.tsv", "4\t" + "x" * 99 + "\n"), ["line 5", "99 characters"], "document too long"),
    (MSMARCO, added("collection.tsv", "1\tagain\n"), ["'1'", "line 2", "line 5"], "document id that an earlier"),
    (MSMARCO, added("queries.train.tsv", "10\tx\n"), ["'10'", "line 1", "line 4"], "query id that an earlier"),
    (MSMARCO, added("queries.train.tsv", "13\t \n"), ["queries.train.tsv line 4", "no text"], "empty text"),
    (MSMARCO, added("qrels.train.tsv", "10 0 1\n"), ["line 4 has 3 columns"], "wrong number of columns"),
    (MSMARCO, added("qrels.train.tsv", "10 0 1 x\n"), ["line 4 has the grade 'x'"], "malformed grade"),
    (MSMARCO, added("qrels.train.tsv", "10 0 0 2\n"), ["line 1 and on line 4"], "contradicts an earlier"),
    (MSMARCO, added("qrels.train.tsv", "99 0 1 1\n"), ["line 4", "query '99'"], "the queries lack"),
    (MSMARCO, added("qrels.train.tsv", "10 0 99 1\n"), ["line 4", "document '99'"], "the corpus lacks"),
    (DPR, added("psgs_w100.tsv", "4\tonly\n"), ["psgs_w100.tsv line 6 has 2 columns"], "wrong number of columns"),
    (DPR, added("psgs_w100.tsv", '4\t"open\tD\n5\tx\tE\n'), ["psgs_w100.tsv line 7"], "malformed quotes"),
    (DPR, added("nq-test.qa.csv", "who\t[open('x')]\n"), ["nq-test.qa.csv line 3"], "malformed field"),
    (BEIR, added("corpus.jsonl", '{"_id": "d3"\n'), ["corpus.jsonl line 3 is malformed JSON"], "malformed JSON"),
    (BEIR, added("corpus.jsonl", "[" * 5000 + "\n"), ["line 3 is malformed JSON", "nested"], "malformed JSON"),
    (BEIR, added("corpus.jsonl", '{"_id": "d3"}\n'), ["line 3 has no field 'text'"], "missing field"),
    (BEIR, added("corpus.jsonl", '{"_id": "d3", "text": "\\ud83d"}\n'), ["line 3", "surrogate"], "not UTF-8"),
    (BEIR, added("queries.jsonl", '{"_id": "q3", "text": 3}\n'), ["line 3 has 3 in field 'text'"], "malformed field"),
]


@pytest.mark.parametrize(("files", "change", "parts", "reason"), BAD)
def test_bad_records_are_refused_with_their_line_or_dropped_and_counted(
    source: Path, files: dict[str, Any], change: Callable[[Path], None], parts: list[str], reason: str
) -> None:
    write(source, files)
    good = convert([source], source.parent / "good", Options())
    change(source)
    message = refusal(source, max_document_characters=80)
    assert [part for part in parts if part not in message] == [], message
    report = dropping(source, max_document_characters=80)
    counts = {what: number for what, number in report.description.dropped.items() if reason in what}
    assert list(counts.values()) == [1], report.description.dropped
    # What is left out takes nothing else with it; the row behind the open quote is whole.
    extra = 1 if reason == "malformed quotes" else 0
    assert report.description.num_documents == good.description.num_documents + extra
    assert report.description.kept["queries.jsonl"] == good.description.kept["queries.jsonl"]
    open_dataset(report.path)


def test_a_corpus_without_a_usable_document_is_refused_whatever_is_dropped(source: Path) -> None:
    write(source, {**MSMARCO, "collection.tsv": "no tab\n"})
    with pytest.raises(DataError, match="no document"):
        dropping(source)


def test_what_the_corpus_lacks_is_dropped_everywhere(source: Path) -> None:
    """A corpus that is a part of the judged one keeps exactly the records that are whole in it."""
    write(source, {**MSMARCO, "qidpidtriples.tsv": "10\t0\t3\n10\t0\t77\n11\t88\t2\n", "bm25.run": "10\t77\t1\n"})
    report = dropping(source)
    assert report.description.dropped == {
        "negative of a document that the corpus lacks": 1,
        "positive of a document that the corpus lacks": 1,
        "negative that is judged relevant": 1,
        "training record without a positive": 1,
        "row of a run of a document that the corpus lacks": 1,
    }
    text = (report.path / "training" / "train.jsonl").read_text()
    assert [json.loads(line)["negative_ids"] for line in text.splitlines()] == [["3"]]
    assert "document '77'" in refusal(source)


def test_a_policy_that_is_eased_goes_on_where_the_strict_one_stopped(source: Path) -> None:
    """Without it, an unknown docid found after an hour of reading would cost another hour."""
    write(source, MSMARCO)
    added("qrels.train.tsv", "10 0 99 1\n")(source)
    out = source.parent / "out"
    with pytest.raises(DataError, match="'99'"):
        convert([source], out, Options())
    marker = (out / ".partial" / "final" / "corpus.jsonl").stat().st_mtime_ns
    eased = convert([source], out, Options(on_unknown_docid="drop"))
    assert (out / "corpus.jsonl").stat().st_mtime_ns == marker
    fresh = convert([source], source.parent / "fresh", Options(on_unknown_docid="drop"))
    assert (out / "dataset.json").read_bytes() == (source.parent / "fresh" / "dataset.json").read_bytes()
    assert eased.description == fresh.description


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("on_error", ["error", "drop"])
def test_a_compressed_file_cut_short_is_never_the_end_of_the_file(source: Path, suffix: str, on_error: Any) -> None:
    write(source, MSMARCO)
    (source / "collection.tsv").unlink()
    text = "".join(f"{number}\t{hash((number, 'x'))}\n" for number in range(40_000)).encode()
    # The command line's zstd writes a checksum, the library only where it is told to.
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    data = gzip.compress(text) if suffix == ".gz" else zstd.compress(text, options=checked)
    for size in (len(data) - 1, len(data) // 2, 20):
        (source / f"collection.tsv{suffix}").write_bytes(data[:size])
        assert "cut short" in refusal(source, on_error=on_error)
        with pytest.raises(DataError, match="cut short"):
            open_dataset(source)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 255
    (source / f"collection.tsv{suffix}").write_bytes(damaged)
    assert "is damaged" in refusal(source, on_error=on_error)


@pytest.mark.parametrize("data", ["[" + json.dumps(QUESTIONS[0]), "{}", '[{"question": "x"} 1]', "[1]", ""])
def test_a_broken_list_cannot_be_passed_over(source: Path, data: str) -> None:
    """Behind the damage nothing says where the next record begins."""
    write(source, {**DPR, "biencoder-nq-train.json": data})
    message = refusal(source, on_error="drop")
    assert "malformed JSON" in message or "is empty" in message


def test_a_damaged_table_is_refused(source: Path) -> None:
    write(source, {"corpus.parquet": "PAR1 and no more"})
    assert "is damaged, or no table" in refusal(source)


def test_a_folder_of_other_files_is_told_names_that_are_read(tmp_path: Path) -> None:
    """Symptom: the message named a page of the documentation, which an installed package does not have."""
    write(tmp_path / "other", {"notes.md": "# Notes"})
    with pytest.raises(DataError) as told:
        convert([tmp_path / "other"], tmp_path / "out", Options())
    assert NAMES in str(told.value)
    for name in NAMES.split(", "):
        assert any(re.search(pattern, name) for _, pattern, _ in _RULES), name


def test_a_title_without_its_passages_and_judgements_without_a_corpus_are_refused(source: Path) -> None:
    write(source, {"para.title.txt": "0\tx\n", "qrels.train.tsv": "1\t2\n"})
    assert "no para.txt" in refusal(source)
    (source / "para.title.txt").unlink()
    assert "hold no document" in refusal(source)


ONE_LINE = """
import resource, sys
from pathlib import Path
from shards.convert.conversion import convert
from shards.convert.options import Options
from shards.formats import stream
limit = 400 << 20
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
report = convert([Path(sys.argv[1])], Path(sys.argv[2]), Options(on_error="drop"))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.description.num_documents, sum(report.description.dropped.values()), int(peak.split()[1]) >> 10)
"""


def test_a_line_without_end_is_dropped_in_bounded_memory(source: Path) -> None:
    """One file with its line ends lost took as much memory as it is large."""
    write(source, MSMARCO)
    with open(source / "collection.tsv", "ab") as file:
        file.write(b"4\t")
        file.truncate(file.tell() + (1 << 30))  # zeros, which take no space on the disk
        file.seek(0, 2)
        file.write(b"\n5\tbehind it\n")
    command = [sys.executable, "-c", ONE_LINE, str(source), str(source.parent / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4])
    documents, dropped, peak_mib = map(int, done.stdout.split())
    assert (documents, dropped) == (5, 1)
    assert peak_mib < 300


def test_a_full_disk_is_told_with_what_is_needed_and_gone_on_from(source: Path) -> None:
    """A limit on the size of a file stands for the disk: the same system call fails."""
    write(source, MSMARCO)
    with open(source / "collection.tsv", "a") as file:
        file.writelines(f"{number}\t{'x' * 100}\n" for number in range(100, 40_000))
    out, code = source.parent / "out", ONE_LINE.replace("RLIMIT_AS", "RLIMIT_FSIZE")
    code = code.replace("(resource.RLIM_INFINITY,", "(2 << 20,").replace('"drop"))', '"error"), checkpoint_seconds=0)')
    command = [sys.executable, "-c", code, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[4])
    assert done.returncode
    assert "corpus.jsonl cannot be written" in done.stderr
    assert "bytes more are needed" in done.stderr
    assert "goes on where it stopped" in done.stderr
    journal = json.loads((out / ".partial" / "journal.json").read_text())
    assert 0 < journal["mark"]["line"] < 39_904
    report = convert([source], out, Options())
    fresh = convert([source], source.parent / "fresh", Options())
    assert report.description == fresh.description
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY

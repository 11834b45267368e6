"""What is written is read back exactly, and a corpus that is not whole is never read as if it were."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import multiprocessing
import pickle
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset  # type: ignore[import-untyped]

from shards.docids import write_docids
from shards.errors import ArtifactError, DataError
from shards.files import sha256_file
from shards.files.tar import member_header
from shards.manifest import CorpusManifest, ShardEntry, TokenStream
from shards.partition import split_range
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, begin_corpus, publish_manifest, render, write_shard

TEMPLATE = "{title} [SEP] {text}"
RETRIEVER = TokenStream("retriever", "1" * 64, 24)
RANKER = TokenStream("ranker", "2" * 64, 400)


def code_points(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def doubled(texts: list[str]) -> list[list[int]]:
    return [[2 * ord(letter) for letter in text] for text in texts]


STREAMS = (Tokenization(RETRIEVER, code_points), Tokenization(RANKER, doubled))


def make_documents(count: int) -> list[Document]:
    return [
        Document(f"d.{i}", f"Title {i}" if i % 3 else "", f"text of document {i} " * (1 + i % 4)) for i in range(count)
    ]


def write_corpus(
    folder: Path, documents: Sequence[Document], per_shard: int, streams: Sequence[Tokenization] = STREAMS
) -> CorpusManifest:
    for number, first in reversed(list(enumerate(range(0, len(documents), per_shard)))):  # ranks write in any order
        write_shard(documents[first : first + per_shard], folder, number, first, streams, TEMPLATE)
    return publish_manifest(
        folder,
        [document.id for document in documents],
        dataset_sha256="3" * 64,
        template=TEMPLATE,
        streams=[tokenization.stream for tokenization in streams],
        producer={"version": "test"},
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expected_ids(document: Document, factor: int, limit: int) -> list[int]:
    return [factor * ord(letter) for letter in render(TEMPLATE, document)][:limit]


# ---------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "title", "text", "expected"),
    [
        ("{title} {text}", "A", "b", "A b"),
        ("{title} [SEP] {text}", "A", "b", "A [SEP] b"),
        ("{title} [SEP] {text}", "", "b", "b"),
        ("{title} [SEP] {text}", " ", "b", "b"),
        ("{title} [SEP] {text}", "A", "", "A"),
        ("{title} {text}", "{text}", "{0} {x", "{text} {0} {x"),
        ("{text}", "A", "b", "b"),
        ("{{{title}}} {text}", "A", "b", "{A} b"),
    ],
)
def test_render(template: str, title: str, text: str, expected: str) -> None:
    assert render(template, Document("d", title, text)) == expected


@pytest.mark.parametrize(
    "template",
    ["", "{title}", "{text} {text}", "{text} {id}", "{text.__class__}", "{text!r}", "{text:>9}", "{0}", "{text", "{}"],
)
def test_a_malformed_template_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        render(template, Document("d", "a", "b"))


# ---------------------------------------------------------------------------------------------------- writing


def test_shards_are_reproducible_byte_for_byte(tmp_path: Path) -> None:
    documents = make_documents(7)
    first, second = (write_corpus(tmp_path / name, documents, 3) for name in ("a", "b"))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert first.sha256 == second.sha256
    write_corpus(tmp_path / "a", documents, 3)  # over itself
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_members_carry_no_time_owner_or_group(tmp_path: Path) -> None:
    write_corpus(tmp_path, make_documents(2), 2)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        members = tar.getmembers()
    names = [f"{i:09d}.{suffix}" for i in range(2) for suffix in ("json", "retriever.ids", "ranker.ids")]
    assert [member.name for member in members] == names
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_what_the_manifest_says(tmp_path: Path) -> None:
    documents = make_documents(7)
    manifest = write_corpus(tmp_path, documents, 3)
    assert [(entry.first_document, entry.num_documents) for entry in manifest.shards] == [(0, 3), (3, 3), (6, 1)]
    assert manifest.num_documents == 7
    lengths = {"retriever": 24, "ranker": 400}
    assert manifest.num_tokens == {
        name: sum(min(limit, len(render(TEMPLATE, document))) for document in documents)
        for name, limit in lengths.items()
    }
    assert manifest.num_tokens["retriever"] < manifest.num_tokens["ranker"]
    for entry in manifest.shards:
        assert (tmp_path / entry.name).stat().st_size == entry.num_bytes


def test_a_crash_in_the_middle_of_a_shard_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, make_documents(4), 4)
    before = snapshot(tmp_path)
    calls = itertools.count()

    def breaking(name: bytes, num_bytes: int) -> bytes:
        if next(calls) == 5:
            raise OSError("No space left on device")
        return member_header(name, num_bytes)

    monkeypatch.setattr("shards.writer.member_header", breaking)
    monkeypatch.setattr("shards.writer._BYTES_PER_WRITE", 1)
    others = [Document(f"x{i}", "", "other text") for i in range(4)]
    with pytest.raises(OSError, match="No space"):
        write_shard(others, tmp_path, 0, 0, STREAMS, TEMPLATE)
    assert next(calls) == 6  # it was in the middle
    assert snapshot(tmp_path) == before


def test_without_a_manifest_there_is_no_corpus(tmp_path: Path) -> None:
    write_shard(make_documents(3), tmp_path, 0, 0, STREAMS, TEMPLATE)
    write_docids(tmp_path, ["a", "b", "c"])
    with pytest.raises(ArtifactError, match="corpus manifest is missing"):
        CorpusShards.open(tmp_path)


def made_of(source: str) -> dict[str, str]:
    return {"dataset_sha256": source}


def test_an_interrupted_writing_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    """A run that was killed while it wrote the shards of millions of passages began anew."""
    documents = make_documents(9)
    whole = write_corpus(tmp_path / "whole", documents, 2)
    folder = tmp_path / "cut"
    assert begin_corpus(folder, made_of("a")) == set()
    for number in (0, 3):
        write_shard(documents[2 * number : 2 * number + 2], folder, number, 2 * number, STREAMS, TEMPLATE)
    (folder / "000001.tar").write_bytes(b"a tar whose record was not written any more")
    (folder / ".000002.tar.tmp-0123").write_bytes(b"half")
    (folder / ".docids.tmp-0123").mkdir()
    untouched = (folder / "000003.tar").stat().st_mtime_ns
    assert begin_corpus(folder, made_of("a")) == {0, 3}
    assert not list(folder.glob("000001*")) + list(folder.glob(".*"))
    for number in (1, 2, 4):
        write_shard(documents[2 * number : 2 * number + 2], folder, number, 2 * number, STREAMS, TEMPLATE)
    assert (folder / "000003.tar").stat().st_mtime_ns == untouched
    docids = [document.id for document in documents]
    streams = [tokenization.stream for tokenization in STREAMS]
    manifest = publish_manifest(folder, docids, dataset_sha256="3" * 64, template=TEMPLATE, streams=streams)
    assert manifest.sha256 == whole.sha256
    assert sorted(snapshot(folder)) == sorted(snapshot(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["short", "no offsets", "half a record"])
def test_a_shard_that_is_not_whole_is_written_again(tmp_path: Path, damage: str) -> None:
    begin_corpus(tmp_path, made_of("a"))
    write_shard(make_documents(2), tmp_path, 0, 0, STREAMS, TEMPLATE)
    if damage == "short":
        (tmp_path / "000000.tar").write_bytes((tmp_path / "000000.tar").read_bytes()[:-1])
    elif damage == "no offsets":
        (tmp_path / "000000.offsets.npy").unlink()
    else:
        record = tmp_path / "000000.entry.json"
        record.write_text(record.read_text()[:40])
    assert begin_corpus(tmp_path, made_of("a")) == set()


def test_beginning_another_corpus_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    begin_corpus(tmp_path, made_of("a"))
    write_corpus(tmp_path, make_documents(9), 2)
    write_shard(make_documents(2), tmp_path, 7, 14, STREAMS, TEMPLATE)
    (tmp_path / "notes.txt").write_text("mine")
    assert begin_corpus(tmp_path, made_of("b")) == set()
    assert list(snapshot(tmp_path)) == ["notes.txt", "plan.json"]
    write_corpus(tmp_path, make_documents(4), 2)
    assert CorpusShards.open(tmp_path, verify=True).num_documents == 4


def test_a_hole_among_the_shards_is_not_published(tmp_path: Path) -> None:
    documents = make_documents(6)
    for i in (0, 4):
        write_shard(documents[i : i + 2], tmp_path, i // 2, i, STREAMS, TEMPLATE)
    with pytest.raises(ArtifactError, match=r"000002.tar at place 1"):
        publish_manifest(
            tmp_path,
            [document.id for document in documents],
            dataset_sha256="3" * 64,
            template=TEMPLATE,
            streams=[RETRIEVER, RANKER],
        )
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("docid", ["", "a\nb", "a\r", "\ud800"])
def test_docids_that_do_not_fit_on_a_line_are_refused(tmp_path: Path, docid: str) -> None:
    with pytest.raises(DataError, match="cannot be stored"):
        write_shard([Document(docid, "", "text")], tmp_path, 0, 0, STREAMS, TEMPLATE)
    with pytest.raises(DataError, match="cannot be stored"):
        write_docids(tmp_path, ["fine", docid])
    assert list(tmp_path.iterdir()) == []


def test_docids_that_repeat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' occurs twice"):
        write_docids(tmp_path, ["a", "b", "a"])


@pytest.mark.parametrize(
    ("tokenize", "fact"),
    [
        (lambda texts: [[1]] * (len(texts) - 1), "returned 2 lists for 3 texts"),
        (lambda texts: [[-1]] * len(texts), "not token ids"),
        (lambda texts: [[2**32]] * len(texts), "not token ids"),
        (lambda texts: [["a"]] * len(texts), "not token ids"),
    ],
)
def test_a_tokenizer_that_misbehaves_is_named(
    tmp_path: Path, tokenize: Callable[[list[str]], list[list[int]]], fact: str
) -> None:
    with pytest.raises(DataError, match=f"stream retriever.*{fact}"):
        write_shard(make_documents(3), tmp_path, 0, 0, [Tokenization(RETRIEVER, tokenize)], TEMPLATE)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- reading


def test_random_access_equals_sequential_and_the_source(tmp_path: Path) -> None:
    documents = make_documents(11)
    write_corpus(tmp_path, documents, 4)
    corpus = CorpusShards.open(tmp_path, {"retriever": "1" * 64, "ranker": "2" * 64}, verify=True)
    for stream, factor, limit in (("retriever", 1, 24), ("ranker", 2, 400)):
        sequential = {doc: ids for shard in range(3) for doc, ids in corpus.iterate(shard, stream)}
        assert list(sequential) == list(range(11))
        for index in (10, 0, 5, 4, 3, 8, 9, 1, 2, 7, 6):
            ids = corpus.tokens(index, stream)
            assert ids.dtype == sequential[index].dtype == np.uint32
            assert ids.tolist() == sequential[index].tolist() == expected_ids(documents[index], factor, limit)
    assert [corpus.document(index) for index in range(11)] == documents
    assert [document for shard in range(3) for document in corpus.documents(shard)] == documents
    assert list(corpus.docids) == [document.id for document in documents]
    assert [corpus.index_of(document.id) for document in documents] == list(range(11))


def test_docids_and_texts_of_any_kind(tmp_path: Path) -> None:
    """Two docids that differ after a dot became one sample when docids were keys."""
    ids = ["doc.1", "doc.2", "a/b", "日本 語", "e\u0301", "line\u2028sep", "\x0b", " ", "__meta__", ".", "000000003"]
    documents = [Document(docid, "", f"text\nof {docid}\0") for docid in ids]
    write_corpus(tmp_path, documents, 4)
    corpus = CorpusShards.open(tmp_path, verify=True)
    assert list(corpus.docids) == ids
    assert [corpus.document(i) for i in range(len(ids))] == documents
    read = [ids.tolist() for shard in range(3) for _, ids in corpus.iterate(shard, "ranker")]
    assert read == [expected_ids(document, 2, 400) for document in documents]


def test_a_document_without_tokens_or_title(tmp_path: Path) -> None:
    documents = [Document("a", "", ""), Document("b", "", "x"), Document("c", "T", "")]
    write_corpus(tmp_path, documents, 3)
    corpus = CorpusShards.open(tmp_path)
    assert [ids.tolist() for _, ids in corpus.iterate(0, "retriever")] == [[], [ord("x")], [ord("T")]]
    assert [corpus.tokens(i, "retriever").tolist() for i in range(3)] == [[], [ord("x")], [ord("T")]]


@pytest.mark.parametrize("num_shards", range(1, 10))
def test_every_document_is_read_once_for_any_number_of_ranks(
    tmp_path: Path, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(2 * num_shards - 1)
    manifest = write_corpus(tmp_path, documents, 2, STREAMS[:1])
    assert len(manifest.shards) == num_shards
    for world_size in range(1, 8):
        seen: list[int] = []
        for rank in range(world_size):
            # What a launcher sets, and webdataset would split by.
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            corpus = CorpusShards(tmp_path, manifest)
            for shard in split_range(len(manifest.shards), rank, world_size):
                seen += [document for document, _ in corpus.iterate(shard, "retriever")]
        assert sorted(seen) == list(range(len(documents)))


def test_folder_names_are_not_expanded(tmp_path: Path) -> None:
    folder = tmp_path / "pipe:{0..3}::x?#"
    write_corpus(folder, make_documents(3), 3)
    assert len(list(CorpusShards.open(folder).iterate(0, "ranker"))) == 3


def test_stock_webdataset_reads_the_shards_too(tmp_path: Path) -> None:
    write_corpus(tmp_path, make_documents(3), 3)
    dataset = webdataset.WebDataset(
        [str(tmp_path / "000000.tar")], nodesplitter=None, workersplitter=None, shardshuffle=0
    )
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    assert np.frombuffer(samples[1]["retriever.ids"], "<u4").tolist() == expected_ids(make_documents(3)[1], 1, 24)


def test_threads_forks_and_pickles_read_the_same(tmp_path: Path) -> None:
    documents = make_documents(12)
    write_corpus(tmp_path, documents, 3)
    corpus = CorpusShards.open(tmp_path)
    expected = [expected_ids(document, 2, 400) for document in documents]
    order = [index % 12 for index in range(0, 12 * 35, 7)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: corpus.tokens(i, "ranker").tolist(), order)) == [expected[i] for i in order]
    copy = pickle.loads(pickle.dumps(corpus))
    assert [copy.tokens(i, "ranker").tolist() for i in range(12)] == expected

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put([corpus.tokens(i, "ranker").tolist() for i in range(12)]))
    child.start()
    assert queue.get() == expected
    child.join(10)
    assert child.exitcode == 0


def test_indices_and_names_that_do_not_exist(tmp_path: Path) -> None:
    write_corpus(tmp_path, make_documents(3), 3)
    corpus = CorpusShards.open(tmp_path)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            corpus.tokens(index, "ranker")
        with pytest.raises(IndexError):
            corpus.document(index)
    with pytest.raises(DataError, match=r"no document 'd\.3'"):
        corpus.index_of("d.3")
    with pytest.raises(ArtifactError, match="no token stream 'reader'"):
        corpus.tokens(0, "reader")
    with pytest.raises(ArtifactError, match="no token stream 'reader'"):
        next(corpus.iterate(0, "reader"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, make_documents(3), 3)
    with pytest.raises(ArtifactError, match=f"(?s)ranker tokens .* tokenizer {'2' * 64}.*tokenizer {'4' * 64}"):
        CorpusShards.open(tmp_path, {"ranker": "4" * 64})
    with pytest.raises(ArtifactError, match="no token stream 'reader'"):
        CorpusShards.open(tmp_path, {"reader": "1" * 64})


# ---------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusShards:
    """Two shards of five documents; the tests damage the first."""
    write_corpus(tmp_path, make_documents(10), 5)
    return CorpusShards.open(tmp_path)


def header_of(corpus: CorpusShards, document: int, member: int) -> int:
    offsets = np.load(corpus.folder / "000000.offsets.npy")
    return int(offsets[document, member, 0]) - 512


def damage(
    corpus: CorpusShards, change: Callable[[bytearray], bytes | bytearray], name: str = "000000.tar"
) -> ShardEntry:
    path = corpus.folder / name
    path.write_bytes(change(bytearray(path.read_bytes())))
    return corpus.manifest.shards[0]


def with_present_hashes(corpus: CorpusShards) -> CorpusShards:
    """Return a corpus whose manifest vouches for the damaged tar, to see what is noticed even so."""
    path = corpus.folder / "000000.tar"
    first, *others = corpus.manifest.shards
    present = {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    present["offsets_sha256"] = sha256_file(corpus.folder / first.offsets_name)
    shards = (dataclasses.replace(first, **present), *others)
    return CorpusShards(corpus.folder, dataclasses.replace(corpus.manifest, shards=shards))


@pytest.mark.parametrize(
    ("document", "member", "extra_bytes"),
    [(3, 0, 0), (3, 1, 0), (3, 2, 0), (3, 0, 100), (3, 0, 512), (3, 0, 520), (3, 2, 516), (0, 0, 0)],
    ids=["between samples", "after json", "after ids", "in header", "after header", "in json", "in ids", "all"],
)
def test_a_cut_shard_is_found_on_opening_and_by_a_pass(
    corpus: CorpusShards, document: int, member: int, extra_bytes: int
) -> None:
    """webdataset ends quietly where a shard is cut between members or in a header, and the tail is lost."""
    end = header_of(corpus, document, member) + extra_bytes
    ends = np.load(corpus.folder / "000000.offsets.npy")[:, 1].sum(axis=1)  # of the retriever's ids
    entry = damage(corpus, lambda content: content[:end])
    with pytest.raises(ArtifactError, match=rf"000000.tar has {end} bytes.*Expected: {entry.num_bytes} bytes") as error:
        CorpusShards.open(corpus.folder)
    assert "write the shards again" in str(error.value)
    read: list[int] = []
    with pytest.raises(ArtifactError, match=rf"000000.tar has {end} bytes"):
        next(CorpusShards(corpus.folder, corpus.manifest).iterate(0, "retriever"))
    with pytest.raises(ArtifactError, match=r"000000\.tar"):  # noqa: PT012  the documents before the cut are counted
        for index, _ in with_present_hashes(corpus).iterate(0, "retriever"):
            read.append(index)
    assert read == list(range((ends <= end).sum())), "those that lie before the cut"
    if end:
        with pytest.raises(ArtifactError, match=r"000000\.tar"):
            CorpusShards(corpus.folder, corpus.manifest).tokens(4, "ranker")


def test_this_is_what_webdataset_alone_does_with_a_cut_shard(corpus: CorpusShards) -> None:
    """The reason for the count at the end of a pass; when this fails, the library has learnt to notice."""
    end = header_of(corpus, 3, 0)
    damage(corpus, lambda content: content[:end])
    dataset = webdataset.WebDataset(
        [str(corpus.folder / "000000.tar")], nodesplitter=None, workersplitter=None, shardshuffle=0
    )
    assert len(list(dataset)) == 3


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_zeroed_header_is_found_by_a_pass_and_by_random_access(corpus: CorpusShards, member: int) -> None:
    start = header_of(corpus, 3, member)
    damage(corpus, lambda content: content[:start] + bytes(512) + content[start + 512 :])
    with pytest.raises(ArtifactError, match="sha256"):
        CorpusShards.open(corpus.folder, verify=True)
    reopened = CorpusShards.open(corpus.folder)  # the size is right
    with pytest.raises(ArtifactError, match=r"000000\.tar"):
        list(reopened.iterate(0, "retriever"))
    read = [reopened.document, lambda i: reopened.tokens(i, "retriever"), lambda i: reopened.tokens(i, "ranker")]
    with pytest.raises(ArtifactError, match="has no 000000003"):
        read[member](3)
    assert reopened.document(2) == make_documents(10)[2]


def test_one_flipped_bit_of_a_header_is_found_by_a_pass(corpus: CorpusShards) -> None:
    position = header_of(corpus, 2, 1) + 3  # in its name

    def flip(content: bytearray) -> bytearray:
        content[position] ^= 1
        return content

    damage(corpus, flip)
    for reopened, fact in ((CorpusShards.open(corpus.folder), "sha256"), (with_present_hashes(corpus), "000000")):
        with pytest.raises(ArtifactError, match=fact):
            list(reopened.iterate(0, "retriever"))


def test_one_flipped_bit_of_a_payload_is_found_by_a_pass(corpus: CorpusShards) -> None:
    """A flipped bit in a token id gave a document another word, and nobody noticed."""
    position = header_of(corpus, 2, 1) + 512

    def flip(content: bytearray) -> bytearray:
        content[position] ^= 1
        return content

    damage(corpus, flip)
    with pytest.raises(ArtifactError, match=r"000000\.tar has sha256"):
        next(CorpusShards.open(corpus.folder).iterate(0, "retriever"))
    with pytest.raises(ArtifactError, match=r"000000\.tar has sha256"):
        next(CorpusShards.open(corpus.folder).documents(0))


@pytest.mark.parametrize("name", ["000000.tar", "000000.offsets.npy", "docids.txt"])
def test_one_flipped_bit_of_a_payload_is_found_by_verifying(corpus: CorpusShards, name: str) -> None:
    position = header_of(corpus, 2, 1) + 512 if name.endswith(".tar") else -1

    def flip(content: bytearray) -> bytearray:
        content[position] ^= 1
        return content

    damage(corpus, flip, name)
    CorpusShards.open(corpus.folder)
    with pytest.raises(ArtifactError, match=f"{name} has sha256"):
        CorpusShards.open(corpus.folder, verify=True)


def test_docids_of_another_corpus_are_found_at_first_use(corpus: CorpusShards) -> None:
    damage(corpus, lambda content: content.replace(b"d.1", b"e.1"), "docids.txt")
    with pytest.raises(ArtifactError, match=r"docids\.txt has sha256"):
        CorpusShards.open(corpus.folder).index_of("d.1")


@pytest.mark.parametrize(
    "name", ["000001.tar", "000001.offsets.npy", "docids.txt", "docids.offsets.npy", "docids.lookup.npy"]
)
def test_a_missing_file_is_named(corpus: CorpusShards, name: str) -> None:
    (corpus.folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing.*write the shards again"):
        CorpusShards.open(corpus.folder)


def test_an_extra_shard_is_named(corpus: CorpusShards) -> None:
    (corpus.folder / ".000002.tar.tmp-0123").write_bytes(b"a crash left this")
    CorpusShards.open(corpus.folder)
    (corpus.folder / "000002.tar").write_bytes((corpus.folder / "000001.tar").read_bytes())
    with pytest.raises(ArtifactError, match=r"holds 000002\.tar, which is not in its manifest"):
        CorpusShards.open(corpus.folder)


def test_swapped_shards_are_found_by_a_pass_and_by_random_access(corpus: CorpusShards) -> None:
    other = (corpus.folder / "000001.tar").read_bytes()
    damage(corpus, lambda _: other)
    swapped = with_present_hashes(corpus)
    with pytest.raises(ArtifactError, match=r"has no 000000000\.retriever\.ids"):
        next(swapped.iterate(0, "retriever"))
    with pytest.raises(ArtifactError, match=r"has no 000000000\.retriever\.ids"):
        swapped.tokens(0, "retriever")


def test_a_shard_with_more_documents_than_promised_is_refused(corpus: CorpusShards) -> None:
    more = make_documents(6)
    write_shard(more, corpus.folder, 0, 0, STREAMS, TEMPLATE)
    with pytest.raises(ArtifactError, match=r"000000\.offsets\.npy has int64 \(6, 3, 2\).*Expected: int64 \(5, 3, 2\)"):
        list(with_present_hashes(corpus).iterate(0, "retriever"))


def test_offsets_of_another_shape_are_refused(corpus: CorpusShards) -> None:
    np.save(corpus.folder / "000000.offsets.npy", np.zeros((5, 2, 2), np.int64))
    with pytest.raises(ArtifactError, match=r"offsets\.npy has int64 \(5, 2, 2\)"):
        CorpusShards.open(corpus.folder).tokens(0, "retriever")


def test_offsets_that_point_elsewhere_are_refused(corpus: CorpusShards) -> None:
    path = corpus.folder / "000000.offsets.npy"
    offsets = np.load(path)
    for wrong in (
        np.roll(offsets, 1, axis=0),
        offsets * 0,
        offsets + np.array([0, 10**9]),
        offsets * np.array([1, -1]),
    ):
        np.save(path, wrong)
        with pytest.raises(ArtifactError, match="has no 000000001"):
            CorpusShards.open(corpus.folder).tokens(1, "retriever")


# ---------------------------------------------------------------------------------------------------- shards of others


class Touch:
    """What a pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["../../outside.json", "/tmp/outside.json", "000000000.pyd", "000000000.pth"])
def test_a_members_name_is_neither_a_path_nor_a_program(corpus: CorpusShards, tmp_path: Path, name: str) -> None:
    """Symptom: a shard from elsewhere writes a file outside its folder, or runs what its pickle says."""
    touched = tmp_path / "touched"
    payload = pickle.dumps(Touch(touched))
    path = corpus.folder / "000000.tar"
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        tar.addfile(header, io.BytesIO(payload))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=r"000000\.tar"):
        list(CorpusShards(corpus.folder, corpus.manifest).iterate(0, "retriever"))
    with pytest.raises(ArtifactError, match=r"000000\.tar"):
        list(with_present_hashes(corpus).iterate(0, "retriever"))
    assert not touched.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["pipe:touch touched", "../000000.tar", "http://host/000000.tar", "/etc/passwd"])
def test_a_manifest_names_nothing_but_its_own_shards(corpus: CorpusShards, name: str) -> None:
    """Symptom: webdataset runs what stands behind `pipe:` in a shell."""
    first, *others = corpus.manifest.shards
    manifest = dataclasses.replace(corpus.manifest, shards=(dataclasses.replace(first, name=name), *others))
    content = json.loads((corpus.folder / "manifest.json").read_text())
    content["shards"][0]["name"] = name
    content["sha256"] = manifest.sha256
    (corpus.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"at place 0"):
        CorpusShards.open(corpus.folder)

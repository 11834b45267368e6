"""Every document is encoded once, in its place, whatever it was batched with."""

from __future__ import annotations

import errno
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from engine.errors import ArtifactError, TrainingError
from engine.models.encode import encode_documents, encode_queries
from engine.models.encode_sparse import encode_documents_sparsely, encode_queries_sparsely
from engine.models.inference import _compute_queued, batches_by_length
from engine.models.template import InputTemplate
from shards.embeddings import EmbeddingStore, Stamp, part_is_complete, write_part
from shards.errors import DiskFullError
from shards.files import save_array
from shards.manifest import ShardEntry, TokenStream
from shards.postings import PostingsStore
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, publish_manifest, write_shard

CPU = torch.device("cpu")
WORDS = [f"w{number}" for number in range(40)]
VOCAB = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
LENGTHS = (3, 30, 1, 12, 7, 25, 2, 9, 18, 5, 16)
MAX_LENGTH, BUDGET, D = 20, 64, 6
TABLE_VD = torch.from_numpy(np.random.default_rng(0).standard_normal((len(VOCAB), D))).float()


class Recorder:
    """An encoder that adds up a vector a token, so that padding or a wrong order would show, and notes its batches."""

    def __init__(self, scale: float = 1.0) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.scale = scale

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.batches.append(tuple(batch["input_ids"].shape))
        return self.scale * (TABLE_VD[batch["input_ids"]] * batch["attention_mask"].unsqueeze(-1)).sum(1)


def refuse(batch: dict[str, Tensor]) -> Tensor:
    raise AssertionError("nothing was to be encoded")


@pytest.fixture(scope="module")
def template() -> InputTemplate:
    return InputTemplate.from_tokenizer(BertTokenizer(vocab=VOCAB))


@pytest.fixture
def shards(tmp_path: Path) -> CorpusShards:
    folder = tmp_path / "shards"
    rng = np.random.default_rng(1)
    documents = [Document(f"d{i}", "", " ".join(rng.choice(WORDS, length))) for i, length in enumerate(LENGTHS)]
    stream = TokenStream("retriever", "a" * 64, 28)
    tokenization = Tokenization(stream, lambda texts: [[VOCAB[word] for word in text.split()] for text in texts])
    for number, (first, last) in enumerate([(0, 6), (6, 7), (7, 11)]):
        write_shard(documents[first:last], folder, number, first, [tokenization], "{text}")
    docids = [document.id for document in documents]
    publish_manifest(folder, docids, dataset_sha256="b" * 64, template="{text}", streams=[stream])
    return CorpusShards.open(folder)


def stamp_of(shards: CorpusShards, weights: str = "c" * 64) -> Stamp:
    return Stamp("1", weights, shards.manifest.sha256)


def expected_of(ids: list[int]) -> np.ndarray:
    cut = [VOCAB["[CLS]"], *ids[: MAX_LENGTH - 2], VOCAB["[SEP]"]]
    return TABLE_VD[cut].sum(0).numpy()


def run(
    encoder: object,
    template: InputTemplate,
    shards: CorpusShards,
    folder: Path,
    encode: Callable[..., None] = encode_documents,
    **changes: object,
) -> list[tuple]:
    seen: list[tuple[int, int]] = []
    settings = {
        "shard_numbers": [0, 1, 2],
        "stamp": stamp_of(shards),
        "max_length": MAX_LENGTH,
        "tokens_per_batch": BUDGET,
        "dtype": "float32",
        "device": CPU,
        "progress": lambda documents, tokens: seen.append((documents, tokens)),
    } | changes
    numbers, stamp = settings.pop("shard_numbers"), settings.pop("stamp")
    encode(encoder, template, shards, "retriever", numbers, folder, stamp, **settings)
    return seen


def test_documents_are_encoded_in_their_places(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    encoder = Recorder()
    seen = run(encoder, template, shards, tmp_path / "e")
    store = EmbeddingStore.open(tmp_path / "e", shards.manifest, stamp_of(shards), verify=True)
    expected = [expected_of(shards.tokens(index, "retriever").tolist()) for index in range(len(LENGTHS))]
    np.testing.assert_allclose(store.rows(np.arange(len(LENGTHS))), expected, rtol=1e-5, atol=1e-5)
    assert store.dtype == "float32"
    assert all(rows * length <= BUDGET for rows, length in encoder.batches)
    assert len(encoder.batches) < len(LENGTHS)
    assert sum(documents for documents, _ in seen) == len(LENGTHS)
    assert sum(tokens for _, tokens in seen) == sum(min(length, 28, MAX_LENGTH - 2) + 2 for length in LENGTHS)


def test_a_pass_goes_on_where_it_stopped(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    run(Recorder(), template, shards, tmp_path / "e", shard_numbers=[0, 2])
    encoder = Recorder()
    seen = run(encoder, template, shards, tmp_path / "e")
    assert len(encoder.batches) == 1  # shard 1 alone, of one document
    assert [entry for entry in seen if entry[1] == 0] == [(6, 0), (4, 0)]
    run(refuse, template, shards, tmp_path / "e")


def test_other_weights_encode_everything_again(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    run(Recorder(), template, shards, tmp_path / "e")
    newer = stamp_of(shards, "d" * 64)
    run(Recorder(scale=2.0), template, shards, tmp_path / "e", stamp=newer)
    rows = EmbeddingStore.open(tmp_path / "e", shards.manifest, newer).rows(np.array([4]))
    np.testing.assert_allclose(rows[0], 2 * expected_of(shards.tokens(4, "retriever").tolist()), rtol=1e-5, atol=1e-5)


def test_a_damaged_shard_is_found_before_it_is_encoded(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path
) -> None:
    tar = shards.folder / "000002.tar"
    content = bytearray(tar.read_bytes())
    content[-12 * 1024 :] = bytes(12 * 1024)
    tar.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"000002\.tar"):
        run(refuse, template, shards, tmp_path / "e", shard_numbers=[2])


def test_what_float16_cannot_hold_is_an_error(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    run(Recorder(), template, shards, tmp_path / "e", dtype="float16")
    assert EmbeddingStore.open(tmp_path / "e", shards.manifest, stamp_of(shards)).dtype == "float16"
    with pytest.raises(ArtifactError, match="not finite"):
        run(Recorder(scale=1e6), template, shards, tmp_path / "f", dtype="float16")


def test_queries_come_back_in_the_given_order(template: InputTemplate) -> None:
    rng = np.random.default_rng(2)
    queries = [rng.integers(5, len(VOCAB), length).tolist() for length in (4, 0, 17, 1, 40, 9)]
    found_QD = encode_queries(Recorder(), template, queries, max_length=MAX_LENGTH, tokens_per_batch=BUDGET, device=CPU)
    assert found_QD.dtype == np.float32
    np.testing.assert_allclose(found_QD, [expected_of(ids) for ids in queries], rtol=1e-5, atol=1e-5)


def test_the_next_shard_is_asked_for_when_half_of_this_one_is_encoded(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path
) -> None:
    """A rank that took shards early would sit on work that a faster one could do; late, the device would wait."""
    taken: list[int] = []
    asked = threading.Event()

    def hand_out() -> Iterator[int]:
        taken.append(0)
        yield 0
        taken.append(2)
        asked.set()
        yield 2

    done = 0

    def progress(documents: int, tokens: int) -> None:
        nonlocal done
        done += documents
        if done < 3:
            assert not asked.wait(0.05), "the first has six documents"
        if done == 6:
            assert asked.wait(30), "it is asked for before this one is written"

    changes = {"shard_numbers": hand_out(), "progress": progress, "tokens_per_batch": 1}
    run(Recorder(), template, shards, tmp_path / "e", **changes)
    assert (taken, done) == ([0, 2], 10)
    assert [part_is_complete(tmp_path / "e", entry, stamp_of(shards)) for entry in shards.manifest.shards] == [1, 0, 1]


def test_a_shard_is_written_while_the_next_is_encoded(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow file system held the device up after every shard; a kill then loses one finished shard at most."""
    encoding_next, begun = threading.Event(), list[int]()

    def slow_write(folder: Path, entry: ShardEntry, *rest: Any) -> None:
        begun.append(entry.number)
        if entry.number == 0:
            assert encoding_next.wait(30)
        write_part(folder, entry, *rest)

    class Second(Recorder):
        def __call__(self, batch: dict[str, Tensor]) -> Tensor:
            if begun:
                encoding_next.set()
                assert begun == [0], "one is written at a time"
            return super().__call__(batch)

    monkeypatch.setattr("engine.models.encode.write_part", slow_write)
    run(Second(), template, shards, tmp_path / "e", shard_numbers=[0, 1])
    assert begun == [0, 1]
    assert all(part_is_complete(tmp_path / "e", entry, stamp_of(shards)) for entry in shards.manifest.shards[:2])


def test_a_full_disk_ends_the_pass_and_keeps_what_is_written(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *pieces: np.ndarray) -> None:
        if path.name.startswith(".part-000001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_array(path, *pieces)

    monkeypatch.setattr("shards.embeddings.save_array", full)
    threads = threading.active_count()
    with pytest.raises(DiskFullError, match=r"the disk is full: .*part-000001.npy needs about \d+ bytes"):
        run(Recorder(), template, shards, tmp_path / "e")
    there = [part_is_complete(tmp_path / "e", entry, stamp_of(shards)) for entry in shards.manifest.shards]
    assert there[:2] == [True, False]
    assert threading.active_count() == threads
    monkeypatch.undo()
    run(Recorder(), template, shards, tmp_path / "e")
    run(refuse, template, shards, tmp_path / "e")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_every_thread_encodes_batches_of_its_own(template: InputTemplate) -> None:
    meeting, seen = threading.Barrier(3, timeout=30), []

    def encoder(batch: dict[str, Tensor]) -> Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        meeting.wait()  # ends only when three batches are computed at the same time
        return Recorder()(batch)

    encode_queries(encoder, template, [[5] * 6] * 3, max_length=8, tokens_per_batch=8, device=CPU)
    assert len({thread for thread, _ in seen}) == 3
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_a_forward_on_the_cpu_stays_small(template: InputTemplate) -> None:
    encoder = Recorder()
    encode_queries(encoder, template, [[5] * 30] * 100, max_length=32, tokens_per_batch=10_000, device=CPU)
    assert sorted(encoder.batches) == [(4, 32), (32, 32), (32, 32), (32, 32)]


@pytest.mark.usefixtures("three_threads")
def test_progress_is_told_by_one_thread(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    """A progress bar that threads move at the same time prints over itself."""
    callers = set()
    run(
        Recorder(),
        template,
        shards,
        tmp_path / "e",
        progress=lambda _documents, _tokens: callers.add(threading.get_ident()),
    )
    assert callers == {threading.get_ident()}


@pytest.mark.usefixtures("three_threads")
def test_an_error_of_one_batch_stops_the_others(template: InputTemplate) -> None:
    calls: list[int] = []

    def encoder(batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode_queries(encoder, template, [[5] * 6] * 2000, max_length=8, tokens_per_batch=8, device=CPU)
    assert len(calls) < 2000
    assert torch.get_num_threads() == 3


def test_an_error_while_results_are_kept_leaves_the_threads_as_they_were(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path
) -> None:
    before = torch.get_num_threads()

    def interrupt(_documents: int, _tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Recorder(), template, shards, tmp_path / "e", progress=interrupt)
    assert torch.get_num_threads() == before
    assert not list((tmp_path / "e").glob("*.json"))


def test_on_a_gpu_a_batch_is_kept_while_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        """Of the device's queue; here only noted."""

        def record(self) -> None:
            done.append("copy")

        def synchronize(self) -> None:
            done.append("wait")

    def forward(places: list[int]) -> Tensor:
        done.append(f"forward {places}")
        return torch.tensor(places)

    kept: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    _compute_queued(forward, [[3], [1, 2], [0]], lambda places, rows: kept.append((places, rows.tolist())))
    assert kept == [([3], [3]), ([1, 2], [1, 2]), ([0], [0])]
    assert done == ["forward [3]", "copy", "forward [1, 2]", "copy", "wait", "forward [0]", "copy", "wait", "wait"]


def test_a_query_that_is_not_finite_is_named(template: InputTemplate) -> None:
    def encoder(batch: dict[str, Tensor]) -> Tensor:
        sums_ND = Recorder()(batch)
        return torch.where((batch["input_ids"] == 7).any(1, keepdim=True), torch.nan, sums_ND)

    with pytest.raises(TrainingError, match="query 2 of 3"):
        encode_queries(encoder, template, [[8], [9, 9, 9], [7]], max_length=8, tokens_per_batch=64, device=CPU)
    with pytest.raises(ValueError, match="no query"):
        encode_queries(encoder, template, [], max_length=8, tokens_per_batch=64, device=CPU)


@pytest.mark.parametrize("budget", [8, 64, 100, 10_000])
def test_batches_cover_all_and_keep_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 70, 200).tolist()
    batches = list(batches_by_length(lengths, budget))
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    longest = [max(lengths[place] for place in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == max(lengths)
    for batch, length in zip(batches, longest, strict=True):
        padded = -(-length // 8) * 8
        assert len(batch) * padded <= budget or len(batch) == 1
    assert list(batches_by_length([], budget)) == []


@pytest.mark.parametrize("budget", [8, 64, 100, 10_000])
def test_batches_without_padding_are_filled_with_tokens(budget: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 70, 200).tolist()
    batches = list(batches_by_length(lengths, budget, padded=False))
    assert [place for batch in batches for place in batch] == sorted(range(200), key=lambda place: -lengths[place])
    tokens = [sum(lengths[place] for place in batch) for batch in batches]
    assert all(count <= budget or len(batch) == 1 for count, batch in zip(tokens, batches, strict=True))
    following = [lengths[batch[0]] for batch in batches[1:]]
    assert all(count + first > budget for count, first in zip(tokens, following, strict=False))


# --- sparse vectors --------------------------------------------------------------------------------------------------


class SparseRecorder(Recorder):
    """As `Recorder`, with what is below 1 cut off, so that most weights are 0; notes how many dense rows are held."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.given: list[weakref.ref[Tensor]] = []
        self.most_held = 0

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        rows_NV = torch.relu(super().__call__(batch) - 1)
        self.given.append(weakref.ref(rows_NV))
        self.most_held = max(self.most_held, sum(one() is not None for one in self.given))
        return rows_NV


def sparse_expected_of(ids: list[int]) -> np.ndarray:
    return np.maximum(expected_of(ids) - 1, 0)


def run_sparse(*words: Any, **changes: object) -> list[tuple]:
    return run(*words, encode=encode_documents_sparsely, **changes)


def dense_of(folder: Path, shards: CorpusShards) -> np.ndarray:
    store = PostingsStore.open(folder, shards.manifest, stamp_of(shards), verify=True)
    dense_NV = np.zeros((store.num_documents, store.num_terms), dtype=np.float32)
    for block in store.blocks():
        terms = np.repeat(np.arange(store.num_terms), np.diff(block.starts_V))
        dense_NV[block.first_document + block.documents_P.astype(int), terms] = block.weights_P
    return dense_NV


def test_documents_are_encoded_sparsely_in_their_places(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path
) -> None:
    seen = run_sparse(SparseRecorder(), template, shards, tmp_path / "p")
    expected_NV = np.array(
        [sparse_expected_of(shards.tokens(row, "retriever").tolist()) for row in range(len(LENGTHS))]
    )
    assert 0.2 < (expected_NV > 0).mean() < 0.8
    found_NV = dense_of(tmp_path / "p", shards)
    np.testing.assert_allclose(found_NV, expected_NV, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found_NV > 0, expected_NV > 0)
    assert sum(documents for documents, _ in seen) == len(LENGTHS)
    assert sum(tokens for _, tokens in seen) == sum(min(length, 28, MAX_LENGTH - 2) + 2 for length in LENGTHS)


def test_dense_rows_are_let_go_batch_by_batch(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    """Symptom: 10,000 documents with a number for each of 30,522 words take 1.2 GB."""
    encoder = SparseRecorder()
    run_sparse(encoder, template, shards, tmp_path / "p")
    assert len(encoder.given) > 4
    # The rows of one batch and what they are made sparse from; a thread may not have let go of the last batch's.
    assert encoder.most_held <= 2


def test_a_sparse_pass_that_was_ended_goes_on_to_equal_bytes(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path
) -> None:
    def bytes_of(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    run_sparse(SparseRecorder(), template, shards, tmp_path / "whole")

    done = 0

    def interrupt(documents: int, tokens: int) -> None:
        nonlocal done
        done += documents
        if done > 7:  # in the third shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sparse(SparseRecorder(), template, shards, tmp_path / "ended", progress=interrupt)
    assert len(bytes_of(tmp_path / "ended")) == 4, "the second, which was finished, is kept"
    encoder = SparseRecorder()
    seen = run_sparse(encoder, template, shards, tmp_path / "ended")
    assert [entry for entry in seen if entry[1] == 0] == [(6, 0), (1, 0)]
    assert bytes_of(tmp_path / "ended") == bytes_of(tmp_path / "whole")
    run_sparse(refuse, template, shards, tmp_path / "ended")


@pytest.mark.usefixtures("three_threads")
def test_sparse_bytes_do_not_depend_on_threads(template: InputTemplate, shards: CorpusShards, tmp_path: Path) -> None:
    run_sparse(SparseRecorder(), template, shards, tmp_path / "three")
    torch.set_num_threads(1)
    run_sparse(SparseRecorder(), template, shards, tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()


def test_sparse_queries_come_back_in_the_given_order(template: InputTemplate) -> None:
    rng = np.random.default_rng(2)
    queries = [rng.integers(5, len(VOCAB), length).tolist() for length in (4, 0, 17, 1, 40, 9)]
    options: dict[str, Any] = {"max_length": MAX_LENGTH, "tokens_per_batch": BUDGET, "device": CPU}
    found_QV = encode_queries_sparsely(SparseRecorder(), template, queries, **options)
    assert found_QV.dtype == np.float32
    assert found_QV.has_sorted_indices
    np.testing.assert_allclose(found_QV.toarray(), [sparse_expected_of(ids) for ids in queries], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no query"):
        encode_queries_sparsely(SparseRecorder(), template, [], **options)


@pytest.mark.parametrize("scale", [np.nan, -1.0])
def test_sparse_weights_that_no_search_can_add_up_are_errors(
    template: InputTemplate, shards: CorpusShards, tmp_path: Path, scale: float
) -> None:
    def encoder(batch: dict[str, Tensor]) -> Tensor:
        return scale * (1 + torch.arange(4.0)).repeat(len(batch["input_ids"]), 1)

    with pytest.raises(ArtifactError, match=r"term 0 in document 0 .*and 23 more"):
        run_sparse(encoder, template, shards, tmp_path / "p")
    with pytest.raises(TrainingError, match=r"query 0 of 2 has the weight .*and 7 more"):
        encode_queries_sparsely(encoder, template, [[5], [6]], max_length=8, tokens_per_batch=64, device=CPU)

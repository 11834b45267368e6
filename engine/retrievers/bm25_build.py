"""BM25's index by parts of the corpus, on all ranks: count, merge the counts, weight.

1. Each part's documents are read once, and the occurrences of their words counted (`count_part`).
2. The words of all parts are merged into one vocabulary with the number of documents that have each of them, in buckets
   of hashes, so that no rank holds all words (`merge_bucket`).
3. Each part's counts become weights by these numbers and the mean length of all documents (`weight_part`).

Parts and buckets are functions of the corpus and are handed out to whoever is free; what is finished is a file with a
marker, so that a build which was killed goes on, and its bytes are the same whoever did what. What a rank holds does
not grow with the corpus: a part has 65,536 documents at most, or one shard where that has more.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse  # type: ignore[import-untyped]

from engine.config.bm25 import Bm25Config
from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError, DataError
from engine.log import get_logger
from engine.reliability.progress import progress_bar
from engine.retrievers.bm25_files import (
    VERSION,
    WORD,
    Bm25Folder,
    BucketMarker,
    Manifest,
    PartMarker,
    Plan,
    PostingsOf,
    Statistics,
    damaged,
    fault_of,
    hash_words,
    read_part,
    remove,
    span_of_bucket,
    write_bucket,
    write_part,
)
from engine.retrievers.bm25_store import Vocabulary
from engine.retrievers.words import Analyzer, Words
from shards.files import read_record, write_json
from shards.postings import DOCUMENTS_PER_BLOCK

log = get_logger(__name__)
_WORDS_PER_BUCKET = 2**21
"""Words of all parts together that a rank merges at a time: some 120 MiB."""
_MOST_BUCKETS = 2**12
_DEFAULTS = Bm25Config()


def build_bm25(
    coordinator: Coordinator,
    read: Callable[[int], Iterable[str]],
    sizes: Sequence[int],
    folder: Path,
    *,
    words: Words = Words.of(_DEFAULTS),  # noqa: B008 - frozen
    k1: float = _DEFAULTS.k1,
    b: float = _DEFAULTS.b,
    metadata: Mapping[str, Any] | None = None,
    name: str = "bm25",
) -> None:
    """Index the texts of a corpus with all ranks, and publish the index; what is finished of it is taken.

    Args:
        coordinator: Between the ranks, which all call this alike.
        read: Gives the texts of a part's documents, in their order.
        sizes: Documents of each part.
        folder: Where the index goes, the same for all ranks; one that was made of something else is removed first.
        words: How texts become words; recorded, so that queries are read alike.
        k1: How soon further occurrences of a word stop counting, > 0.
        b: How much long documents are marked down, 0..1.
        metadata: What the index is made of, such as `{"corpus_sha256": ...}`; `BM25Searcher.open` compares it.
        name: Of the work, for progress and errors.

    Raises:
        DataError: No text has a single word that could be indexed.
    """
    plan = Plan(VERSION, words, k1, b, dict(metadata or {}), tuple(sizes))
    files = Bm25Folder(folder)
    to_count = coordinator.only_rank_zero(f"{name}: plan", lambda: _to_count(files, plan))
    before = np.cumsum([0, *(sizes[number] for number in to_count)]).tolist()
    with (
        progress_bar(name, before[-1], "doc", shown=coordinator.rank == 0) as bar,
        coordinator.agreement(f"{name}: count words"),
    ):
        for number in coordinator.hand_out(f"{name}: count words", to_count):
            bar.update(before[to_count.index(number)] - bar.n)
            count_part(files, number, read(number), plan)
    num_buckets, to_merge = coordinator.only_rank_zero(f"{name}: plan vocabulary", lambda: _to_merge(files, plan))
    with coordinator.agreement(f"{name}: merge words"):
        for number in coordinator.hand_out(f"{name}: merge words", to_merge):
            merge_bucket(files, number, num_buckets, len(sizes))
    to_weight = coordinator.only_rank_zero(f"{name}: plan weights", lambda: _to_weight(files, plan, num_buckets))
    with coordinator.agreement(f"{name}: weight words"):
        for number in coordinator.hand_out(f"{name}: weight words", to_weight):
            weight_part(files, number, plan)
    coordinator.only_rank_zero(f"{name}: publish", lambda: _publish(files, plan))


def count_part(files: Bm25Folder, number: int, texts: Iterable[str], plan: Plan) -> None:
    """Count the words of a part's documents.

    Args:
        files: Of the index.
        number: Of the part.
        texts: Of its documents, in their order.
        plan: How texts become words.

    Raises:
        ArtifactError: There are fewer or more texts than documents.
    """
    analyzer, ids, lengths = Analyzer(plan.words), array("i"), array("q")
    for text in texts:
        before = len(ids)
        ids.extend(analyzer.learn(text))
        lengths.append(len(ids) - before)
    if len(lengths) != plan.sizes[number]:
        raise ArtifactError(
            f"part {number} of the corpus gives {len(lengths)} documents to BM25",
            expected=f"{plan.sizes[number]}, by its manifest",
            remedy="write the shards again",
        )
    # Sorted by their hashes, words have one order whatever the documents that they were met in.
    words_V = hash_words(analyzer.vocabulary)
    order_V = np.argsort(words_V, kind="stable")
    place_of_V = np.empty(len(order_V), dtype=np.int32)
    place_of_V[order_V] = np.arange(len(order_V), dtype=np.int32)
    words_P = place_of_V[np.frombuffer(ids, dtype=np.int32)] if len(ids) else np.empty(0, np.int32)
    ends_N = np.cumsum(np.array(lengths))
    blocks = []
    for first in range(0, len(lengths), DOCUMENTS_PER_BLOCK):
        lengths_N = np.array(lengths[first : first + DOCUMENTS_PER_BLOCK])
        stop = int(ends_N[first + len(lengths_N) - 1])
        documents_P = np.repeat(np.arange(len(lengths_N), dtype=np.int32), lengths_N)
        found = (np.ones(len(documents_P), np.float32), (words_P[stop - len(documents_P) : stop], documents_P))
        blocks.append(_by_word(sparse.coo_array(found, shape=(len(words_V), len(lengths_N)))))
    write_part(files.counts(number), words_V[order_V], blocks, num_documents=len(lengths), num_tokens=len(ids))


def merge_bucket(files: Bm25Folder, number: int, num_buckets: int, num_parts: int) -> None:
    """Merge the words of all parts whose hashes are of one bucket, and add up the documents that have them.

    Args:
        files: Of the index; all parts have been counted.
        number: Of the bucket.
        num_buckets: All.
        num_parts: All.

    Raises:
        ArtifactError: The counts of a part are damaged.
    """
    words, documents = [np.empty(0, WORD)], [np.empty(0, np.int64)]
    for part in range(num_parts):
        words_V, blocks = read_part(files.counts(part), _marker(files.counts(part), PartMarker), WORD, check=False)
        own = span_of_bucket(words_V, number, num_buckets)
        words.append(np.array(words_V[own]))
        have_V = (np.diff(block.starts_V[own.start : own.stop + 1]) for block in blocks)
        documents.append(sum(have_V, np.zeros(len(words[-1]), np.int64)))
    merged_V, places = np.unique(np.concatenate(words), return_inverse=True)
    added_V = np.zeros(len(merged_V), dtype=np.int64)
    np.add.at(added_V, places, np.concatenate(documents))
    write_bucket(files.bucket(number), merged_V, added_V)


def weight_part(files: Bm25Folder, number: int, plan: Plan) -> None:
    """Make weights of a part's counts by the numbers of the whole corpus, and remove the counts.

    Args:
        files: Of the index, whose vocabulary is whole.
        number: Of the part.
        plan: Formula.

    Raises:
        ArtifactError: The counts of the part, or a bucket of the vocabulary, are damaged.
    """
    statistics = read_record(files.statistics, Statistics, "the numbers of BM25's vocabulary")
    marker = _marker(files.counts(number), PartMarker)
    words_V, blocks = read_part(files.counts(number), marker, WORD)
    ids_V, num_documents_V = Vocabulary(files, statistics.buckets).find(words_V)
    if (ids_V < 0).any():
        raise damaged(files.counts(number), "has words that the vocabulary does not have")
    formula = statistics.formula(plan)
    idf_V = formula.idf(num_documents_V)
    weighted = []
    for block in blocks:
        counts_P = block.weights_P.astype(np.float64)
        lengths_N = np.bincount(block.documents_P, weights=counts_P, minlength=block.num_documents)
        saturation_N = formula.saturation(lengths_N.astype(np.float64))
        weights_P = np.repeat(idf_V, np.diff(block.starts_V)) * counts_P / (counts_P + saturation_N[block.documents_P])
        weighted.append(PostingsOf(block.starts_V, weights_P.astype(np.float32), block.documents_P))
    write_part(files.part(number), ids_V, weighted, num_documents=marker.num_documents, num_tokens=marker.num_tokens)
    remove(files.counts(number))


def _by_word(counts_VN: sparse.coo_array) -> PostingsOf:
    """Add up the occurrences of each word in each document, documents ascending for a word."""
    counts = counts_VN.tocsr()
    counts.sort_indices()
    return PostingsOf(counts.indptr.astype(np.int64), counts.data, counts.indices.astype(np.uint16))


def _to_count(files: Bm25Folder, plan: Plan) -> list[int]:
    """Make the folder ready and list the parts that are still to be counted; what is damaged of others is removed."""
    if not _is_of(files, plan):
        shutil.rmtree(files.path, ignore_errors=True)
        write_json(files.plan, asdict(plan))
        return list(range(len(plan.sizes)))
    files.manifest.unlink(missing_ok=True)
    parts = range(len(plan.sizes))
    weighted = {number for number in parts if _whole(files.part(number))}
    counted = {number for number in parts if _whole(files.counts(number))}
    has_vocabulary = _statistics(files) is not None
    return [number for number in parts if number not in counted and not (has_vocabulary and number in weighted)]


def _to_merge(files: Bm25Folder, plan: Plan) -> tuple[int, list[int]]:
    """Return into how many buckets the words are merged, and those that are still to be.

    Raises:
        DataError: There is no word.
    """
    if (statistics := _statistics(files)) is not None:
        return len(statistics.buckets), []
    counted = [_marker(files.counts(number), PartMarker) for number in range(len(plan.sizes))]
    num_words = sum(marker.num_words for marker in counted)
    if not num_words:
        raise DataError(
            f"None of {sum(plan.sizes)} documents has a word to index",
            expected="words of two or more letters or digits that are not all stop words",
            remedy="check the corpus file's text field, and bm25.stopwords",
        )
    num_buckets = 1
    while num_buckets < _MOST_BUCKETS and num_buckets * _WORDS_PER_BUCKET < num_words:
        num_buckets *= 2
    merged = (fault_of(files.bucket(number), BucketMarker, verify=True) for number in range(num_buckets))
    return num_buckets, [number for number, (fault, _) in enumerate(merged) if fault]


def _to_weight(files: Bm25Folder, plan: Plan, num_buckets: int) -> list[int]:
    """Record the numbers of the merged vocabulary and list the parts that are still to be weighted."""
    if _statistics(files) is None:
        counted = [_marker(files.counts(number), PartMarker) for number in range(len(plan.sizes))]
        buckets = tuple(_marker(files.bucket(number), BucketMarker) for number in range(num_buckets))
        num_tokens = sum(marker.num_tokens for marker in counted)
        write_json(files.statistics, asdict(Statistics(sum(plan.sizes), num_tokens, buckets)))
    return [number for number in range(len(plan.sizes)) if fault_of(files.part(number), PartMarker)[0]]


def _publish(files: Bm25Folder, plan: Plan) -> None:
    statistics = read_record(files.statistics, Statistics, "the numbers of BM25's vocabulary")
    parts = tuple(_marker(files.part(number), PartMarker) for number in range(len(plan.sizes)))
    write_json(files.manifest, asdict(Manifest(plan, statistics, parts)))
    files.remove_leftovers()


def _is_of(files: Bm25Folder, plan: Plan) -> bool:
    try:
        return read_record(files.plan, Plan, "the plan of BM25's index") == plan
    except ArtifactError:
        return False


def _statistics(files: Bm25Folder) -> Statistics | None:
    """Return the numbers of the vocabulary, if all of it is there and whole."""
    try:
        statistics = read_record(files.statistics, Statistics, "the numbers of BM25's vocabulary")
    except ArtifactError:
        return None
    for number, bucket in enumerate(statistics.buckets):
        fault, marker = fault_of(files.bucket(number), BucketMarker, verify=True)
        if fault or marker != bucket:
            log.warning("%s %s: it is made again", files.bucket(number), fault or "is of another vocabulary")
            remove(files.bucket(number))
            files.statistics.unlink(missing_ok=True)
            return None
    return statistics


def _whole(path: Path) -> bool:
    """Tell whether an array is there and has its hash; one that is damaged is removed."""
    fault, _ = fault_of(path, PartMarker, verify=True)
    if fault and path.exists():
        log.warning("%s %s: it is made again", path, fault)
        remove(path)
    return not fault


def _marker(path: Path, kind: type[Any]) -> Any:
    fault, marker = fault_of(path, kind)
    if fault:
        raise damaged(path, fault)
    return marker

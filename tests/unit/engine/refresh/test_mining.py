"""Mining: what may not be a negative is taken out, and the search goes as deep as it must so that n remain."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import scipy.sparse as sparse

from engine.config.timetable import Visit
from engine.data.batches import Samples, rows_drawn
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.found_positives import FoundPositive
from engine.errors import ArtifactError, DataError
from engine.refresh.mining import mine
from engine.run import Run, Stage
from engine.search import Hits
from shards.embeddings import Stamp
from shards.records import Document, Query

Open = Callable[..., Run]
STAMP = Stamp("001", "a" * 64, "b" * 64)
N = 30


@dataclass
class FakeShards:
    """Document i has the text that is its number in words of a made-up kind."""

    texts: list[str]

    @property
    def num_documents(self) -> int:
        return len(self.texts)

    def document(self, index: int) -> Document:
        return Document(f"d{index}", "", self.texts[index])


@dataclass
class FakeSearcher:
    """Finds document 0 first, then 1, and so on, for every query."""

    num_documents: int = N
    source: str = "dense"
    block_size: int = 512
    asked: list[tuple[list[str], int]] = field(default_factory=list)

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        self.asked.append(([query.id for query in queries], top_k))
        row = np.arange(top_k, dtype=np.int64)
        documents_QK = np.tile(np.where(row < self.num_documents, row, -1), (len(queries), 1))
        scores_QK = np.tile(np.where(row < self.num_documents, -row, -np.inf).astype(np.float32), (len(queries), 1))
        return Hits(documents_QK, scores_QK)


def data_of(
    positives: Sequence[Sequence[int]],
    answers: Sequence[tuple[str, ...]] | None = None,
    texts: list[str] | None = None,
) -> Data:
    queries = [Query(f"q{row}", f"question {row}", answers[row] if answers else ()) for row in range(len(positives))]
    train = TrainingQueries(
        queries, [np.array(known, dtype=np.int64) for known in positives], {"retriever": [[1]] * len(queries)}
    )
    shards = FakeShards(texts or [f"text number {index}" for index in range(N)])
    return Data(None, shards, {}, train)  # type: ignore[arg-type]


def mined(
    run: Run, data: Data, searcher: FakeSearcher, *, top_k: int = 5, needed: int = 3, rows: Sequence[int] | None = None
) -> Candidates:
    chosen = np.arange(len(data.train)) if rows is None else np.array(rows)
    stage = Stage(run, "candidates/001")
    mine(stage, data, searcher, chosen, STAMP, top_k=top_k, needed=needed, name="001")
    return Candidates.load(run.folder.candidates("001"), STAMP)


def test_positives_are_taken_out_and_the_next_ones_move_up(open_run: Open) -> None:
    searcher = FakeSearcher()
    found = mined(open_run(), data_of([[0], [2, 3], []]), searcher)
    assert found.documents_QK.tolist() == [[1, 2, 3, 4, 5], [0, 1, 4, 5, 6], [0, 1, 2, 3, 4]]
    assert (found.source, found.stamp, found.qids) == ("dense", STAMP, ["q0", "q1", "q2"])
    assert (found.counts["positives"], found.counts["answers"]) == (3, 0)
    assert searcher.asked == [(["q0", "q1", "q2"], 7)], "as many more as the largest set of positives"


def test_documents_with_an_answer_are_taken_out(open_run: Open) -> None:
    texts = [f"text number {index}" for index in range(N)]
    texts[1] = "It was built in Paris, they say."
    texts[4] = "paris"
    found = mined(open_run(), data_of([[0], [0]], [("Paris",), ()], texts), FakeSearcher())
    assert found.row("q0").tolist() == [2, 3, 5, 6], "enough, so nothing deeper is fetched"
    assert found.row("q1").tolist() == [1, 2, 3, 4, 5]
    assert (found.counts["positives"], found.counts["answers"]) == (2, 2)


def test_where_positives_stood_is_kept(open_run: Open) -> None:
    """Mining took positives out without a trace, so that nothing could measure a negative by its positive's score."""
    run = open_run()
    found = mined(run, data_of([[0, 4], [25], [3]]), FakeSearcher(block_size=2))
    assert [found.positives.at(row) for row in range(3)] == [
        [FoundPositive(0, 1, 0.0), FoundPositive(4, 5, -4.0)],
        [],
        [FoundPositive(3, 4, -3.0)],
    ], "25 lies deeper than five candidates reach"


def test_known_false_negatives_are_taken_out_and_counted_by_themselves(open_run: Open) -> None:
    """Symptom: passages that other annotators found relevant are trained on as hard negatives."""
    data = data_of([[0], [1]])
    train = replace(data.train, false_negatives=[np.array([2, 0]), np.array([], dtype=np.int64)])
    found = mined(open_run(), replace(data, train=train), FakeSearcher())
    assert found.documents_QK.tolist() == [[1, 3, 4, 5, 6], [0, 2, 3, 4, 5]]
    assert found.counts == {"positives": 2, "false_negatives": 1}, "a positive is counted as a positive"


def test_the_document_that_is_the_query_is_no_negative(open_run: Open) -> None:
    """Symptom: where queries are documents, the first hard negative of a query was its own text."""
    data = data_of([[3], [1]])
    data = replace(data, train=replace(data.train, own_documents={"q0": 0, "q1": 1}))
    run = open_run()
    found = mined(run, data, FakeSearcher())
    assert found.documents_QK.tolist() == [[1, 2, 4, 5, 6], [0, 2, 3, 4, 5]]
    assert found.counts == {"positives": 2, "identical_ids": 1}, "a positive is counted as a positive"
    line = json.loads((run.folder.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["candidates/removed_identical_ids"] == 1.0


@dataclass
class LexicalSearcher(FakeSearcher):
    """Finds the first documents, as many as a query's number says."""

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        hits = super().search(queries, top_k)
        found_Q = np.array([int(query.id[1:]) for query in queries])
        found_QK = np.arange(top_k) < found_Q[:, None]
        documents_QK = np.where(found_QK, hits.documents_QK, -1)
        return Hits(documents_QK, np.where(found_QK, hits.scores_QK, np.float32(-np.inf)))


def test_what_a_retriever_does_not_find_is_drawn_from_the_corpus(open_run: Open) -> None:
    """Symptom guarded against: a query that shares no word with three documents stops the run at its warm-up."""
    run, data = open_run(), data_of([[20], [20], [20], [20], [20], [1, 20, 21]])
    searcher = LexicalSearcher()
    found = mined(run, data, searcher, needed=4)
    assert [depth for _, depth in searcher.asked] == [8], "there is nothing to be found deeper"
    rows = found.documents_QK
    assert found.row("q5").tolist() == [0, 2, 3, 4], "enough was found; no more is drawn than is needed"
    for row, num_found in enumerate([0, 1, 2, 3]):
        assert rows[row, :num_found].tolist() == list(range(num_found))
        drawn = rows[row, num_found:4].tolist()
        assert len({*drawn, *range(num_found), 20}) == 4 + 1, "different ones, and no positive"
        assert rows[row, 4] == -1
        assert np.isneginf(found.scores_QK[row, num_found:]).all()
    assert (found.counts["drawn"], found.counts["without_hits"]) == (4 + 3 + 2 + 1, 1)
    assert len({tuple(row) for row in rows[:, 2:4].tolist()}) > 3, "every query has its own"
    shutil.rmtree(run.folder.candidates("001"))
    again = mined(run, data, LexicalSearcher(block_size=1), needed=4)
    np.testing.assert_array_equal(again.documents_QK, rows)


def test_what_is_drawn_has_no_answer_either(open_run: Open) -> None:
    texts = ["the answer is Paris"] * (N - 4) + [f"text number {index}" for index in range(4)]
    found = mined(open_run(), data_of([[20], [N - 1]], [("Paris",), ("Paris",)], texts), LexicalSearcher())
    assert sorted(found.row("q1").tolist()) == [N - 4, N - 3, N - 2]
    assert found.counts["answers"] == 1, "the hit of q1"


def test_where_nothing_is_left_without_an_answer_it_is_drawn_with_one(open_run: Open) -> None:
    found = mined(open_run(), data_of([[20], [20]], [("the",), ("the",)], ["the text"] * N), LexicalSearcher())
    assert found.row("q1")[0] == 0
    assert (len(found.row("q0")), len(found.row("q1"))) == (3, 3)
    assert (found.counts["drawn"], found.counts["answers"]) == (3 + 2, 0)


def test_a_retriever_that_finds_nothing_for_most_queries_is_told_of(
    open_run: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: BM25 in another language than the texts' gave a table of zeros and no word about it."""
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    mined(open_run(), data_of([[20]] * 3), LexicalSearcher())
    assert "finds nothing" not in caplog.text
    data = data_of([[20]] * 3)
    none = [replace(query, id=f"q0{row}") for row, query in enumerate(data.train.queries)]

    class Deaf(LexicalSearcher):
        def search(self, queries: Sequence[Query], top_k: int) -> Hits:
            return super().search([Query("q0", "") for _ in queries], top_k)

    mined(open_run(), replace(data, train=replace(data.train, queries=none)), Deaf(source="bm25"), top_k=6)
    assert "bm25 finds nothing for 3 of 3 queries" in caplog.text


def test_answers_stay_in_where_the_recipe_says_so(open_run: Open) -> None:
    texts = ["paris"] * N
    found = mined(open_run("ar2.remove_answers=false"), data_of([[0]], [("Paris",)], texts), FakeSearcher())
    assert found.row("q0").tolist() == [1, 2, 3, 4, 5]
    assert found.counts["answers"] == 0


def test_the_search_goes_deeper_only_for_queries_that_keep_too_few(open_run: Open) -> None:
    texts = ["the answer is Paris"] * 12 + [f"text number {index}" for index in range(N - 12)]
    searcher = FakeSearcher()
    found = mined(open_run(), data_of([[20], [20]], [("Paris",), ("London",)], texts), searcher)
    assert [qids for qids, _ in searcher.asked] == [["q0", "q1"], ["q0"]]
    depths = [depth for _, depth in searcher.asked]
    assert depths[0] < depths[1] <= N
    assert found.row("q0").tolist() == [12, 13, 14, 15, 16]
    assert found.row("q1").tolist() == [0, 1, 2, 3, 4]
    assert found.counts["answers"] == 12, "what was taken out in both passes counts once"
    assert found.counts["positives"] == 0, "the positive lies deeper than what was kept"


@dataclass
class ShuffledSearcher(FakeSearcher):
    """Ranks all documents in an order that each query has of its own."""

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        super().search(queries, top_k)
        documents_QK = np.array([ranking_of(query.id, self.num_documents)[:top_k] for query in queries])
        return Hits(documents_QK, np.tile(-np.arange(top_k, dtype=np.float32), (len(queries), 1)))


def ranking_of(qid: str, num_documents: int) -> list[int]:
    order: list[int] = np.random.default_rng(int(qid[1:])).permutation(num_documents).tolist()
    return order


def with_answers_everywhere(num_documents: int) -> Data:
    """Queries of which from none to nearly all of the documents have the answer."""
    draw = np.random.default_rng(5)
    answers = [(f"word{row}",) for row in range(12)]
    texts = [
        " ".join(f"word{row}" for row in range(12) if draw.random() < row / 12) + " text"
        for document in range(num_documents)
    ]
    data = data_of([[row] for row in range(12)], answers, texts)
    return replace(data, shards=FakeShards(texts))  # type: ignore[arg-type]


@pytest.mark.parametrize("deeper", [1, 2, 4, 50])
def test_a_deeper_search_finds_what_brute_force_finds(open_run: Open, deeper: int) -> None:
    """Symptom: questions with a frequent answer kept a handful of 100 candidates, and saw the same few negatives."""
    num_documents, top_k, needed, first = 200, 10, 2, 10 + 1 + 10 // 4
    data = with_answers_everywhere(num_documents)
    searcher = ShuffledSearcher(num_documents, block_size=5)
    found = mined(open_run(f"ar2.search_deeper={deeper}"), data, searcher, top_k=top_k, needed=needed)
    num_short = num_deeper = 0
    for row, query in enumerate(data.train.queries):
        (answer,) = query.answers
        usable = [
            document if document != row and answer not in data.shards.document(document).text.split() else None
            for document in ranking_of(query.id, num_documents)
        ]
        depth = first
        while depth < num_documents and sum(one is not None for one in usable[:depth]) < (
            top_k if depth < deeper * top_k else needed
        ):
            depth = min(4 * depth, deeper * top_k if depth < deeper * top_k else num_documents, num_documents)
        kept = [document for document in usable[:depth] if document is not None][:top_k]
        assert found.row(query.id).tolist() == kept, query.id
        num_short, num_deeper = num_short + (len(kept) < top_k), num_deeper + (depth > first)
    assert (found.counts["short"], found.counts["deeper"]) == (num_short, num_deeper)
    assert (num_short > 0) == (deeper < 50), "which is what is to be seen"
    assert (num_deeper > 2) == (deeper > 1), "two queries keep fewer than a step draws"


def test_how_deep_a_query_is_searched_does_not_depend_on_its_neighbours(open_run: Open) -> None:
    """Blocks are handed out to the ranks: whatever is searched together, the candidates are the same."""
    data, all_found = with_answers_everywhere(200), []
    for block_size in (1, 5, 12):
        run = open_run("ar2.search_deeper=4")
        shutil.rmtree(run.folder.candidates("001"), ignore_errors=True)
        all_found.append(mined(run, data, ShuffledSearcher(200, block_size=block_size), top_k=10))
    for found in all_found[1:]:
        np.testing.assert_array_equal(found.documents_QK, all_found[0].documents_QK)
        np.testing.assert_array_equal(found.scores_QK, all_found[0].scores_QK)
        assert found.counts == all_found[0].counts


def test_a_deeper_search_is_another_search(open_run: Open) -> None:
    """Symptom guarded against: what an interrupted search found is joined with what a deeper one finds."""
    data, searcher = with_answers_everywhere(200), ShuffledSearcher(200)
    shallow = mined(open_run(), data, searcher, top_k=10)
    assert mined(open_run(), data, FakeSearcher(), top_k=10).documents_QK.tolist() == shallow.documents_QK.tolist()
    deep = mined(open_run("ar2.search_deeper=4", "run.force_resume=true"), data, searcher, top_k=10)
    assert (deep.documents_QK >= 0).sum() > (shallow.documents_QK >= 0).sum()


def test_an_answer_that_is_everywhere_takes_nothing_out(
    open_run: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer such as "the" says nothing about relevance; the query trains with its positives taken out alone."""
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    texts = [f"the text {index}" for index in range(N)]
    searcher = FakeSearcher()
    found = mined(open_run(), data_of([[0]], [("the",)], texts), searcher)
    assert found.row("q0").tolist() == [1, 2, 3, 4, 5]
    assert (found.counts["positives"], found.counts["answers"]) == (1, 0)
    assert "1 queries have an answer that almost every document contains" in caplog.text


def test_a_query_whose_positives_are_nearly_the_whole_corpus_is_refused(open_run: Open) -> None:
    run = open_run()
    with pytest.raises(
        DataError, match=r"query 'q1' has 2 documents left.*all 30.*at least the 3 negatives.*lower num_negatives"
    ):
        mined(run, data_of([[0], list(range(2, N))]), FakeSearcher())
    assert not run.folder.candidates("001").exists()


def test_exactly_as_many_as_needed_are_enough(open_run: Open) -> None:
    found = mined(open_run(), data_of([list(range(3, N))]), FakeSearcher())
    assert found.row("q0").tolist() == [0, 1, 2]


def test_only_the_rows_asked_for_are_searched(open_run: Open) -> None:
    searcher = FakeSearcher()
    found = mined(open_run(), data_of([[0], [1], [2], [3]]), searcher, rows=[1, 3])
    assert found.qids == ["q1", "q3"]
    assert found.row("q3").tolist() == [0, 1, 2, 4, 5]
    with pytest.raises(DataError, match="'q0' has no candidates"):
        found.row("q0")


def test_nothing_to_mine_gives_candidates_of_nothing(open_run: Open) -> None:
    searcher = FakeSearcher()
    found = mined(open_run(), data_of([[0]]), searcher, rows=[])
    assert (len(found), searcher.asked) == (0, [])


def test_the_counts_are_logged_and_no_part_is_left(open_run: Open) -> None:
    run = open_run()
    mined(run, data_of([[0], [1]]), FakeSearcher())
    line = json.loads((run.folder.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["stage"], line["step"]) == ("candidates/001", 1)
    assert line["candidates/queries"] == 2.0
    assert line["candidates/removed_positives"] == 2.0
    assert line["candidates/removed_answers"] == 0.0
    assert [path.name for path in run.folder.candidates("001").parent.iterdir()] == ["001"]


# --- mining only what will be drawn ----------------------------------------------------------------------------------


def drawn_by(run: Run, visit: Visit, num_queries: int) -> set[int]:
    """The rows that the training really draws."""
    data = data_of([[row % N] for row in range(num_queries)])
    phase = replace(visit.phase, num_negatives=0)
    samples = Samples(Visit(phase, visit.number), run.config.run.seed, data, None, 0, 1)  # type: ignore[arg-type]
    steps = range(visit.first_step, visit.first_step + phase.steps)
    return {group.query for step in steps for group in samples.groups(step)}


SMALL = (
    *("warmup_ranker.steps=2", "warmup_ranker.batch_size=4", "ar2.iterations=2"),
    *("ar2.retriever.steps=3", "ar2.retriever.batch_size=4", "ar2.ranker.steps=2", "ar2.ranker.batch_size=6"),
)


@pytest.mark.parametrize(
    ("order", "iteration", "streams"),
    [
        ("paper", 0, {"warmup_ranker": 1, "retriever": 1}),
        ("paper", 1, {"ranker": 1, "retriever": 2}),
        ("paper", 2, {"ranker": 2}),
        ("released", 0, {"warmup_ranker": 1, "ranker": 1, "retriever": 1}),
        ("released", 1, {"ranker": 2, "retriever": 2}),
        ("released", 2, {}),
    ],
)
def test_the_rows_that_are_mined_are_those_that_training_draws(
    open_run: Open, order: str, iteration: int, streams: dict[str, int]
) -> None:
    run, num_queries = open_run(*SMALL, f"ar2.order={order}"), 50
    visits = run.timetable.drawing_from(f"{iteration:03d}")
    assert {visit.phase.name: visit.number + 1 for visit in visits} == streams
    expected = {row for visit in visits for row in drawn_by(run, visit, num_queries)}
    rows = rows_drawn(visits, run.config.run.seed, num_queries)
    assert rows.tolist() == sorted(expected)
    assert len(rows) < num_queries


def test_mining_a_sample_gives_its_rows_what_mining_all_gives(open_run: Open) -> None:
    data = data_of([[row % 7] for row in range(20)])
    run = open_run(*SMALL)
    everything = mined(run, data, FakeSearcher())
    rows = rows_drawn(run.timetable.drawing_from("001"), run.config.run.seed, 20).tolist()
    sample = mined(run, data, FakeSearcher(), rows=rows)
    assert 0 < len(sample) < len(everything)
    for qid in sample.qids:
        np.testing.assert_array_equal(sample.row(qid), everything.row(qid))


# --- in parts ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_with_the_blocks_that_are_missing(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: a search of half a million queries that was killed near its end began anew."""
    data = data_of([[row] for row in range(7)])
    whole = mined(open_run(), data, FakeSearcher(block_size=2))
    run = open_run()
    shutil.rmtree(run.folder.candidates("001"))

    class Dying(FakeSearcher):
        def search(self, queries: Sequence[Query], top_k: int) -> Hits:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().search(queries, top_k)

    with pytest.raises(KeyboardInterrupt):
        mined(run, data, Dying(block_size=2))
    again = FakeSearcher(block_size=2)
    found = mined(run, data, again)
    assert [qids for qids, _ in again.asked] == [["q4", "q5"], ["q6"]]
    assert found.qids == whole.qids
    np.testing.assert_array_equal(found.documents_QK, whole.documents_QK)
    np.testing.assert_array_equal(found.scores_QK, whole.scores_QK)
    assert found.counts["positives"] == whole.counts["positives"]


def test_blocks_of_another_search_are_not_joined(open_run: Open) -> None:
    """Symptom: after an interrupted search to depth 5, one to depth 6 took over rows of 5."""
    run, data = open_run(), data_of([[0]] * 4)

    class Dying(FakeSearcher):
        def search(self, queries: Sequence[Query], top_k: int) -> Hits:
            if self.asked:
                raise KeyboardInterrupt
            return super().search(queries, top_k)

    with pytest.raises(KeyboardInterrupt):
        mined(run, data, Dying(block_size=2))
    again = FakeSearcher(block_size=2)
    assert mined(run, data, again, top_k=6).documents_QK.shape == (4, 6)
    assert len(again.asked) == 2


def test_candidates_that_are_there_are_not_searched_again(open_run: Open) -> None:
    run, data = open_run(), data_of([[0], [1]])
    first = mined(run, data, FakeSearcher())
    again = FakeSearcher()
    assert mined(run, data, again).documents_QK.tolist() == first.documents_QK.tolist()
    assert again.asked == []
    assert mined(run, data, again, top_k=4).documents_QK.shape == (2, 4)
    assert again.asked


def test_a_twin_of_the_same_weights_is_not_searched_again(open_run: Open) -> None:
    """Symptom: a recipe without warm-up steps searched for the warm-up what it had just searched as zero-shot."""
    run, data = open_run(), data_of([[0], [1]])
    first = mined(run, data, FakeSearcher())
    searcher, stage = FakeSearcher(), Stage(run, "candidates/002")
    twin, other = replace(STAMP, iteration="002"), Stamp("003", "f" * 64, STAMP.corpus_sha256)
    for stamp in (twin, other):
        mine(stage, data, searcher, np.arange(2), stamp, top_k=5, needed=3, name=stamp.iteration)
        found = Candidates.load(run.folder.candidates(stamp.iteration), stamp)
        assert found.documents_QK.tolist() == first.documents_QK.tolist()
        assert bool(searcher.asked) == (stamp is other)


@dataclass
class PartedSearcher(FakeSearcher):
    """As `FakeSearcher`, with documents dealt to three parts; counts what is asked of each."""

    num_parts: int = 3
    encoded: list[str] = field(default_factory=list)
    searched: list[tuple[int, int]] = field(default_factory=list)
    dies_after: int | None = None

    def encode(self, queries: Sequence[Query]) -> np.ndarray:
        self.encoded += [query.id for query in queries]
        return np.array([[float(query.id[1:])] for query in queries], dtype=np.float32)

    def search_parts(self, queries_QD: np.ndarray, top_k: int, parts: Sequence[int]) -> Hits:
        if self.dies_after is not None and len(self.searched) >= self.dies_after:
            raise KeyboardInterrupt
        self.searched += [(part, len(queries_QD)) for part in parts]
        hits = super().search([Query(f"q{int(row[0])}", "") for row in queries_QD], self.num_documents)
        self.asked.pop()
        theirs = np.isin(hits.documents_QK % self.num_parts, parts)
        order = np.argsort(~theirs, axis=1, kind="stable")[:, :top_k]
        documents_QK = np.where(theirs, hits.documents_QK, -1)
        scores_QK = np.where(theirs, hits.scores_QK, -np.inf).astype(np.float32)
        return Hits(np.take_along_axis(documents_QK, order, 1), np.take_along_axis(scores_QK, order, 1))

    def finish(self, queries_QD: np.ndarray, found: Sequence[Hits], top_k: int) -> Hits:
        assert len(queries_QD) == len(found[0])
        documents_QK = np.concatenate([hits.documents_QK for hits in found], axis=1)
        scores_QK = np.concatenate([hits.scores_QK for hits in found], axis=1)
        order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :top_k]
        return Hits(np.take_along_axis(documents_QK, order, 1), np.take_along_axis(scores_QK, order, 1))


class SparselyPartedSearcher(PartedSearcher):
    """As `PartedSearcher`, with a sparse matrix as encoded queries."""

    def encode(self, queries: Sequence[Query]) -> sparse.csr_array:
        dense_Q1 = super().encode(queries)
        return sparse.csr_array(np.hstack([np.zeros((len(queries), 30_000), np.float32), dense_Q1]))

    def search_parts(self, queries: sparse.csr_array, top_k: int, parts: Sequence[int]) -> Hits:
        return super().search_parts(self.dense(queries), top_k, parts)

    def finish(self, queries: sparse.csr_array, found: Sequence[Hits], top_k: int) -> Hits:
        return super().finish(self.dense(queries), found, top_k)

    def dense(self, queries: sparse.csr_array) -> np.ndarray:
        assert sparse.issparse(queries)
        return queries[:, [30_000]].toarray()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.refresh.mining._BLOCKS_A_GROUP", 2)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", [PartedSearcher, SparselyPartedSearcher])
def test_parts_are_searched_once_for_a_group_and_give_the_same(open_run: Open, kind: type[PartedSearcher]) -> None:
    """Symptom: each rank went through the whole unmerged index for its own few queries."""
    run, data = open_run(), data_of([[row, row + 1] for row in range(7)])
    whole = mined(run, data, FakeSearcher(block_size=2))
    shutil.rmtree(run.folder.candidates("001"))
    searcher = kind(block_size=2)
    found = mined(run, data, searcher)
    np.testing.assert_array_equal(found.documents_QK, whole.documents_QK)
    np.testing.assert_array_equal(found.scores_QK, whole.scores_QK)
    assert (found.qids, found.counts["positives"]) == (whole.qids, whole.counts["positives"])
    assert searcher.searched == [(0, 4), (1, 4), (2, 4), (0, 3), (1, 3), (2, 3)]
    assert searcher.encoded == [f"q{row}" for row in range(7)], "each query once"
    assert searcher.asked == [], "nothing is left to be searched by one rank"
    assert [path.name for path in run.folder.candidates("001").parent.iterdir()] == ["001"]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", [PartedSearcher, SparselyPartedSearcher])
def test_an_interrupted_search_of_parts_goes_on(open_run: Open, kind: type[PartedSearcher]) -> None:
    run, data = open_run(), data_of([[row] for row in range(7)])
    with pytest.raises(KeyboardInterrupt):
        mined(run, data, kind(block_size=2, dies_after=4))
    again = kind(block_size=2)
    found = mined(run, data, again)
    assert again.searched == [(1, 3), (2, 3)]
    assert again.encoded == []
    shutil.rmtree(run.folder.candidates("001"))
    np.testing.assert_array_equal(found.documents_QK, mined(run, data, FakeSearcher(block_size=2)).documents_QK)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", [PartedSearcher, SparselyPartedSearcher])
def test_encoded_queries_that_are_damaged_are_named(open_run: Open, kind: type[PartedSearcher]) -> None:
    run, data = open_run(), data_of([[row] for row in range(7)])
    with pytest.raises(KeyboardInterrupt):
        mined(run, data, kind(block_size=2, dies_after=1))
    (path,) = run.folder.candidates("001").parent.rglob("queries-*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=rf"(?s){path.name} cannot be read.*delete {path.parent}"):
        mined(run, data, kind(block_size=2))


@pytest.mark.usefixtures("small_groups")
def test_queries_that_need_more_are_searched_deeper_over_all_parts(open_run: Open) -> None:
    texts = ["the answer is Paris"] * 12 + [f"text number {index}" for index in range(N - 12)]
    searcher = PartedSearcher(block_size=2)
    found = mined(open_run(), data_of([[20], [20]], [("Paris",), ("London",)], texts), searcher)
    assert [qids for qids, _ in searcher.asked] == [["q0"]]
    assert found.row("q0").tolist() == [12, 13, 14, 15, 16]
    assert found.row("q1").tolist() == [0, 1, 2, 3, 4]

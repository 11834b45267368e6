"""Who takes part in a comparison, by which label and identity, and what is measured again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.file import load_config
from engine.config.timetable import Sizes, WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.trec import read_trec
from engine.errors import ConfigError
from engine.evaluation import contest
from engine.evaluation.contest import Contest, Terms
from engine.evaluation.contestants import Contestant, Entrant, published, without_repetitions
from engine.models.weights import MARKER
from engine.retrievers.choice import Choice
from engine.run import Run
from engine.search import Hits
from shards.records import Query
from tests.unit.engine.conftest import TINY

DOCIDS = [f"d{number}" for number in range(6)]


def opened(path: Path, config: str = "r2anker_tiny.yaml", words: Sequence[str] = (), weights: str = "w") -> Run:
    """A run that has published weights of all states, by their markers alone."""
    config_of_run = load_config(TINY.parent / config, [f"run.path={path}", *words])
    run = Run.open(config_of_run, Coordinator(LocalTransport()), torch.device("cpu"))
    run.size(Sizes(queries=40, documents=100))
    for model in run.config.models:
        for one in run.timetable.states(model):
            folder = run.folder.weights(one.model, one.state)
            folder.mkdir(parents=True)
            digest = f"{weights} {one.model} {one.state}"
            (folder / MARKER).write_text(json.dumps({"sha256": digest, "files": {}}))
    return run


def data_of() -> Any:
    manifest = SimpleNamespace(sha256="c" * 64)
    shards = SimpleNamespace(
        docids=DOCIDS, num_documents=len(DOCIDS), index_of=DOCIDS.index, manifest=manifest, folder=Path("/nowhere")
    )
    texts = defaultdict(lambda: SimpleNamespace(prompts={}))
    return SimpleNamespace(shards=shards, own_documents={}, texts=texts)


# --- contestants -----------------------------------------------------------------------------------------------------


def test_a_run_has_rankers_and_retrievers_by_the_names_of_its_table(tmp_path: Path) -> None:
    alone = Entrant("", opened(tmp_path / "run"), data_of())
    labels = {one: alone.state(one).label for one in published(alone.run)}
    assert {(one.model, one.iteration): label for one, label in labels.items()} == {
        **{("dense", 1): "D1", ("dense", 2): "D2", ("lexical", 1): "L1", ("lexical", 2): "L2"},
        **{("ranker", 1): "R", ("student", 1): "S"},
    }
    beside = replace(alone, name="joint")
    assert [beside.state(WeightsOf("dense", 1)).label, beside.bm25().label] == ["joint:D1", "joint:BM25"]
    assert (alone.state(WeightsOf("ranker", 1)).choice, alone.state(WeightsOf("dense", 2)).choice) == (
        None,
        Choice("dense", WeightsOf("dense", 2)),
    )


def test_states_with_one_name_are_told_apart_by_their_iteration(tmp_path: Path) -> None:
    """AR2's table calls every iteration's retriever G, and says the iteration in a column of its own."""
    entrant = Entrant("", opened(tmp_path / "run", "tiny.yaml"), data_of())
    assert [entrant.state(WeightsOf("retriever", iteration)).label for iteration in range(3)] == ["G0", "G@1", "G@2"]


def test_negatives_come_from_whom_the_timetable_says(tmp_path: Path) -> None:
    """R2ANKER: the joint pool; AR2: D0 from G0's candidates, D of an iteration from its own retriever's."""
    joint = Entrant("a", opened(tmp_path / "joint"), data_of())
    pool = joint.negatives_of(WeightsOf("ranker", 1))
    assert ([one.label for one in pool.found_by], pool.within) == (["a:BM25", "a:D2", "a:L2"], ())
    assert pool.told(joint) == "BM25,D2,L2"
    assert replace(pool, within=((joint.bm25(), 1000),)).told(joint) == "BM25,D2,L2 within BM25 1000"
    game = Entrant("", opened(tmp_path / "game", "tiny.yaml"), data_of())
    assert [game.negatives_of(WeightsOf("ranker", iteration)).told(game) for iteration in range(3)] == [
        *["G0", "G@1", "G@2"]
    ]
    with pytest.raises(ConfigError, match="does not train ranker in iteration 7"):
        game.negatives_of(WeightsOf("ranker", 7))


def test_negatives_that_the_data_give_have_no_retriever(tmp_path: Path) -> None:
    """Symptom guarded against: an analysis takes them for BM25's, and compares BM25 with itself."""
    entrant = Entrant("", opened(tmp_path / "run", words=["r2anker.retrievers=[dense, given@bm25]"]), data_of())
    with pytest.raises(ConfigError, match="are those that its data give, by nobody who searches"):
        entrant.negatives_of(WeightsOf("ranker", 1))


def test_negatives_that_were_kept_to_anothers_best_say_so(tmp_path: Path) -> None:
    """R2ANKER Table 6: D2's candidates within BM25's; BM25's are no member of the pool."""
    words = ["r2anker.retrievers=[dense]", "r2anker.negatives.filters=[{name: constrained, within: bm25, top_k: 50}]"]
    entrant = Entrant("", opened(tmp_path / "run", words=words), data_of())
    found = entrant.negatives_of(WeightsOf("ranker", 1))
    assert [one.label for one in found.found_by] == ["D2"]
    assert [(one.label, top) for one, top in found.within] == [("BM25", 50)]
    assert found.told(entrant) == "D2 within BM25 50"


def test_weights_that_are_not_there_take_no_part(tmp_path: Path) -> None:
    entrant = Entrant("", opened(tmp_path / "run"), data_of())
    (entrant.run.folder.weights("dense", "002") / MARKER).unlink()
    assert WeightsOf("dense", 2) not in published(entrant.run)
    with pytest.raises(ConfigError, match="no weights of dense 002"):
        entrant.state(WeightsOf("dense", 2))


def test_what_two_runs_share_takes_part_once(tmp_path: Path) -> None:
    """Two rankers over the same retrievers: BM25 and D1 are one column each, D2 of other weights another."""
    first, second = (opened(tmp_path / name) for name in ("a", "b"))
    (second.folder.weights("dense", "002") / MARKER).write_text(json.dumps({"sha256": "other", "files": {}}))
    entrants = [Entrant(name, run, data_of()) for name, run in (("a", first), ("b", second))]
    everyone = [one for entrant in entrants for one in (entrant.bm25(), *map(entrant.state, published(entrant.run)))]
    assert [one.label for one in without_repetitions(everyone)] == [
        *("a:BM25", "a:D1", "a:D2", "a:L1", "a:L2", "a:R", "a:S", "b:D2")
    ]


@pytest.mark.parametrize("word", ["bm25.b=0.7", "dense.max_length=40", "index.audit_queries=8"])
def test_other_settings_are_somebody_else(tmp_path: Path, word: str) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b", words=[word])
    ones = [Entrant("", run, data_of()) for run in (first, second)]
    who = [one.bm25() if word.startswith("bm25") else one.state(WeightsOf("dense", 1)) for one in ones]
    assert who[0].identity != who[1].identity
    with pytest.raises(ConfigError, match="would stand in the table more than once"):
        without_repetitions(who)


# --- contest ---------------------------------------------------------------------------------------------------------


class Finder:
    """Finds the first documents of the corpus for every query."""

    source = "dense"

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        documents_QK = np.tile(np.arange(top_k, dtype=np.int64), (len(queries), 1))
        return Hits(documents_QK, -documents_QK.astype(np.float32))

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[float(document) for document in own] for own in documents]


def terms_of(num_queries: int = 2, depth: int = 3, **changes: Any) -> Terms:
    queries = [Query(f"q{row}", "any") for row in range(num_queries)]
    qrels = {query.id: {"d2": 1, "d5": 0} for query in queries}
    return replace(Terms("dev", queries, qrels, "f" * 64, depth, "MRR@10", 1, 4), **changes)


def test_a_list_and_its_orders_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(contest, "build", lambda *_: asked.append("built"))
    monkeypatch.setattr(contest, "forget_what_is_lost", lambda *_: None)
    monkeypatch.setattr(contest, "open_searcher", lambda *_: asked.append("searched") or Finder())
    monkeypatch.setattr(Contestant, "scorer", lambda self: asked.append(f"scored by {self.label}") or Finder())
    run = opened(
        tmp_path / "run", words=["evaluation.depth=3", "evaluation.rerank_depth=3", "evaluation.metrics=[MRR@3]"]
    )
    entrant = Entrant("", run, data_of())
    dense, ranker = entrant.state(WeightsOf("dense", 1)), entrant.state(WeightsOf("ranker", 1))
    for _ in range(2):
        measured = Contest(tmp_path / "out", terms_of())
        path, found = measured.reordered(ranker, dense), measured.list_of(dense)
        assert asked == ["built", "searched", "scored by R"], "the second time it was there"
    assert [list(one) for one in read_trec(found).values()] == [["d0", "d1", "d2"]] * 2
    assert [list(one) for one in read_trec(path).values()] == [["d2", "d1", "d0"]] * 2
    assert measured.values(ranker, path) == {"q0": 1.0, "q1": 1.0}
    assert measured.values(dense, found) == pytest.approx({"q0": 1 / 3, "q1": 1 / 3})
    assert path.name.startswith("dev-R-over-D1-")

    renamed = Contest(tmp_path / "out", terms_of()).reordered(replace(ranker, label="new"), replace(dense, label="x"))
    assert renamed == path, "another name of the same is not measured again"

    others = [terms_of(3), terms_of(depth=2), terms_of(fingerprint="0" * 64), terms_of(split="test")]
    paths = {Contest(tmp_path / "out", terms).list_of(dense) for terms in others}
    assert len(paths | {found}) == 5, "other queries, depths and data are other rankings"
    same = Contest(tmp_path / "out", terms_of(metric="nDCG@5", relevance_threshold=2)).list_of(dense)
    assert same == found, "what is measured of it changes no ranking"


class Scripted(Finder):
    """Finds what it is told to, and remembers which pairs it scored."""

    def __init__(self, found: list[int], asked: list[tuple[str, int]]) -> None:
        self.found, self.asked = found, asked

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        documents_QK = np.tile(np.array(self.found, dtype=np.int64), (len(queries), 1))
        return Hits(documents_QK, -np.tile(np.arange(len(self.found), dtype=np.float32), (len(queries), 1)))

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        self.asked += [(query.id, one) for query, own in zip(queries, documents, strict=True) for one in own]
        return [[float(document % 4) for document in own] for own in documents]


def scripted(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, int]],
    *lists: list[int],
    depth: int = 3,
    cutoff: int = 3,
) -> tuple[Contestant, list[Contestant]]:
    """A ranker that remembers in `asked` which pairs it scored, and D1 and D2, which find what they are told to."""
    monkeypatch.setattr(contest, "build", lambda *_: None)
    monkeypatch.setattr(contest, "forget_what_is_lost", lambda *_: None)

    def open_searcher(run: Run, data: Any, folder: Any, choice: Any) -> Scripted:
        return Scripted(lists[choice.weights.iteration - 1][: run.config.evaluation.search_depth], [])

    monkeypatch.setattr(contest, "open_searcher", open_searcher)
    monkeypatch.setattr(Contestant, "scorer", lambda self: Scripted([], asked))
    words = [f"evaluation.depth={depth}", f"evaluation.rerank_depth={depth}", f"evaluation.metrics=[MRR@{cutoff}]"]
    entrant = Entrant("", opened(path / f"run-{depth}-{cutoff}", words=words), data_of())
    return entrant.state(WeightsOf("ranker", 1)), [entrant.state(WeightsOf("dense", one)) for one in (1, 2)]


def test_a_pair_of_several_lists_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that overlap, in different orders, and documents of equal score, which keep the order of each list."""
    asked: list[tuple[str, int]] = []
    ranker, finders = scripted(tmp_path, monkeypatch, asked, [0, 4, 2], [4, 0, 5])
    measured = Contest(tmp_path / "out", terms_of())
    paths = measured.reorder(ranker, finders)
    assert sorted(asked) == [(qid, one) for qid in ("q0", "q1") for one in (0, 2, 4, 5)]
    assert [list(read_trec(path)["q1"]) for path in paths] == [["d2", "d0", "d4"], ["d5", "d4", "d0"]]
    assert paths == measured.reorder(ranker, finders)
    assert len(asked) == 8, "the second time they were there"


@pytest.mark.parametrize("together", [True, False])
def test_of_each_list_the_first_documents_are_ordered_whatever_else_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Symptom: `matrix --depth 5` by MRR@10 re-ranked ten documents of the first list, and too few of the others.

    Lists are as deep as the metric looks; what is below the depth keeps its order below, also where it is another
    list's first.
    """
    asked: list[tuple[str, int]] = []
    ranker, finders = scripted(tmp_path, monkeypatch, asked, [0, 1, 2], [2, 5, 1], depth=2)
    measured = Contest(tmp_path / "out", terms_of(1, depth=2))
    if together:
        paths = measured.reorder(ranker, finders)
    else:
        paths = [measured.reordered(ranker, finder) for finder in finders]
    assert sorted(asked) == [("q0", one) for one in (0, 1, 2, 5)]
    assert [read_trec(path)["q0"] for path in paths] == [{"d1": 1, "d0": 0, "d2": -1}, {"d2": 2, "d5": 1, "d1": 0}]
    assert [list(read_trec(path)["q0"]) for path in paths] == [["d1", "d0", "d2"], ["d2", "d5", "d1"]]


def test_a_list_that_a_metric_wants_deeper_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: `--depth 2` by MRR@5 took what `--depth 2` by MRR@3 had found, and saw nothing of ranks 4 and 5."""
    found = {}
    for cutoff in (2, 3, 5):
        ranker, finders = scripted(tmp_path, monkeypatch, [], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], depth=2, cutoff=cutoff)
        measured = Contest(tmp_path / "out", terms_of(1, depth=2, metric=f"MRR@{cutoff}"))
        found[cutoff] = [measured.list_of(finders[0]), *measured.reorder(ranker, finders)]
    assert len({path for paths in found.values() for path in paths}) == 9
    assert {cutoff: {len(read_trec(path)["q0"]) for path in paths} for cutoff, paths in found.items()} == {
        **{2: {2}, 3: {3}, 5: {5}}
    }


def test_terms_say_what_a_title_must() -> None:
    assert terms_of().told == "MRR@10 on dev (2 of 4 queries), top 3 of each retriever re-ranked"
    assert terms_of(4, relevance_threshold=2).told == (
        "MRR@10 on dev (4 queries, relevant from grade 2), top 3 of each retriever re-ranked"
    )
    assert (terms_of().file_name, terms_of(4).file_name) == ("dev-MRR@10-top-3-2-queries", "dev-MRR@10-top-3")
    assert terms_of().positives() == {"q0": {"d2"}, "q1": {"d2"}}

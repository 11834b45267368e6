"""Retrievers are built, opened and stamped by their kind, wherever they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config.bm25 import Bm25Config
from engine.config.timetable import WeightsOf
from engine.errors import ArtifactError, ConfigError
from engine.retrievers.bm25_index import BuiltBM25, is_indexed, prepared_place
from engine.retrievers.kinds import BM25, KINDS, Choice, build, dense, is_built, open_searcher, stamp_of
from engine.run import Run, RunFolder
from shards.files import write_json
from shards.records import Document, Query

Open = Callable[..., Run]
TEXTS = ("the owl hoots", "a fox barks", "dogs bark at the fox")


def data_in(folder: Path, corpus_sha256: str = "c" * 64) -> Any:
    entries = [SimpleNamespace(num_documents=len(TEXTS))]
    manifest = SimpleNamespace(template="{text}", sha256=corpus_sha256, shards=entries)
    documents = [Document(f"d{number}", "", text) for number, text in enumerate(TEXTS)]
    shards = SimpleNamespace(
        manifest=manifest, folder=folder, num_documents=len(TEXTS), documents=lambda _: iter(documents)
    )
    return SimpleNamespace(shards=shards, texts={"retriever": SimpleNamespace(prompts={})})


def test_bm25_is_built_once_and_opened_where_it_lies(open_run: Open, tmp_path: Path) -> None:
    run, data = open_run(), data_in(tmp_path / "shards")
    with pytest.raises(ArtifactError):
        open_searcher(run, data, run.folder, BM25)
    build(run, data, run.folder, BM25)
    assert run.result_of("bm25", BuiltBM25) == BuiltBM25(3, False)
    searcher = open_searcher(run, data, run.folder, BM25)
    assert searcher.search([Query("q", "owl")], 1).documents_QK.tolist() == [[0]]
    assert stamp_of(run, data, BM25).iteration == searcher.source == "bm25"
    with pytest.raises(ArtifactError, match="was made of"):
        open_searcher(run, data_in(tmp_path / "shards", "d" * 64), run.folder, BM25)


def test_a_changed_setting_makes_a_new_bm25_index(open_run: Open, tmp_path: Path) -> None:
    """Symptom guarded against: an index of English stems answers for a recipe that names another language."""
    data = data_in(tmp_path / "shards")
    run = open_run()
    build(run, data, run.folder, BM25)
    stamp = stamp_of(run, data, BM25)
    run.config = run.config.model_copy(update={"bm25": Bm25Config(language="none", b=0.5)})
    with pytest.raises(ArtifactError, match=r'"stemmer": "english".*"stemmer": null'):
        open_searcher(run, data, run.folder, BM25)
    build(run, data, run.folder, BM25)
    assert run.result_of("bm25", BuiltBM25) == BuiltBM25(3, False)
    searcher = open_searcher(run, data, run.folder, BM25)
    found = searcher.search([Query("q", "barks"), Query("q", "barking"), Query("q", "the")], 2).documents_QK
    assert found.tolist() == [[1, -1], [-1, -1], [0, 2]], "neither stems nor stop words"
    assert stamp_of(run, data, BM25) != stamp, "the old candidates are stale"
    build(run, data, run.folder, BM25)
    assert is_indexed(run.folder.bm25, "c" * 64, run.config.bm25)


def test_one_way_to_ask_for_the_same_words_is_as_good_as_another(open_run: Open, tmp_path: Path) -> None:
    run, data = open_run(), data_in(tmp_path / "shards")
    build(run, data, run.folder, BM25)
    same = Bm25Config(language="de", stemmer="en", stopwords="english")
    assert is_indexed(run.folder.bm25, "c" * 64, same)
    assert prepared_place(tmp_path, same) == prepared_place(tmp_path, Bm25Config())
    assert prepared_place(tmp_path, same) != prepared_place(tmp_path, Bm25Config(stopwords=("owl",)))


def test_bm25_sees_title_and_text_and_not_the_models_template(open_run: Open, tmp_path: Path) -> None:
    """Symptom: with `{title} [SEP] {text}` the word "sep" stood in every document, and counted for nothing."""
    run, data = open_run(), data_in(tmp_path / "shards")
    documents = [Document("a", "Sep", "the ninth month"), Document("b", "Oct", "the tenth"), Document("c", "", "x")]
    data.shards.documents = lambda _: iter(documents)
    data.shards.manifest.template = "{title} [SEP] {text}"
    build(run, data, run.folder, BM25)
    hits = open_searcher(run, data, run.folder, BM25).search([Query("q", "sep"), Query("q", "oct tenth")], 3)
    assert hits.documents_QK.tolist() == [[0, -1, -1], [1, -1, -1]]


def test_the_stages_of_another_corpus_have_names_of_their_own(open_run: Open, tmp_path: Path) -> None:
    """Symptom guarded against: the ledger has `bm25` as finished, and the other corpus is searched without an index."""
    run, folder = open_run(), RunFolder(tmp_path / "run" / "evaluations" / "other")
    build(run, data_in(tmp_path / "shards"), run.folder, BM25)
    build(run, data_in(tmp_path / "others", "d" * 64), folder, BM25)
    assert run.is_finished("other/bm25")
    assert folder.bm25.is_dir()


def test_a_dense_retriever_is_stamped_by_the_runs_weights(open_run: Open, tmp_path: Path) -> None:
    run, data = open_run(), data_in(tmp_path / "shards")
    with pytest.raises(ArtifactError, match="no published weights"):
        stamp_of(run, data, dense(WeightsOf("retriever", 3)))
    write_json(run.folder.weights("retriever", "003") / "weights.json", {"sha256": "a" * 64, "files": {}})
    stamp = stamp_of(run, data, dense(WeightsOf("retriever", 3)))
    assert (stamp.iteration, stamp.weights_sha256, stamp.corpus_sha256) == ("003", "a" * 64, "c" * 64)


def test_indexes_that_are_gone_are_told_by_their_kind(open_run: Open) -> None:
    """Symptom guarded against: an evaluation takes a lexical retriever's postings for a dense index that is lost."""
    run, lexical, trained = open_run(), Choice("lexical", WeightsOf("retriever", 1)), dense(WeightsOf("retriever", 1))
    assert is_built(run, run.folder, BM25), "its build looks itself"
    assert not is_built(run, run.folder, lexical)
    (run.folder.index("001") / "postings").mkdir(parents=True)
    assert is_built(run, run.folder, lexical)
    assert not is_built(run, run.folder, trained)


def test_an_unknown_kind_is_refused_with_the_known_ones(open_run: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no retriever 'bm52'.*one of bm25, dense, lexical, run_file"):
        stamp_of(open_run(), data_in(tmp_path), Choice("bm52"))
    assert all(name == kind.name for name, kind in KINDS.items())

"""Re-scoring against brute force; each document once; the same bytes by two ranks and after a kill."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.file import load_config
from engine.config.timetable import WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.candidates import Candidates
from engine.data.corpus import Data, model_texts, open_data, random_model_folder, write_shards
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.data.joint import JointPool
from engine.data.negatives import NegativeSource
from engine.errors import TrainingError
from engine.models.kinds import load_untrained
from engine.models.weights import frozen_retriever
from engine.refresh import rescoring
from engine.refresh.refresh import refresh_index
from engine.refresh.rescoring import Rescored, rescore_candidates
from engine.refresh.visits import rescored_when_stale, visit
from engine.retrievers.dense import encode_corpus, encode_dense
from engine.retrievers.kinds import dense
from engine.run import Run, Stage
from engine.training.branching import branch_run
from engine.training.models import Models
from engine.training.publishing import publish_weights
from shards.embeddings import Stamp
from shards.formats import open_dataset
from shards.made.generated import generate_dataset
from tests.threads_as_ranks import on_ranks

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"
CPU = torch.device("cpu")
WORDS = (
    *("ar2.refresh_every=2", "ar2.iterations=3", "index.embedding_dtype=float32", "ar2.ranker.steps=3"),
    *("ar2.ranker.batch_size=4", "ar2.retriever.steps=2", "ar2.negatives.sampler={name: simans, a: 0.5}"),
    "run.force_resume=true",
)
K, DRAWN_AT_RANDOM, SHORT = 12, (3, 5), 7
"""Depth; rows with a document that mining drew at random; a row with a short list."""


class Trained:
    """Stands for an engine at the end of its training."""

    name = "retriever"

    def __init__(self, module: Any) -> None:
        self.module = module

    def full_state_dict(self) -> dict[str, Any]:
        return dict(self.module.state_dict())


def opened(folder: Path, coordinator: Coordinator | None = None, *words: str) -> tuple[Run, Data]:
    coordinator = coordinator or Coordinator(LocalTransport())
    run = Run.open(load_config(TINY, [f"run.path={folder / 'run'}", *WORDS, *words]), coordinator, CPU)
    dataset = open_dataset(folder / "data")
    texts = model_texts(run.config, dict.fromkeys(run.config.models, str(folder / "run" / "random_model")))
    return run, open_data(run.config, dataset, texts, run.folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a run with shards and two states of its retriever."""
    folder = tmp_path_factory.mktemp("prepared")
    generate_dataset(folder / "data", num_documents=90, num_queries=60, seed=1)
    run = Run.open(load_config(TINY, [f"run.path={folder / 'run'}", *WORDS]), Coordinator(LocalTransport()), CPU)
    dataset = open_dataset(folder / "data")
    texts = model_texts(
        run.config, dict.fromkeys(run.config.models, str(random_model_folder(run.config, dataset, run.folder)))
    )
    run.once("shards", write_shards, dataset, texts, run.folder)
    section = run.config.models["retriever"]
    for number in range(2):
        module = load_untrained(section, str(run.folder.path / "random_model"), seed=1, name="retriever")
        torch.manual_seed(number)
        for parameter in module.parameters():
            parameter.data += 0.05 * number * torch.randn_like(parameter)
        publish_weights(run, Trained(module), texts["retriever"], f"{number:03d}")  # type: ignore[arg-type]
    assert run.lock is not None
    run.lock.release()
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def mined_of(run: Run, data: Data) -> Candidates:
    """Lists that nobody searched: padded, short, with documents drawn at random, and with positives that were found."""
    rng, num_queries = np.random.default_rng(2), len(data.train)
    documents_QK = np.full((num_queries, K), -1, dtype=np.int64)
    scores_QK = np.full((num_queries, K), -np.inf, dtype=np.float32)
    positives: list[list[FoundPositive]] = []
    for row in range(num_queries):
        length = 3 if row == SHORT else K
        known = data.train.positives[row].tolist()
        free = np.setdiff1d(np.arange(data.shards.num_documents), known)
        documents_QK[row, :length] = rng.permutation(free)[:length]
        scores_QK[row, :length] = -np.sort(rng.standard_normal(length))
        if row in DRAWN_AT_RANDOM:
            scores_QK[row, length - 2 :] = -np.inf
        positives.append([FoundPositive(known[0], 2, 9.0)] if row % 2 else [])
    qids = [query.id for query in data.train.queries]
    found = FoundPositives.of(positives)
    mined = Candidates("dense", Stamp("000", "a" * 64, "b" * 64), qids, documents_QK, scores_QK, Counter(), found)
    mined.save(run.folder.candidates("000"))
    return mined


def by_brute_force(run: Run, data: Data) -> Callable[[int, int], float]:
    """Return a function (training row, document) -> score by the new weights, each text encoded alone, in float64."""
    section, text = run.config.models["retriever"], data.texts["retriever"]
    retriever = frozen_retriever(section, run.folder.weights("retriever", "001"), CPU)  # type: ignore[arg-type]
    retriever.double()

    def vector(encode: Any, ids: Any, template: Any, length: int) -> np.ndarray:
        with torch.inference_mode():
            batch = template.pad([template.single(ids, length)])
            return np.asarray(encode(batch)[0].double())

    queries = [
        vector(retriever.encode_queries, ids, text.template.for_queries(), run.config.query_max_length)
        for ids in text.tokenize_queries(data.train.queries)
    ]
    template = text.template.for_documents()
    documents = [
        vector(retriever.encode_documents, data.shards.tokens(number, text.stream), template, section.max_length)
        for number in range(data.shards.num_documents)
    ]
    return lambda row, document: float(queries[row] @ documents[document])


def rescore(folder: Path, coordinator: Coordinator | None = None) -> tuple[Rescored, Run, Data]:
    run, data = opened(folder, coordinator)
    try:
        mined = run.coordinator.only_rank_zero("mined", lambda: bool(mined_of(run, data)))
        assert mined
        visit = run.timetable.visit("ranker/1")
        stage, rows = Stage(run, "rescore/000@001"), np.arange(0, len(data.train), 2)
        rows = np.union1d(rows, [*DRAWN_AT_RANDOM, SHORT])
        return rescore_candidates(stage, data, Candidates.load(run.folder.candidates("000")), visit, rows), run, data
    finally:
        if run.lock is not None:
            run.lock.release()


def bytes_of(folder: Path) -> dict[str, bytes]:
    root = folder / "run" / "rescored"
    assert [path.name for path in root.iterdir()] == ["000@001"], "parts are left"
    return {path.name: path.read_bytes() for path in sorted((root / "000@001").iterdir())}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that each unit encodes; units and blocks are small."""
    counts: list[int] = []
    embeddings_of = rescoring.embeddings_of

    def counted(encoder: Any, template: Any, ids: Any, *others: Any) -> Any:
        counts.append(len(ids))
        return embeddings_of(encoder, template, ids, *others)

    monkeypatch.setattr(rescoring, "embeddings_of", counted)
    monkeypatch.setattr(rescoring, "_DOCUMENTS_A_UNIT", 20)
    monkeypatch.setattr(rescoring, "_QUERIES_A_BLOCK", 7)
    return counts


def test_lists_and_positives_have_the_scores_and_the_order_of_brute_force(folder: Path, encoded: list[int]) -> None:
    result, run, data = rescore(folder)
    mined = Candidates.load(run.folder.candidates("000"))
    found, score = Candidates.load(run.folder.candidates("000@001")), by_brute_force(run, data)
    asked, pairs, shares = set(), 0, []
    assert len(found) == result.queries < len(mined)
    for place, qid in enumerate(found.qids):
        row = mined.row_number(qid)
        kept = [
            document
            for document, old in zip(mined.documents_QK[row].tolist(), mined.scores_QK[row].tolist(), strict=True)
            if document >= 0 and old > -np.inf
        ]
        positives = [one.document for one in mined.positives.at(row)]
        ranked = sorted([*kept, *positives], key=lambda document: -score(row, document))
        expected = [document for document in ranked if document in kept]
        assert found.documents_QK[place, : len(kept)].tolist() == expected
        scores = [score(row, document) for document in expected]
        np.testing.assert_allclose(found.scores_QK[place, : len(kept)], scores, rtol=1e-4, atol=1e-4)
        assert np.isneginf(found.scores_QK[place, len(kept) :]).all()
        behind = [document for document in mined.row(qid).tolist() if document not in kept]
        assert found.row(qid).tolist() == [*expected, *behind], "what was drawn at random stays behind"
        assert len(behind) == (2 if row in DRAWN_AT_RANDOM else 0)
        assert [(one.document, one.rank) for one in found.positives.at(place)] == [
            (document, rank) for rank, document in enumerate(ranked, 1) if document in positives
        ]
        for one in found.positives.at(place):
            assert one.score == pytest.approx(score(row, one.document), rel=1e-4, abs=1e-4)
        asked |= {*kept, *positives}
        pairs += len(ranked)
        shares.append(len({*expected[:2]} & {*kept[:2]}) / 2)
    assert (result.pairs, result.documents, result.documents_encoded, result.depth) == (
        pairs,
        len(asked),
        len(asked),
        2,
    )
    assert result.kept_best == pytest.approx(np.mean(shares))
    assert 0 < result.kept_best < 1
    assert sum(encoded) == len(asked), "each document once, and no other"
    assert max(encoded) <= 20 < len(asked)
    stamp = found.stamp
    assert (stamp.iteration, stamp.corpus_sha256) == ("000@001", data.shards.manifest.sha256)


def test_two_ranks_and_a_killed_pass_give_the_bytes_of_one(
    folder: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = rescore(folder)[0]
    alone, num_units, counted = bytes_of(folder), len(encoded), rescoring.embeddings_of

    for world_size in (2, 1):
        again = tmp_path_factory.mktemp(f"by-{world_size}")
        shutil.copytree(folder, again, dirs_exist_ok=True)
        shutil.rmtree(again / "run" / "rescored")
        encoded.clear()
        if world_size == 2:
            found = on_ranks(2, lambda coordinator, again=again: rescore(again, coordinator)[0])
            assert found == [result, result]
            assert len(encoded) == num_units, "each unit by one rank"
        else:

            def killed(*arguments: Any) -> Any:
                if len(encoded) == 2:
                    raise KeyboardInterrupt
                return counted(*arguments)

            monkeypatch.setattr(rescoring, "embeddings_of", killed)
            with pytest.raises(KeyboardInterrupt):
                rescore(again)
            monkeypatch.setattr(rescoring, "embeddings_of", counted)
            assert rescore(again)[0] == result
            assert len(encoded) == num_units, "what was encoded is not again"
        assert bytes_of(again) == alone


def test_a_score_that_is_no_number_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rescoring, "embeddings_of", lambda _encoder, _template, ids, *_: np.full((len(ids), 32), np.nan)
    )
    with pytest.raises(TrainingError, match=r"retriever of 001 scores document \d+ of query '.*' with nan"):
        rescore(folder)


def test_phases_between_refreshes_draw_by_the_scores_of_the_newest_retriever(folder: Path) -> None:
    run, data = opened(folder)
    found = refresh_index(run, data, iteration=0)
    assert rescored_when_stale(run, data, found, run.timetable.visit("retriever/1")) is found, "they are its own"
    drawn = rescored_when_stale(run, data, found, run.timetable.visit("ranker/1"))
    assert isinstance(drawn, JointPool)
    stages = json.loads(run.folder.ledger.read_text())["stages"]
    assert list(stages)[-2:] == ["rescore/000@001", "negatives/000@001"]
    scored = Candidates.load(run.folder.candidates("000@001"))
    assert stages["rescore/000@001"]["result"]["documents_encoded"] > 0
    qid = scored.qids[0]
    entries = drawn.entries(qid)
    np.testing.assert_array_equal(entries.scores_E, scored.scores_QK[0, : len(entries)].astype(np.float64))
    assert entries.scores_E.tolist() != found.entries(qid).scores_E[: len(entries)].tolist()  # type: ignore[attr-defined]
    again = rescored_when_stale(run, data, found, run.timetable.visit("retriever/2"))
    assert again.row(qid).tolist() == drawn.row(qid).tolist()
    assert list(json.loads(run.folder.ledger.read_text())["stages"]) == list(stages), "both draw from the same"

    # Where the newest weights have encoded the corpus, nothing is encoded again.
    run.forget(["rescore/000@001", "negatives/000@001"])
    shutil.rmtree(run.folder.candidates("000@001"))
    encode_dense(run, data, run.folder, dense(WeightsOf("retriever", 1)), "")
    rescored_when_stale(run, data, found, run.timetable.visit("ranker/1"))
    result = json.loads(run.folder.ledger.read_text())["stages"]["rescore/000@001"]["result"]
    assert (result["documents_encoded"], result["documents"]) == (0, stages["rescore/000@001"]["result"]["documents"])
    stored = Candidates.load(run.folder.candidates("000@001"))
    np.testing.assert_allclose(stored.scores_QK, scored.scores_QK, rtol=1e-5, atol=1e-5)

    # A branch takes the scores over, unless it draws other queries.
    both = {"rescore/000@001", "negatives/000@001"}
    assert both <= set(branch_run(run.folder.path, folder / "same", [], "ranker/1").kept)
    assert (folder / "same" / "rescored" / "000@001" / "candidates.json").exists()
    assert both <= set(branch_run(run.folder.path, folder / "other", ["ar2.ranker.steps=4"], "ranker/1").again)

    given: list[tuple[str, NegativeSource]] = []

    def train(stage: Stage, _models: Models, _data: Data, candidates: NegativeSource) -> None:
        given.append((stage.name, candidates))

    visit(run, "ranker/1", train, Models({}, {}), data, found)
    ((name, shown),) = given
    assert (name, shown.row(qid).tolist()) == ("ranker/1", drawn.row(qid).tolist())
    assert rescored_when_stale(run, data, found, run.timetable.visit("ranker/1")) is found, "the phase is over"


def test_a_corpus_in_int8_is_near_that_in_float32(folder: Path) -> None:
    """Symptom guarded against: the option is read, and the corpus is in float32 all the same."""
    found = []
    for words in ((), ("index.encode_int8=true",)):
        run, data = opened(folder, None, *words)
        shutil.rmtree(run.folder.path / "index", ignore_errors=True)
        run.once(f"encode {words}", encode_corpus, data, run.folder, dense(WeightsOf("retriever", 1)))
        parts = (run.folder.index("001") / "embeddings").glob("*.npy")
        found.append(np.concatenate([np.load(path) for path in sorted(parts)]))
        assert run.lock is not None
        run.lock.release()
    exact_ND, rounded_ND = found
    assert not np.array_equal(exact_ND, rounded_ND)
    cosines_N = (exact_ND * rounded_ND).sum(1) / np.linalg.norm(exact_ND, axis=1) / np.linalg.norm(rounded_ND, axis=1)
    assert cosines_N.min() > 0.98

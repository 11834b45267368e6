"""A lexical retriever's postings and candidates: the same bytes by one rank and by two, also after a kill.

`search_on_every_rank` runs on the ranks: it writes shards, encodes them sparsely and mines the training queries by the
parts of the postings.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.config.models import LexicalConfig
from engine.config.r2anker import R2ankerRecipe
from engine.config.timetable import WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.candidates import Candidates
from engine.data.corpus import Data, open_data, write_shards
from engine.models.lexical import Lexical
from engine.refresh.mining import mine
from engine.retrievers.kinds import Choice, build, is_built, open_searcher, stamp_of
from engine.run import Run, Stage
from engine.training.publishing import publish_weights
from shards.embeddings import part_paths
from shards.errors import ArtifactError
from shards.postings import PostingsStore
from tests.distributed.processes import report, run_ranks
from tests.distributed.test_passes import Untrained, bytes_of, connect, made_up

HERE = "tests.distributed.test_lexical_search"
TINY = Path(__file__).parents[2] / "configs" / "r2anker_tiny.yaml"
NUM_DOCUMENTS, PER_SHARD, TOP_K = 120, 10, 15
LEXICAL = Choice("lexical", WeightsOf("lexical", 1))
NAME = "lexical-001"


class LexicalRecipe(R2ankerRecipe):
    """R2ANKER with a lexical retriever among its models, for what comes after its training."""

    lexical: LexicalConfig


def opened(folder: Path, coordinator: Coordinator) -> tuple[Run, Data]:
    """Open a run whose lexical retriever has published weights, and its data."""
    values = yaml.safe_load(TINY.read_text()) | {
        "run": {"path": str(folder / "run"), "timeout_seconds": 120},
        "data": {"documents_per_shard": PER_SHARD, "generated_documents": NUM_DOCUMENTS},
        "lexical": {"name": "random", "max_length": 48, "query_max_length": 16, "dropout": 0.0},
    }
    values["r2anker"]["ranker"] = {"steps": 1}
    run = Run.open(LexicalRecipe.model_validate(values), coordinator, torch.device("cpu"))
    dataset, name, texts = made_up(run, folder / "data", NUM_DOCUMENTS)
    run.once("shards", write_shards, dataset, texts, run.folder)
    untrained: Any = Untrained(Lexical.load(name))
    untrained.name = "lexical"
    run.once("weights", lambda stage: publish_weights(stage.run, untrained, texts["lexical"], "001"))
    return run, open_data(run.config, dataset, texts, run.folder)


def retrieved(run: Run, data: Data) -> Candidates:
    """Encode the corpus and mine all training queries; every rank calls it alike."""
    build(run, data, run.folder, LEXICAL)
    searcher, stamp = open_searcher(run, data, run.folder, LEXICAL), stamp_of(run, data, LEXICAL)
    rows = np.arange(len(data.train))
    mine(Stage(run, f"candidates/{NAME}"), data, searcher, rows, stamp, top_k=TOP_K, needed=1, name=NAME)
    return Candidates.load(run.folder.candidates(NAME), stamp)


def search_on_every_rank() -> None:
    import engine.config.recipes
    import engine.models.encode_sparse
    from engine.retrievers.lexical import LexicalSearcher

    torch.set_num_threads(1)
    engine.config.recipes.RECIPES = {"r2anker": LexicalRecipe}  # a second start reads the run's file
    LexicalSearcher.block_size = 20
    write, written = engine.models.encode_sparse.write_postings, []

    def counted(*args: Any, **kwargs: Any) -> None:
        if "TEST_DIES" in os.environ and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(*args, **kwargs))

    engine.models.encode_sparse.write_postings = counted  # type: ignore[attr-defined]
    run, data = opened(Path(os.environ["TEST_FOLDER"]), connect())
    retrieved(run, data)
    run.coordinator.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Data, Candidates, Path]:
    """One rank's run: the process of the tests itself."""
    folder = tmp_path_factory.mktemp("alone")
    run, data = opened(folder, Coordinator(LocalTransport()))
    assert not is_built(run, run.folder, LEXICAL)
    candidates = retrieved(run, data)
    assert is_built(run, run.folder, LEXICAL)
    return run, data, candidates, folder


def postings_of(run: Run, data: Data) -> PostingsStore:
    stamp = stamp_of(run, data, LEXICAL)
    return PostingsStore.open(run.folder.index(NAME) / "postings", data.shards.manifest, stamp, verify=True)


def test_candidates_are_the_best_by_a_dense_product(alone: tuple[Run, Data, Candidates, Path]) -> None:
    run, data, candidates, _ = alone
    searcher: Any = open_searcher(run, data, run.folder, LEXICAL)
    assert (searcher.source, searcher.num_parts) == ("lexical", 8)
    store = postings_of(run, data)
    dense_NV = np.zeros((store.num_documents, store.num_terms))
    for block in store.blocks():
        terms = np.repeat(np.arange(store.num_terms), np.diff(block.starts_V))
        dense_NV[block.first_document + block.documents_P.astype(int), terms] = block.weights_P
    assert store.num_postings == np.count_nonzero(dense_NV)
    encoded_QV = searcher.encode(data.train.queries)
    scores_QN = (encoded_QV.toarray().astype(np.float64) @ dense_NV.T).astype(np.float32)
    assert (scores_QN > 0).all(), "an untrained model likes half of all words"
    hits = searcher.search(data.train.queries, NUM_DOCUMENTS)
    for row, query in enumerate(data.train.queries):
        order_N = np.lexsort((np.arange(NUM_DOCUMENTS), -scores_QN[row]))
        assert hits.documents_QK[row].tolist() == order_N.tolist()
        known = data.train.known(row)
        kept = [document for document in order_N.tolist() if document not in known][:TOP_K]
        assert candidates.row(query.id).tolist() == kept


def test_documents_are_encoded_as_the_model_does(alone: tuple[Run, Data, Candidates, Path]) -> None:
    run, data, _, _ = alone
    model, text = Lexical.open(run.folder.weights("lexical", "001")), data.texts["lexical"]
    ids = [data.shards.tokens(document, text.stream) for document in range(NUM_DOCUMENTS)]
    batch = text.template.for_documents().pad([text.template.for_documents().single(one, 48) for one in ids])
    with torch.inference_mode():
        expected_NV = model.encode_documents(batch).numpy()
    for block in postings_of(run, data).blocks():
        for term in range(0, len(block.starts_V) - 1, 97):
            mine_ = slice(block.starts_V[term], block.starts_V[term + 1])
            found_N = np.zeros(block.num_documents)
            found_N[block.documents_P[mine_]] = block.weights_P[mine_]
            own = slice(block.first_document, block.first_document + block.num_documents)
            np.testing.assert_allclose(found_N, expected_NV[own, term], rtol=2**-11, atol=1e-5)  # of float16


def test_two_ranks_make_the_same_bytes_also_after_a_kill(
    alone: tuple[Run, Data, Candidates, Path], tmp_path: Path
) -> None:
    """Symptom guarded against: another number of ranks, or a kill, gives another L1, and other negatives."""
    variables = {"TEST_FOLDER": str(tmp_path)}
    target = f"{HERE}:search_on_every_rank"
    first = run_ranks(target, 1, timeout=150, env={**variables, "TEST_DIES": "1"})
    assert first[0].returncode == -signal.SIGKILL, report(first)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "index").rglob("part-*")}
    assert len(kept) == 2 * 3
    second = run_ranks(target, 2, timeout=150, env=variables)
    assert all(result.returncode == 0 for result in second), report(second)
    assert bytes_of(tmp_path / "run") == bytes_of(alone[3] / "run")
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items()), "a part was encoded again"


def test_postings_of_other_weights_and_damaged_ones_are_refused(alone: tuple[Run, Data, Candidates, Path]) -> None:
    run, data, _, _ = alone
    store = postings_of(run, data)
    path = part_paths(store.folder, data.shards.manifest.shards[4])[0]
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match=r"postings@lexical-001 has 110 rows.*part 4 is short"):
        open_searcher(run, data, run.folder, LEXICAL)
    path.write_bytes(content)
    open_searcher(run, data, run.folder, LEXICAL)
    with pytest.raises(ArtifactError, match="no published weights"):
        open_searcher(run, data, run.folder, Choice("lexical", WeightsOf("lexical", 2)))

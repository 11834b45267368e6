"""An index as one file: plain FAISS finds in it what the run finds, with the run's scores and no setting of its own."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

import engine.index.plain
from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ArtifactError
from engine.index.build import build_index
from engine.index.dense import DenseIndex
from engine.index.plain import PlainIndex, export_index
from engine.index.plan import plan_index
from shards.embeddings import EmbeddingStore
from shards.files import read_record, sha256_file
from tests.embedding_stores import clustered, make_store, open_store

SIZES = (150, 7, 93, 61, 300, 1, 133, 40, 90)
N, D = sum(SIZES), 16
EMBEDDINGS_ND, QUERIES_QD = clustered(N, D, 0), clustered(30, D, 1)


def built(store: EmbeddingStore, factory: str, placement: str) -> DenseIndex:
    folder = store.folder.parent
    settings = {} if factory == "Flat" else {"placement": placement, "nprobe": 3, "kmeans_iterations": 3}
    asked = IndexConfig(factory=factory, recall_floor=0.0, **settings)
    build_index(
        Coordinator(LocalTransport()), store, plan_index(asked, num_documents=N, dimension=D), folder,
        seed=0, audit_queries_QD=QUERIES_QD, recall_k=10, recall_floor=0.0,
    )  # fmt: skip
    return DenseIndex.open(folder, store)


def exported(folder: Path, store: EmbeddingStore) -> tuple[PlainIndex, Path]:
    (folder / "docids.txt").write_text("".join(f"d {number}\n" for number in range(N)))
    return export_index(folder, store, folder / "docids.txt", folder / "out"), folder / "out"


@pytest.mark.parametrize(
    ("factory", "placement", "dtype"),
    [
        ("IVF5,PQ4x4fs", "memory", np.float32),
        ("OPQ4,IVF5,PQ4x4fsr", "memory", np.float16),
        ("OPQ4,IVF5_HNSW4,PQ4x5", "disk", np.float16),
        ("IVF5,SQ8", "parts", np.float32),
        ("Flat", "memory", np.float16),
        ("Flat", "memory", np.float32),
    ],
)
def test_plain_faiss_finds_what_the_run_finds(
    tmp_path: Path, factory: str, placement: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.index.plain, "_ROWS", 64)  # embeddings are written in several pieces
    store = make_store(tmp_path, EMBEDDINGS_ND.astype(dtype), SIZES)
    expected = built(store, factory, placement).search(QUERIES_QD, 10)
    about, out = exported(tmp_path, store)
    index = faiss.read_index(str(out / "index.faiss"))
    scores_QK, rows_QK = index.search(QUERIES_QD, 10)
    np.testing.assert_array_equal(rows_QK, expected.documents_QK)
    np.testing.assert_allclose(scores_QK, expected.scores_QK, rtol=1e-5)
    ids = (out / "ids.txt").read_text().splitlines()
    assert [ids[row] for row in rows_QK[0]] == [f"d {row}" for row in expected.documents_QK[0]]
    assert read_record(out / "about.json", PlainIndex, "what was written") == about
    assert (about.num_documents, about.factory, about.file.sha256) == (N, factory, sha256_file(out / "index.faiss"))
    assert about.embedding_dtype == np.dtype(dtype).name


def test_an_index_of_other_weights_is_not_exported(tmp_path: Path) -> None:
    built(make_store(tmp_path, EMBEDDINGS_ND, SIZES), "Flat", "memory")
    make_store(tmp_path, EMBEDDINGS_ND, SIZES, weights="c" * 64)
    with pytest.raises(ArtifactError, match="was made from embeddings"):
        exported(tmp_path, open_store(tmp_path, SIZES, weights="c" * 64))


def test_a_file_that_faiss_reads_otherwise_is_told_and_not_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings that are not those of the codes gave other scores, and nobody would have noticed."""
    store = make_store(tmp_path, EMBEDDINGS_ND, SIZES)
    built(store, "IVF5,SQ8", "memory")
    _, out = exported(tmp_path, store)
    whole = engine.index.plain.stream

    def shifted(*arguments: object):  # type: ignore[no-untyped-def]
        for first, rows_ND in whole(*arguments):  # type: ignore[arg-type]
            yield first, np.roll(rows_ND, 1, axis=0)

    monkeypatch.setattr(engine.index.plain, "stream", shifted)
    with pytest.raises(ArtifactError, match="whose scores differ by"):
        exported(tmp_path, store)
    assert not (out / "about.json").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["num_documents"] == N, "the run's own is as it was"

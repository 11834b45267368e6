"""How stale an index was: shares against brute force, the change of weights against float64."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.data.candidates import Candidates
from engine.errors import ArtifactError
from engine.models.weights import MARKER, digest_of, weight_files
from engine.refresh import staleness
from engine.refresh.staleness import change_of_weights, kept_of
from shards.embeddings import Stamp
from shards.files import write_json


def found(documents: dict[str, list[int]], width: int) -> Candidates:
    rows = np.full((len(documents), width), -1, dtype=np.int64)
    for row, own in enumerate(documents.values()):
        rows[row, : len(own)] = own
    scores = np.where(rows >= 0, 1.0, -np.inf).astype(np.float32)
    return Candidates("dense", Stamp("001", "a" * 64, "b" * 64), list(documents), rows, scores, Counter())


def test_the_kept_share_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of several blocks, searched once or twice, with short and empty lists, of several depths."""
    monkeypatch.setattr(staleness, "_QUERIES_A_BLOCK", 7)
    rng = np.random.default_rng(3)

    def draw(qids: list[int]) -> dict[str, list[int]]:
        return {f"q{qid}": rng.permutation(12)[: rng.integers(0, 7)].tolist() for qid in qids}

    old, new = draw(list(range(30))), draw(rng.permutation(np.arange(10, 45)).tolist())
    for top_k in (1, 3, 6):
        shares = [
            len(set(own[:top_k]) & set(old[qid][:top_k])) / len(own[:top_k])
            for qid, own in new.items()
            if qid in old and own
        ]
        kept, queries = kept_of(found(old, 6), found(new, 6), top_k)
        assert queries == len(shares) > 14
        assert kept == pytest.approx(sum(shares) / len(shares), abs=1e-12)
        assert 0 < kept < 1
    assert kept_of(found({"a": [1]}, 2), found({"b": [1], "a": []}, 2), 2) == (None, 0)
    assert kept_of(found({"a": [5, 3]}, 2), found({"a": [3, 5]}, 2), 2) == (1.0, 1), "their order is not asked for"


def published(folder: Path, **parameters: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(parameters, folder / "model.safetensors")
    files = weight_files(folder)
    write_json(folder / MARKER, {"sha256": digest_of(files), "files": files})
    return folder


def test_the_change_of_weights_is_relative_to_the_older_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(5, 4), torch.randn(3)
    old = published(tmp_path / "old", a=one, b=other, ids=torch.arange(3))
    new = published(tmp_path / "new", a=one + 0.5, b=2 * other, ids=torch.arange(3) + 1)
    before = np.concatenate([one.double().numpy().ravel(), other.double().numpy()])
    after = np.concatenate([(one + 0.5).double().numpy().ravel(), 2 * other.double().numpy()])
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert change_of_weights(old, new) == pytest.approx(expected, rel=1e-12)
    assert change_of_weights(old, old) == 0.0
    assert change_of_weights(new, old) != pytest.approx(expected), "it is not symmetric"
    with pytest.raises(ArtifactError, match="other parameters"):
        change_of_weights(old, published(tmp_path / "another", a=one))

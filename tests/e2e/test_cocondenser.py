"""coCondenser as a run: a corpus alone, held-out losses that fall, and an encoder that others start from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModel

from engine.models.condenser import CondenserLM
from tests.e2e.made import ledger_of, weights_of
from tests.e2e.starts import ROOT, Zygote

TINY = ROOT / "configs" / "cocondenser_tiny.yaml"
STAGES = ["start", "held_out/0", "cocondenser/1", "held_out/1", "cocondenser/2", "held_out/2", "export"]


def test_it_runs_on_two_ranks_and_leaves_a_plain_encoder(zygote: Zygote, corpus_alone: Path, tmp_path: Path) -> None:
    """tests/distributed kills it."""
    folder = tmp_path / "run"
    words = (f"run.path={folder}", f"data.path={corpus_alone}", "cocondenser.held_out=20", "encoder.zero_stage=2")
    ended = zygote.recipe(*words, num_ranks=2, config=TINY).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert list(ledger_of(folder)) == ["sizes", "shards", *STAGES]
    assert ledger_of(folder)["cocondenser/1"]["result"]["steps"] == 4  # 60 documents by 16
    assert set(weights_of(folder)) == {"encoder/zero-shot", "encoder/001", "encoder/002"}
    rows = json.loads((folder / "results" / "held_out.json").read_text())
    for name in ("contrastive_loss", "late_loss", "head_loss"):
        assert rows[0][name] > rows[2][name]
    trained = CondenserLM.open(folder / "weights" / "encoder" / "002")
    own = trained.masked_lm.base_model.state_dict()
    loaded = AutoModel.from_pretrained(folder / "export" / "encoder", add_pooling_layer=False).state_dict()
    assert loaded
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.items())
    assert not (folder / "export" / "encoder" / "decoder").exists()

"""Pre-training as a run: its stages, its held-out losses, a corpus without queries, and kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.models.bottleneck import BottleneckLM
from engine.models.loading import load_tokenizer
from engine.models.template import InputTemplate
from engine.pretrain.documents import MaskedInputBuilder, split_documents
from engine.pretrain.masking import MaskRates
from shards.reader import CorpusShards
from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, measured, metrics_of, weights_of
from tests.e2e.starts import ROOT, Zygote, wait_until
from tests.e2e.test_resume import OFTEN, checkpointed

TINY = ROOT / "configs" / "edmlm_tiny.yaml"
STAGES = ["start", "held_out/0", "edmlm/1", "held_out/1", "edmlm/2", "held_out/2", "export"]


@pytest.fixture(scope="module")
def pretrained(zygote: Zygote, corpus_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={corpus_alone}", *WORDS, num_ranks=2, config=TINY).wait()
    assert ended.code == 0, ended.err[-6000:]
    return Finished(folder, ended)


WORDS = ("edmlm.batch_size=16", "edmlm.held_out=20")


def test_a_corpus_alone_is_enough(pretrained: Finished) -> None:
    assert list(ledger_of(pretrained.folder)) == ["sizes", "shards", *STAGES]
    assert ledger_of(pretrained.folder)["edmlm/1"]["result"]["steps"] == 4  # 60 documents by 16
    assert set(weights_of(pretrained.folder)) == {"encoder/zero-shot", "encoder/001", "encoder/002"}
    assert (pretrained.folder / "export" / "encoder" / "model.safetensors").exists()
    assert "held-out documents" in pretrained.ended.err


def test_the_held_out_losses_fall_and_are_those_of_the_published_weights(pretrained: Finished) -> None:
    """Each document by itself, in float64, from the folder's files alone."""
    folder = pretrained.folder
    rows = json.loads((folder / "results" / "held_out.json").read_text())
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for side in ("encoder", "decoder"):
        losses = [row[f"{side}_loss"] for row in rows]
        assert losses[0] > losses[1] > losses[2]
    points = {(line["step"], name): value for line in metrics_of(folder) for name, value in line.items()}
    assert [points[row["iteration"], "held_out/decoder_loss"] for row in rows] == [row["decoder_loss"] for row in rows]
    model = BottleneckLM.open(folder / "weights" / "encoder" / "002").double()
    tokenizer = load_tokenizer(str(folder / "weights" / "encoder" / "002"))
    collate, shards = model.collator(InputTemplate.from_tokenizer(tokenizer)), CorpusShards.open(folder / "shards")
    rates = MaskRates(0.3, 0.5)
    builder = MaskedInputBuilder(shards, "encoder", tokenizer, collate, rates, max_length=48, seed=42)
    sums, counts = [0.0, 0.0], [0, 0]
    for document in split_documents(shards.num_documents, 20, 42).held_out.tolist():
        pair = builder([document], "held_out", 0)
        with torch.no_grad():
            outputs = model(pair.encoder, pair.decoder)
        for side, (logits_MV, inputs) in enumerate(zip(outputs, (pair.encoder, pair.decoder), strict=True)):
            sums[side] -= float(logits_MV.log_softmax(1).gather(1, inputs.labels_M[:, None]).sum())
            counts[side] += len(inputs.labels_M)
    expected = [part / count for part, count in zip(sums, counts, strict=True)]
    assert [rows[-1]["encoder_loss"], rows[-1]["decoder_loss"]] == pytest.approx(expected, rel=1e-5)


def test_two_ranks_killed_inside_an_epoch_end_bit_equal(
    zygote: Zygote, pretrained: Finished, corpus_alone: Path, tmp_path: Path
) -> None:
    """Under ZeRO 2 here, in the weights of the undisturbed run under ZeRO 1; tests/distributed kills every stage."""
    folder = tmp_path / "run"
    words = (f"run.path={folder}", f"data.path={corpus_alone}", *WORDS, *OFTEN, "encoder.zero_stage=2")
    started = zygote.recipe(*words, num_ranks=2, config=TINY)
    wait_until(checkpointed(folder, "encoder", "edmlm/2", 2), started)
    started.kill()
    started.wait()
    assert "edmlm/2" not in ledger_of(folder)
    ended = zygote.recipe(*words, num_ranks=2, config=TINY).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert "encoder goes on from edmlm/2, step" in ended.err
    assert weights_of(folder) == weights_of(pretrained.folder)
    held_out = {key: value for key, value in measured(folder).items() if key[2].startswith("held_out/")}
    assert held_out == {key: held_out[key] for key in held_out if key in measured(pretrained.folder)}


def test_what_cannot_be_done_is_refused(
    zygote: Zygote, pretrained: Finished, corpus_alone: Path, tmp_path: Path
) -> None:
    words = (f"run.path={tmp_path / 'run'}", f"data.path={corpus_alone}")
    ended = zygote.recipe(*words, "edmlm.batch_size=16", "edmlm.held_out=80", config=TINY).wait()
    assert ended.code == 2
    assert "80 documents, 80 of which are to be held out" in ended.err
    assert not (tmp_path / "run" / "shards").exists(), "refused before the corpus is tokenised"
    searched = zygote.launcher("search", str(pretrained.folder), "a question")
    assert searched.code == 2
    assert "is of the recipe edmlm" in searched.err
    planned = zygote.launcher("plan", "--config", str(TINY))
    assert planned.code == 2
    assert "learns from documents alone" in planned.err

"""A run that is killed, wherever it is, goes on when it is started again and ends as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, measured, summary_of, weights_of
from tests.e2e.starts import Zygote, wait_until

OFTEN = ("run.checkpoint_every_steps=1", "run.log_every_steps=2")
"""`run.*` does not change what is computed, so the folder of such a run can be compared with another's."""


def checkpointed(folder: Path, model: str, stage: str, step: int) -> Callable[[], bool]:
    """Whether a step inside a stage is safe on disk."""

    def reached() -> bool:
        for path in (folder / "checkpoints" / model).glob("[0-9]*/COMMIT.json"):
            try:
                position = json.loads(path.read_text())["position"]
            except FileNotFoundError:  # an older one, deleted this moment
                continue
            if (position["stage"], position["step"]) == (stage, step):
                return True
        return False

    return reached


def in_ledger(folder: Path, stage: str) -> Callable[[], bool]:
    return lambda: stage in ledger_of(folder)


def exists(path: Path) -> Callable[[], bool]:
    return path.exists


def test_killed_again_and_again_a_run_ends_bit_equal(zygote: Zygote, alone: Finished, tmp_path: Path) -> None:
    """Kills in the middle of stages of every kind, and between stages; the weights of all iterations are compared."""
    folder = tmp_path / "run"
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("generate", exists(folder / "data" / "corpus.jsonl")),
        ("shards", exists(folder / "shards" / "000001.tar")),
        ("encode/zero-shot", exists(folder / "index" / "zero-shot" / "embeddings" / "part-000001.json")),
        ("warmup_retriever", checkpointed(folder, "retriever", "warmup_retriever", 6)),
        ("index/000", in_ledger(folder, "encode/000")),
        ("warmup_ranker", checkpointed(folder, "ranker", "warmup_ranker", 3)),
        ("retriever/1", checkpointed(folder, "retriever", "retriever/1", 4)),
        ("ranker/1", checkpointed(folder, "ranker", "ranker/1", 1)),
        ("candidates/002", in_ledger(folder, "index/002")),
        ("ranker/2", checkpointed(folder, "ranker", "ranker/2", 4)),
        ("export", in_ledger(folder, "evaluate/test")),
    ]
    unfinished = []
    for stage, moment in moments:
        started = zygote.recipe(f"run.path={folder}", *OFTEN)
        wait_until(moment, started)
        started.kill()
        ended = started.wait()
        assert ended.code == -9, f"{stage}: {ended.err[-3000:]}"
        if stage not in ledger_of(folder):
            unfinished.append(stage)
    assert len(unfinished) >= 8, f"the kills came too late; only these stages were cut: {unfinished}"
    ended = zygote.recipe(f"run.path={folder}", *OFTEN).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert weights_of(folder) == weights_of(alone.folder)
    assert summary_of(folder) == summary_of(alone.folder)
    assert list(ledger_of(folder)) == list(ledger_of(alone.folder))
    assert {key: value for key, value in measured(folder).items() if key[2] == "index/recall"} == {
        key: value for key, value in measured(alone.folder).items() if key[2] == "index/recall"
    }


def test_two_ranks_killed_inside_a_phase_go_on_where_they_were(zygote: Zygote, tiny: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = zygote.recipe(f"run.path={folder}", *OFTEN, num_ranks=2)
    wait_until(checkpointed(folder, "retriever", "retriever/1", 3), started)
    started.kill()
    started.wait()
    assert "retriever/1" not in ledger_of(folder)
    ended = zygote.recipe(f"run.path={folder}", *OFTEN, num_ranks=2).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert "retriever goes on from retriever/1, step" in ended.err
    assert weights_of(folder) == weights_of(tiny.folder)
    assert summary_of(folder) == summary_of(tiny.folder)

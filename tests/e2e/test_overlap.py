"""A refresh beside the ranker's phase: killed on either side, on any number of ranks, it ends as if undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from engine.config.remaining import left_of
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.reliability.exit_codes import EXIT_CRASH, EXIT_LOST, EXIT_PREEMPTED
from engine.reliability.processes import process_is_alive
from engine.reliability.run_lock import read_holder
from engine.run import Run
from tests.distributed.processes import ROOT
from tests.e2e.made import ledger_of, measured, metrics_of, weights_of
from tests.e2e.starts import Started, Zygote, wait_until
from tests.e2e.test_resume import checkpointed, in_ledger

WORDS = (
    *("ar2.overlap=ranker", "ar2.iterations=3", "ar2.mine=sampled", "ar2.ranker.steps=8", "ar2.ranker.batch_size=4"),
    *("warmup_retriever.steps=2", "warmup_ranker.steps=2", "ar2.retriever.steps=2", "run.checkpoint_every_steps=1"),
    *("evaluation.zero_shot=false", "evaluation.test_at_end=false", "evaluation.fuse=false"),
    *("run.heartbeat_seconds=0.2", "ar2.refresh_until=0.01", "ar2.ranker.micro_batch_size=1"),
    "ar2.rescore=always",
)
SPLIT = ("ar2.overlap=split", "run.force_resume=true")
"""Over these words, of a run that was begun with them."""
RESCORED = "rescored/000@001"
FORKED = ROOT / "tests" / "e2e" / "forked.py"


@pytest.fixture(scope="module")
def prepared(zygote: Zygote, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose corpus is encoded; its index and its ranker's phase are due."""
    folder = tmp_path_factory.mktemp("overlap") / "prepared"
    ended = go_on(zygote, folder, small_data, before="ranker/1").wait()
    assert ended.code == 0, ended.err[-3000:]
    assert list(ledger_of(folder))[-2:] == ["encode/001", "rescore/000@001"]
    shutil.rmtree(folder / "beside")  # how far its companion came before the end is a matter of luck
    return folder


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, prepared: Path, small_data: Path) -> Path:
    """The run gone on with, its companion a process of the real kind."""
    folder = copied(prepared, "undisturbed")
    words = (f"run.path={folder}", f"data.path={small_data}", "run.stop_before=retriever/2")
    ended = zygote.recipe(*WORDS, *words).wait()
    assert ended.code == 0, ended.err[-3000:]
    return folder


def copied(prepared: Path, name: str) -> Path:
    folder = prepared.with_name(name)
    shutil.copytree(prepared, folder)
    return folder


def undone(prepared: Path, name: str) -> Path:
    """The run as it was before the corpus was encoded."""
    folder = copied(prepared, name)
    ledger = json.loads((folder / "ledger.json").read_text())
    for stage, left in (("encode/001", "index/001"), ("rescore/000@001", "rescored/000@001")):
        del ledger["stages"][stage]
        shutil.rmtree(folder / left)
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return folder


def go_on(
    zygote: Zygote, folder: Path, data: Path, *more: str, num_ranks: int = 1, before: str = "retriever/2"
) -> Started:
    words = (f"run.path={folder}", f"data.path={data}", f"run.stop_before={before}", *more)
    return zygote.recipe(*WORDS, *words, num_ranks=num_ranks, script=FORKED)


def artifacts_of(folder: Path, *more: str) -> dict[str, bytes]:
    """The bytes of all that the refresh has left, but for what a clock has measured."""
    found = {}
    made = [folder / name for name in ("candidates/001", "index/001", *more)]
    for path in sorted(path for one in made for path in one.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            found[f"{path.parent.parent.name}/{path.name}"] = path.read_bytes()
    assert any(name.endswith("documents.npy") for name in found)
    assert any(name.startswith("index/") for name in found)
    return found


def companions_of(folder: Path) -> list[int]:
    beats = (folder / "heartbeats" / "beside").glob("rank-*.json")
    return [json.loads(path.read_text())["pid"] for path in beats]


def test_the_ranker_draws_from_the_refresh_before_and_both_are_timed(undisturbed: Path) -> None:
    ledger = ledger_of(undisturbed)
    assert list(ledger)[-7:] == [
        *("rescore/000@001", "ranker/1", "index/001", "candidates/001", "overlap/1", "staleness/1", "evaluate/1"),
    ]
    took, stale = ledger["overlap/1"]["result"], ledger["staleness/1"]["result"]
    assert took["training_seconds"] == ledger["ranker/1"]["seconds"]
    assert took["refresh_seconds"] == pytest.approx(
        sum(ledger[f"{kind}/001"]["seconds"] for kind in ("index", "candidates"))
    )
    assert took["wall_seconds"] >= max(took["companion_seconds"], took["training_seconds"]) > 0
    assert (stale["before"], stale["lag_steps"]) == (0, 2)
    assert 0 < stale["weights_changed"] < 1
    assert ledger["rescore/000@001"]["result"]["documents_encoded"] == 0, "the corpus has just been encoded"
    assert 0 < stale["kept_best"] <= 1
    assert 0 < stale["kept_best_rescored"] <= 1
    tags = {tag for line in metrics_of(undisturbed) for tag in line}
    assert {"staleness/lag_steps", "staleness/weights_changed", "overlap/wall_seconds", "index/recall"} <= tags
    assert {"candidates/queries", "seconds/index"} <= tags, "what companions measure is the run's"
    assert not (undisturbed / "beside").exists()


@pytest.fixture(scope="module")
def two(zygote: Zygote, prepared: Path, small_data: Path) -> Path:
    """The run gone on with by two ranks."""
    folder = copied(prepared, "two")
    ended = go_on(zygote, folder, small_data, num_ranks=2).wait()
    assert ended.code == 0, ended.err[-3000:]
    return folder


def test_two_ranks_make_the_same_index_and_candidates(two: Path, undisturbed: Path) -> None:
    assert artifacts_of(two, RESCORED) == artifacts_of(undisturbed, RESCORED)
    assert ledger_of(two)["index/001"]["result"]["recall"] == ledger_of(undisturbed)["index/001"]["result"]["recall"]


@pytest.fixture(scope="module")
def split(zygote: Zygote, prepared: Path, small_data: Path) -> Path:
    """The run gone on with by two ranks, and by two companions that encode the corpus."""
    folder = undone(prepared, "split")
    ended = go_on(zygote, folder, small_data, *SPLIT, "ar2.refresh_devices=2", num_ranks=2).wait()
    assert ended.code == 0, ended.err[-3000:]
    return folder


def test_encoded_beside_the_ranker_the_run_is_the_same(split: Path, two: Path) -> None:
    ledger = ledger_of(split)
    assert list(ledger)[-8:] == [
        *("rescore/000@001", "ranker/1", "encode/001", "index/001", "candidates/001", "overlap/1", "staleness/1"),
        "evaluate/1",
    ]
    assert artifacts_of(split) == artifacts_of(two)
    assert weights_of(split) == weights_of(two)
    rescored = ledger["rescore/000@001"]["result"]
    assert 0 < rescored["documents_encoded"] == rescored["documents"], "the corpus was not encoded yet"
    assert without_rescoring(split) == without_rescoring(two)
    took = ledger["overlap/1"]["result"]
    assert took["refresh_seconds"] == pytest.approx(
        sum(ledger[f"{kind}/001"]["seconds"] for kind in ("encode", "index", "candidates"))
    )
    assert took["companion_seconds"] > took["refresh_seconds"]


def without_rescoring(folder: Path) -> dict[tuple[str, int, str], float]:
    """What was measured, but for a stage whose encoding rounds otherwise where it encodes lists in place of shards."""
    return {key: value for key, value in measured(folder).items() if not key[0].startswith("rescore")}


def test_killed_on_both_sides_a_split_run_ends_bit_equal_whatever_number_refreshes(
    zygote: Zygote, prepared: Path, small_data: Path, split: Path
) -> None:
    folder = undone(prepared, "split-killed")
    words = (*SPLIT, "ar2.refresh_devices=1")
    for name in ("holds", "encodes"):
        (folder / name).touch()
    started = go_on(zygote, folder, small_data, *words, num_ranks=2)
    wait_until(lambda: any((folder / "index" / "001" / "embeddings").glob("part-*.npy")), started)
    (pid,) = companions_of(folder)
    os.kill(pid, signal.SIGKILL)
    ended = started.wait()
    assert ended.code == EXIT_LOST, ended.err[-3000:]
    assert f"the refresh beside ranker/1 on rank 0 (pid {pid}) ended with -9 and without a word" in ended.err
    assert "ranker/1" not in ledger_of(folder), "it did not stop at the next step"
    assert not finished_beside(folder)

    (folder / "encodes").unlink()
    (folder / "waits").touch()
    started = go_on(zygote, folder, small_data, *words, num_ranks=2)
    wait_until(lambda: "index/001" in finished_beside(folder), started)
    kill_the_first_rank(folder, started)
    assert "ranker/1" not in ledger_of(folder)
    for name in ("waits", "holds"):
        (folder / name).unlink()
    ended = go_on(zygote, folder, small_data, *SPLIT, "ar2.refresh_devices=2", num_ranks=2).wait()
    assert ended.code == 0, ended.err[-3000:]
    assert artifacts_of(folder, RESCORED) == artifacts_of(split, RESCORED)
    assert weights_of(folder) == weights_of(split)
    assert measured(folder) == measured(split)


def test_stopped_and_killed_on_both_sides_it_ends_bit_equal(
    zygote: Zygote, prepared: Path, small_data: Path, undisturbed: Path
) -> None:
    folder = copied(prepared, "killed")
    (folder / "slow").touch()
    (folder / "waits").touch()  # so that neither the stop nor a kill comes too late
    started = go_on(zygote, folder, small_data)
    wait_until(checkpointed(folder, "ranker", "ranker/1", 1), started)
    (folder / "stop").touch()
    ended = started.wait()
    assert ended.code == EXIT_PREEMPTED, ended.err[-3000:]
    assert "ranker/1" not in ledger_of(folder)

    started = go_on(zygote, folder, small_data)
    wait_until(lambda: "index/001" in finished_beside(folder) and "ranker/1" in ledger_of(folder), started)
    kill_the_first_rank(folder, started)
    assert not {"candidates/001", "overlap/1"} & {*ledger_of(folder), *finished_beside(folder)}
    (folder / "waits").unlink()
    (folder / "slow").unlink()
    ended = go_on(zygote, folder, small_data).wait()
    assert ended.code == 0, ended.err[-3000:]
    assert artifacts_of(folder, RESCORED) == artifacts_of(undisturbed, RESCORED)
    assert weights_of(folder) == weights_of(undisturbed)
    assert measured(folder) == measured(undisturbed)


def kill_the_first_rank(folder: Path, started: Started) -> None:
    """Kill that rank alone: its companions must see for themselves."""
    holder = read_holder(folder / "run.lock")
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 60
    while any(process_is_alive(pid) for pid in companions_of(folder)):
        assert time.monotonic() < deadline, "a companion has outlived its rank"
        time.sleep(0.02)


def finished_beside(folder: Path) -> list[str]:
    """Stages that companions have finished."""
    found = list((folder / "beside").glob("*/ledger.json"))
    names = json.loads(found[0].read_text())["stages"] if found else {}
    return [name for name in names if name.endswith("/001") and not name.startswith("encode")]


def test_a_companion_that_fails_ends_the_run_with_its_traceback(
    zygote: Zygote, prepared: Path, small_data: Path
) -> None:
    """Symptom: training would go on for hours beside a refresh that has failed long ago."""
    folder = copied(prepared, "failing")
    (folder / "fails").touch()
    ended = go_on(zygote, folder, small_data).wait()
    assert ended.code == EXIT_CRASH, ended.err[-3000:]
    assert "the refresh beside ranker/1 failed" in ended.err
    assert "ZeroDivisionError: made to fail" in ended.err
    assert "ranker/1" not in ledger_of(folder), "it did not stop at the next step"
    assert in_ledger(folder, "encode/001")()
    assert list((folder / "checkpoints" / "ranker").glob("[0-9]*/COMMIT.json"))
    failure = json.loads(next((folder / "errors").glob("*.json")).read_text())
    assert "retrieve_candidates" in failure["traceback"]


def test_refreshes_end_where_one_has_kept_enough_also_in_a_later_start(
    zygote: Zygote, small_data: Path, undisturbed: Path
) -> None:
    """Symptom: a later start, which reads of the end in the ledger alone, would draw from what is not there."""
    folder = copied(undisturbed, "ended")
    ended = go_on(zygote, folder, small_data, before="take").wait()
    assert ended.code == 0, ended.err[-3000:]
    stages = list(ledger_of(folder))
    assert stages[stages.index("evaluate/1") + 1 :] == [
        *("retriever/2", "rescore/001@002", "ranker/2", "retriever/3", "encode/003", "rescore/001@003", "ranker/3"),
        *("index/003", "candidates/003", "overlap/3", "staleness/3", "evaluate/3"),
    ]
    stale = ledger_of(folder)["staleness/3"]["result"]
    assert (stale["before"], stale["lag_steps"]) == (1, 4), "two iterations of two steps"
    run = Run.reopen(folder, Coordinator(LocalTransport()), torch.device("cpu"))
    assert run.timetable.phase("ranker").candidates == ("000", "001", "001")
    assert left_of(run.config, ledger_of(folder), None) is None, "nothing that was measured is to come"

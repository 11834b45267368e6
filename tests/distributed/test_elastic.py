"""A checkpoint goes on with another number of ranks and another ZeRO stage as if nothing had happened.

Worlds of one, two and three ranks run at the same time. Each trains, saves and trains on: the undisturbed runs. Then
each loads what the others saved, trains on, and must arrive where they did.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.processes import has_fp16, report, run_ranks

HERE = "tests.distributed.test_elastic"
QUERIES, STEPS = 12, 3
SAVED = {1: [(1, "fp32")], 2: [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (1, "fp16")], 3: []}
"""World size to the (ZeRO stage, numeric type) that it saves."""
RESUMED = {
    1: [(2, 1, 1, "fp32"), (2, 3, 0, "fp32"), (2, 1, 0, "fp16")],
    2: [
        (1, 1, 1, "fp32"),
        (2, 2, 3, "fp32"),
        (2, 3, 1, "fp32"),
        (2, 0, 2, "fp32"),
        (2, 2, 2, "bf16"),
        (2, 1, 1, "fp16"),
        (2, 2, 0, "bf16"),
        (2, 2, 3, "bf16"),
    ],
    3: [(2, 1, 1, "fp32"), (2, 2, 3, "fp32")],
}
"""World size to the (world size that saved, its stage, the stage to go on with, numeric type) that it resumes."""


def can_train(way: tuple[Any, ...]) -> bool:
    """Whether the processor has a way's numeric type, its last part."""
    return way[-1] != "fp16" or has_fp16()


# --- on the ranks ----------------------------------------------------------------------------------------------------


def every_way_on_every_rank() -> None:
    import torch.distributed as dist

    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    shared, size = Path(os.environ["TEST_SHARED"]), dist.get_world_size()
    results = {}
    for stage, precision in filter(can_train, SAVED[size]):
        results[f"{size}/{stage}/{precision}"] = _undisturbed(world, shared, stage, precision)
    if size == 2:
        results |= {"one rank fails": _one_rank_fails(world, shared), "damaged": _damaged(world, shared)}
    if dist.get_rank() == 0:
        (shared / f"saved-{size}").touch()
        _wait_for(shared / "saved-1", shared / "saved-2")
    world.coordinator.barrier("all worlds have saved")
    for from_size, from_stage, stage, precision in filter(can_train, RESUMED[size]):
        found = _resumed(world, shared / f"{from_size}-{from_stage}-{precision}", stage, precision)
        results[f"{from_size}/{from_stage}/{precision} -> {size}/{stage}"] = found
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def _make_engine(stage: int, precision: str) -> Any:
    from engine.config.models import RetrieverConfig
    from engine.config.training import OptimConfig
    from engine.models.retriever import Retriever
    from engine.training.backend import TrainedModel

    folder = os.environ["TEST_MODEL"]
    model = Retriever.load(folder, pooling="cls", similarity="dot", tied=True, dropout=0.0)
    optim = OptimConfig(lr=1e-3, eps=1e-3, weight_decay=0.1)
    config = RetrieverConfig(name="tiny", zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    engine = TrainedModel("retriever", model, config, optim)
    engine.begin_stage(optim)
    engine.train()
    if precision == "fp16":
        engine.restore_loss_scale({"cur_scale": 128.0})  # the first one is so large that the first steps are skipped
    return engine


def _train(engine: Any) -> list[float]:
    from tests.distributed.test_backend import contrastive_steps

    return contrastive_steps(engine, 2, QUERIES)[0]


def _checkpoints(world: Any, folder: Path) -> Any:
    from engine.training.checkpoint import Checkpoints, Retention

    return Checkpoints(folder, world.coordinator, Retention(2))


def _undisturbed(world: Any, shared: Path, stage: int, precision: str) -> dict[str, Any]:
    folder = shared / f"{world.coordinator.world_size}-{stage}-{precision}"
    engine = _make_engine(stage, precision)
    _train(engine)
    _checkpoints(world, folder).save(engine, "retriever/1", STEPS)
    return {"losses": _train(engine), "weights": _dump(world, engine, folder / "undisturbed.safetensors")}


def _resumed(world: Any, folder: Path, stage: int, precision: str) -> dict[str, Any]:
    engine = _make_engine(stage, precision)
    position = _checkpoints(world, folder).restore(engine)
    assert position is not None
    assert position.step == STEPS
    steps = {float(fragment.steps) for fragment in engine.fragments()}
    name = f"resumed-{world.coordinator.world_size}-{stage}.safetensors"
    return {
        "losses": _train(engine),
        "weights": _dump(world, engine, folder / name),
        "steps": sorted(steps),
        "decays": [group["weight_decay"] for group in engine._engine.optimizer.param_groups],
        "loss_scale": engine.loss_scale_state,
    }


def _one_rank_fails(world: Any, shared: Path) -> dict[str, Any]:
    """Let rank 1 fail to write its part."""
    import engine.training.checkpoint as module
    from shards.errors import DiskFullError, SparringError

    checkpoints, model = _checkpoints(world, shared / "fails"), _make_engine(1, "fp32")
    checkpoints.save(model, "retriever/1", 1)
    whole, error = module.write_state, ""

    def fail(*_: Any) -> Any:
        raise DiskFullError("the disk is full")

    module.write_state = fail if world.coordinator.rank == 1 else whole
    try:
        checkpoints.save(model, "retriever/1", 2)
    except SparringError as caught:
        error = str(caught)
    module.write_state = whole
    position = _checkpoints(world, shared / "fails").restore(model)
    names = sorted(path.name for path in (shared / "fails").iterdir())
    return {"error": error, "names": names, "step": position.step}


def _damaged(world: Any, shared: Path) -> list[int]:
    """Flip a bit in the newest checkpoint's file of rank 1; return the step that each rank goes on from."""
    folder, model = shared / "damaged", _make_engine(2, "fp32")
    checkpoints = _checkpoints(world, folder)
    for step in (1, 2):
        checkpoints.save(model, "retriever/1", step)
    if world.coordinator.rank == 0:
        path = folder / "000002" / "optimizer-00001-000.safetensors"
        content = bytearray(path.read_bytes())
        content[-7] ^= 4
        path.write_bytes(content)
    world.coordinator.barrier("damaged")
    position = _checkpoints(world, folder).restore(model)
    return list(world.coordinator.gather("steps", position.step))


def _dump(world: Any, engine: Any, path: Path) -> str:
    state = engine.full_state_dict()
    if world.coordinator.rank == 0:
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return str(path)


def _wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 200
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} came"
        time.sleep(0.05)


FP16 = pytest.mark.skipif(not has_fp16(), reason="DeepSpeed does not train in fp16 on this processor")


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from engine.models.random import make_random_model

    shared = tmp_path_factory.mktemp("shared")
    model = make_random_model(tmp_path_factory.mktemp("model"), ["some words for a small vocabulary"] * 4)
    env = {"TEST_MODEL": str(model), "TEST_SHARED": str(shared)}

    def run(size: int) -> dict[str, Any]:
        ranks = run_ranks(f"{HERE}:every_way_on_every_rank", size, "store", timeout=240, env=env)
        (shared / f"saved-{size}").touch()  # where this world failed, the others need not wait for it
        assert all(rank.returncode == 0 for rank in ranks), report(ranks)
        results: dict[str, Any] = json.loads(ranks[0].stdout.strip().splitlines()[-1])
        return results

    with ThreadPoolExecutor(len(SAVED)) as pool:
        return {name: value for results in pool.map(run, SAVED) for name, value in results.items()}


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    first, second = load_file(one["weights"]), load_file(other["weights"])
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


ELASTIC = [
    (f"{a}/{s}/{p}", f"{b}/{t}")
    for b, ways in RESUMED.items()
    for a, s, t, p in ways
    if p == "fp32" and (a, s) != (b, t)
]


@pytest.mark.parametrize(("before", "after"), ELASTIC)
def test_other_ranks_and_stages_train_on_to_the_same_weights(worlds: dict[str, Any], before: str, after: str) -> None:
    """Symptom (DeepSpeed's universal checkpoints under ZeRO-3): the loss is off from the first resumed step."""
    undisturbed, resumed = worlds[before], worlds[f"{before} -> {after}"]
    assert resumed["losses"] == pytest.approx(undisturbed["losses"], abs=1e-5)
    assert _distance(resumed, undisturbed) < 1e-5


@pytest.mark.parametrize(("before", "after"), ELASTIC)
def test_step_counts_and_weight_decay_stay_what_they_were(worlds: dict[str, Any], before: str, after: str) -> None:
    """Symptom (the same): every group gets the first one's weight decay, and shares one counter of steps."""
    resumed = worlds[f"{before} -> {after}"]
    assert resumed["steps"] == [STEPS]
    assert resumed["decays"] == [0.1, 0.0]


@pytest.mark.parametrize("way", ["2/2/bf16 -> 2/2", pytest.param("2/1/fp16 -> 2/1", marks=FP16)])
def test_16_bit_training_goes_on_bit_equal(worlds: dict[str, Any], way: str) -> None:
    """Symptom: 16-bit weights that are read back as the master copies lose what the 16 bits do not hold."""
    undisturbed, resumed = worlds[way.split(" ")[0]], worlds[way]
    assert resumed["losses"] == undisturbed["losses"]
    assert _distance(resumed, undisturbed) == 0.0


@pytest.mark.parametrize("way", ["2/2/bf16 -> 2/0", "2/2/bf16 -> 2/3", pytest.param("2/1/fp16 -> 1/0", marks=FP16)])
def test_16_bit_training_goes_on_elsewhere(worlds: dict[str, Any], way: str) -> None:
    """Symptom (DeepSpeed, fp16 without ZeRO): it divides the gradient by a loss scale that it never multiplied by."""
    undisturbed, resumed = worlds[way.split(" ")[0]], worlds[way]
    assert resumed["losses"] == pytest.approx(undisturbed["losses"], abs=0.02)
    assert _distance(resumed, undisturbed) < 0.01
    assert resumed["steps"] == [STEPS]


@FP16
def test_the_loss_scale_is_part_of_the_state(worlds: dict[str, Any]) -> None:
    kept = worlds["2/1/fp16 -> 2/1"]["loss_scale"]
    assert kept["cur_iter"] == 2 * STEPS
    assert worlds["2/1/fp16 -> 1/0"]["loss_scale"]["cur_scale"] == kept["cur_scale"]
    assert worlds["2/2/bf16 -> 2/2"]["loss_scale"] == {}


def test_where_one_rank_cannot_write_nothing_is_published(worlds: dict[str, Any]) -> None:
    """Symptom (DeepSpeed): rank 0 names a checkpoint the newest before the other ranks have written their parts."""
    found = worlds["one rank fails"]
    assert "the disk is full" in found["error"]
    assert "rank 1" in found["error"]
    assert found["names"] == ["000001"], "the unfinished one is gone, and gives its space back"
    assert found["step"] == 1


def test_all_ranks_agree_on_the_checkpoint_before_a_damaged_one(worlds: dict[str, Any]) -> None:
    assert worlds["damaged"] == [1, 1]

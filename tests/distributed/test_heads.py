"""A head on raw token states with a learning rate of its own, under ZeRO 0 to 3 on two ranks: it must train as plain
torch does, and its checkpoints must go on under any stage, whether or not the head's parameters lie apart there.

The function named `..._on_every_rank` runs on the ranks and prints one JSON line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.processes import run_ranks
from tests.distributed.test_packed import make_batch

HERE = "tests.distributed.test_heads"
STEPS, LR, SCALE, RANKS = 2, 1e-3, 10.0, 2
WAYS = [*((stage, "fp32", "packed") for stage in range(4)), (3, "fp32", "padded"), (2, "bf16", "packed")]
RESUMED = [(3, True), (2, True), (1, False), (0, False)]
"""ZeRO stage to go on with, and whether the head's parameters lie apart there."""
WATCHED = ("classifier.head.0.linear.weight", "classifier.backbone.encoder.layer.0.attention.self.query.weight")


def load(folder: str) -> Any:
    from engine.models.ranker import Ranker

    return Ranker.load(folder, head="cls", dropout=0.0, seed=3).train()


def loss_of(model: Any, form: str, step: int, rank: int) -> torch.Tensor:
    scores_BN = model(pairs=make_batch(form, 100 * step + rank, 8)).view(4, 2)
    return torch.nn.functional.cross_entropy(5 * scores_BN, torch.zeros(4, dtype=torch.long))


# --- on the ranks ----------------------------------------------------------------------------------------------------


def ways_on_every_rank() -> None:
    import torch.distributed as dist

    from engine.training.checkpoint import Checkpoints, Retention
    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    results = {"/".join(map(str, way)): train(make_engine(way[0], way[1], apart=True), way[2]) for way in WAYS}
    folder = Path(os.environ["TEST_SHARED"])
    first = make_engine(1, "fp32", apart=True)
    train(first, "packed")
    Checkpoints(folder, world.coordinator, Retention(2)).save(first, "ranker/1", STEPS)
    results["undisturbed"] = train(first, "packed")
    for stage, apart in RESUMED:
        engine = make_engine(stage, "fp32", apart=apart)
        Checkpoints(folder, world.coordinator, Retention(2)).restore(engine)
        results[f"resumed/{stage}/{apart}"] = train(engine, "packed", scale=SCALE if apart else 1.0)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def make_engine(stage: int, precision: Any, *, apart: bool) -> Any:
    from engine.config.models import RankerConfig
    from engine.config.training import OptimConfig
    from engine.training.backend import TrainedModel

    model, section = (
        load(os.environ["TEST_MODEL"]),
        RankerConfig(name="tiny", head="cls", zero_stage=stage, precision=precision),
    )
    return TrainedModel("ranker", model, section, OptimConfig(lr=LR, eps=1e-3), model.head_names if apart else ())


def train(engine: Any, form: str, scale: float = SCALE) -> dict[str, Any]:
    import torch.distributed as dist

    from engine.config.training import OptimConfig

    engine.begin_stage(OptimConfig(lr=LR, eps=1e-3, head_lr_scale=scale, max_grad_norm=1e3))
    if engine.precision != "fp32":
        engine.reset_optimizer()  # as the loop does: DeepSpeed's wrapper for 16 bits has taken a step of its own
    engine.train()
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, form, step, dist.get_rank())
        engine.backward(loss, last=True)
        engine.step(LR)
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(float(mean) / RANKS)
    state = engine.full_state_dict()
    return {"losses": losses, "weights": [state[name].flatten()[:8].float().tolist() for name in WATCHED if state]}


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from engine.models.random import make_random_model

    folder = make_random_model(tmp_path_factory.mktemp("model"), ["some words for a small vocabulary"] * 4)
    env = {"TEST_MODEL": str(folder), "TEST_SHARED": str(tmp_path_factory.mktemp("shared"))}
    ranks = run_ranks(f"{HERE}:ways_on_every_rank", RANKS, "store", timeout=240, env=env)
    for result in ranks:
        assert result.returncode == 0, result.stderr
    results: dict[str, Any] = json.loads(ranks[0].stdout.strip().splitlines()[-1])
    return results | {"plain": plain(str(folder), SCALE), "plain without": plain(str(folder), 1.0)}


def plain(folder: str, scale: float) -> dict[str, Any]:
    """Train by torch alone, on the ranks' batches together, twice as long as `train` does."""
    model = load(folder)
    adamw = torch.optim.AdamW(
        [
            {"params": model.classifier.backbone.parameters(), "lr": LR},
            {"params": model.classifier.head.parameters(), "lr": LR * scale},
        ],
        eps=1e-3,
        weight_decay=0.0,
    )
    losses, weights = [], []
    for step in range(2 * STEPS):
        loss = torch.stack([loss_of(model, "padded", step % STEPS, rank) for rank in range(RANKS)]).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
        state = model.state_dict()
        weights.append([state[name].flatten()[:8].tolist() for name in WATCHED])
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_stage_trains_the_head_at_its_own_rate(found: dict[str, Any], way: tuple[Any, ...]) -> None:
    result, exact = found["/".join(map(str, way))], way[1] == "fp32"
    plain, without = found["plain"], found["plain without"]
    assert result["losses"] == pytest.approx(plain["losses"][:STEPS], abs=2e-5 if exact else 3e-2)
    if exact:
        for weights, expected in zip(result["weights"], plain["weights"][STEPS - 1], strict=True):
            assert weights == pytest.approx(expected, abs=2e-5)
        assert result["weights"][0] != pytest.approx(without["weights"][STEPS - 1][0], abs=1e-3)


@pytest.mark.parametrize(("stage", "apart"), RESUMED)
def test_a_checkpoint_goes_on_whether_or_not_the_head_lies_apart(
    found: dict[str, Any], stage: int, apart: bool
) -> None:
    undisturbed, result = found["undisturbed"], found[f"resumed/{stage}/{apart}"]
    assert undisturbed["losses"] == pytest.approx(found["plain"]["losses"][STEPS:], abs=2e-5)
    # Without a rate of its own the head learns otherwise from the first step on, but it begins where it was.
    assert result["losses"][0] == pytest.approx(undisturbed["losses"][0], abs=1e-5)
    if apart:
        assert result["losses"] == pytest.approx(undisturbed["losses"], abs=1e-5)
        for weights, expected in zip(result["weights"], undisturbed["weights"], strict=True):
            assert weights == pytest.approx(expected, abs=1e-5)

"""Packed batches under real DeepSpeed engines, ZeRO 0 to 3 on two ranks: they must train as padded ones do.

The functions named `..._on_every_rank` run on the ranks and print one JSON line.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.distributed.processes import run_ranks

HERE = "tests.distributed.test_packed"
STEPS, LR = 2, 1e-3
PRECISIONS = ("fp32", "bf16")


# --- on the ranks ----------------------------------------------------------------------------------------------------


def matrix_on_every_rank() -> None:
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    world = open_world(device=os.environ.get("TEST_DEVICE", "cpu"))  # type: ignore[arg-type]
    torch.set_num_threads(1)
    results = {
        f"{name}/{stage}/{precision}/{form}": train(name, stage, precision, form)
        for name in ("retriever", "ranker")
        for stage in range(4)
        for precision in PRECISIONS
        for form in (("padded", "packed") if name == "retriever" else ("padded", "packed", "rehearsed"))
    }
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def train(name: str, stage: int, precision: Any, form: str) -> dict[str, Any]:
    """Take steps on batches of one form, layers computed again in the backward pass. `rehearsed`: after a rehearsal."""
    import torch
    import torch.distributed as dist

    from engine.config.models import RankerConfig, RetrieverConfig
    from engine.config.training import OptimConfig
    from engine.data.prefetch import map_tensors
    from engine.models.ranker import Ranker
    from engine.models.retriever import Retriever
    from engine.training.backend import TrainedModel

    folder, optim = os.environ["TEST_MODEL"], OptimConfig(lr=LR, eps=1e-3)  # as in test_backend
    options: dict[str, Any] = {"dropout": 0.0, "gradient_checkpointing": True}
    if name == "retriever":
        model: Any = Retriever.load(folder, pooling="mean", similarity="cosine", tied=True, **options)
        config: Any = RetrieverConfig(name="tiny", zero_stage=stage, precision=precision)
    else:
        model, config = Ranker.load(folder, **options), RankerConfig(name="tiny", zero_stage=stage, precision=precision)
    assert model.packs
    engine = TrainedModel(name, model, config, optim)
    engine.begin_stage(optim)
    engine.reset_optimizer()  # as the loop does: DeepSpeed's wrapper for 16 bits has taken a step of its own
    engine.train()
    losses, norms = [], []

    def batch(count: int, seed: int) -> Any:
        return map_tensors(make_batch(form, seed, count), lambda tensor: tensor.to(engine.device))

    if form == "rehearsed":
        engine.backward(engine(pairs=batch(8, 1)).square().mean(), last=True)
        engine.rehearse_step()
    places_B = torch.arange(4, device=engine.device)
    for step in range(STEPS):
        seed = 100 * step + dist.get_rank()
        if name == "retriever":
            queries_BD, documents_ND = engine(queries=batch(4, seed), documents=batch(8, seed + 50))
            loss = torch.nn.functional.cross_entropy(10 * queries_BD @ documents_ND.T, 2 * places_B)
        else:
            loss = torch.nn.functional.cross_entropy(engine(pairs=batch(8, seed)).view(4, 2), 0 * places_B)
        engine.backward(loss, last=True)
        norms.append(engine.step(LR).grad_norm)
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(float(mean) / dist.get_world_size())
    state = engine.full_state_dict()
    weights = next((value for key, value in state.items() if "layer.0.attention.self.query.weight" in key), None)
    return {
        "losses": losses,
        "norms": norms,
        "weights": None if weights is None else weights.flatten()[:8].float().tolist(),
        "loss_dtype": str(loss.dtype),
    }


def make_batch(form: str, seed: int, count: int) -> Any:
    """Make inputs of different lengths, the same in either form."""
    from engine.models.template import Collator, InputTemplate, _Special

    nothing = _Special((), ())
    template = InputTemplate(0, True, (nothing, nothing), (nothing, nothing, nothing), 0, (0, 1))
    return Collator(template, form == "packed", 0)(make_inputs(seed, count))


def make_inputs(seed: int, count: int) -> list[Any]:
    """Make inputs in no batch yet."""
    import numpy as np

    from engine.models.template import Input

    rng = np.random.default_rng(seed)
    rows = [rng.integers(5, 20, length) for length in rng.integers(1, 12, count)]
    return [Input(row, row % 2) for row in rows]


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from engine.models.random import make_random_model

    model = make_random_model(tmp_path_factory.mktemp("model"), ["some words for a small vocabulary"] * 4)
    ranks = run_ranks(f"{HERE}:matrix_on_every_rank", 2, "store", timeout=240, env={"TEST_MODEL": str(model)})
    for result in ranks:
        assert result.returncode == 0, result.stderr
        assert "unknown inputs or outputs" not in result.stderr + result.stdout
    return dict(json.loads(ranks[0].stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("name", ["retriever", "ranker"])
@pytest.mark.parametrize("stage", range(4))
def test_packed_batches_train_as_padded_ones(trained: dict[str, dict[str, Any]], name: str, stage: int) -> None:
    plain, found = trained[f"{name}/0/fp32/padded"], trained[f"{name}/{stage}/fp32/packed"]
    assert found["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert found["weights"] == pytest.approx(plain["weights"], abs=1e-5)
    assert abs(plain["losses"][1] - plain["losses"][0]) > 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", range(4))
def test_a_rehearsed_step_leaves_no_trace(trained: dict[str, dict[str, Any]], stage: int, precision: str) -> None:
    assert trained[f"ranker/{stage}/{precision}/rehearsed"] == trained[f"ranker/{stage}/{precision}/padded"]


@pytest.mark.parametrize("name", ["retriever", "ranker"])
@pytest.mark.parametrize("stage", range(4))
def test_packed_batches_in_bfloat16(trained: dict[str, dict[str, Any]], name: str, stage: int) -> None:
    plain, found = trained[f"{name}/0/fp32/padded"], trained[f"{name}/{stage}/bf16/packed"]
    assert found["loss_dtype"] == "torch.float32"
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.02)
    assert found["norms"] == pytest.approx(plain["norms"], rel=0.1)

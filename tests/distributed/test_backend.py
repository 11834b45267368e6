"""Real DeepSpeed engines under ZeRO 0 to 3, on one rank and on two: the same batch must give the same training.

The functions named `..._on_every_rank` run on the ranks and print one JSON line; the tests compare worlds.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import run_ranks

HERE = "tests.distributed.test_backend"
STEPS, QUERIES, LR = 3, 8, 1e-3


# --- on the ranks ----------------------------------------------------------------------------------------------------


@cache
def loaded(folder: Path) -> Any:
    """Return the model as it lies on disk, read once for the forty engines that begin from it."""
    from engine.models.retriever import Retriever

    return Retriever.load(str(folder), pooling="cls", similarity="dot", tied=True, dropout=0.0)


def make_engine(stage: int, folder: Path, precision: Any = "fp32", *, looks_once: bool = False) -> Any:
    from engine.config.models import RetrieverConfig
    from engine.config.training import OptimConfig
    from engine.training.backend import TrainedModel
    from engine.training.gradient_norm import look_once

    model = copy.deepcopy(loaded(folder))
    optim = OptimConfig(lr=LR, eps=1e-3)  # a large eps keeps Adam from blowing rounding up to the size of a step
    engine = TrainedModel(
        "retriever", model, RetrieverConfig(name="tiny", zero_stage=stage, precision=precision), optim
    )
    if looks_once:  # as on a GPU
        look_once(engine._engine.optimizer)
    engine.begin_stage(optim)
    engine.train()
    return engine


def contrastive_steps(
    engine: Any, num_chunks: int, num_queries: int = QUERIES, num_steps: int = STEPS
) -> tuple[list[float], list[float]]:
    import torch
    import torch.distributed as dist

    from engine.losses import contrastive
    from engine.metrics import Metric
    from engine.objectives import gather_documents
    from engine.training.gradient_cache import contrastive_backward

    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(5, 20, (num_queries, 6), generator=generator)
    documents = torch.randint(5, 20, (2 * num_queries, 9), generator=generator)
    own = num_queries // world_size
    size = own // num_chunks

    def batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def loss_of(queries_BD: torch.Tensor, documents_ND: torch.Tensor) -> tuple[torch.Tensor, dict[str, Metric]]:
        targets = 2 * (torch.arange(own) + rank * own)
        loss = contrastive(queries_BD @ gather_documents(documents_ND).T, targets)
        return loss, {"loss": Metric(loss.detach())}

    starts = range(rank * own, (rank + 1) * own, size)
    chunks = [
        {"queries": batch(queries[at : at + size]), "documents": batch(documents[2 * at : 2 * (at + size)])}
        for at in starts
    ]
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(num_steps):
        loss = torch.as_tensor(float(contrastive_backward(engine, chunks, loss_of, range(len(chunks)))["loss"].value))
        dist.all_reduce(loss)
        losses.append(float(loss) / world_size)
        norm = engine.step(LR).grad_norm
        assert norm is not None, "fp16's scaler skipped the step"
        norms.append(norm)
    return losses, norms


def matrix_on_every_rank() -> None:
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    folder, results = Path(os.environ["TEST_MODEL"]), {}
    for stage in range(4):
        for num_chunks in (1, 4):
            engine = make_engine(stage, folder)
            losses, norms = contrastive_steps(engine, num_chunks)
            state = engine.full_state_dict()
            name = f"{stage}/{num_chunks}"
            weights = state["towers.shared.encoder.layer.0.attention.self.query.weight"].flatten() if state else None
            results[name] = {"losses": losses, "norms": norms, "weights": weights[:8].tolist() if state else None}
            if num_chunks == 1:
                results[f"{stage}/offloaded"] = offloaded(stage, folder)
                results[f"{stage}/restarted"] = restarted(stage, folder)
                results[f"{stage}/bad"] = [bad_gradient(stage, folder, precision) for precision in ("fp32", "bf16")]
                if stage in (1, 2):
                    once = make_engine(stage, folder, looks_once=True)
                    results[f"{stage}/once"] = contrastive_steps(once, 1)
                    results[f"{stage}/bad"] += [
                        bad_gradient(stage, folder, precision, looks_once=True) for precision in ("fp32", "bf16")
                    ]
                results[f"{stage}/resumed"] = resumed(world, engine, stage, folder, state)
    results["compiler"] = "torch._inductor.compile_fx" in sys.modules
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def offloaded(stage: int, folder: Path) -> bool:
    """Move an engine away and back between its steps: does it train as if nothing had happened?"""
    import torch

    moved, still = make_engine(stage, folder), make_engine(stage, folder)
    for engine in (moved, still):
        contrastive_steps(engine, 1)
    moved.offload()
    moved.offload()  # harmless
    moved.reload()
    for engine in (moved, still):
        contrastive_steps(engine, 1)
    one, other = moved.full_state_dict(), still.full_state_dict()
    pairs = zip(moved.own_fragments(), still.own_fragments(), strict=True)  # what a checkpoint would hold
    return all(torch.equal(one[name], other[name]) for name in one) and all(
        torch.equal(mine.parts_F[part], theirs.parts_F[part]) for mine, theirs in pairs for part in mine.parts_F
    )


def restarted(stage: int, folder: Path) -> bool:
    """Train, go back to the weights of the beginning, train again: is it the training of a new engine?"""
    import torch

    again, fresh = make_engine(stage, folder), make_engine(stage, folder)
    contrastive_steps(again, 1)
    again.load_weights(loaded(folder).state_dict())
    for engine in (again, fresh):
        contrastive_steps(engine, 1)
    one, other = again.full_state_dict(), fresh.full_state_dict()
    return all(torch.equal(one[name], other[name]) for name in other)


def bad_gradient(stage: int, folder: Path, precision: str, *, looks_once: bool = False) -> list[bool]:
    """Give the last rank alone a gradient of NaN: are all ranks told, with the weights as they were?"""
    import torch
    import torch.distributed as dist

    from engine.errors import TrainingError

    engine = make_engine(stage, folder, precision, looks_once=looks_once)
    contrastive_steps(engine, 1, num_steps=1)
    before = engine.full_state_dict()
    ids = {name: torch.ones(2, 6, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    bad = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    queries_BD, documents_ND = engine(queries=ids, documents=ids)
    engine.backward((queries_BD + documents_ND).sum() * bad, last=True)
    try:
        engine.step(LR)
        told = False
    except TrainingError as error:
        told = "the retriever's gradient is not finite" in str(error)
    after = engine.full_state_dict()
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, told)
    return [all(ranks), all(torch.equal(before[name], after[name]) for name in before)]


def resumed(world: Any, engine: Any, stage: int, folder: Path, state: dict[str, Any]) -> bool:
    """Checkpoint, load into a fresh engine, train both on: are they bit-equal?"""
    import torch

    from engine.training.checkpoint import Checkpoints, Retention

    saved = Checkpoints(Path(os.environ["TEST_CHECKPOINTS"]) / f"{stage}", world.coordinator, Retention(1))
    saved.save(engine, "retriever/1", STEPS)
    contrastive_steps(engine, 1)
    undisturbed = engine.full_state_dict()
    fresh = make_engine(stage, folder)
    found = Checkpoints(Path(os.environ["TEST_CHECKPOINTS"]) / f"{stage}", world.coordinator, Retention(1))
    position = found.restore(fresh)
    assert position is not None
    assert (position.stage, position.step) == ("retriever/1", STEPS)
    loaded = fresh.full_state_dict()
    contrastive_steps(fresh, 1)
    ended = fresh.full_state_dict()
    return all(torch.equal(loaded[name], state[name]) for name in state) and all(
        torch.equal(ended[name], undisturbed[name]) for name in undisturbed
    )


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    from engine.models.random import make_random_model

    model = make_random_model(tmp_path_factory.mktemp("model"), ["some words for a small vocabulary"] * 4)
    results = {}
    for world_size in (1, 2):
        env = {"TEST_MODEL": str(model), "TEST_CHECKPOINTS": str(tmp_path_factory.mktemp(f"world{world_size}"))}
        ranks = run_ranks(f"{HERE}:matrix_on_every_rank", world_size, "store", timeout=240, env=env)
        for result in ranks:
            assert result.returncode == 0, result.stderr
        results[world_size] = json.loads(ranks[0].stdout.strip().splitlines()[-1])
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_every_stage_and_chunking_gives_the_training_of_the_plain_large_batch(
    worlds: dict[int, dict[str, Any]], world_size: int, stage: int, num_chunks: int
) -> None:
    plain, other = worlds[1]["0/1"], worlds[world_size][f"{stage}/{num_chunks}"]
    assert other["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert other["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert other["weights"] == pytest.approx(plain["weights"], abs=1e-5)


def test_the_training_moves_the_weights(worlds: dict[int, dict[str, Any]]) -> None:
    losses = worlds[1]["0/1"]["losses"]
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_goes_on_bit_equal(worlds: dict[int, dict[str, Any]], world_size: int, stage: int) -> None:
    assert worlds[world_size][f"{stage}/resumed"] is True


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_an_engine_that_was_offloaded_trains_on_bit_equal(
    worlds: dict[int, dict[str, Any]], world_size: int, stage: int
) -> None:
    """Symptom: under ZeRO-3 DeepSpeed refuses to offload the states of an optimizer that is not its own."""
    assert worlds[world_size][f"{stage}/offloaded"] is True


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_an_engine_that_begins_again_trains_like_a_new_one(
    worlds: dict[int, dict[str, Any]], world_size: int, stage: int
) -> None:
    """A retriever's second stage begins from the pre-trained weights, in the engine of the first."""
    assert worlds[world_size][f"{stage}/restarted"] is True


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_on_one_rank_is_an_error_on_all(
    worlds: dict[int, dict[str, Any]], world_size: int, stage: int
) -> None:
    """Symptom (DeepSpeed): bf16 skips the step without a word, and fp32 without ZeRO fills the weights with NaN."""
    found = worlds[world_size][f"{stage}/bad"]
    assert found == [[True, True]] * (4 if stage in (1, 2) else 2)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_norms_found_at_once_are_deepspeeds(worlds: dict[int, dict[str, Any]], world_size: int, stage: int) -> None:
    plain = worlds[world_size][f"{stage}/1"]
    losses, norms = worlds[world_size][f"{stage}/once"]
    assert losses == pytest.approx(plain["losses"], abs=2e-5)
    assert norms == pytest.approx(plain["norms"], rel=1e-5)


def test_an_engine_does_without_torchs_compiler(worlds: dict[int, dict[str, Any]]) -> None:
    """Symptom: each rank imported it for Muon, an optimizer that nobody asked for, and began seconds later."""
    assert [worlds[world_size]["compiler"] for world_size in (1, 2)] == [False, False]

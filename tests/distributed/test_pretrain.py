"""Pre-training under ZeRO 0 to 3, on one rank and on two: equal losses, and after a kill equal weights.

`train_on_every_rank` runs on the ranks and prints one JSON line; the tests compare worlds and stages.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.models.random import make_random_model
from tests.distributed.processes import RankResult, run_ranks

HERE = "tests.distributed.test_pretrain"
STEPS, DOCUMENTS, LR = 4, 12, 1e-2
PARTS = {"edmlm": "decoder.", "ict": "towers.", "cocondenser": "decoder."}
"""Recipes, and how a part of what they train is named."""
STAGES = [
    *(("edmlm", stage) for stage in range(4)),
    *((recipe, stage) for recipe in ("ict", "cocondenser") for stage in (1, 2)),
]
"""On two ranks; gradients are cached under the others in tests/distributed/test_models.py."""
TEXTS = [" ".join(f"w{(7 * number + place) % 23}" for place in range(3 + 2 * number)) for number in range(DOCUMENTS)]


# --- on the ranks ----------------------------------------------------------------------------------------------------


class Written:
    """Stands for the shards: the tokens of a list of texts."""

    def __init__(self, tokenizer: Any) -> None:
        import numpy as np

        self._ids = [np.array(ids, dtype=np.uint32) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]

    def tokens(self, document: int, stream: str) -> Any:
        return self._ids[document]

    def num_tokens(self, document: int, stream: str) -> int:
        return len(self._ids[document])


def make_engine(recipe: str, stage: int, folder: Path) -> Any:
    from engine.config.models import BottleneckConfig, CondenserConfig, ModelConfig, RetrieverConfig
    from engine.config.training import OptimConfig
    from engine.models.kinds import load_untrained
    from engine.training.backend import TrainedModel

    # A large eps keeps Adam from blowing rounding up to the size of a step.
    optim = OptimConfig(lr=LR, eps=1e-3)
    settings: dict[str, Any] = {"name": "tiny", "zero_stage": stage, "dropout": 0.1}
    kinds: dict[str, type[ModelConfig]] = {
        "edmlm": BottleneckConfig,
        "ict": RetrieverConfig,
        "cocondenser": CondenserConfig,
    }
    if recipe == "cocondenser":
        settings["skip_from"] = 1
    section = kinds[recipe](**settings)
    engine = TrainedModel("model", load_untrained(section, str(folder), seed=1), section, optim)
    engine.begin_stage(optim)
    engine.train()
    return engine


def make_objective(recipe: str, folder: Path, module: Any, rank: int, world_size: int) -> Any:
    import numpy as np

    from engine.config.timetable import Phase
    from engine.config.training import OptimConfig
    from engine.models.loading import load_tokenizer
    from engine.models.template import InputTemplate
    from engine.pretrain.cloze import ClozeBuilder, ClozeRates
    from engine.pretrain.condensing import SpanContrast
    from engine.pretrain.contrast import ClozeContrast
    from engine.pretrain.documents import DocumentSamples, MaskedInputBuilder, ReadingSamples
    from engine.pretrain.masking import MaskRates
    from engine.pretrain.reconstruction import BottleneckReconstruction
    from engine.pretrain.spans import SpanBuilder, SpanRates

    tokenizer = load_tokenizer(str(folder))
    collate, shards = module.collator(InputTemplate.from_tokenizer(tokenizer)), Written(tokenizer)
    read: tuple[Any, ...] = (shards, "model", tokenizer, collate)
    pool: Any = "none" if recipe == "edmlm" else "world"
    phase = Phase(recipe, recipe, "model", STEPS, 8, 2, 0, OptimConfig(), ("",), 1, pool=pool)
    taken: tuple[Any, ...] = (phase.visits[0], 3, np.arange(DOCUMENTS), [], rank, world_size)
    if recipe == "ict":
        clozes = ClozeBuilder(*read, ClozeRates(0.1, 3), max_length=24, query_max_length=12, seed=3)
        return ClozeContrast(ReadingSamples(*taken), clozes, score_scale=0.1)
    if recipe == "cocondenser":
        spans = SpanBuilder(*read, SpanRates(0.3, 2), max_length=16, document_length=64, seed=3)
        return SpanContrast(ReadingSamples(*taken), spans, score_scale=0.1)
    builder = MaskedInputBuilder(*read, MaskRates(0.3, 0.5), max_length=24, seed=3)
    return BottleneckReconstruction(DocumentSamples(*taken), builder)


def train_steps(engine: Any, objective: Any, steps: range) -> list[list[float]]:
    """Return each step's loss over all ranks and its gradient's norm."""
    import torch
    import torch.distributed as dist

    found = []
    for step in steps:
        loss = torch.as_tensor(float(objective.backward(engine, objective.prepare(step))["loss"].value))
        dist.all_reduce(loss)
        found.append([float(loss) / dist.get_world_size(), float(engine.step(LR).grad_norm)])
    return found


def train_on_every_rank() -> None:
    import torch
    import torch.distributed as dist

    from engine.training.checkpoint import Checkpoints, Retention
    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    folder, results = Path(os.environ["TEST_MODEL"]), {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for recipe, stage in STAGES if world_size > 1 else [(recipe, 0) for recipe in PARTS]:
        whole = make_engine(recipe, stage, folder)
        objective = make_objective(recipe, folder, whole.module, rank, world_size)
        steps = train_steps(whole, objective, range(STEPS))
        expected = whole.full_state_dict()

        place = Path(os.environ["TEST_FOLDER"]) / f"{recipe}-{world_size}-{stage}"
        place.mkdir(parents=True, exist_ok=True)
        killed = make_engine(recipe, stage, folder)
        train_steps(killed, objective, range(2))
        Checkpoints(place, world.coordinator, Retention(1)).save(killed, f"{recipe}/1", 2)
        again = make_engine(recipe, stage, folder)
        position = Checkpoints(place, world.coordinator, Retention(1)).restore(again)
        resumed = train_steps(again, objective, range(position.step if position else 0, STEPS))
        found = again.full_state_dict()
        equal = all(torch.equal(found[name], weight) for name, weight in expected.items())
        results[f"{recipe}-{stage}"] = {"steps": steps, "equal": equal, "resumed": resumed, "names": sorted(expected)}
    if rank == 0:
        print(json.dumps(results))
    world.close()


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """World size -> stage -> what was trained."""
    folder = tmp_path_factory.mktemp("pretrain")
    env = {"TEST_MODEL": str(make_random_model(folder / "model", TEXTS)), "TEST_FOLDER": str(folder / "checkpoints")}
    return {size: results_of(run_ranks(f"{HERE}:train_on_every_rank", size, env=env, timeout=240)) for size in (1, 2)}


def results_of(ranks: list[RankResult]) -> dict[str, Any]:
    assert all(rank.returncode == 0 for rank in ranks), ranks[-1].stderr[-3000:] + ranks[0].stderr[-3000:]
    found: dict[str, Any] = json.loads(ranks[0].stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("recipe", "stage"), STAGES)
def test_one_rank_and_two_train_alike_under_every_stage(
    worlds: dict[int, dict[str, Any]], recipe: str, stage: int
) -> None:
    """The loss is the mean over the whole batch, so neither the ranks nor the stage change it; dropout is on."""
    expected = worlds[1][f"{recipe}-0"]["steps"]
    assert expected[-1][0] < expected[0][0]
    assert worlds[2][f"{recipe}-{stage}"]["steps"] == [pytest.approx(step, rel=2e-4) for step in expected]


@pytest.mark.parametrize(
    ("size", "recipe", "stage"), [*((1, recipe, 0) for recipe in PARTS), *((2, *one) for one in STAGES)]
)
def test_what_was_killed_goes_on_bit_equal(
    worlds: dict[int, dict[str, Any]], size: int, recipe: str, stage: int
) -> None:
    found = worlds[size][f"{recipe}-{stage}"]
    assert found["resumed"] == found["steps"][2:]
    assert found["equal"]
    assert any(name.startswith(PARTS[recipe]) for name in found["names"])

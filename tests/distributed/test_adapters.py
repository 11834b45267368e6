"""Adapters under ZeRO 0 to 3 on two ranks: they train as plain torch trains them, nothing else moves or is kept in a
checkpoint, and what is published, merged and apart, gives the scores of the model in training.

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

HERE = "tests.distributed.test_adapters"
STEPS, LR, RANKS = 2, 1e-2, 2
WAYS = [(0, False), (1, True), (2, False), (3, True)]
"""ZeRO stage, and whether activations are recomputed."""
WORDS = "<|im_start|>{query}\n{document}<|im_end|>\n"
PAIRS = [("the retriever", "a query"), ("the ranker", "a document"), ("lists", "tuples and lists"), ("both", "them")]


def section_of(stage: int, recomputes: bool = False) -> Any:
    from engine.config.models import RankerConfig

    return RankerConfig(
        name=os.environ["TEST_MODEL"],
        head="yes_no",
        pair_template=WORDS,
        max_length=37,
        dropout=0.0,
        zero_stage=stage,
        gradient_checkpointing=recomputes,
        lora={"r": 3, "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        deepspeed=os.environ.get("TEST_ZERO3") if stage == 3 else None,
    )


def load(stage: int = 0, recomputes: bool = False) -> Any:
    from engine.models.kinds import load_untrained

    section = section_of(stage, recomputes)
    return load_untrained(section, section.name, seed=3, name="ranker")


def inputs_of(model: Any, rank: int) -> Any:
    from engine.models.loading import load_tokenizer
    from engine.models.template import InputTemplate

    tokenizer = load_tokenizer(os.environ["TEST_MODEL"])
    template = InputTemplate.from_tokenizer(tokenizer, pair_words=WORDS)
    pairs = [
        template.pair(
            template.queries.token_ids(tokenizer, [query])[0],
            template.documents.token_ids(tokenizer, [document])[0],
            37,
        )
        for query, _ in PAIRS[2 * rank : 2 * rank + 2]
        for _, document in PAIRS
    ]
    return model.collator(template)(pairs)


def loss_of(scores_N: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(scores_N.view(2, 4), torch.tensor([0, 1]) + 2 * rank)


# --- on the ranks ----------------------------------------------------------------------------------------------------


def ways_on_every_rank() -> None:
    import torch.distributed as dist

    from engine.training.checkpoint import Checkpoints, Retention
    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    folder = Path(os.environ["TEST_SHARED"])
    results: dict[str, Any] = {}
    for stage, recomputes in WAYS:
        engine = make_engine(stage, recomputes)
        if stage == 1:
            result = train(engine)
            Checkpoints(folder, world.coordinator, Retention(2)).save(engine, "ranker/1", STEPS)
            results["undisturbed"] = train(engine)
            state = engine.full_state_dict()
            if dist.get_rank() == 0:
                results |= published(engine, state, Path(os.environ["TEST_PUBLISHED"]))
        else:
            result = train(engine)
        results[str((stage, recomputes))] = result
    for stage in (3, 0):
        engine = make_engine(stage, False)
        Checkpoints(folder, world.coordinator, Retention(2)).restore(engine)
        results[f"resumed/{stage}"] = train(engine)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def make_engine(stage: int, recomputes: bool) -> Any:
    from engine.config.training import OptimConfig
    from engine.training.backend import TrainedModel

    return TrainedModel("ranker", load(stage, recomputes), section_of(stage, recomputes), OptimConfig(lr=LR, eps=1e-3))


def train(engine: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from engine.config.training import OptimConfig

    engine.begin_stage(OptimConfig(lr=LR, eps=1e-3, max_grad_norm=1e3))
    engine.train()
    rank, losses = dist.get_rank(), []
    for _ in range(STEPS):
        loss = loss_of(engine(pairs=inputs_of(engine.module, rank)), rank)
        engine.backward(loss, last=True)
        engine.step(LR)
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(float(mean) / RANKS)
    return {"losses": losses, "trained": sorted(engine.parameter_sizes())}


def published(engine: Any, state: Any, target: Path) -> dict[str, Any]:
    """Save and export the model, and score by it in training, as published, as exported and by peft."""
    import peft
    import transformers

    from engine.models.adapters import read_adapters
    from engine.models.export import export_ranker
    from engine.models.kinds import parts_of
    from engine.models.loading import load_tokenizer
    from engine.models.ranker import Ranker

    target.mkdir()
    tokenizer = load_tokenizer(os.environ["TEST_MODEL"])
    told = {"max_length": 37, "query_max_length": 16, "pair_template": WORDS}
    engine.module.save(target / "weights", tokenizer, state_dict=state, metadata=told)
    difference = export_ranker(target / "weights", target / "export")
    batch = inputs_of(engine.module, 0)
    with torch.no_grad():
        ours = engine.module.eval()(batch).tolist()
        merged = Ranker.open(target / "weights")(batch).tolist()
        plain = load()
        base = transformers.AutoModelForCausalLM.from_pretrained(os.environ["TEST_MODEL"])
        adapted = peft.PeftModel.from_pretrained(base, str(target / "export" / "adapter")).merge_and_unload()
        weights = transformers.AutoModelForCausalLM.from_pretrained(target / "export").state_dict()
        read = read_adapters(parts_of(plain), target / "weights")
    apart = max(float((weights[key] - tensor).abs().max()) for key, tensor in adapted.state_dict().items())
    return {
        "difference": difference,
        "scores": [ours, merged],
        "apart": apart,
        "read alike": all(torch.equal(read[key], state[key]) for key in engine.parameter_sizes()),
        "frozen": all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items() if key in state
                      and "lora" not in key),
    }  # fmt: skip


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.distributed.tiny_architectures import make

    base = tmp_path_factory.mktemp("adapters")
    zero3 = json.loads(Path("configs/deepspeed/zero3.json").read_text())
    # Or so small a model would neither be partitioned nor given up between its forward and its backward pass.
    kept = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    zero3["zero_optimization"] |= dict.fromkeys(kept, 0)
    (base / "zero3.json").write_text(json.dumps(zero3))
    env = {
        "TEST_MODEL": str(make("qwen3", base / "model")),
        "TEST_SHARED": str(base / "shared"),
        "TEST_PUBLISHED": str(base / "published"),
        "TEST_ZERO3": str(base / "zero3.json"),
    }
    ranks = run_ranks(f"{HERE}:ways_on_every_rank", RANKS, "store", timeout=240, env=env)
    for result in ranks:
        assert result.returncode == 0, result.stderr
    os.environ.update(env)
    return dict(json.loads(ranks[0].stdout.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def plain(found: dict[str, Any]) -> list[float]:
    """Train by torch alone, on both ranks' pairs together."""
    model = load().train()
    adamw = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=LR, eps=1e-3, weight_decay=0)
    losses = []
    for _ in range(2 * STEPS):
        loss = torch.stack([loss_of(model(inputs_of(model, rank)), rank) for rank in range(RANKS)]).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_stage_trains_the_adapters_alone(
    found: dict[str, Any], plain: list[float], way: tuple[int, bool]
) -> None:
    result = found[str(way)]
    assert result["losses"] == pytest.approx(plain[:STEPS], abs=2e-5)
    assert plain[-1] < plain[0] - 0.01
    assert len(result["trained"]) == 2 * 2 * 3
    assert all(".lora_" in name for name in result["trained"])


@pytest.mark.parametrize("stage", [3, 0])
def test_a_checkpoint_goes_on_under_any_stage(found: dict[str, Any], plain: list[float], stage: int) -> None:
    assert found["undisturbed"]["losses"] == pytest.approx(plain[STEPS:], abs=2e-5)
    assert found[f"resumed/{stage}"]["losses"] == pytest.approx(found["undisturbed"]["losses"], abs=2e-5)


def test_what_is_published_scores_as_the_model_in_training(found: dict[str, Any]) -> None:
    ours, merged = found["scores"]
    assert merged == pytest.approx(ours, abs=1e-5)
    assert found["difference"] < 1e-5
    assert found["apart"] < 1e-6, "by peft, from the base and the adapters that lie beside the merged weights"
    assert found["read alike"]
    assert found["frozen"]

"""A lexical retriever in real engines: under ZeRO 0 to 3, on one rank and two, whole or cut, it trains the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed.processes import report, run_ranks

HERE = "tests.distributed.test_lexical"
STEPS, QUERIES, LR = 3, 8, 1e-3


# --- on the ranks ----------------------------------------------------------------------------------------------------


def steps_on_every_rank() -> None:
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    torch.set_num_threads(1)
    results = {}
    for stage, num_chunks in ((0, 1), (0, 4), (1, 1), (2, 4), (3, 4)):
        for pool in ("world", "rank") if (stage, num_chunks) == (0, 4) else ("world",):
            results[f"{stage}/{num_chunks}/{pool}"] = trained(stage, num_chunks, pool)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    world.close()


def trained(stage: int, num_chunks: int, pool: str) -> dict[str, Any]:
    """Take steps of the objective on batches of which every rank takes its share."""
    import torch
    import torch.distributed as dist

    from engine.config.lexical import FlopsConfig
    from engine.config.models import LexicalConfig
    from engine.config.training import OptimConfig
    from engine.models.lexical import Lexical
    from engine.objectives.lexical import LexicalContrast
    from engine.training.backend import TrainedModel

    section = LexicalConfig(name="tiny", zero_stage=stage)  # type: ignore[arg-type]
    optim = OptimConfig(lr=LR, eps=1e-3)  # a large eps keeps Adam from blowing rounding up to the size of a step
    engine = TrainedModel("lexical", Lexical.load(os.environ["TEST_MODEL"], dropout=0.0), section, optim)
    engine.begin_stage(optim)
    engine.train()
    samples: Any = SimpleNamespace(visit=SimpleNamespace(phase=SimpleNamespace(pool=pool)))
    builder: Any = SimpleNamespace(tokens_of_texts=None)
    penalty = FlopsConfig(query_flops=0.3, document_flops=0.2, flops_steps=STEPS)
    objective = LexicalContrast(samples, builder, score_scale=0.1, penalty=penalty)
    sums: dict[str, list[float]] = {}
    norms = []
    for step in range(STEPS):
        metrics = objective.backward(engine, share_of_batch(step, num_chunks, pool))
        values = torch.tensor([float(metrics[name].value) for name in sorted(metrics)], dtype=torch.float64)
        dist.all_reduce(values)
        for name, value in zip(sorted(metrics), values.tolist(), strict=True):
            sums.setdefault(name, []).append(value / dist.get_world_size())
        norms.append(engine.step(LR).grad_norm)
    state = engine.full_state_dict()
    names = ("towers.shared.bert.embeddings.word_embeddings.weight", "towers.shared.cls.predictions.bias")
    weights = {name: state[name].flatten()[-40:].tolist() for name in names} if state else {}
    return {"metrics": sums, "norms": norms, "weights": weights, "saved": saved(engine, state)}


def share_of_batch(step: int, num_chunks: int, pool: str) -> Any:
    """Make a step's batch of texts of several lengths, packed, and this rank's part of it."""
    import torch
    import torch.distributed as dist

    from engine.data.batches import MicroBatch
    from engine.models.batch import pack
    from engine.objectives import PooledBatch, inputs_of

    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 12, (3 * QUERIES,), generator=generator).tolist()
    texts = [torch.randint(5, 30, (length,), generator=generator).tolist() for length in lengths]
    queries, documents = texts[:QUERIES], texts[QUERIES:]

    def packed(some: list[list[int]]) -> Any:
        return pack(some, [[0] * len(text) for text in some], 0)

    own, size = QUERIES // world_size, QUERIES // world_size // num_chunks
    chunks = [
        inputs_of(
            MicroBatch([], last=False, share=1 / num_chunks, seed=0),
            queries=packed(queries[at : at + size]),
            documents=packed(documents[2 * at : 2 * (at + size)]),
        )
        for at in range(rank * own, (rank + 1) * own, size)
    ]
    shared = pool == "world"
    targets_B = 2 * (torch.arange(own) + (rank * own if shared else 0))
    excluded_BP = torch.zeros(own, 2 * (QUERIES if shared else own), dtype=torch.bool)
    return PooledBatch(chunks, targets_B, excluded_BP, step)


def saved(engine: Any, state: dict[str, Any]) -> bool:
    """Save what was gathered, and open it: are these the weights, and the head tied to the embeddings?"""
    import tempfile

    import torch

    from engine.models.lexical import Lexical
    from engine.models.loading import load_tokenizer

    if not state:
        return True
    with tempfile.TemporaryDirectory() as folder:
        engine.module.save(Path(folder), load_tokenizer(os.environ["TEST_MODEL"]), state_dict=state)
        again = Lexical.open(Path(folder))
    head = again.towers["shared"].get_output_embeddings().weight
    embeddings = state["towers.shared.bert.embeddings.word_embeddings.weight"]
    return torch.equal(head, embeddings) and all(
        torch.equal(parameter, state[name]) for name, parameter in again.named_parameters()
    )


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    from engine.models.random import make_random_model

    model = make_random_model(tmp_path_factory.mktemp("model"), ["some words for a small vocabulary"] * 4)
    results = {}
    for world_size in (1, 2):
        ranks = run_ranks(
            f"{HERE}:steps_on_every_rank", world_size, "store", timeout=180, env={"TEST_MODEL": str(model)}
        )
        assert all(rank.returncode == 0 for rank in ranks), report(ranks)
        results[world_size] = json.loads(ranks[0].stdout.strip().splitlines()[-1])
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("way", ["0/1", "0/4", "1/1", "2/4", "3/4"])
def test_every_stage_and_cut_gives_the_training_of_the_plain_large_batch(
    worlds: dict[int, dict[str, Any]], world_size: int, way: str
) -> None:
    plain, other = worlds[1]["0/1/world"], worlds[world_size][f"{way}/world"]
    assert other["metrics"].keys() == plain["metrics"].keys()
    for name, values in plain["metrics"].items():
        per_rank = values if name != "tokens" else [value / world_size for value in values]
        assert other["metrics"][name] == pytest.approx(per_rank, rel=1e-4, abs=2e-5), name
    assert other["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    for name, weights in plain["weights"].items():
        assert other["weights"][name] == pytest.approx(weights, abs=1e-5), name
    assert other["saved"] is True


def test_the_penalty_rises_and_moves_the_weights(worlds: dict[int, dict[str, Any]]) -> None:
    metrics = worlds[1]["0/1/world"]["metrics"]
    rises = [
        (loss - contrast) / (0.3 * query + 0.2 * document)
        for loss, contrast, query, document in zip(
            *(metrics[name] for name in ("loss", "contrastive", "flops_query", "flops_document")), strict=True
        )
    ]
    assert rises == pytest.approx([1 / 9, 4 / 9, 1.0], rel=1e-4)


def test_the_penalty_is_of_all_ranks_texts_where_each_rank_has_its_own_pool(worlds: dict[int, dict[str, Any]]) -> None:
    """The first step's: the same weights and the same texts, however they are shared."""
    one, two = (worlds[world_size]["0/4/rank"]["metrics"] for world_size in (1, 2))
    for name in ("flops_query", "flops_document", "query_terms", "document_terms"):
        assert two[name][0] == pytest.approx(one[name][0], rel=1e-5), name
    assert two["contrastive"][0] < one["contrastive"][0] - 0.1  # half as many negatives

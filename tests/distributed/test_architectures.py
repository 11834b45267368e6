"""Each architecture goes the whole way: proved, trained, resumed, published, exported, and read by other libraries.

The function named `..._on_every_rank` runs on the rank and prints one JSON line: one process serves all tests here.
"""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT, report, run_ranks
from tests.distributed.tiny_architectures import ARCHITECTURES, LONGEST, TEXTS

HERE = "tests.distributed.test_architectures"
KINDS = ("retriever", "ranker")
LR = 1e-3


# --- on the rank -----------------------------------------------------------------------------------------------------


def matrix_on_every_rank() -> None:
    import torch

    from launcher.world.opening import open_world

    torch.set_num_threads(1)
    world = open_world(device="cpu")
    results: dict[str, Any] = {}
    for name in ARCHITECTURES:
        try:
            results[name] = whole_way(name, Path(os.environ["TEST_FOLDER"]), world)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    print(json.dumps(results))
    world.close()


def whole_way(name: str, folder: Path, world: Any) -> dict[str, Any]:
    """Train both models of an architecture for two steps, once without a break and once resumed between them."""
    import torch
    import yaml

    from engine.config.ar2 import Ar2Recipe
    from engine.data.corpus import model_texts
    from engine.models.export import export_model
    from engine.models.weights import frozen_ranker, frozen_retriever
    from engine.run import Run
    from engine.training.models import Models
    from engine.training.publishing import publish_weights
    from launcher.recipe import load_models, try_models
    from tests.distributed.tiny_architectures import make

    source = str(make(name, folder / name))
    tree = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    tree["run"]["path"] = str(folder / f"{name}-run")
    one = ARCHITECTURES[name]
    both = {"name": source, "max_length": LONGEST, "attention": one.attention, "dropout": 0.0}
    own = {"query_max_length": 16, "similarity": "cosine", "pooling": one.pooling}
    tree["retriever"] = {**both, **own, "zero_stage": 1}
    tree["ranker"] = {**both, **one.ranker, "zero_stage": 2}
    config = Ar2Recipe.model_validate(tree)
    run = Run.open(config, world.coordinator, world.device)
    texts = model_texts(config, dict.fromkeys(KINDS, source))
    results: dict[str, Any] = {kind: {} for kind in KINDS}

    modules = load_models(config, dict.fromkeys(KINDS, source))
    try_models(config, modules, texts, world.device)
    for kind, module in modules.items():
        results[kind]["same in training"] = is_same_in_training(kind, module, texts[kind])
    models = Models.open(run, modules)
    for kind in KINDS:
        with models.training(kind) as engine:
            results[kind]["losses"] = [step(kind, engine, texts[kind])]
            models.checkpoints[kind].save(engine, "phase", 1)
            results[kind]["losses"].append(step(kind, engine, texts[kind]))
            publish_weights(run, engine, texts[kind], "000")
    again = Models.open(run, load_models(config, dict.fromkeys(KINDS, source)))
    for kind in KINDS:
        with again.training(kind) as engine:
            step(kind, engine, texts[kind])
            twin = engine.full_state_dict()
        state = models.engines[kind].full_state_dict()
        results[kind]["resumed alike"] = all(torch.equal(state[key], twin[key]) for key in state)
        weights = run.folder.weights(kind, "000")
        results[kind]["difference"] = export_model(weights, run.folder.export(kind))
        frozen: Any = (frozen_retriever if kind == "retriever" else frozen_ranker)(
            config.models[kind], weights, run.device
        )
        ours, theirs = scores(kind, frozen, texts[kind]), scores_elsewhere(kind, run.folder.export(kind))
        results[kind] |= {"ours": ours.tolist(), "theirs": theirs.tolist()}
    return results


def step(kind: str, engine: Any, text: Any) -> float:
    """Take one optimizer step."""
    import torch

    from engine.config.training import OptimConfig

    engine.begin_stage(OptimConfig(lr=LR))
    engine.train()
    scores_BN = scores(kind, engine, text) if kind == "retriever" else scores(kind, engine, text).view(len(TEXTS), -1)
    loss = torch.nn.functional.cross_entropy(5 * scores_BN, torch.arange(len(TEXTS)))
    engine.backward(loss, last=True)
    engine.step(LR)
    return float(loss.detach())


def scores(kind: str, model: Any, text: Any) -> Any:
    """Score each text's beginning as a query against all of them, by an engine or by a plain model."""
    module = getattr(model, "module", model)
    collate, template = module.collator(text.template), text.template
    documents = template.documents.token_ids(text.tokenizer, TEXTS)
    queries = template.queries.token_ids(text.tokenizer, [query_of(one) for one in TEXTS])
    if kind == "retriever":
        queries_BD, documents_ND = model(
            queries=collate([template.single(ids, LONGEST) for ids in queries]),
            documents=collate([template.single(ids, LONGEST) for ids in documents]),
        )
        return queries_BD @ documents_ND.T
    pairs = [template.pair(query, document, LONGEST) for query in queries for document in documents]
    return model(pairs=collate(pairs))


def scores_elsewhere(kind: str, folder: Path) -> Any:
    """Give the same scores by sentence-transformers, from an export."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    options: dict[str, Any] = {"device": "cpu", "local_files_only": True}
    queries = [query_of(one) for one in TEXTS]
    if kind == "retriever":
        model = SentenceTransformer(str(folder), **options)
        return model.similarity(model.encode_query(queries), model.encode_document(list(TEXTS)))
    pairs = [(query, document) for query in queries for document in TEXTS]
    return CrossEncoder(str(folder), **options).predict(pairs)


def query_of(text: str) -> str:
    return " ".join(text.split()[:3])


def is_same_in_training(kind: str, module: Any, text: Any) -> bool:
    """Tell whether dropout 0 has reached every part: whether training mode changes nothing."""
    import torch

    with torch.no_grad():
        still = scores(kind, module.eval(), text)
        return all(torch.equal(still, scores(kind, module.train(), text)) for _ in range(2))


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("architectures")
    ranks = run_ranks(f"{HERE}:matrix_on_every_rank", 1, "store", timeout=600, env={"TEST_FOLDER": str(folder)})
    assert ranks[0].returncode == 0, report(ranks)
    return dict(json.loads(ranks[0].stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_goes_the_whole_way(matrix: dict[str, Any], name: str, kind: str) -> None:
    """Symptoms, one an architecture: segment ids that it has no table for, positions counted from elsewhere, weights
    under other names, an attention that the export did not know of, a dropout that a head kept."""
    assert "failed" not in matrix[name], matrix[name]["failed"]
    found = matrix[name][kind]
    assert found["same in training"], "dropout 0 did not reach every part"
    assert found["losses"][1] < found["losses"][0]
    assert found["resumed alike"]
    assert found["difference"] <= 1e-4
    if kind == "retriever":
        for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)
    else:
        assert found["theirs"] == pytest.approx(found["ours"], abs=1e-4)
    assert max(map(str, found["ours"])) != min(map(str, found["ours"])), "all scores are alike"

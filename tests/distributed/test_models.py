"""Models go by name, any number of them: a third one is trained, kept and resumed like the others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.phases import Trained
from tests.distributed.processes import ROOT, report, run_ranks

HERE = "tests.distributed.test_models"
TINY = ROOT / "configs" / "tiny.yaml"


# --- on the ranks ----------------------------------------------------------------------------------------------------


def three_models_on_every_rank() -> None:
    """A recipe with a student beside retriever and ranker, which reads text with a tokenizer of its own."""
    import torch
    import yaml

    from engine.config.models import RetrieverConfig
    from engine.config.recipe import Config
    from engine.config.timetable import Phase, Timetable
    from engine.config.training import OptimConfig
    from engine.data.corpus import model_texts, open_data, write_shards
    from engine.models.kinds import load_untrained
    from engine.models.random import make_random_model
    from engine.objectives import InBatchContrast
    from engine.phases import builder_of, train_visit
    from engine.refresh.refresh import bm25_candidates
    from engine.run import Run
    from engine.training.models import Models
    from launcher.world.opening import open_world
    from shards.formats import open_dataset
    from shards.made.generated import generate_dataset

    optim = OptimConfig(lr=1e-3)
    phase = Phase("student", "student", "student", 4, 8, 2, 1, optim, ("bm25",))

    class WithStudent(Config):
        student: RetrieverConfig

        @property
        def timetable(self) -> Timetable:
            table = super().timetable
            return Timetable(
                (*table.phases, phase), table.minings, table.iterations, table.in_each_iteration, True, False
            )

    torch.set_num_threads(1)
    folder = Path(os.environ["TEST_FOLDER"])
    world = open_world(device="cpu")
    tree = yaml.safe_load(TINY.read_text())
    tree["run"] |= {"path": str(folder / "run"), "checkpoint_every_steps": 2}
    tree["student"] = {"name": "random", "max_length": 24, "query_max_length": 16, "zero_stage": 2}
    run = Run.open(WithStudent.model_validate(tree), world.coordinator, world.device)

    def make() -> None:
        generate_dataset(folder / "data", num_documents=60, seed=1)
        texts = [document.text for document in open_dataset(folder / "data").documents()]
        make_random_model(folder / "large", texts, hidden_size=16, num_layers=1)
        make_random_model(folder / "small", texts[:9], hidden_size=16, num_layers=1, vocab_size=120)

    run.coordinator.only_rank_zero("make", make)
    dataset = open_dataset(folder / "data")
    sources = {"retriever": folder / "large", "ranker": folder / "large", "student": folder / "small"}
    texts = model_texts(run.config, sources)
    run.once("shards", write_shards, dataset, texts, run.folder)
    data = open_data(run.config, dataset, texts, run.folder)
    sections = run.config.models
    models = Models.open(
        run, {name: load_untrained(sections[name], str(path), seed=1) for name, path in sources.items()}
    )

    def train(stage: Any) -> Trained:
        bm25 = bm25_candidates(run, data)
        return train_visit(
            stage,
            models,
            data,
            bm25,
            lambda samples: InBatchContrast(samples, builder_of(stage, data, models, "student"), score_scale=1.0),
            phase.visit(0),
        )

    trained = run.once("student", train)
    again = Models.open(run, {"student": load_untrained(sections["student"], str(folder / "small"), seed=1)})
    found = {
        "streams": {name: text.stream for name, text in texts.items()},
        "steps": trained.steps,
        "finite": trained.loss is not None and trained.loss > 0,
        "weights": (run.folder.weights("student", "000") / "model.safetensors").exists(),
        "checkpoints": {name: kept.position and kept.position.number for name, kept in models.checkpoints.items()},
        "resumed": again.checkpoints["student"].position and again.checkpoints["student"].position.step,
    }
    print(json.dumps(found))
    world.close()


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_third_model_is_trained_like_the_others(tmp_path: Path, world_size: int) -> None:
    """Symptom: whatever was not the retriever was taken for the ranker, so a student had no place."""
    env = {"TEST_FOLDER": str(tmp_path)}
    ranks = run_ranks(f"{HERE}:three_models_on_every_rank", world_size, "store", timeout=180, env=env)
    assert all(rank.returncode == 0 for rank in ranks), report(ranks)
    found = json.loads(ranks[0].stdout.splitlines()[-1])
    assert found["streams"] == {"retriever": "retriever", "ranker": "retriever", "student": "student"}
    assert (found["steps"], found["finite"], found["weights"]) == (4, True, True)
    assert found["checkpoints"] == {"retriever": None, "ranker": None, "student": 2}
    assert found["resumed"] == 4

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
LIMIT = 2600
"""Bytes of a made-up device, of which 0.9 may be taken: 134 tokens at 10 bytes each, beside 1000."""


# --- on the ranks ----------------------------------------------------------------------------------------------------


def three_models_on_every_rank() -> None:
    from engine.training.models import Models
    from launcher.world.opening import open_world

    world = open_world(device="cpu")
    folder = Path(os.environ["TEST_FOLDER"])
    student = Student(world, folder, "run", lexical=os.environ["TEST_KIND"] == "lexical")
    trained = student.train()
    again = Models.open(student.run, {"student": student.load("student")})
    found = {
        "streams": {name: text.stream for name, text in student.texts.items()},
        "steps": trained.steps,
        "finite": trained.loss is not None and trained.loss > 0,
        "weights": (student.run.folder.weights("student", "000") / "model.safetensors").exists(),
        "checkpoints": {
            name: kept.position and kept.position.number for name, kept in student.models.checkpoints.items()
        },
        "resumed": again.checkpoints["student"].position and again.checkpoints["student"].position.step,
    }
    if student.run.is_main:
        from engine.models.export import export_model

        found["difference"] = export_model(student.run.folder.weights("student", "000"), folder / "exported")
    print(json.dumps(found))
    world.close()


def auto_on_every_rank() -> None:
    """Micro-batches of the size that trials found, and the same size as a number: on a device with made-up memory."""
    from engine.objectives.contrast import InBatchContrast
    from engine.training import micro_batches
    from launcher.world.opening import open_world

    prepare, largest = InBatchContrast.prepare, [0]

    class Made(micro_batches.DeviceMemory):
        """Takes 10 bytes for each token of the largest micro-batch, beside 1000."""

        def reachable(self) -> int:
            return LIMIT

        def forget(self) -> None:
            largest[0] = 0

        def measure(self) -> tuple[int, int]:
            return 1000 + 10 * largest[0], 900

    def watched(self: Any, step: int) -> Any:
        batch = prepare(self, step)
        largest[0] = max(largest[0], *(int(chunk.num_tokens) for chunk in batch.chunks))
        return batch

    InBatchContrast.prepare = watched  # type: ignore[method-assign]
    micro_batches.memory_of = Made
    micro_batches.FIRST_TOKENS = 60
    world = open_world(device="cpu")
    folder, results = Path(os.environ["TEST_FOLDER"]), {}
    for name, tokens in (("auto", "auto"), ("number", None)):
        student = Student(world, folder, name, tokens or results["auto"]["found"]["tokens"])
        trained = student.train()
        results[name] = {"sha256": trained.weights_sha256, "steps": trained.steps, "largest": largest[0]}
        if tokens:
            record = json.loads(student.run.folder.micro_batches.read_text())
            results[name]["found"] = record["phases"]["student"]
    print(json.dumps(results))
    world.close()


class Student:
    """A recipe with a student beside retriever and ranker, which reads text with a tokenizer of its own."""

    def __init__(
        self, world: Any, folder: Path, name: str, micro_batch_tokens: Any = None, *, lexical: bool = False
    ) -> None:
        import torch
        import yaml

        from engine.config.ar2 import Ar2Recipe
        from engine.config.models import LexicalConfig, RetrieverConfig
        from engine.config.timetable import Phase, Sizes, Timetable
        from engine.config.training import OptimConfig
        from engine.data.corpus import model_texts, open_data, write_shards
        from engine.models.random import make_random_model
        from engine.run import Run
        from engine.training.models import Models
        from shards.formats import open_dataset
        from shards.made.generated import generate_dataset

        optim = OptimConfig(lr=1e-3)
        self.phase = phase = Phase(
            "student", "student", "student", 4, 8, 2, 1, optim, ("bm25",), micro_batch_tokens=micro_batch_tokens
        )

        class WithStudent(Ar2Recipe):
            student: LexicalConfig if lexical else RetrieverConfig  # type: ignore[valid-type]

            def timetable_for(self, sizes: Sizes | None) -> Timetable:
                table = super().timetable_for(sizes)
                return Timetable(
                    (*table.phases, phase), table.minings, table.iterations, table.in_each_iteration, True, False
                )

        self.lexical = lexical
        torch.set_num_threads(1)
        tree = yaml.safe_load(TINY.read_text())
        tree["run"] |= {"path": str(folder / name), "checkpoint_every_steps": 2}
        tree["student"] = {"name": "random", "max_length": 24, "query_max_length": 16, "zero_stage": 2}
        self.run = run = Run.open(WithStudent.model_validate(tree), world.coordinator, world.device)

        def make() -> None:
            if (folder / "small").exists():
                return
            generate_dataset(folder / "data", num_documents=60, seed=1)
            texts = [document.text for document in open_dataset(folder / "data").documents()]
            make_random_model(folder / "large", texts, hidden_size=16, num_layers=1)
            make_random_model(folder / "small", texts[:9], hidden_size=16, num_layers=1, vocab_size=120)

        run.coordinator.only_rank_zero("make", make)
        dataset = open_dataset(folder / "data")
        self.sources = {"retriever": folder / "large", "ranker": folder / "large", "student": folder / "small"}
        self.texts = model_texts(run.config, self.sources)
        run.once("shards", write_shards, dataset, self.texts, run.folder)
        self.data = open_data(run.config, dataset, self.texts, run.folder)
        self.models = Models.open(run, {one: self.load(one) for one in self.sources})

    def load(self, name: str) -> Any:
        from engine.models.kinds import load_untrained

        return load_untrained(self.run.config.models[name], str(self.sources[name]), seed=1)

    def train(self) -> Trained:
        from engine.config.lexical import FlopsConfig
        from engine.objectives.contrast import InBatchContrast
        from engine.objectives.lexical import LexicalContrast
        from engine.phases import builder_of, train_visit
        from engine.refresh.refresh import warmup_candidates

        def contrast(samples: Any) -> Any:
            builder = builder_of(stage_of[0], self.data, self.models, "student")
            if self.lexical:
                return LexicalContrast(samples, builder, score_scale=0.1, penalty=FlopsConfig(flops_steps=4))
            return InBatchContrast(samples, builder, score_scale=1.0)

        stage_of: list[Any] = []

        def train(stage: Any) -> Trained:
            stage_of.append(stage)
            bm25 = warmup_candidates(self.run, self.data)
            return train_visit(stage, self.models, self.data, bm25, contrast, self.phase.visits[0])

        return self.run.once("student", train)


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "kind"), [(1, "retriever"), (2, "lexical")])
def test_a_third_model_is_trained_like_the_others(tmp_path: Path, world_size: int, kind: str) -> None:
    """Symptom: whatever was not the retriever was taken for the ranker, so a student had no place."""
    env = {"TEST_FOLDER": str(tmp_path), "TEST_KIND": kind}
    ranks = run_ranks(f"{HERE}:three_models_on_every_rank", world_size, "store", timeout=180, env=env)
    assert all(rank.returncode == 0 for rank in ranks), report(ranks)
    found = json.loads(ranks[0].stdout.splitlines()[-1])
    assert found["streams"] == {"retriever": "retriever", "ranker": "retriever", "student": "student"}
    assert (found["steps"], found["finite"], found["weights"]) == (4, True, True)
    assert found["checkpoints"] == {"retriever": None, "ranker": None, "student": 2}
    assert found["resumed"] == 4
    assert found["difference"] < 1e-4  # in sentence-transformers


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_that_fit_are_found_without_a_trace(tmp_path: Path, world_size: int) -> None:
    env = {"TEST_FOLDER": str(tmp_path)}
    ranks = run_ranks(f"{HERE}:auto_on_every_rank", world_size, "store", timeout=180, env=env)
    assert all(rank.returncode == 0 for rank in ranks), report(ranks)
    results = json.loads(ranks[0].stdout.splitlines()[-1])
    found = results["auto"]["found"]
    assert found["limit_bytes"] == int(0.9 * LIMIT)
    assert found["bytes"] <= found["limit_bytes"]
    assert found["tokens"] > 60  # the first trial
    # The trials changed no weight: the run ends where one ends that was given the number.
    assert results["auto"]["sha256"] == results["number"]["sha256"]
    assert results["auto"]["steps"] == results["number"]["steps"] == 4

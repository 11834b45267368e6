"""What is estimated of a recipe that pre-trains on documents alone, and searches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.file import load_config
from engine.config.timetable import Sizes
from engine.models.bottleneck import BottleneckLM
from engine.models.condenser import CondenserLM
from engine.models.random import make_random_model
from launcher.plan.hardware import GIB, Gpu
from launcher.plan.models import shapes_of
from launcher.plan.phases import training_work
from launcher.plan.recomputation import decide_recomputation
from launcher.preflight.space import estimate_space

CONFIGS = Path(__file__).parents[4] / "configs"
WORDS = ["run.path=/nowhere", "data.path=/nowhere"]


def test_the_shape_has_every_parameter_once(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", ["the encoder and its decoder share the embeddings"])
    words = [*WORDS, f"encoder.name={folder}", "encoder.decoder_layers=1"]
    config = load_config(CONFIGS / "edmlm_msmarco.yaml", words)
    shape = shapes_of(config)["encoder"]
    model = BottleneckLM.load(str(folder), num_decoder_layers=1)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.towers) == (3, 1)


def test_activations_are_recomputed_where_a_micro_batch_would_not_fit() -> None:
    words = [*WORDS, "encoder.gradient_checkpointing=auto", "edmlm.micro_batch_size=256"]
    config = load_config(CONFIGS / "edmlm_msmarco.yaml", words).sized(Sizes(0, 8_841_823))
    shapes = shapes_of(config, {"encoder": "bert-base"})
    found = [
        decide_recomputation(config, shapes, Gpu("some", gib * GIB, 1e12, 1e12, 1e9), 8).models["encoder"]
        for gib in (16, 10_000)
    ]
    assert [section.gradient_checkpointing for section in found] == [True, False]


def test_predictions_over_the_vocabulary_are_counted() -> None:
    config = load_config(CONFIGS / "edmlm_msmarco.yaml", WORDS).sized(Sizes(0, 8_841_823))
    shapes = shapes_of(config, {"encoder": "bert-base"})
    (work,) = training_work(config, shapes, 8)
    predicted = 64 * 144 * 0.8 * shapes["encoder"].embedding // shapes["encoder"].hidden
    assert work.extra == pytest.approx(3 * 4 * predicted, rel=1e-3)
    assert [(inputs.rows, inputs.length) for inputs in work.batches] == [(64, 144)]


def test_a_pool_of_all_ranks_is_counted() -> None:
    """Of 8 ranks with 512 documents each: 4096 embeddings, the scores of its own, every forward twice."""
    config = load_config(CONFIGS / "ict_wiki.yaml", WORDS).sized(Sizes(0, 21_015_324))
    shapes = shapes_of(config, {"retriever": "bert-base"})
    (work,) = training_work(config, shapes, 8)
    assert work.cached
    assert work.extra >= 4 * 4096 * (768 + 512)
    assert [(inputs.rows, inputs.length) for inputs in work.batches] == [(64, 64), (64, 160)]


def test_two_spans_of_each_document_are_counted(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", ["the encoder and its head share the embeddings"])
    words = [*WORDS, f"encoder.name={folder}", "encoder.decoder_layers=1", "encoder.skip_from=1"]
    config = load_config(CONFIGS / "cocondenser_msmarco.yaml", words).sized(Sizes(0, 8_841_823))
    shapes = shapes_of(config)
    model = CondenserLM.load(str(folder), skip_from=1, num_decoder_layers=1)
    assert shapes["encoder"].parameters == sum(parameter.numel() for parameter in model.parameters())
    (work,) = training_work(config, shapes, 8)
    assert work.cached
    assert [(inputs.rows, inputs.length) for inputs in work.batches] == [(64, 128)]


def test_the_disk_takes_shards_weights_and_checkpoints_alone() -> None:
    words = [*WORDS[:1], "data.generated_documents=1000", "edmlm.epochs=3"]
    config = load_config(CONFIGS / "edmlm_tiny.yaml", words)
    space = estimate_space(config)
    assert not space.unknown
    assert {what for what, size in space.parts.items() if size} == {"token shards", "weights", "checkpoints", "exports"}
    (shape,) = shapes_of(config).values()
    assert space.parts["weights"] == 4 * shape.parameters * 4, "of three epochs, and as it came"

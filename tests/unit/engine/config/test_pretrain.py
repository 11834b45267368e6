"""The recipe of pre-training: its epochs, what it refuses, and the preset's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.file import dump_config, load_config, parse_config
from engine.config.pretrain import CoCondenserRecipe, EdMlmRecipe, IctRecipe
from engine.config.timetable import Sizes
from engine.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
SMALLEST: dict[str, Any] = {"recipe": "edmlm", "run": {"path": "r"}, "encoder": {"name": "b"}}


def recipe(**sections: Any) -> EdMlmRecipe:
    config = parse_config({**SMALLEST, **sections}, "c")
    assert isinstance(config, EdMlmRecipe)
    return config


def test_an_epoch_takes_every_document_that_is_not_held_out() -> None:
    config = recipe(edmlm={"epochs": 3, "batch_size": 10, "held_out": 5}).sized(Sizes(0, 48))
    (phase,) = config.timetable.phases
    assert (phase.steps, len(phase.visits), phase.total_steps) == (5, 3, 15)
    assert [visit.stage for visit in phase.visits] == ["edmlm/1", "edmlm/2", "edmlm/3"]
    assert (phase.visits[2].first_step, config.timetable.iterations) == (10, 3)
    assert not config.timetable.minings


def test_steps_take_the_place_of_counted_documents() -> None:
    config = recipe(edmlm={"epochs": 2, "steps": 7})
    assert not config.counts_epochs
    assert config.timetable.phases[0].total_steps == 14
    with pytest.raises(ConfigError, match=r"edmlm\.epochs cannot be turned into steps.*edmlm\.steps"):
        _ = recipe().timetable


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"edmlm": {"encoder_mask": 0.5, "decoder_mask": 0.3}}, r"decoder_mask 0\.3 is less than encoder_mask 0\.5"),
        ({"edmlm": {"encoder_mask": 0.0}}, r"edmlm\.encoder_mask"),
        ({"run": {"path": "r", "keep_best": "R@5"}}, "which pre-training does not measure"),
        ({"edmlm": {"epoch": 3}}, r"unknown key 'edmlm\.epoch', did you mean 'edmlm\.epochs'"),
        ({"encoder": {"name": "b", "pooling": "mean"}}, r"unknown key 'encoder\.pooling'"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**sections)


def test_it_is_written_and_read_back() -> None:
    config = recipe(edmlm={"held_out": 7})
    import yaml

    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_the_preset_has_the_papers_numbers() -> None:
    """R2ANKER Appendix C; masks and decoder of SimLM."""
    config = load_config(CONFIGS / "edmlm_msmarco.yaml")
    assert isinstance(config, EdMlmRecipe)
    settings = config.edmlm
    assert (settings.optim.lr, settings.batch_size, settings.epochs, config.run.seed) == (1e-4, 2048, 20, 42)
    assert (config.encoder.max_length, config.encoder.decoder_layers) == (144, 2)
    assert (settings.encoder_mask, settings.decoder_mask) == (0.3, 0.5)
    assert config.edmlm.model_dump() == recipe(edmlm={}).edmlm.model_dump(), "the preset's numbers are the defaults"


def ict(**sections: Any) -> IctRecipe:
    config = parse_config({"recipe": "ict", "run": {"path": "r"}, "retriever": {"name": "b"}, **sections}, "c")
    assert isinstance(config, IctRecipe)
    return config


def test_the_inverse_cloze_task_has_epochs_of_its_own_over_the_documents_of_all_ranks() -> None:
    config = ict(ict={"epochs": 2, "batch_size": 10, "held_out": 5}).sized(Sizes(0, 48))
    (phase,) = config.timetable.phases
    assert [visit.stage for visit in phase.visits] == ["ict/1", "ict/2"]
    assert (phase.steps, phase.model, phase.pool, phase.num_negatives) == (5, "retriever", "world", 0)
    assert config.timetable.in_each_iteration == ("ict", "held_out")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ict": {"shortest_query": 40}}, r"ict\.shortest_query 40 exceeds retriever\.query_max_length 32"),
        ({"ict": {"keep": 1.5}}, r"ict\.keep"),
        ({"run": {"path": "r", "keep_best": "R@5"}}, "which pre-training does not measure"),
    ],
)
def test_what_is_wrong_with_the_inverse_cloze_task_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ict(**sections)


def test_the_inverse_cloze_tasks_preset_has_its_sources_numbers() -> None:
    """Lee et al. 2019: 4096, 1e-4, 10 %; about 100,000 steps over the 21 million passages."""
    config = load_config(CONFIGS / "ict_wiki.yaml")
    assert isinstance(config, IctRecipe)
    assert (config.ict.batch_size, config.ict.optim.lr, config.ict.keep) == (4096, 1e-4, 0.1)
    assert config.sized(Sizes(0, 21_015_324)).timetable.phases[0].total_steps == pytest.approx(100_000, rel=0.05)
    assert config.ict.model_dump() == ict().ict.model_dump(), "the preset's numbers are the defaults"


def test_cocondensers_preset_has_its_sources_numbers() -> None:
    """Condenser's released code: 1e-4, .01, 10 %, 8 epochs, 2 layers above layer 6; a batch of about 2048."""
    config = load_config(CONFIGS / "cocondenser_msmarco.yaml")
    assert isinstance(config, CoCondenserRecipe)
    settings, optim = config.cocondenser, config.cocondenser.optim
    assert (settings.epochs, settings.batch_size, settings.mask) == (8, 2048, 0.15)
    assert (optim.lr, optim.weight_decay, optim.warmup_ratio) == (1e-4, 0.01, 0.1)
    assert (config.encoder.decoder_layers, config.encoder.skip_from) == (2, 6)
    assert (
        settings.model_dump()
        == parse_config(
            {"recipe": "cocondenser", "run": {"path": "r"}, "encoder": {"name": "b"}}, "c"
        ).settings.model_dump()
    ), "the preset's numbers are the defaults"  # type: ignore[attr-defined]
    (phase,) = config.sized(Sizes(0, 8_841_823)).timetable.phases
    assert (phase.name, phase.model, phase.pool) == ("cocondenser", "encoder", "world")
    assert phase.total_steps == 8 * 4317

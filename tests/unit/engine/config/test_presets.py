"""The recipes with the papers' numbers have them, each as it is printed in the paper or stands in the released code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from engine.config.ar2 import Ar2Recipe
from engine.config.file import load_config
from engine.config.negatives import SimAnsConfig, UniformConfig
from engine.config.r2anker import R2ankerRecipe
from engine.config.timetable import Sizes
from engine.config.training import OptimConfig

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


class WarmUps(NamedTuple):
    """G0's and D0's columns of AR2 Table 9: rates, batches, negatives of a query, and how long."""

    lr: float
    batch: int
    negatives: int
    epochs: int
    questions: int
    """Training questions (Table 1, processed)."""
    ranker_lr: float
    ranker_batch: int
    ranker_negatives: int
    ranker_steps: int


class Game(NamedTuple):
    """What is said of the game: rates, batch, n, depth, steps of an iteration, iterations, tokens of a document."""

    lr: float
    ranker_lr: float
    batch: int
    n: int
    top_k: int
    steps: tuple[int, int]
    iterations: int
    document: int


NQ = WarmUps(1e-5, 128, 255, 40, 58_880, 1e-5, 64, 15, 2000)
TRIVIAQA = WarmUps(1e-5, 128, 255, 40, 60_413, 1e-5, 64, 15, 2000)
MSMARCO = WarmUps(1e-4, 64, 127, 3, 502_939, 1e-5, 256, 15, 4000)
RECIPES: dict[str, tuple[WarmUps, Game]] = {
    # AR2 section 4.2, Tables 1 and 9.
    "ar2_nq": (NQ, Game(1e-5, 1e-6, 64, 15, 100, (1500, 500), 10, 128)),
    "ar2_triviaqa": (TRIVIAQA, Game(1e-5, 1e-6, 64, 15, 100, (1500, 500), 10, 128)),
    "ar2_msmarco": (MSMARCO, Game(5e-6, 5e-7, 64, 15, 100, (1500, 500), 10, 128)),
    # SimANS' released scripts, behind AR2's warm-ups.
    "simans_nq": (NQ, Game(1e-5, 1e-6, 64, 15, 100, (1500, 500), 15, 128)),
    "simans_triviaqa": (TRIVIAQA, Game(5e-6, 1e-6, 64, 15, 100, (1500, 500), 5, 256)),
    "simans_msmarco": (MSMARCO, Game(5e-6, 5e-7, 256, 15, 200, (4500, 500), 12, 128)),
}


def ar2(name: str) -> Ar2Recipe:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert isinstance(config, Ar2Recipe)
    return config


def of_all_phases(config: Ar2Recipe) -> list[OptimConfig]:
    return [phase.optim for phase in config.timetable.phases]


@pytest.mark.parametrize("name", RECIPES)
def test_the_warm_ups_have_the_numbers_of_table_9(name: str) -> None:
    config, (warm, _) = ar2(name), RECIPES[name]
    g0, d0 = config.warmup_retriever, config.warmup_ranker
    assert (g0.optim.lr, g0.batch_size) == (warm.lr, warm.batch)
    assert g0.gather_negatives
    assert g0.batch_size * (1 + g0.hard_negatives) - 1 == warm.negatives, "its own and the other queries' documents"
    assert g0.steps == math.ceil(warm.epochs * warm.questions / warm.batch)
    assert (d0.optim.lr, d0.batch_size, d0.num_negatives, d0.steps) == warm[-4:]


@pytest.mark.parametrize("name", RECIPES)
def test_the_game_has_the_numbers_of_its_source(name: str) -> None:
    config, (_, said) = ar2(name), RECIPES[name]
    game = config.ar2
    assert said == Game(
        game.retriever.optim.lr,
        game.ranker.optim.lr,
        game.retriever.batch_size,
        game.num_negatives,
        game.top_k,
        (game.retriever.steps, game.ranker.steps),
        game.iterations,
        config.retriever.max_length,
    )
    assert game.ranker.batch_size == said.batch
    assert game.teacher == "always"
    assert game.distillation_weight == 1.0
    assert game.remove_answers is (not name.endswith("msmarco"))


@pytest.mark.parametrize("name", RECIPES)
def test_all_phases_have_adamw_with_a_tenth_of_warm_up_and_no_temperature(name: str) -> None:
    """Table 9: AdamW, linear, warm-up .1, tau 1; clipping at 2 and no decay are the released code's."""
    config = ar2(name)
    assert len(of_all_phases(config)) == 4
    for optim in of_all_phases(config):
        assert (optim.schedule, optim.warmup_ratio, optim.weight_decay, optim.max_grad_norm) == (
            "linear",
            0.1,
            0.0,
            2.0,
        )
    assert config.ranker is not None
    assert (config.retriever.score_scale, config.ranker.score_scale) == (1.0, 1.0)
    assert (config.retriever.query_max_length, config.retriever.similarity, config.retriever.pooling) == (
        32,
        "dot",
        "cls",
    )
    assert config.ranker.max_length == 32 + config.retriever.max_length


@pytest.mark.parametrize("name", ["ar2_nq", "ar2_triviaqa", "ar2_msmarco"])
def test_the_papers_game_is_that_of_algorithm_1(name: str) -> None:
    config = ar2(name)
    game = config.ar2
    assert (game.objective, game.order, game.adversarial, game.adversarial_reduction) == (
        "ar2",
        "paper",
        "paper",
        "mean",
    )
    assert game.adversarial_weight == 1.0
    assert game.negatives.sampler == UniformConfig()
    assert game.negatives.filters == ()
    assert game.iterations * (game.retriever.steps + game.ranker.steps) == 20_000, "Table 8"


@pytest.mark.parametrize(
    ("name", "sampler", "total"),
    [
        ("nq", SimAnsConfig(name="simans", a=0.5, b=1), 30_000),
        ("triviaqa", SimAnsConfig(name="simans", a=0.5, b=0), 10_000),
        ("msmarco", SimAnsConfig(name="simans", form="absolute", a=3), 60_000),
    ],
)
def test_simans_distils_from_its_sampler_alone(name: str, sampler: SimAnsConfig, total: int) -> None:
    game = ar2(f"simans_{name}").ar2
    assert game.negatives.sampler == sampler
    assert (game.adversarial_weight, game.order) == (0.0, "released")
    assert game.iterations * (game.retriever.steps + game.ranker.steps) == total


def test_the_released_preset_plays_as_the_released_code() -> None:
    config = ar2("ar2_triviaqa_released")
    game, g0, d0 = config.ar2, config.warmup_retriever, config.warmup_ranker
    assert (game.order, game.adversarial, game.adversarial_reduction, game.teacher) == (
        *("released", "released", "sum"),
        "always",
    )
    assert (game.adversarial_weight, game.distillation_weight, game.reference_batch_size) == (0.5, 0.5, 8)
    assert (game.iterations, game.retriever.steps, game.ranker.steps) == (16, 1499, 501)
    assert (game.retriever.optim.lr, game.ranker.optim.lr) == (1e-5, 1e-6)
    assert (game.retriever.batch_size, game.ranker.batch_size, game.num_negatives, game.top_k) == (64, 64, 15, 100)
    assert (g0.optim.lr, g0.batch_size, g0.hard_negatives, g0.steps) == (2e-5, 16 * 8, 1, 40_000)
    assert g0.steps * g0.optim.warmup_ratio == 4000
    assert (d0.optim.lr, d0.batch_size, d0.num_negatives, d0.steps) == (1e-5, 64, 15, 4000)
    assert config.data.positive == "first", "positive_ctxs[0]"
    assert config.index.factory == "Flat"


def test_r2ankers_ranker_and_student_have_the_numbers_of_its_appendices() -> None:
    config = load_config(CONFIGS / "r2anker_msmarco.yaml")
    assert isinstance(config, R2ankerRecipe)
    assert config.student is not None
    ranker, student = config.r2anker.ranker, config.r2anker.student
    assert (ranker.num_negatives, ranker.epochs, ranker.batch_size) == (40, 2, 12)
    assert (ranker.optim.lr, ranker.optim.weight_decay, ranker.optim.warmup_ratio) == (1e-5, 0.1, 0.1)
    assert (config.ranker.max_length, config.run.seed) == (128, 42)
    assert (student.optim.lr, student.batch_size, student.num_negatives, student.epochs, student.loss) == (
        *(5e-5, 16, 10),
        *(4, "kl"),
    )
    joint = config.sized(Sizes(502_939, 8_841_823)).timetable.joint["joint"]
    assert list(joint.members) == ["bm25", "dense-002", "lexical-002"]
    assert (config.r2anker.top_k, config.r2anker.remove_answers, config.r2anker.negatives.filters) == (200, False, ())
    assert config.evaluation.rerank_depth == 1000


@pytest.mark.parametrize("stage", ["dense_1", "dense_2"])
def test_r2ankers_dense_retriever_is_trained_as_cocondenser_is(stage: Literal["dense_1", "dense_2"]) -> None:
    """tevatron's example: 5e-6, 8 queries a GPU on 8 GPUs, groups of 8, 3 epochs."""
    config = load_config(CONFIGS / "r2anker_msmarco.yaml")
    assert isinstance(config, R2ankerRecipe)
    own = getattr(config.r2anker, stage)
    assert (own.optim.lr, own.batch_size, own.hard_negatives, own.epochs) == (5e-6, 64, 7, 3)


@pytest.mark.parametrize("stage", ["lexical_1", "lexical_2"])
def test_r2ankers_lexical_retriever_is_trained_as_splade_is(stage: Literal["lexical_1", "lexical_2"]) -> None:
    """SPLADE's released configuration: 2e-5, batches of 128, 150,000 steps, both penalties within 50,000."""
    config = load_config(CONFIGS / "r2anker_msmarco.yaml")
    assert isinstance(config, R2ankerRecipe)
    own = getattr(config.r2anker, stage)
    assert (own.optim.lr, own.batch_size, own.steps) == (2e-5, 128, 150_000)
    assert (own.query_flops, own.document_flops, own.flops_steps) == (0.5, 0.4, 50_000)
    assert config.lexical is not None
    assert config.lexical.max_length == 256

"""A recipe that is not AR2's: three models, phases of other names, a retriever as opponent, its student mined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import BertConfig

from engine.config.ar2 import Ar2Recipe
from engine.config.file import load_config
from engine.config.models import LexicalConfig, RetrieverConfig
from engine.config.timetable import Mining, Phase, Sizes, Timetable, WeightsOf, iteration_name
from engine.config.training import OptimConfig
from engine.errors import ConfigError
from launcher.plan.activations import Inputs
from launcher.plan.corpus import Corpus
from launcher.plan.durations import Rates
from launcher.plan.estimate import Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.models import encoder_of, reranker_of, shapes_of
from launcher.plan.phases import NO_INDEX, phases, training_work
from launcher.plan.report import report
from launcher.plan.storage import token_streams
from launcher.preflight.space import estimate_space
from tests.unit.launcher.plan.test_estimate import row

ROOT = Path(__file__).parents[4]
ITERATIONS = 3
CORPUS = Corpus(documents=20_000, train=1000, dev=100, test=100, text_bytes=600.0, tokens=120.0, sources=())
SHAPES = {"student": "2x64"}


def a_phase(name: str, model: str, **values: object) -> Phase:
    sizes = {"steps": 5, "batch_size": 8, "micro_batch_size": 2, "num_negatives": 3, "optim": OptimConfig()}
    return Phase(**(sizes | {"name": name, "section": f"play.{name}", "model": model} | values))  # type: ignore[arg-type]


class Distilling(Ar2Recipe):
    """A teacher that a ranker judges, and a student that learns of the ranker, both in three iterations."""

    student: RetrieverConfig

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        names = tuple(iteration_name(number) for number in range(ITERATIONS + 1))
        game = {"candidates": names[:-1], "first_iteration": 1}
        return Timetable(
            phases=(
                a_phase("warmup_retriever", "retriever", candidates=("bm25",), pool="rank", steps=7),
                a_phase("judging", "ranker", opponent="retriever", **game),
                a_phase("distillation", "student", opponent="ranker", pool="world", **game),
                a_phase("left_out", "student", steps=0, **game),
            ),
            minings=(
                Mining("bm25", "bm25", None, 30, "play.bm25_depth"),
                *(
                    Mining(name, "dense", WeightsOf("student", number), 20, "play.top_k")
                    for number, name in enumerate(names)
                ),
            ),
            iterations=ITERATIONS,
            in_each_iteration=("judging", "distillation"),
            mine_all=False,
            remove_answers=False,
        )


def distilling(*words: str) -> Distilling:
    student = RetrieverConfig(name="someone/student", max_length=40, query_max_length=16, zero_stage=1)
    return Distilling(**load_config(ROOT / "configs" / "tiny.yaml", words).model_dump(), student=student)


def planned(gpu: str = "a100-80gb") -> Plan:
    config = distilling()
    shapes = shapes_of(config, SHAPES)
    return make_plan(config, CORPUS, shapes, find_gpu(gpu), nodes=1, ranks_per_node=2, rates=Rates())


def test_every_phase_is_work_of_its_own_model() -> None:
    """Steps of one visit were the phase's steps divided by the game's iterations, which other phases do not follow."""
    config = distilling()
    works = training_work(config, shapes_of(config, SHAPES), world_size=2)
    assert [(work.name, work.model, work.phase.steps, work.visits) for work in works] == [
        ("warm-up retriever", "retriever", 7, 1),
        ("judging", "ranker", 5, ITERATIONS),
        ("distillation", "student", 5, ITERATIONS),
    ]
    warmup, judging, distillation = works
    assert warmup.batches == (Inputs(2, 16), Inputs(2 * 4, 48))
    assert judging.batches == (Inputs(2 * 4, 64),)
    assert judging.scored == warmup.batches  # the frozen teacher reads the same documents, queries by themselves
    assert distillation.batches == (Inputs(2, 16), Inputs(2 * 4, 40))
    assert distillation.scored == judging.batches
    assert [work.cached for work in works] == [True, False, True]
    assert [bool(work.frozen) for work in works] == [False, True, True]
    # 4 queries of a rank with 4 documents each: its own pool, and that of both ranks.
    pools = [4 * (3 * pool * hidden + 4 * 4 * pool) for pool, hidden in ((16, 32), (32, 64))]
    assert [warmup.extra, distillation.extra] == pools


def test_the_mined_model_encodes_the_corpus() -> None:
    config = distilling()
    assert (encoder_of(config), reranker_of(config)) == ("student", "ranker")
    plan = planned()
    assert plan.needs.embeddings_bytes == CORPUS.documents * 64 * 2
    assert dict(plan.phases[-2].parts).keys() >= {"frozen student"}
    # Two models share a tokenizer, and the longer one's text; the student has its own.
    assert token_streams(config, CORPUS, shapes_of(config, SHAPES)) == [64, 40]


def test_the_report_has_every_model_and_every_phase() -> None:
    text = report(planned())
    for model in ("retriever", "ranker", "student"):
        assert row(text, model, "1*" if model != "ranker" else "2*")[-1] == "yes"
        assert f"{model}: ZeRO-" in text
    assert "frozen retriever or ranker" in text
    assert row(text, "start and resume")[1].startswith("all engines")
    hours = text[text.index("\nTime\n") :]
    phases = ("warm-up retriever", "judging phase", "distillation phase")
    assert [row(hours, phase)[1] for phase in phases] == ["1", "3", "3"]
    assert "left out" not in text
    assert row(text, "gradients of the student")[-1].startswith("5 steps of ")
    assert "15 steps of the distillation phase a rank also sends" in text
    assert row(text, "encode")[1] == "5"  # before any training, after the warm-up, and three iterations
    assert row(text, "mining search")[-1].startswith("80 queries")  # 5 steps of 8, by either phase


def test_disk_counts_what_each_model_leaves() -> None:
    plan = planned()
    retriever, ranker, student = (plan.shapes[model].parameters for model in ("retriever", "ranker", "student"))
    assert plan.disk.weights == 4 * (retriever + ITERATIONS * ranker + (ITERATIONS + 1) * student)
    assert plan.disk.checkpoints == 12 * 2 * (retriever + ranker + student)
    assert plan.disk.exports == 4 * (retriever + ranker + student)


def test_engines_of_all_models_rest_on_a_cpu() -> None:
    plan = planned("cpu")
    at_rest = {phase.name: phase.parts.get("engines at rest", 0) for phase in plan.phases}
    everything = plan.phases[0].parts["all engines"]
    own = {phase.name: sum(size for name, size in phase.parts.items() if "resident" in name) for phase in plan.phases}
    assert at_rest["evaluate"] == everything
    for name in ("warm-up retriever", "judging", "distillation"):
        assert at_rest[name] == everything - own[name]


def test_a_shape_for_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="for teacher, but the models of the recipe are retriever, ranker, student"):
        shapes_of(distilling(), {"teacher": "bert-base"})


def test_space_is_not_estimated_without_one_models_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert estimate_space(distilling()).unknown == ("the student's weights",)


class Weighing(Ar2Recipe):
    """AR2's recipe, and a lexical retriever."""

    words: LexicalConfig

    def timetable_for(self, sizes: Sizes | None) -> Timetable:
        table = super().timetable_for(sizes)
        return replace(table, phases=(*table.phases, a_phase("words", "words", candidates=("bm25",), pool="world")))


def test_a_lexical_retrievers_logits_are_planned() -> None:
    """They weigh more than all else: a number for each token and each word."""
    words = LexicalConfig(name="someone/words", max_length=40, query_max_length=16, precision="bf16")
    config = Weighing(**load_config(ROOT / "configs" / "tiny.yaml").model_dump(), words=words)
    shapes = shapes_of(config, {"words": "2x64"})
    (work,) = (one for one in training_work(config, shapes, 2) if one.model == "words")
    vocabulary = shapes["words"].dimension
    assert vocabulary == BertConfig().vocab_size
    tokens = 2 * config.query_max_length + 2 * 4 * 40
    pool = 3 * 8 * 4 * vocabulary + 4 * 4 * 8 * 4
    assert work.extra == 2 * tokens * vocabulary * 2 + 4 * pool
    stages = {name: section.zero_stage for name, section in config.models.items()}
    listed = phases(config, shapes, training_work(config, shapes, 2), stages, 2, NO_INDEX, find_gpu("a100-80gb"))
    assert next(one.tensors for one in listed if one.name == "words") > work.extra

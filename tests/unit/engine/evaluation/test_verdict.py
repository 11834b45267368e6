"""Which iteration a run takes, whether the game paid, and how both are told."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.data.answers import AnswerFinder, haystacks_of
from engine.data.trec import write_trec
from engine.errors import ConfigError
from engine.evaluation.chosen import (
    best_iteration,
    on_dev,
    plays_iterations,
    ranker_has_led,
    require_decidable,
    require_dev,
    taken_iteration,
    trust_on_dev,
)
from engine.evaluation.duel import Difference, Duel
from engine.evaluation.significance import bootstrap, randomisation_test
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import every_system, trained_systems
from engine.evaluation.verdict import Taken, take_iteration
from engine.results import Measured, Score, one_line
from engine.run import Run, Stage
from shards.files import read_record
from shards.records import Document, Query

Open = Callable[..., Run]
NUM_QUERIES = 40
BEST = "evaluation.iteration=best"
FORCE = "run.force_resume=true"


def record(run: Run, *values: tuple[float, float] | None, metric: str = "MRR@10") -> None:
    """Record evaluations from the warm-up on: retriever's and ranker's metric; None where dev has no queries."""
    for iteration, pair in enumerate(values):
        scores = tuple(
            Score(name, kind, model, iteration, {metric: value})
            for name, kind, model, value in zip(
                ("any", "other"), ("retriever", "ranker"), ("retriever", "ranker"), pair or (), strict=False
            )
        )
        run.once(f"evaluate/{iteration}", lambda stage, scores=scores: asdict(Measured(scores)))


# --- which iteration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retriever", "best"),
    [([0.3, 0.5, 0.4], 1), ([0.6, 0.5, 0.4], 0), ([0.5, 0.5, 0.5], 0), ([0.1, 0.2, 0.3], 2), ([0.4, 0.5, 0.5], 1)],
)
def test_the_iteration_with_the_best_retriever_is_taken_the_warm_up_included(
    open_run: Open, retriever: list[float], best: int
) -> None:
    """Symptom: a duel that lowers the retriever is exported although the warm-up was better."""
    run = open_run(BEST)
    record(run, *((value, 0.9 - value) for value in retriever))
    assert (taken_iteration(run, 2), best_iteration(run, 2)) == (best, best)


def test_the_last_is_taken_where_it_is_asked_for_or_dev_has_no_queries(open_run: Open) -> None:
    run = open_run("evaluation.iteration=last")
    record(run, (0.6, 0.1), (0.5, 0.1), (0.4, 0.1))
    assert (taken_iteration(run, 2), best_iteration(run, 2)) == (2, 0)


def test_without_dev_queries_the_last_is_taken(open_run: Open) -> None:
    run = open_run(BEST)
    assert taken_iteration(run, 2) == 2
    record(run, None, None, None)
    assert taken_iteration(run, 2) == 2
    taken = run.once("take", take_iteration, data_of())
    assert taken == Taken(2, "the last: dev has no queries to choose by")
    assert not run.folder.duel.exists()


def test_what_is_not_finished_yet_is_not_taken(open_run: Open) -> None:
    run = open_run(BEST)
    record(run, (0.3, 0.1), (0.4, 0.1), (0.9, 0.1))
    assert taken_iteration(run, 1) == 1


def test_iterations_are_compared_by_what_rows_are_compared_by(open_run: Open) -> None:
    """Symptom: the table compared by MRR@10, and the verdict below it by the first of the metrics."""
    usual = open_run(BEST, "evaluation.metrics=[A@1,R@5,MRR@10]")
    for iteration, (recall, rank) in enumerate([(0.5, 0.1), (0.4, 0.9)]):
        score = Score("G", "retriever", "retriever", iteration, {"R@5": recall, "MRR@10": rank})
        usual.once(f"evaluate/{iteration}", lambda stage, score=score: asdict(Measured((score,))))
    assert (on_dev(usual, "retriever").metric, taken_iteration(usual, 1)) == ("MRR@10", 1)
    first = open_run(BEST, "evaluation.metrics=[A@1,R@5]", FORCE)
    assert on_dev(first, "retriever").metric == "R@5", "these queries have no answers"
    named = open_run(BEST, "evaluation.metrics=[A@1,R@5,MRR@10]", "run.keep_best=R@5", FORCE)
    assert taken_iteration(named, 1) == 0
    wrong = open_run(BEST, "evaluation.metrics=[A@1,R@5,MRR@10]", "run.keep_best=A@1", FORCE)
    with pytest.raises(ConfigError, match=r"compared by A@1, but dev was measured by MRR@10, R@5"):
        taken_iteration(wrong, 1)


def test_the_ledger_keeps_the_metric_by_which_iterations_are_compared() -> None:
    """Symptom: with metrics that no headline is among, nothing could be compared."""
    values = {"R@50": 0.5, "R@20": 0.4, "MRR@10": 0.3}
    assert Score.of("G", "retriever", "retriever", 0, values, "R@20").metrics == {"MRR@10": 0.3, "R@20": 0.4}


def test_only_models_that_go_through_iterations_have_one_to_take(open_run: Open) -> None:
    assert plays_iterations(open_run().config)
    assert not plays_iterations(open_run("ar2.iterations=0", "run.force_resume=true").config)


def test_the_last_table_has_the_warm_up_and_the_iteration_that_is_taken(open_run: Open) -> None:
    config = open_run("evaluation.zero_shot=false").config
    assert [one.name for one in every_system(config, taken=0)] == ["BM25", "G0", "D0"]
    assert [(one.name, one.iteration) for one in every_system(config, taken=1)[3:]] == [("G", 1), ("D", 1)]


# --- from when on Eq. 9 counts ---------------------------------------------------------------------------------------


def test_a_ranker_that_was_above_the_retriever_once_has_led_from_then_on(open_run: Open) -> None:
    run = open_run()
    assert not ranker_has_led(run, 1), "nothing is measured yet"
    record(run, (0.5, 0.5), (0.4, 0.6), (0.6, 0.5))
    assert [ranker_has_led(run, iteration) for iteration in (1, 2, 3)] == [False, True, True]


def test_a_rankers_word_counts_by_its_odds_on_dev(open_run: Open) -> None:
    run = open_run()
    with pytest.raises(ConfigError, match=r"ar2.teacher=dev is decided on dev, which has no queries"):
        trust_on_dev(run, 0)
    record(run, (0.0, 1.0), (0.8, 0.5), (0.5, 0.8))
    assert 0.99 < trust_on_dev(run, 0) < 1, "the odds of 1 are finite"
    assert [trust_on_dev(run, t) for t in (1, 2)] == pytest.approx([0.2, 0.8], abs=1e-3)
    assert trust_on_dev(run, 9) == trust_on_dev(run, 2), "the newest that was measured"


def test_an_option_that_dev_decides_is_refused_without_dev() -> None:
    require_dev([Query("q", "text")], "x")
    with pytest.raises(ConfigError, match=r"ar2.adversarial_from=lead is decided on dev, which has no queries"):
        require_dev([], "ar2.adversarial_from=lead")


def test_it_is_refused_before_any_work(open_run: Open) -> None:
    """Symptom: the corpus was tokenised first, and the option refused when the game began."""
    config = open_run("ar2.teacher=dev").config
    dataset: Any = SimpleNamespace(queries={"q": Query("q", "text")}, qrels={"train": {"q": {"d": 1}}})
    with pytest.raises(ConfigError, match=r"ar2.teacher=dev is decided on dev, which has no queries"):
        require_decidable(config, dataset)
    dataset.qrels["dev"] = dataset.qrels["train"]
    require_decidable(config, dataset)


# --- the verdict -----------------------------------------------------------------------------------------------------


def data_of(answers: tuple[str, ...] = ()) -> Any:
    """Query qi has the one positive pi, which alone holds its answer; the other documents are n0 to n8."""
    queries = {f"q{row}": Query(f"q{row}", "text", answers) for row in range(NUM_QUERIES)}
    qrels = {f"q{row}": {f"p{row}": 1} for row in range(NUM_QUERIES)}
    docids = [*(f"p{row}" for row in range(NUM_QUERIES)), *(f"n{place}" for place in range(9))]
    shards = SimpleNamespace(
        docids=docids,
        index_of=docids.index,
        document=lambda index: Document(docids[index], "", "in Paris" if docids[index][0] == "p" else "elsewhere"),
    )
    dataset = SimpleNamespace(queries=queries, qrels={"dev": qrels})
    return SimpleNamespace(
        dataset=dataset,
        shards=shards,
        answer_finder=AnswerFinder(haystacks_of(lambda docid: shards.document(shards.index_of(docid)).text)),
        queries_of=lambda split, limit, seed: list(queries.values())[:limit] if split == "dev" else [],
    )


def write_rankings(run: Run, places: dict[int, tuple[Sequence[int], Sequence[int]]]) -> None:
    """Record rankings in which the positive of query i has some place, by iteration: the retriever's, the ranker's."""
    for iteration, both in places.items():
        for system, ranks in zip(trained_systems(run.config, [iteration]), both, strict=True):
            ranking = {
                f"q{row}": {
                    docid: -float(place)
                    for place, docid in enumerate(
                        [*(f"n{other}" for other in range(rank - 1)), f"p{row}", *(["n8"] if rank < 9 else [])]
                    )
                }
                for row, rank in enumerate(ranks)
            }
            write_trec(run.folder.results / system.run_file_name("dev"), ranking, system.name)


def ranks(seed: int, best: int = 1, worst: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(best, worst + 1, NUM_QUERIES).tolist()


def verdict(run: Run, places: dict[int, tuple[Sequence[int], Sequence[int]]], data: Any = None) -> Taken:
    write_rankings(run, places)
    means = [tuple(float(np.mean(1 / np.array(own))) for own in both) for both in places.values()]
    record(run, *means)  # type: ignore[arg-type]
    return run.once("take", take_iteration, data or data_of())


ALL = "evaluation.max_dev_queries=null"
ON_RANKS = "evaluation.metrics=[MRR@10]"


def test_a_game_that_paid_is_told_with_its_difference_and_how_sure_it_is(open_run: Open) -> None:
    run = open_run(BEST, ALL, ON_RANKS)
    g = {0: ranks(0, 2), 1: ranks(1, 2), 2: ranks(2, 1, 2)}
    d = {0: ranks(3, 2), 1: ranks(4), 2: ranks(5, 1, 2)}
    taken = verdict(run, {t: (g[t], d[t]) for t in g})
    assert (taken.iteration, taken.why) == (2, "best on dev by MRR@10")
    values = {t: 1 / np.array(own) for t, own in g.items()}
    apart = values[2] - values[0]
    p_values = sorted(randomisation_test(values[t], values[0], seed=run.config.run.seed) for t in (1, 2))
    expected = f"{apart.mean():.3f}".lstrip("0"), f"{apart.std(ddof=1) / NUM_QUERIES**0.5:.3f}".lstrip("0")
    assert f"The duel paid: G of iteration 2 is above G0 by {expected[0]} +- {expected[1]} MRR@10 on 40 dev" in (
        taken.verdict
    )
    ends = bootstrap(values[2], values[0], seed=run.config.run.seed)
    interval = " to ".join(f"{end:.3f}".lstrip("0") for end in ends)
    assert f"(95 % {interval}, p {2 * p_values[0]:.1e})" in taken.verdict, "corrected for two iterations"
    assert "D over G of iteration 2 is above D0 over G0 by" in taken.verdict
    assert run.folder.duel.exists()
    run.folder.summary.write_text("[]")
    assert summary_table(run.folder).endswith(f"\n\n{taken.verdict}")


def test_a_game_that_lowered_the_retriever_did_not_pay(open_run: Open) -> None:
    run = open_run(BEST, ALL, ON_RANKS)
    taken = verdict(run, {0: (ranks(0, 1, 2), ranks(3)), 1: (ranks(1), ranks(4)), 2: (ranks(2, 2), ranks(5))})
    assert taken.iteration == 0
    assert taken.verdict.startswith(
        "The duel did NOT pay: G0 is taken, and no iteration is above G0 by more than chance; G of iteration 1 is below"
    )
    assert "D over G of iteration 1 is" in taken.verdict


def test_a_ranker_that_learns_no_more_is_not_judged(open_run: Open) -> None:
    """Symptom: the same D0 over another retriever was "above D0"."""
    run = open_run(BEST, ALL, ON_RANKS, "ar2.ranker.steps=0")
    taken = verdict(run, {0: (ranks(0, 2), ranks(3, 2)), 1: (ranks(1, 1, 2), ranks(4, 1, 2))})
    assert "G of iteration 1 is above G0" in taken.verdict
    assert "D0" not in taken.verdict


def test_a_gain_that_may_be_chance_is_none(open_run: Open) -> None:
    """Symptom: the best of several iterations is a hair above the warm-up, and that is called a success."""
    run = open_run(BEST, ALL, ON_RANKS)
    better = [3] * (NUM_QUERIES - 2) + [1, 4]
    taken = verdict(run, {0: ([3] * NUM_QUERIES, ranks(0)), 1: (better, ranks(1))})
    assert taken.iteration == 1
    assert taken.verdict.startswith("The duel is NOT shown to have paid: G of iteration 1 is above G0 by .")
    assert re.search(r"MRR@10 on 40 dev queries \(95 % -\.\d+ to \.\d+, p 1\.000\), which", taken.verdict)
    assert "which may be chance. D over G of iteration 1" in taken.verdict, "all of dev was measured"


def test_a_game_is_judged_by_answers_too(open_run: Open) -> None:
    run = open_run(BEST, ALL, "evaluation.metrics=[A@1]")
    places = {0: ([2] * NUM_QUERIES, ranks(0)), 1: ([1] * NUM_QUERIES, ranks(1))}
    write_rankings(run, places)
    record(run, (0.0, 0.1), (1.0, 0.1), metric="A@1")
    taken = run.once("take", take_iteration, data_of(("Paris",)))
    assert taken.verdict.startswith(
        "The duel paid: G of iteration 1 is above G0 by 1.000 +- .000 A@1 on 40 dev queries"
    )


@pytest.mark.parametrize(("most", "left"), [("null", 0), ("30", 10)])
def test_questions_of_which_answers_alone_are_known_could_tell_no_more(open_run: Open, most: str, left: int) -> None:
    """Symptom: with all of dev measured by MRR@10, "20 more dev queries would tell more"; these have answers alone."""
    run, data = open_run(BEST, f"evaluation.max_dev_queries={most}", ON_RANKS), data_of()
    data.dataset.qrels["dev"] |= {f"unjudged{row}": {} for row in range(15)} | {
        f"refused{row}": {"n0": 0} for row in range(5)
    }
    verdict(run, {0: (ranks(0), ranks(1)), 1: (ranks(2), ranks(3))}, data)
    assert read_record(run.folder.duel, Duel, "it").num_left == left


def told(taken: int, *means: float, p: float = 0.001) -> str:
    retriever = [Difference(t, mean, 0.004, p) for t, mean in enumerate(means, 1)]
    return Duel(taken, "MRR@10", 300, retriever, ["G0", "G"], [], ["D0", "D"]).told


def test_a_worse_last_iteration_that_is_taken_all_the_same_is_told() -> None:
    assert told(2, 0.012, -0.05) == (
        "The duel did NOT pay: G of iteration 2 is taken although another iteration is above G0 by more than chance; "
        "G of iteration 2 is below G0 by .050 +- .004 MRR@10 on 300 dev queries (p .001)."
    )
    assert (
        told(1, 0.012)
        == "The duel paid: G of iteration 1 is above G0 by .012 +- .004 MRR@10 on 300 dev queries (p .001)."
    )
    assert told(1, 0.012, p=0.05).startswith("The duel is NOT shown to have paid: G of iteration 1 is above G0 by .012")


def test_a_verdict_by_a_sample_says_that_more_could_be_known() -> None:
    """Symptom: a gain of four standard errors on all of dev was "did NOT pay" on the sample that the run measured."""
    few = Duel(1, "MRR@10", 300, [Difference(1, 0.013, 0.008, 0.17)], ["G0", "G"], [], ["D0", "D"], num_left=1548)
    assert few.told == (
        "The duel is NOT shown to have paid: G of iteration 1 is above G0 by .013 +- .008 MRR@10 on 300 dev queries "
        "(p .170), which may be chance. 1548 more dev queries would tell more (evaluation.max_dev_queries)."
    )


def test_training_without_a_ranker_is_no_duel() -> None:
    alone = Duel(1, "R@5", 20, [Difference(1, 0.1, 0.01, 0.002)], ["G0", "G"], [], [])
    assert alone.told.startswith(
        "The training after the warm-up paid: G of iteration 1 is above G0 by .100 +- .010 R@5"
    )


def test_a_single_query_has_no_standard_error() -> None:
    one = replace(Difference(1, -0.5, 0.1, 1.0), standard_error=None)
    assert one.told_of("D0") == "below D0 by .500 (p 1.000)"
    assert replace(one, mean=0.0).told_of("D0") == "level with D0"


def test_an_interval_is_told_as_the_distance_is() -> None:
    """What is below may be so by less than nothing, which is above."""
    below = Difference(1, -0.01, 0.008, 0.2, -0.025, 0.006)
    assert below.told_of("G0") == "below G0 by .010 +- .008 (95 % -.006 to .025, p .200)"


def test_an_interval_that_ends_at_nothing_has_no_sign() -> None:
    """Symptom: `below G0 by .010 +- .010 (95 % -.000 to .030, p 1.000)`."""
    below = Difference(1, -0.01, 0.01, 1.0, -0.03, 0.0)
    assert below.told_of("G0") == "below G0 by .010 +- .010 (95 % .000 to .030, p 1.000)"


def test_the_log_names_the_iteration_that_is_taken_the_warm_up_too() -> None:
    """Symptom: `take 0.0s why best on dev by MRR@10`, since counts of 0 are left out."""
    assert one_line(Taken(0, "best on dev by MRR@10", "told below")) == "iteration 0  why best on dev by MRR@10"


def test_a_game_that_changed_nothing_is_level() -> None:
    assert told(0, 0.0, p=1.0).endswith("; G of iteration 1 is level with G0 by MRR@10 on 300 dev queries.")


def test_a_stage_that_judges_needs_no_judgements_of_the_test_split(open_run: Open) -> None:
    data = data_of()
    data.dataset.qrels = OnlyDev(data.dataset.qrels)
    run = open_run(BEST, ALL, ON_RANKS)
    write_rankings(run, {0: (ranks(0), ranks(1)), 1: (ranks(2), ranks(3))})
    record(run, (0.1, 0.1), (0.2, 0.2))
    assert take_iteration(Stage(run, "take"), data).verdict


class OnlyDev(dict[str, Any]):
    """Judgements of dev; whoever asks for those of another split is caught."""

    def __getitem__(self, split: str) -> Any:
        assert split == "dev", f"the judgements of {split} were read"
        return super().__getitem__(split)

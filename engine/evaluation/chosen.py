"""Which iteration of a run is taken: for the last table, the exports and the commands, by the dev split alone.

Everything here is read from what the ledger has of `evaluate/T`, so that it is the same on all ranks and after a
resume. The metric is that of `run.keep_best`, by which checkpoints are kept too, else MRR@10 where dev allows it: the
same by which the rows of the table are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.metric_names import compared_by
from engine.config.recipe import Config
from engine.data.corpus import sample_queries
from engine.errors import ConfigError
from engine.evaluation.systems import RANKER
from engine.results import Measured
from engine.run import Run
from shards.records import Dataset, Query

_DOUBT = 0.001
"""Keeps the odds of a metric of 0 or 1 finite."""


@dataclass(frozen=True, slots=True)
class OnDev:
    """A model on dev after each iteration that was measured.

    Attributes:
        metric: By which one.
        values: Iteration, from 0 for the warm-up, to the metric; empty where dev has no queries.
    """

    metric: str
    values: dict[int, float]


def plays_iterations(config: Config) -> bool:
    """Tell whether a recipe's models go through iterations together, one of which is taken at the end."""
    table = config.timetable
    return config.learns_from_queries and table.ends is None and table.iterations > 0


def on_dev(run: Run, model: str) -> OnDev:
    """Return what the ledger has of a model on dev.

    Args:
        run: The run.
        model: Its name in the recipe.

    Raises:
        ConfigError: `run.keep_best` names a metric that was not measured on dev.
    """
    config, asked, found = run.config, run.config.run.keep_best, dict[int, Measured]()
    for iteration in range(run.timetable.iterations + 1):
        result = run.result_of(f"evaluate/{iteration}", Measured)
        if result is not None and result.scores:
            found[iteration] = result
    if not found:
        return OnDev(compared_by(config.evaluation.metrics, asked) or "", {})
    known = {name for result in found.values() for score in result.scores for name in score.metrics}
    metric = compared_by([name for name in config.evaluation.metrics if name in known], asked)
    if metric is None or (asked is not None and metric != asked):
        raise ConfigError(
            f"iterations are compared by {asked or ' or '.join(config.evaluation.metrics)}, "
            f"but dev was measured by {', '.join(sorted(known))}",
            expected="a metric that the dev split allows",
            remedy="name one of these as run.keep_best",
        )
    values = {iteration: result.value_of(model, metric) for iteration, result in found.items()}
    return OnDev(metric, {iteration: value for iteration, value in values.items() if value is not None})


def best_iteration(run: Run, last: int) -> int:
    """Return the iteration whose retriever is best on dev, the warm-up included; of equal ones the first.

    Args:
        run: The run.
        last: The newest finished iteration, which is returned where dev has no queries, or where models go through no
            iterations together.
    """
    if not plays_iterations(run.config):
        return last
    values = {t: value for t, value in on_dev(run, run.timetable.encoder).values.items() if t <= last}
    return max(values, key=lambda iteration: values[iteration]) if values else last


def taken_iteration(run: Run, last: int) -> int:
    """Return the iteration that `evaluation.iteration` takes; arguments as of `best_iteration`."""
    return last if run.config.evaluation.iteration == "last" else best_iteration(run, last)


def ranker_of(config: Config) -> str | None:
    """Return the name of a recipe's ranker; None where it has none."""
    return next((name for name, section in config.models.items() if section.kind == RANKER), None)


def ranker_has_led(run: Run, before: int) -> bool:
    """Tell whether the ranker was above the retriever on dev after any iteration before one.

    Args:
        run: The run; both were measured after each of these iterations.
        before: The iteration; the warm-up is 0.
    """
    ranker = ranker_of(run.config)
    if ranker is None:
        return False
    own, others = on_dev(run, ranker).values, on_dev(run, run.timetable.encoder).values
    return any(own[t] > others[t] for t in own.keys() & others.keys() if t < before)


def trust_on_dev(run: Run, iteration: int) -> float:
    """Return what a ranker's word counts beside a label, by the metric of ranker and retriever on dev (`trust_by`).

    Args:
        run: The run.
        iteration: After which both were measured; the newest measured one up to there counts.

    Returns:
        0..1.

    Raises:
        ConfigError: Neither was measured on dev.
    """
    ranker = ranker_of(run.config)
    own = on_dev(run, ranker).values if ranker is not None else {}
    others = on_dev(run, run.timetable.encoder).values
    both = [t for t in own.keys() & others.keys() if t <= iteration]
    if not both:
        require_dev([], "ar2.teacher=dev")
    return trust_by(own[max(both)], others[max(both)])


def trust_by(ranker: float, retriever: float) -> float:
    """Return what a ranker's word counts: its share in the odds o = m / (1 - m) of the metrics of both.

    Args:
        ranker: Its metric, 0..1.
        retriever: The retriever's.

    Returns:
        Between 0 and 1; a half for equals.
    """
    ahead, behind = ((metric + _DOUBT) / (1 - metric + _DOUBT) for metric in (ranker, retriever))
    return ahead / (ahead + behind)


def require_decidable(config: Config, dataset: Dataset) -> None:
    """Refuse options that are decided on dev where dev has no queries, before any work is done.

    Args:
        config: With these options, and the sample of dev queries.
        dataset: The data.

    Raises:
        ConfigError: As of `require_dev`.
    """
    for option in config.decided_on_dev:
        require_dev(sample_queries(dataset, "dev", config.evaluation.max_dev_queries, config.run.seed), option)


def require_dev(queries: Sequence[Query], option: str) -> None:
    """Refuse an option that is decided on dev where dev has no queries.

    Args:
        queries: Of dev that are measured.
        option: Which one, such as `ar2.adversarial_from=lead`.

    Raises:
        ConfigError: There are none.
    """
    if not queries:
        raise ConfigError(
            f"{option} is decided on dev, which has no queries in these data",
            expected="judged dev queries",
            remedy="add a dev split, or leave the option out",
        )

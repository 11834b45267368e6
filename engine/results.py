"""What a finished stage returned: as the ledger keeps it, as its caller gets it, as the log tells it.

A stage's function returns a frozen dataclass. Fields with the metadata `NOT_SHOWN` are left out of the log's line; a
class with a method `shown` says itself what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from engine.config.timetable import iteration_name
from shards.files import parse_record, read_json

R = TypeVar("R")
NOT_SHOWN = {"shown": False}
"""Metadata of a result's field that the log's line of a finished stage leaves out."""
_HEADLINES = ("MRR@10", "R@1", "A@1")


@dataclass(frozen=True, slots=True)
class _Ledger:
    stages: dict[str, dict[str, Any]]


def read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    """Read the finished stages of a run, in their order, each with its seconds and its result.

    Args:
        path: `ledger.json` of the run.

    Returns:
        Nothing where there is no file: no stage is finished.

    Raises:
        ArtifactError: The file is no JSON, or has another form.
    """
    if not path.exists():
        return {}
    # It is not deleted like what one stage can write again: all stages have written it.
    what = "the ledger of finished stages"
    remedy = f"restore {path} from a copy: without it a start goes through all stages once more"
    return parse_record(read_json(path, what, remedy=remedy), _Ledger, f"{what} {path}", remedy=remedy).stages


def plain_of(result: object) -> Any:
    """Return a result as JSON holds it."""
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def in_form(function: Callable[..., R], plain: Any, name: str) -> R:
    """Return a stage's result as its function's annotation has it: what JSON holds, or a dataclass.

    Args:
        function: The stage's.
        plain: What the ledger or another rank has.
        name: The stage's, for the error.

    Raises:
        ArtifactError: The annotation names a dataclass, and this is none of that form.
    """
    annotation: Any = getattr(function, "__annotations__", {}).get("return")
    if annotation is not None:
        # Alone: the annotations of arguments may name what is imported for type checks only.
        own = SimpleNamespace(__annotations__={"return": annotation})
        annotation = get_type_hints(own, getattr(function, "__globals__", {}))["return"]
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        return plain  # type: ignore[no-any-return]
    remedy = "choose another run.path: other code recorded it"
    typed: Any = parse_record(plain, annotation, f"the result of {name} in the ledger", remedy=remedy)
    return typed  # type: ignore[no-any-return]


def one_line(result: object) -> str:
    """Return what the log tells of a stage's result: its numbers and texts, or what its `shown` returns.

    Counts of nothing are left out: of a dozen reasons to leave documents out, a run has two.
    """
    if is_dataclass(result):
        if hasattr(result, "shown"):
            values: Mapping[str, Any] = result.shown()
        else:
            values = {one.name: getattr(result, one.name) for one in fields(result) if one.metadata.get("shown", True)}
    else:
        values = result if isinstance(result, dict) else {}
    shown: dict[str, int | float | str] = {}
    for name, value in values.items():
        parts = {f"{key}_{name}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        shown |= {
            key: part for key, part in parts.items() if isinstance(part, int | float | str) and not _is_no_count(part)
        }
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _is_no_count(part: float | str) -> bool:
    return type(part) is int and part == 0


@dataclass(frozen=True, slots=True)
class Score:
    """How good one system is."""

    system: str
    """Its name in the table."""
    kind: str
    """Which sort of system it is, as in `engine.evaluation.systems.System`."""
    model: str | None
    """Whose weights it has; None for a system without."""
    iteration: int | None
    """Which of its weights; None for the state before training, and for a system without weights."""
    metrics: dict[str, float]

    @classmethod
    def of(
        cls,
        system: str,
        kind: str,
        model: str | None,
        iteration: int | None,
        metrics: dict[str, float],
        compared_by: str | None,
    ) -> Score:
        """Keep the few metrics that a line of the log has room for, and that by which iterations are compared.

        The summary has all.
        """
        names = dict.fromkeys((*_HEADLINES, compared_by))
        return cls(system, kind, model, iteration, {name: metrics[name] for name in names if name in metrics})


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of a stage that evaluates; without scores where the split has no queries."""

    scores: tuple[Score, ...] = ()

    def shown(self) -> dict[str, float]:
        """Return what the log tells: each metric by the system's name and its own."""
        return {f"{score.system} {name}": value for score in self.scores for name, value in score.metrics.items()}

    def value_of(self, model: str, metric: str) -> float | None:
        """Return a metric of the first system with a model's weights; None where it was not measured.

        Args:
            model: Its name in the recipe.
            metric: Such as `MRR@10`.
        """
        return next((score.metrics.get(metric) for score in self.scores if score.model == model), None)


LAST_STAGE = "export"
"""The stage after which nothing of a recipe is left to do."""
STALENESS = "staleness"
"""First word of the stages that compare a refresh with the one before; the second is the iteration."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Result of a stage `staleness/ITERATION`: how far the index had fallen behind when it was made anew.

    Attributes:
        before: Iteration whose index was drawn from until then.
        lag_steps: Optimizer steps of the retriever between the two indexes' weights.
        weights_changed: Norm of the difference of both weights, relative to the norm of the older ones.
        kept: Mean share of a query's new candidates that were among its old ones, 0 to 1; None where no query was
            searched both times.
        queries: Over which that is the mean.
        kept_best: The same share of a query's best tenth: of its new best among its old best.
        kept_best_rescored: The same, where the old candidates stand by scores of the new weights; None where they were
            not scored by these.
    """

    before: int
    lag_steps: int
    weights_changed: float
    kept: float | None
    queries: int
    kept_best: float | None = None
    kept_best_rescored: float | None = None


def kept_shares(stages: Mapping[str, Any]) -> dict[int, float | None]:
    """Return what a ledger has of refreshes: iteration to the share of candidates that it kept.

    Args:
        stages: Name to what the ledger has of a stage.

    Raises:
        ArtifactError: The ledger holds another form.
    """
    found = {}
    for name, stage in stages.items():
        kind, _, iteration = name.partition("/")
        if kind == STALENESS and iteration.isdigit():
            found[int(iteration)] = parse_record(stage["result"], Staleness, f"the result of {name}").kept
    return found


def ranking_names(row: Mapping[str, Any]) -> list[str]:
    """Return the names that the TREC file of a row may have (`System.run_file_name`), those that say most first.

    Args:
        row: Of the summary, as JSON holds it.
    """

    def parts(name: str, iteration: int | None) -> list[str]:
        return [name, *([] if iteration is None else [iteration_name(iteration)])]

    own = [row["split"], *parts(row["system"], row["iteration"])]
    stems = [[*own, "over", *parts(row["over"], row["over_iteration"])]] if row["over"] else []
    if not row["over"] or row["over_iteration"] == row["iteration"]:
        stems.append(own)
    sample = f"{row.get('num_queries')}-queries"
    return ["-".join([*stem, *end]) + ".trec" for stem in stems for end in ([sample], [])]

"""A visit to a phase of training, on what the last refresh found, with the scores of the newest retriever.

Algorithm 1 has one line for it. Where its candidates are stale and are to be scored anew (`ar2.rescore`), that is a
stage of its own before the phase's (`engine.refresh.rescoring`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from engine.config.timetable import Visit
from engine.data.batches import rows_drawn
from engine.data.candidates import Candidates
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource
from engine.refresh.refresh import candidates_of, pooled
from engine.refresh.rescoring import rescore_candidates, stamp_of_rescored
from engine.run import Run, Stage
from engine.training.models import Models

P = ParamSpec("P")
R = TypeVar("R")


def visit(
    run: Run,
    stage: str,
    train: Callable[Concatenate[Stage, Models, Data, NegativeSource, P], R],
    models: Models,
    data: Data,
    found: NegativeSource,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Run a visit to a phase as a stage, on candidates with the newest scores where the recipe asks for these.

    Args:
        run: Whose folder takes the artifacts.
        stage: The visit's.
        train: What its phase is.
        models: All models.
        data: Corpus and training queries.
        found: What the last finished refresh found.
        args: For `train`.
        kwargs: For `train`.

    Returns:
        What `train` returns.

    Raises:
        ArtifactError: Candidates, weights or embeddings are missing or damaged.
        TrainingError: The newest weights give a score that is not finite.
        CoordinationError: As of `Run.once`.
        Preempted: As of `Run.once`.
        StopReached: As of `Run.once`.
    """
    fresh = rescored_when_stale(run, data, found, run.timetable.visit(stage))
    return run.once(stage, train, models, data, fresh, *args, **kwargs)


def rescored_when_stale(run: Run, data: Data, found: NegativeSource, visit: Visit) -> NegativeSource:
    """Return what a visit to a phase draws from: what there is, or the same with the scores of the newest retriever.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        found: What the last finished refresh found.
        visit: Of the timetable.

    Raises:
        ArtifactError: Candidates, weights or embeddings are missing or damaged.
        TrainingError: The newest weights give a score that is not finite.
    """
    if visit.rescored_by is None or run.is_finished(visit.stage):
        return found
    table = run.timetable
    name, visits = visit.rescored, table.rescored[visit.rescored]
    rows = rows_drawn(visits, run.config.run.seed, len(data.train))
    mined = candidates_of(run, data, visit.candidates)
    run.once(f"rescore/{name}", rescore_candidates, data, mined, visit, rows)
    scored = Candidates.load(run.folder.candidates(name), stamp_of_rescored(run, data, visit))
    joint = table.joint.get(visit.candidates)
    if joint is None:
        return scored
    sources = dict(
        (name, scored) if member == visit.candidates else (member, candidates_of(run, data, member))
        for member in joint.members
    )
    within = {member: candidates_of(run, data, member) for member in joint.within}
    needed = max(one.phase.num_negatives for one in visits)
    return pooled(run, data, joint, name, sources, within, rows=rows, needed=needed)

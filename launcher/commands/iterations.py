"""Iterations as a command line names them: `0`, `0,3`, `0..3`, `last`, `all`; of rankers `none` as well."""

from __future__ import annotations

import re

from engine.config.timetable import WeightsOf
from engine.errors import ConfigError
from engine.evaluation.contestants import published
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.systems import RANKER, system_of
from engine.retrievers.kinds import KINDS
from engine.run import Run

NO_RANKER = "none"
"""The word for retrievers alone, where rankers could be named."""
_PART = re.compile(r"(\d+|last)(?:\.\.(\d+|last))?")


def iterations_in(words: str, *, last: int, option: str) -> list[int]:
    """Read iterations.

    Args:
        words: Numbers and ranges with both ends, separated by commas, where `last` is the newest; or `all`.
        last: The newest finished iteration; 0 is the warm-up.
        option: Where the words come from, for the error.

    Returns:
        Each iteration once, ascending.

    Raises:
        ConfigError: The words are of another form, or name an iteration that is not finished.
    """
    found: set[int] = set()
    for word in ("0..last" if words.strip() == "all" else words).split(","):
        part = _PART.fullmatch(word.strip())
        if part is None:
            raise ConfigError(f"{option} is {words!r}", expected="such as 0, 0,3, 0..3, last or all")
        first, end = (last if one == "last" else int(one) for one in (part[1], part[2] or part[1]))
        if first > end or end > last:
            raise ConfigError(
                f"{option} names {word.strip()}, but the newest finished iteration is {last}",
                expected=f"iterations from 0, the warm-up, to {last}, ranges ascending",
            )
        found.update(range(first, end + 1))
    return sorted(found)


def states_in(run: Run, words: str | None, *, rankers: bool, option: str, taken: int | None = None) -> list[WeightsOf]:
    """Return the states of a run's rankers, or of what searches its corpus, whose iterations are named.

    Args:
        run: The run.
        words: As of `iterations_in`, where the last is the newest of these models; None for the last of each, or for
            the states that have rows in the recipe's own table.
        rankers: Which of the two.
        option: Where the words come from, for the error.
        taken: The iteration that is taken where no words name any; None for the newest.

    Raises:
        ConfigError: The words are of another form, or name what is not there.
    """
    there = [one for one in published(run) if _is_ranker(run, one) == rankers and (rankers or _searches(run, one))]
    newest = max((one.iteration or 0 for one in there), default=0)
    measured = run.timetable.measured
    if words is not None:
        wanted = iterations_in(words, last=newest, option=option)
        found = [one for one in there if one.iteration in wanted]
    elif measured is not None:
        found = [one for one in there if one in measured]
    else:
        upto = newest if taken is None else taken
        found = list({one.model: one for one in there if (one.iteration or 0) <= upto}.values())
    if not found:
        kind = "ranker" if rankers else "retriever"
        raise ConfigError(
            f"{run.folder.path} has no {kind}" + " of the iterations that were asked for" * bool(there),
            expected=f"one of {', '.join(f'{one.model} {one.iteration}' for one in there)}"
            if there
            else f"a run with a trained {kind}",
        )
    return found


def rankers_in(run: Run, words: str | None, *, taken: int | None = None) -> list[WeightsOf]:
    """Return the states of a run's rankers that `--ranker` names; none for its word `none`.

    Args:
        run: The run. Where its recipe has no ranker (ANCE), nothing asked for is none.
        words: As of `states_in`, or `NO_RANKER`.
        taken: As of `states_in`.

    Raises:
        ConfigError: The words are of another form, or name what is not there.
    """
    if words == NO_RANKER or (words is None and not any(_is_ranker(run, one) for one in published(run))):
        return []
    return states_in(run, words, rankers=True, option="--ranker", taken=taken)


def _is_ranker(run: Run, weights: WeightsOf) -> bool:
    return run.config.models[weights.model].kind == RANKER


def _searches(run: Run, weights: WeightsOf) -> bool:
    return retriever_of(system_of(run.config, weights)).kind in KINDS

"""Tells the outcomes: one table of checks and hosts, and below it every problem with its remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from launcher.preflight.outcome import Outcome, Problem, names
from launcher.preflight.records import Severity
from shards.errors import counted

_MOST_COLUMNS = 6
_FOUND_CHARACTERS = 58
_LINE_CHARACTERS = 120


def table(outcomes: Sequence[Outcome], hosts: Sequence[str]) -> str:
    """Lay out checks by hosts.

    Args:
        outcomes: From `checks.examine`.
        hosts: All hosts, in order; where there are many, those on which all is alike share a column.

    Returns:
        A table whose cells are `ok`, `warning`, `PROBLEM`, or `-` where nothing is known.
    """
    cells = {host: tuple(_cell(outcome, host) for outcome in outcomes) for host in hosts}
    columns: dict[str, tuple[str, ...]] = {}
    if len(hosts) <= _MOST_COLUMNS:
        columns = cells
    else:
        alike: dict[tuple[str, ...], list[str]] = {}
        for host, column in cells.items():
            alike.setdefault(column, []).append(host)
        for column, members in alike.items():
            columns[members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} more"] = column
    rows = [
        [outcome.check, *(column[place] for column in columns.values()), _wrapped(outcome.found)]
        for place, outcome in enumerate(outcomes)
    ]
    return tabulate(rows, headers=["check", *columns, "found"], tablefmt="simple")


def problems(outcomes: Sequence[Outcome], severity: Severity | None = None) -> list[Problem]:
    """Return the problems of all outcomes, errors first, or those of one severity."""
    found = [problem for outcome in outcomes for problem in outcome.problems]
    if severity is not None:
        return [problem for problem in found if problem.severity == severity]
    return sorted(found, key=lambda problem: problem.severity != "error")


def listing(found: Sequence[Problem]) -> str:
    """Write problems as numbered paragraphs: where, what, and the remedy on a line of its own.

    Lines that a fact itself holds, such as another program's output, stay as they are.
    """
    paragraphs = []
    for number, problem in enumerate(found, start=1):
        head = (
            f"{number}. {'warning, ' if problem.severity == 'warning' else ''}{names(problem.hosts)}: {problem.check}: "
        )
        indent = " " * len(f"{number}. ")
        fact, *output = problem.fact.splitlines()
        lines = [_fill(head + fact + ("" if output else "."), indent), *output]
        paragraphs += [*lines, _fill(f"{indent}remedy: {problem.remedy}.", indent + "  ")]
    return "\n".join(paragraphs)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Count problems and warnings in words."""
    errors, warnings = len(problems(outcomes, "error")), len(problems(outcomes, "warning"))
    told = [counted(errors, "problem")] if errors else []
    told += [counted(warnings, "warning")] if warnings else []
    return " and ".join(told) or f"all {len(outcomes)} checks passed"


def _cell(outcome: Outcome, host: str) -> str:
    own = {problem.severity for problem in outcome.problems if host in problem.hosts}
    if "error" in own:
        return "PROBLEM"
    if "warning" in own:
        return "warning"
    return "ok" if host in outcome.examined else "-"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _FOUND_CHARACTERS, break_long_words=False, break_on_hyphens=False))


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(
        text, _LINE_CHARACTERS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )

"""What a check says: problems with their hosts and remedies, and the state of things in a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from launcher.preflight.records import Facts, Severity
from shards.errors import listed

T = TypeVar("T")
_LISTED = 6


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found: on which hosts, what, and what to do."""

    check: str
    hosts: tuple[str, ...]
    fact: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        """Return the problem as one paragraph."""
        return f"{names(self.hosts)}: {self.check}: {self.fact}. Remedy: {self.remedy}."


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check has found on all hosts."""

    check: str
    found: str
    """The state of things in a few words, for the table."""
    problems: list[Problem] = field(default_factory=list)
    examined: tuple[str, ...] = ()
    """Hosts of which the check knows something."""


def names(hosts: Iterable[str]) -> str:
    """Return host names as a text, cut where there are many."""
    return listed(hosts, _LISTED)


def having(hosts: Sequence[Facts], fact: Callable[[Facts], T | None]) -> tuple[list[tuple[Facts, T]], tuple[str, ...]]:
    """Return the hosts of which a fact is known, each with it, and their names."""
    found = [(facts, value) for facts in hosts if (value := fact(facts)) is not None]
    return found, tuple(facts.host for facts, _ in found)


class Groups:
    """Hosts grouped by a value; the largest group first, of equal ones that of the first host.

    Args:
        values: (host, value) in the order of the hosts; a value is anything with a `repr` that tells it from others.
    """

    def __init__(self, values: Iterable[tuple[str, Any]]) -> None:
        found: dict[str, tuple[Any, list[str]]] = {}
        for host, value in values:
            found.setdefault(repr(value), (value, []))[1].append(host)
        self.members = sorted(found.values(), key=lambda group: -len(group[1]))  # the sort is stable

    @property
    def unlike(self) -> bool:
        """Whether there is more than one value."""
        return len(self.members) > 1

    @property
    def outliers(self) -> tuple[str, ...]:
        """Hosts outside the largest group; all of them where no group is larger than the others."""
        if self.unlike and len(self.members[0][1]) == len(self.members[1][1]):
            return tuple(host for _, hosts in self.members for host in hosts)
        return tuple(host for _, hosts in self.members[1:] for host in hosts)

    def __str__(self) -> str:
        """Say which hosts have which value."""
        return "; ".join(f"{'none' if value is None else value} on {names(hosts)}" for value, hosts in self.members)

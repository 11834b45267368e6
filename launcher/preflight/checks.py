"""Judges the facts of all hosts, all of them, so that every problem is told at once.

An error stops a run before it begins; a warning is only told. What a host could not examine is judged nowhere: why it
could not is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from launcher.preflight.disks import (
    check_data,
    check_local_disk,
    check_models,
    check_run_folder,
    check_space,
)
from launcher.preflight.machines import (
    check_clock,
    check_cores_and_memory,
    check_devices,
    check_environment,
    check_index,
    check_reach,
    check_software,
    check_user,
)
from launcher.preflight.outcome import Groups, Outcome, Problem, having
from launcher.preflight.own_folder import check_own_folder
from launcher.preflight.records import Facts, Judgement
from launcher.preflight.space import Space
from shards.errors import counted, listed

_LISTED = 6


def examine(hosts: Sequence[Facts], space: Space | None) -> list[Outcome]:
    """Run all checks.

    Args:
        hosts: Facts of each host; the first is where rank 0 runs.
        space: What the recipe will write, where it was estimated.

    Returns:
        One outcome a check, in the order of a table; checks about which nothing is known are left out.
    """
    known = [facts for facts in hosts if facts.unreachable is None]
    outcomes = [check_reach(hosts), *(check(known) for check in _CHECKS)]
    outcomes.insert(_SPACE_AT, check_space(known, space))
    outcomes.insert(_SPACE_AT + 1, check_own_folder(known, space))
    outcomes.insert(_INDEX_AT, check_index(known, space))
    return [_joined(outcome) for outcome in outcomes if outcome.examined]


def _joined(outcome: Outcome) -> Outcome:
    """Tell what is the same on several hosts once."""
    hosts: dict[Problem, tuple[str, ...]] = {}
    for problem in outcome.problems:
        alike = replace(problem, hosts=())
        hosts[alike] = tuple(dict.fromkeys((*hosts.get(alike, ()), *problem.hosts)))
    return replace(outcome, problems=[replace(problem, hosts=members) for problem, members in hosts.items()])


def check_configuration(hosts: Sequence[Facts]) -> Outcome:
    """Find ranks that were started with other words than rank 0."""
    known, examined = having(hosts, lambda facts: facts.configuration)
    groups = Groups((facts.host, differences) for facts, differences in known if differences)
    problems = []
    for differences, members in groups.members:
        fact = f"another configuration than rank 0's: {listed(differences, _LISTED, '; ')}"
        remedy = (
            "give all hosts the same --config file and the same words; where a remote shell has expanded $, ~, * or "
            "quotes in a word, write that value into the file"
        )
        problems.append(Problem("configuration", tuple(members), fact, remedy))
    return Outcome("configuration", "unlike" if problems else "the same on all ranks", problems, examined)


def check_collective(hosts: Sequence[Facts]) -> Outcome:
    """Find ranks on which a small collective operation failed or gave a wrong result."""
    known, examined = having(hosts, lambda facts: facts.ranks)
    problems = []
    for facts, ranks in known:
        failed = [rank for rank in ranks if rank.collective.error]
        for error, members in Groups((str(rank.rank), rank.collective.error) for rank in failed).members:
            fact = f"rank {', '.join(members[:_LISTED])}: {error}"
            remedy = (
                "let the hosts reach each other on all ports of the network between them, and name its interface by "
                "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells what NCCL tries"
            )
            problems.append(Problem("collective", (facts.host,), fact, remedy))
    taken = [rank.collective.seconds for _, ranks in known for rank in ranks]
    seconds = max(taken, default=0.0)
    found = f"all-reduce and all-gather of {counted(len(taken), 'rank')} in {1000 * seconds:.0f} ms"
    return Outcome("collective", "failed" if problems else found, problems, examined)


def _judged(name: str, fact: Callable[[Facts], Judgement | None]) -> Callable[[Sequence[Facts]], Outcome]:
    """Return a check that takes over what was judged where it was found."""

    def check(hosts: Sequence[Facts]) -> Outcome:
        known, examined = having(hosts, fact)
        problems = [Problem(name, (facts.host,), *problem) for facts, judged in known for problem in judged.problems]
        found = next((judged.found for _, judged in known if judged.found), "")
        return Outcome(name, found, problems, examined)

    return check


_CHECKS: tuple[Callable[[Sequence[Facts]], Outcome], ...] = (
    check_software,
    _judged("programs", lambda facts: facts.programs),
    check_configuration,
    check_devices,
    check_cores_and_memory,
    check_user,
    check_run_folder,
    check_local_disk,
    check_data,
    check_models,
    check_environment,
    check_clock,
    _judged("network", lambda facts: facts.network),
    check_collective,
    _judged("barrier", lambda facts: facts.barrier),
    _judged("refresh", lambda facts: facts.refreshers),
    _judged("world", lambda facts: facts.world),
)
_INDEX_AT = _CHECKS.index(check_devices) + 2  # below the devices; put in when space is there already, further down
_SPACE_AT = _CHECKS.index(check_run_folder) + 2  # below the run folder, `reach` being the first

"""The preflight of a run: the ranks examine their hosts and each other, right after their world has opened.

One rank a host collects the facts of the host, each rank those of its device. All ranks judge the same facts, so all
of them refuse together, and rank 0 tells why.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config.file import flatten
from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.log import get_logger
from engine.reliability.processes import boot_id
from launcher.preflight.checks import examine
from launcher.preflight.facts import Needs, collect_facts
from launcher.preflight.folder import leave_mark, remove_mark
from launcher.preflight.outcome import Outcome
from launcher.preflight.own_folder import take_own, with_others
from launcher.preflight.records import Clock, Collective, Facts, Gpu, Judgement, Mark, RankFacts
from launcher.preflight.report import listing, problems, table, verdict
from launcher.preflight.space import Space, estimate_space
from launcher.world.opening import World
from launcher.world.refreshers import refreshers_of, told_of
from shards.errors import counted
from shards.files import parse_record

log = get_logger(__name__)
_COLLECTIVE_SECONDS = 120.0
"""How long a first collective may take; NCCL on many hosts takes tens of seconds to connect."""
_MOST_CHARACTERS = 3500
"""Of the error's text: what ranks tell each other of an error is cut, and all must tell the same."""


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What rank 0 gives to all: the mark in its run folder, and the configuration as it has read it."""

    mark: Mark
    config: dict[str, Any]


def require_preflight(config: Config, world: World) -> None:
    """Examine all hosts before anything is computed. A collective.

    Makes the run folder and leaves nothing in it. Where all is well, rank 0 logs one line; warnings are logged, and
    stop nothing.

    Args:
        config: The recipe, as this rank has read it.
        world: The open world.

    Raises:
        ConfigError: There are problems: the same error on all ranks, with all of them.
        CoordinationError: A rank did not come.
    """
    start = time.monotonic()
    coordinator, path = world.coordinator, config.run.path.absolute()
    own = _Beginning(leave_mark(path), config.model_dump(mode="json")) if world.rank == 0 else None
    refused = True
    try:
        given = coordinator.broadcast("preflight: begin", asdict(own) if own else None)
        begin = parse_record(given, _Beginning, "rank 0's mark and configuration")
        with coordinator.agreement("preflight: collect"):
            report = _report(config, world, begin)
        told = coordinator.gather("preflight: facts", asdict(report))
        reports = [parse_record(one, _Report, f"the facts of rank {rank}") for rank, one in enumerate(told)]
        hosts = _by_host(coordinator.hosts, reports, begin.mark)
        outcomes = examine(hosts, reports[0].space)
        refused = bool(problems(outcomes, "error"))
    finally:
        if own is not None:
            remove_mark(path, own.mark, keep_folder=not refused)
    _tell(outcomes, [facts.host for facts in hosts], world, time.monotonic() - start)


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank tells the others: of itself, and the first rank of a host also of that."""

    own: RankFacts
    boot: str
    now: float
    """Seconds since 1970, by its clock, as it left a barrier."""
    round_trip_seconds: float
    """How long that barrier took."""
    host: Facts | None
    space: Space | None
    """Rank 0's estimate."""


def _report(config: Config, world: World, begin: _Beginning) -> _Report:
    coordinator, host, space = world.coordinator, None, None
    if coordinator.is_first_of_host:
        host = collect_facts(Needs.of(config), begin.mark)
    if world.rank == 0:
        space = estimate_space(config)
    host = _with_marks(world, host)
    coordinator.barrier("preflight: all are here")
    if host is not None:
        take_own(host.own_folder, keep_folder=False)
    before = time.monotonic()
    coordinator.barrier("preflight: round trip")
    now, round_trip = time.time(), time.monotonic() - before
    if host is not None:
        road = {"mpi": "MPI", "store": "a store of torch.distributed", "local": "nothing"}[coordinator.kind]
        barrier = Judgement(f"barrier over {road} in {1000 * round_trip:.1f} ms")
        kept = _refreshers(world, config.refresh_devices)
        host = replace(host, barrier=barrier, network=_rendezvous(world), refreshers=kept)
    own = RankFacts(
        rank=world.rank,
        device=str(world.device),
        collective=try_collectives(world),
        free_bytes=torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else None,
        cores=sorted(os.sched_getaffinity(0)),
        configuration=config_differences(config.model_dump(mode="json"), begin.config),
    )
    return _Report(own, boot_id(), now, round_trip, host, space)


def _with_marks(world: World, host: Facts | None) -> Facts | None:
    """Look for the marks of the other hosts in the folder that is to be this host's own."""
    own = host.own_folder if host is not None else None
    mine = asdict(own.mark) if own is not None and own.mark is not None else None
    told = world.coordinator.gather("preflight: marks in local folders", mine)
    marks = {
        name: parse_record(mark, Mark, f"the mark of {name}")
        for name, mark in zip(world.coordinator.hosts, told, strict=True)
        if mark is not None and name != world.coordinator.host
    }
    if host is None or own is None or own.error:
        return host
    return replace(host, own_folder=with_others(own, marks))


def _by_host(host_of_rank: list[str], reports: list[_Report], mark: Mark) -> list[Facts]:
    """Put together what all ranks tell, by host, rank 0's first."""
    members: dict[str, list[_Report]] = {}
    for name, report in zip(host_of_rank, reports, strict=True):
        members.setdefault(name, []).append(report)
    hosts: list[Facts] = []
    for name, told in members.items():
        facts = next(report.host for report in told if report.host is not None)
        ranks = [report.own for report in told]
        folder = facts.run_folder
        if not hosts and folder is not None and mark.error:
            folder = replace(folder, error=mark.error)
        hosts.append(
            replace(
                facts,
                host=name,
                ranks=ranks,
                boots=[report.boot for report in told],
                configuration=list(dict.fromkeys(text for rank in ranks for text in rank.configuration)),
                gpus=_with_free_memory(facts.gpus or [], ranks),
                cores=len({core for rank in ranks for core in rank.cores}),  # each may be bound to its own
                run_folder=folder,
                # Both have left the same barrier: the later one at most a round trip after the earlier.
                clock=Clock(told[0].now - reports[0].now, told[0].round_trip_seconds + reports[0].round_trip_seconds),
            )
        )
    return hosts


def _with_free_memory(gpus: list[Gpu], ranks: list[RankFacts]) -> list[Gpu]:
    """Add what each rank has measured on its own GPU."""
    measured = {rank.device: rank.free_bytes for rank in ranks}
    return [replace(gpu, free_bytes=measured.get(f"cuda:{number}", gpu.free_bytes)) for number, gpu in enumerate(gpus)]


def try_collectives(world: World) -> Collective:
    """Add up and gather one number a rank through torch.distributed, and look whether the result is right.

    Args:
        world: Whose ranks all call this.
    """
    start, error = time.monotonic(), None
    ranks = range(world.world_size)
    total_1 = torch.tensor([world.rank + 1.0], device=world.device)
    gathered_W1 = [torch.zeros_like(total_1) for _ in ranks]
    limit = timedelta(seconds=_COLLECTIVE_SECONDS)
    try:
        for work in (
            dist.all_gather(gathered_W1, total_1.clone(), async_op=True),
            dist.all_reduce(total_1, async_op=True),
        ):
            if work is not None:
                work.wait(limit)
        expected = [rank + 1.0 for rank in ranks]
        if (found := [number.item() for number in gathered_W1]) != expected or total_1.item() != sum(expected):
            error = (
                f"all-gather gave {found[:8]} and all-reduce {total_1.item()}, not {expected[:8]} and {sum(expected)}"
            )
    except RuntimeError as failure:
        error = f"{dist.get_backend()} failed: {(str(failure).splitlines() or [''])[0]}"
    return Collective(error, round(time.monotonic() - start, 4))


def config_differences(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the fields in which two configurations differ, all of them, as `section.key: other's -> own`.

    Args:
        own: A configuration's `model_dump(mode="json")`.
        other: Another's.
    """
    mine, theirs = flatten(own), flatten(other)
    return [
        f"{key}: {theirs.get(key)!r} -> {mine.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def _rendezvous(world: World) -> Judgement:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return Judgement(f"rank 0 at {address}:{port}" if world.world_size > 1 else "not needed")


def _refreshers(world: World, wanted: int) -> Judgement | None:
    """Judge whether the devices that are kept for refreshes are there; None where none are."""
    if not wanted:
        return None
    try:
        found = refreshers_of(world, wanted)
    except ConfigError as error:
        return Judgement(problems=[(error.fact, error.remedy, "error")])
    return Judgement(told_of(found))


def _tell(outcomes: list[Outcome], hosts: list[str], world: World, seconds: float) -> None:
    """Log what was found on rank 0; raise it on all ranks where it stops the run."""
    errors, warnings = problems(outcomes, "error"), problems(outcomes, "warning")
    laid_out = table(outcomes, hosts)
    if errors:
        if world.rank == 0:
            log.error("preflight\n\n%s\n", laid_out)
        raise ConfigError(_refusal(outcomes))
    if world.rank == 0:
        log.debug("preflight\n\n%s\n", laid_out)
        for warning in warnings:
            log.warning("preflight: %s", warning)
        who = f"{counted(len(hosts), 'host')}, {counted(world.world_size, 'rank')}"
        tried = ", ".join(outcome.found for outcome in outcomes if outcome.check in {"collective", "barrier"})
        log.info("preflight: %s, %s in %.1f s (%s)", who, verdict(outcomes), seconds, tried)


def _refusal(outcomes: list[Outcome]) -> str:
    errors = problems(outcomes, "error")
    head = f"the preflight found {verdict(outcomes)}; nothing was computed\n"
    shown = len(errors)
    while shown > 1 and len(listing(errors[:shown])) > _MOST_CHARACTERS:
        shown -= 1
    rest = f"\nand {len(errors) - shown} more, in the table above" if shown < len(errors) else ""
    return head + listing(errors[:shown])[:_MOST_CHARACTERS] + rest

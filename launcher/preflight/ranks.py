"""The preflight of a run: the ranks examine their hosts and each other, right after their world has opened.

One rank a host collects the facts of the host, each rank those of its device. All ranks judge the same facts, so all
of them refuse together, and rank 0 tells why.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.log import get_logger
from engine.reliability.processes import boot_id
from launcher.preflight.checks import examine
from launcher.preflight.facts import Facts, Needs, collect_facts
from launcher.preflight.folder import leave_mark, remove_mark
from launcher.preflight.outcome import Outcome
from launcher.preflight.report import listing, problems, table, verdict
from launcher.preflight.space import Space, estimate_space
from launcher.world.opening import World

log = get_logger(__name__)
_COLLECTIVE_SECONDS = 120.0
"""How long a first collective may take; NCCL on many hosts takes tens of seconds to connect."""
_MOST_CHARACTERS = 3500
"""Of the error's text: what ranks tell each other of an error is cut, and all must tell the same."""


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
    own = {"mark": leave_mark(path), "config": config.model_dump(mode="json")} if world.rank == 0 else None
    refused = True
    try:
        given = coordinator.broadcast("preflight: begin", own)
        with coordinator.agreement("preflight: collect"):
            facts = _facts_of_rank(config, world, given)
        everybody = coordinator.gather("preflight: facts", facts)
        hosts = _by_host(coordinator.hosts, everybody)
        outcomes = examine(hosts, Space(**everybody[0]["space"]))
        refused = bool(problems(outcomes, "error"))
    finally:
        if own is not None:
            remove_mark(path, own["mark"], keep_folder=not refused)
    _tell(outcomes, [facts["host"] for facts in hosts], world, time.monotonic() - start)


def _facts_of_rank(config: Config, world: World, given: dict[str, Any]) -> Facts:
    facts: Facts = {}
    coordinator = world.coordinator
    if coordinator.is_first_of_host:
        facts = collect_facts(Needs.of(config), given["mark"])
        facts["barrier"] = {"found": "", "problems": []}
    if world.rank == 0:
        facts["space"] = asdict(estimate_space(config))
        if given["mark"]["error"]:
            facts["run_folder"]["error"] = given["mark"]["error"]
    facts["boot"] = boot_id()
    coordinator.barrier("preflight: all are here")
    before = time.monotonic()
    coordinator.barrier("preflight: round trip")
    facts["now"], facts["round_trip_seconds"] = time.time(), time.monotonic() - before
    if "barrier" in facts:
        road = {"mpi": "MPI", "store": "a store of torch.distributed", "local": "nothing"}[coordinator.kind]
        facts["barrier"]["found"] = f"barrier over {road} in {1000 * facts['round_trip_seconds']:.1f} ms"
        facts["network"] = _rendezvous(world)
    facts["rank"] = {
        "rank": world.rank,
        "device": str(world.device),
        "collective": try_collectives(world),
        "free_bytes": torch.cuda.mem_get_info(world.device)[0] if world.device.type == "cuda" else None,
        "cores": sorted(os.sched_getaffinity(0)),
        "configuration": config_differences(config.model_dump(mode="json"), given["config"]),
    }
    return facts


def _by_host(host_of_rank: list[str], everybody: list[Facts]) -> list[Facts]:
    """Put the facts of all ranks together by host, rank 0's first."""
    hosts: dict[str, Facts] = {}
    for name, facts in zip(host_of_rank, everybody, strict=True):
        of_host = hosts.setdefault(name, facts | {"host": name, "ranks": [], "boots": [], "configuration": []})
        of_host["ranks"].append(facts["rank"])
        of_host["boots"].append(facts["boot"])
        of_host["configuration"] += [
            text for text in facts["rank"]["configuration"] if text not in of_host["configuration"]
        ]
        device = facts["rank"]["device"].partition(":")[2]
        if device and int(device) < len(of_host["gpus"]):
            of_host["gpus"][int(device)]["free_bytes"] = facts["rank"]["free_bytes"]
    first = next(iter(hosts.values()))
    for facts in hosts.values():
        facts["cores"] = len(
            {core for rank in facts["ranks"] for core in rank["cores"]}
        )  # each may be bound to its own
        # Both have left the same barrier: the later one at most a round trip after the earlier.
        facts["clock"] = {
            "offset_seconds": facts["now"] - first["now"],
            "uncertainty_seconds": facts["round_trip_seconds"] + first["round_trip_seconds"],
        }
    return list(hosts.values())


def try_collectives(world: World) -> dict[str, Any]:
    """Add up and gather one number a rank through torch.distributed, and look whether the result is right.

    Args:
        world: Whose ranks all call this.

    Returns:
        `error`, what failed, or None; `seconds`, how long both took.
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
    return {"error": error, "seconds": round(time.monotonic() - start, 4)}


def config_differences(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the fields in which two configurations differ, all of them, as `section.key: other's -> own`.

    Args:
        own: A configuration's `model_dump(mode="json")`.
        other: Another's.
    """
    mine, theirs = _flat(own), _flat(other)
    return [
        f"{key}: {theirs.get(key)!r} -> {mine.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _rendezvous(world: World) -> dict[str, Any]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    found = f"rank 0 at {address}:{port}" if world.world_size > 1 else "not needed"
    return {"found": found, "problems": []}


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
        who = f"{len(hosts)} host{'s' * (len(hosts) > 1)}, {world.world_size} rank{'s' * (world.world_size > 1)}"
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

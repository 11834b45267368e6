"""`python -m launcher preflight`: looks at all hosts for what could stop a run, and starts none.

Hosts are those of a hostfile (over ssh), the nodes of a SLURM allocation (by srun), or this one alone.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.reliability.exit_codes import EXIT_REFUSED
from launcher.preflight.outcome import Outcome, Severity

if TYPE_CHECKING:
    from engine.config.recipe import Config
    from launcher.preflight.facts import Facts
    from launcher.preflight.hosts import Conversations
    from launcher.preflight.space import Space


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe that is to run")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="look at these hosts; left out, this one alone")
    parser.add_argument(
        "--launcher", choices=["pdsh", "openmpi", "none"], default="pdsh",
        help="what will start the run over the hostfile (pdsh, as deepspeed's default); none: only look at the hosts",
    )  # fmt: skip
    parser.add_argument("--master_addr", metavar="ADDRESS", help="as it will be given to deepspeed")
    parser.add_argument("--nodes", type=int, metavar="N", help="inside a SLURM allocation: its first N nodes, or all")
    parser.add_argument("--no-world", action="store_true", help="open no small world at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="words over the recipe")


@dataclass(frozen=True, slots=True)
class _Hosts:
    """Which hosts there are and how they are reached; `way` is empty for the one where this runs."""

    names: list[str]
    slots: dict[str, int]
    way: str
    words: Callable[[str], list[str]]
    launcher: str


def run_command(arguments: argparse.Namespace) -> int:
    """Examine the hosts and print what was found; return 0 where nothing stops a run, else 2.

    Raises:
        ConfigError: The configuration is not valid, or there is no such allocation.
        DataError: The hostfile is not valid.
    """
    from engine.config.file import load_config
    from launcher.preflight.hosts import Conversations
    from launcher.preflight.space import estimate_space

    start = time.monotonic()
    config = load_config(arguments.config, arguments.overrides)
    chosen = _choose_hosts(arguments)
    print(
        f"preflight: looking at {len(chosen.names)} host{'s' * (len(chosen.names) > 1)} "
        f"{f'by {chosen.way}' if chosen.way else '(this one)'} ...",
        flush=True,
    )
    with Conversations(chosen.names, chosen.words) as conversations:
        outcomes = _look(conversations, config, chosen, arguments, estimate_space(config))
    _print(outcomes, chosen, time.monotonic() - start)
    return EXIT_REFUSED if _has_errors(outcomes) else 0


def _choose_hosts(arguments: argparse.Namespace) -> _Hosts:
    from engine.errors import ConfigError
    from launcher.preflight.hosts import local_words, srun_words, ssh_words
    from launcher.world.hostfile import parse_hostfile

    if arguments.hostfile is not None:
        hosts = parse_hostfile(arguments.hostfile)
        slots = {host.name: host.slots for host in hosts}
        return _Hosts(list(slots), slots, "ssh", ssh_words, arguments.launcher)
    if nodes := os.environ.get("SLURM_JOB_NODELIST"):
        names = _slurm_nodes(nodes)
        if arguments.nodes and arguments.nodes > len(names):
            raise ConfigError(
                f"--nodes {arguments.nodes} is asked for, but the allocation has {len(names)}: {', '.join(names)}",
                remedy="leave --nodes out, or ask for a larger allocation",
            )
        return _Hosts(names[: arguments.nodes], {}, "srun", srun_words, "srun")
    if arguments.nodes:
        raise ConfigError(
            f"--nodes {arguments.nodes} is asked for, but this is no SLURM allocation",
            expected="--hostfile, or a shell inside an allocation",
            remedy="start it by `salloc --nodes N` or in a batch script; or name the hosts with --hostfile",
        )
    name = os.uname().nodename
    return _Hosts([name], {}, "", local_words, "none")


def _slurm_nodes(nodes: str) -> list[str]:
    from engine.errors import ConfigError

    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"the nodes of the allocation ({nodes}) cannot be listed: {error}",
            remedy="see whether `scontrol show hostnames` works here",
        ) from error
    return told.stdout.split()


def _look(
    conversations: Conversations, config: Config, chosen: _Hosts, arguments: argparse.Namespace, space: Space
) -> list[Outcome]:
    """Ask all hosts for everything, then open a small world where nothing speaks against it."""
    from launcher.preflight.checks import examine

    facts: dict[str, Facts] = {}
    path = str(config.run.path.absolute())
    marker = (conversations.reached or [""])[0]
    mark = conversations.ask("mark", [marker], path=path).get(marker)
    try:
        if mark is not None:
            facts = _facts(conversations, config, chosen, mark)
            _add_network(facts, conversations, chosen, arguments.master_addr)
        outcomes = examine(_merged(facts, conversations, chosen), space)
        if mark and not (
            arguments.no_world or _has_errors(outcomes) or (chosen.way == "ssh" and chosen.launcher == "none")
        ):
            tried = _try_world(facts, config, chosen, arguments, mark)
            for own in facts.values():
                own["world"] = tried
            outcomes = examine(_merged(facts, conversations, chosen), space)
    finally:
        if mark is not None:
            conversations.ask("unmark", [marker], path=path, mark=mark)
    return outcomes


def _facts(conversations: Conversations, config: Config, chosen: _Hosts, mark: dict[str, Any]) -> dict[str, Facts]:
    from launcher.preflight.facts import Needs

    facts = conversations.ask("facts", needs=Needs.of(config).to_json(), mark=mark)
    offsets = conversations.clock_offsets()
    first = next(iter(offsets.values()), {"offset_seconds": 0.0, "uncertainty_seconds": 0.0})
    for host, own in facts.items():
        own |= {"boots": [own["boot"]], "slots": chosen.slots.get(host), "device": config.run.device}
        if host in offsets:
            own["clock"] = {
                "offset_seconds": offsets[host]["offset_seconds"] - first["offset_seconds"],
                "uncertainty_seconds": offsets[host]["uncertainty_seconds"] + first["uncertainty_seconds"],
            }
    if facts and mark["error"]:
        next(iter(facts.values()))["run_folder"]["error"] = mark["error"]
    return facts


def _add_network(facts: dict[str, Facts], conversations: Conversations, chosen: _Hosts, master: str | None) -> None:
    from launcher.preflight.connections import judge_network, judge_programs

    programs = conversations.ask("programs", names=["prted"])
    for host, own in judge_programs(chosen.launcher, programs, hosts=len(chosen.names)).items():
        facts.get(host, {})["programs"] = own
    reached = conversations.reached
    if len(reached) < 2:
        return
    token = secrets.token_hex(8)
    first = reached[0]
    listening = conversations.ask("listen", [first], token=token).get(first)
    if listening is None:
        return
    tried = [address for _, address in listening["addresses"]] + [first]
    found = conversations.ask("reach", reached[1:], addresses=tried, port=listening["port"], token=token)
    examined = {host: facts[host] for host in [first, *found] if host in facts}
    taken = master or (listening["first_told"] if chosen.launcher == "pdsh" else None)
    for host, own in judge_network(examined, listening, found, taken=taken).items():
        facts[host]["network"] = own


def _try_world(
    facts: dict[str, Facts], config: Config, chosen: _Hosts, arguments: argparse.Namespace, mark: dict[str, Any]
) -> Facts:
    from engine.config.file import dump_config
    from launcher.preflight.trial import changed_by_a_shell, trial_words, try_world

    gpus = len(next(iter(facts.values()))["gpus"])
    ranks = len(chosen.names) if chosen.way == "srun" else min(2, gpus) or 2
    # In the run folder, which all hosts were seen to share; no value of the recipe is then a word of a command line.
    recipe = config.run.path.absolute() / f".preflight-{mark['nonce']}.yaml"
    words = trial_words(
        recipe, launcher=chosen.launcher, hostfile=arguments.hostfile, ranks=ranks, master=arguments.master_addr
    )
    if refused := changed_by_a_shell(words, chosen.launcher):
        return refused
    print("preflight: opening a small world ...", flush=True)
    try:
        recipe.write_text(dump_config(config), encoding="utf-8")
        return try_world(words)
    finally:
        recipe.unlink(missing_ok=True)


def _merged(facts: dict[str, Facts], conversations: Conversations, chosen: _Hosts) -> list[Facts]:
    """Return the facts of all hosts in order, called as the hostfile calls them; also of those that gave none."""
    merged = []
    for host in chosen.names:
        named = {"host": host, "way": chosen.way}
        if host in conversations.unreachable:
            merged.append(named | {"unreachable": conversations.unreachable[host]})
        else:
            merged.append(facts.get(host, {}) | named)
    return merged


def _has_errors(outcomes: list[Outcome]) -> bool:
    errors: Severity = "error"
    return any(problem.severity == errors for outcome in outcomes for problem in outcome.problems)


def _print(outcomes: list[Outcome], chosen: _Hosts, seconds: float) -> None:
    from launcher.preflight.report import listing, problems, table, verdict

    print(f"\n{table(outcomes, chosen.names)}\n")
    if found := problems(outcomes):
        print(f"{listing(found)}\n")
    print(f"preflight: {verdict(outcomes)}, {seconds:.1f} s")

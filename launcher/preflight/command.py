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
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from engine.reliability.exit_codes import EXIT_REFUSED
from launcher.preflight.outcome import Outcome
from launcher.terminal.arguments import positive_whole_number, recipe_file, typed_path
from shards.errors import counted

if TYPE_CHECKING:
    from engine.config.recipe import Config
    from launcher.preflight.hosts import Conversations
    from launcher.preflight.records import Facts, Judgement, Mark
    from launcher.preflight.space import Space


EXAMPLES = (
    "--config configs/ar2_nq.yaml --hostfile hostfile data.path=data/nq run.path=runs/nq",
    "--config configs/tiny.yaml --no-world run.path=runs/tiny",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("--config", type=recipe_file, required=True, metavar="FILE", help="the recipe that is to run")
    parser.add_argument(
        "--hostfile", type=typed_path, metavar="FILE", help="look at these hosts; left out, this one alone"
    )
    parser.add_argument(
        "--launcher", choices=["pdsh", "openmpi", "none"], default="pdsh",
        help="what will start the run over the hostfile (pdsh, as deepspeed's default); none: only look at the hosts",
    )  # fmt: skip
    parser.add_argument("--master_addr", metavar="ADDRESS", help="as it will be given to deepspeed")
    parser.add_argument(
        "--nodes", type=positive_whole_number, metavar="N", help="inside a SLURM allocation: its first N nodes, or all"
    )
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
        f"preflight: looking at {counted(len(chosen.names), 'host')} "
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
        told = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
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
    from launcher.preflight.records import Mark

    facts: dict[str, Facts] = {}
    path = str(config.run.path.absolute())
    marker = (conversations.reached or [""])[0]
    mark = conversations.ask("mark", Mark, [marker], path=path).get(marker)
    try:
        if mark is not None:
            facts = _facts(conversations, config, chosen, mark)
            facts = _with_network(facts, conversations, chosen, arguments.master_addr)
        outcomes = examine(_merged(facts, conversations, chosen), space)
        if mark and not (
            arguments.no_world or _has_errors(outcomes) or (chosen.way == "ssh" and chosen.launcher == "none")
        ):
            tried = _try_world(facts, config, chosen, arguments, mark)
            facts = {host: replace(own, world=tried) for host, own in facts.items()}
            outcomes = examine(_merged(facts, conversations, chosen), space)
    finally:
        if mark is not None:
            conversations.ask("unmark", dict[str, float], [marker], path=path, mark=asdict(mark))
    return outcomes


def _facts(conversations: Conversations, config: Config, chosen: _Hosts, mark: Mark) -> dict[str, Facts]:
    from launcher.preflight.facts import Needs
    from launcher.preflight.records import Clock, Facts

    found = conversations.ask("facts", Facts, needs=asdict(Needs.of(config)), mark=asdict(mark))
    offsets = conversations.clock_offsets()
    first = next(iter(offsets.values()), Clock(0.0, 0.0))
    facts: dict[str, Facts] = {}
    for host, own in found.items():
        folder, clock = own.run_folder, None
        if not facts and folder is not None and mark.error:
            folder = replace(folder, error=mark.error)
        if offset := offsets.get(host):
            clock = Clock(
                offset.offset_seconds - first.offset_seconds, offset.uncertainty_seconds + first.uncertainty_seconds
            )
        slots, device, kept = chosen.slots.get(host), config.run.device, config.refresh_devices
        facts[host] = replace(own, run_folder=folder, clock=clock, slots=slots, device=device, refresh_devices=kept)
    return _with_marks(facts, conversations, config)


def _with_marks(facts: dict[str, Facts], conversations: Conversations, config: Config) -> dict[str, Facts]:
    """Let each host look for the marks of the others in the folder that is to be its own, and take them away."""
    from launcher.preflight.records import Seen

    marks = {
        host: asdict(own.own_folder.mark)
        for host, own in facts.items()
        if own.own_folder is not None and own.own_folder.mark is not None and own.own_folder.error is None
    }
    if not marks:
        return facts
    asked = {"path": config.index.local_folder, "marks": marks}
    seen = conversations.ask("others", Seen, list(marks), **asked)
    conversations.ask("take own", dict[str, float], list(marks), **asked)
    return {
        host: replace(own, own_folder=replace(own.own_folder, seen_of=[name for name in seen[host].of if name != host]))
        if own.own_folder is not None and host in seen
        else own
        for host, own in facts.items()
    }


def _with_network(
    facts: dict[str, Facts], conversations: Conversations, chosen: _Hosts, master: str | None
) -> dict[str, Facts]:
    """Add what is judged of the launcher's programs, and of the ways to the first host."""
    from launcher.preflight.connections import judge_network, judge_programs
    from launcher.preflight.records import Listening

    programs = conversations.ask("programs", dict[str, str | None], names=["prted"])
    judged = judge_programs(chosen.launcher, programs, hosts=len(chosen.names))
    facts = {host: replace(own, programs=judged.get(host)) for host, own in facts.items()}
    reached = conversations.reached
    if len(reached) < 2:
        return facts
    token = secrets.token_hex(8)
    first = reached[0]
    listening = conversations.ask("listen", Listening, [first], token=token).get(first)
    if listening is None:
        return facts
    tried = [address for _, address in listening.addresses] + [first]
    asked = {"addresses": tried, "port": listening.port, "token": token}
    found = conversations.ask("reach", dict[str, str | None], reached[1:], **asked)
    examined = {host: facts[host] for host in [first, *found] if host in facts}
    taken = master or (listening.first_told if chosen.launcher == "pdsh" else None)
    judged = judge_network(examined, listening, found, taken=taken)
    return {host: replace(own, network=judged.get(host)) for host, own in facts.items()}


def _try_world(
    facts: dict[str, Facts], config: Config, chosen: _Hosts, arguments: argparse.Namespace, mark: Mark
) -> Judgement:
    from engine.config.file import dump_config
    from launcher.preflight.trial import changed_by_a_shell, trial_words, try_world

    gpus = len(next(iter(facts.values())).gpus or [])
    ranks = len(chosen.names) if chosen.way == "srun" else min(2, gpus) or 2
    # In the run folder, which all hosts were seen to share; no value of the recipe is then a word of a command line.
    recipe = config.run.path.absolute() / f".preflight-{mark.nonce}.yaml"
    words = trial_words(
        recipe, launcher=chosen.launcher, hostfile=arguments.hostfile, ranks=ranks, master=arguments.master_addr
    )
    if refused := changed_by_a_shell(words, arguments.overrides, chosen.launcher):
        return refused
    print("preflight: opening a small world ...", flush=True)
    try:
        recipe.write_text(dump_config(config), encoding="utf-8")
        return try_world(words)
    finally:
        recipe.unlink(missing_ok=True)


def _merged(facts: dict[str, Facts], conversations: Conversations, chosen: _Hosts) -> list[Facts]:
    """Return the facts of all hosts in order, called as the hostfile calls them; also of those that gave none."""
    from launcher.preflight.records import Facts

    merged = []
    for host in chosen.names:
        refusal = conversations.unreachable.get(host)
        known = Facts(host) if refusal else facts.get(host, Facts(host))
        merged.append(replace(known, host=host, way=chosen.way, unreachable=refusal))
    return merged


def _has_errors(outcomes: list[Outcome]) -> bool:
    return any(problem.severity == "error" for outcome in outcomes for problem in outcome.problems)


def _print(outcomes: list[Outcome], chosen: _Hosts, seconds: float) -> None:
    from launcher.preflight.report import listing, problems, table, verdict

    print(f"\n{table(outcomes, chosen.names)}\n")
    if found := problems(outcomes):
        print(f"{listing(found)}\n")
    print(f"preflight: {verdict(outcomes)}, {seconds:.1f} s")

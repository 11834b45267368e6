"""Judges what the hosts can reach on disk: the run folder and its space, their own disks, data and models."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.preflight.facts import Facts
from launcher.preflight.outcome import Groups, Outcome, Problem, Severity, having
from launcher.preflight.space import Space, gib

_LEAST_TEMPORARY_BYTES = 64 * 2**20
_LEAST_SHARED_MEMORY_BYTES = 512 * 2**20
"""NCCL joins the GPUs of a host through /dev/shm; a container has 64 MiB of it unless told otherwise."""
_LEAST_FILES = 10_000
_ROOM = 1.2
"""Free space below this multiple of what is needed is told."""


def check_run_folder(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts that cannot write the run folder, or see another one."""
    known, _ = having(hosts, "run_folder")
    examined = tuple(
        facts["host"] for facts in known if facts["run_folder"]["seen"] is not None or facts["run_folder"]["error"]
    )
    problems = []
    first = known[0] if known else {}
    for facts in known:
        folder, host = facts["run_folder"], (facts["host"],)
        if folder["error"]:
            fact = f"{folder['path']} cannot be written: {folder['error']}"
            remedy = "choose another run.path, or give this user the right to write there"
            problems.append(Problem("run folder", host, fact, remedy))
        elif folder["seen"] is False:
            fact = (
                f"{folder['path']} is not the folder of {first['host']}: a file written there does not appear here "
                f"({_mount_words(folder)}; on {first['host']} {_mount_words(first['run_folder'])})"
            )
            remedy = "put run.path on a file system that all hosts share (NFS, Lustre...), mounted at the same path"
            problems.append(Problem("run folder", host, fact, remedy))
        files = folder.get("free_inodes")
        if files is not None and files < _LEAST_FILES:
            fact = f"there is room for {files} more files only where {folder['path']} is"
            problems.append(Problem("run folder", host, fact, "remove files there, or ask for a higher quota"))
    found = f"{first['run_folder']['path']} ({_mount_words(first['run_folder'])})" if first else ""
    return Outcome("run folder", found, problems, examined)


def _mount_words(folder: Facts) -> str:
    mount = folder.get("mount")
    return f"{mount['type']} of {mount['source']} at {mount['point']}" if mount else "unknown file system"


def check_space(hosts: Sequence[Facts], space: Space | None) -> Outcome:
    """Compare what the recipe will write with what is free, on each file system that a host takes for the run folder.

    Args:
        hosts: Facts of each host.
        space: What the recipe will write; None where it was not estimated.
    """
    known = [facts for facts in hosts if "free_bytes" in (facts.get("run_folder") or {})]
    if space is None or not known:
        return Outcome("space", "")
    free = min(facts["run_folder"]["free_bytes"] for facts in known)
    if space.unknown:
        found = (
            f"{gib(free)} free; what is needed is unknown, as {' and '.join(space.unknown)} cannot be looked at here"
        )
        return Outcome("space", found, [], tuple(facts["host"] for facts in known))
    problems = []
    shared = [facts for facts in known if facts["run_folder"]["seen"] is not False]
    apart = [facts for facts in known if facts["run_folder"]["seen"] is False]
    for members in [shared, *([facts] for facts in apart)]:
        if not members:
            continue
        folder = members[0]["run_folder"]
        fact = f"{gib(folder['free_bytes'])} are free for {folder['path']}; the recipe will write about {space.words}"
        remedy = "make space or raise the quota, choose another run.path, or keep less (run.keep_indexes, "
        remedy += "run.keep_checkpoints)"
        if folder["free_bytes"] < _ROOM * space.needed_bytes:
            short: Severity = "error" if folder["free_bytes"] < space.needed_bytes else "warning"
            problems.append(Problem("space", tuple(facts["host"] for facts in members), fact, remedy, short))
    found = f"{gib(free)} free, about {gib(space.needed_bytes)} needed"
    return Outcome("space", found, problems, tuple(facts["host"] for facts in known))


def check_local_disk(hosts: Sequence[Facts]) -> Outcome:
    """Find folders of a host's own that cannot be written or are nearly full."""
    known, examined = having(hosts, "local")
    problems = []
    for facts in known:
        for place in facts["local"]:
            problem = _local_problem(place, on_gpus=bool(facts.get("gpus")))
            if problem:
                problems.append(Problem("local disk", (facts["host"],), *problem))
    first = known[0]["local"] if known else []
    found = ", ".join(f"{place['path']} {gib(place['free_bytes'])} free" for place in first)
    return Outcome("local disk", found, problems, examined)


def _local_problem(place: Facts, *, on_gpus: bool) -> tuple[str, str, Severity] | None:
    purpose, what, free = place["purpose"], f"{place['path']} ({place['purpose']})", place["free_bytes"]
    if place["error"]:
        remedy = {
            "temporary files": "set TMPDIR to a folder of this host that can be written, or make space there",
            "shared memory": "mount it so that users may write: mode 1777, some GiB",
        }.get(purpose, "let this user write there, or name another folder")
        return f"{what} cannot be written: {place['error']}", remedy, "error"
    if purpose == "temporary files" and free < _LEAST_TEMPORARY_BYTES:
        return f"{gib(free)} are free in {what}", "make space there, or set TMPDIR to another folder", "error"
    if purpose == "shared memory" and on_gpus and free < _LEAST_SHARED_MEMORY_BYTES:
        fact = f"{gib(free)} are free in {what}, through which NCCL joins the GPUs of a host"
        return fact, "start the container with --shm-size=1g or --ipc=host, or remove what lies there", "warning"
    return None


def check_data(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts that cannot read the data, or have others."""
    known, examined = having(hosts, "data")
    problems = []
    for facts in known:
        if facts["data"]["error"]:
            fact = f"{facts['data']['path']} cannot be read: {facts['data']['error']}"
            remedy = "check data.path: it must be readable at the same path on every host"
            problems.append(Problem("data", (facts["host"],), fact, remedy))
    groups = Groups((facts["host"], facts["data"]["digest"]) for facts in known if not facts["data"]["error"])
    if groups.unlike:
        fact = f"{known[0]['data']['path']} holds other files than elsewhere (names or sizes differ)"
        problems.append(Problem("data", groups.outliers, fact, "bring all copies to one state, or share one folder"))
    found = f"{known[0]['data']['path']}, {known[0]['data']['files']} files" if known else ""
    return Outcome("data", found, problems, examined)


def check_models(hosts: Sequence[Facts]) -> Outcome:
    """Find models that a host cannot load, or has in another state."""
    known, examined = having(hosts, "models")
    problems = []
    first = known[0]["models"] if known else []
    for place, name in enumerate(model["name"] for model in first):
        own = {facts["host"]: facts["models"][place] for facts in known}
        severities: tuple[Severity, ...] = ("error", "warning")
        for severity in severities:
            for text, members in Groups((host, model[severity]) for host, model in own.items()).members:
                if text:
                    remedy = _model_remedy(name, own[members[0]]["where"])
                    problems.append(Problem("models", tuple(members), f"{name}: {text}", remedy, severity))
        groups = Groups((host, model["digest"]) for host, model in own.items() if model["digest"])
        if groups.unlike:
            fact = f"{name} is not the same everywhere (files or revisions differ)"
            problems.append(
                Problem("models", groups.outliers, fact, "bring all copies to one state, or share one folder")
            )
    found = ", ".join(f"{model['name']} ({model['where']})" for model in first)
    return Outcome("models", found, problems, examined)


def _model_remedy(name: str, where: str) -> str:
    if where == "hub":
        return (
            f"fetch it once into a cache that all hosts share: `HF_HOME=FOLDER hf download {name}`, and set HF_HOME to "
            "that folder on all hosts"
        )
    return "correct the name, or complete it at the same place on every host"

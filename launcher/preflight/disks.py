"""Judges what the hosts can reach on disk: the run folder and its space, their own disks, data and models."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.preflight.outcome import Groups, Outcome, Problem, having
from launcher.preflight.records import Facts, LocalFolder, Severity, SharedFolder
from launcher.preflight.space import Space
from shards.files.sizes import size

_LEAST_TEMPORARY_BYTES = 64 * 2**20
_LEAST_SHARED_MEMORY_BYTES = 512 * 2**20
"""NCCL joins the GPUs of a host through /dev/shm; a container has 64 MiB of it unless told otherwise."""
_LEAST_FILES = 10_000
_ROOM = 1.2
"""Free space below this multiple of what is needed is told."""


def check_run_folder(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts that cannot write the run folder, or see another one."""
    known, _ = having(hosts, lambda facts: facts.run_folder)
    if not known:
        return Outcome("run folder", "")
    examined = tuple(facts.host for facts, folder in known if folder.seen is not None or folder.error)
    problems = []
    first, shared = known[0]
    for facts, folder in known:
        host = (facts.host,)
        if folder.error:
            fact = f"{folder.path} cannot be written: {folder.error}"
            remedy = "choose another run.path, or give this user the right to write there"
            problems.append(Problem("run folder", host, fact, remedy))
        elif folder.seen is False:
            fact = (
                f"{folder.path} is not the folder of {first.host}: a file written there does not appear here "
                f"({_mount_words(folder)}; on {first.host} {_mount_words(shared)})"
            )
            remedy = "put run.path on a file system that all hosts share (NFS, Lustre...), mounted at the same path"
            problems.append(Problem("run folder", host, fact, remedy))
        if folder.free_inodes is not None and folder.free_inodes < _LEAST_FILES:
            fact = f"there is room for {folder.free_inodes} more files only where {folder.path} is"
            problems.append(Problem("run folder", host, fact, "remove files there, or ask for a higher quota"))
    return Outcome("run folder", f"{shared.path} ({_mount_words(shared)})", problems, examined)


def _mount_words(folder: SharedFolder) -> str:
    mount = folder.mount
    return f"{mount.type} of {mount.source} at {mount.point}" if mount else "unknown file system"


def check_space(hosts: Sequence[Facts], space: Space | None) -> Outcome:
    """Compare what the recipe will write with what is free, on each file system that a host takes for the run folder.

    Args:
        hosts: Facts of each host.
        space: What the recipe will write; None where it was not estimated.
    """
    known, examined = having(hosts, _free_space)
    if space is None or not known:
        return Outcome("space", "")
    free = min(own for _, (_, own) in known)
    if space.unknown:
        found = (
            f"{size(free)} free; what is needed is unknown, as {' and '.join(space.unknown)} cannot be looked at here"
        )
        return Outcome("space", found, [], examined)
    problems = []
    shared = [entry for entry in known if entry[1][0].seen is not False]
    apart = [entry for entry in known if entry[1][0].seen is False]
    for members in [shared, *([entry] for entry in apart)]:
        if not members:
            continue
        folder, own = members[0][1]
        fact = f"{size(own)} are free for {folder.path}; the recipe will write about {space.words}"
        remedy = "make space or raise the quota, choose another run.path, or keep less (run.keep_indexes, "
        remedy += "run.keep_checkpoints)"
        if own < _ROOM * space.needed_bytes:
            short: Severity = "error" if own < space.needed_bytes else "warning"
            problems.append(Problem("space", tuple(facts.host for facts, _ in members), fact, remedy, short))
    found = f"{size(free)} free, about {size(space.needed_bytes)} needed"
    return Outcome("space", found, problems, examined)


def _free_space(facts: Facts) -> tuple[SharedFolder, int] | None:
    folder = facts.run_folder
    return None if folder is None or folder.free_bytes is None else (folder, folder.free_bytes)


def check_local_disk(hosts: Sequence[Facts]) -> Outcome:
    """Find folders of a host's own that cannot be written or are nearly full."""
    known, examined = having(hosts, lambda facts: facts.local)
    problems = []
    for facts, folders in known:
        for folder in folders:
            problem = _local_problem(folder, on_gpus=bool(facts.gpus))
            if problem:
                problems.append(Problem("local disk", (facts.host,), *problem))
    first = known[0][1] if known else []
    found = ", ".join(f"{folder.path} {size(folder.free_bytes)} free" for folder in first)
    return Outcome("local disk", found, problems, examined)


def _local_problem(folder: LocalFolder, *, on_gpus: bool) -> tuple[str, str, Severity] | None:
    purpose, what, free = folder.purpose, f"{folder.path} ({folder.purpose})", folder.free_bytes
    if folder.error:
        remedy = {
            "temporary files": "set TMPDIR to a folder of this host that can be written, or make space there",
            "shared memory": "mount it so that users may write: mode 1777, some GiB",
        }.get(purpose, "let this user write there, or name another folder")
        return f"{what} cannot be written: {folder.error}", remedy, "error"
    if purpose == "temporary files" and free < _LEAST_TEMPORARY_BYTES:
        return f"{size(free)} are free in {what}", "make space there, or set TMPDIR to another folder", "error"
    if purpose == "shared memory" and on_gpus and free < _LEAST_SHARED_MEMORY_BYTES:
        fact = f"{size(free)} are free in {what}, through which NCCL joins the GPUs of a host"
        return fact, "start the container with --shm-size=1g or --ipc=host, or remove what lies there", "warning"
    return None


def check_data(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts that cannot read the data, or have others."""
    known, examined = having(hosts, lambda facts: facts.data)
    problems = []
    for facts, data in known:
        if data.error:
            fact = f"{data.path} cannot be read: {data.error}"
            remedy = "check data.path: it must be readable at the same path on every host"
            problems.append(Problem("data", (facts.host,), fact, remedy))
    groups = Groups((facts.host, data.digest) for facts, data in known if not data.error)
    if groups.unlike:
        fact = f"{known[0][1].path} holds other files than elsewhere (names or sizes differ)"
        problems.append(Problem("data", groups.outliers, fact, "bring all copies to one state, or share one folder"))
    found = f"{known[0][1].path}, {known[0][1].files} files" if known else ""
    return Outcome("data", found, problems, examined)


def check_models(hosts: Sequence[Facts]) -> Outcome:
    """Find models that a host cannot load, or has in another state."""
    known, examined = having(hosts, lambda facts: facts.models)
    problems = []
    first = known[0][1] if known else []
    for place, name in enumerate(model.name for model in first):
        own = {facts.host: models[place] for facts, models in known}
        told: list[tuple[Severity, list[tuple[str, str | None]]]] = [
            ("error", [(host, model.error) for host, model in own.items()]),
            ("warning", [(host, model.warning) for host, model in own.items()]),
        ]
        for severity, texts in told:
            for text, members in Groups(texts).members:
                if text:
                    model = own[members[0]]
                    remedy = model.remedy or _model_remedy(name, model.where)
                    problems.append(Problem("models", tuple(members), f"{name}: {text}", remedy, severity))
        groups = Groups((host, model.digest) for host, model in own.items() if model.digest)
        if groups.unlike:
            fact = f"{name} is not the same everywhere (files or revisions differ)"
            problems.append(
                Problem("models", groups.outliers, fact, "bring all copies to one state, or share one folder")
            )
    found = ", ".join(f"{model.name} ({model.where})" for model in first)
    return Outcome("models", found, problems, examined)


def _model_remedy(name: str, where: str) -> str:
    if where == "hub":
        return (
            f"fetch it once into a cache that all hosts share: `HF_HOME=FOLDER hf download {name}`, and set HF_HOME to "
            "that folder on all hosts"
        )
    return "correct the name, or complete it at the same place on every host"

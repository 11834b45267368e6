"""Whether `index.local_folder` is on each host's own disk, can be written, and has room for its share.

Each host leaves a mark in it, and looks for those of the others once all have: where it sees one, both have the same
folder, such as one of a network file system, and nothing would be kept apart.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.index.held.store import LocalDisk, expanded
from launcher.preflight.folder import leave_mark, marks_in, mount_of, remove_mark
from launcher.preflight.outcome import Outcome, Problem, having, names
from launcher.preflight.records import Facts, Mark, OwnFolder, Severity
from shards.files.sizes import size

if TYPE_CHECKING:  # imports torch; who is asked for its folder alone does without
    from launcher.preflight.space import Space

CHECK = "local folder"
_ROOM = 1.2
"""Free space below this multiple of a host's share is told."""


def leave_own(named: str, run_path: str) -> OwnFolder:
    """Examine the folder of this host, and leave a mark in it.

    Args:
        named: `index.local_folder`.
        run_path: Of the run, absolute.
    """
    try:
        path, disk = expanded(named), LocalDisk.of(named, Path(run_path), "")
    except ConfigError as error:
        return OwnFolder(named, error=error.fact)
    mark = leave_mark(path)
    if mark.error is not None:
        return OwnFolder(str(path), mark, error=mark.error)
    present = 0
    for place, _, files in os.walk(disk.root):
        for name in files:
            with contextlib.suppress(OSError):
                present += os.lstat(os.path.join(place, name)).st_size
    return OwnFolder(str(path), mark, None, shutil.disk_usage(path).free, present, mount_of(path))


def with_others(own: OwnFolder, marks: Mapping[str, Mark]) -> OwnFolder:
    """Look for the marks of other hosts, once all have left theirs.

    Args:
        own: Of this host.
        marks: Of the others, by name.
    """
    return replace(own, seen_of=marks_in(Path(own.path), marks))


def take_own(own: OwnFolder | None, *, keep_folder: bool) -> None:
    """Take this host's mark away, once all have looked."""
    if own is not None and own.mark is not None:
        remove_mark(Path(own.path), own.mark, keep_folder=keep_folder)


def check_own_folder(hosts: Sequence[Facts], space: Space | None) -> Outcome:
    """Find hosts whose folder cannot be used, is another host's too, or has less room than its share takes.

    Args:
        hosts: Facts of each host.
        space: What the recipe will write; None where it was not estimated.
    """
    known, examined = having(hosts, lambda facts: facts.own_folder)
    if not known:
        return Outcome(CHECK, "")
    problems, found = [], []
    weights = {facts.host: len(facts.ranks or []) or facts.slots or 1 for facts, _ in known}
    for facts, own in known:
        host, what = (facts.host,), f"{own.path} (index.local_folder)"
        share = space.local_share(weights[facts.host], sum(weights.values())) if space is not None else 0
        needed = max(0, share - own.present_bytes)
        found.append((own.free_bytes, needed))
        if own.error:
            fact, remedy = f"{what} cannot be used: {own.error}", "name a folder of this host that can be written"
            problems.append(Problem(CHECK, host, fact, remedy))
        elif own.seen_of:
            mount = own.mount
            where = f" ({mount.type} of {mount.source} at {mount.point})" if mount else ""
            fact = f"{what} is the same folder as on {names(own.seen_of)}{where}, and no disk of the host's own"
            remedy = "name a folder on each host's own disk, or set index.embeddings=shared"
            problems.append(Problem(CHECK, host, fact, remedy))
        elif own.free_bytes < _ROOM * needed:
            severity: Severity = "error" if own.free_bytes < needed else "warning"
            fact = f"{size(own.free_bytes)} are free in {what}; its share of the embeddings takes about {size(needed)}"
            remedy = "make space there, name another index.local_folder, keep fewer indexes (run.keep_indexes), take "
            problems.append(Problem(CHECK, host, fact, f"{remedy}more hosts, or set index.embeddings=shared", severity))
    free, needed = min(found)[0], max(needed for _, needed in found)
    text = f"{known[0][1].path}, {size(free)} free, about {size(needed)} needed on a host"
    return Outcome(CHECK, text, problems, examined)

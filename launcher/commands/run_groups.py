"""Runs as a command line names them, in groups of seeds: `ar2=runs/a,runs/b`, `runs/array`, `runs/n15-*`.

A folder that holds no run but has folders that do (a sweep's, a job array's) stands for these. Without a name, runs
that are alike but for the seed are one group, named after their folders.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.config.file import differences, flatten
from engine.config.text import absolute_path
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ConfigError
from engine.run import Run
from launcher.commands.finished import open_run
from shards.errors import listed
from shards.files import canonical_json

_NAME = re.compile(r"[\w.+-]+")
_SEED = re.compile(r"^\d+(_|$)|[_-]?seed-?\d+")
"""What folders of one setting differ in: a task's number before the rest, and the seed."""


def _open_alone(path: Path) -> Run:
    return open_run(path, Coordinator(LocalTransport()))


def runs_in_groups(
    words: Sequence[str], *, option: str = "RUN", opened: Callable[[Path], Run] = _open_alone
) -> dict[str, list[Run]]:
    """Open the runs that words name.

    Args:
        words: `NAME=PATH[,PATH...]` or `PATH[,PATH...]`; a path may be a pattern of the shell, or a folder of runs.
        option: Where they come from, for the error.
        opened: Opens a folder; by default as one process does that loads no model.

    Returns:
        Name -> its runs, by seed ascending.

    Raises:
        ConfigError: A path is no run and has none, a name or a run stands there twice, the runs of a group differ in
            more than the seed, or two have the same.
    """
    groups: dict[str, list[Run]] = {}
    for word in words:
        name, paths = _paths_of(word, option)
        runs = [opened(path) for path in paths]
        found = {name: runs} if name else _by_setting(runs, word)
        for key, own in found.items():
            if key in groups:
                raise ConfigError(
                    f"{option} has the name {key!r} twice, for {groups[key][0].folder.path} and {own[0].folder.path}",
                    expected="a name of its own for each",
                    remedy="write NAME=PATH with other names",
                )
            groups[key] = sorted(own, key=lambda run: run.config.run.seed)
    seen: dict[Path, str] = {}
    for name, runs in groups.items():
        require_seeds(name, runs)
        for run in runs:
            place = run.folder.path.resolve()
            if place in seen:
                raise ConfigError(f"{option} names {place} twice", expected="each once", remedy="leave one of them out")
            seen[place] = name
    return groups


def require_seeds(name: str, runs: Sequence[Run]) -> None:
    """Refuse runs that are no seeds of one setting.

    Raises:
        ConfigError: They differ in more than the seed, or two have the same.
    """
    first, *others = runs
    by_seed = {first.config.run.seed: first}
    for run in others:
        changed = [one for one in differences(run.config, first.config) if not one.startswith("run.seed")]
        if changed := [one for one in changed if not one.startswith("data.path")]:
            raise ConfigError(
                f"the runs of {name} are no seeds of one setting: {run.folder.path} differs from {first.folder.path} "
                f"in {listed(changed, 5, '; ')}",
                expected="runs that differ in run.seed alone",
                remedy="give each setting a name of its own: NAME=RUN OTHER=RUN",
            )
        seed = run.config.run.seed
        if seed in by_seed:
            raise ConfigError(
                f"two runs of {name} have the seed {seed}: {by_seed[seed].folder.path} and {run.folder.path}",
                expected="seeds that differ, since a repeated run is no second sample",
                remedy="leave one of them out",
            )
        by_seed[seed] = run


def _paths_of(word: str, option: str) -> tuple[str, list[Path]]:
    """Read a word; a path may hold an = or a comma itself, where it exists so."""
    name, equals, rest = word.partition("=")
    try:
        if not equals or not _NAME.fullmatch(name) or absolute_path(word).exists():
            name, rest = "", word
        whole = absolute_path(rest)
        parts = [rest] if whole.exists() else rest.split(",")
        found = [run for part in parts for run in _runs_at(part, option)]
    except ValueError as error:
        raise ConfigError(f"{option} {word!r}: {error}", expected="PATH or NAME=PATH,PATH") from error
    return name, found


def _runs_at(text: str, option: str) -> list[Path]:
    path = absolute_path(text)
    if _is_run(path):
        return [path]
    matches = [path] if path.exists() else [Path(one) for one in sorted(glob.glob(str(path)))]
    found: list[Path] = []
    for match in matches:
        inside = [match] if _is_run(match) else _runs_in(match, "*")
        found += inside or _runs_in(match, "*/*")
    if not found:
        raise ConfigError(
            f"{option} {text} is no run and has none" + ("" if matches else ": there is no such folder"),
            expected="a folder with a config.yaml that a run wrote, a folder of such folders, or a pattern of them",
        )
    return found


def _runs_in(folder: Path, pattern: str) -> list[Path]:
    """Find runs below a folder; hidden folders hold what runs share, and are no runs to compare."""
    found = (path for path in folder.glob(pattern) if _is_run(path))
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "ledger.json").is_file()


def _by_setting(runs: Sequence[Run], word: str) -> dict[str, list[Run]]:
    """Put runs together that are alike but for the seed, and name them after their folders."""
    if len(runs) == 1:
        return {_name_of(runs): list(runs)}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_setting_of(run), []).append(run)
    named = {_name_of(own): own for own in groups.values()}
    if len(named) < len(groups):
        raise ConfigError(
            f"{word} has {len(groups)} settings, and their folders give them {len(named)} names: {listed(named, 10)}",
            expected="folders named after what they differ in",
            remedy="name them: NAME=PATH,PATH OTHER=PATH,PATH",
        )
    return named


def _setting_of(run: Run) -> str:
    tree: Mapping[str, object] = flatten(run.config.model_dump(mode="json"))
    own = {key: value for key, value in tree.items() if key.split(".")[0] not in {"run", "shards"}}
    return canonical_json({key: value for key, value in own.items() if key != "data.path"})


def _name_of(runs: Sequence[Run]) -> str:
    """Name a setting by its folder, or by the folder that holds its seeds."""
    own = _without_seed(runs[0])
    if len(runs) == 1:
        return runs[0].folder.path.name if own else runs[0].folder.path.parent.name
    parents = {run.folder.path.parent for run in runs}
    siblings = [path for parent in parents for path in parent.iterdir() if _is_run(path)]
    if not own or (len(parents) == 1 and len(siblings) == len(runs)):
        return runs[0].folder.path.parent.name
    return own


def _without_seed(run: Run) -> str:
    """Return what a folder's name says besides the seed; nothing where the seed is all of it."""
    return _SEED.sub("", run.folder.path.name).strip("_-")

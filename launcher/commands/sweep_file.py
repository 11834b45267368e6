"""A sweep in a file: settings of a recipe by name, each with some seeds, and what they share.

    base: {config: ar2_nq, set: [ar2.top_k=200]}     # the recipe, by its name or path, and words for all
    variants:                           # name: words of its own, as a list or as keys with values
      ar2: []
      without-R: {ar2.distillation_weight: 0}
    seeds: [42, 43, 44]
    out: runs/regularization            # one folder a run: OUT/NAME/seed-SEED
    share: retriever/1                  # optional: before this stage all settings of a seed are the same
    compare: [--metric, "R@1,R@5"]      # optional: options of `compare` for the table at the end

Every run's configuration is resolved when the file is read, so that a misspelt key stops the sweep before its first
run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.shipped import found_recipe
from engine.config.text import absolute_path
from engine.config.timetable import Sizes
from engine.config.tree import read_tree_file
from engine.errors import ConfigError
from engine.training.branching import require_shareable
from launcher.commands.words.compare import add_arguments, metrics_of

_KEYS = ("base", "variants", "seeds", "out", "share", "compare")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_SHARED = ".shared"
_OURS = ("run.path", "run.seed", "run.stop_before")
"""What the sweep itself says of each run."""


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        variant: Name of its setting.
        seed: Its seed.
        folder: Its run folder, absolute.
        words: `key=value` words behind the recipe, without those of the folder.
        config: What they come to.
    """

    variant: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    config: Config

    @property
    def label(self) -> str:
        """How it is told of."""
        return f"{self.variant} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that was read and found valid.

    Attributes:
        recipe: The configuration file.
        words: For all runs.
        runs: Seed by seed, each with all settings in their order.
        out: Folder of all runs.
        share: The stage before which the settings of a seed are the same; None where they share nothing.
        compare: Options of the comparison at the end.
    """

    recipe: Path
    words: tuple[str, ...]
    runs: tuple[SweepRun, ...]
    out: Path
    share: str | None
    compare: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """In their order."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def shared_folder(self, seed: int) -> Path:
        """Return the run folder of what the settings of a seed share; hidden, as it is no result."""
        return self.out / _SHARED / f"seed-{seed}"


def read_sweep(path: Path, words: Sequence[str] = (), out: Path | None = None) -> Sweep:
    """Read a sweep.

    Args:
        path: The file.
        words: `key=value` words of the command line, for all runs.
        out: Folder of all runs, in place of the file's.

    Raises:
        ConfigError: The file is missing or of another form, a name cannot be a folder's, a word is the sweep's own, or
            a setting is no valid configuration; the table at the end could not be made by the options for it.
    """
    if not path.is_file():
        raise ConfigError(f"there is no sweep file {path}", remedy="name one of configs/sweeps/*.yaml, or write one")
    tree = read_tree_file(path)
    if not isinstance(tree, dict) or (unknown := [key for key in tree if key not in _KEYS]):
        odd = f" with {', '.join(unknown)}" if isinstance(tree, dict) else ""
        raise ConfigError(f"{path} is no sweep{odd}", expected=f"the keys {', '.join(_KEYS)}")
    base = tree.get("base")
    base = base if isinstance(base, dict) else {"config": base}
    if not isinstance(base.get("config"), str) or set(base) - {"config", "set"}:
        raise ConfigError(f"{path}: base names no recipe", expected="base: {config: FILE, set: [key=value, ...]}")
    recipe = _recipe(base["config"], path)
    for_all = (*_words(base.get("set"), f"{path}: base.set"), *words)
    where = out or tree.get("out")
    if not isinstance(where, str | Path) or not where:
        raise ConfigError(f"{path} does not say where the runs go", expected="out: DIR, or --out DIR")
    folder = absolute_path(where)
    variants = _variants(tree.get("variants"), path)
    runs = []
    for seed in _seeds(tree.get("seeds"), path):
        for name, own in variants.items():
            run_folder = folder / name / f"seed-{seed}"
            whole = (*for_all, *own, f"run.seed={seed}")
            _refuse_ours([*for_all, *own], f"{path}: {name}")
            config = load_config(recipe, [*whole, f"run.path={run_folder}"])
            runs.append(SweepRun(name, seed, run_folder, whole, config))
    share = tree.get("share")
    if share is not None and not (isinstance(share, str) and share):
        raise ConfigError(f"{path}: share is {share!r}", expected="the name of a stage, such as retriever/1")
    if share:
        _require_stage(share, load_config(recipe, for_all), path)
    options = _words(tree.get("compare"), f"{path}: compare", any_word=True)
    _require_options(options, list(variants), path)
    return Sweep(recipe, for_all, tuple(runs), folder, share or None, options)


def _recipe(name: str, path: Path) -> Path:
    try:
        return found_recipe(name)
    except ValueError as error:
        raise ConfigError(f"{path}: base.config is {name!r}: {error}", expected="a recipe's name or path") from error


def _variants(tree: Any, path: Path) -> dict[str, tuple[str, ...]]:
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path} has no variants", expected="variants: {name: [key=value, ...], ...}")
    for name in tree:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: the variant {name!r} cannot name a folder", expected="letters, digits, . + - _")
    return {name: _words(own, f"{path}: variants.{name}") for name, own in tree.items()}


def _words(tree: Any, where: str, *, any_word: bool = False) -> tuple[str, ...]:
    """Read overrides: a list of words, or keys with values."""
    if tree is None:
        return ()
    if isinstance(tree, dict) and all(isinstance(value, str) for value in tree.values()):
        return tuple(f"{key}={value}" for key, value in tree.items())
    if isinstance(tree, list) and all(isinstance(word, str) and (any_word or "=" in word) for word in tree):
        return tuple(tree)
    raise ConfigError(
        f"{where} is {tree!r}",
        expected="words such as [ar2.num_negatives=1], or {ar2.num_negatives: 1}; a value that is a list in quotes",
    )


def _seeds(tree: Any, path: Path) -> list[int]:
    words = tree if isinstance(tree, list) else [tree]
    if not words or not all(isinstance(word, str) and word.isdecimal() for word in words):
        raise ConfigError(f"{path}: seeds is {tree!r}", expected="whole numbers, such as [42, 43, 44]")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path} has a seed twice: {', '.join(words)}", expected="each seed once")
    return seeds


def _refuse_ours(words: Sequence[str], where: str) -> None:
    for word in words:
        if word.split("=")[0] in _OURS:
            raise ConfigError(
                f"{where} has {word}",
                expected=f"no {', '.join(_OURS)}: the sweep says them",
                remedy="use the keys seeds, out and share",
            )


def _require_stage(share: str, base: Config, path: Path) -> None:
    """Refuse to share what comes before a stage that the base, which computes it, does not train."""
    sized = base.sized(Sizes(1, 1)) if base.counts_epochs else base  # names of stages do not depend on the data
    stages = [visit.stage for visit in sized.timetable.visits]
    if share not in stages:
        raise ConfigError(
            f"{path}: the base has no stage {share!r} of training to share what comes before it",
            expected=f"one of {', '.join(stages)}",
        )


def require_shared_alike(sweep: Sweep) -> None:
    """Refuse settings that would change what all of them are to share, before it is computed.

    Args:
        sweep: The runs; those that have begun had what they share.

    Raises:
        ConfigError: A setting could not begin with what the base computes.
    """
    if sweep.share is None:
        return
    base = load_config(sweep.recipe, [*sweep.words, f"run.path={sweep.shared_folder(sweep.seeds[0])}"])
    waiting = {run.variant: run for run in sweep.runs if not (run.folder / "ledger.json").exists()}
    for variant, run in waiting.items():
        try:
            require_shareable(base, run.config, sweep.share)
        except ConfigError as error:
            raise ConfigError(
                f"{variant} cannot share what comes before {sweep.share}: {error.fact}",
                expected="settings that differ in later stages only",
                remedy="name an earlier stage as share, undo the change, or leave share out of the file",
            ) from error


class _Options(argparse.ArgumentParser):
    """Reads options that stand in a file."""

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse does not understand."""
        raise ConfigError(f"{self.prog}: {message}", expected='options of `compare`, such as [--metric, "R@1,R@5"]')


def _require_options(words: Sequence[str], variants: Sequence[str], path: Path) -> None:
    """Refuse options of the table at the end that could not be followed there."""
    parser = _Options(prog=f"{path}: compare", allow_abbrev=False)
    add_arguments(parser)
    options = parser.parse_args(["RUN", *words])
    metrics_of(options.metric)
    if len(options.runs) > 1:
        parser.error(f"{', '.join(options.runs[1:])} is no option, and the runs are the sweep's own")
    if options.against is not None and options.against not in variants:
        raise ConfigError(
            f"{path}: compare has --against {options.against}, which is no setting",
            expected=f"one of {', '.join(variants)}",
        )

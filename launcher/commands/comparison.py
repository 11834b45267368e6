"""Several finished runs, opened side by side to be compared: the words, the checks, and what is printed and written.

Runs that are compared are measured on the same queries of the same data, to the same depth, by the same metric; where
that cannot be, nothing is measured. Rankings go below `--out`, where a later comparison finds them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.config.metric_names import JUDGED, family_of
from engine.config.text import absolute_path
from engine.coordination.coordinator import Coordinator
from engine.data.corpus import sample_queries
from engine.errors import ConfigError, DataError
from engine.evaluation.contest import Contest, Terms
from engine.evaluation.contestants import Contestant, Entrant, without_repetitions
from engine.evaluation.figures import require_matplotlib, write_figure
from engine.evaluation.measures import require_measurable
from engine.evaluation.pooled import Seeded
from engine.evaluation.tables import Table
from engine.log import get_logger
from engine.refresh.refresh import drop_old_indexes
from engine.retrievers.choice import Choice
from engine.run import Run
from launcher.commands.finished import (
    change_settings,
    data_of,
    dataset_of,
    fingerprint_of,
    keep_others_out,
    last_iteration,
    open_run,
    place_for,
    require_search,
)
from launcher.commands.iterations import rankers_in
from launcher.commands.run_groups import runs_in_groups
from launcher.commands.words.comparison import FOLDER
from launcher.world.opening import open_world
from shards.files.unusable import is_writable
from shards.records import Dataset

log = get_logger(__name__)
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        entrants: The runs.
        contests: Split -> what is measured on it.
        metric: The metric's name.
        coordinator: Of all ranks.
        seed: Of the tests.
        rankers: Words for iterations, as they were typed.
    """

    entrants: tuple[Entrant, ...]
    contests: Mapping[str, Contest]
    metric: str
    coordinator: Coordinator
    seed: int
    rankers: str | None
    _out: Path
    _board: Path
    _draws: bool

    def bm25(self) -> list[Contestant]:
        """Return BM25 by the settings of the runs: the first run's, and others where they differ from it.

        Runs without BM25 have none to add.
        """
        found = without_repetitions(entrant.bm25() for entrant in self.entrants if entrant.run.config.bm25.enabled)
        return [replace(found[0], label="BM25")] if len(found) == 1 else found

    def reference(self) -> Contestant:
        """Return the BM25 whose list is re-ranked: that of the first run that has it.

        Raises:
            ConfigError: No run has it.
        """
        if found := self.bm25():
            return found[0]
        raise ConfigError(
            f"bm25.enabled is false in {', '.join(str(one.run.folder.path) for one in self.entrants)}, and what BM25 "
            "finds is what rankers are compared by here",
            expected="a run with BM25 among those that are named",
            remedy="name one of the same data whose recipe has it as well, or compare the rankers over what the "
            "retrievers find, by the command matrix",
        )

    def rankers_of(self, entrant: Entrant) -> list[Contestant]:
        """Return the rankers of a run that were asked for; none where it has none at all.

        Raises:
            ConfigError: It has none of these iterations.
        """
        return [entrant.state(one) for one in rankers_in(entrant.run, self.rankers)]

    def settings_of(self, labels: Iterable[str]) -> dict[str, Seeded]:
        """Return setting and seed of each system by its label, `joint:R` and 43 for `joint@43:R`.

        Raises:
            ConfigError: A run file is called what seeds are called together, so that it would count as one of them.
        """
        found = {}
        for label in labels:
            own = [one for one in self.entrants if one.name and label.startswith(one.named(""))]
            found[label] = Seeded(own[0].of_setting(label), own[0].run.config.run.seed) if own else Seeded(label, None)
        several = {one.setting for label, one in found.items() if label != one.setting}
        if taken := sorted(several & found.keys()):
            raise ConfigError(
                f"--run-file has the name {taken[0]!r}, by which the seeds of a setting stand in the table together",
                expected="a name of its own for every run file",
                remedy="name it: --run-file NAME=PATH",
            )
        return found

    def publish(self, name: str, printed: Sequence[Table], written: Table, draw: Callable[[], Any]) -> None:
        """Print tables, write one as CSV, and draw it as a PNG and for TensorBoard; rank 0 does.

        Args:
            name: Of the comparison, a word.
            printed: For the terminal.
            written: For the CSV.
            draw: Makes the figure.
        """
        figure = draw if self._draws else None
        publish = partial(publish_table, self._out, self._board, name, printed, written, figure)
        self.coordinator.only_rank_zero(f"publish {name}", publish)


def publish_table(
    out: Path, board: Path, name: str, printed: Sequence[Table], written: Table, draw: Callable[[], Any] | None
) -> None:
    """Print tables, write one as CSV, and draw it as a PNG and for TensorBoard.

    Args:
        out: Folder of the files.
        board: Folder of TensorBoard, which gets one below it.
        name: Of the comparison, a word.
        printed: For the terminal.
        written: For the CSV.
        draw: Makes the figure; None for no figure.
    """
    out.mkdir(parents=True, exist_ok=True)
    written.write_csv(out / f"{name}.csv")
    places = f"{out / name}.csv"
    if draw is not None:
        write_figure(draw(), out / f"{name}.png", board / name, name)
        places += f", .png, and TensorBoard: {board}"
    print("\n\n".join([*(table.text() for table in printed), places]), flush=True)


@contextmanager
def open_comparison(
    arguments: argparse.Namespace, samples: Mapping[str, int | None] | None = None
) -> Iterator[Comparison]:
    """Open runs to compare them; nobody else writes their folders meanwhile.

    Args:
        arguments: Those of `add_comparison_arguments`.
        samples: Further split -> size of its sample; None for as many queries as the first split has.

    Yields:
        The comparison.

    Raises:
        ConfigError: A folder holds no finished run or another start writes it; runs of different data or settings of
            the evaluation; a word is of another form; or the figure cannot be drawn.
        DataError: The data has no such split, or nothing of it can be measured.
    """
    if not arguments.no_figure:
        require_matplotlib()
    world = open_world()
    opened = partial(open_run, coordinator=world.coordinator, device=world.device)
    groups = runs_in_groups(arguments.runs, opened=opened)
    seeds = {
        f"{name}@{run.config.run.seed}" if len(own) > 1 else name: (name, run)
        for name, own in groups.items()
        for run in own
    }
    runs = {name: run for name, (_, run) in seeds.items()}
    for run in runs.values():
        require_search(run)
    lasts = {name: last_iteration(run) for name, run in runs.items()}
    _set(runs, arguments)
    first = next(iter(runs.values()))
    dataset = dataset_of(first, arguments.data)
    require_same_data(runs, dataset)
    require_same_setting(runs, "evaluation.relevance_threshold", "give all of them the same by --set {key}=VALUE")
    terms = _terms(first, dataset, arguments, samples or {})
    usual = first.folder.path / FOLDER
    out = Path(world.coordinator.only_rank_zero("look at --out", lambda: str(place_for(arguments.out, usual))))
    board = out / "tensorboard" if arguments.out else first.folder.path / "tensorboard" / FOLDER
    with ExitStack() as stack:
        for name, run in runs.items():
            lock = partial(keep_others_out, stack, run.folder, run, reads_only=True)
            run.coordinator.only_rank_zero(f"lock {name}", lock)
        entrants = tuple(
            Entrant(
                name if len(runs) > 1 else "",
                run,
                data_of(run, lasts[name], dataset),
                setting=setting if len(groups) > 1 else "",
            )
            for name, (setting, run) in seeds.items()
        )
        yield Comparison(
            entrants,
            {split: Contest(out / "rankings", one) for split, one in terms.items()},
            arguments.metric,
            world.coordinator,
            first.config.run.seed,
            arguments.ranker,
            out,
            board,
            not arguments.no_figure,
        )
        for name, run in runs.items():
            run.coordinator.only_rank_zero(f"drop indexes of {name}", partial(_drop_indexes, run, lasts[name]))


def _drop_indexes(run: Run, last: int) -> None:
    """Remove indexes that a comparison has made; in a folder that may not be written to, it has made none."""
    if is_writable(run.folder.path):
        drop_old_indexes(run, run.folder, last)


def run_files(words: Sequence[str], entrant: Entrant) -> list[Contestant]:
    """Return the rankings in files that take part as retrievers.

    Args:
        words: `NAME=PATH`, or paths.
        entrant: By whose corpus they are read.

    Raises:
        ConfigError: Two have one name.
    """
    return [
        Contestant(name, entrant.run, entrant.data, Choice("run_file", path=str(path)))
        for name, path in named_paths(words, "--run-file").items()
    ]


def named_paths(words: Sequence[str], option: str) -> dict[str, Path]:
    """Read words of the form NAME=PATH or PATH, whose name is then its last part; a path may hold an = itself.

    Args:
        words: As they were typed.
        option: Whose words they are, for the error.

    Raises:
        ConfigError: Two have one name or are one path, or a word is no path.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        try:
            path = absolute_path(word)
            if equals and _NAME.fullmatch(name) and not path.exists():
                path = absolute_path(rest)
            else:
                name = path.name
        except ValueError as error:
            raise ConfigError(f"{option} {word!r}: {error}", expected="PATH or NAME=PATH") from error
        if name in found:
            raise ConfigError(
                f"{option} has the name {name!r} twice, for {found[name]} and {path}",
                expected="a name of its own for each",
                remedy="write NAME=PATH with other names",
            )
        if path.resolve() in {other.resolve() for other in found.values()}:
            raise ConfigError(f"{option} names {path} twice", expected="each once", remedy="leave one of them out")
        found[name] = path
    return found


def _set(runs: Mapping[str, Run], arguments: argparse.Namespace) -> None:
    """Give all runs the metric and the depth that are asked for."""
    try:
        is_judged = family_of(arguments.metric) in JUDGED
    except ValueError as error:
        raise ConfigError(f"--metric: {error}") from error
    if not is_judged:
        raise ConfigError(
            f"--metric {arguments.metric} is by answers", expected="a metric by judgements, such as MRR@10 or nDCG@10"
        )
    words = [f"evaluation.metrics=[{arguments.metric}]"]
    words += [f"evaluation.{key}={arguments.depth}" for key in ("depth", "rerank_depth")]
    for word in arguments.set:
        if not word.startswith("evaluation.") or word.split("=")[0] in {one.split("=")[0] for one in words}:
            raise ConfigError(
                f"--set {word} is not for a comparison",
                expected="settings of the section evaluation beside --metric and --depth, such as "
                "evaluation.relevance_threshold=2",
            )
    for run in runs.values():
        change_settings(run, [*words, *arguments.set])


def require_same_data(runs: Mapping[str, Run], dataset: Dataset) -> None:
    """Refuse runs whose numbers could not be compared, since they are of other data.

    Args:
        runs: By name.
        dataset: What they are measured on.

    Raises:
        ConfigError: A run was trained on other data, or they differ in whether a query is a document itself.
    """
    for name, run in runs.items():
        if fingerprint_of(run) != dataset.fingerprint:
            raise ConfigError(
                f"{name} ({run.folder.path}) was trained on other data than those in {dataset.path}",
                expected="runs of one corpus with the same queries and judgements",
                remedy="compare runs of the same data; if their folder was moved or restored elsewhere, name it by "
                "--data",
            )
    require_same_setting(runs, "data.ignore_identical_ids", "compare runs with the same setting")


def require_same_setting(runs: Mapping[str, Run], key: str, remedy: str) -> None:
    """Refuse runs that differ in what is found or counts as found.

    Args:
        runs: By name.
        key: A setting, `section.field`.
        remedy: For the error; `{key}` in it is the setting.

    Raises:
        ConfigError: They differ in it.
    """
    section, field = key.split(".")
    by_name = {name: getattr(getattr(run.config, section), field) for name, run in runs.items()}
    if len({str(value) for value in by_name.values()}) > 1:
        raise ConfigError(
            f"the runs differ in {key}: {', '.join(f'{name} has {value}' for name, value in by_name.items())}",
            expected="one notion of what is found",
            remedy=remedy.format(key=key),
        )


def _terms(
    first: Run, dataset: Dataset, arguments: argparse.Namespace, samples: Mapping[str, int | None]
) -> dict[str, Terms]:
    """Say on which queries of which splits everything is measured, by the first run's seed."""
    settings = first.config.evaluation
    terms: dict[str, Terms] = {}
    limits: dict[str, int | None] = {arguments.split: arguments.max_queries}
    for split, limit in {**limits, **samples}.items():
        if not dataset.qrels.get(split):
            raise DataError(
                f"{dataset.path} has no judged queries in the split {split!r}",
                expected=f"one of {', '.join(dataset.qrels) or 'train, dev, test'}",
                remedy="name another split by --split",
            )
        if limit is None and terms:
            limit = len(next(iter(terms.values())).queries)
        queries = sample_queries(dataset, split, limit, first.config.run.seed)
        require_measurable(dataset, split, [query.id for query in queries], settings)
        qrels = {query.id: dataset.qrels[split][query.id] for query in queries}
        terms[split] = Terms(
            split,
            queries,
            qrels,
            f"{dataset.fingerprint} {first.config.data.ignore_identical_ids}",
            arguments.depth,
            arguments.metric,
            settings.relevance_threshold,
            len(dataset.qrels[split]),
        )
    return terms

"""Branches: a run that begins with what another one has finished, up to a stage, under a changed configuration.

So several games begin from the same warm-up, and several rankers learn from the same retrievers, without computing
these again. The new folder holds the finished stages of the ledger and the artifacts that they left, as further names
(hard links) of the same files where the file system can; published files are never written to, only replaced.

What the changed settings touch decides. A stage of training that they would have changed is refused: name an earlier
one. Measurements, candidates of a sample of queries and published starts are left out and made again. A changed
`run.seed` is taken as it is, since different draws from the same beginning are what a comparison over seeds asks for.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config.file import differences, dump_config, load_config, with_overrides
from engine.config.recipe import Config
from engine.config.timetable import ZERO_SHOT, Sizes, Visit, WeightsOf, iteration_name
from engine.errors import ArtifactError, ConfigError
from engine.metrics import take_points
from engine.reliability.starts import read_starts, record_start
from engine.results import LAST_STAGE, STALENESS, Measured, kept_shares, ranking_names, read_ledger
from engine.run import SIZES, RunFolder
from shards.files import parse_record, read_json, write_json

RECORD = "branch.json"
"""What a branch says of where it comes from."""
_WHOLE = ("data", "shards", "bm25", "positives")
"""Folders that all stages share; what in them does not fit is found by its manifest and made again."""
_OF_KIND = {"index": "index", "encode": "index", "candidates": "candidates", "negatives": "negatives"}
_OF_KIND |= {"scores": "teacher_scores", "rescore": "rescored"}
"""Kind of a stage -> folder of what it left, by the stage's second name."""
_MEASURES = ("evaluate", "fusion", "take")
_DECIDES = re.compile(r"(evaluation\.(metrics|relevance_threshold|rerank_depth|max_dev_queries)|run\.keep_best):")
"""Settings by which dev tells how good two models are, where a phase asks for that (`Config.decided_on_dev`)."""


@dataclass(frozen=True, slots=True)
class Branched:
    """What a branch was made of.

    Attributes:
        source: The other run's folder.
        before: The first stage that was not taken over.
        kept: Stages that were.
        again: Finished stages before it that are made again, since the changed settings reach them.
        left_out: Stages of training before it that the changed recipe does not have, such as a ranker's in ANCE.
        changed: Settings, as `key: old -> new`.
        gone: The index from which the next one would have begun, where the other run has dropped it; else empty.
    """

    source: str
    before: str
    kept: tuple[str, ...]
    again: tuple[str, ...]
    left_out: tuple[str, ...]
    changed: tuple[str, ...]
    gone: str = ""


def branch_run(source: Path, target: Path, overrides: Sequence[str], before: str) -> Branched:
    """Make a run folder that begins with what another run has finished before a stage.

    Args:
        source: The other run; nothing of it is changed, and no start should be working in it.
        target: The new folder, missing or empty. It appears when it is whole.
        overrides: `key=value` words for its configuration. `run.stop_before` says where one run ends, and is not taken
            over.
        before: Stage from which on it computes itself, such as `retriever/1`, of either run.

    Returns:
        What was taken over; also recorded in the folder's `branch.json`.

    Raises:
        ConfigError: The source is no run or has not finished anything before the stage, the target is not empty, an
            override fits no field, or would have changed a stage of training that is taken over.
        ArtifactError: What a finished stage left is not there any more, such as an early checkpoint.
    """
    folder = RunFolder(source.absolute())
    if not folder.config.exists() or not folder.ledger.exists():
        raise ConfigError(f"{source} holds no run", expected="a folder with a config.yaml and a ledger.json")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"the folder {target} is not empty", expected="a new or an empty one for the branch")
    ledger: dict[str, Any] = dict(read_ledger(folder.ledger))
    old = load_config(folder.config)
    new = with_overrides(old, ["run.stop_before=null", *overrides, f"run.path={target.absolute()}"])
    plan = _Plan(folder, ledger, _sized(old, ledger), _sized(new, ledger), before)
    plan.require_same_training()
    kept, again, left_out, changed = map(tuple, (plan.kept, plan.again, plan.left_out, plan.changed))
    record = Branched(str(folder.path), before, kept, again, left_out, changed, plan.gone)
    temporary = target.absolute().parent / f".{target.name}.tmp-{secrets.token_hex(6)}"
    try:
        _fill(RunFolder(temporary), plan, new, record)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target.absolute())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return record


def require_shareable(base: Config, setting: Config, before: str) -> None:
    """Refuse a setting that could not begin with what its base finishes before a stage, which need not have begun.

    Args:
        base: Whose run is branched.
        setting: Of the branch.
        before: A stage of training of the base, such as `retriever/1`.

    Raises:
        ConfigError: As of `branch_run`, by stages of training alone.
    """
    base, setting = (one.sized(Sizes(1, 1)) if one.counts_epochs else one for one in (base, setting))
    table = base.timetable
    places = {phase.name: place for place, phase in enumerate(table.phases)}
    visits = sorted(  # without iterations, the order of the phases is that of all
        table.visits, key=lambda visit: (visit.iteration if table.in_each_iteration else 0, places[visit.phase.name])
    )
    stages = [visit.stage for visit in visits]
    ledger: dict[str, Any] = {stage: {} for stage in ("shards", *stages[: stages.index(before)])}
    _Plan(RunFolder(base.run.path), ledger, base, setting, before).require_same_training()


def _sized(config: Config, ledger: dict[str, Any]) -> Config:
    config = config.with_measured(kept_shares(ledger))
    if SIZES not in ledger:
        return config
    return config.sized(parse_record(ledger[SIZES]["result"], Sizes, "the sizes of the data in the ledger"))


@dataclass
class _Plan:
    """What of a run is taken over, under which changes."""

    folder: RunFolder
    ledger: dict[str, Any]
    old: Config
    new: Config
    before: str
    again: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        visits = {visit.stage for visit in self.old.timetable.visits}
        theirs = {visit.stage for visit in self.new.timetable.visits}
        if self.before not in self.ledger and self.before not in visits | theirs:
            known = [*self.ledger, *(stage for stage in sorted(visits | theirs) if stage not in self.ledger)]
            raise ConfigError(f"{self.folder.path} has no stage {self.before!r}", expected=f"one of {', '.join(known)}")
        names = list(self.ledger)
        finished = names[: names.index(self.before)] if self.before in self.ledger else names
        if not finished:
            raise ConfigError(
                f"{self.folder.path} has finished nothing before {self.before!r}",
                expected="a stage before which something is finished",
                remedy="begin a run of its own instead",
            )
        self.left_out += [stage for stage in finished if stage in visits - theirs]
        for stage in finished:
            if stage not in self.left_out:
                (self.again if self._is_made_again(stage) else self.kept).append(stage)

    @cached_property
    def changed(self) -> list[str]:
        """What differs and changes results, as `key: old -> new`."""
        return differences(self.new, self.old)

    @property
    def gone(self) -> str:
        """The newest index that is kept, where the next one would begin from it and it is not there; else empty."""
        built = [stage.partition("/")[2] for stage in self.kept if stage.startswith("index/")]
        is_there = not built or self.folder.index(built[-1]).exists()
        return "" if is_there or not self.new.index.warm_start else built[-1]

    @property
    def visits(self) -> Iterator[Visit]:
        """The stages of training that are kept."""
        return (visit for visit in self.old.timetable.visits if visit.stage in self.kept)

    def changes(self, sections: Iterable[str]) -> list[str]:
        """List what changes below some sections or keys."""
        below = tuple(f"{section}." for section in sections)
        return [one for one in self.changed if one.startswith(below)]

    def require_same_training(self) -> None:
        """Refuse changes that would have changed what is taken over.

        Raises:
            ConfigError: They would.
        """
        if wrong := self.changes(["data", "recipe"]) or [one for one in self.changed if one.startswith("recipe:")]:
            raise ConfigError(
                f"a branch cannot change {', '.join(wrong)}: all that is taken over was computed from it",
                expected="settings of later stages",
                remedy="begin a run of its own",
            )
        for visit in self.visits:
            if reasons := self._reasons(visit):
                raise ConfigError(
                    f"{visit.stage} of {self.folder.path} would have been another with {'; '.join(reasons)}",
                    expected="changes that concern later stages only",
                    remedy=f"branch before an earlier stage (--before {visit.stage}), or undo the change",
                )

    def _reasons(self, visit: Visit) -> list[str]:
        """List what makes a stage of training another one under the new configuration."""
        phase, table = visit.phase, self.new.timetable
        models = [phase.model, *([phase.opponent] if phase.opponent else [])]
        reasons = self.changes(models) + self._changes_of_settings(visit)
        theirs = next(one for one in table.visits if one.stage == visit.stage)
        if theirs != visit and not reasons:
            reasons.append("another length, schedule or objective of its phase")
        mine = self.old.timetable
        if mine.joint.get(visit.candidates) != table.joint.get(visit.candidates):
            reasons.append(f"other negatives ({visit.candidates})")
        for name in mine.candidates_of(visit):
            if name not in [one.name for one in table.minings] or mine.mining(name) != table.mining(name):
                reasons.append(f"other candidates ({name})")
            if mine.mining(name).weights is None:
                reasons += self.changes(["bm25"])
        reads_words = any(getattr(self.old.models[one], "bm25_prior", 0) for one in models)
        if reads_words or self.old.data.fallback_positive != "none":
            reasons += self.changes(["bm25"])
        if phase.opponent and self.old.decided_on_dev:
            reasons += [one for one in self.changed if _DECIDES.match(one)]
        if (mine.remove_answers, mine.search_deeper) != (table.remove_answers, table.search_deeper):
            reasons.append("another way to mine candidates (remove_answers, search_deeper)")
        return reasons

    def _changes_of_settings(self, visit: Visit) -> list[str]:
        """List what changes of a phase's settings; phases of a game have some in common."""
        phase = visit.phase
        if phase.is_warmup or phase.single:
            return self.changes([phase.section])
        game = phase.section.partition(".")[0]
        trained = {one.phase.section for one in self.visits}
        later = [one.section for one in self.old.timetable.phases if one.section not in trained]
        return [one for one in self.changes([game]) if one not in self.changes(later)]

    def _is_made_again(self, stage: str) -> bool:
        kind, _, name = stage.partition("/")
        if stage == LAST_STAGE or (kind in _MEASURES and name == "test"):
            return True
        if kind in _MEASURES:
            return bool(self.changes(["evaluation", "bm25", "run"]) or self.left_out)
        if stage == "starts":
            return bool(self.changes([*self.old.models, *self.new.models]) or self._changed_seed)
        if stage == "shards":
            return bool(self.changes([*self.old.models, *self.new.models]))
        if stage in ("bm25", "positives"):
            return bool(self.changes(["bm25"]))
        if kind == "index":
            return bool(self.changes(["index"]))
        if kind == "candidates":
            return self._draws_others(name)
        if kind == STALENESS:  # of the candidates of two refreshes
            refreshes = int(name), int(self.ledger[stage]["result"]["before"])
            return any(self._draws_others(iteration_name(iteration)) for iteration in refreshes)
        mined = name.partition("@")[0]  # where they were scored anew
        if kind == "rescore" or (kind == "negatives" and mined != name):
            scored = [each.timetable.rescored.get(name, []) for each in (self.old, self.new)]
            drawn = [[(one.stage, one.places) for one in visits] for visits in scored]
            if drawn[0] != drawn[1] or self._changed_seed:
                return True
        if kind == "rescore":
            return self._draws_others(mined)
        if kind == "negatives":
            joint = (self.old.timetable.joint.get(mined), self.new.timetable.joint.get(mined))
            return joint[0] != joint[1] or self._draws_others(mined)
        return False

    def _draws_others(self, name: str) -> bool:
        """Tell whether other queries are mined: with a sample of them, whoever draws decides."""
        tables = self.old.timetable, self.new.timetable
        minings = [[one for one in table.minings if one.name == name] for table in tables]
        if minings[0] != minings[1] or tables[0].mine_all != tables[1].mine_all:
            return True
        if tables[0].mine_all:
            return False
        drawn = [
            [(one.stage, one.places) for one in [*table.drawn_by(name), *table.drawing_from(name)]] for table in tables
        ]
        return drawn[0] != drawn[1] or self._changed_seed

    @property
    def _changed_seed(self) -> bool:
        return self.old.run.seed != self.new.run.seed


def _fill(target: RunFolder, plan: _Plan, new: Config, record: Branched) -> None:
    """Write the new folder."""
    source = plan.folder
    target.path.mkdir(parents=True)
    for name in _WHOLE:
        _link(source.path / name, target.path / name)
    for stage in plan.kept:
        kind, _, name = stage.partition("/")
        if kind in _OF_KIND:
            _link(source.path / _OF_KIND[kind] / name, target.path / _OF_KIND[kind] / name)
    models = dict.fromkeys(visit.phase.model for visit in plan.visits)
    for model in plan.old.models:
        _link(source.weights(model, ZERO_SHOT), target.weights(model, ZERO_SHOT))
    for visit in plan.visits:
        state = WeightsOf(visit.phase.model, visit.iteration).state
        _link(source.weights(visit.phase.model, state), target.weights(visit.phase.model, state), must=visit.stage)
    for model in models:
        _take_checkpoints(source, target, plan, model)
    take_points(source.path / "metrics.jsonl", target.path / "metrics.jsonl", plan.kept)  # TensorBoard shows these
    if source.micro_batches.exists():
        shutil.copyfile(source.micro_batches, target.micro_batches)  # without its mode: the run that goes on writes it
    _take_results(source, target, plan)
    if starts := read_starts(source.path):
        record_start(target.path, starts[-1])
    write_json(target.path / RECORD, asdict(record))
    target.config.write_text(dump_config(new), encoding="utf-8")
    write_json(target.ledger, {"stages": {stage: plan.ledger[stage] for stage in plan.kept}})


def _take_checkpoints(source: RunFolder, target: RunFolder, plan: _Plan, model: str) -> None:
    """Take a model's checkpoints up to the end of the last stage that is kept and had steps."""
    stages = [visit.stage for visit in plan.visits if visit.phase.model == model and visit.phase.steps > 0]
    if not stages:
        return
    number = int(plan.ledger[stages[-1]]["result"]["checkpoint"])
    if not (source.checkpoints / model / f"{number:06d}").exists():
        raise ArtifactError(
            f"the checkpoint of {model} behind {stages[-1]} is not in {source.path} any more: later ones are",
            expected=f"the checkpoint {number:06d}",
            remedy="branch from a run that stopped there (run.stop_before), or raise run.keep_checkpoints next time",
        )
    for folder in sorted((source.checkpoints / model).glob("[0-9]*")):
        if int(folder.name) <= number:
            _link(folder, target.checkpoints / model / folder.name)


def _take_results(source: RunFolder, target: RunFolder, plan: _Plan) -> None:
    """Take the rows and rankings of the measurements that are kept; all are of the dev split."""
    measured: set[tuple[str, int | None]] = set()
    for stage in plan.kept:
        if stage.startswith("evaluate/"):
            result = parse_record(plan.ledger[stage]["result"], Measured, f"the result of {stage}")
            measured |= {(score.system, score.iteration) for score in result.scores}

    def is_kept(row: dict[str, Any]) -> bool:
        over = row["over"] is None or (row["over"], row["over_iteration"]) in measured
        return row["split"] != "test" and (row["system"], row["iteration"]) in measured and over

    rows = read_json(source.summary, "the summary of results") if source.summary.exists() else []
    rows = [row for row in rows if is_kept(row)]
    if not rows:
        return
    target.results.mkdir()
    write_json(target.summary, rows)
    for name in dict.fromkeys(name for row in rows for name in ranking_names(row)):
        _link(source.results / name, target.results / name)


def _link(source: Path, target: Path, *, must: str | None = None) -> None:
    """Give a file, or all files of a folder, further names; unfinished ones, which begin with a dot, are left.

    Args:
        source: What is there; passed over where it is not.
        target: The new name.
        must: Stage that left it, where it has to be there.

    Raises:
        ArtifactError: It has to be there and is not.
    """
    if not source.exists():
        if must is not None:
            raise ArtifactError(f"what {must} left is not there: {source}", expected="the artifacts of finished stages")
        return
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # two stages leave their parts in one folder, such as embeddings and index
            return
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(source, target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if not entry.name.startswith("."):
            _link(entry, target / entry.name)

"""What a report says of runs beside their results: settings and where they differ, code, data, time, warnings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from engine.config.file import flatten
from engine.reliability.exit_codes import EXIT_PREEMPTED
from engine.reliability.failure import Failure, read_failure
from engine.reliability.progress import format_seconds
from launcher.commands.report.opened import Opened
from shards.errors import counted, listed

_WHERE_ONLY = frozenset({"run.path"})
"""Settings that differ between any two runs and say nothing."""
_SLOW = 0.5
_MOST_FAILURES = 10


@dataclass(frozen=True, slots=True)
class Work:
    """What a kind of stages took: its name, the seconds of all of them together, and how many they are."""

    kind: str
    seconds: float
    num_stages: int


def differing_settings(runs: Sequence[Opened]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the settings that are not the same in all runs: key, and the value of each run."""
    flat = [flatten(one.run.config.model_dump(mode="json")) for one in runs]
    keys = list(dict.fromkeys(key for own in flat for key in own if key not in _WHERE_ONLY))
    rows = [(key, tuple(str(own[key]) if key in own else "(none)" for own in flat)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def overview(opened: Opened) -> list[tuple[str, str]]:
    """Return what a run is: name -> words."""
    first, last = (opened.starts[0], opened.starts[-1]) if opened.starts else (None, None)
    rows = [
        ("state", opened.in_words),
        ("folder", str(opened.run.folder.path)),
        ("recipe", opened.run.config.recipe),
        ("stages finished", str(len(opened.ledger))),
        ("first start", first.time.replace("T", " ") if first else "not known"),
        ("starts", str(len(opened.starts))),
        ("ranks", f"{last.num_ranks}, the first on {last.host}" if last else "not known"),
        ("time of finished stages", format_seconds(sum(work.seconds for work in work_of(opened)))),
    ]
    if opened.curves.num_lines > 1:
        rows.append(("from the first measurement to the last", format_seconds(opened.curves.seconds)))
    return rows


def data_of(opened: Opened) -> list[tuple[str, str]]:
    """Return the sizes of a run's data, and the fingerprint that tells them from others."""
    corpus, rows = opened.corpus, [("data folder", str(opened.run.config.data.path or "made up, in the run folder"))]
    if corpus is not None:
        tokens = ", ".join(f"{number:,} ({stream})" for stream, number in corpus.tokens.items())
        rows += [
            ("fingerprint", corpus.dataset_sha256),
            ("documents", f"{corpus.documents:,}"),
            ("shards", f"{corpus.shards:,}"),
            ("tokens", tokens),
        ]
    if opened.dataset is not None:
        for split, judged in opened.dataset.qrels.items():
            judgements = sum(len(grades) for grades in judged.values())
            rows.append((f"queries of {split}", f"{len(judged):,} with {counted(judgements, 'judgement')}"))
    return rows


def code_of(opened: Opened) -> list[tuple[str, str]]:
    """Return the code and the command of a run's last start."""
    if not opened.starts:
        return []
    last = opened.starts[-1]
    rows = [("command", " ".join(last.argv)), ("commit", last.git or "not known"), ("Python", last.python)]
    rows += [(name, version or "not installed") for name, version in last.versions.items()]
    return [*rows, ("control messages", last.coordinator)]


def work_of(opened: Opened) -> list[Work]:
    """Return what each kind of stage took, in the order in which they first ended."""
    found: dict[str, list[float]] = {}
    for name, entry in opened.ledger.items():
        found.setdefault(name.partition("/")[0], []).append(float(entry["seconds"]))
    return [Work(kind, sum(seconds), len(seconds)) for kind, seconds in found.items()]


def ranks_of(opened: Opened) -> list[tuple[str, ...]]:
    """Return the last sign of each rank of the newest start: rank, host, state, where, speed."""
    return [
        (
            str(beat.rank),
            beat.host,
            beat.state if beat.code is None else f"{beat.state} with {beat.code}",
            beat.where or "-",
            f"{beat.speed:.3g} {beat.unit}s a second" if beat.speed else "-",
        )
        for beat in opened.state.beats
    ]


def warnings_of(opened: Opened) -> list[str]:
    """Return what in a run's records a reader should know before the numbers are believed."""
    found = list(_of_starts(opened)) + [_failed(one) for one in _failures(opened)]
    for tag, curve in opened.curves.by_tag.items():
        if tag.endswith("/skipped_steps") and curve.bins and max(one.high for one in curve.bins) > 0:
            most = max(one.high for one in curve.bins)
            found.append(
                f"{tag.rpartition('/')[0]}: {most:g} steps were skipped, since their gradients were not finite."
            )
    if opened.curves.not_finite:
        tags = [f"{tag} ({times})" for tag, times in opened.curves.not_finite.items()]
        found.append(f"Measurements that are no finite numbers: {listed(tags, 8)}.")
    if opened.curves.left_out:
        found.append(f"{opened.curves.left_out} measurements are left out: there are too many kinds of them.")
    target = opened.run.config.index.recall_target
    for name, result in opened.results_of("index").items():
        recall = result.get("recall")
        if isinstance(recall, float) and recall < target:
            found.append(f"Index {name}: recall {recall:.3f} is below index.recall_target, {target:g}.")
    for stage, share in opened.curves.by_stage.get("encode/slowest_rank", {}).items():
        if share < _SLOW:
            found.append(f"{stage}: the slowest rank had {share:.0%} of the others' pace; in training all wait for it.")
    return found


def slowest_ranks(opened: Opened) -> list[tuple[str, str]]:
    """Return the pace of the slowest rank as a share of the others', by pass over the corpus."""
    return [(stage, f"{share:.0%}") for stage, share in opened.curves.by_stage.get("encode/slowest_rank", {}).items()]


def paces_of(opened: Opened) -> list[tuple[str, str]]:
    """Return the usual tokens a second of each training phase and of each pass over the corpus."""
    curves = opened.curves.of_measure("tokens_per_second")
    rows = [(phase, f"{median(one.y for one in curve.bins):,.0f}") for phase, curve in curves.items()]
    for name, result in opened.results_of("encode").items():
        if isinstance(speed := result.get("tokens_per_second"), int | float):
            rows.append((f"encode/{name}", f"{speed:,.0f}"))
    return rows


def _of_starts(opened: Opened) -> list[str]:
    found = []
    for number, start in enumerate(opened.starts, start=1):
        found += [f"Start {number} was forced to go on although {what}." for what in start.forced or ()]
        if start.git is not None and start.git.endswith("-dirty"):
            found.append(f"Start {number} ran code that differs from its commit, {start.git}.")
    for before, after in zip(opened.starts, opened.starts[1:], strict=False):
        changed = [
            f"{name} {before.versions.get(name)} → {version}"
            for name, version in after.versions.items()
            if before.versions.get(name) != version
        ]
        if before.git != after.git:
            changed.append(f"commit {before.git} → {after.git}")
        if changed:
            found.append(f"The start of {after.time} ran other code than the one before it: {listed(changed, 6)}.")
    return found


def _failures(opened: Opened) -> list[Failure]:
    """Return the first failure of each start that failed, without those that were asked to stop."""
    folder = opened.run.folder.path
    failures = [read_failure(folder, start.nonce) for start in opened.starts[-_MOST_FAILURES:]]
    return [one for one in failures if one is not None and one.code != EXIT_PREEMPTED]


def _failed(failure: Failure) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(failure.time))
    stage = failure.stage or "between stages"
    return f"A start failed at {when} in {stage}, rank {failure.rank} on {failure.host}: {failure.message}"

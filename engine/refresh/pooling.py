"""Pooling: candidates of several retrievers are laid together and filtered, once, before a phase draws from them.

A stage of its own between mining and training, so that what filters take out is known, counted and checked before the
first step. Queries are filtered in blocks that are handed out to the ranks. A query that keeps fewer documents than a
step draws gets what is missing from the corpus at random, as in mining: easy negatives, which the counts tell of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.config.negatives import (
    AdditionsFilterConfig,
    AnswersFilterConfig,
    NegativesConfig,
    RelabelsFilterConfig,
)
from engine.data.arrays import OpenedInTurn
from engine.data.candidates import Candidates
from engine.data.chosen_filters import answers_of, filters_of
from engine.data.corpus import Data
from engine.data.filtered import Filtered, PooledSource, is_filtered, publish
from engine.data.filters import Asked, Teacher
from engine.data.joint import JointLists, JointPool
from engine.data.negatives import ANSWERS, FALSE_NEGATIVES, IDENTICAL_IDS, POSITIVES, draw_from_corpus, step_rng
from engine.data.samplers import Sampler, sampler_of
from engine.errors import ArtifactError, DataError
from engine.log import get_logger
from engine.refresh.blocks import Blocks
from engine.reliability.progress import progress_bar
from engine.run import Run, Stage
from shards.errors import listed
from shards.files import canonical_json, sha256_file

log = get_logger(__name__)
_DRAWN, _SHORT, _ENTRIES, _DOCUMENTS = "drawn", "short", "entries", "documents"
_TAKEN_IN_MINING = (POSITIVES, FALSE_NEGATIVES, IDENTICAL_IDS, ANSWERS)
_BLOCK_SIZE = 4096
"""Queries filtered as one unit of work: seconds."""


@dataclass(frozen=True, slots=True)
class PooledQueries:
    """Result of a stage `negatives/NAME`.

    Attributes:
        queries: Pooled.
        entries: Candidates of all lists together, before filters.
        documents: Different documents among those of each query.
        taken_in_mining: What the retrievers' lists lost before, by reason.
        rejected: Documents that each filter took out, in the order of the filters.
        without_hits: Queries for which a retriever found nothing, by retriever.
        drawn_at_random: Documents that were drawn from the corpus where too little was left.
        queries_filled: Queries that got some.
    """

    queries: int
    entries: int
    documents: int
    taken_in_mining: dict[str, int]
    rejected: dict[str, int]
    without_hits: dict[str, int]
    drawn_at_random: int
    queries_filled: int


@dataclass(frozen=True)
class Pooling:
    """What a joint pool is made of.

    Attributes:
        name: Of the pool, in the ledger and in the run folder.
        sources: Candidates by their names in the run folder.
        top_k: Best candidates of each that are in the pool; None for all.
        settings: Filters and sampler.
        rows: Training rows that are pooled, int64 [Q].
        needed: Negatives that a step draws, n.
        teacher: A ranker's scores, for the filters that ask for them.
        within: Those that filters keep to, likewise.
    """

    name: str
    sources: Mapping[str, Candidates]
    top_k: int | None
    settings: NegativesConfig
    rows: NDArray[np.int64]
    needed: int
    teacher: Teacher | None = None
    within: Mapping[str, Candidates] = field(default_factory=dict)

    @property
    def lists(self) -> JointLists:
        """The candidates that are pooled, as deep as they are."""
        return JointLists([part.top(self.top_k) for part in self.sources.values()])

    def asked(self, run: Run) -> str:
        """Name all that the content of the pool depends on."""
        files = [
            sha256_file(one.file)
            for one in self.settings.filters
            if isinstance(one, AdditionsFilterConfig | RelabelsFilterConfig) and one.file.is_file()
        ]
        asked = [
            [one.manifest_sha256 for one in pooled_sources(run, self.sources)],
            [one.manifest_sha256 for one in pooled_sources(run, self.within)],
            None if self.teacher is None else asdict(self.teacher.stamp),
            *(self.settings.model_dump(mode="json"), self.top_k, self.needed, files, run.config.run.seed),
            hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest(),
        ]
        return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


def joint_negatives(run: Run, data: Data, pooling: Pooling) -> JointPool:
    """Filter the candidates of several retrievers, unless that is done, and return what to draw negatives from.

    Args:
        run: Whose folder has the candidates.
        data: Corpus and training queries.
        pooling: What is pooled.

    Returns:
        A pool in which each of the queries has at least `needed` negatives.

    Raises:
        ArtifactError: Candidates or teacher scores are of another corpus.
        ConfigError: A filter needs what is not there: teacher scores, or another retriever's candidates.
        DataError: A retriever was not asked for a query, a file of labels does not fit the data, or the whole corpus
            has too few negatives of a query.
    """
    stage, folder = f"negatives/{pooling.name}", run.folder.negatives(pooling.name)
    asked = pooling.asked(run)
    if run.is_finished(stage) and not run.coordinator.only_rank_zero(
        f"{stage}: look", lambda: is_filtered(folder, asked)
    ):
        run.forget([stage])  # it was made of other candidates
    run.once(stage, filter_candidates, data, pooling, asked)
    return JointPool(
        pooling.lists, Filtered.load(folder, asked), sampler_of(pooling.settings), pooling.settings.repeats
    )


def filter_candidates(stage: Stage, data: Data, pooling: Pooling, asked: str) -> PooledQueries:
    """Filter the candidates of all queries with all ranks, and publish what is left.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        pooling: What is pooled.
        asked: Names what the result depends on.
    """
    coordinator, folder = stage.run.coordinator, stage.run.folder.negatives(pooling.name)
    rows, sources = pooling.rows, pooled_sources(stage.run, pooling.sources)
    cut = [rows[start : start + _BLOCK_SIZE] for start in range(0, len(rows), _BLOCK_SIZE)]
    blocks = Blocks(stage, folder, asked, cut or [rows], lambda path: is_filtered(path, asked))
    with coordinator.agreement(f"{stage.name}: filters"):
        work = _Work(stage, data, pooling)
    missing = blocks.missing()
    with (
        progress_bar(stage.name, len(rows), "query", shown=stage.run.is_main) as bar,
        coordinator.agreement(f"{stage.name}: filter"),
    ):
        for number in coordinator.hand_out(stage.name, missing):
            bar.update(number * _BLOCK_SIZE - bar.n)
            publish([work.block(blocks.rows[number], sources, asked)], blocks.part(number))

    def join() -> Counter[str]:
        blocks.publish(lambda parts: publish(OpenedInTurn(lambda part: Filtered.load(part, asked), parts), folder))
        return Filtered.load(folder, asked).counts

    result = work.result(Counter(coordinator.only_rank_zero(f"{stage.name}: publish", join)))
    state = pooling.name.rpartition("@")[2]  # of candidates that were scored anew, whose scores they have
    iteration = int(state) if state.isdigit() else 0
    stage.run.metrics.write(stage.name, iteration, _as_metrics(result))
    if 2 * result.queries_filled > result.queries:
        log.warning(
            "%s: %d of %d queries keep fewer than the %d negatives that a step draws, and are filled up at random: "
            "ease the filters, widen the sampler's window, or mine deeper",
            *(stage.name, result.queries_filled, result.queries, pooling.needed),
        )
    return result


def pooled_sources(run: Run, candidates: Mapping[str, Candidates]) -> tuple[PooledSource, ...]:
    """Name candidates of a run by what they come from."""
    manifests = {name: run.folder.candidates(name) / "candidates.json" for name in candidates}
    return tuple(PooledSource(name, part.stamp, sha256_file(manifests[name])) for name, part in candidates.items())


def _as_metrics(result: PooledQueries) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, value in asdict(result).items():
        of_name = {f"/{key}": number for key, number in value.items()} if isinstance(value, dict) else {"": value}
        metrics |= {f"negatives/{name}{key}": float(number) for key, number in of_name.items()}
    return metrics


class _Work:
    """Filters queries of one pool.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        pooling: What is pooled.
    """

    def __init__(self, stage: Stage, data: Data, pooling: Pooling) -> None:
        self._data, self._pooling, self._lists, self._seed = data, pooling, pooling.lists, stage.seed
        self._sampler: Sampler = sampler_of(pooling.settings)
        self._contains_answer = answers_of(data)
        self._with_answers = stage.run.timetable.remove_answers or any(
            isinstance(one, AnswersFilterConfig) for one in pooling.settings.filters
        )
        _require_one_corpus(pooling, data)
        self._filters = filters_of(pooling.settings, data, self._contains_answer, pooling.teacher, pooling.within)

    def block(self, rows: NDArray[np.int64], sources: tuple[PooledSource, ...], asked: str) -> Filtered:
        """Filter some queries."""
        counts: Counter[str] = Counter()
        qids, kept, filled = [], [], []
        for row in rows.tolist():
            train = self._data.train
            query = Asked(train.queries[row].id, train.known(row), train.positives[row])
            bits_C, drawn = self._query(query, counts)
            qids.append(query.qid)
            kept.append(bits_C)
            filled.append(drawn)
        return Filtered.of(asked, sources, qids, kept, filled, counts, width=self._lists.width)

    def _query(self, asked: Asked, counts: Counter[str]) -> tuple[NDArray[np.uint8], list[int]]:
        entries = found = self._lists.of(asked.qid)
        counts[_ENTRIES] += len(found)
        for source in range(len(self._lists.parts)):
            counts[f"without_hits/{source}"] += not (found.sources_E == source).any()
        num_documents = found.num_documents
        counts[_DOCUMENTS] += num_documents
        for name, one in self._filters:
            entries = entries.where(one.kept(asked, entries))
            num_left = entries.num_documents
            counts[f"rejected/{name}"] += num_documents - num_left
            num_documents = num_left
        bits = np.zeros(self._lists.width, dtype=np.bool_)
        bits[entries.places_E] = True
        usable = entries.where(self._sampler.usable(entries.ranks_E))
        num_usable = len(usable) if self._pooling.settings.repeats else usable.num_documents
        drawn = self._fill(asked, found.documents_E, self._pooling.needed - num_usable)
        counts[_DRAWN] += len(drawn)
        counts[_SHORT] += bool(drawn)
        return np.packbits(bits), drawn

    def _fill(self, asked: Asked, found_E: NDArray[np.int64], missing: int) -> list[int]:
        """Draw what a query lacks from the corpus: neither known, nor found and taken out, nor named by a filter."""
        if missing <= 0:
            return []
        taken = set(found_E.tolist())
        for _, one in self._filters:
            taken.update(one.forbids(asked))
        drawn: list[int] = []
        for contains_answer in ([self._contains_answer] if self._with_answers else []) + [None]:
            drawn += draw_from_corpus(
                self._data.shards.num_documents,
                missing - len(drawn),
                step_rng(
                    self._seed, f"negatives of the pool {self._pooling.name}", int(contains_answer is None), asked.qid
                ),
                taken=taken,
                contains_answer=(lambda document: self._contains_answer(asked.qid, document))
                if contains_answer
                else None,
            )
            taken.update(drawn)
        if len(drawn) < missing:
            self._refuse(asked, missing - len(drawn))
        return drawn

    def _refuse(self, asked: Asked, missing: int) -> None:
        names = ", ".join(name for name, _ in self._filters[1:]) or "none"
        raise DataError(
            f"query {asked.qid!r} lacks {missing} of the {self._pooling.needed} negatives that a step draws: of the "
            f"{self._data.shards.num_documents} documents, all others are its positives or were taken out (filters: "
            f"{names})",
            expected=f"at least {self._pooling.needed} documents that may be its negatives",
            remedy="lower num_negatives, ease the filters, widen the sampler's window, or use a larger corpus",
        )

    def result(self, counts: Counter[str]) -> PooledQueries:
        """Sum up a pool."""
        parts = self._lists.parts
        names = [part.source for part in parts]
        names = [f"{name}_{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]
        return PooledQueries(
            queries=len(self._pooling.rows),
            entries=counts[_ENTRIES],
            documents=counts[_DOCUMENTS],
            taken_in_mining={reason: sum(part.counts[reason] for part in parts) for reason in _TAKEN_IN_MINING},
            rejected={name: counts[f"rejected/{name}"] for name, _ in self._filters},
            without_hits={name: counts[f"without_hits/{source}"] for source, name in enumerate(names)},
            drawn_at_random=counts[_DRAWN],
            queries_filled=counts[_SHORT],
        )


def _require_one_corpus(pooling: Pooling, data: Data) -> None:
    corpus = data.shards.manifest.sha256
    stamps = [(name, part.stamp) for name, part in (*pooling.sources.items(), *pooling.within.items())]
    if pooling.teacher is not None:
        stamps.append(("teacher scores", pooling.teacher.stamp))
    strange = [name for name, stamp in stamps if stamp.corpus_sha256 != corpus]
    if strange:
        raise ArtifactError(
            f"{listed(strange, 3)} are of another corpus than the run's",
            expected=f"corpus {corpus[:12]}",
            remedy="make them of this corpus",
        )

"""A mixture of the scores of retriever, ranker, further retrievers and BM25, as a system of its own.

The documents are those that all retrievers found, BM25 among them, one of each in turn, or those of the first alone, to
the depth of re-ranking; all parts score these and no others (`engine.evaluation.part_scores`). Scores are brought to
mean 0 and deviation 1 within the query and mixed linearly (`engine.evaluation.fuse`). The weights are fitted on the dev
split, kept with the hashes of who was mixed, and applied to any other split as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.config.metric_names import cutoff_of
from engine.config.recipe import Config
from engine.data.corpus import Data, sample_queries
from engine.data.trec import Rankings, best_first, read_trec
from engine.errors import ConfigError, DataError
from engine.evaluation import fuse
from engine.evaluation.evaluate import Ranking, record_ranking, rerank, searchers_of, split_queries
from engine.evaluation.fuse import normalise
from engine.evaluation.measures import counts_in_means, query_values, values_of_any
from engine.evaluation.mixture import Floats, Fusion, MeasuredPart, fit, recorded_fusion, simplex
from engine.evaluation.part_scores import Scored, score_parts
from engine.evaluation.summary import read_rows
from engine.evaluation.systems import HYBRID, RANKER, System, behind
from engine.log import get_logger
from engine.models.weights import weights_sha256
from engine.results import Measured
from engine.retrievers.bm25_index import digest_of_settings
from engine.retrievers.kinds import build_lost
from engine.run import Run, RunFolder, Stage
from shards.files import write_atomically, write_json
from shards.records import Dataset, Query

log = get_logger(__name__)
DEV = "dev"
_GATHERED_TOGETHER = 64
"""Points of the grid whose values the ranks exchange at once: of ten thousand queries some megabytes."""
Judgements = Mapping[str, Mapping[str, int]]
"""Query id -> document id -> grade."""


def require_fusable(config: Config, dataset: Dataset) -> None:
    """Refuse data on whose dev split no weights can be fitted, before any work is done.

    Args:
        config: With the metric, the sample of dev queries and the threshold of relevance.
        dataset: The data.

    Raises:
        ConfigError: The metric looks deeper than a search.
        DataError: None of these dev queries has a relevant document.
    """
    settings = config.evaluation
    if cutoff_of(settings.fusion_metric) > settings.search_depth:
        raise ConfigError(
            f"evaluation.fusion_metric {settings.fusion_metric} looks deeper than the {settings.search_depth} "
            f"documents of a query that a search keeps",
            expected="a metric that looks no deeper",
            remedy=f"name another one, or set evaluation.depth={cutoff_of(settings.fusion_metric)}",
        )
    queries = sample_queries(dataset, DEV, settings.max_dev_queries, config.run.seed)
    grades = [grade for query in queries for grade in dataset.qrels[DEV][query.id].values()]
    if max(grades, default=0) < settings.relevance_threshold:
        raise DataError(
            f"none of {len(queries)} queries of the split {DEV!r} of {dataset.path} has a relevant document, so there "
            f"is nothing to which evaluation.fuse could fit its weights",
            expected=f"a grade of at least {settings.relevance_threshold} for a document of at least one query",
            remedy="add judgements of dev queries, or set evaluation.fuse=false",
        )


def fusable_queries(config: Config, dataset: Dataset) -> list[str]:
    """Return the dev queries to which weights are fitted: those that are measured, and judged.

    Args:
        config: With the sample of dev queries.
        dataset: The data.
    """
    queries = sample_queries(dataset, DEV, config.evaluation.max_dev_queries, config.run.seed)
    return [query.id for query in queries if counts_in_means(dataset.qrels[DEV][query.id])]


def fit_on_dev(stage: Stage, data: Data, system: System, sample: int | None = None) -> Measured:
    """Fit the weights of a mixture on the dev split and keep them, then measure it there; no other split is read.

    Args:
        stage: Where this runs.
        data: The run's own.
        system: The mixture; the rankings of all that search have been recorded on dev, and those of the rankers over
            the first of them.
        sample: As of `evaluate_systems`.

    Raises:
        DataError: No dev query has a relevant document.
        ArtifactError: A ranker's ranking is not of the documents that were found.
    """
    run, folder, settings = stage.run, stage.run.folder, stage.run.config.evaluation
    queries = split_queries(run, data, DEV)
    qrels = {query.id: data.dataset.qrels[DEV][query.id] for query in queries}
    build_lost(run, data, folder, searchers_of(system.parts))
    scored = _scored(stage, data, folder, system, DEV, sample)
    points = simplex(len(system.parts))
    values = _values_together(stage, scored, qrels, [part.name for part in system.parts], points)

    def choose() -> None:
        fusion = fit(
            np.array(list(values.values())).T,
            points,
            [_measured_part(run, part, qrels, list(values), sample) for part in system.parts],
            iteration=system.iteration,
            split=DEV,
            metric=settings.fusion_metric,
            relevance_threshold=settings.relevance_threshold,
            rerank_depth=settings.rerank_depth,
            seed=stage.seed,
            candidates=HYBRID if system.orders_hybrid else "retriever",
        )
        write_json(folder.fusion, asdict(fusion))
        log.info("%s", fusion.told)

    run.coordinator.only_rank_zero(f"{stage.name}: choose weights", choose)
    return _measure(stage, data, folder, system, DEV, scored, read_fusion(run, system), sample)


def evaluate_fused(
    stage: Stage, data: Data, folder: RunFolder, split: str, system: System, sample: int | None = None
) -> Measured:
    """Measure a mixture on a split by the weights that were fitted before.

    Args:
        stage: Where this runs.
        data: The run's own data, or another corpus.
        folder: As of `evaluate_systems`; the weights are the run's whatever it is.
        split: Any; the rankings of all that search and of the rankers have been recorded on it.
        system: The mixture, over the candidates that the weights were fitted on (`fitted_system`).
        sample: As of `evaluate_systems`.

    Returns:
        The score; nothing where the split has no queries.

    Raises:
        ConfigError: There are no weights, or those of other models.
        ArtifactError: As of `fit_on_dev`.
    """
    fusion = read_fusion(stage.run, system)
    if not split_queries(stage.run, data, split):
        return Measured()  # and no ranking of the split to read
    scored = _scored(stage, data, folder, system, split, sample)
    return _measure(stage, data, folder, system, split, scored, fusion, sample)


def _scored(
    stage: Stage, data: Data, folder: RunFolder, system: System, split: str, sample: int | None
) -> dict[str, Scored]:
    """Return the scores of all parts for this rank's queries, over documents that are recorded first where need be."""
    queries = split_queries(stage.run, data, split)
    if system.over is not None and system.orders_hybrid:
        _record_candidates(stage, data, folder, system, system.over, queries, split, sample)
    return score_parts(stage, data, folder, system, queries, split, sample)


def _record_candidates(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    system: System,
    found: System,
    queries: Sequence[Query],
    split: str,
    sample: int | None,
) -> None:
    """Record what all that search found, in turn, and what the rankers make of it, as rows of their own.

    A document that a ranker has scored behind the first retriever already is not scored again.
    """
    with stage.run.coordinator.agreement(f"{stage.name}: join the lists of {split}"):
        lists = [read_trec(folder.results / part.run_file_name(split, sample)) for part in found.parts]
        ranking: Ranking = {}
        for query in queries:
            whole = fuse.interleave([best_first(query.id, own.get(query.id, {})) for own in lists])
            kept = whole[: stage.run.config.evaluation.search_depth]
            ranking[query.id] = {docid: 1.0 / rank for rank, docid in enumerate(kept, start=1)}
    record_ranking(stage, data, folder, ranking, found, split, sample)
    for part in system.parts:
        if part.kind == RANKER:
            known = _said_before(
                stage, folder, behind(stage.run.config, system.parts[0], part), lists[0], split, sample
            )
            ordered = rerank(stage, data, part, queries, ranking, folder=folder, known=known)
            record_ranking(stage, data, folder, ordered, part, split, sample)


def _said_before(
    stage: Stage, folder: RunFolder, ranker: System, found: Rankings, split: str, sample: int | None
) -> Ranking:
    """Return the scores that a ranker has given to what it has re-ordered, where that was recorded and is as deep."""
    depth, over = stage.run.config.evaluation.rerank_depth, ranker.over
    path = folder.results / ranker.run_file_name(split, sample)
    with stage.run.coordinator.agreement(f"{stage.name}: scores of {ranker.name}"):
        rows = [
            row
            for row in read_rows(folder.summary)
            if (row.system, row.iteration, row.split) == (ranker.name, ranker.iteration, split)
            and over is not None
            and (row.over, row.over_iteration, row.rerank_depth) == (over.name, over.iteration, depth)
        ]
        if not rows or not path.exists():
            return {}
        scores = read_trec(path)
        return {
            qid: {docid: scores[qid][docid] for docid in best_first(qid, own)[:depth] if docid in scores.get(qid, {})}
            for qid, own in found.items()
        }


def read_fusion(run: Run, system: System) -> Fusion:
    """Read the weights of a mixture, and refuse those of other models.

    Args:
        run: Whose weights.
        system: The mixture.

    Raises:
        ConfigError: There are none, or they were fitted for other models or settings of BM25.
        ArtifactError: Their record is damaged, or the weights of a part are missing.
    """
    remedy = (
        f"fit them on the run's own data: sparring evaluate {run.folder.path} --split dev --set evaluation.fuse=true"
        "; or do without: evaluate --set evaluation.fuse=false, search --no-fusion"
    )
    fusion = recorded_fusion(run.folder)
    if fusion is None:
        raise ConfigError(
            f"no weights of a mixture were fitted: there is no {run.folder.fusion}",
            expected="weights that were fitted on the dev split of the run's own data",
            remedy=remedy,
        )
    fitted, present = _fitted_parts(fusion), _present_parts(run, system)
    if fitted != present:
        raise ConfigError(
            f"the mixture in {run.folder.fusion} was fitted for {', '.join(fitted)}",
            expected=f"{', '.join(present)}, which the run has now",
            remedy=remedy,
        )
    if fusion.rerank_depth != run.config.evaluation.rerank_depth and run.is_main:
        log.warning(
            "the weights of the mixture were fitted on the top %d of a query, and are used on its top %d",
            *(fusion.rerank_depth, run.config.evaluation.rerank_depth),
        )
    return fusion


def fusion_of(run: Run, system: System) -> Fusion | None:
    """Return the weights of a mixture; None where there are none, or those of other models.

    Args:
        run: Whose weights.
        system: The mixture.

    Raises:
        ArtifactError: As of `read_fusion`.
    """
    fusion = recorded_fusion(run.folder)
    return fusion if fusion is not None and _fitted_parts(fusion) == _present_parts(run, system) else None


def _fitted_parts(fusion: Fusion) -> list[str]:
    """Name who was mixed when weights were fitted."""
    return [f"{part.system} {part.weights_sha256[:16]}" for part in fusion.parts]


def _present_parts(run: Run, system: System) -> list[str]:
    """Name who would be mixed now."""
    return [f"{part.name} {identity_of(run, part)[:16]}" for part in system.parts]


def export_fusion(run: Run, system: System, target: Path) -> None:
    """Write the weights of a mixture, and the function that makes an order of them, for whoever serves the models.

    Where they were fitted for other models, nothing is written, older files are removed, and the log says so.

    Args:
        run: Whose weights; without any, nothing is done.
        system: The mixture of the exported models.
        target: Folder that gets `fusion.json` and `fuse.py`, the very files that the engine reads and runs.

    Raises:
        ArtifactError: The record of the weights is damaged.
    """
    if not run.folder.fusion.exists():
        return
    sources = (run.folder.fusion, Path(fuse.__file__))
    try:
        read_fusion(run, system)
    except ConfigError as error:
        log.warning("no mixture is exported: %s", error)
        for source in sources:
            (target / source.name).unlink(missing_ok=True)
        return
    for source in sources:
        with write_atomically(target / source.name) as temporary:
            temporary.write_bytes(source.read_bytes())


def identity_of(run: Run, part: System) -> str:
    """Return the hash of what a part's scores depend on: its weights, or the settings where it has none.

    Raises:
        ArtifactError: There are no such weights.
    """
    if part.weights is None:
        return digest_of_settings(run.config.bm25)
    return weights_sha256(run.folder.weights(part.weights.model, part.weights.state))


def _measured_part(
    run: Run, part: System, qrels: Judgements, judged: Sequence[str], sample: int | None
) -> MeasuredPart:
    """Measure a part's own ranking of dev, as the table has it."""
    settings = run.config.evaluation
    ranking = read_trec(run.folder.results / part.run_file_name(DEV, sample), top=cutoff_of(settings.fusion_metric))
    values = query_values(ranking, qrels, settings.fusion_metric, relevance_threshold=settings.relevance_threshold)
    return MeasuredPart(part.name, part.kind, identity_of(run, part), np.array([values[qid] for qid in judged]))


def _values_together(
    stage: Stage,
    scored: Mapping[str, Scored],
    qrels: Judgements,
    names: Sequence[str],
    points: Sequence[Sequence[float]],
) -> dict[str, list[float]]:
    """Return the metric of each judged query by each point of the grid, on every rank."""
    coordinator, settings = stage.run.coordinator, stage.run.config.evaluation
    own_qrels = {qid: qrels[qid] for qid in scored}
    with coordinator.agreement(f"{stage.name}: normalise"):
        normal = {qid: np.array([normalise(one.scores[name]) for name in names]) for qid, one in scored.items()}
    values: dict[str, list[float]] = {}
    for start in range(0, len(points), _GATHERED_TOGETHER):
        own: dict[str, list[float]] = {}
        with coordinator.agreement(f"{stage.name}: try weights"):
            for point in points[start : start + _GATHERED_TOGETHER]:
                top = {
                    qid: _top(one.docids, normal[qid], point, cutoff_of(settings.fusion_metric))
                    for qid, one in scored.items()
                }
                found = values_of_any(
                    top, own_qrels, settings.fusion_metric, relevance_threshold=settings.relevance_threshold
                )
                for qid, value in found.items():
                    own.setdefault(qid, []).append(value)
        for part in coordinator.gather(f"{stage.name}: values from {start}", own):
            for qid, more in part.items():
                values.setdefault(qid, []).extend(more)
    return values


def _top(docids: Sequence[str], normal_MK: Floats, weights_M: Sequence[float], top_k: int) -> dict[str, float]:
    """Return the first documents by a mixture of normalised scores, as a ranking without ties."""
    mixed_K = np.zeros(normal_MK.shape[1])
    for weight, normal_K in zip(weights_M, normal_MK, strict=True):  # in the order of `mix`, so its sums bit by bit
        mixed_K += weight * normal_K
    order = np.argsort(-mixed_K, kind="stable")[:top_k].tolist()
    whole = [*(docids[place] for place in order), *docids[len(mixed_K) : len(mixed_K) + top_k - len(order)]]
    return {docid: -float(rank) for rank, docid in enumerate(whole)}


def _measure(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    system: System,
    split: str,
    scored: Mapping[str, Scored],
    fusion: Fusion,
    sample: int | None,
) -> Measured:
    """Order each rank's queries by the mixture, and record the ranking of all."""
    own = {qid: one.fused(fusion.weights) for qid, one in scored.items()}
    ranking: Ranking = {}
    for part in stage.run.coordinator.gather(f"{stage.name}: ranking {system.name}", own):
        ranking |= part
    if not ranking:
        return Measured()
    return Measured((record_ranking(stage, data, folder, ranking, system, split, sample),))

"""The last steps of an index: tune its search, measure it on the audit queries, publish it.

Tuning looks at codes alone and is rank 0's work; so is what follows it, but for the exact scores of what the audit
queries find, where embeddings lie on several hosts.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.coordination.coordinator import Coordinator
from engine.errors import IndexQualityError
from engine.index.dense import DenseIndex, IndexManifest, open_files
from engine.index.held.scores import ScoredBlocks
from engine.index.held.store import HeldStore
from engine.index.plan import IndexPlan
from engine.index.train import TrainedIndex, leave_start
from engine.index.tune import Trial, recall_of, tune
from engine.index.warm import Audit
from engine.log import get_logger
from engine.search import Hits
from shards.embeddings import EmbeddingStore

log = get_logger(__name__)
AUDIT = ".audit"
"""Folder of what ranks exchange for the audit where embeddings lie on several hosts."""


class Draft:
    """An index whose files are there; all ranks have one, and rank 0's knows what was tuned.

    Args:
        name: Of the index, for progress and errors.
        folder: Its folder.
        manifest: Not tuned yet.
        store: The embeddings.
        audit: The queries and the truth.
    """

    def __init__(self, name: str, folder: Path, manifest: IndexManifest, store: EmbeddingStore, audit: Audit) -> None:
        self._name, self._folder, self._manifest, self._store, self._audit = name, folder, manifest, store, audit
        self._tuned: tuple[DenseIndex, Trial, list[Trial]] | None = None
        self._found: tuple[Hits, float] | None = None

    def tune(self) -> None:
        """Choose how it is searched; on rank 0."""
        draft, audit, start = self._manifest, self._audit, time.perf_counter()
        probed = open_files(self._folder, draft.files, draft.plan, verify=False, device=audit.device)
        best, trials = tune(probed, self._store.dimension, draft.plan, audit.queries_QD, audit.truth, draft.recall_k)
        seconds = time.perf_counter() - start
        manifest = replace(draft, nprobe=best.nprobe, refine_factor=best.refine_factor, tuning_seconds=seconds)
        self._tuned = DenseIndex(manifest, self._store, probed), best, trials

    def search(self, coordinator: Coordinator) -> None:
        """Search the audit queries, on rank 0, whom the hosts that have the embeddings help. All ranks call it."""
        store, audit, k, start = self._store, self._audit, self._manifest.recall_k, time.perf_counter()
        label = f"{self._name}: search for the audit"

        def alone() -> None:
            if self._tuned is not None:
                hits = self._tuned[0].search(audit.queries_QD, k)
                self._found = hits, time.perf_counter() - start

        if not (isinstance(store, HeldStore) and store.scattered):
            coordinator.only_rank_zero(label, alone)
            return
        scored = ScoredBlocks(self._folder / AUDIT / "search", store, 1)

        def begin() -> None:
            if self._tuned is not None:
                shutil.rmtree(self._folder / AUDIT / "search", ignore_errors=True)  # of an interrupted build
                scored.write_queries(0, audit.queries_QD)
                scored.write_candidates(0, self._tuned[0].search_parts(audit.queries_QD, k).documents_QK)

        def end() -> None:
            self._found = scored.hits(0, k), time.perf_counter() - start

        coordinator.only_rank_zero(label, begin)
        scored.score(coordinator, f"{label}: score")
        coordinator.only_rank_zero(f"{label}: order", end)

    def publish(self, trained: TrainedIndex, recall_floor: float, *, may_fail: bool, keep: bool) -> bool:
        """Write the manifest and take away what is not searched; on rank 0.

        Args:
            trained: Of this folder.
            recall_floor: Recall below which it is not published, 0 to 1.
            may_fail: Whether that ends the run; else all is begun from nothing.
            keep: Leave the lists to the next index.

        Returns:
            Whether it was published.

        Raises:
            IndexQualityError: It finds too little, and may not fail.
        """
        if self._tuned is None or self._found is None:
            raise ValueError("an index is published by the rank that has tuned and searched it")
        (index, best, trials), (hits, seconds) = self._tuned, self._found
        manifest, audit, folder = index.manifest, self._audit, self._folder
        recall = recall_of(hits.scores_QK, audit.truth, manifest.recall_k)
        if may_fail and recall < recall_floor:
            log.warning(
                "%s: recall %.3f from the last index's lists is below index.recall_floor %g: all is trained from "
                "nothing",
                *(self._name, recall, recall_floor),
            )
            return False
        milliseconds = 1000 * seconds / len(audit.queries_QD)
        manifest = replace(manifest, recall=recall, milliseconds_per_query=milliseconds)
        require_recall(recall, manifest.recall_k, recall_floor, _describe_trials(manifest.plan, trials))
        _log_choice(manifest, best)
        if keep:
            leave_start(folder, audit, trained, best.nprobe, torch.get_num_threads())
        manifest.save(folder)
        shutil.rmtree(folder / AUDIT, ignore_errors=True)
        kept = {file.name for file in manifest.files}
        leftovers = [*folder.glob("part-*.lists"), *folder.glob("part-*.json"), *folder.glob("index.*")]
        for path in [*leftovers, *folder.glob(".*.tmp-*")]:
            if path.name not in kept and f"{path.stem}.lists" not in kept:
                path.unlink()
        return True


def require_recall(recall: float, k: int, floor: float, tried: str) -> None:
    """Stop where an index finds too little.

    Args:
        recall: What was measured, 0 to 1.
        k: Its depth.
        floor: What is asked for, 0 to 1.
        tried: How was searched, in words.

    Raises:
        IndexQualityError: The recall is below the floor.
    """
    if recall < floor:
        raise IndexQualityError(
            f"the index finds {recall:.3f} of the {k} best documents of exact search at best; tried: {tried}",
            expected=f"at least {floor} (index.recall_floor)",
            remedy="leave index.nprobe and index.refine_factor out, name an index.factory with more bytes a document, "
            "or set index.factory=Flat",
        )


def _log_choice(manifest: IndexManifest, best: Trial) -> None:
    plan = manifest.plan
    log.info(
        "the search visits %d of %d lists and re-scores %d * top_k candidates: recall@%d %.3f, %.2f ms a query, "
        "tuned in %.1f s",
        *(best.nprobe, plan.num_lists, best.refine_factor, manifest.recall_k, manifest.recall),
        *(manifest.milliseconds_per_query, manifest.tuning_seconds),
    )
    if best.safe_recall < plan.recall_target:
        log.warning(
            "no way to search that was tried reaches index.recall_target %g for sure: the best finds %.3f +- %.3f",
            *(plan.recall_target, best.recall, best.error),
        )


def _describe_trials(plan: IndexPlan, trials: list[Trial]) -> str:
    best = {trial.nprobe: trial for trial in sorted(trials, key=lambda trial: trial.recall)}
    ways = [f"{n} lists and {best[n].refine_factor} * k candidates: {best[n].recall:.3f}" for n in sorted(best)]
    return f"{plan.factory} with {plan.num_lists} lists, visiting " + "; ".join(ways)

"""Staleness: how far an index had fallen behind the weights that draw from it, measured when it is made anew.

Whoever trains on mined negatives trains on what an older state of the retriever found. How much that matters is asked
here at every refresh: how many steps older it was, how far the weights have moved in them, and how much of what the new
index finds the old one had found as well. The last decides whether further refreshes are worth their hours
(`ar2.refresh_until`).

Source: the idea that mined negatives go stale, and by how many steps, is ANCE's (Xiong et al. 2021, section 4); the
measures are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from engine.config.timetable import WeightsOf, iteration_name
from engine.data.candidates import Candidates
from engine.errors import ArtifactError
from engine.models.weights import verify_weights, weight_files
from engine.results import Staleness
from engine.run import Stage

_QUERIES_A_BLOCK = 4096


def measure_staleness(stage: Stage, *, before: int, iteration: int) -> Staleness:
    """Compare a refresh of the retriever's candidates with the one before; on rank 0, from what both left on disk.

    Args:
        stage: Where this runs.
        before: Iteration of the older one.
        iteration: Of the newer one.

    Raises:
        ArtifactError: Weights or candidates of one of them are missing or damaged.
    """
    run, table = stage.run, stage.run.timetable
    model = table.encoder

    def measure() -> list[float | int | None]:
        names = [table.artifact(WeightsOf(model, one)) for one in (before, iteration)]
        old, new = (Candidates.load(run.folder.candidates(name)) for name in names)
        folders = [run.folder.weights(model, iteration_name(one)) for one in (before, iteration)]
        top_k = table.mining(names[1]).top_k
        best, rescored = -(-top_k // 10), "@".join(names)
        shares = [kept_of(old, new, best)[0]]
        if run.is_finished(f"rescore/{rescored}"):
            shares.append(kept_of(Candidates.load(run.folder.candidates(rescored)), new, best)[0])
        return [change_of_weights(*folders), *kept_of(old, new, top_k), *shares]

    changed, kept, queries, *best = run.coordinator.only_rank_zero(f"{stage.name}: compare", measure)
    found = Staleness(before, table.steps_between(model, before, iteration), changed, kept, queries, *best)
    told = ("lag_steps", "weights_changed", "kept", "kept_best", "kept_best_rescored")
    values = {key: float(value) for key in told if (value := getattr(found, key)) is not None}
    run.metrics.write(stage.name, iteration, {f"{stage.name.split('/')[0]}/{key}": values[key] for key in values})
    return found


def kept_of(old: Candidates, new: Candidates, top_k: int) -> tuple[float | None, int]:
    """Return how much of what is found now was found before.

    Args:
        old: Candidates of a refresh.
        new: Of a later one.
        top_k: Best candidates of a query that are compared.

    Returns:
        The mean share of a query's new candidates that are among its old ones, over the queries that both searched and
        that have new candidates; None without any; and the number of these queries.
    """
    old, new = old.top(top_k), new.top(top_k)
    qids = [qid for qid in new.qids if qid in old]
    total, queries = 0.0, 0
    for start in range(0, len(qids), _QUERIES_A_BLOCK):
        block = qids[start : start + _QUERIES_A_BLOCK]
        ours_QK = new.documents_QK[[new.row_number(qid) for qid in block]]
        theirs_QK = old.documents_QK[[old.row_number(qid) for qid in block]]
        # One number a pair of query and document, so that a block is compared at once.
        most = int(max(ours_QK.max(initial=0), theirs_QK.max(initial=0))) + 1
        first_Q1 = most * np.arange(len(block), dtype=np.int64)[:, None]
        found_QK = np.isin(ours_QK + first_Q1, (theirs_QK + first_Q1)[theirs_QK >= 0]) & (ours_QK >= 0)
        num_new_Q = (ours_QK >= 0).sum(1)
        shares = found_QK.sum(1)[num_new_Q > 0] / num_new_Q[num_new_Q > 0]
        total, queries = total + math.fsum(shares.tolist()), queries + len(shares)
    return (total / queries if queries else None), queries


def change_of_weights(old: Path, new: Path) -> float:
    """Return the norm of the difference of two published states of a model, relative to the older one's norm.

    Args:
        old: Folder of published weights.
        new: Of later ones.

    Raises:
        ArtifactError: They are missing or damaged, or not of one model.
    """
    verify_weights(old)
    verify_weights(new)
    moved, norm = 0.0, 0.0
    for before, after in _pairs(old, new):
        moved += float((after.double() - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return math.sqrt(moved / norm) if norm else 0.0


def _pairs(old: Path, new: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each floating-point parameter in both states, one at a time."""
    names = [sorted(weight_files(folder)) for folder in (old, new)]
    if names[0] != names[1]:
        raise ArtifactError(f"the weights in {old} are in the files {names[0]}, those in {new} in {names[1]}")
    for name in names[0]:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(folder / name, framework="pt")) for folder in (old, new)]
            if sorted(files[0].keys()) != sorted(files[1].keys()):
                raise ArtifactError(f"{name} holds other parameters in {old} than in {new}", expected="one model")
            for key in sorted(files[0].keys()):
                before, after = (file.get_tensor(key) for file in files)
                if before.is_floating_point():
                    yield before, after

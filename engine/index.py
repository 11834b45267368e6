"""The index over a corpus's document embeddings: built by all ranks together, searched, and its recall measured.

An index's folder is `embeddings/` (a store of `shards.embeddings`, made before), `trained.faiss` and `trained.json`
(the contract between the ranks), `part-RRR.faiss` (one a rank, gone after the merge), `index.faiss`, and
`manifest.json`, written last: without it there is no index. The folder lies where all ranks see it. The pieces are made
by `engine.index_build`. Product quantization alone ranks badly, so what FAISS finds is scored again from the stored
embeddings by `engine.exact`, whose search over all of them is what `flat` means and recall is measured by.

Shapes: Q queries, N documents, D embedding dimension, K = `top_k` ranks, C candidates that are re-scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from engine.coordinator import Coordinator
from engine.errors import ArtifactError, IndexQualityError
from engine.exact import Floats, blocks, check_queries, exact_search, rescore
from engine.index_build import (
    IndexPlan,
    add_part,
    faiss_threads,
    merge_parts,
    plan_index,
    read_index,
    train_index,
    write_index,
)
from engine.retrievers import Hits
from shards.embeddings import EmbeddingStore, Stamp
from shards.files import read_json, write_json
from shards.manifest import CorpusManifest
from shards.partition import assign

__all__ = [
    "DenseIndex",
    "IndexManifest",
    "IndexPlan",
    "build_index",
    "exact_search",
    "measure_recall",
    "plan_index",
    "require_recall",
]

_VERSION = 1
_MANIFEST, _TRAINED, _INDEX = "manifest.json", "trained.faiss", "index.faiss"
_QUERIES_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What an index is, who made it, and how well it searches."""

    plan: IndexPlan
    seed: int
    stamp: Stamp
    """The retriever and the corpus behind the embeddings."""
    num_documents: int
    dimension: int
    trained_sha256: str | None
    """Hash of the trained, empty index; None for exact search."""
    index_sha256: str | None
    """Hash of `index.faiss`; None for exact search."""
    recall: float
    """Share of the best `recall_k` documents of exact search that it found, on a sample of queries."""
    recall_k: int
    metric: str = "inner_product"
    version: int = _VERSION

    def save(self, folder: Path) -> None:
        """Publish the index, whose other files are in place by now."""
        write_json(folder / _MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> IndexManifest:
        """Read the manifest of an index.

        Raises:
            ArtifactError: It is missing, damaged, or of another version.
        """
        path = folder / _MANIFEST
        values = read_json(path, "the index manifest")
        try:
            values["plan"], values["stamp"] = IndexPlan(**values["plan"]), Stamp(**values["stamp"])
            manifest = cls(**values)
            if manifest.version != _VERSION:
                raise ValueError(f"version {manifest.version}, expected {_VERSION}")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the index manifest {path} cannot be read ({error})", remedy=f"delete {path} and build the index again"
            ) from error
        return manifest


class DenseIndex:
    """A finished index with the embeddings that it was made from.

    Args:
        manifest: What it is.
        store: The embeddings.
        index: The merged FAISS index; None for exact search. `DenseIndex.open` reads and checks these.
        device: Where exact search computes its products; FAISS stays on the CPU.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        store: EmbeddingStore,
        index: faiss.Index | None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.manifest, self.store, self.device, self._index = manifest, store, device, index

    @classmethod
    def open(cls, folder: Path, store: EmbeddingStore, *, device: torch.device | str = "cpu") -> DenseIndex:
        """Open a published index.

        Args:
            folder: The index's folder.
            store: The embeddings it must have been made from.
            device: Where exact search computes its products.

        Raises:
            ArtifactError: The index is missing, damaged, or made from other embeddings.
        """
        manifest = IndexManifest.load(folder)
        theirs = (manifest.stamp, manifest.num_documents, manifest.dimension)
        ours = (store.stamp, store.num_documents, store.dimension)
        if theirs != ours:
            raise ArtifactError(
                f"the index in {folder} was made from embeddings {theirs}",
                expected=f"embeddings {ours}",
                remedy=f"delete {folder / 'manifest.json'} and build the index again",
            )
        if manifest.plan.kind == "flat":
            return cls(manifest, store, None, device=device)
        return cls(manifest, store, read_index(folder / _INDEX, manifest.index_sha256 or ""), device=device)

    def search(self, queries_QD: Floats, top_k: int) -> Hits:
        """Find the documents with the highest inner product.

        Args:
            queries_QD: float32 [Q, D], finite.
            top_k: Documents a query, at least 1.

        Returns:
            Hits [Q, top_k] with exact scores, padded only where the corpus is smaller than `top_k`.
        """
        queries_QD = check_queries(queries_QD, self.store.dimension, top_k)
        if self._index is None:
            return exact_search(self.store, queries_QD, top_k, device=self.device)
        depth = min(self.store.num_documents, self.manifest.plan.refine_factor * top_k)
        documents_QC = np.empty((len(queries_QD), depth), dtype=np.int64)
        for block in blocks(len(queries_QD), _QUERIES_AT_A_TIME):
            documents_QC[block] = self._probe(self._index, queries_QD[block], depth, top_k)
        return rescore(self.store, queries_QD, documents_QC, top_k)

    def _probe(self, index: faiss.Index, queries_QD: Floats, depth: int, top_k: int) -> npt.NDArray[np.int64]:
        """Return candidates [Q, depth], -1 at the end where the visited lists hold fewer.

        A query whose lists hold fewer than top_k documents visits twice as many, and so on: callers count on getting
        top_k, and an empty list next to a query is no reason for having fewer negatives.
        """
        ivf = faiss.extract_index_ivf(index)
        needed = min(top_k, self.store.num_documents)
        documents_QC = np.full((len(queries_QD), depth), -1, dtype=np.int64)
        short = np.arange(len(queries_QD))
        nprobe = self.manifest.plan.nprobe
        with faiss_threads(torch.get_num_threads()):
            while short.size:
                ivf.nprobe = nprobe
                documents_QC[short] = index.search(queries_QD[short], depth)[1]
                short = np.flatnonzero((documents_QC >= 0).sum(axis=1) < needed)
                if nprobe >= ivf.nlist:
                    break
                nprobe = min(2 * nprobe, ivf.nlist)
        return documents_QC


def measure_recall(index: DenseIndex, queries_QD: Floats, k: int) -> float:
    """Measure which share of the exact best k documents an index finds.

    A document that scores as high as the k-th counts as one of them, so that documents of equal embeddings may stand
    for each other.

    Args:
        index: The index.
        queries_QD: float32 [Q, D], at least one query, best real ones.
        k: Depth, at least 1; cut to the size of the corpus.

    Returns:
        The mean over the queries, 0 to 1.
    """
    if not len(queries_QD):
        raise ValueError("recall needs at least one query")
    k = min(k, index.store.num_documents)
    last_Q1 = exact_search(index.store, queries_QD, k, device=index.device).scores_QK[:, -1:]
    return float((index.search(queries_QD, k).scores_QK >= last_Q1).mean())


def require_recall(recall: float, k: int, floor: float, plan: IndexPlan) -> None:
    """Stop where an index finds too little.

    Raises:
        IndexQualityError: The recall is below the floor.
    """
    if recall < floor:
        raise IndexQualityError(
            f"the index {plan.factory} finds {recall:.3f} of the {k} best documents of exact search, visiting "
            f"{plan.nprobe} of its {plan.num_lists} lists and re-scoring {plan.refine_factor} * {k} candidates",
            expected=f"at least {floor} (index.recall_floor)",
            remedy="raise index.refine_factor or index.nprobe, name an index.factory with more bytes a document, "
            "or set index.kind=flat",
        )


def build_index(
    coordinator: Coordinator,
    store: EmbeddingStore,
    manifest: CorpusManifest,
    plan: IndexPlan,
    folder: Path,
    *,
    seed: int,
    audit_queries_QD: Floats,
    audit_k: int,
    recall_floor: float,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Build an index with all ranks: one trains, all fill, one merges, measures and publishes.

    All ranks call it alike. An index that is there already, of the same embeddings, plan and seed, is kept, and so is
    a trained one that an interrupted build left behind.

    Args:
        coordinator: Between the ranks.
        store: The embeddings of the whole corpus.
        manifest: The corpus.
        plan: From `plan_index`.
        folder: The index's folder, the same for all ranks.
        seed: Of the training.
        audit_queries_QD: Queries on which recall is measured; float32 [Q, D], used on rank 0.
        audit_k: Depth of that recall; cut to the size of the corpus.
        recall_floor: Recall below which the index is not published, 0 to 1.
        device: Where exact search, the yardstick of recall, computes its products.

    Returns:
        `recall` (of exact search: 1.0), `factory`, `num_lists`, `nprobe`, `refine_factor`, `num_documents`, `reused`.

    Raises:
        IndexQualityError: The recall is below the floor; on the other ranks a `CoordinationError` quotes it.
        ArtifactError: A file of the build is damaged or does not fit.
    """
    name = f"index@{store.stamp.iteration}"
    reused = coordinator.only_rank_zero(f"{name}: look for it", lambda: _keep_or_clear(folder, store, plan, seed))
    if not reused:
        draft = IndexManifest(plan, seed, store.stamp, store.num_documents, store.dimension, None, None, 1.0, audit_k)
        parts: dict[Path, str] = {}
        if plan.kind == "ivfpq":
            trained = coordinator.only_rank_zero(f"{name}: train", lambda: _train_once(folder, store, plan, seed))
            draft = replace(draft, trained_sha256=trained)
            with coordinator.agreement(f"{name}: fill"):
                sizes = [entry.num_documents for entry in manifest.shards]
                own = assign(sizes, coordinator.rank, coordinator.world_size)
                part = add_part(folder / _TRAINED, trained, store, own, _part_path(folder, coordinator.rank))
            hashes = coordinator.gather(f"{name}: parts", part)
            parts = {_part_path(folder, rank): sha256 for rank, sha256 in enumerate(hashes)}
        audit = (audit_queries_QD, recall_floor, device)
        coordinator.only_rank_zero(f"{name}: merge", lambda: _publish(folder, store, draft, parts, *audit))

    def report() -> dict[str, Any]:
        built = IndexManifest.load(folder)
        require_recall(built.recall, built.recall_k, recall_floor, plan)
        facts = {key: getattr(plan, key) for key in ("factory", "num_lists", "nprobe", "refine_factor")}
        return facts | {"recall": built.recall, "num_documents": built.num_documents, "reused": reused}

    result: dict[str, Any] = coordinator.only_rank_zero(f"{name}: report", report)
    return result


def _keep_or_clear(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> bool:
    """Tell whether the folder holds this index already; if not, take away the manifest, and so any other index."""
    try:
        manifest = DenseIndex.open(folder, store).manifest
        if (manifest.plan, manifest.seed) == (plan, seed):
            return True
    except ArtifactError:
        pass  # whatever is wrong with what lies there, it is built again
    (folder / _MANIFEST).unlink(missing_ok=True)
    return False


def _train_once(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> str:
    """Return the hash of the trained index, trained now or by an earlier build that was interrupted."""
    record_path = folder / "trained.json"
    origin = {"plan": asdict(plan), "seed": seed, "stamp": asdict(store.stamp)}
    try:
        record = read_json(record_path, "the record of the trained index")
        if {key: record[key] for key in origin} == origin:
            read_index(folder / _TRAINED, record["sha256"])
            return str(record["sha256"])
    except (ArtifactError, KeyError, TypeError):
        pass  # there is none to go on with
    sha256 = write_index(train_index(store, plan, seed), folder / _TRAINED)
    write_json(record_path, origin | {"sha256": sha256})
    return sha256


def _publish(
    folder: Path,
    store: EmbeddingStore,
    draft: IndexManifest,
    parts: Mapping[Path, str],
    audit_queries_QD: Floats,
    recall_floor: float,
    device: torch.device | str,
) -> None:
    """Merge the parts, measure the recall and write the manifest; without parts, publish exact search."""
    if draft.trained_sha256 is not None:
        path = folder / _INDEX
        merged = merge_parts(folder / _TRAINED, draft.trained_sha256, parts, path, store.num_documents)
        draft = replace(draft, index_sha256=merged)
        index = DenseIndex(draft, store, read_index(path, merged), device=device)
        draft = replace(draft, recall=measure_recall(index, audit_queries_QD, draft.recall_k))
        require_recall(draft.recall, draft.recall_k, recall_floor, draft.plan)
    draft.save(folder)
    # Also parts of an earlier build with more ranks, and what a killed one was writing.
    for leftover in (*folder.glob("part-*.faiss"), *folder.glob(".*.tmp-*")):
        leftover.unlink()


def _part_path(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:03d}.faiss"

"""What an index leaves to the next refresh, so that its lists need not be found from nothing again.

The retriever has moved since, but most documents still lie near the same others. So the lists of the last index are
made anew from the new embeddings of the rows that they held, which undoes any movement that all of a list's rows share.
Whether that is enough is told by an audit of the lists alone, before a document is added: the share of the best
documents of exact search that lie in the lists a query visits, and the share of the corpus that lies there with them,
both by the number of lists that the last search was tuned to. Where one of them is worse than the last index's,
iterations of k-means follow, as few as it takes. The built index is measured as any other.

Shapes: N documents, Q queries, L lists, D dimensions, V visited lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.errors import ArtifactError
from engine.index.exact import Floats, blocks
from engine.index.files import IndexFile, faiss_threads
from engine.index.held.rows import Documents, Rows
from engine.index.kmeans import Assigner, Labels
from engine.index.plan import IndexPlan
from engine.search import Hits
from shards.embeddings import EmbeddingStore
from shards.files import read_record, save_array, sha256_file, write_atomically, write_json

LABELS, START = "labels.npy", "start.json"
_WORSE_RECALL, _MORE_VISITED = 0.005, 1.1
"""What lists may be worse than the last index's before iterations follow: recall lost, times as much visited."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class ListsAudit:
    """How well lists keep what belongs together."""

    nprobe: int
    """Lists that a query visits."""
    recall: float
    """Share of the best documents of exact search that lie in them, 0 to 1."""
    visited: float
    """Share of the corpus that lies in them, 0 to 1."""

    def holds(self, last: ListsAudit) -> bool:
        """Tell whether these lists are about as good as others."""
        return self.recall >= last.recall - _WORSE_RECALL and self.visited <= _MORE_VISITED * last.visited


@dataclass(frozen=True, slots=True)
class Start:
    """The record of what an index leaves to the next one."""

    factory: str
    dimension: int
    corpus_sha256: str
    train_size: int
    sample_seed: int
    """Drew the documents of the sample, whose lists are in `labels`."""
    trained_sha256: str
    labels: IndexFile
    audit: ListsAudit

    def save(self, folder: Path) -> None:
        """Write it into the index's folder."""
        write_json(folder / START, asdict(self))


@dataclass(frozen=True, slots=True)
class WarmStart:
    """An index that the next one begins from."""

    folder: Path
    start: Start

    def labels(self) -> Labels:
        """Read the list of each row of the sample: int32."""
        labels_N: Labels = np.load(self.start.labels.check(self.folder, fully=False), allow_pickle=False)
        return labels_N


def find_start(folder: Path, store: EmbeddingStore, plan: IndexPlan) -> WarmStart | str:
    """Look whether an index can be begun from another.

    Args:
        folder: Of the other, which need not be there.
        store: The embeddings of the new one.
        plan: Of the new one.

    Returns:
        The start, or why there is none, in words.
    """
    try:
        start = read_record(folder / START, Start, "what an index leaves to the next")
        start.labels.check(folder, fully=True)
    except ArtifactError as error:
        return str(error)
    pairs = (
        ("factory", start.factory, plan.factory),
        ("dimension", start.dimension, store.dimension),
        ("corpus", start.corpus_sha256[:12], store.stamp.corpus_sha256[:12]),
        ("training sample", start.train_size, plan.train_size),
    )
    differing = [f"its {what} is {theirs}, not {ours}" for what, theirs, ours in pairs if theirs != ours]
    return "; ".join(differing) if differing else WarmStart(folder, start)


def save_labels(labels_N: Labels, folder: Path) -> IndexFile:
    """Write the list of each row of the sample into an index's folder."""
    with write_atomically(folder / LABELS) as temporary:
        save_array(temporary, labels_N)
        return IndexFile(LABELS, temporary.stat().st_size, sha256_file(temporary))


@dataclass(frozen=True, slots=True)
class Audit:
    """What lists are measured by."""

    store: EmbeddingStore
    queries_QD: Floats
    truth: Hits
    """Of exact search, at least `k` deep."""
    k: int
    documents: Documents
    """Whose spread over the lists stands for the corpus's, ascending."""
    device: str = "cpu"
    """This rank's, on which FAISS searches lists where it can."""
    rows: Rows | None = None
    """Has the embeddings of `truth`'s best `k` and of `documents`; the store where it is left out."""

    def measure(
        self, centroids_LD: Floats, transform: Callable[[Floats], Floats], nprobe: int, num_threads: int
    ) -> ListsAudit:
        """Measure lists.

        Args:
            centroids_LD: float32 [L, D].
            transform: From embeddings to what the lists cluster.
            nprobe: Lists that a query visits.
            num_threads: Threads that share the work.

        Returns:
            The same for any number of threads.
        """
        assigner, num_lists = Assigner(centroids_LD, num_threads, self.device), len(centroids_LD)
        best_QK = self.truth.documents_QK[:, : self.k]
        wanted = np.unique(best_QK)
        with faiss_threads(1):
            visits_QV = assigner.best(transform(self.queries_QD), min(nprobe, num_lists))
            lists_K = self._lists(assigner, transform, wanted)
            sizes_L = np.bincount(self._lists(assigner, transform, self.documents), minlength=num_lists)
        lists_QK = lists_K[np.searchsorted(wanted, best_QK)]
        found = [np.isin(lists_K, visits_V).mean() for lists_K, visits_V in zip(lists_QK, visits_QV, strict=True)]
        visited = sizes_L[visits_QV].sum(axis=1).mean() / len(self.documents)
        return ListsAudit(nprobe, float(np.mean(found)), float(visited))

    def _lists(self, assigner: Assigner, transform: Callable[[Floats], Floats], documents: Documents) -> Labels:
        pieces, source = [np.empty(0, dtype=np.int32)], self.rows or self.store
        for block in blocks(len(documents), _BLOCK_ROWS):
            pieces.append(assigner.nearest(transform(source.rows(documents[block])))[0])
        return np.concatenate(pieces)

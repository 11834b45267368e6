"""The index over a corpus's document embeddings: built by all ranks together, searched, tuned by measured recall.

An index's folder is `embeddings/` (a store of `shards.embeddings`, made before), `training/` (while it is trained),
`trained.faiss` and `trained.json` (the contract between the ranks), `labels.npy` and `start.json` (what the next index
begins from), `part-NNN.lists` with a JSON marker each (gone after the merge, unless they are what
is searched), `index.faiss`, and `manifest.json`, written last: without it there is no index. The folder lies where all
ranks see it, and may be moved. `engine.index.build` makes it: `plan` decides, `train` trains and fills,
`merge` merges, `tune` measures. Product quantization alone ranks badly, so what FAISS finds is scored again
from the stored embeddings by `engine.index.exact`, whose search over all of them is what `Flat` means and recall is
measured by.

Shapes: Q queries, N documents, D embedding dimension, K = `top_k` ranks, C candidates that are re-scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from engine.errors import ArtifactError
from engine.index.exact import Floats, blocks, check_queries, exact_search, merge_hits, rescore
from engine.index.files import MAPPED, IndexFile, MappedLists, parse_index
from engine.index.plan import IndexPlan, cut_parts
from engine.index.probe import ProbedIndex
from engine.search import Hits
from shards.embeddings import EmbeddingStore, Stamp
from shards.files import read_record, write_json
from shards.manifest import CorpusManifest

__all__ = ["DenseIndex", "IndexManifest", "document_parts"]

_VERSION = 2
MANIFEST = "manifest.json"
_CANDIDATES_AT_A_TIME = 2**22


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What an index is, who made it, how it is searched and how well."""

    plan: IndexPlan
    seed: int
    stamp: Stamp
    """The retriever and the corpus behind the embeddings."""
    num_documents: int
    dimension: int
    files: tuple[IndexFile, ...]
    """`index.faiss`, or the trained index and the parts in order; none for exact search."""
    nprobe: int
    """Lists visited for a query, by hand or tuned."""
    refine_factor: int
    """`refine_factor * top_k` candidates are re-scored exactly, by hand or tuned."""
    recall: float
    """Share of the best `recall_k` documents of exact search that it found, on a sample of queries."""
    recall_k: int
    milliseconds_per_query: float | None
    """Of that search, with the queries in one call; None for exact search, which is not measured."""
    tuning_seconds: float
    metric: str = "inner_product"
    version: int = _VERSION

    def save(self, folder: Path) -> None:
        """Publish the index, whose other files are in place by now."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> IndexManifest:
        """Read the manifest of an index.

        Raises:
            ArtifactError: It is missing, damaged, or of another version.
        """
        path = folder / MANIFEST
        manifest = read_record(path, cls, "the index manifest")
        if manifest.version != _VERSION:
            raise ArtifactError(
                f"the index manifest {path} has version {manifest.version}, expected {_VERSION}",
                remedy=f"delete {path} and build the index again",
            )
        return manifest


class DenseIndex:
    """A finished index with the embeddings that it was made from.

    Args:
        manifest: What it is.
        store: The embeddings.
        probed: The index's lists; None for exact search. `DenseIndex.open` reads and checks these.
        device: Where exact search computes its products.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        store: EmbeddingStore,
        probed: ProbedIndex | None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.manifest, self.store, self.device, self._probed = manifest, store, device, probed
        self._documents = document_parts(store.manifest)

    @classmethod
    def open(
        cls, folder: Path, store: EmbeddingStore, *, device: torch.device | str = "cpu", verify: bool = False
    ) -> DenseIndex:
        """Open a published index.

        Args:
            folder: The index's folder.
            store: The embeddings it must have been made from.
            device: Where exact search computes its products, and where FAISS searches if it can.
            verify: Hash also the files that are mapped from disk; without it, these are checked by size.

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
                remedy=f"delete {folder / MANIFEST} and build the index again",
            )
        probed = (
            None
            if manifest.plan.exact
            else open_files(folder, manifest.files, manifest.plan, verify=verify, device=device)
        )
        return cls(manifest, store, probed, device=device)

    @property
    def num_parts(self) -> int:
        """Parts that ranks may search one by one, each some; 1 where it is searched as one."""
        return self._probed.num_parts if self._probed else len(self._documents)

    def search(self, queries_QD: Floats, top_k: int) -> Hits:
        """Find the documents with the highest inner product.

        Args:
            queries_QD: float32 [Q, D], finite.
            top_k: Documents a query, at least 1.

        Returns:
            Hits [Q, top_k] with exact scores, padded only where the corpus is smaller than `top_k`.
        """
        queries_QD = check_queries(queries_QD, self.store.dimension, top_k)
        if self._probed is None:
            return exact_search(self.store, queries_QD, top_k, device=self.device)
        pieces = [
            self.finish(queries_QD[block], [self.search_parts(queries_QD[block], top_k)], top_k)
            for block in blocks(len(queries_QD), max(1, _CANDIDATES_AT_A_TIME // self._depth(top_k)))
        ]
        return _stacked(pieces, top_k)

    def search_parts(self, queries_QD: Floats, top_k: int, parts: Sequence[int] | None = None) -> Hits:
        """Search some parts, the first half of what `search` does.

        Args:
            queries_QD: float32 [Q, D], finite.
            top_k: Documents that `finish` will keep of each query, at least 1.
            parts: Numbers below `num_parts`, each once; all if None.

        Returns:
            Hits [Q, C]: of an index with the scores of its codes, of exact search with exact ones.
        """
        queries_QD = check_queries(queries_QD, self.store.dimension, top_k)
        if self._probed is not None:
            needed = min(top_k, self.store.num_documents)
            nprobe, depth = self.manifest.nprobe, self._depth(top_k)
            return self._probed.search(queries_QD, depth, nprobe=nprobe, needed=needed, parts=parts)
        numbers = range(self.num_parts) if parts is None else parts
        found = [
            exact_search(self.store, queries_QD, top_k, documents=self._documents[number], device=self.device)
            for number in numbers
        ]
        nothing = exact_search(self.store, queries_QD, top_k, documents=range(0))
        return merge_hits([nothing, *found], top_k)

    def finish(self, queries_QD: Floats, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what `search_parts` found in all parts, and score it exactly.

        Args:
            queries_QD: The queries, float32 [Q, D].
            found: What `search_parts` returned; together of each part once.
            top_k: As given to `search_parts`.

        Returns:
            Hits [Q, top_k], the same as `search` returns, however the parts were dealt.
        """
        if self._probed is None:
            return self.candidates(found, top_k)
        return rescore(self.store, queries_QD, self.candidates(found, top_k).documents_QK, top_k)

    def candidates(self, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what `search_parts` found in all parts, with the scores that it has.

        Args:
            found: As given to `finish`.
            top_k: As given to `search_parts`.

        Returns:
            Hits [Q, C] of an index, which `finish` scores exactly; those of exact search [Q, top_k] are done.
        """
        if self._probed is None:
            return merge_hits(found, top_k)
        return found[0] if len(found) == 1 else merge_hits(found, self._depth(top_k))

    def _depth(self, top_k: int) -> int:
        return min(self.store.num_documents, self.manifest.refine_factor * top_k)


def document_parts(manifest: CorpusManifest) -> list[range]:
    """Return the documents of each part that ranks are handed: a function of the corpus alone."""
    entries = manifest.shards
    return [
        range(entries[shards[0]].documents.start, entries[shards[-1]].documents.stop)
        for shards in cut_parts([entry.num_documents for entry in entries])
    ]


def open_files(
    folder: Path, files: Sequence[IndexFile], plan: IndexPlan, *, verify: bool, device: torch.device | str = "cpu"
) -> ProbedIndex:
    """Open the files of an index where its plan wants them.

    Args:
        folder: The index's folder.
        files: As in `IndexManifest.files`.
        plan: With an index.
        verify: Hash the mapped files too.
        device: The rank's, on which FAISS searches an index in memory where it can.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    if plan.placement == "parts":
        trained, *parts = files
        paths = [part.check(folder, fully=verify) for part in parts]
        return ProbedIndex(
            parse_index(trained.check(folder, fully=True)),
            [MappedLists(path) for path in paths],
        )
    loaded = plan.placement == "memory"
    path = files[0].check(folder, fully=verify or loaded)
    return ProbedIndex(parse_index(path, 0 if loaded else MAPPED), in_memory=loaded, device=device)


def _stacked(pieces: Sequence[Hits], top_k: int) -> Hits:
    documents = [np.empty((0, top_k), dtype=np.int64), *(piece.documents_QK for piece in pieces)]
    scores = [np.empty((0, top_k), dtype=np.float32), *(piece.scores_QK for piece in pieces)]
    return Hits(np.concatenate(documents), np.concatenate(scores))

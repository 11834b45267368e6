"""Negatives: the candidates a retriever proposes for each query, and the n of them that one step trains on.

`Candidates` is the artifact between an index and the next phase: the top K documents of every query with the known
positives, and where answers are given the documents that contain one, taken out. It carries the stamp of the weights
and the corpus that made it, so that a phase cannot train on the negatives of another iteration.

A step samples its n negatives afresh from the K. What it draws depends on the seed, the step and the query alone,
never on the rank or on what was drawn before, so that any number of ranks, and a resumed run, see the same samples.

Names of shapes: Q queries, K candidates a query, n negatives a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ArtifactError, ConfigError, DataError
from shards.embeddings import Stamp
from shards.files import read_json, sha256_file, write_atomically, write_json

_MANIFEST, _DOCUMENTS, _SCORES = "candidates.json", "documents.npy", "scores.npy"
_VERSION = 1


@dataclass
class Candidates:
    """What one retriever proposes as negatives, query by query.

    Attributes:
        source: The retriever, such as `bm25` or `dense`.
        stamp: Iteration, weights and corpus that the candidates come from.
        qids: Q query ids, each once.
        documents_QK: Global document indices, best first, int64 [Q, K]; -1 where a query has fewer than K.
        scores_QK: The retriever's scores, float32 [Q, K]; -inf where the document is -1.
        num_removed_positives: Known positives taken out on the way, all queries together.
        num_removed_answers: Documents taken out because they contain an answer, all queries together.
    """

    source: str
    stamp: Stamp
    qids: list[str]
    documents_QK: NDArray[np.int64]
    scores_QK: NDArray[np.float32]
    num_removed_positives: int
    num_removed_answers: int
    _row_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = self.documents_QK.shape
        if self.documents_QK.ndim != 2 or shape != self.scores_QK.shape or shape[0] != len(self.qids):
            raise ArtifactError(
                f"Candidates of {self.source} have documents of shape {shape}, scores of shape "
                f"{self.scores_QK.shape} and {len(self.qids)} query ids",
                expected="[Q, K], [Q, K] and Q",
            )
        self._row_of = {qid: row for row, qid in enumerate(self.qids)}
        if len(self._row_of) != len(self.qids):
            twice = next(qid for row, qid in enumerate(self.qids) if self._row_of[qid] != row)
            raise ArtifactError(f"Candidates of {self.source} list query {twice!r} twice", expected="every query once")

    def __len__(self) -> int:
        return len(self.qids)

    def row(self, qid: str) -> NDArray[np.int64]:
        """Return a query's candidates, best first.

        Args:
            qid: Query id.

        Returns:
            Global document indices, int64, at most K of them, none of them -1.

        Raises:
            DataError: The query was not mined.
        """
        if qid not in self._row_of:
            raise DataError(
                f"Query {qid!r} has no candidates of {self.source} at iteration {self.stamp.iteration}",
                expected="every training query is mined before a phase",
            )
        documents_K = self.documents_QK[self._row_of[qid]]
        kept: NDArray[np.int64] = documents_K[documents_K >= 0]
        return kept

    def save(self, folder: Path) -> None:
        """Publish to a folder: the arrays first, the manifest that vouches for them last.

        Args:
            folder: Made if missing; what an earlier save left in it is replaced.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Without its manifest the folder is unfinished, and says so, until the new one stands.
        (folder / _MANIFEST).unlink(missing_ok=True)
        for name, array in ((_DOCUMENTS, self.documents_QK), (_SCORES, self.scores_QK)):
            with write_atomically(folder / name) as path:
                _save_array(path, array)
        write_json(
            folder / _MANIFEST,
            {
                "version": _VERSION,
                "source": self.source,
                "stamp": asdict(self.stamp),
                "shape": list(self.documents_QK.shape),
                "num_removed_positives": self.num_removed_positives,
                "num_removed_answers": self.num_removed_answers,
                "sha256": {name: sha256_file(folder / name) for name in (_DOCUMENTS, _SCORES)},
                "qids_sha256": _digest(self.qids),
                "qids": self.qids,
            },
        )

    @classmethod
    def load(cls, folder: Path, stamp: Stamp | None = None) -> Candidates:
        """Open what `save` published.

        Args:
            folder: Where it lies.
            stamp: What the candidates must come from; None takes any.

        Returns:
            The candidates, equal to the saved ones.

        Raises:
            ArtifactError: The folder is unfinished, damaged, or made by other weights or for another corpus.
        """
        remedy = f"delete {folder} and run the stage that writes it again"
        manifest = _read_manifest(folder, remedy)
        try:
            found = Stamp(**manifest["stamp"])
            source, qids, sha256 = str(manifest["source"]), list(manifest["qids"]), dict(manifest["sha256"])
            shape = tuple(manifest["shape"])
            removed = int(manifest["num_removed_positives"]), int(manifest["num_removed_answers"])
            qids_sha256 = str(manifest["qids_sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder / _MANIFEST} lacks or garbles {error}", remedy=remedy) from error
        if stamp is not None and found != stamp:
            raise ArtifactError(
                f"The candidates in {folder} are stale: they were made by {_describe(found)}",
                expected=_describe(stamp),
                remedy=remedy,
            )
        if _digest(qids) != qids_sha256:
            raise ArtifactError(f"The query ids in {folder / _MANIFEST} are not those that were saved", remedy=remedy)
        documents_QK = _load_array(folder / _DOCUMENTS, sha256.get(_DOCUMENTS), shape, remedy)
        scores_QK = _load_array(folder / _SCORES, sha256.get(_SCORES), shape, remedy)
        return cls(source, found, qids, documents_QK, scores_QK, *removed)


def merge(parts: Sequence[Candidates]) -> Candidates:
    """Join the parts that the ranks mined into one, in the order given.

    Args:
        parts: At least one; the same source, stamp and K; no query in two of them.

    Returns:
        All queries, counts added up.

    Raises:
        ArtifactError: The parts do not belong together.
    """
    if not parts:
        raise ArtifactError("There are no candidates to merge", expected="one part from every rank")
    first = parts[0]
    for number, part in enumerate(parts):
        for name, here, there in (
            ("source", part.source, first.source),
            ("stamp", part.stamp, first.stamp),
            ("number of candidates a query", part.documents_QK.shape[1], first.documents_QK.shape[1]),
        ):
            if here != there:
                raise ArtifactError(
                    f"Part {number} of the candidates has {name} {here}, part 0 has {there}",
                    expected="parts of one search",
                    remedy="delete the parts and mine again",
                )
    return Candidates(
        first.source,
        first.stamp,
        [qid for part in parts for qid in part.qids],
        np.concatenate([part.documents_QK for part in parts]),
        np.concatenate([part.scores_QK for part in parts]),
        sum(part.num_removed_positives for part in parts),
        sum(part.num_removed_answers for part in parts),
    )


def remove_known(
    documents_QK: NDArray[np.int64],
    scores_QK: NDArray[np.float32],
    positives: Sequence[Set[int]],
    contains_answer: Callable[[int, int], bool] | None,
    top_k: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Take known positives and answer-bearing documents out of what was retrieved, and keep the best of the rest.

    Fetch more than `top_k` documents, by as many as are expected to be taken out. A row is read until `top_k` are
    kept, so that neither the counts nor the number of texts that are searched for answers grow with what was fetched
    beyond that.

    Args:
        documents_QK: Retrieved documents, best first, int64 [Q, K]; -1 is skipped.
        scores_QK: Their scores [Q, K].
        positives: The known positives of each query, Q sets of global document indices.
        contains_answer: Called with row and document index; True takes the document out. None takes none out.
        top_k: How many to keep for each query, at least 1.

    Returns:
        Documents int64 [Q, top_k] and scores float32 [Q, top_k] in the old order, left-aligned, padded with -1 and
        -inf; the numbers of positives and of answer-bearing documents taken out, int64 [Q] each.

    Source: AR2 section 3.1 (negatives are the top retrieved documents that are not positive); answer matching as in
        the released code.
    """
    if documents_QK.shape != scores_QK.shape or len(positives) != len(documents_QK):
        raise ValueError(
            f"documents {documents_QK.shape}, scores {scores_QK.shape} and {len(positives)} sets of positives"
        )
    kept_documents_QK = np.full((len(documents_QK), top_k), -1, dtype=np.int64)
    kept_scores_QK = np.full((len(documents_QK), top_k), -np.inf, dtype=np.float32)
    num_positives_Q = np.zeros(len(documents_QK), dtype=np.int64)
    num_answers_Q = np.zeros(len(documents_QK), dtype=np.int64)
    for row, known in enumerate(positives):
        num_kept = 0
        for rank, document in enumerate(documents_QK[row].tolist()):
            if num_kept == top_k:
                break
            if document < 0:
                continue
            if document in known:
                num_positives_Q[row] += 1
            elif contains_answer is not None and contains_answer(row, document):
                num_answers_Q[row] += 1
            else:
                kept_documents_QK[row, num_kept] = document
                kept_scores_QK[row, num_kept] = scores_QK[row, rank]
                num_kept += 1
    return kept_documents_QK, kept_scores_QK, num_positives_Q, num_answers_Q


def sample_negatives(candidates_K: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw n of a query's candidates, each as likely as any other, none twice.

    Args:
        candidates_K: Global document indices [K]; -1 is never drawn.
        n: How many, at least 0.
        rng: From `step_rng`.

    Returns:
        Global document indices, int64 [n], in the order drawn.

    Raises:
        ConfigError: There are fewer than n. (The released code repeats the list instead, which counts some negatives
            twice without a word.)

    Source: AR2 section 3.1: n examples sampled at random from the top 100.
    """
    usable = candidates_K[candidates_K >= 0]
    if len(usable) < n:
        raise ConfigError(
            f"num_negatives is {n}, but the query has {len(usable)} candidates",
            expected="at least as many candidates as negatives for every query",
            remedy="lower num_negatives, or raise top_k so that more remain once the positives are taken out",
        )
    return rng.choice(usable, size=n, replace=False).astype(np.int64, copy=False)


def step_rng(seed: int, stream: str, step: int, item: int | str) -> np.random.Generator:
    """Return the random numbers of one item of one step, whichever rank asks and whatever was drawn before.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, such as `ranker/3`; two streams are independent.
        step: Step inside the stream.
        item: What is drawn for: a query's id, or its place in the global batch.

    Returns:
        A counter-based generator keyed by a hash of the four. (Python's own `hash` of a string differs between
        processes and would give every rank its own samples.)
    """
    words = json.dumps([seed, stream, step, item], ensure_ascii=False).encode()
    key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _read_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    if not (folder / _MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} holds no finished candidates", expected=f"{_MANIFEST}, which is written last", remedy=remedy
        )
    manifest = read_json(folder / _MANIFEST, "candidates manifest")
    if not isinstance(manifest, dict) or manifest.get("version") != _VERSION:
        raise ArtifactError(f"{folder / _MANIFEST} is not a candidates manifest of version {_VERSION}", remedy=remedy)
    return manifest


def _save_array(path: Path, array: NDArray[Any]) -> None:
    # Through a file object: np.save appends ".npy" to a name without it, and the temporary name has none.
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _load_array(path: Path, sha256: str | None, shape: tuple[int, ...], remedy: str) -> NDArray[Any]:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", expected="the array that the manifest names", remedy=remedy)
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactError(f"{path} has sha256 {found}", expected=f"{sha256}, as in the manifest", remedy=remedy)
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    if array.shape != shape:
        raise ArtifactError(f"{path} has shape {array.shape}", expected=f"{shape}, as in the manifest", remedy=remedy)
    return array


def _digest(qids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(qids)).encode()).hexdigest()


def _describe(stamp: Stamp) -> str:
    return f"iteration {stamp.iteration}, weights {stamp.weights_sha256[:12]}, corpus {stamp.corpus_sha256[:12]}"

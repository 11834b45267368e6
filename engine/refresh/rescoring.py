"""Re-scoring: candidates that an older state of a retriever found get the scores of its newest state.

Where a refresh waits or runs beside the ranker's phase (`ar2.overlap`, `refresh_every`, `refresh_until`), a phase draws
from what an older retriever found. Which documents these are cannot be mended without a refresh, but their scores and
their order can: a sampler or a filter that goes by scores (SimANS, margins) or by ranks then measures negatives and
positives by the retriever that is trained, or that the ranker is to be trained for.

Only documents that stand in the lists of the queries that the next visits draw are encoded, each once; where the corpus
has been encoded by the newest weights already (with `overlap: ranker` it has), their embeddings are read. Embeddings
of the last refresh are of the older weights and are not used. Documents are encoded in units, and queries scored in
blocks, both of them functions of the candidates alone that are handed out to the ranks and done once
(`engine.refresh.blocks`): the bytes are the same for any number of ranks and after any interruption.

Source: ours. AR2 refreshes in every iteration, so that its candidates have the newest scores.

Shapes: Q queries, K candidates a query, U different documents, D embedding dimension.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config.timetable import Visit, WeightsOf
from engine.data.arrays import OpenedInTurn
from engine.data.candidates import Candidates, is_saved, join
from engine.data.corpus import Data
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.errors import TrainingError
from engine.index.held.rows import Rows, collect_rows
from engine.models.encode import Encoder, embeddings_of, encode_queries
from engine.refresh.blocks import Blocks
from engine.refresh.staleness import kept_of
from engine.reliability.progress import progress_bar
from engine.retrievers.dense import frozen_encoder
from engine.retrievers.encoding import stamp_of_weights
from engine.retrievers.kinds import dense
from engine.retrievers.places import open_embeddings
from engine.run import Run, Stage
from shards.embeddings import Stamp, read_rows
from shards.files import canonical_json, save_array, sha256_file

_QUERIES_A_BLOCK = 512
_DOCUMENTS_A_UNIT = 8192
"""Documents encoded between two finished files: some seconds of a GPU, a minute or more of a CPU."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """Result of a stage `rescore/OLD@NEW`.

    Attributes:
        queries: Whose candidates were scored.
        pairs: Of a query and a candidate or a positive that was found.
        documents: Different ones among them.
        documents_encoded: Of these, those that had to be encoded; 0 where the newest weights had encoded the corpus.
        depth: A tenth of the candidates of a query, rounded up.
        kept_best: Mean share of a query's best `depth` candidates by the new scores that were so by the old ones.
    """

    queries: int
    pairs: int
    documents: int
    documents_encoded: int
    depth: int
    kept_best: float | None


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some documents, in files of equally many.

    Attributes:
        documents_U: Which, int64, ascending.
        paths: Of the files, in order.
    """

    documents_U: NDArray[np.int64]
    paths: Sequence[Path]

    def rows(self, indices_K: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of some of them, float32 [K, D]; int64 [K], ascending, each once, at least one."""
        places_K = np.searchsorted(self.documents_U, indices_K)
        units_K = places_K // _DOCUMENTS_A_UNIT
        found = []
        for unit in np.unique(units_K).tolist():
            part_ND = np.load(self.paths[unit], mmap_mode="r", allow_pickle=False)
            found.append(read_rows(part_ND, places_K[units_K == unit] - unit * _DOCUMENTS_A_UNIT))
        return np.concatenate(found)


def stamp_of_rescored(run: Run, data: Data, visit: Visit) -> Stamp:
    """Return what candidates that were scored anew must carry: their name, and the weights that they are scored by.

    Raises:
        ArtifactError: There are no such weights.
    """
    assert visit.rescored_by is not None, "of a visit whose candidates are scored anew"
    found = stamp_of_weights(run, data, dense(visit.rescored_by))
    return Stamp(visit.rescored, found.weights_sha256, found.corpus_sha256)


def rescore_candidates(stage: Stage, data: Data, mined: Candidates, visit: Visit, rows: NDArray[np.int64]) -> Rescored:
    """Score candidates, and the positives that were found with them, by newer weights, and publish both in their order.

    What mining drew at random stays behind them, without a score.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        mined: What an older state of the retriever found.
        visit: Which weights score them.
        rows: Training rows whose candidates are scored, int64 [Q]; all of them were mined.

    Raises:
        ArtifactError: Embeddings or weights are missing or damaged.
        TrainingError: A score is not finite.
    """
    run, coordinator = stage.run, stage.run.coordinator
    folder, stamp = run.folder.candidates(visit.rescored), stamp_of_rescored(run, data, visit)
    work = _Work(stage, data, mined, visit, rows)
    cut = [rows[start : start + _QUERIES_A_BLOCK] for start in range(0, len(rows), _QUERIES_A_BLOCK)]
    blocks = Blocks(stage, folder, work.asked, cut or [rows], lambda path: is_saved(path, stamp, work.asked))
    missing = blocks.missing()
    vectors = work.vectors(blocks, needed=bool(missing))
    with (
        progress_bar(stage.name, len(rows), "query", shown=run.is_main) as bar,
        coordinator.agreement(f"{stage.name}: score"),
    ):
        for number in coordinator.hand_out(stage.name, missing):
            bar.update(number * _QUERIES_A_BLOCK - bar.n)
            found = work.block(blocks.rows[number], vectors, stamp)
            found.save(blocks.part(number), search=work.asked)

    depth = -(-mined.documents_QK.shape[1] // 10)

    def publish() -> float | None:
        load = partial(Candidates.load, stamp=stamp)
        blocks.publish(lambda parts: join(OpenedInTurn(load, parts), folder, search=work.asked))
        return kept_of(mined, Candidates.load(folder, stamp), depth)[0]

    kept = coordinator.only_rank_zero(f"{stage.name}: publish", publish)
    encoded = 0 if work.is_stored else len(work.documents_U)
    result = Rescored(len(rows), work.num_pairs, len(work.documents_U), encoded, depth, kept)
    values = {f"rescore/{key}": float(value) for key, value in asdict(result).items() if value is not None}
    run.metrics.write(stage.name, visit.iteration, values)
    return result


class _Work:
    """Scores the candidates of some queries by newer weights.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        mined: What an older state of the retriever found.
        visit: Which weights score them.
        rows: Training rows, int64 [Q].
    """

    def __init__(self, stage: Stage, data: Data, mined: Candidates, visit: Visit, rows: NDArray[np.int64]) -> None:
        assert visit.rescored_by is not None, "of a visit whose candidates are scored anew"
        self._stage, self._data, self._mined, self._weights = stage, data, mined, visit.rescored_by
        self._name = stage.run.timetable.artifact(self._weights)
        encodes_beside = stage.run.timetable.encodes_beside
        self.is_stored = not encodes_beside and stage.run.is_finished(f"encode/{self._name}")
        """Whether the corpus has been encoded by these weights; where that goes on beside, how far must not matter."""
        self.documents_U, self.num_pairs = self._documents_of(rows)
        self.asked = self._describe(visit.candidates, rows)
        """Names all that the result depends on besides its stamp."""

    def _documents_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Return the different documents that are scored, ascending, and the number of pairs."""
        stands_N, num_pairs = np.zeros(self._data.shards.num_documents, dtype=np.bool_), 0
        for row in rows.tolist():
            documents = self._scored_documents(row)
            stands_N[documents] = True
            num_pairs += len(documents)
        return np.flatnonzero(stands_N), num_pairs

    def _scored_documents(self, row: int) -> NDArray[np.int64]:
        """Return the candidates of a training row that were found, then its positives that were."""
        number = self._mined.row_number(self._data.train.queries[row].id)
        documents_K, scores_K = self._mined.documents_QK[number], self._mined.scores_QK[number]
        positives = [one.document for one in self._mined.positives.at(number)]
        return np.concatenate([documents_K[_were_found(documents_K, scores_K)], np.array(positives, dtype=np.int64)])

    def _describe(self, mined: str, rows: NDArray[np.int64]) -> str:
        config = self._stage.run.config
        section = config.models[self._weights.model]
        asked = {
            "mined": sha256_file(self._stage.run.folder.candidates(mined) / "candidates.json"),
            "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
            "max_length": section.max_length,
            "query_max_length": config.query_max_length,
            "precision": section.precision,
            "tokens_per_batch": config.evaluation.tokens_per_batch,
            "embedding_dtype": config.index.embedding_dtype,
            "is_stored": self.is_stored,
        }
        return hashlib.sha256(canonical_json(asked).encode()).hexdigest()

    @cached_property
    def _encoders(self) -> tuple[Encoder, Encoder]:
        """The newest towers of queries and of documents, loaded by ranks that have something to do."""
        retriever = frozen_encoder(self._stage.run, self._weights)
        return retriever.query_encoder(), retriever.document_encoder()

    def vectors(self, blocks: Blocks, *, needed: bool) -> Rows:
        """Return the documents' embeddings: the corpus' own, or those that all ranks make now, where any are needed."""
        run = self._stage.run
        if self.is_stored:
            store = open_embeddings(run, self._data, run.folder, dense(self._weights))
            documents_U = self.documents_U if needed else self.documents_U[:0]
            label = f"{self._stage.name}: collect"
            return collect_rows(run.coordinator, label, store, documents_U, blocks.parts / "collected")
        starts = range(0, len(self.documents_U), _DOCUMENTS_A_UNIT)
        paths = [blocks.parts / f"embeddings-{number:06d}.npy" for number in range(len(starts))]
        if needed:
            self._encode(paths)
        return Encoded(self.documents_U, paths)

    def _encode(self, paths: Sequence[Path]) -> None:
        """Encode the documents of each file that is not there, with all ranks."""
        stage, coordinator = self._stage, self._stage.run.coordinator
        name = f"{stage.name}: encode"
        missing: list[int] = coordinator.only_rank_zero(
            f"{name}: plan", lambda: [number for number, path in enumerate(paths) if not path.exists()]
        )
        with (
            progress_bar(stage.name, len(self.documents_U), "doc", shown=stage.run.is_main) as bar,
            coordinator.agreement(name),
        ):
            for number in coordinator.hand_out(name, missing):
                bar.update(number * _DOCUMENTS_A_UNIT - bar.n)
                paths[number].parent.mkdir(parents=True, exist_ok=True)
                start = number * _DOCUMENTS_A_UNIT
                save_array(paths[number], self._embed(self.documents_U[start : start + _DOCUMENTS_A_UNIT]))

    def _embed(self, documents_N: NDArray[np.int64]) -> NDArray[np.floating]:
        run, text, shards = self._stage.run, self._data.texts[self._weights.model], self._data.shards
        rows_ND: NDArray[np.floating] = embeddings_of(
            self._encoders[1],
            text.template.for_documents(),
            [shards.tokens(document, text.stream) for document in documents_N.tolist()],
            run.config.models[self._weights.model].max_length,
            run.config.evaluation.tokens_per_batch,
            run.config.index.embedding_dtype,
            run.device,
            lambda _documents, _tokens: None,
        )
        return rows_ND

    def block(self, rows: NDArray[np.int64], vectors: Rows, stamp: Stamp) -> Candidates:
        """Score the candidates of some queries, and put them into the order of their scores.

        Raises:
            TrainingError: A score is not finite.
        """
        run, mined, text = self._stage.run, self._mined, self._data.texts[self._weights.model]
        queries = [self._data.train.queries[row] for row in rows.tolist()]
        places = np.array([mined.row_number(query.id) for query in queries], dtype=np.int64)
        documents_QK, scores_QK = np.array(mined.documents_QK[places]), np.array(mined.scores_QK[places])
        scored = [self._scored_documents(row) for row in rows.tolist()]
        positives: list[list[FoundPositive]] = [[] for _ in queries]
        if any(map(len, scored)):
            known = np.unique(np.concatenate(scored))
            rows_KD = vectors.rows(known)
            queries_QD = encode_queries(
                self._encoders[0],
                text.template.for_queries(),
                text.tokenize_queries(queries),
                max_length=run.config.query_max_length,
                tokens_per_batch=run.config.evaluation.tokens_per_batch,
                device=run.device,
            )
            for place, own in enumerate(scored):
                new_K = rows_KD[np.searchsorted(known, own)] @ queries_QD[place]
                _require_finite(new_K, own, queries[place].id, self._weights)
                positives[place] = _put_in_order(documents_QK[place], scores_QK[place], own, new_K)
        qids = [query.id for query in queries]
        found = FoundPositives.of(positives)
        return Candidates(mined.source, stamp, qids, documents_QK, scores_QK, Counter(), found)


def _were_found(documents_K: NDArray[np.int64], scores_K: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which places of a list hold a document that the retriever found, and not padding or one drawn at random."""
    found: NDArray[np.bool_] = (documents_K >= 0) & ~np.isneginf(scores_K)
    return found


def _put_in_order(
    documents_K: NDArray[np.int64],
    scores_K: NDArray[np.float32],
    scored: NDArray[np.int64],
    new: NDArray[np.float32],
) -> list[FoundPositive]:
    """Put a list into the order of its new scores, in place; ties by document.

    Args:
        documents_K: Candidates of a query, int64 [K].
        scores_K: Their scores, float32 [K].
        scored: Those of them that were found, in their order, and then the positives that were.
        new: Their new scores.

    Returns:
        The positives with their new scores, best first, and their ranks among candidates and positives.
    """
    found_K = _were_found(documents_K, scores_K)
    num_found = int(found_K.sum())
    order = np.lexsort((scored, -new))
    of_list = order[order < num_found]
    drawn = documents_K[~found_K & (documents_K >= 0)]  # at random, for want of others
    documents_K[: num_found + len(drawn)] = np.concatenate([scored[of_list], drawn])
    scores_K[:num_found] = new[of_list]
    scores_K[num_found:] = -np.inf
    return [
        FoundPositive(int(scored[place]), rank + 1, float(new[place]))
        for rank, place in enumerate(order.tolist())
        if place >= num_found
    ]


def _require_finite(scores: NDArray[np.float32], documents: NDArray[np.int64], qid: str, weights: WeightsOf) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise TrainingError(
            f"{weights.model} of {weights.state} scores document {int(documents[bad[0]])} of query {qid!r} with "
            f"{scores[bad[0]]}, as it does {bad.size - 1} more",
            expected="finite scores, which can be compared",
            remedy="look for a training run that diverged: lower the learning rate or start from an earlier checkpoint",
        )

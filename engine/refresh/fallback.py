"""Fallback positives: for training questions of which answers alone are known, the best passage that has an answer.

AR2's released code trains on all questions of `*-train.qa.csv`: where one has no gold passage, the best passage that
a search finds with an answer in it takes its place. Here that search is BM25's, once, before anything is trained: a
stage of its own between the shards and the first phase, whose artifact says which passage each question got. So what is
trained on is fixed for the whole run, and the candidates of every refresh know the passage as a positive. Questions
that find none are left out, and counted.

Source: AR2's released code (`positive_ctxs[0]`: gold if the question has one, else the top passage with an answer).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.config.recipe import Config
from engine.data.answers import AnswerMatcher
from engine.data.arrays import OpenedInTurn
from engine.data.candidates import Candidates, is_saved, join
from engine.data.corpus import Data
from engine.errors import ConfigError, DataError
from engine.log import get_logger
from engine.refresh.blocks import Blocks
from engine.reliability.progress import progress_bar
from engine.retrievers.kinds import BM25, build, open_searcher, stamp_of
from engine.run import Run, Stage
from engine.search import Searcher, search_others
from shards.files import canonical_json
from shards.records import Dataset, Query

log = get_logger(__name__)
_STAGE, _FOUND = "positives", "found"


@dataclass(frozen=True, slots=True)
class FallbackPositives:
    """Result of the stage `positives`.

    Attributes:
        questions: Training questions of which answers alone are known.
        with_positive: Of them, those for which a passage with an answer was found; they are trained on.
        left_out: The others.
    """

    questions: int
    with_positive: int
    left_out: int


def unjudged_questions(dataset: Dataset) -> list[Query]:
    """Return the training questions of which answers are known and no positive, in the order of the data."""
    train = dataset.qrels.get("train", {})
    queries = [dataset.queries[qid] for qid in train if not dataset.positives("train", qid)]
    return [query for query in queries if query.answers]


def trained_questions(config: Config, dataset: Dataset) -> list[str]:
    """Return the ids of the training questions that are trained on, or may be once positives have been looked for."""
    judged = [qid for qid in dataset.qrels.get("train", {}) if dataset.positives("train", qid)]
    if config.data.fallback_positive == "none":
        return judged
    return judged + [query.id for query in unjudged_questions(dataset)]


def require_fallback(config: Config, dataset: Dataset) -> None:
    """Refuse a recipe that asks for fallback positives where there can be none, before any work.

    Args:
        config: With `data.fallback_positive`.
        dataset: The data.

    Raises:
        ConfigError: Phases are counted in epochs, which begin before the positives are known.
        DataError: No training question has answers and no positive.
    """
    unjudged = len(unjudged_questions(dataset))
    if config.data.fallback_positive == "none":
        if unjudged:
            log.info(
                "%d training questions have answers and no positive: not trained on (data.fallback_positive)", unjudged
            )
        return
    if not unjudged:
        raise DataError(
            f"data.fallback_positive is {config.data.fallback_positive}, and {dataset.path} has no training question "
            f"with answers and without a positive",
            expected="questions of which answers alone are known",
            remedy="convert DPR's files with --questions all, which keeps them, or leave data.fallback_positive out",
        )
    if config.counts_epochs:
        raise ConfigError(
            f"data.fallback_positive is {config.data.fallback_positive}, and a phase of the recipe is counted in "
            f"epochs: how many of {unjudged} questions get a positive is known only after a search",
            expected="phases that are counted in steps",
            remedy="name the steps of each phase, or leave data.fallback_positive out",
        )


def with_fallback_positives(run: Run, data: Data) -> Data:
    """Look for positives of training questions that have none, and add those that get one behind the others.

    Args:
        run: Whose folder takes the artifact.
        data: Corpus and judged training questions.

    Returns:
        The data with more training questions.

    Raises:
        DataError: No training question has a positive in the end.
    """
    questions = unjudged_questions(data.dataset)
    build(run, data, run.folder, BM25)
    folder, stamp, asked = _folder(run), stamp_of(run, data, BM25), _asked(run.config, data.dataset, questions)
    if run.is_finished(_STAGE) and not run.coordinator.only_rank_zero(
        f"{_STAGE}: look", lambda: is_saved(folder, stamp, asked)
    ):
        run.forget([_STAGE])
    run.once(_STAGE, find_positives, data, questions, asked)
    found = Candidates.load(folder, stamp)
    by_id = {query.id: query for query in questions}
    rows = [(by_id[qid], found.row(qid)) for qid in found.qids]
    more = [(query, documents_K) for query, documents_K in rows if len(documents_K)]
    if not more and not len(data.train):
        raise DataError(
            f"none of {len(questions)} training questions has a passage with an answer among the best "
            f"{run.config.data.fallback_depth} of BM25",
            expected="at least one training question with a positive",
            remedy="raise data.fallback_depth, or add judgements to the train split",
        )
    return data.with_training_queries([query for query, _ in more], [documents_K for _, documents_K in more])


def find_positives(stage: Stage, data: Data, questions: Sequence[Query], asked: str) -> FallbackPositives:
    """Search the questions with all ranks, and publish the best passage of each that has an answer.

    Args:
        stage: Where this runs.
        data: The corpus.
        questions: All that have answers and no positive.
        asked: Names all that the result depends on.
    """
    run, coordinator, folder = stage.run, stage.run.coordinator, _folder(stage.run)
    searcher, stamp = open_searcher(run, data, run.folder, BM25), stamp_of(run, data, BM25)
    size, rows = searcher.block_size, np.arange(len(questions))
    blocks = Blocks(
        stage,
        folder,
        asked,
        [rows[start : start + size] for start in range(0, len(rows), size)],
        lambda path: is_saved(path, stamp, asked),
    )
    missing = blocks.missing()
    with (
        progress_bar(stage.name, len(rows), "question", shown=run.is_main) as bar,
        coordinator.agreement(f"{stage.name}: search"),
    ):
        for number in coordinator.hand_out(stage.name, missing):
            bar.update(number * size - bar.n)
            own = [questions[row] for row in blocks.rows[number].tolist()]
            documents_Q1, scores_Q1 = _best_with_answer(data, searcher, own, run.config.data.fallback_depth)
            counts = Counter({_FOUND: int((documents_Q1 >= 0).sum())})
            part = Candidates(searcher.source, stamp, [query.id for query in own], documents_Q1, scores_Q1, counts)
            part.save(blocks.part(number), search=asked)

    def publish() -> int:
        load = partial(Candidates.load, stamp=stamp)
        blocks.publish(lambda parts: join(OpenedInTurn(load, parts), folder, search=asked))
        return Candidates.load(folder, stamp).counts[_FOUND]

    num_found: int = coordinator.only_rank_zero(f"{stage.name}: publish", publish)
    return FallbackPositives(len(questions), num_found, len(questions) - num_found)


def _best_with_answer(
    data: Data, searcher: Searcher, questions: Sequence[Query], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return of each question the best document of its hits that has an answer: documents and scores [Q, 1].

    What the data judge not to be relevant, or know to be neither, is none, and neither is the question itself.
    """
    documents_Q1 = np.full((len(questions), 1), -1, dtype=np.int64)
    scores_Q1 = np.full((len(questions), 1), -np.inf, dtype=np.float32)
    num_documents = data.shards.num_documents
    hits = search_others(searcher, questions, depth, data.own_documents, num_documents=num_documents)
    train, exclusions = data.dataset.qrels["train"], data.dataset.exclusions.get("train", {})
    for row, question in enumerate(questions):
        matcher = AnswerMatcher(question.answers)
        judged = {data.shards.index_of(docid) for docid in (*train[question.id], *exclusions.get(question.id, ()))}
        for rank in range(int(hits.num_found_Q[row])):
            document = int(hits.documents_QK[row, rank])
            if document not in judged and matcher.has(data.haystack_of(document)):
                documents_Q1[row, 0], scores_Q1[row, 0] = document, hits.scores_QK[row, rank]
                break
    return documents_Q1, scores_Q1


def _folder(run: Run) -> Path:
    return run.folder.path / "positives" / "bm25"


def _asked(config: Config, dataset: Dataset, questions: Sequence[Query]) -> str:
    """Name all that the positives depend on, besides BM25 and the corpus."""
    asked = [dataset.fingerprint, [query.id for query in questions], config.data.fallback_depth]
    return hashlib.sha256(canonical_json([*asked, config.data.ignore_identical_ids]).encode()).hexdigest()

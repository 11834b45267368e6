"""What a data set must have for a recipe, said before any work is done."""

from __future__ import annotations

from engine.config.recipe import Config
from engine.errors import ArtifactError, DataError
from shards.errors import counted
from shards.records import Dataset


def require_same_files(dataset_sha256: str, dataset: Dataset) -> None:
    """Refuse to go on with other data than the shards were made of.

    Args:
        dataset_sha256: Fingerprint of the files that the shards were made of.
        dataset: What is there now.

    Raises:
        ArtifactError: The data changed since.
    """
    if dataset_sha256 != dataset.fingerprint:
        raise ArtifactError(
            f"the shards of the run were made of other files than those now in {dataset.path}",
            expected=f"data with fingerprint {dataset_sha256}, found {dataset.fingerprint}",
            remedy="restore the data, or choose another run.path",
        )


def require_training_queries(dataset: Dataset, *, finds_positives: bool = False) -> None:
    """Refuse to train where nothing can be learnt from.

    Args:
        dataset: The data.
        finds_positives: Whether positives are looked for, of queries that have answers.

    Raises:
        DataError: The train split is missing or none of its queries has a positive.
    """
    train = dataset.qrels.get("train", {})
    if not any(dataset.positives("train", qid) or (finds_positives and dataset.queries[qid].answers) for qid in train):
        raise DataError(
            f"{dataset.path} has no training query with a positive document",
            expected="a train split, such as qrels/train.tsv in the BEIR layout",
            remedy="add one, or name another folder by data.path",
        )


def require_enough_documents(config: Config, dataset: Dataset) -> None:
    """Refuse a corpus that is too small for the negatives a step draws, before any work is done.

    Raises:
        DataError: Even with all documents but the positives of a query, n cannot be drawn; or all are held out.
    """
    needed, held_out = config.timetable.most_negatives, config.timetable.held_out
    if held_out >= dataset.num_documents:
        raise DataError(
            f"the corpus has {dataset.num_documents} documents, {held_out} of which are to be held out",
            expected="documents that are left to train on",
            remedy=f"lower {config.recipe}.held_out, or use a larger corpus",
        )
    if dataset.num_documents <= needed:
        raise DataError(
            f"the corpus has {dataset.num_documents} documents, a step draws {needed} negatives and a positive",
            expected=f"more than {needed} documents",
            remedy="lower num_negatives, or use a larger corpus",
        )
    if needed and config.learns_from_queries:
        _require_other_documents(dataset, needed)


def _require_other_documents(dataset: Dataset, needed: int) -> None:
    """Refuse a training query of which too little of the corpus may be a negative."""
    exclusions = dataset.exclusions.get("train", {})
    for qid in dataset.qrels.get("train", {}):
        known = set(dataset.positives("train", qid))
        left = dataset.num_documents - len(known.union(exclusions.get(qid, ()))) if known else needed
        if left < needed:
            raise DataError(
                f"training query {qid!r} has {counted(left, 'document')} left as negatives: all others of the "
                f"{dataset.num_documents} are its positives or excluded",
                expected=f"at least the {needed} negatives that a step draws",
                remedy="lower num_negatives, take the query out of the train split, or use a larger corpus",
            )

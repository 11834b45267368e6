"""What a data folder holds, as the log tells it at the start of a run."""

from __future__ import annotations

from engine.log import get_logger
from shards.errors import counted
from shards.records import Dataset

log = get_logger(__name__)


def tell_data(dataset: Dataset, *, warns: bool) -> None:
    """Log how much there is of documents and queries, what was left out, and which measured queries are trained on.

    Args:
        dataset: The data.
        warns: Whether measured queries are looked for among those that are trained on.
    """
    splits = ", ".join(f"{split} {len(qrels)}" for split, qrels in dataset.qrels.items())
    log.info("data %s: %d documents, queries: %s", dataset.path, dataset.num_documents, splits)
    for reason, number in sorted(dataset.dropped.items()):
        log.info("  dropped %d: %s", number, reason)
    for split in ("dev", "test") if warns else ():
        if shared := count_trained_on(dataset, split):
            log.warning(
                "%d of %s of %s have the text of a training query: what is measured on them says little of queries "
                "that were not trained on",
                *(shared, counted(len(dataset.qrels[split]), "query"), split),
            )


def count_trained_on(dataset: Dataset, split: str) -> int:
    """Count the queries of a split whose text a query of the train split has as well, under its own or another id.

    Args:
        dataset: The data.
        split: One that is measured, `dev` or `test`; 0 where the data do not have it.
    """
    measured, trained = (
        [dataset.queries[qid].text.strip() for qid in dataset.qrels.get(one, {})] for one in (split, "train")
    )
    known = set(measured).intersection(trained)
    return sum(text in known for text in measured)

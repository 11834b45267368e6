"""What data must have is said by name, with what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.file import load_config
from engine.data.requirements import require_enough_documents, require_same_files, require_training_queries
from engine.errors import ArtifactError, DataError
from shards.formats import open_dataset
from shards.made.generated import generate_dataset
from shards.records import Dataset

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    generate_dataset(folder / "data", num_documents=40)
    return open_dataset(folder / "data")


def test_shards_of_other_files_are_refused(dataset: Dataset) -> None:
    require_same_files(dataset.fingerprint, dataset)
    with pytest.raises(ArtifactError, match=r"made of other files than those now in .*restore the data"):
        require_same_files("0" * 64, dataset)


def test_a_train_split_without_positives_is_refused(dataset: Dataset) -> None:
    require_training_queries(dataset)
    without = replace(dataset, qrels={split: own for split, own in dataset.qrels.items() if split != "train"})
    with pytest.raises(DataError, match="no training query with a positive document"):
        require_training_queries(without)


def test_a_query_must_leave_documents_to_draw_from(dataset: Dataset) -> None:
    """Symptom: the run ended behind the warm-up of the retriever, at the first phase that draws so many."""
    train = {qid: dict(judged) for qid, judged in dataset.qrels["train"].items()}
    qid = list(train)[-1]
    train[qid] = {f"d{number}": 1 for number in range(35)} | {f"d{number}": 0 for number in range(35, 40)}
    many = replace(dataset, qrels=dataset.qrels | {"train": train})
    require_enough_documents(load_config(TINY, ["ar2.num_negatives=5"]), many)
    excluding = replace(many, exclusions={"train": {qid: ["d0", "d35"]}})
    for data, left, needed in ((many, "5 documents", 6), (excluding, "4 documents", 5)):
        config = load_config(TINY, [f"ar2.num_negatives={needed}"])
        with pytest.raises(DataError, match=rf"'{qid}' has {left} left as negatives.*at least the {needed} negatives"):
            require_enough_documents(config, data)


def test_a_corpus_must_hold_more_documents_than_a_step_draws(dataset: Dataset) -> None:
    require_enough_documents(load_config(TINY, ["ar2.num_negatives=39", "ar2.top_k=50"]), dataset)
    for negatives in (40, 41):
        with pytest.raises(DataError, match=f"40 documents, a step draws {negatives} negatives and a positive"):
            require_enough_documents(load_config(TINY, [f"ar2.num_negatives={negatives}", "ar2.top_k=50"]), dataset)

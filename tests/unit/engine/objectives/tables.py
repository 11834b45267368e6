"""Made-up queries and documents whose representations are rows of tables: a step of an objective without a backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.timetable import Phase, Pool, Visit
from engine.config.training import OptimConfig
from engine.data.batches import Group, Samples
from engine.data.candidates import Candidates
from engine.data.corpus import TrainingQueries
from shards.embeddings import Stamp
from shards.records import Query

STAMP = Stamp("000", "a" * 64, "b" * 64)
N_QUERIES, N_DOCUMENTS, DIMENSION = 4, 12, 5


def data() -> Any:
    queries = [Query(f"q{row}", "text") for row in range(N_QUERIES)]
    positives = [np.array([row], dtype=np.int64) for row in range(N_QUERIES)]
    shards = SimpleNamespace(docids=[f"d{index}" for index in range(N_DOCUMENTS)])
    return SimpleNamespace(train=TrainingQueries(queries, positives, {}), shards=shards)


def samples(
    rank: int = 0, world_size: int = 1, *, steps: int = 3, micro_batch_size: int = 4, pool_of: Pool = "none"
) -> Samples:
    phase = Phase("student", "", "retriever", steps, 4, micro_batch_size, 2, OptimConfig(), ("joint",), pool=pool_of)
    documents_QK = np.tile(np.arange(N_QUERIES, N_DOCUMENTS), (N_QUERIES, 1))
    qids = [f"q{row}" for row in range(N_QUERIES)]
    pool = Candidates("joint", STAMP, qids, documents_QK, np.zeros(documents_QK.shape, np.float32), Counter())
    return Samples(Visit(phase, 0), 3, data(), pool, rank, world_size)


def teacher_score(qid: str, document: int) -> float:
    return float(np.sin(7.0 * int(qid[1:]) + document))


class Numbers:
    """Stands for a builder of inputs: a query or document is its number."""

    def queries(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        rows = torch.tensor([group.query for group in groups])
        return {"numbers": rows, "attention_mask": torch.ones(len(rows), 1)}

    def documents(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        rows = torch.from_numpy(np.concatenate([group.documents for group in groups]))
        return {"numbers": rows, "attention_mask": torch.ones(len(rows), 1)}

    def tokens_of_texts(self, group: Group) -> int:
        return 1


class Student(torch.nn.Module):
    """A table of representations; stands for an engine, too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.of_queries = torch.nn.Parameter(torch.randn(N_QUERIES, DIMENSION, generator=generator) / 2)
        self.of_documents = torch.nn.Parameter(torch.randn(N_DOCUMENTS, DIMENSION, generator=generator) / 2)

    def forward(self, *, queries: dict[str, Tensor], documents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.of_queries[queries["numbers"]], self.of_documents[documents["numbers"]]

    def backward(self, loss: Tensor, *, last: bool, share: float = 1.0) -> None:
        (loss * share).backward()  # type: ignore[no-untyped-call]

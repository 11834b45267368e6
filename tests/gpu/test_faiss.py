"""FAISS on a real GPU: it takes what our table says and refuses the rest, and finds what it finds on a CPU."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch

from engine.index.gpu import NUM_CODES, from_gpu, needs_half_tables, on_gpu, refusal_of
from engine.index.kmeans import Assigner
from engine.index.plan import empty_index
from engine.index.probe import ProbedIndex

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or faiss.get_num_gpus() == 0, reason="there is no GPU, or FAISS has no support for it"
)
GPU = torch.device("cuda", torch.cuda.device_count() - 1 if torch.cuda.is_available() else 0)
N, D = 4000, 192
ROWS_ND = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


def trained(factory: str) -> Any:
    index: Any = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(ROWS_ND)
    return index


@pytest.mark.parametrize("codes", [*NUM_CODES, 6, 10, 36, 192])
def test_faiss_takes_the_numbers_of_codes_that_the_table_has(codes: int) -> None:
    index = empty_index(f"IVF4,PQ{codes}", 2 * codes)
    options: Any = getattr(faiss, "GpuClonerOptions")()  # noqa: B009 - the CPU build has no such name
    options.useFloat16, options.use_cuvs = needs_half_tables(codes), False
    resources = getattr(faiss, "StandardGpuResources")()  # noqa: B009
    try:
        getattr(faiss, "index_cpu_to_gpu")(resources, GPU.index, index, options)  # noqa: B009
        is_taken = True
    except RuntimeError:
        is_taken = False
    assert is_taken == (refusal_of(index) == "") == (codes in NUM_CODES)


def test_lists_are_those_of_a_cpu() -> None:
    plain, ours = Assigner(ROWS_ND[:50], 1), Assigner(ROWS_ND[:50], 1, GPU)
    assert (ours.nearest(ROWS_ND)[0] == plain.nearest(ROWS_ND)[0]).mean() > 0.999, "but for rounding"
    np.testing.assert_allclose(ours.nearest(ROWS_ND)[1], plain.nearest(ROWS_ND)[1], rtol=1e-4)


@pytest.mark.parametrize("factory", ["IVF16,PQ48", "IVF16,PQ96", "OPQ48,IVF16,PQ48", "IVF16,Flat"])
def test_what_is_filled_and_searched_there_is_that_of_a_cpu(factory: str) -> None:
    plain = trained(factory)
    ours = on_gpu(plain, GPU)
    assert ours is not plain
    ids = np.arange(N, dtype=np.int64) + 7
    ours.add_with_ids(ROWS_ND, ids)
    plain.add_with_ids(ROWS_ND, ids)
    filled = from_gpu(ours)
    assert filled.ntotal == N
    found = [ProbedIndex(index, in_memory=True, device=device) for index, device in ((plain, "cpu"), (filled, GPU))]
    hits = [one.search(ROWS_ND[:64], 20, nprobe=8, needed=20) for one in found]
    shared = [len(np.intersect1d(a, b)) / 20 for a, b in zip(hits[0].documents_QK, hits[1].documents_QK, strict=True)]
    assert np.mean(shared) > 0.97, "but for rounding"
    beyond = found[1].search(ROWS_ND[:4], 3000, nprobe=16, needed=3000)
    assert (beyond.documents_QK[:, 0] >= 7).all(), "more than a GPU selects"

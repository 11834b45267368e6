"""How many lists an index should have: what they cost to train and to fill, and what a search must visit for a recall.

On made-up clustered vectors, by FAISS in one thread, without codes: the lists alone decide what is visited. For lists
of 1, 2, 4 and 8 times sqrt(N), each trained on 40 vectors, the processor time of four iterations of k-means and of
filling, and the lists and documents that a query visits until these hold so many of the 100 best documents.

    python benchmarks/index_lists.py [--documents 100000]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import faiss
import numpy as np

from benchmarks.index_worlds import DIMENSION, Vectors
from benchmarks.report import machine_line, table

ITERATIONS, PER_LIST, K, QUERIES, RECALLS = 4, 40, 100, 100, (0.9, 0.95, 0.98)


def measure(rows_ND: np.ndarray, queries_QD: np.ndarray, truth_QK: np.ndarray, num_lists: int) -> dict[str, Any]:
    """Return a row of the table."""
    clustering: Any = faiss.Clustering(DIMENSION, num_lists)
    clustering.niter, clustering.spherical = ITERATIONS, True
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = PER_LIST, 1
    start = os.times().user
    clustering.train(rows_ND, faiss.IndexFlatIP(DIMENSION))
    trained = os.times().user
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(faiss.vector_to_array(clustering.centroids).reshape(num_lists, DIMENSION))
    lists_N = index.search(rows_ND, 1)[1][:, 0]
    row: dict[str, Any] = {
        "lists": num_lists,
        "train user s": trained - start,
        "fill user s": os.times().user - trained,
    }
    sizes_L, visits_QL = np.bincount(lists_N, minlength=num_lists), index.search(queries_QD, num_lists)[1]
    for recall in RECALLS:
        for nprobe in (*range(1, 64), *range(64, num_lists + 1, 8)):
            visited = visits_QL[:, :nprobe]
            pairs = zip(lists_N[truth_QK], visited, strict=True)
            if np.mean([np.isin(own, lists).mean() for own, lists in pairs]) >= recall:
                share = sizes_L[visited].sum(axis=1).mean() / len(rows_ND)
                row[f"recall {recall}: nprobe, visited"] = f"{nprobe}, {100 * share:.1f} %"
                break
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    num_documents = parser.parse_args().documents
    faiss.omp_set_num_threads(1)
    vectors = Vectors()
    rows_ND, queries_QD = vectors.draw(num_documents, 1), vectors.draw(QUERIES, 10**6)
    exact = faiss.IndexFlatIP(DIMENSION)
    exact.add(rows_ND)
    truth_QK = exact.search(queries_QD, K)[1]
    counts = [int(factor * math.sqrt(num_documents)) for factor in (1, 2, 4, 8)]
    print(table([measure(rows_ND, queries_QD, truth_QK, count) for count in counts]))
    print(f"\n{num_documents} documents of {DIMENSION} dimensions; {machine_line()}")


if __name__ == "__main__":
    main()

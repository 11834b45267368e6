"""Time and memory of an index build while the corpus doubles and doubles again.

The embeddings are made in parts (float16, 384 numbers, clustered, of varied norms) and lie on disk; a build may hold a
unit of the sample, one index part, and in the end the index, never the embeddings. The table has the seconds of each
phase, the largest resident set (VmHWM, with mapped pages of files) and the largest anonymous one (RssAnon) of the rank
that needs most, and below it how each grows: the exponent e in size**e between the smallest and the largest corpus.

    python benchmarks/index_memory.py [--quick] [--ranks 1] [--threads 2] [--placement auto] [--folder DIR]
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.index_worlds import GIB, PER_SHARD, folder_bytes, make_embeddings, run_world
from benchmarks.report import machine_line, table

SIZES, QUICK_SIZES = (1_000_000, 2_000_000, 4_000_000), (50_000, 100_000, 200_000)
PHASES = ("train", "fill", "merge", "exact search", "tune", "all")


def measure(folder: Path, num_documents: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build one index and return its row of the table."""
    per_shard = PER_SHARD if num_documents >= 10 * PER_SHARD else num_documents // 10
    embeddings, index = folder / f"embeddings-{num_documents}", folder / f"index-{num_documents}"
    make_embeddings(embeddings, num_documents, per_shard)
    job = {"embeddings": str(embeddings), "folder": str(index), "num_documents": num_documents, "per_shard": per_shard}
    job |= {"plan": {"factory": arguments.factory, "placement": arguments.placement}}
    ranks = run_world(arguments.ranks, arguments.threads, job)
    built, seconds = ranks[0]["built"], ranks[0]["seconds"]
    row = {"documents": num_documents, "factory": built["factory"], "placement": built["placement"]}
    row |= {f"{phase} s": seconds.get(phase, 0.0) for phase in PHASES}
    row |= {
        "recall@100": built["recall"],
        "ms/query": built["milliseconds_per_query"],
        "before GiB": max(rank["before_bytes"] for rank in ranks) / GIB,
        "VmHWM GiB": max(rank["peak_bytes"] for rank in ranks) / GIB,
        "RssAnon GiB": max(rank["anonymous_bytes"] for rank in ranks) / GIB,
        "index GiB": built["index_bytes"] / GIB,
        "embeddings GiB": folder_bytes([embeddings]) / GIB,
        "disk GiB": folder_bytes([embeddings, index]) / GIB,
    }
    shutil.rmtree(index)
    shutil.rmtree(embeddings)
    return row


def growth(rows: list[dict[str, Any]], key: str, less: str | None = None) -> float:
    """Return the exponent of a column's growth over the corpus's, what was there before taken off."""
    first, last = (row[key] - (row[less] if less else 0) for row in (rows[0], rows[-1]))
    return math.log(last / first) / math.log(rows[-1]["documents"] / rows[0]["documents"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50,000 to 200,000 documents")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of documents, ascending")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--placement", default="auto", choices=["auto", "memory", "disk", "parts"])
    parser.add_argument("--folder", type=Path, help="where the embeddings and indexes lie for a while")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
        rows = [measure(Path(name), size, arguments) for size in sizes]
    print(table(rows))
    print(
        f"\ngrowth exponents: time {growth(rows, 'all s'):.2f}, VmHWM {growth(rows, 'VmHWM GiB', 'before GiB'):.2f}, "
        f"RssAnon {growth(rows, 'RssAnon GiB'):.2f}, index {growth(rows, 'index GiB'):.2f}, "
        f"embeddings {growth(rows, 'embeddings GiB'):.2f}"
    )
    print(f"\n{arguments.ranks} rank(s) of {arguments.threads} threads; {machine_line()}")


if __name__ == "__main__":
    main()

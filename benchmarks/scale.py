"""What one refresh of a large corpus takes, from formulas: GPU hours, memory, disk, network, and the plan of the index.

Nothing is built: rates come from the command line, each default being a figure measured by another benchmark here or
an assumption that is printed as such. `docs/scale.md` shows and explains the table.

    python benchmarks/scale.py --gpus 8 64 --documents 21015324 138364198 1000000000
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import table
from engine.config.recipe import IndexConfig
from engine.index.estimate import estimate_index
from engine.index.plan import GIB, IndexPlan, cut_parts, plan_index

GB, HOUR = 1e9, 3600.0


@dataclass(frozen=True)
class Assumptions:
    """Rates and sizes; those without a benchmark are marked in the docs."""

    dimension: int
    tokens: int
    layers: int
    hidden: int
    peak_tflops: float
    mfu: float
    gflops_per_rank: float
    shard_bytes: float
    tokenise_per_second: float
    queries: int
    top_k: int
    refine: int
    memory_gib: float


def encode_flop(given: Assumptions) -> float:
    """Return the operations of one passage: 24 * h^2 a token and layer for the products, 4 * L * h for attention."""
    h, length = given.hidden, given.tokens
    return given.layers * length * (24 * h * h + 4 * length * h)


def describe(num_documents: int, num_gpus: int, given: Assumptions) -> dict[str, Any]:
    """Return a row of the table: what a refresh of N passages on so many GPUs takes."""
    per_shard = min(20_000, max(250, num_documents // 500))
    sizes = [per_shard] * (num_documents // per_shard) + [num_documents % per_shard or per_shard]
    parts = cut_parts(sizes)
    plan = plan_index(IndexConfig(memory_gib=given.memory_gib), num_documents=num_documents, dimension=given.dimension)
    rate = given.gflops_per_rank
    took = estimate_index(
        plan,
        num_documents=num_documents,
        dimension=given.dimension,
        num_parts=len(parts),
        embedding_bytes=2,
        gigaflops=rate,
    )
    encode = num_documents * encode_flop(given) / (given.peak_tflops * 1e12 * given.mfu)
    moved = num_documents * given.shard_bytes + 2 * took.embeddings_bytes + 2 * took.parts_bytes + took.merged_bytes
    rescored = given.queries * given.top_k * given.refine * given.dimension * 2
    return {
        "passages": f"{num_documents / 1e6:,.0f} M",
        "GPUs": num_gpus,
        "plan": _short(plan),
        "encode GPU-h": encode / HOUR,
        "encode h": encode / HOUR / num_gpus,
        "train h": (took.train_minutes / num_gpus + took.rotate_minutes) / 60,
        "warm train h": took.warm_minutes / 60 / num_gpus,
        "add h": took.add_minutes / 60 / min(num_gpus, len(parts)),
        "merge h": took.merge_minutes / 60,
        "index GiB": took.index_bytes / GIB,
        "train GiB": (took.training_bytes + took.rotation_bytes) / GIB,
        "rank GiB": took.rank_bytes / GIB,
        "shards GB": num_documents * given.shard_bytes / GB,
        "embeddings GB": took.embeddings_bytes / GB,
        "index disk GB": (took.parts_bytes + took.merged_bytes) / GB,
        "read+write GB a refresh": moved / GB,
        "re-scoring reads GB": rescored / GB,
        "tokenise core-h": num_documents / given.tokenise_per_second / HOUR,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[21_015_324, 138_364_198, 1_000_000_000])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128, help="of a passage; all are taken as this long")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--peak-tflops", type=float, default=312.0, help="of a GPU, bf16 (A100: 312, H100: 989)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that encoding reaches (assumed)")
    parser.add_argument("--gflops-per-rank", type=float, default=720.0, help="of FAISS's products (8 cores of 90)")
    parser.add_argument("--shard-bytes", type=float, default=2900.0, help="of a passage in the token shards")
    parser.add_argument("--tokenise-per-second", type=float, default=6000.0, help="passages, on one core")
    parser.add_argument("--queries", type=int, default=100_000, help="training queries searched at a refresh")
    parser.add_argument("--top-k", type=int, default=125)
    parser.add_argument("--refine", type=int, default=4)
    parser.add_argument("--memory-gib", type=float, default=8.0, help="index.memory_gib")
    words = vars(parser.parse_args())
    documents, gpus = words.pop("documents"), words.pop("gpus")
    given = Assumptions(**words)
    print(", ".join(f"{name} {value:g}" for name, value in words.items()))
    rows = [describe(number, count, given) for number in documents for count in gpus]
    columns = list(rows[0])
    print()
    print(table([{name: row[name] for name in columns[:8]} for row in rows]))
    print()
    print(table([{name: row[name] for name in ["passages", "GPUs", *columns[8:]]} for row in rows]))


def _short(plan: IndexPlan) -> str:
    return f"{plan.factory}, {plan.placement}, {plan.train_size / 1e6:.1f} M training vectors"


if __name__ == "__main__":
    main()

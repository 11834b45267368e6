r"""What does a refresh take, part by part, and what is saved by making the index beside the ranker's phase?

Plays one iteration of AR2 on made-up passages, on two ranks of this machine, with a small encoder that is a real one:
once as in the paper, and once overlapped, from the same warm-ups (`branch`). Prints the seconds of each stage of the
iteration from the ledgers, and for the overlap the clock's seconds against the sum of both sides.

    nice python benchmarks/refresh.py OUT [--documents 20000] [--queries 2000] [--config FILE] [key=value ...]

OUT takes data and runs, and is gone on with where it is there. A million passages on two cores take an hour, with a
retriever of one layer and the paper's steps divided by 21, since its corpus has 21 million passages:

    python benchmarks/refresh.py OUT --documents 1000000 --queries 10000 retriever.layers=[0] retriever.max_length=24 \
        ranker.layers=[0,2,5] ranker.max_length=40 ranker.prior=0 ranker.bm25_prior=0 bm25.enabled=false \
        warmup_retriever.hard_negatives=0 ar2.mine=sampled ar2.num_negatives=15 data.documents_per_shard=10000 \
        ar2.retriever.steps=71 ar2.retriever.batch_size=64 ar2.retriever.micro_batch_size=16 ar2.ranker.steps=24 \
        ar2.ranker.batch_size=64 ar2.ranker.micro_batch_size=8 evaluation.max_dev_queries=500
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.results import STALENESS
from shards.made.generated import generate_dataset

ROOT = Path(__file__).parents[1]
WORDS = (
    *("ar2.iterations=1", "warmup_retriever.steps=2", "warmup_ranker.steps=2", "ar2.retriever.steps=10"),
    *("ar2.top_k=50", "ar2.mine=all", "index.factory=auto", "index.recall_floor=0.5"),
    *("evaluation.zero_shot=false", "evaluation.test_at_end=false", "evaluation.fuse=false", "run.stop_before=take"),
    "run.keep_checkpoints=100",  # the branch begins from early ones
)
PARTS = ("retriever/1", "encode/001", "index/001", "candidates/001", "ranker/1", "evaluate/1")


def main() -> int:
    """Parse the words, run both games, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="the recipe, of which models are taken")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the recipe, such as run.device=cuda")
    arguments = parser.parse_intermixed_args()
    data, plain, overlapped = (arguments.out / name for name in ("data", "plain", "overlapped"))
    if not data.exists():
        generate_dataset(data, num_documents=arguments.documents, num_queries=arguments.queries)
    words = [*WORDS, f"data.path={data}", *arguments.words]
    play(plain, arguments.config, words, arguments.ranks)
    if not overlapped.exists():
        branch = ["-m", "launcher", "branch", str(plain), str(overlapped), "--before", "retriever/1"]
        subprocess.run([sys.executable, *branch, "ar2.overlap=ranker"], cwd=ROOT, check=True)
    play(overlapped, arguments.config, [*words, "ar2.overlap=ranker"], arguments.ranks)
    tell(ledger_of(plain), ledger_of(overlapped))
    return 0


def play(folder: Path, config: str, words: list[str], num_ranks: int) -> None:
    """Run a recipe with other numbers; one that is finished is not begun again."""
    if (folder / "ledger.json").exists() and PARTS[-1] in ledger_of(folder):
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = ["--master_port", str(free.getsockname()[1])]
    start = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", "/nonexistent", *port]
    recipe = ["launcher/run.py", "--config", config, f"run.path={folder}", *words]
    subprocess.run([*start, "--num_accelerators", str(num_ranks), *recipe], cwd=ROOT, check=True)


def ledger_of(folder: Path) -> dict[str, Any]:
    """Return the finished stages of a run."""
    stages: dict[str, Any] = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["stages"]
    return stages


def tell(plain: dict[str, Any], overlapped: dict[str, Any]) -> None:
    """Print the seconds of both iterations."""
    whole = sum(plain[part]["seconds"] for part in PARTS)
    rows = [
        (part, plain[part]["seconds"], f"{plain[part]['seconds'] / whole:.0%}", overlapped[part]["seconds"])
        for part in PARTS
    ]
    took = overlapped["overlap/1"]["result"]
    saved = sum(overlapped[part]["seconds"] for part in PARTS) - both(took) + took["wall_seconds"]
    rows.append(("the iteration", round(whole, 3), "100%", round(saved, 3)))
    print(tabulate(rows, headers=("seconds of", "as in the paper", "share", "overlapped"), floatfmt=".1f"))
    refresh = sum(plain[part]["seconds"] for part in PARTS[1:4])
    after = 1 - plain[PARTS[1]]["seconds"] / refresh
    print(f"\nthe refresh is {refresh / whole:.0%} of the iteration, and {after:.0%} of it comes after the encoding")
    print(
        f"beside each other: ranker {took['training_seconds']:.1f} s, refresh {took['refresh_seconds']:.1f} s "
        f"(its process {took['companion_seconds']:.1f} s with its start), both {took['wall_seconds']:.1f} s, "
        f"which is {took['wall_seconds'] / both(took):.0%} of the sum"
    )
    stale = overlapped[f"{STALENESS}/1"]["result"]
    kept = "" if stale["kept"] is None else f" and had {stale['kept']:.0%} of the fresh ones"  # none were searched
    print(f"the ranker's candidates were {stale['lag_steps']} steps old{kept}")


def both(took: dict[str, float]) -> float:
    """Return the seconds of both sides one after the other."""
    return took["training_seconds"] + took["refresh_seconds"]


if __name__ == "__main__":
    sys.exit(main())

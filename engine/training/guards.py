"""Looks at every step before it changes the weights: what is not finite, or has collapsed, stops the run.

The ranks agree through one all-reduce of three flags a step, so all of them stop before the same step. What the step
was made of is left in RUN/postmortem/STAGE-STEP.json: the reason, each rank's loss, and the ids of its queries and
documents.

* A loss that is not finite on some rank stops every numeric type. A gradient that is not finite stops fp32 and bf16,
  where DeepSpeed alone would skip the step without a word. In fp16 its scaler skips the step and lowers the scale; this
  is counted and logged, and too many in a row stop the run.
* Collapse: for `run.collapse_steps` steps on end, all scores of every query were equal, or the retriever's distribution
  over the candidates had no entropy. Such a model gets no gradient any more, and the loss alone does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import TrainingError
from engine.log import get_logger
from engine.metrics import Metric
from engine.run import Stage
from engine.training.backend import StepReport
from shards.files import write_json

log = get_logger(__name__)
NamesOf = Callable[[int], Sequence[Any]]
"""From a step's number in the schedule to what it is made of, as dataclasses."""

COLLAPSED = 1e-6
"""What counts as no spread of a query's scores, and as no entropy (nats)."""
_SIGNS = {
    "score_spread": "all scores of each query were equal",
    "entropy": "the retriever's distribution over the candidates had no entropy",
}
"""Metric -> what it means where it stays at 0."""


class Guards:
    """The guards of one stage.

    Args:
        stage: Where this runs.
        names_of: Names what a step is made of; called only where one is stopped.
        first_step: Steps of the schedule that earlier stages took.
    """

    def __init__(self, stage: Stage, names_of: NamesOf, first_step: int) -> None:
        self._stage, self._names_of, self._first_step = stage, names_of, first_step
        self._settings = stage.run.config.run
        self._flat = dict.fromkeys(_SIGNS, 0)
        self._skipped_in_a_row = 0
        self.num_skipped = 0
        """Steps of this stage that fp16's loss scaling skipped."""

    def require_health(self, step: int, metrics: Mapping[str, Metric], device: torch.device) -> None:
        """Stop all ranks before a step whose loss is not finite, or where the model has collapsed. A collective.

        Args:
            step: Number of the step in the stage.
            metrics: What the objective measured: `loss`, and `score_spread` and `entropy` where it has them.
            device: Where the collective's backend works.

        Raises:
            TrainingError: The step must not be taken; see above.
        """
        finite, *alive = self._flags(metrics, device)
        if not finite:
            losses = self._save(step, f"the loss of {self._stage.name} is not finite at step {step}", metrics)
            bad = [f"rank {rank}: {loss}" for rank, loss in enumerate(losses) if loss in ("nan", "inf", "-inf")]
            raise TrainingError(
                f"the loss of {self._stage.name} is not finite at step {step} ({', '.join(bad)})",
                expected="a finite loss on all ranks; the weights are still those before this step",
                remedy=f"look at its batch in {self._path(step)}, lower the learning rate, or train in bf16 or fp32",
            )
        for sign, is_alive in zip(_SIGNS, alive, strict=True):
            self._flat[sign] = 0 if is_alive else self._flat[sign] + 1
            if 0 < self._settings.collapse_steps <= self._flat[sign]:
                reason = f"{_SIGNS[sign]} in the last {self._flat[sign]} steps of {self._stage.name}, up to step {step}"
                self._save(step, reason, metrics)
                raise TrainingError(
                    reason,
                    expected="scores that tell documents apart",
                    remedy="lower the learning rate, or look at the batch in "
                    f"{self._path(step)}; run.collapse_steps=0 switches this guard off",
                )

    @contextmanager
    def post_mortem(self, step: int, metrics: Mapping[str, Metric]) -> Iterator[None]:
        """Leave a record of a step that the body, which takes it, refuses."""
        try:
            yield
        except TrainingError as error:
            self._save(step, str(error), metrics)
            raise

    def count(self, step: int, report: StepReport, metrics: Mapping[str, Metric]) -> None:
        """Count steps that fp16's loss scaling skips.

        Raises:
            TrainingError: Too many in a row were.
        """
        if report.applied:
            self._skipped_in_a_row = 0
            return
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        name, limit = self._stage.name, self._settings.max_skipped_steps
        if self._stage.run.is_main:
            log.warning("%s: fp16's loss scaling skipped step %d (%d in a row)", name, step, self._skipped_in_a_row)
        if self._skipped_in_a_row >= limit:
            reason = f"fp16's loss scaling skipped {limit} steps of {name} in a row, up to step {step}"
            self._save(step, reason, metrics)
            raise TrainingError(
                reason,
                expected="gradients that are finite once the scale is low enough",
                remedy=f"train in bf16 or fp32, or look at the batch in {self._path(step)}",
            )

    def state(self) -> dict[str, Any]:
        """Return what has been counted, as JSON; the same on all ranks."""
        return {"flat": self._flat, "skipped_in_a_row": self._skipped_in_a_row, "num_skipped": self.num_skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state` was taken."""
        self._flat = dict(state["flat"])
        self._skipped_in_a_row, self.num_skipped = state["skipped_in_a_row"], state["num_skipped"]

    def _flags(self, metrics: Mapping[str, Metric], device: torch.device) -> list[bool]:
        """Return whether all losses are finite, and for each sign whether some rank shows life."""
        loss = torch.as_tensor(metrics["loss"].value, dtype=torch.float32, device=device).detach()
        flags = [torch.isfinite(loss).logical_not()]
        for sign in _SIGNS:
            value = metrics[sign].value if sign in metrics else 1.0
            flags.append(torch.as_tensor(value, dtype=torch.float32, device=device).detach() > COLLAPSED)
        together = torch.stack(flags).float()
        if dist.is_initialized():
            dist.all_reduce(together, op=dist.ReduceOp.MAX)
        broken, *alive = together.tolist()
        return [not broken, *(value > 0 for value in alive)]

    def _path(self, step: int) -> Path:
        folder = self._stage.run.folder.path / "postmortem"
        return folder / f"{self._stage.name.replace('/', '-')}-{step}.json"

    def _save(self, step: int, reason: str, metrics: Mapping[str, Metric]) -> list[str]:
        """Save what a step was made of; return each rank's loss. A collective."""
        coordinator, name = self._stage.run.coordinator, f"{self._stage.name}@{step}"
        own = {key: str(float(metric.value)) for key, metric in metrics.items()}
        of_ranks: list[dict[str, str]] = coordinator.gather(f"{name}: measurements", own)

        def write() -> None:
            batch = [asdict(one) for one in self._names_of(self._first_step + step)]
            ranks = [{"rank": rank, "metrics": found} for rank, found in enumerate(of_ranks)]
            found = {"stage": self._stage.name, "step": step, "reason": reason, "ranks": ranks, "batch": batch}
            write_json(self._path(step), found)

        coordinator.only_rank_zero(f"{name}: post-mortem", write)
        return [found["loss"] for found in of_ranks]

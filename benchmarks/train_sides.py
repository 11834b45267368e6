"""Who takes the steps in `benchmarks/train.py`: Sparring, the same as it was, a plain loop, sentence-transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol
from unittest.mock import patch

import torch

from benchmarks.train_peers import PeerRanker, PeerRetriever, Plain
from benchmarks.train_recipe import Recipe
from engine.config.timetable import Visit
from engine.data.batches import InputBuilder
from engine.data.prefetch import map_tensors, prefetched
from engine.models.kinds import load_untrained
from engine.models.weights import frozen_ranker
from engine.objectives.contrast import InBatchContrast
from engine.objectives.game import AdversarialGame
from engine.objectives.ranking import ListwiseRanking
from engine.training import loop
from engine.training.backend import TrainedModel
from engine.training.loop import Objective


class Side(Protocol):
    """One way to train."""

    name: str
    collating: float
    """Seconds that the last turn spent on making batches while nothing else went on."""

    def take(self, visit: Visit) -> None:
        """Take the steps of a turn."""
        ...

    def check(self, visit: Visit) -> tuple[float, float]:
        """Return loss and gradient norm of a turn's first step, without dropout and without changing a weight."""
        ...


class NoCheckpoints:
    """Stands for checkpoints that are never taken."""

    position = None

    def save(self, *words: Any) -> None:
        """Save nothing."""


class UnfusedAdamW(torch.optim.AdamW):
    """AdamW without its fused kernel, whatever is asked for."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **{**options, "fused": False})


class Sparring:
    """The project's own loop, objectives and engines: `engine.training.loop.train`, without checkpoints and logs.

    Args:
        recipe: What is trained on what.
        visit: Any turn of the phase.
        padded: Pad the inputs, make batches in the step, and leave AdamW unfused.
    """

    def __init__(self, recipe: Recipe, visit: Visit, *, padded: bool) -> None:
        self.name = "Sparring, padded, unfused, not ahead" if padded else "Sparring"
        self._recipe, self._padded = recipe, padded
        self.collating = 0.0
        phase, self.opponent = visit.phase, self._opponent(visit)
        module = load_untrained(recipe.section(phase.model), str(recipe.folders[phase.model]), seed=0)
        with patch.object(torch.optim, "AdamW", UnfusedAdamW) if padded else nullcontext():
            self.model: Any = TrainedModel(phase.model, module, recipe.section(phase.model), phase.optim)
        self.batches: Any = self._in_the_step if padded else prefetched

    def take(self, visit: Visit) -> None:
        """Take the steps of a turn in the loop."""
        self.collating = 0.0
        checkpoints: Any = NoCheckpoints()
        with patch.object(loop, "prefetched", self.batches):
            loop.train(self._recipe.stage(visit), visit, self.model, checkpoints, self.objective(visit))

    def check(self, visit: Visit) -> tuple[float, float]:
        """Compute a step by hand, at a learning rate of 0."""
        self.model.begin_stage(visit.phase.optim)
        self.model.module.eval()
        objective = self.objective(visit)
        metrics = objective.backward(self.model, self._moved(objective.prepare(visit.first_step)))
        return float(metrics["loss"].value), self.model.step(0.0).grad_norm or 0.0

    def objective(self, visit: Visit) -> Objective:
        """Return the objective that the recipe gives the phase."""
        samples, config = self._recipe.samples(visit), self._recipe.run.config
        retriever_scale, ranker_scale = config.retriever.score_scale, config.ranker.score_scale
        if visit.phase.pool != "none":
            return InBatchContrast(samples, self._builder(visit, "retriever"), score_scale=retriever_scale)
        if visit.phase.model == "ranker":
            return ListwiseRanking(samples, self._builder(visit, "ranker"), score_scale=ranker_scale)
        builders = self._builder(visit, "retriever"), self._builder(visit, "ranker")
        scales = retriever_scale, ranker_scale
        return AdversarialGame(samples, *builders, self._scorer(), config.ar2, score_scales=scales)

    def _scorer(self) -> Any:
        """Return what scores by the opponent: its fused layers, or the plain model as before."""
        return torch.no_grad()(self.opponent) if self._padded else self.opponent.scorer()

    def _builder(self, visit: Visit, model: str) -> Any:
        module = self.model.module if model == visit.phase.model else self.opponent
        data, config = self._recipe.data, self._recipe.run.config
        collate = module.collator(data.texts[model].template)
        return InputBuilder(
            data,
            model,
            replace(collate, packs=False) if self._padded else collate,
            max_length=config.models[model].max_length,
            query_max_length=config.query_max_length,
        )

    def _opponent(self, visit: Visit) -> Any:
        if visit.phase.opponent is None:
            return None
        return frozen_ranker(self._recipe.run.config.ranker, self._recipe.folders["ranker"], self._recipe.run.device)

    def _moved(self, batch: Any) -> Any:
        device = self._recipe.run.device
        return batch if device.type == "cpu" else map_tensors(batch, lambda tensor: tensor.to(device))

    @contextmanager
    def _in_the_step(
        self, prepare: Callable[[int], Any], steps: Sequence[int], _device: torch.device
    ) -> Iterator[Iterator[Any]]:
        """Take the place of `prefetched`: make a batch when its step begins."""

        def made() -> Iterator[Any]:
            for step in steps:
                start = time.perf_counter()
                batch = self._moved(prepare(step))
                self.collating += time.perf_counter() - start
                yield batch

        yield made()


def sides_of(recipe: Recipe, visit: Visit, *, alone: bool = False) -> list[Side]:
    """Return all sides that can take the steps of a phase, Sparring's first, or that one alone."""
    sides: list[Side] = [Sparring(recipe, visit, padded=False)]
    if alone:
        return sides
    sides.append(Sparring(recipe, visit, padded=True))
    sides.append(Plain(recipe, visit))
    if visit.phase.model == "ranker":
        sides.append(PeerRanker(recipe, visit))
    elif visit.phase.pool != "none":
        sides.append(PeerRetriever(recipe, visit))
    return sides

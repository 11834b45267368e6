"""Who takes the steps in `benchmarks/train.py`: Sparring, the same as it was, a plain loop, sentence-transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from unittest.mock import patch

import torch

from benchmarks.train_peers import PeerRanker, PeerRetriever, Plain
from benchmarks.train_recipe import Recipe
from engine import phases
from engine.data.batches import Group, TokenBatch
from engine.data.prefetch import map_tensors, prefetched
from engine.models.kinds import load_untrained
from engine.models.template import Input
from engine.models.weights import frozen_ranker
from engine.objectives import AdversarialGame, InBatchContrast, ListwiseRanking, Objective
from engine.timetable import Visit
from engine.training import loop
from engine.training.backend import TrainedModel


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


class Padded:
    """Makes padded inputs, as `InputBuilder` does where it packs none.

    Args:
        recipe: For tokens and lengths.
        model: Whose inputs.
    """

    def __init__(self, recipe: Recipe, model: str) -> None:
        data, config = recipe.data, recipe.run.config
        self._shards, self._text = data.shards, data.texts[model]
        self._max_length, self._query_max_length = config.models[model].max_length, config.query_max_length
        self._query_tokens = data.train.tokens[self._text.stream]

    def queries(self, groups: Sequence[Group]) -> TokenBatch:
        """Pad the queries of groups."""
        return self._text.template.pad(self.of_queries(groups))

    def documents(self, groups: Sequence[Group]) -> TokenBatch:
        """Pad the documents of groups."""
        return self._text.template.pad(self.of_documents(groups))

    def pairs(self, groups: Sequence[Group]) -> TokenBatch:
        """Pad the pairs of groups."""
        return self._text.template.pad(self.of_pairs(groups))

    def of_queries(self, groups: Sequence[Group]) -> list[Input]:
        """Return the queries before they are padded."""
        return [self._text.template.single(self._query_tokens[one.query], self._query_max_length) for one in groups]

    def of_documents(self, groups: Sequence[Group]) -> list[Input]:
        """Return the documents before they are padded."""
        return [
            self._text.template.single(self._tokens(document), self._max_length)
            for group in groups
            for document in group.documents.tolist()
        ]

    def of_pairs(self, groups: Sequence[Group]) -> list[Input]:
        """Return the pairs before they are padded."""
        return [
            self._text.template.pair(self._query_tokens[group.query], self._tokens(document), self._max_length)
            for group in groups
            for document in group.documents.tolist()
        ]

    def _tokens(self, document: int) -> list[int]:
        tokens: list[int] = self._shards.tokens(document, self._text.stream).tolist()
        return tokens


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
        return AdversarialGame(samples, *builders, self.opponent, config.ar2, score_scales=scales)

    def _builder(self, visit: Visit, model: str) -> Any:
        if self._padded:
            return Padded(self._recipe, model)
        # The phases' own, so that what is measured is what they prepare.
        return phases._builder(self._recipe.stage(visit), self._recipe.data, model)

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


def sides_of(recipe: Recipe, visit: Visit) -> list[Side]:
    """Return all sides that can take the steps of a phase, Sparring's first."""
    sides: list[Side] = [Sparring(recipe, visit, padded=False), Sparring(recipe, visit, padded=True)]
    sides.append(Plain(recipe, visit))
    if visit.phase.model == "ranker":
        sides.append(PeerRanker(recipe, visit))
    elif visit.phase.pool != "none":
        sides.append(PeerRetriever(recipe, visit))
    return sides

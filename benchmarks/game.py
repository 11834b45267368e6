"""How much should Eq. 9 weigh, and how much the ranker? A toy game with rankers that are weaker and stronger than G0.

The corpus is vectors, the retriever a matrix W with the score qWd, trained by the engine's own losses on the negatives
that it finds itself; the ranker is a fixed table of scores, true relevance with noise, so that its strength is chosen.
A near copy of each positive is relevant too, and unlabelled in training: what a good ranker knows and a label does not.
Means over seeds, of MRR@10 on dev queries whose relevant documents are all judged, after the last iteration.

    python benchmarks/game.py [--seeds 6]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.config.ar2 import Ar2Config
from engine.evaluation.chosen import trust_by
from engine.evaluation.significance import standard_error
from engine.losses import contrastive
from engine.objectives.game import retriever_loss

DOCUMENTS, TRAIN, DEV = 600, 400, 200
SIGNAL, NUISANCE = 16, 16
"""Dimensions that relevance depends on, and those that W must learn to leave out."""
TOP_K, NEGATIVES, BATCH = 20, 5, 32
WARM_UP_STEPS, ITERATIONS, STEPS = 60, 5, 60
LEARNING_RATE = 0.01
RANKERS = {"weak": 6.0, "level": 3.0, "strong": 1.0}
"""Deviation of the noise in a ranker's scores, by what it is called."""
SHARPNESS = 8.0
"""What true relevance, about a cosine, is multiplied by in a ranker's scores."""


@dataclass
class World:
    """Documents, queries with their positives, and true relevance; queries of train come first."""

    documents_ND: Tensor
    queries_QD: Tensor
    positives_Q: Tensor
    """The labelled one; the next document is its near copy."""
    relevance_QN: Tensor

    @classmethod
    def made(cls, seed: int) -> World:
        """Draw one."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        latent_ND = normal(DOCUMENTS // 2, SIGNAL)
        latent_ND = torch.stack([latent_ND, latent_ND + 0.4 * normal(DOCUMENTS // 2, SIGNAL)], 1).flatten(0, 1)
        positives_Q = 2 * torch.randint(0, DOCUMENTS // 2, (TRAIN + DEV,), generator=draw)
        wanted_QD = latent_ND[positives_Q] + 0.9 * normal(TRAIN + DEV, SIGNAL)
        relevance_QN = torch.nn.functional.normalize(wanted_QD) @ torch.nn.functional.normalize(latent_ND).T
        documents_ND = torch.cat([latent_ND, 1.2 * normal(DOCUMENTS, NUISANCE)], 1)
        queries_QD = torch.cat([wanted_QD, 1.2 * normal(TRAIN + DEV, NUISANCE)], 1)
        return cls(documents_ND / 4, queries_QD / 4, positives_Q, relevance_QN)

    def ranker(self, noise: float, seed: int) -> Tensor:
        """Return a ranker's scores of all pairs [Q, N]."""
        draw = torch.Generator().manual_seed(10_000 + seed)
        return SHARPNESS * self.relevance_QN + noise * torch.randn(
            self.relevance_QN.shape, generator=draw, dtype=torch.float64
        )

    def reciprocal_rank(self, scores_QN: Tensor, within_QN: Tensor | None = None) -> float:
        """Return MRR@10 of dev, of the order of scores, or of a ranker's order of what a retriever found."""
        if within_QN is not None:
            found_QK = within_QN.topk(TOP_K, 1).indices
            scores_QN = torch.full_like(scores_QN, -torch.inf).scatter(1, found_QK, scores_QN.gather(1, found_QK))
        top_QK = scores_QN[TRAIN:].topk(10, 1).indices
        hits_QK = (top_QK // 2) == (self.positives_Q[TRAIN:, None] // 2)
        first_Q = hits_QK.double().argmax(1)
        return float(torch.where(hits_QK.any(1), 1 / (first_Q + 1.0), 0.0).mean())


def warmed_up(world: World, seed: int) -> Tensor:
    """Return G0: W after a few steps of in-batch contrast (Eq. 2)."""
    draw = torch.Generator().manual_seed(20_000 + seed)
    weights_DD = torch.eye(SIGNAL + NUISANCE, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([weights_DD], lr=LEARNING_RATE)
    for _ in range(WARM_UP_STEPS):
        rows = torch.randperm(TRAIN, generator=draw)[:BATCH]
        documents = world.positives_Q[rows]
        scores_BN = world.queries_QD[rows] @ weights_DD @ world.documents_ND[documents].T
        same_BN = (documents[:, None] == documents) & ~torch.eye(BATCH, dtype=torch.bool)
        optimizer.zero_grad()
        contrastive(scores_BN, torch.arange(BATCH), excluded_BN=same_BN).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weights_DD.detach()


def played(
    world: World, start_DD: Tensor, ranker_QN: Tensor, game: Ar2Config, seed: int, trust: float | None = None
) -> list[float]:
    """Return dev's MRR@10 of the retriever after each iteration of a game with a fixed ranker.

    Args:
        world: Documents and queries.
        start_DD: G0.
        ranker_QN: The ranker's scores of all pairs.
        game: Forms and weights.
        seed: Of the batches.
        trust: What the ranker's word counts; None for what dev says, which only `teacher: dev` reads.
    """
    draw = torch.Generator().manual_seed(30_000 + seed)
    weights_DD = start_DD.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights_DD], lr=LEARNING_RATE)
    reached = []
    for _ in range(ITERATIONS):
        with torch.no_grad():
            scores_QN = world.queries_QD @ weights_DD @ world.documents_ND.T
            on_dev = world.reciprocal_rank(ranker_QN, scores_QN), world.reciprocal_rank(scores_QN)
            counts = (trust_by(*on_dev) if game.teacher == "dev" else 1.0) if trust is None else trust
            scores_QN = scores_QN[:TRAIN].scatter(1, world.positives_Q[:TRAIN, None], -torch.inf)
            candidates_QK = scores_QN.topk(TOP_K, 1).indices
        for _ in range(STEPS):
            rows = torch.randperm(TRAIN, generator=draw)[:BATCH]
            drawn_Bn = torch.stack([torch.randperm(TOP_K, generator=draw)[:NEGATIVES] for _ in rows])
            groups_BN = torch.cat([world.positives_Q[rows, None], candidates_QK[rows].gather(1, drawn_Bn)], 1)
            projected_BD = world.queries_QD[rows] @ weights_DD
            scores_BN = torch.einsum("bd,bnd->bn", projected_BD, world.documents_ND[groups_BN])
            loss, _ = retriever_loss(game, scores_BN, ranker_QN[rows].gather(1, groups_BN), trust=counts)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            reached.append(world.reciprocal_rank(world.queries_QD @ weights_DD @ world.documents_ND.T))
    return reached


GAMES: dict[str, dict[str, object]] = {
    f"`{teacher}`, {form} {weight:g}": {"adversarial": form, "adversarial_weight": weight, "teacher": teacher}
    for teacher in ("always", "lead", "dev")
    for form, weights in (("paper", (0.0, 0.3, 1.0, 3.0)), ("released", (0.3,)))
    for weight in weights
} | {
    f"`always`, {form} 1 without Eq. 12": {"adversarial": form, "distillation_weight": 0.0, "adversarial_weight": 1.0}
    | {"teacher": "always"}
    for form in ("paper", "released")
}
"""What the ranker's word counts, then the form and the weight of Eq. 9; the weight of Eq. 12 is 1."""
LABELS = "labels alone"
"""The game in which the ranker's word counts nothing: training on mined hard negatives."""


def main() -> None:
    """Play every game and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    worlds = [World.made(seed) for seed in seeds]
    starts = [warmed_up(world, seed) for world, seed in zip(worlds, seeds, strict=True)]
    found = [world.queries_QD @ start @ world.documents_ND.T for world, start in zip(worlds, starts, strict=True)]
    before = np.array([world.reciprocal_rank(scores) for world, scores in zip(worlds, found, strict=True)])
    rankers = {
        name: [world.ranker(noise, seed) for world, seed in zip(worlds, seeds, strict=True)]
        for name, noise in RANKERS.items()
    }
    strength = {
        name: np.mean([w.reciprocal_rank(r, f) for w, r, f in zip(worlds, own, found, strict=True)])
        for name, own in rankers.items()
    }
    headers = ["game", *(f"{name} ranker, {one:.3f}" for name, one in strength.items())]
    print(f"G0 {before.mean():.3f}; {len(seeds)} seeds\n")
    rows = []
    for label, words in ({LABELS: {"teacher": "dev"}} | GAMES).items():
        row, trust = [label], 0.0 if label == LABELS else None
        for own in rankers.values():
            cases = zip(worlds, starts, own, seeds, strict=True)
            gains = [
                played(world, start, ranker, Ar2Config(**words), seed, trust)[-1] - one  # type: ignore[arg-type]
                for (world, start, ranker, seed), one in zip(cases, before, strict=True)
            ]
            row.append(f"{before.mean() + np.mean(gains):.3f} ({np.mean(gains):+.3f} +- {standard_error(gains):.3f})")
        rows.append(row)
    print(tabulate(rows, headers=headers, tablefmt="pipe"))


if __name__ == "__main__":
    main()

"""AR2: the adversarial game between a retriever and a ranker; and what its paper compares it with.

Source: Zhang et al. 2022, "Adversarial Retriever-Ranker for Dense Text Retrieval", Algorithm 1 and Eq. 5; the numbers
at the right are the algorithm's lines. What they train, on what and for how long stands in the timetable
(`engine.config.ar2`); what they compute in `engine.phases` and `engine.refresh.refresh`. IRGAN is the same algorithm
with other objectives (`ar2.objective`), ANCE one without a ranker.
"""

from __future__ import annotations

from engine.config.ar2 import Ar2Config, Ar2Recipe
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource
from engine.evaluation.evaluate import evaluate_iteration
from engine.evaluation.systems import trained_systems
from engine.evaluation.yardsticks import evaluate_yardsticks, publish_starts
from engine.phases import train_by_contrast, train_ranker, train_retriever
from engine.refresh.beside import refreshed_beside
from engine.refresh.refresh import refresh_index, refresh_when_due, warmup_candidates
from engine.refresh.visits import visit
from engine.run import Run
from engine.training.models import Models


def train(models: Models, data: Data, run: Run) -> None:
    """Play the game in the order that the recipe asks for."""
    game = run.recipe(Ar2Recipe).ar2
    play = play_as_in_the_paper if game.order == "paper" else play_as_released
    if game.overlap != "none":
        play = play_overlapped
    if not game.has_ranker:
        play = play_alone
    play(models, data, game, run)


def play_as_in_the_paper(models: Models, data: Data, game: Ar2Config, run: Run) -> None:
    """Play the game in the order of the paper: retriever, refresh, ranker."""
    candidates = warm_up(models, data, game, run)  # 1-5
    for t in run.iterations():  # 6
        visit(run, f"retriever/{t}", train_retriever, models, data, candidates, game, opponent=t - 1)  # 7-10
        candidates = refresh_when_due(run, data, candidates, iteration=t)  # 11
        visit(run, f"ranker/{t}", train_ranker, models, data, candidates)  # 12-15
        measure_when_refreshed(run, data, t)


def play_overlapped(models: Models, data: Data, game: Ar2Config, run: Run) -> None:
    """Play in the paper's order, but for the ranker, which does not wait for the refresh: it draws as the retriever."""
    candidates = warm_up(models, data, game, run)
    for t in run.iterations():
        visit(run, f"retriever/{t}", train_retriever, models, data, candidates, game, opponent=t - 1)
        with refreshed_beside(run, data, candidates, iteration=t) as refreshed:
            visit(run, f"ranker/{t}", train_ranker, models, data, candidates)
        candidates = refreshed.candidates
        measure_when_refreshed(run, data, t)


def play_as_released(models: Models, data: Data, game: Ar2Config, run: Run) -> None:
    """Play in the order of the authors' released code: ranker and retriever on the same candidates, then refresh."""
    candidates = warm_up(models, data, game, run)
    for t in run.iterations():
        visit(run, f"ranker/{t}", train_ranker, models, data, candidates)
        visit(run, f"retriever/{t}", train_retriever, models, data, candidates, game, opponent=t)
        candidates = refresh_when_due(run, data, candidates, iteration=t)
        measure_when_refreshed(run, data, t)


def play_alone(models: Models, data: Data, game: Ar2Config, run: Run) -> None:
    """Train the retriever without a ranker, on what it found itself at the last refresh (ANCE, Figure 4)."""
    candidates = warm_up(models, data, game, run)
    for t in run.iterations():
        visit(run, f"retriever/{t}", train_by_contrast, models, data, candidates)
        candidates = refresh_when_due(run, data, candidates, iteration=t)
        measure_when_refreshed(run, data, t)


def warm_up(models: Models, data: Data, game: Ar2Config, run: Run) -> NegativeSource:
    """Make the players' starting states, G0 and D0, and measure them; return what G0 retrieves."""
    if run.timetable.starts:
        run.once("starts", publish_starts, models, data)
    run.once("evaluate/yardsticks", evaluate_yardsticks, models, data)
    hard = warmup_candidates(run, data)
    run.once("warmup_retriever", train_by_contrast, models, data, hard)  # 2: Eq. 2
    candidates = refresh_index(run, data, iteration=0)  # 3-4
    if game.has_ranker:
        run.once("warmup_ranker", train_ranker, models, data, candidates)  # 5: Eq. 7
    run.once("evaluate/0", evaluate_iteration, data, trained_systems(run.config, [0]))
    return candidates


def measure_when_refreshed(run: Run, data: Data, t: int) -> None:
    """Measure an iteration's models on dev, if it has an index to search with."""
    if run.timetable.is_refreshed(t):
        run.once(f"evaluate/{t}", evaluate_iteration, data, trained_systems(run.config, [t]))

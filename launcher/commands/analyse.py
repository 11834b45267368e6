"""`python -m launcher analyse NAME RUN...`: rankers compared by the negatives that they were trained on.

    divergence   KL of a ranker's negatives to BM25's candidates, against its metric (R2ANKER Figure 2)
    shift        that KL less the one of the ranker's own scores, against its metric (Figure 3)
    negatives    training and dev queries, each run a set of negatives (Tables 5 to 7)
    progress     training and dev queries over the iterations of one run

    python -m launcher analyse divergence bm25=runs/a joint=runs/b --top 200 --epsilon 0.01
    python -m launcher analyse negatives bm25=runs/a joint=runs/b --train-queries 5000 --against bm25

All re-rank what BM25 finds, by the first run that has it. What was measured before is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.data.trec import read_trec
from engine.errors import ConfigError
from engine.evaluation import analyses
from engine.evaluation.analyses import Judged
from engine.evaluation.contestants import Contestant, Negatives, require_labels
from engine.evaluation.distributions import Divergences, Form, divergences
from launcher.commands.comparison import Comparison, open_comparison
from launcher.commands.iterations import states_in

TRAIN = "train"


def run_command(arguments: argparse.Namespace) -> None:
    """Measure what has not been, and print, write and draw the analysis."""
    if not arguments.epsilon < 1:
        raise ConfigError(
            f"--epsilon is {arguments.epsilon:g}, the share of the uniform distribution", expected="a share below 1"
        )
    splits, analyse = _ANALYSES[arguments.name]
    if TRAIN in splits and arguments.split == TRAIN:
        raise ConfigError(f"{arguments.name} compares training queries with others", expected="--split dev, or test")
    with open_comparison(arguments, {split: arguments.train_queries for split in splits}) as comparison:
        analyse(comparison, arguments)


def _divergence(comparison: Comparison, arguments: argparse.Namespace) -> None:
    rankers, form = _judged(comparison, arguments, own=False), _form(arguments)
    title = f"Divergence of negatives from BM25: {_terms(comparison, arguments)}"
    table = analyses.divergence_table(
        title, rankers, comparison.metric, form, compared=arguments.against, seed=comparison.seed
    )
    draw = partial(analyses.shown_by, table, "KL", comparison.metric, "KL of the negatives to BM25 (nats)")
    comparison.publish(_file_name(comparison, arguments), [table], table, draw)


def _shift(comparison: Comparison, arguments: argparse.Namespace) -> None:
    rankers, form = _judged(comparison, arguments, own=True), _form(arguments)
    title = f"Divergence of negatives less that of the ranker: {_terms(comparison, arguments)}"
    table = analyses.shift_table(
        title, rankers, comparison.metric, form, compared=arguments.against, seed=comparison.seed
    )
    draw = partial(analyses.shown_by, table, "Delta", comparison.metric, "Delta of the KL to BM25 (nats)")
    comparison.publish(_file_name(comparison, arguments), [table], table, draw)


def _negatives(comparison: Comparison, arguments: argparse.Namespace) -> None:
    rankers = _rankers(comparison, arguments)
    train, dev = (
        {one.ranker.label: _values(comparison, split, one.ranker) for one in rankers}
        for split in (TRAIN, arguments.split)
    )
    found_by = {one.ranker.label: one.told for one in rankers}
    title = f"Rankers by their negatives: {_terms(comparison, arguments)}, and {_train_queries(comparison)}"
    table = analyses.negatives_table(
        title, train, dev, found_by, comparison.metric, arguments.against, seed=comparison.seed
    )
    draw = partial(analyses.negatives_figure, table, comparison.metric)
    comparison.publish(_file_name(comparison, arguments), [table], table, draw)


def _progress(comparison: Comparison, arguments: argparse.Namespace) -> None:
    entrant, words = comparison.entrants[0], arguments.ranker or "all"
    if len(comparison.entrants) > 1:
        raise ConfigError(f"progress is of one run, not of {len(comparison.entrants)}", expected="one RUN")
    states = states_in(entrant.run, words, rankers=True, option="--ranker")
    if arguments.against is not None:
        raise ConfigError("progress tests all iterations against the last", expected="no --against")
    if len(models := sorted({one.model for one in states})) > 1:
        raise ConfigError(f"progress is of one ranker, and the run has {', '.join(models)}", expected="one ranker")
    train, dev = (
        {one.iteration or 0: _values(comparison, split, entrant.state(one)) for one in states}
        for split in (TRAIN, arguments.split)
    )
    title = f"Rankers by iteration: {_terms(comparison, arguments)}, and {_train_queries(comparison)}"
    table = analyses.progress_table(title, train, dev, comparison.metric, seed=comparison.seed)
    draw = partial(analyses.progress_figure, table, comparison.metric)
    comparison.publish(_file_name(comparison, arguments), [table], table, draw)


@dataclass(frozen=True)
class _Trained:
    """A ranker, and where its negatives came from."""

    ranker: Contestant
    negatives: Negatives
    told: str


def _rankers(comparison: Comparison, arguments: argparse.Namespace) -> list[_Trained]:
    """Return the rankers that were asked for, and refuse an `--against` that is none of them."""
    found = []
    for entrant in comparison.entrants:
        for ranker in comparison.rankers_of(entrant):
            if ranker.weights is not None:
                negatives = entrant.negatives_of(ranker.weights)
                found.append(_Trained(ranker, negatives, negatives.told(entrant)))
    if not found:
        raise ConfigError(
            f"no ranker of {', '.join(str(one.run.folder.path) for one in comparison.entrants)} is compared",
            expected="runs with trained rankers, and --ranker without the word none",
            remedy="name other runs; retrievers are compared by the commands compare and matrix",
        )
    require_labels([one.ranker for one in found])
    labels = [one.ranker.label for one in found]
    if arguments.against is not None and arguments.against not in labels:
        raise ConfigError(f"--against {arguments.against} is no ranker", expected=f"one of {', '.join(labels)}")
    return found


def _values(comparison: Comparison, split: str, ranker: Contestant) -> dict[str, float]:
    """Measure a ranker over the list of the first run's BM25."""
    contest = comparison.contests[split]
    return contest.values(ranker, contest.reordered(ranker, comparison.reference()))


def _judged(comparison: Comparison, arguments: argparse.Namespace, *, own: bool) -> list[Judged]:
    """Measure rankers and the divergences of their negatives, and with `own` those of their own scores."""
    contest, bm25 = comparison.contests[arguments.split], comparison.reference()
    positives, form = contest.terms.positives(), _form(arguments)
    top = form.top + max(map(len, positives.values()))  # positives are taken out of it

    def compared(name: str, paths: Sequence[Path], kept_to: Sequence[tuple[Path, int]] = ()) -> Divergences:
        def compare() -> dict[str, float]:
            # Of lists that are kept to others, the best N come from anywhere.
            members = [read_trec(path, top=None if kept_to else top) for path in paths]
            within = [read_trec(path, top=depth) for path, depth in kept_to]
            return divergences(members, read_trec(reference, top=top), positives, form, within=within).values

        found: dict[str, float] = comparison.coordinator.only_rank_zero(f"divergence of {name}", compare)
        return Divergences(found, len(positives) - len(found))

    reference, judged = contest.list_of(bm25), []
    for one in _rankers(comparison, arguments):
        label = one.ranker.label
        lists = [contest.list_of(miner) for miner in one.negatives.found_by]
        kept_to = [(contest.list_of(miner), depth) for miner, depth in one.negatives.within]
        of_negatives = compared(f"the negatives of {label}", lists, kept_to)
        values = _values(comparison, arguments.split, one.ranker)
        of_ranker = compared(label, [contest.reordered(one.ranker, bm25)]) if own else None
        judged.append(Judged(label, one.told, values, of_negatives, of_ranker))
    return judged


def _form(arguments: argparse.Namespace) -> Form:
    return Form(arguments.top, arguments.weights, arguments.normalisation, arguments.temperature, arguments.epsilon)


def _terms(comparison: Comparison, arguments: argparse.Namespace) -> str:
    return comparison.contests[arguments.split].terms.told.replace("of each retriever", "of BM25")


def _train_queries(comparison: Comparison) -> str:
    terms = comparison.contests[TRAIN].terms
    return f"{len(terms.queries)} of {terms.split_queries} training queries"


def _file_name(comparison: Comparison, arguments: argparse.Namespace) -> str:
    return f"{arguments.name}-{comparison.contests[arguments.split].terms.file_name}"


_ANALYSES: dict[str, tuple[tuple[str, ...], Callable[[Comparison, argparse.Namespace], None]]] = {
    "divergence": ((), _divergence),
    "shift": ((), _shift),
    "negatives": ((TRAIN,), _negatives),
    "progress": ((TRAIN,), _progress),
}
"""Name -> (splits that it needs beside `--split`, what does it)."""

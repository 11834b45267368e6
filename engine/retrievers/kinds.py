"""The kinds of retrievers: how each is built, opened and stamped.

Whoever needs a retriever (a refresh, mining, evaluation, the search command) names one by a `Choice`, and gets a
`Searcher` and a `Stamp`. A new kind is a module with these functions and an entry in `KINDS`.

    first = dense(WeightsOf("retriever", 1))
    build(run, data, run.folder, first)
    hits = open_searcher(run, data, run.folder, first).search(queries, top_k=100)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config.timetable import Mining, WeightsOf
from engine.data.corpus import Data
from engine.errors import ConfigError
from engine.retrievers.bm25_index import bm25_stamp, build_bm25_index, open_bm25
from engine.retrievers.choice import Choice
from engine.retrievers.dense import build_dense, dense_is_built, open_dense
from engine.retrievers.encoding import stamp_of_weights
from engine.retrievers.given import build_given, given_stamp, open_given
from engine.retrievers.lexical import build_lexical, lexical_is_built, open_lexical
from engine.retrievers.run_file import build_run_file, open_run_file, run_file_stamp
from engine.run import Run, RunFolder
from engine.search import Searcher
from shards.embeddings import Stamp


@dataclass(frozen=True, slots=True)
class RetrieverKind:
    """What a kind of retriever can do; all ranks call each function alike."""

    name: str
    build: Callable[[Run, Data, RunFolder, Choice, str], None]
    """(run, data, folder, choice, prefix): make what a search needs as stages of the run, unless it is there.
    `prefix` goes before their names, which are unique in a ledger."""
    open: Callable[[Run, Data, RunFolder, Choice], Searcher]
    """(run, data, folder, choice): open what was built; an ArtifactError if it is missing, damaged, or made of
    something else."""
    stamp: Callable[[Run, Data, Choice], Stamp]
    """(run, data, choice): what its index and its candidates must carry."""
    is_built: Callable[[Run, RunFolder, Choice], bool] = lambda _run, _folder, _choice: True
    """(run, folder, choice): whether what a finished `build` made is still there, as the settings have it now; kinds
    whose `build` looks itself say so."""


KINDS = {
    kind.name: kind
    for kind in (
        RetrieverKind("bm25", build_bm25_index, open_bm25, bm25_stamp),
        RetrieverKind("dense", build_dense, open_dense, stamp_of_weights, dense_is_built),
        RetrieverKind("lexical", build_lexical, open_lexical, stamp_of_weights, lexical_is_built),
        RetrieverKind("run_file", build_run_file, open_run_file, run_file_stamp),
        RetrieverKind("given", build_given, open_given, given_stamp),
    )
}
BM25 = Choice("bm25")


def dense(weights: WeightsOf) -> Choice:
    """Name the dense retriever with a model's weights of an iteration."""
    return Choice("dense", weights)


def choice_of(mining: Mining) -> Choice:
    """Name the retriever that finds some candidates."""
    return Choice(mining.retriever, mining.weights, mining.path, mining.proposed_by)


def build(run: Run, data: Data, folder: RunFolder, choice: Choice) -> None:
    """Make what a retriever searches with, as stages of the run, unless it is there.

    Args:
        run: Whose weights are used, and whose ledger records the stages.
        data: The corpus.
        folder: Takes the index: the run's own folder, or one below it for another corpus.
        choice: Which retriever.

    Raises:
        ConfigError: There is no such kind.
        IndexQualityError: An index finds too little of what exact search finds.
    """
    prefix = "" if folder == run.folder else f"{folder.path.name}/"
    _kind(choice).build(run, data, folder, choice, prefix)


def forget_what_is_lost(run: Run, folder: RunFolder, choices: Sequence[Choice]) -> list[Choice]:
    """Let indexes be built again that are older than those kept, or of other settings than now.

    Args:
        run: Whose ledger has them as built.
        folder: As for `build`.
        choices: Retrievers that are about to be built; those without weights look for themselves.

    Returns:
        Those that were built, and are to be built again.
    """
    prefix = "" if folder == run.folder else f"{folder.path.name}/"
    trained = [choice for choice in choices if choice.weights is not None]

    def lost() -> list[int]:
        return [place for place, one in enumerate(trained) if not is_built(run, folder, one)]

    gone = [trained[place] for place in run.coordinator.only_rank_zero("look for indexes", lost)]
    forgotten = []
    for choice in gone:
        names = [f"{prefix}{stage}/{run.timetable.artifact(choice.trained)}" for stage in ("encode", "index")]
        if finished := [name for name in names if run.is_finished(name)]:
            run.forget(finished)
            forgotten.append(choice)
    return forgotten


def build_lost(run: Run, data: Data, folder: RunFolder, choices: Sequence[Choice]) -> None:
    """Build again what was built and is not there any more.

    A branch wants older indexes than its source has kept (`run.keep_indexes`): what its settings reach is measured
    again, and of fewer iterations another one may be the best.

    Args:
        run: As of `build`.
        data: As of `build`.
        folder: As of `build`.
        choices: Retrievers that are about to search.
    """
    for choice in forget_what_is_lost(run, folder, choices):
        build(run, data, folder, choice)


def open_searcher(run: Run, data: Data, folder: RunFolder, choice: Choice) -> Searcher:
    """Open a retriever that `build` has made.

    Args:
        run: Whose weights are used.
        data: The corpus.
        folder: As for `build`.
        choice: Which retriever.

    Raises:
        ConfigError: There is no such kind.
        ArtifactError: What it searches with is missing, damaged, or of other weights or another corpus.
        DataError: A run file is no ranking of this corpus.
    """
    return _kind(choice).open(run, data, folder, choice)


def stamp_of(run: Run, data: Data, choice: Choice) -> Stamp:
    """Return what a retriever's index and candidates must carry: what it is, and the hash of what made it.

    Args:
        run: Whose weights are used.
        data: The corpus.
        choice: Which retriever.

    Raises:
        ConfigError: There is no such kind.
        ArtifactError: There are no such weights.
        DataError: There is no such run file.
    """
    return _kind(choice).stamp(run, data, choice)


def is_built(run: Run, folder: RunFolder, choice: Choice) -> bool:
    """Tell whether what a finished `build` made is still there, by the settings as they are now.

    Args:
        run: For the settings.
        folder: As for `build`.
        choice: Which retriever.

    Raises:
        ConfigError: There is no such kind.
    """
    return _kind(choice).is_built(run, folder, choice)


def _kind(choice: Choice) -> RetrieverKind:
    if choice.kind not in KINDS:
        raise ConfigError(f"there is no retriever {choice.kind!r}", expected=f"one of {', '.join(KINDS)}")
    return KINDS[choice.kind]

"""`python -m launcher search RUN ["question"]`: retrieve, re-rank, print.

What a run leaves behind is a two-stage search engine over its corpus: the retriever of the iteration that is taken (the
best on dev, unless the recipe says the last), with its index, and the ranker of that iteration over what the retriever
finds, where the recipe has one; where weights of a mixture were fitted, their scores and BM25's are mixed. Titles and
texts come from the shards, so the data folder is not needed.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from engine.config.models import RankerConfig
from engine.config.text import as_typed, is_whole
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.fuse import mix
from engine.evaluation.fusion import read_fusion
from engine.evaluation.pairs import PairScorer
from engine.evaluation.part_scores import further_scorers
from engine.evaluation.systems import fused_system, system_of
from engine.log import get_logger
from engine.retrievers.kinds import open_searcher
from launcher.commands.finished import corpus_of, open_run, require_search, states_of, taken_of
from launcher.terminal.arguments import positive_whole_number, typed_path
from shards.records import Query

log = get_logger(__name__)

_SNIPPET_CHARACTERS = 220


@dataclass(frozen=True, slots=True)
class Found:
    """One document of an answer."""

    by_ranker: float | None
    """The ranker's score; None where there is no ranker."""
    by_retriever: float
    """The retriever's score."""
    docid: str
    """Its id."""
    title: str
    """Its title; may be empty."""
    text: str
    """Its text."""
    mixed: float | None = None
    """The mixture of the scores; None where documents are in the order of one model."""


class SearchEngine:
    """The models, index and corpus of a run, loaded once.

    Args:
        path: The run folder.
        shards: Where shards that were prepared beside the data lie now; None for where the run read them.
        fused: Whether the order is that of the mixture, where the run has fitted one; otherwise it is the ranker's.

    Raises:
        ConfigError: The folder holds no run, or one that has not finished its warm-ups, or the mixture was fitted for
            other models.
        ArtifactError: Shards, index or weights are missing or damaged.
    """

    def __init__(self, path: Path, shards: Path | None = None, *, fused: bool = True) -> None:
        self._run = open_run(path)
        require_search(self._run)
        self.iteration = taken_of(self._run)
        mixture = fused_system(self._run.config, taken=self.iteration)
        self._first = mixture.parts[0].name
        self.weights = read_fusion(self._run, mixture).weights if fused and self._run.folder.fusion.exists() else {}
        states = states_of(self._run, self.iteration)
        self._data = corpus_of(self._run, self.iteration, shards)
        table, config = self._run.timetable, self._run.config
        found_by = system_of(config, states[table.encoder])
        self._searcher = open_searcher(self._run, self._data, self._run.folder, retriever_of(found_by))
        ranker = next((model for model, one in config.models.items() if isinstance(one, RankerConfig)), None)
        self.ranker = None if ranker is None else table.name_of(states[ranker])
        """What the ranker is called; None where there is none."""
        self._scorer = None if ranker is None else PairScorer.open(self._run, self._data, ranker, states[ranker].state)
        names = " and ".join(name for name in (found_by.name, self.ranker) if name is not None)
        self.stage = f"iteration {self.iteration}" if table.ends is None else names
        """What answers, for whoever asks."""
        self._further = further_scorers(self._run, self._data, self._run.folder, mixture) if self.weights else {}

    def search(self, question: str, top_k: int) -> list[Found]:
        """Answer a question.

        Args:
            question: Any text.
            top_k: Number of documents.

        Returns:
            The best documents, best first: by the mixture where there is one, else by the ranker, or the retriever.
        """
        query = Query("", question)  # no document has the empty id
        settings = self._run.config.evaluation
        # As deep as an evaluation searches, so that what was measured is what is served: an index that is asked for
        # less re-scores fewer documents.
        depth = min(max(top_k, settings.search_depth), self._data.shards.num_documents)
        hits = self._searcher.search([query], depth)
        reranked = hits.documents_QK[0, : max(top_k, settings.rerank_depth)]
        documents = [int(document) for document in reranked if document >= 0]
        by_retriever = [float(score) for score in hits.scores_QK[0, : len(documents)]]
        by_ranker = None if self._scorer is None else self._scorer.score([query], [documents])[0]
        mixed = self._mixed(query, documents, by_retriever, by_ranker)
        ordered_by = next(scores for scores in (mixed, by_ranker, by_retriever) if scores is not None)
        found = []
        for place in sorted(range(len(documents)), key=lambda place: -ordered_by[place])[:top_k]:
            one = self._data.shards.document(documents[place])
            own = None if mixed is None else mixed[place]
            judged = None if by_ranker is None else by_ranker[place]
            found.append(Found(judged, by_retriever[place], one.id, one.title, one.text, own))
        return found

    def _mixed(
        self, query: Query, documents: list[int], by_retriever: list[float], by_ranker: list[float] | None
    ) -> list[float] | None:
        """Return the mixture of all scores of some documents; None where none is asked for."""
        if not self.weights:
            return None
        scores = {name: scorer.score([query], [documents])[0] for name, scorer in self._further.items()}
        own = {} if self.ranker is None or by_ranker is None else {self.ranker: by_ranker}
        return mix(scores | {self._first: by_retriever} | own, self.weights)


EXAMPLES = (
    'runs/nq "who wrote the origin of species" --top-k 5',
    "runs/nq --no-fusion < questions.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument("question", nargs="?", help="left out, questions are read from the terminal")
    parser.add_argument(
        "--top-k", type=positive_whole_number, metavar="K", default=10, help="documents to print for a question (10)"
    )
    parser.add_argument(
        "--shards", type=typed_path, metavar="DIR", help="shards prepared beside the data, where they were moved since"
    )
    parser.add_argument(
        "--no-fusion", action="store_true", help="the ranker's order, although weights of a mixture were fitted"
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Answer the question, or those typed at the terminal."""
    answer_questions(
        arguments.run,
        arguments.question,
        top_k=arguments.top_k,
        shards=arguments.shards,
        fused=not arguments.no_fusion,
    )


def answer_questions(
    path: Path, question: str | None, *, top_k: int, shards: Path | None = None, fused: bool = True
) -> None:
    """Print the best documents for a question, or for each line read from the terminal.

    Args:
        path: The run folder.
        question: None reads questions until an empty line or the end of the input.
        top_k: Documents to print for each.
        shards: As of `SearchEngine`.
        fused: As of `SearchEngine`.
    """
    engine = SearchEngine(path, shards, fused=fused)
    if question is not None:
        _print_results(engine, _whole(question), top_k)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Searching with {engine.stage} of {path}. An empty line ends.")
    while True:
        if interactive:
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        _print_results(engine, _whole(line.strip()), top_k)


def _whole(question: str) -> str:
    """Return a question as Unicode; what is no UTF-8 in it is said, and searched as unknown characters."""
    text = as_typed(question)
    if is_whole(text):
        return text
    log.warning("the question is no UTF-8: what cannot be read in it is taken as unknown characters")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _print_results(engine: SearchEngine, question: str, top_k: int) -> None:
    names = [*(["fused"] if engine.weights else []), *(["ranker"] if engine.ranker is not None else [])]
    print(f"\n{question}\n{''.join(f'{name:>8}' for name in names)}  retriever")
    for found in engine.search(question, top_k):
        scores = "".join(f"{score:8.3f}" for score in (found.mixed, found.by_ranker) if score is not None)
        print(f"{scores}  {found.by_retriever:9.3f}  {found.title or found.docid}")
        snippet = textwrap.shorten(" ".join(found.text.split()), _SNIPPET_CHARACTERS, placeholder=" ...")
        for line in textwrap.wrap(snippet, 96):
            print(f"{'':{13 + len(scores)}}{line}")

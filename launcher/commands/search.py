"""`python -m launcher search RUN ["question"]`: retrieve, re-rank, print.

What a run leaves behind is a two-stage search engine over its corpus: the last retriever with its index, and the last
ranker over what the retriever finds. Titles and texts come from the shards, so the data folder is not needed.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from engine.config.models import RankerConfig
from engine.config.text import as_typed, is_whole
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.pairs import PairScorer
from engine.evaluation.systems import system_of
from engine.log import get_logger
from engine.retrievers.kinds import open_searcher
from launcher.commands.finished import corpus_of, last_iteration, open_run, require_search, states_of
from launcher.terminal.arguments import positive_whole_number, typed_path
from shards.records import Query

log = get_logger(__name__)

_SNIPPET_CHARACTERS = 220


class SearchEngine:
    """The models, index and corpus of a run, loaded once.

    Args:
        path: The run folder.
        shards: Where shards that were prepared beside the data lie now; None for where the run read them.

    Raises:
        ConfigError: The folder holds no run, or one that has not finished its warm-ups.
        ArtifactError: Shards, index or weights are missing or damaged.
    """

    def __init__(self, path: Path, shards: Path | None = None) -> None:
        self._run = open_run(path)
        require_search(self._run)
        self.iteration = last_iteration(self._run)
        states = states_of(self._run, self.iteration)
        self._data = corpus_of(self._run, self.iteration, shards)
        table, config = self._run.timetable, self._run.config
        found_by = system_of(config, states[table.encoder])
        self._searcher = open_searcher(self._run, self._data, self._run.folder, retriever_of(found_by))
        ranker = next(model for model, one in config.models.items() if isinstance(one, RankerConfig))
        self._scorer = PairScorer.open(self._run, self._data, ranker, states[ranker].state)
        names = f"{found_by.name} and {table.name_of(states[ranker])}"
        self.stage = f"iteration {self.iteration}" if table.ends is None else names
        """What answers, for whoever asks."""

    def search(self, question: str, top_k: int) -> list[tuple[float, float, str, str, str]]:
        """Answer a question.

        Args:
            question: Any text.
            top_k: Number of documents.

        Returns:
            (ranker score, retriever score, docid, title, text) of the best documents, best first.
        """
        query = Query("", question)  # no document has the empty id
        settings = self._run.config.evaluation
        # As deep as an evaluation searches, so that what was measured is what is served: an index that is asked for
        # less re-scores fewer documents.
        depth = min(max(top_k, settings.search_depth), self._data.shards.num_documents)
        hits = self._searcher.search([query], depth)
        reranked = hits.documents_QK[0, : max(top_k, settings.rerank_depth)]
        documents = [int(document) for document in reranked if document >= 0]
        scores = self._scorer.score([query], [documents])[0]
        order = sorted(range(len(documents)), key=lambda place: -scores[place])[:top_k]
        found = []
        for place in order:
            document = self._data.shards.document(documents[place])
            retriever_score = float(hits.scores_QK[0, place])
            found.append((scores[place], retriever_score, document.id, document.title, document.text))
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument("question", nargs="?", help="left out, questions are read from the terminal")
    parser.add_argument("--top-k", type=positive_whole_number, metavar="K", default=10, help="documents to print (10)")
    parser.add_argument(
        "--shards", type=typed_path, metavar="DIR", help="shards prepared beside the data, where they were moved since"
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Answer the question, or those typed at the terminal."""
    answer_questions(arguments.run, arguments.question, top_k=arguments.top_k, shards=arguments.shards)


def answer_questions(path: Path, question: str | None, *, top_k: int, shards: Path | None = None) -> None:
    """Print the best documents for a question, or for each line read from the terminal.

    Args:
        path: The run folder.
        question: None reads questions until an empty line or the end of the input.
        top_k: Documents to print for each.
        shards: As of `SearchEngine`.
    """
    engine = SearchEngine(path, shards)
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
    print(f"\n{question}\n  ranker  retriever")
    for ranker_score, retriever_score, docid, title, text in engine.search(question, top_k):
        print(f"{ranker_score:8.3f}  {retriever_score:9.3f}  {title or docid}")
        snippet = textwrap.shorten(" ".join(text.split()), _SNIPPET_CHARACTERS, placeholder=" ...")
        for line in textwrap.wrap(snippet, 96):
            print(f"{'':21}{line}")

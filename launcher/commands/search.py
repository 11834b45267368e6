"""`python -m launcher search RUN ["question"]`: retrieve, re-rank, print.

What a run leaves behind is a two-stage search engine over its corpus (`launcher.commands.search_engine`), of the
iteration that is the best on dev, unless the recipe says the last.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from engine.config.text import as_typed, is_whole
from engine.errors import ConfigError
from engine.log import get_logger
from launcher.commands.search_engine import SearchEngine

log = get_logger(__name__)

_SNIPPET_CHARACTERS = 220


def run_command(arguments: argparse.Namespace) -> None:
    """Answer the question, or those typed at the terminal.

    Raises:
        ConfigError: The question is empty.
    """
    if arguments.question is not None and not arguments.question.strip():
        raise ConfigError(
            "the question is empty", expected="a text, or none at all: questions are then read one by one"
        )
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
        name = f"{found.title}  [{found.docid}]" if found.title else found.docid
        print(f"{scores}  {found.by_retriever:9.3f}  {name}")
        snippet = textwrap.shorten(" ".join(found.text.split()), _SNIPPET_CHARACTERS, placeholder=" ...")
        for line in textwrap.wrap(snippet, 96):
            print(f"{'':{13 + len(scores)}}{line}")

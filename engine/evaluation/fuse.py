"""The order of a mixture: scores of several systems in, one order out. Plain Python, to be copied where it is needed.

A retriever, a ranker and BM25 score the same documents of one query. Each system's scores are brought to mean 0 and
deviation 1 over these documents, and mixed with weights that sum to 1. The weights lie beside this file, in the form
that a run writes (`fusion.json`):

    weights = read_weights("fusion.json")            # {"G": 0.5, "D": 0.3, "BM25": 0.2}
    order = fuse({"G": [71.2, 70.8], "D": [-0.3, 2.1], "BM25": [0.0, 9.4]}, weights)
    best = documents[order[0]]

What the scores are: of a retriever the inner product, of a ranker the logit, of BM25 its score, which is 0 for a
document that shares no word with the query. All are for the same documents, as many as were fused when the weights were
fitted (`rerank_depth`); what lies deeper stays below in the order that it had. Which documents these are, the record
says by `candidates`: `retriever`, those that the retriever found, in its order, or `hybrid`, those of all that search:

    documents = interleave([found_by_retriever, found_by_bm25])[:rerank_depth]
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from typing import TypeVar

Document = TypeVar("Document", bound=Hashable)


def fuse(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[int]:
    """Return the places of the documents in the order of the mixture, best first.

    Args:
        scores: System -> its scores, one a document; higher is better. Systems of weight 0 may be left out.
        weights: System -> its weight; they sum to 1.

    Returns:
        Places counted from 0; documents of equal mixtures keep their order.

    Raises:
        ValueError: As of `mix`.
    """
    mixed = mix(scores, weights)
    return sorted(range(len(mixed)), key=lambda place: -mixed[place])  # sorted() is stable


def mix(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Return the mixture of the normalised scores, one a document, in the order of the documents.

    Args:
        scores: As of `fuse`.
        weights: As of `fuse`.

    Raises:
        ValueError: A system with a weight has no scores, two have scores of different numbers of documents, a score is
            not finite, or the weights are negative or do not sum to 1.
    """
    # Written so that a weight that is no number is refused, too: it is neither below 0 nor far from anything.
    if not (all(weight >= 0 for weight in weights.values()) and abs(math.fsum(weights.values()) - 1) <= 1e-6):
        raise ValueError(f"weights are 0 or more and sum to 1, these do not: {dict(weights)}")
    parts = {name: weight for name, weight in weights.items() if weight > 0}
    if missing := [name for name in parts if name not in scores]:
        raise ValueError(f"there are weights but no scores of {', '.join(missing)}")
    if len({len(scores[name]) for name in parts}) != 1:
        raise ValueError(f"numbers of scores differ: { {name: len(scores[name]) for name in parts} }")
    mixed = [0.0] * len(scores[next(iter(parts))])
    for name, weight in parts.items():
        for place, normal in enumerate(normalise(scores[name])):
            mixed[place] += weight * normal
    return mixed


def interleave(lists: Sequence[Sequence[Document]], most: int | None = None) -> list[Document]:
    """Return the documents of several lists, each once: the first of each list in turn, then the second, and so on.

    Args:
        lists: Documents by their ids, best first, in the order in which the lists take turns.
        most: Documents at most; None for all.
    """
    found: dict[Document, None] = {}
    for rank in range(max(map(len, lists), default=0)):
        found.update(dict.fromkeys(own[rank] for own in lists if rank < len(own)))
        if most is not None and len(found) >= most:
            break
    return list(found)[:most]


def normalise(scores: Sequence[float]) -> list[float]:
    """Bring scores of one query's documents to mean 0 and deviation 1, the deviation of the whole and not of a sample.

    Args:
        scores: Finite numbers.

    Returns:
        One number a score. Scores that are all the same, such as that of one document alone, tell nothing of an order:
        each becomes 0.

    Raises:
        ValueError: A score is not finite.
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores that are not finite cannot be mixed: {list(scores)}")
    # The mean of equal numbers may differ from them in the last digit, which would be blown up to a deviation of 1.
    if not scores or min(scores) == max(scores):
        return [0.0] * len(scores)
    mean = math.fsum(scores) / len(scores)
    apart = [score - mean for score in scores]
    largest = max(map(abs, apart))  # divided by first, so that no square is too small or too large to be told from 0
    apart = [one / largest for one in apart]
    deviation = math.sqrt(math.fsum(one * one for one in apart) / len(apart))
    return [one / deviation for one in apart]


def read_weights(path: str | PathLike[str]) -> dict[str, float]:
    """Read the weights of a `fusion.json`: system -> weight."""
    with open(path, encoding="utf-8") as file:
        return {part["system"]: float(part["weight"]) for part in json.load(file)["parts"]}

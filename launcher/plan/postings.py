"""What lexical retrievers take beside their training: postings on disk, memory of a rank, time to encode and to search.

How many terms a document has is the outcome of training; it is assumed (`--document-terms`), and so is how often the
terms of a query meet those of a document. Both were counted for a trained SPLADE of two layers on Wikipedia's passages:
178 terms, 3.1 meetings (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.models import LexicalConfig
from engine.config.recipe import Config
from engine.config.timetable import Mining
from launcher.plan.corpus import Corpus
from launcher.plan.models import ModelShape
from launcher.plan.storage import mined_queries, shard_sizes

QUERIES_A_PASS = 8192
"""Queries for which mining goes through the postings once; a test holds it and the engine together."""
_HITS_BYTES, _FIXED_BYTES = 12, 48 * 2**20
"""Of a hit that is kept, and of what `engine.index.postings` holds beside hits and a block (one thread)."""
_BLOCK_BYTES, _ENCODED_BYTES = 12, 40
"""Of a posting while scipy searches its block, and while its shard is turned over (measured: 36)."""
_START_BYTES, _DOCUMENT_BYTES = 8, 2


@dataclass(frozen=True, slots=True)
class PostingsUse:
    """What all lexical retrievers of a recipe take."""

    states: Mapping[str, int]
    """How often each encodes the corpus, by the model's name."""
    num_bytes: int
    """Postings of one state."""
    rank_bytes: int
    """Memory of a rank while it encodes or searches, beside the model."""
    queries: int
    """Searched in all: for negatives by each mining, and for measurements by each state."""
    passes: int
    """How often mining reads all postings of a state."""

    @property
    def disk_bytes(self) -> int:
        """Postings of all states in the run folder; none is removed."""
        return sum(self.states.values()) * self.num_bytes


def postings_use(config: Config, corpus: Corpus, shapes: Mapping[str, ModelShape]) -> PostingsUse | None:
    """Estimate what lexical retrievers take; None where none searches.

    Args:
        config: The recipe.
        corpus: Sizes of the data, and terms of a document.
        shapes: Of all models, by name.
    """
    models = [model for model in config.timetable.encoders if isinstance(config.models[model], LexicalConfig)]
    minings: list[Mining] = [mining for mining in config.timetable.minings if mining.model in models]
    if not minings:
        return None
    states = {model: sum(mining.model == model for mining in minings) + config.evaluation.zero_shot for model in models}
    sizes = shard_sizes(config, corpus.documents)
    width = _DOCUMENT_BYTES + (2 if config.index.embedding_dtype == "float16" else 4)
    words = max(shapes[model].dimension for model in models)
    num_bytes = int(corpus.documents * corpus.terms * width + len(sizes) * (words + 1) * _START_BYTES)
    shard = max(sizes) * corpus.terms
    depth = max(mining.top_k * 5 // 4 for mining in minings)
    mined = [mined_queries(config.timetable, corpus, mining) for mining in minings]
    limits = config.evaluation.max_dev_queries, config.evaluation.max_test_queries
    measured = sum(
        min(number, limit or number) for number, limit in zip((corpus.dev, corpus.test), limits, strict=True)
    )
    searching = QUERIES_A_PASS * depth * _HITS_BYTES + _FIXED_BYTES + int(shard * _BLOCK_BYTES)
    return PostingsUse(
        states=states,
        num_bytes=num_bytes,
        rank_bytes=max(int(shard * _ENCODED_BYTES), searching),
        queries=sum(mined) + measured * sum(states.values()),
        passes=sum(-(-number // QUERIES_A_PASS) for number in mined),
    )

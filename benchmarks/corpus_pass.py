"""What a whole encoding pass, from token shards to stored embeddings, takes beyond its bare forward passes.

The same documents, model and threads on all sides, which take turns in one process: bare forward passes over token ids
in memory; the pass of a run, which reads the next shard and writes the last while it encodes; and the same steps one
after the other. Then reading a shard by its offsets, as a run does, against a walk through the tar by webdataset. On a
CPU a model of real size hides everything else; the default, one layer of 32 numbers, encodes about as many passages a
second as a GPU does with BERT-base. Seconds of the processor are printed too, since other work may share the machine.

    python benchmarks/corpus_pass.py [--shards N] [--documents N] [--model NAME] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.models.encode import encode_documents, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from shards.embeddings import Stamp, write_part
from shards.files import sha256_file
from shards.manifest import TokenStream
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, publish_manifest, recorded_docids, write_shard

MAX_LENGTH, TOKENS_PER_BATCH = 128, 65536
_MEAN_TOKENS = 60


def write_corpus(folder: Path, num_shards: int, size: int, vocabulary: int) -> CorpusShards:
    """Write shards of made-up token ids, a log-normal number of them with a mean of 60, and texts of such a length."""
    rng = np.random.default_rng(0)
    stream = TokenStream("retriever", "a" * 64, MAX_LENGTH)

    def made_up(texts: list[str]) -> list[list[int]]:
        lengths = rng.lognormal(np.log(_MEAN_TOKENS) - 0.125, 0.5, len(texts)).clip(4, MAX_LENGTH).astype(int)
        return [rng.integers(5, vocabulary, length).tolist() for length in lengths]

    for number in range(num_shards):
        first = number * size
        documents = [Document(str(row), "", "words " * _MEAN_TOKENS) for row in range(first, first + size)]
        write_shard(documents, folder, number, first, [Tokenization(stream, made_up)], "{text}")
    publish_manifest(folder, recorded_docids(folder), dataset_sha256="b" * 64, template="{text}", streams=[stream])
    return CorpusShards.open(folder)


def walked(shards: CorpusShards, number: int) -> int:
    """Read a shard's token ids by walking through its tar, after its bytes were hashed."""
    entry, count = shards.manifest.shards[number], 0
    assert sha256_file(shards.folder / entry.name) == entry.sha256
    with open(shards.folder / entry.name, "rb") as file:
        for sample in group_by_keys(tar_file_expander([{"url": entry.name, "stream": file}])):
            count += len(np.frombuffer(sample["retriever.ids"], dtype=np.uint32).astype(np.uint32))
    return count


def clocked(function: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds, and seconds of the processor."""
    seconds, of_processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - seconds, time.process_time() - of_processor


def compare(sides: dict[str, Callable[[], Any]], rounds: int, num_documents: int, base: str) -> None:
    """Let sides take turns and print their table."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(clocked(side))
    rows = []
    for name, turns in found.items():
        shares = [
            [mine[clock] / theirs[clock] for mine, theirs in zip(turns, found[base], strict=True)] for clock in (0, 1)
        ]
        rows.append(
            {
                "side": name,
                "passages/s": num_documents / statistics.median(turn[0] for turn in turns),
                "us of the processor a passage": 1e6 * statistics.median(turn[1] for turn in turns) / num_documents,
                "time, of the first": statistics.median(shares[0]),
                "processor, of the first": statistics.median(shares[1]),
            }
        )
    print(table(rows), flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--documents", type=int, default=5000, help="of a shard")
    parser.add_argument("--model", help="left out, a random one of one small layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(machine_line())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or str(folder / "model")
        if arguments.model is None:
            words = [f"{one}{two}{three}" for one in "abcdefgh" for two in "abcdefgh" for three in "abcdefgh"]
            shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 500}
            make_random_model(folder / "model", iter(words), seed=0, **shape)
        template = InputTemplate.from_tokenizer(load_tokenizer(model))
        retriever = Retriever.load(model, pooling="cls", similarity="dot", tied=True).to(device)
        encoder = retriever.document_encoder()
        shards = write_corpus(folder / "shards", arguments.shards, arguments.documents, 400)
        numbers, stamp = range(arguments.shards), Stamp("1", "c" * 64, shards.manifest.sha256)
        held = [[ids for _, ids in shards.iterate(number, "retriever")] for number in numbers]
        options: dict[str, Any] = {
            "max_length": MAX_LENGTH,
            "tokens_per_batch": TOKENS_PER_BATCH,
            "device": device,
        }
        turn = iter(range(10**6))

        def bare() -> None:
            for ids in held:
                encode_queries(encoder, template, ids, **options)  # type: ignore[arg-type]

        def in_a_run() -> None:
            to = folder / f"store-{next(turn)}"
            told: dict[str, Any] = {"dtype": "float16", "progress": lambda _documents, _tokens: None, **options}
            encode_documents(encoder, template, shards, "retriever", numbers, to, stamp, **told)

        def in_turn() -> None:
            to = folder / f"store-{next(turn)}"
            for number in numbers:
                ids = [ids for _, ids in shards.iterate(number, "retriever")]
                found_ND = encode_queries(encoder, template, ids, **options)  # type: ignore[arg-type]
                write_part(to, shards.manifest.shards[number], found_ND.astype(np.float16), stamp)

        bare()
        num_documents = shards.num_documents
        print(f"\n{arguments.shards} shards of {arguments.documents} documents, {_MEAN_TOKENS} tokens on average\n")
        sides = {"forward passes alone": bare, "the pass of a run": in_a_run, "the same, one after the other": in_turn}
        compare(sides, arguments.rounds, num_documents, "forward passes alone")
        print()

        def by_offsets() -> None:
            for number in numbers:
                for _ in shards.iterate(number, "retriever"):
                    pass

        def by_walking() -> None:
            for number in numbers:
                walked(shards, number)

        sides = {"read by offsets": by_offsets, "walk through the tar": by_walking}
        compare(sides, arguments.rounds, num_documents, "read by offsets")


if __name__ == "__main__":
    main()

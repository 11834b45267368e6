"""How fast a collection is converted, and whether memory stays flat however large it is.

    python benchmarks/convert.py [--quick] [--passages N ...]

Makes up collections of MS MARCO's shape (id TAB passage, about 55 words drawn by Zipf's law, and queries, judgements
and a top1000 of one size for all) in a temporary folder, converts each in a process of its own, and prints megabytes of
source a second, their ratio to a bare loop that only splits each line and writes it as JSON (no check, no journal, no
hash), and the peak memory of that process. Then tokenises each converted collection into shards, against the tokenizer
alone on the same texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table

ROOT = Path(__file__).parents[1]
SIZES, QUICK_SIZES = (125_000, 250_000, 500_000, 1_000_000), (20_000, 40_000)
_WORDS_PER_PASSAGE, _VOCABULARY, _NUM_QUERIES = 55, 50_000, 1000
_BLOCK_PASSAGES = 5000
_SAMPLE_PASSAGES = 50_000
"""Passages on which the tokenizer alone is timed."""

# What each process runs: its peak is read before it ends. Another row group is another entry.
_MEASURED = """
import json, sys, time
sys.path.insert(0, {root!r})
begin, extra = time.perf_counter(), {{}}
{body}
seconds = time.perf_counter() - begin
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"seconds": seconds, "peak": int(peak.split()[1]) * 1024, **extra}}))
"""
_CONVERT = """
from pathlib import Path
from shards.convert.conversion import convert
from shards.convert.options import Options
convert([Path({source!r})], Path({out!r}), Options())
"""


# The tokenizer alone takes its turns in the same process, before and after: other work on the machine comes and goes.
_TOKENIZE = """
from itertools import islice
from pathlib import Path
from engine.config.file import load_config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.corpus import model_texts
from engine.data.tokenization import plan_corpus, write_corpus
from shards.formats import open_dataset
config, out = load_config(Path("configs/wiki_qa.yaml"), ["data.documents_per_shard=null"]), Path({out!r})
texts = model_texts(config, {{name: section.name for name, section in config.models.items()}})
dataset = open_dataset(out)
plan = plan_corpus(config, dataset, texts)
strings = [document.text for document in islice(dataset.documents(), {sample})]
tokenizer, limit = next(iter(texts.values())).tokenizer, plan.streams[0].max_tokens

def clocks():
    return time.perf_counter(), time.process_time()

def timed(name, function):
    before = clocks()
    function()
    extra[name] = [after - start for start, after in zip(before, clocks())]

def tokenize(strings):
    for first in range(0, len(strings), 1000):
        tokenizer(strings[first:first + 1000], add_special_tokens=False, truncation=True, max_length=limit,
                  return_attention_mask=False)

half = len(strings) // 2
tokenize(strings[:1000])
timed("before", lambda: tokenize(strings[:half]))
shards = out / "shards" / "benchmark"
timed("ours", lambda: write_corpus(Coordinator(LocalTransport()), plan, dataset, shards, name="shards"))
timed("after", lambda: tokenize(strings[half:]))
"""


def write_collection(folder: Path, num_passages: int, seed: int = 0) -> None:
    """Write a made-up collection, a block of passages at a time; the same bytes for the same arguments.

    Args:
        folder: The folder to make.
        num_passages: Number of passages.
        seed: Draws words and judgements.
    """
    random = np.random.default_rng(seed)
    words = np.array([np.base_repr(number + 36, 36).lower() + "e" * (number % 5) for number in range(_VOCABULARY)])
    chances = 1 / np.arange(1, _VOCABULARY + 1)
    cumulated = np.cumsum(chances / chances.sum())
    folder.mkdir(parents=True)
    with open(folder / "collection.tsv", "w", encoding="utf-8") as file:
        for start in range(0, num_passages, _BLOCK_PASSAGES):
            size = min(_BLOCK_PASSAGES, num_passages - start)
            drawn = np.searchsorted(cumulated, random.random((size, _WORDS_PER_PASSAGE))).clip(max=_VOCABULARY - 1)
            file.writelines(f"{start + row}\t{' '.join(words[drawn[row]])}\n" for row in range(size))
    judged = random.integers(0, num_passages, _NUM_QUERIES)
    with (
        open(folder / "queries.dev.small.tsv", "w", encoding="utf-8") as queries,
        open(folder / "qrels.dev.small.tsv", "w", encoding="utf-8") as qrels,
    ):
        for number, docid in enumerate(judged.tolist()):
            queries.write(f"{number}\t{' '.join(words[random.integers(0, _VOCABULARY, 6)])}\n")
            qrels.write(f"{number}\t0\t{docid}\t1\n")
    with open(folder / "top1000.dev", "w", encoding="utf-8") as file:
        for docid in np.sort(random.integers(0, num_passages, 20 * _NUM_QUERIES)).tolist():
            file.write(f"{random.integers(0, _NUM_QUERIES)}\t{docid}\tquery\tpassage\n")


def measure(body: str) -> dict[str, Any]:
    """Run statements in a new process and return its seconds and its peak memory in bytes.

    Args:
        body: Python statements.
    """
    code = _MEASURED.format(root=str(ROOT), body=body)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _bare_loop_bytes_per_second(path: Path, out: Path) -> float:
    begin = time.perf_counter()
    with open(path, encoding="utf-8", newline="\n") as file, open(out, "w", encoding="utf-8") as written:
        for line in file:
            docid, _, text = line.rstrip("\n").partition("\t")
            written.write(json.dumps({"_id": docid, "title": "", "text": text}, ensure_ascii=False) + "\n")
    return path.stat().st_size / (time.perf_counter() - begin)


def conversion_row(folder: Path, num_passages: int) -> dict[str, Any]:
    """Convert one collection; return its row of the table.

    Args:
        folder: The folder with `source`; `out` is made in it.
        num_passages: Number of its passages.
    """
    source = folder / "source"
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    peer = _bare_loop_bytes_per_second(source / "collection.tsv", folder / "bare.jsonl")
    found = measure(_CONVERT.format(source=str(source), out=str(folder / "out")))
    speed = num_bytes / found["seconds"]
    return {
        "passages": f"{num_passages:,}",
        "source MB": num_bytes / 1e6,
        "seconds": found["seconds"],
        "MB/s": speed / 1e6,
        "passages/s": f"{num_passages / found['seconds']:,.0f}",
        "of a bare loop": f"{speed / peer:.0%}",
        "peak MiB": found["peak"] / (1 << 20),
    }


def tokenising_row(folder: Path, num_passages: int) -> dict[str, Any]:
    """Tokenise a converted collection into shards; return its row of the table.

    Args:
        folder: The folder with `out`, which holds the converted collection.
        num_passages: Number of its passages.
    """
    out, num_sample = folder / "out", min(num_passages, _SAMPLE_PASSAGES)
    found = measure(_TOKENIZE.format(out=str(out), sample=num_sample))
    num_bytes = (out / "corpus.jsonl").stat().st_size
    shards = [path for path in (out / "shards" / "benchmark").iterdir() if path.is_file()]
    seconds, of_processor = found["ours"]
    alone, alone_of_processor = (
        (before + after) * num_passages / num_sample
        for before, after in zip(found["before"], found["after"], strict=True)
    )
    return {
        "passages": f"{num_passages:,}",
        "corpus MB": num_bytes / 1e6,
        "seconds": seconds,
        "MB/s": num_bytes / seconds / 1e6,
        "passages/s": f"{num_passages / seconds:,.0f}",
        "of the tokenizer alone": f"{alone / seconds:.0%}",
        "processor seconds": of_processor,
        "the tokenizer's": alone_of_processor,
        "shard bytes a passage": sum(path.stat().st_size for path in shards) / num_passages,
        "peak MiB": found["peak"] / (1 << 20),
    }


# name -> row of one collection; each is a table of its own.
BENCHMARKS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "download to data folder": conversion_row,
    "data folder to token shards": tokenising_row,
}


def main() -> None:
    """Make the collections, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small collections")
    parser.add_argument("--passages", type=int, nargs="+", help="sizes of the collections")
    arguments = parser.parse_args()
    sizes = arguments.passages or (QUICK_SIZES if arguments.quick else SIZES)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in BENCHMARKS}
    for num_passages in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_collection(Path(folder) / "source", num_passages)
            for name, row_of in BENCHMARKS.items():
                rows[name].append(row_of(Path(folder), num_passages))
    print(machine_line())
    for name, found in rows.items():
        peaks = [row["peak MiB"] for row in found]
        print(f"\n### {name}\n\n{table(found)}\n")
        print(f"The largest peak is {max(peaks) / min(peaks):.2f} times the smallest; the largest collection ", end="")
        print(f"{max(sizes) / min(sizes):.0f} times the smallest.")


if __name__ == "__main__":
    main()

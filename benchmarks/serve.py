"""What a server costs: requests a second and latency against a loop of searches, and what bad requests leave behind.

The loop asks the same questions of the same run in this process, one after the other, as a script would. The server is
a process of its own; it is asked by one client, and by several at once, whose questions it encodes together. They take
turns, several of each, and the ratio is of the medians, so that other work on the machine meets all of them alike.
Then as many bad requests as said are sent at once, in rounds, with the server's memory before and after each.

    python benchmarks/serve.py RUN [--requests 200] [--clients 1 8 32] [--rounds 3] [--bad 1000] [--order retriever]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from launcher.commands.search_engine import Question, SearchEngine

MIB = 2**20
TOP_K = 10
Answer = tuple[int, float]
"""Status and seconds."""


def bad_bodies() -> list[bytes]:
    """Return bodies of every kind that is refused."""
    return [
        *(b"", b"{", b"[]", b"{}", b'{"query": 7}', b'{"query": ""}', b'{"query": "\xff"}', b'{"query": "\\ud800"}'),
        *(b'{"query": "a", "size": -1}', b'{"query": "a", "size": 1e99}', b'{"query": "a", "x": 1}', b"[" * 50_000),
        json.dumps({"query": "a" * 100_000}).encode(),
        json.dumps({"query": ["a"] * 1000}).encode(),
        b'{"query": "' + b"a" * 3_000_000 + b'"}',
    ]


async def ask(port: int, body: bytes) -> Answer:
    """Send a body to `/search` over a connection of its own; 0 where the connection ended without an answer."""
    begun = time.perf_counter()
    status = 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            if found := re.match(rb"HTTP/1.1 (\d+) ", await reader.read()):
                status = int(found[1])
        finally:
            writer.close()
    except OSError:
        pass
    return status, time.perf_counter() - begun


async def ask_all(port: int, bodies: Sequence[bytes], clients: int) -> list[Answer]:
    """Let some clients send bodies, each its next when it has an answer."""
    left, answers = iter(bodies), list[Answer]()

    async def client() -> None:
        for body in left:
            answers.append(await ask(port, body))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def memory_bytes(port: int) -> float:
    """Return how much the server has resident, by its own word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    told = (await reader.read()).decode()
    writer.close()
    found = re.search(r"^process_resident_memory_bytes (\S+)$", told, re.MULTILINE)
    assert found is not None, told
    return float(found[1])


def loop(engine: SearchEngine, questions: Sequence[Question]) -> list[Answer]:
    """Ask one question after the other."""
    answers = []
    for question in questions:
        begun = time.perf_counter()
        engine.answer([question])
        answers.append((200, time.perf_counter() - begun))
    return answers


def questions_of(engine: SearchEngine, number: int, order: Any) -> list[Question]:
    """Return titles, or beginnings of texts, of documents all over the corpus."""
    found = [engine.answer([Question(word, 50, "retriever")])[0] for word in ("a", "the", "of", "in")]
    texts = [(one.title or one.text)[:100] for own in found for one in own]
    return [Question(f"{texts[place % len(texts)]} {place}", TOP_K, order) for place in range(number)]


def measured(name: str, rounds: Sequence[tuple[float, Sequence[Answer]]], base: float | None) -> dict[str, Any]:
    """Return a row: medians of the rounds."""
    rates = [len(answers) / seconds for seconds, answers in rounds]
    latencies = sorted(seconds for _, answers in rounds for _, seconds in answers)
    wrong = sum(status != 200 for _, answers in rounds for status, _ in answers)
    rate = statistics.median(rates)
    return {
        "who asks": name,
        "requests/s": rate,
        "of the loop": rate / base if base else 1.0,
        "p50 ms": 1000 * latencies[len(latencies) // 2],
        "p95 ms": 1000 * latencies[int(0.95 * len(latencies))],
        "failed": wrong,
    }


def time_all(engine: SearchEngine, port: int, words: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the loop and the clients take turns."""
    questions = questions_of(engine, words.requests, words.order)
    bodies = [json.dumps({"query": one.text, "size": one.top_k, "order": one.order}).encode() for one in questions]
    rounds: dict[str, list[tuple[float, list[Answer]]]] = {}
    for _ in range(words.rounds):
        for clients in (0, *words.clients):
            begun = time.perf_counter()
            answers = asyncio.run(ask_all(port, bodies, clients)) if clients else loop(engine, questions)
            name = f"{clients} at once, over HTTP" if clients else "a loop in Python"
            rounds.setdefault(name, []).append((time.perf_counter() - begun, answers))
    base = statistics.median(len(answers) / seconds for seconds, answers in rounds["a loop in Python"])
    return [measured(name, own, base) for name, own in rounds.items()]


def send_bad(port: int, number: int, rounds: int) -> list[dict[str, Any]]:
    """Send bad requests all at once, in rounds."""
    kinds, rows = bad_bodies(), []
    bodies = [kinds[place % len(kinds)] for place in range(number)]
    for turn in range(rounds):
        before, begun = asyncio.run(memory_bytes(port)), time.perf_counter()
        answers = asyncio.run(ask_all(port, bodies, number))
        counted = Counter(status for status, _ in answers)
        row: dict[str, Any] = {"round": turn + 1, "seconds": time.perf_counter() - begun}
        row["answers"] = ", ".join(f"{many} x {status or 'none'}" for status, many in sorted(counted.items()))
        row |= {"MiB before": before / MIB, "MiB after": asyncio.run(memory_bytes(port)) / MIB}
        rows.append(row)
        assert counted.keys() <= {0, 400, 413, 422}, "a bad request is answered with 4xx"
    return rows


def main() -> None:
    """Start a server, measure, and end it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--order", choices=("retriever", "ranker", "fused"), default=None)
    words = parser.parse_args()
    command = [sys.executable, "-m", "launcher", "serve", str(words.run.absolute()), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        engine = SearchEngine(words.run)
        print(f"{machine_line()}\n{words.run}: {engine.num_documents} documents, order {words.order or engine.order}\n")
        print(table(time_all(engine, port, words)), "\n")
        print(table(send_bad(port, words.bad, words.rounds)))
        status, _ = asyncio.run(ask(port, json.dumps({"query": "a"}).encode()))
        print(f"\nafterwards a search is answered with {status}")
    finally:
        server.terminate()
        print(f"the server ended with {server.wait(60)}")


if __name__ == "__main__":
    main()

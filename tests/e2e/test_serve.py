"""`sparring serve` as its users have it: a process, and clients that speak HTTP, well or badly."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import require_silent_console, seen
from tests.e2e.starts import Rank, Zygote

LIMITS = ("--max-k", "50", "--max-texts", "4", "--max-query-characters", "100", "--max-body-bytes", "2000")
TOKEN = "a-token-of-the-test"


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    rank: Rank
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Return status and JSON of an answer."""
        sent = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request("GET" if sent is None else "POST", path, sent, headers)
            answer = connection.getresponse()
            assert answer.headers["Content-Type"] == "application/json"
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    @property
    def told(self) -> str:
        return (self.rank.folder / "stderr").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        os.kill(self.rank.pid, number)
        assert self.rank.ended.wait(60)
        return self.rank.returncode


def listening(rank: Rank) -> Server:
    """Wait for the address that the server prints."""
    deadline, printed = time.monotonic() + 120, rank.folder / "stdout"
    while not (found := re.search(r" at http://\S+:(\d+)\n", printed.read_text() if printed.exists() else "")):
        assert not rank.ended.is_set(), (rank.folder / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return Server(rank, int(found[1]))


@pytest.fixture(scope="module")
def run(quick_run: Path) -> Path:
    return quick_run


@pytest.fixture(scope="module")
def server(zygote: Zygote, run: Path) -> Iterator[Server]:
    """The server that all tests share; it is as well as it was when they have done with it."""
    begun = listening(zygote.begin("serve", str(run), "--port", "0", *LIMITS))
    yield begun
    assert begun.ask("/health") == (200, {"status": "ok"})
    assert begun.stop() == 0
    assert "Traceback" not in begun.told


@pytest.fixture(scope="module")
def question(small_data: Path) -> str:
    """The title of a document."""
    first, *_ = (small_data / "corpus.jsonl").read_text().splitlines()
    return str(json.loads(first)["title"])


def test_a_search_has_the_form_of_elasticsearch(server: Server, question: str) -> None:
    status, found = server.ask("/search", {"query": {"match": {"text": question}}, "size": 5})
    assert status == 200
    assert found["timed_out"] is False
    hits = found["hits"]["hits"]
    assert (len(hits), found["hits"]["max_score"]) == (5, hits[0]["_score"])
    assert [hit["_score"] for hit in hits] == sorted((hit["_score"] for hit in hits), reverse=True)
    assert all(set(hit["scores"]) == {"retriever", "ranker", "fused"} for hit in hits)
    assert all(hit["_source"]["text"] and hit["_index"] == "mine" for hit in hits)
    assert server.ask("/search", {"query": question, "k": 5})[1]["hits"] == found["hits"]
    words = question.replace(" ", "+")
    assert server.ask(f"/search?q={words}&size=5")[1]["hits"] == found["hits"]


def test_it_answers_as_the_command_does(server: Server, run: Path, zygote: Zygote, question: str) -> None:
    """What the terminal prints of three documents is what the server sends of them."""
    told = zygote.launcher("search", str(run), question, "--top-k", "3").out
    hits = server.ask("/search", {"query": question, "size": 3})[1]["hits"]["hits"]
    printed = re.findall(r"^ *(-?\d+\.\d+) +(-?\d+\.\d+) +(-?\d+\.\d+)  (.+)$", told, re.MULTILINE)
    sent = [
        (
            *(f"{hit['scores'][who]:.3f}" for who in ("fused", "ranker", "retriever")),
            f"{hit['_source']['title']}  [{hit['_id']}]",
        )
        for hit in hits
    ]
    assert printed == sent


def test_orders_and_several_questions(server: Server, question: str) -> None:
    body = {"query": [question, "another one"], "size": 80 - 40, "_source": False}
    for order in ("retriever", "ranker", "fused"):
        status, found = server.ask("/search", {**body, "order": order})
        assert status == 200
        for answer in found["responses"]:
            hits = answer["hits"]["hits"]
            by = [hit["scores"][order] for hit in hits]
            assert by == sorted(by, reverse=True)
            assert len(hits) == 40
            assert "_source" not in hits[0]
            assert ("ranker" in hits[0]["scores"]) is (order != "retriever")
    alone = server.ask("/search", {"query": question, "size": 40, "_source": False, "order": "fused"})[1]
    same(found["responses"][0]["hits"], alone["hits"])


def test_vectors_give_the_scores_of_a_search(server: Server, question: str) -> None:
    """A document's vector times a question's is what the search says the retriever's score is."""
    hit = server.ask("/search", {"query": question, "size": 1, "order": "retriever"})[1]["hits"]["hits"][0]
    (query,) = server.ask("/embed", {"inputs": question})[1]
    text = f"{hit['_source']['title']} {hit['_source']['text']}"
    status, (document,) = server.ask("/embed", {"inputs": [text], "prompt_name": "document"})
    assert status == 200
    score = sum(a * b for a, b in zip(query, document, strict=True))
    assert score == pytest.approx(hit["scores"]["retriever"], rel=1e-2)  # stored in half precision
    (unit,) = server.ask("/embed", {"inputs": question, "normalize": True})[1]
    assert sum(a * a for a in unit) == pytest.approx(1)


def test_the_ranker_scores_texts_as_it_does_documents(server: Server, question: str) -> None:
    hits = server.ask("/search", {"query": question, "size": 4, "order": "ranker"})[1]["hits"]["hits"]
    texts = [hit["_source"] for hit in reversed(hits)]
    status, ranks = server.ask("/rerank", {"query": question, "texts": texts, "raw_scores": True, "return_text": True})
    assert status == 200
    assert [rank["index"] for rank in ranks] == [3, 2, 1, 0]
    assert [rank["score"] for rank in ranks] == pytest.approx([hit["scores"]["ranker"] for hit in hits], abs=1e-5)
    assert ranks[0]["text"] == hits[0]["_source"]["text"]
    (plain, *_) = server.ask("/rerank", {"query": question, "texts": ["a text", "another text"]})[1]
    assert 0 < plain["score"] < 1


BAD = [
    ("/search", b"", 400, "the body is empty"),
    ("/search", b"{", 400, "no JSON"),
    ("/search", b'{"query": "\xff"}', 400, "no JSON"),
    ("/search", b'{"query": "\\ud800"}', 400, "no JSON"),
    ("/search", b"[" * 1500, 400, "no JSON"),
    ("/search", b"[]", 422, "the body: expected an object, got a list of 0"),
    ("/search", b"{}", 422, "query is missing"),
    ("/search", b'{"query": 7}', 422, "query: expected a text or an object or a list, got 7"),
    ("/search", b'{"query": {"match": {"title": "x"}}}', 422, "query.match takes no field 'title'"),
    ("/search", b'{"query": " "}', 422, "query is empty"),
    ("/search", b'{"query": []}', 422, "query is empty"),
    ("/search", b'{"query": ["a", ""]}', 422, "query[1] is empty"),
    ("/search", b'{"query": "a", "size": "5"}', 422, "size: expected a whole number, got '5'"),
    ("/search", b'{"query": "a", "size": 0}', 422, "size: expected a number greater than or equal to 1, got 0"),
    ("/search", b'{"query": "a", "size": 1e999}', 422, "size: expected a whole number"),
    ("/search", b'{"query": "a", "size": 51}', 422, "size is 51: expected at most 50"),
    ("/search", b'{"query": "a", "size": 1, "k": 1}', 422, "size and k are one: give one of them"),
    ("/search", b'{"query": "a", "from": 3}', 422, "there is no field 'from': expected query, size, order, _source"),
    ("/search", b'{"query": "a", "order": "bm25"}', 422, "order: expected 'retriever', 'ranker' or 'fused'"),
    ("/search", json.dumps({"query": ["a"] * 5}).encode(), 413, "query has 5 texts: expected at most 4"),
    ("/search", json.dumps({"query": "a" * 101}).encode(), 413, "query has 101 characters: expected at most 100"),
    ("/search", b'{"query": "' + b"a" * 2000 + b'"}', 413, "the body has more than 2000 bytes"),
    ("/search", b" " * 3_000_000, 413, "the body has more than 2000 bytes"),
    ("/embed", b'{"inputs": [1]}', 422, "inputs.0: expected a text, got 1"),
    ("/embed", b'{"inputs": "a", "prompt_name": "title"}', 422, "prompt_name"),
    ("/embed", json.dumps({"inputs": "and " * 20, "truncate": False}).encode(), 413, "truncate is false"),
    ("/rerank", b'{"query": "a"}', 422, "texts is missing"),
    ("/rerank", b'{"query": "a", "texts": []}', 422, "texts is empty"),
    ("/rerank", b'{"query": "a", "texts": ["b", {"title": 3, "text": "c"}]}', 422, "texts.1.title"),
    ("/rerank", b'{"query": "a", "texts": ["' + b"b " * 300 + b'"], "truncate": false}', 413, "truncate is false"),
]


@pytest.mark.parametrize(("path", "raw", "status", "message"), BAD)
def test_a_bad_request_is_told_why(server: Server, path: str, raw: bytes, status: int, message: str) -> None:
    found, answer = server.ask(path, raw=raw)
    assert (found, answer["status"]) == (status, status)
    assert message in answer["error"]
    assert answer["error_type"]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/nowhere", 404, "no such path"),
        ("/search/", 404, "no such path"),
        ("/embed", 405, "expected the method POST"),
        ("/search", 422, "query is missing"),
        ("/search?q=a&q=b", 422, "q is given twice"),
        ("/search?q=a&size=x", 422, "size: expected a whole number"),
        ("/search?q=a&size=-1", 422, "size: expected a whole number"),
        ("/search?q=a&_source=no", 422, "_source: expected true or false"),
        ("/search?q=a&x=1", 422, "there is no field 'x'"),
    ],
)
def test_a_bad_address_is_told_why(server: Server, path: str, status: int, message: str) -> None:
    found, answer = server.ask(path)
    assert found == status
    assert message in answer["error"]


def test_a_page_from_elsewhere_cannot_read(server: Server) -> None:
    """Its name may mean this machine by now: a browser then sends that name, and would let it read the answers."""
    status, answer = server.ask("/search?q=a", Host="elsewhere.example")
    assert (status, answer["error_type"]) == (403, "forbidden")
    assert server.ask("/health", Host=f"localhost:{server.port}")[0] == 200


def test_what_is_no_http_ends_its_connection_alone(server: Server) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(1000)
            except ConnectionResetError:
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert server.ask("/health")[0] == 200


def test_many_at_once_each_get_their_own(server: Server, question: str) -> None:
    """Good and bad requests of all kinds together: each is answered as if it were alone, and batches are formed."""
    words = question.split()
    good: list[tuple[str, Any]] = [("/search", {"query": word, "size": 3}) for word in words]
    good += [("/embed", {"inputs": [word, question]}) for word in words]
    good += [("/rerank", {"query": word, "texts": [question, word]}) for word in words]
    alone = [server.ask(*request) for request in good]
    assert {status for status, _ in alone} == {200}
    before = batches(server)

    def ask(number: int) -> tuple[int, Any, int]:
        if number % 3 == 2:
            path, raw, status, _ = BAD[number % len(BAD)]
            return server.ask(path, raw=raw)[0], None, status
        which = number % len(good)
        status, answer = server.ask(*good[which])
        return status, (which, answer), 200

    with ThreadPoolExecutor(24) as clients:
        results = list(clients.map(ask, range(180)))
    for status, found, expected in results:
        assert status == expected
        if found is not None:
            same(found[1], alone[found[0]][1])
    texts, computed = (after - earlier for after, earlier in zip(batches(server), before, strict=True))
    assert texts > computed, "requests that wait together are computed together"


def same(answer: Any, alone: Any) -> None:
    """Compare answers, but for the time they took and the last digits of their scores."""
    if isinstance(answer, dict):
        assert answer.keys() == alone.keys()
        for key in answer.keys() - {"took"}:
            same(answer[key], alone[key])
    elif isinstance(answer, list):
        assert len(answer) == len(alone)
        for one, other in zip(answer, alone, strict=True):
            same(one, other)
    elif isinstance(answer, float):
        assert answer == pytest.approx(alone, abs=1e-4)
    else:
        assert answer == alone


def batches(server: Server) -> tuple[float, float]:
    """Texts that were computed, and in how many batches."""
    connection = server.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert 'sparring_requests_total{path="/search",status="200"}' in text
    texts, computed = (
        sum(map(float, re.findall(rf"^sparring_batch_texts_{name}{{.*}} (\S+)$", text, re.MULTILINE)))
        for name in ("sum", "count")
    )
    return texts, computed


def test_a_server_with_a_token(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    """An export serves its models; the token is asked for everywhere but at the page and the sign of life."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    words = ("--no-search", "--port", "0", "--token-file", str(file), "--stop-seconds", "1")
    served = listening(zygote.begin("serve", str(run / "export"), *words))
    body = {"inputs": "a text"}
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert served.ask("/embed", body)[0] == 401
    for wrong in (f"Bearer {TOKEN}x", TOKEN, "Bearer \xfc", "Bearer "):
        status, answer = served.ask("/embed", body, Authorization=wrong)
        assert (status, answer["error_type"]) == (401, "unauthorized")
    assert served.ask("/metrics")[0] == 401
    assert served.ask("/health")[0] == 200
    assert served.ask("/embed", body, **right, Host="any.example")[0] == 200
    assert served.ask("/rerank", {"query": "a", "texts": ["b"]}, **right)[0] == 200
    status, answer = served.ask("/search", {"query": "a"}, **right)
    assert status == 404
    assert "without an index" in answer["error"]
    assert served.ask("/info", **right)[1]["documents"] is None
    with socket.create_connection(("127.0.0.1", served.port)) as waits:  # for ever, but it is not waited for
        head = f"POST /embed HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n"
        waits.sendall(head.encode() + b"{")
        time.sleep(0.2)
        assert served.stop() == 0
    assert "everybody on this machine can read" in served.told


def test_a_stop_answers_what_is_in_flight(zygote: Zygote, run: Path) -> None:
    """SIGTERM while a request arrives: nobody new is let in, the request is answered, and the server ends with 0."""
    served = listening(zygote.begin("serve", str(run), "--port", "0"))
    body = json.dumps({"query": ["a question"] * 8, "size": 3}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        connection.sendall(body[:10])
        time.sleep(0.3)  # so that it is in flight
        os.kill(served.rank.pid, signal.SIGTERM)
        wait_until_refused(served.port)
        assert not served.rank.ended.is_set()
        connection.sendall(body[10:])
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200
        assert len(json.loads(answer.read())["responses"]) == 8
    assert served.rank.ended.wait(60)
    assert served.rank.returncode == 0
    assert "SIGTERM: answering what is in flight" in served.told


def wait_until_refused(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError("new connections are still let in")


def test_starts_that_are_refused(zygote: Zygote, run: Path, server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("index"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text(" \n")
    for words, messages in (
        ([str(tmp_path / "none")], ["there is no folder"]),
        ([str(tmp_path / "empty")], ["holds no run"]),
        ([str(tmp_path / "empty"), "--no-search"], ["neither a run nor an export"]),
        ([str(run / "export")], ["is an export", "--no-search"]),
        ([str(broken)], ["has no index of G", "start the run again with the same command"]),
        ([str(run), "--port", str(server.port)], ["cannot listen at 127.0.0.1", "choose another --port"]),
        ([str(run), "--host", "no such name"], ["is no address"]),
        ([str(run), "--token-file", str(tmp_path / "blank")], ["holds no token"]),
        ([str(run), "--token-file", str(tmp_path / "none")], ["cannot be read"]),
    ):
        ended = zygote.launcher("serve", *words, *(() if "--port" in words else ("--port", "0")))
        assert ended.code == 2, (words, ended.err)
        assert "Traceback" not in ended.err
        for message in messages:
            assert message in ended.err
    assert zygote.launcher("serve", str(run), "--port", "65536").code == 2


def test_the_page_shows_both_scores(server: Server, question: str, tmp_path: Path) -> None:
    """A browser opens it, asks, and lays the answer out; also in the width of a phone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed, in which the page would be laid out: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=8000", "--dump-dom"]
    flags += ["--enable-logging=stderr"]
    address = f"http://127.0.0.1:{server.port}/?q={question.replace(' ', '+')}"
    ended = subprocess.run(
        [chromium, *flags, address],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    require_silent_console(ended.stderr)
    hits = server.ask("/search", {"query": question, "size": 10})[1]["hits"]["hits"]
    assert f"mine: {80} documents" in ended.stdout
    for hit in hits:
        assert hit["_source"]["title"] in ended.stdout
        for who in ("retriever", "ranker", "fused"):
            assert f"<dt>{who}</dt><dd>{hit['scores'][who]:.3f}</dd>" in ended.stdout
    laid_out = tmp_path / "page.html"
    laid_out.write_text(re.sub(r"<script>.*</script>", "", ended.stdout, flags=re.DOTALL))
    phone = seen(laid_out, tmp_path, width=340, is_dark=True)
    assert (phone["width"] <= 340, phone["outside"], phone["paper"]) == (True, [], "rgb(22, 24, 28)")
    assert 0.03 < phone["ink"] < 0.5, "the screenshot has text on paper"
    assert phone["paper_brightness"] < 0.2

"""The application: which path answers what, in the forms that users of Elasticsearch and of TEI know."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from engine.errors import ConfigError
from engine.log import get_logger
from launcher.commands.search_engine import Found, Question, SearchEngine
from launcher.commands.serve.batching import Batcher
from launcher.commands.serve.guard import Guard, refusal
from launcher.commands.serve.metrics import ServerMetrics
from launcher.commands.serve.requests import (
    EmbedBody,
    Limits,
    Refused,
    RerankBody,
    SearchBody,
    read_body,
    refusal_of,
)
from launcher.commands.text_models import TextModels
from shards.errors import SparringError
from shards.records import Document

log = get_logger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]
_PAGE = Path(__file__).with_name("page.html")
_DRAINED_BYTES = 16_000_000
"""How much of a body that is too large is read all the same: a client that still sends sees no answer."""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Service:
    """What answers: the models behind a queue, and the limits of requests.

    Args:
        name: Of the run or export, for clients.
        engine: Searches; None where only texts are encoded and re-ranked.
        models: For texts as they are given.
        limits: Of requests.
        max_batch: Texts that are computed together at most.
    """

    def __init__(
        self, name: str, engine: SearchEngine | None, models: TextModels, *, limits: Limits, max_batch: int
    ) -> None:
        self.metrics = ServerMetrics()
        self._name, self._engine, self._models, self._limits = name, engine, models, limits
        self._page = _PAGE.read_text(encoding="utf-8")
        self._batcher = Batcher(
            {"search": self._search_all, "embed": self._embed_all, "rerank": self._rerank_all},
            max_batch=max_batch,
            max_waiting=limits.max_waiting,
            observe=self.metrics.count_batch,
        )
        self.metrics.watch_queue(lambda: self._batcher.waiting)

    def close(self, timeout_seconds: float) -> None:
        """Compute what waits, and end; as of `Batcher.close`."""
        self._batcher.close(timeout_seconds)

    def application(self, *, token: str | None, only_local_names: bool) -> ASGIApp:
        """Return the ASGI application.

        Args:
            token: As of `Guard`.
            only_local_names: As of `Guard`.
        """
        endpoints: dict[str, tuple[Endpoint, list[str]]] = {
            "/": (self._show_page, ["GET"]),
            "/search": (self._search, ["GET", "POST"]),
            "/embed": (self._embed, ["POST"]),
            "/rerank": (self._rerank, ["POST"]),
            "/info": (self._info, ["GET"]),
            "/health": (self._health, ["GET"]),
            "/metrics": (self._tell_metrics, ["GET"]),
        }
        routes = [Route(path, _answered(answer), methods=methods) for path, (answer, methods) in endpoints.items()]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _told})
        app.router.redirect_slashes = False
        return Guard(app, token=token, only_local_names=only_local_names, paths=endpoints, metrics=self.metrics)

    async def _show_page(self, _request: Request) -> Response:
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def _health(self, _request: Request) -> Response:
        if not self._batcher.is_alive:
            raise Refused(503, "the models' thread has ended: start the server again", "unhealthy")
        return JSONResponse({"status": "ok"})

    async def _tell_metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _info(self, _request: Request) -> Response:
        engine, models = self._engine, self._models
        return JSONResponse(
            {
                "name": self._name,
                "documents": None if engine is None else engine.num_documents,
                "iteration": None if engine is None else engine.iteration,
                "order": None if engine is None else engine.order,
                "fusion": {} if engine is None else dict(engine.weights),
                "embeds": models.has_encoder,
                "reranks": models.has_ranker,
                "limits": asdict(self._limits),
            }
        )

    async def _search(self, request: Request) -> Response:
        if self._engine is None:
            raise Refused(404, "this server was started without an index: it has /embed and /rerank", "no_index")
        begun = time.monotonic()
        if request.method == "POST":
            body = read_body(await self._received(request), SearchBody)
        else:
            body = _search_of_address(request)
        self._limits.require_texts(body.questions, "query", are_queries=True)
        self._limits.require_k(body.size)
        try:
            self._engine.require_order(body.order)
        except ConfigError as error:
            raise Refused(422, str(error), "validation") from error
        questions = [Question(text, body.size, body.order) for text in body.questions]
        answers = await self._batcher.compute("search", questions, len(questions))
        took = round((time.monotonic() - begun) * 1000)
        responses = [_hits(self._name, found, took, body) for found in answers]
        whole = {"took": took, "responses": responses} if isinstance(body.query, list) else responses[0]
        return JSONResponse(whole)

    async def _embed(self, request: Request) -> Response:
        self._require(self._models.has_encoder, "dense retriever")
        body = read_body(await self._received(request), EmbedBody)
        are_queries = body.prompt_name == "query"
        self._limits.require_texts(body.texts, "inputs", are_queries=are_queries)
        return JSONResponse(await self._batcher.compute("embed", body, len(body.texts)))

    async def _rerank(self, request: Request) -> Response:
        self._require(self._models.has_ranker, "ranker")
        body = read_body(await self._received(request), RerankBody)
        self._limits.require_texts([body.query], "query", are_queries=True)
        texts = [f"{one.title}{one.text}" for one in body.titled]
        self._limits.require_texts(texts, "texts", are_queries=False)
        return JSONResponse(await self._batcher.compute("rerank", body, len(texts)))

    def _require(self, is_there: bool, what: str) -> None:
        if not is_there:
            raise Refused(404, f"{self._name} has no {what}", "no_model")

    async def _received(self, request: Request) -> bytes:
        """Read a body of the allowed size in the allowed time."""
        most = self._limits.max_body_bytes
        declared = request.headers.get("content-length", "")
        too_large = Refused(413, f"the body has more than {most} bytes", "too_large", {"Connection": "close"})
        if declared.isdecimal() and int(declared) > most and "expect" in request.headers:
            raise too_large  # before the client, which asks first, sends it
        parts, total = list[bytes](), 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    total += len(part)
                    if total <= most:
                        parts.append(part)
                    elif total > most + _DRAINED_BYTES:
                        break
                    else:
                        parts.clear()
        except TimeoutError:
            seconds = f"{self._limits.body_seconds:g} s"
            raise Refused(
                408, f"the body did not arrive within {seconds}", "timeout", {"Connection": "close"}
            ) from None
        if total > most:
            raise too_large
        return b"".join(parts)

    # What follows runs in the models' thread, for several requests together.

    def _search_all(self, asked: Sequence[list[Question]]) -> list[list[list[Found]]]:
        assert self._engine is not None
        found = iter(self._engine.answer([question for own in asked for question in own]))
        return [[next(found) for _ in own] for own in asked]

    def _embed_all(self, asked: Sequence[EmbedBody]) -> list[Any]:
        results: list[Any] = [None] * len(asked)
        for side in ("query", "document"):
            places = []
            for place, body in enumerate(asked):
                if body.prompt_name != side:
                    continue
                if not body.truncate and (told := self._models.too_long_to_encode(body.texts, side)):
                    results[place] = Refused(413, f"{told}; truncate is false", "too_large")
                else:
                    places.append(place)
            if not places:
                continue
            rows = self._models.encode([text for place in places for text in asked[place].texts], side)
            ends = np.cumsum([len(asked[place].texts) for place in places])[:-1]
            for place, own_ND in zip(places, np.split(rows, ends), strict=True):
                if asked[place].normalize:
                    norms_N1 = np.linalg.norm(own_ND, axis=1, keepdims=True).astype(np.float32)
                    own_ND = own_ND / np.maximum(norms_N1, np.finfo(np.float32).tiny)
                results[place] = own_ND.tolist()
        return results

    def _rerank_all(self, asked: Sequence[RerankBody]) -> list[Any]:
        results: list[Any] = [None] * len(asked)
        documents = [[Document("", one.title, one.text) for one in body.titled] for body in asked]
        places = []
        for place, body in enumerate(asked):
            if not body.truncate and (told := self._models.too_long_to_rerank(body.query, documents[place])):
                results[place] = Refused(413, f"{told}; truncate is false", "too_large")
            else:
                places.append(place)
        scores = self._models.rerank([asked[place].query for place in places], [documents[place] for place in places])
        for place, own in zip(places, scores, strict=True):
            results[place] = _ranks(asked[place], own)
        return results


def _ranks(body: RerankBody, scores: Sequence[float]) -> list[dict[str, object]]:
    """Order texts as TEI does: best first, each with its place among those that were sent."""
    ranks: list[dict[str, object]] = []
    for place in sorted(range(len(scores)), key=lambda place: -scores[place]):
        score = scores[place] if body.raw_scores else _sigmoid(scores[place])
        ranks.append({"index": place, "score": score})
        if body.return_text:
            ranks[-1]["text"] = body.titled[place].text
    return ranks


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _hits(name: str, found: Sequence[Found], took: int, body: SearchBody) -> dict[str, object]:
    """Write the documents of a question as Elasticsearch does, with the scores of each model beside them."""
    hits = []
    for one in found:
        scores = {"retriever": one.by_retriever, "ranker": one.by_ranker, "fused": one.mixed}
        hit: dict[str, object] = {"_index": name, "_id": one.docid, "_score": one.score}
        hit["scores"] = {who: score for who, score in scores.items() if score is not None}
        if body.source:
            hit["_source"] = {"title": one.title, "text": one.text}
        hits.append(hit)
    relation = "gte" if len(hits) == body.size else "eq"
    total = {"value": len(hits), "relation": relation}
    best = hits[0]["_score"] if hits else None
    return {"took": took, "timed_out": False, "hits": {"total": total, "max_score": best, "hits": hits}}


def _search_of_address(request: Request) -> SearchBody:
    """Read a search from an address: `/search?q=a+question&size=5`."""
    words: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        key = "query" if name == "q" else name
        if key in words:
            raise Refused(422, f"{name} is given twice", "validation")
        words[key] = value
    for name in ("size", "k"):
        if str(words.get(name, "")).isdecimal() and len(words[name]) < 10:
            words[name] = int(words[name])
    if words.get("_source") in ("true", "false"):
        words["_source"] = words["_source"] == "true"
    try:
        return SearchBody.model_validate(words)
    except ValidationError as error:
        raise refusal_of(error, SearchBody) from None


def _answered(answer: Endpoint) -> Endpoint:
    """Let whatever goes wrong in an answer be an answer, too."""

    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except Refused as error:
            return refusal(error)
        except ClientDisconnect:
            return refusal(Refused(400, "the client has gone", "disconnected"))
        except SparringError as error:
            log.error("%s: %s", request.url.path, error)
            return refusal(Refused(500, str(error), "model"))
        except Exception:
            log.exception("an error of the program in the answer to %s", request.url.path)
            return refusal(Refused(500, "an error of the program; the server's log has it", "internal"))

    return answered


async def _told(_request: Request, error: Exception) -> Response:
    """Say in JSON what Starlette refuses: an unknown path, or another method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    message = {404: "there is no such path", 405: f"expected the method {headers.get('Allow', '')}"}
    return refusal(Refused(error.status_code, message.get(error.status_code, error.detail), "http", headers))

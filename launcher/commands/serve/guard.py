"""What stands before every answer: who may ask, from where, and that each answer is counted.

It is plain ASGI around the application, so that it sees also what the application does not: unknown paths, and errors.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.commands.serve.metrics import ServerMetrics
from launcher.commands.serve.requests import Refused

OPEN_PATHS = frozenset({"/", "/health"})
"""Answered without a token: the page, which asks for it, and the sign of life."""
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def refusal(refused: Refused) -> JSONResponse:
    """Return the answer that says why a request is refused."""
    return JSONResponse(
        {"error": refused.message, "error_type": refused.kind, "status": refused.status},
        refused.status,
        headers=refused.headers,
    )


class Guard:
    """The application, behind the token and the counters.

    Args:
        app: The application.
        token: What `Authorization: Bearer` must hold; None lets everybody in.
        only_local_names: Whether the request must name this machine by a local name. Without a token it must: a page
            from elsewhere could otherwise let its own name mean this machine, and read the answers.
        paths: The application's own, for the counters.
        metrics: The counters.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        only_local_names: bool,
        paths: Collection[str],
        metrics: ServerMetrics,
    ) -> None:
        self._app, self._token, self._only_local_names = app, token, only_local_names
        self._paths, self._metrics = frozenset(paths), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refused(scope)
            await (self._app if refused is None else refusal(refused))(scope, receive, send_counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count(path, status, time.monotonic() - begun)

    def _refused(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if self._only_local_names:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in _LOCAL_NAMES:
                return Refused(
                    403,
                    f"the request is for {host[:80]!a}, expected a local name such as localhost; "
                    "a server with a token answers to any name",
                    "forbidden",
                )
        if self._token is None or scope["path"] in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return None
        message = (
            "the token is wrong" if given else "there is no token: expected the header Authorization: Bearer TOKEN"
        )
        return Refused(401, message, "unauthorized", {"WWW-Authenticate": "Bearer"})

"""Running the server until somebody wants it to end.

The server runs in a thread, and this thread keeps the signals: so that the first one ends the server when it has
answered, and a second one at once, whatever the server's library does with signals by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from engine.errors import CoordinationError
from engine.log import get_logger

log = get_logger(__name__)
_IDLE_SECONDS = 5


def serve_until_stopped(app: ASGIApp, listener: socket.socket, *, stop_seconds: float) -> None:
    """Answer requests until SIGTERM or an interrupt, and then what is in flight.

    Args:
        app: Answers.
        listener: A socket that listens.
        stop_seconds: How long what is in flight may take.

    Raises:
        CoordinationError: The server has ended by itself.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning for each request that is no HTTP
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=math.ceil(stop_seconds),
    )
    server = uvicorn.Server(config)

    def stop(number: int, _frame: FrameType | None) -> None:
        if server.should_exit:
            server.force_exit = True
            return
        log.info("%s: answering what is in flight", signal.Signals(number).name)
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), name="server", daemon=True)
    try:
        thread.start()
        thread.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.should_exit:
        raise CoordinationError(
            "the server has ended by itself", remedy="its last lines on stderr say why; start it again"
        )

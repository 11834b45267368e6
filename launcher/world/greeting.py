"""Whether an address leads to a process of ours: it greets whoever connects with a word that the other side knows.

A connection alone says little: at the address of a container's bridge, something may listen on every host.
"""

from __future__ import annotations

import contextlib
import socket
import threading

_TRY_SECONDS = 3.0
"""How long one attempt to reach an address may take."""


def greet(word: str) -> socket.socket:
    """Listen on all interfaces and greet everybody who connects, until the returned server is shut down.

    Args:
        word: The greeting.

    Raises:
        OSError: Nothing can listen here.
    """
    server = socket.create_server(("", 0), backlog=1024)

    def answer() -> None:
        with contextlib.suppress(OSError):  # the server was shut down
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(word.encode())

    threading.Thread(target=answer, name="greeter", daemon=True).start()
    return server


def why_unreached(address: str, port: int, word: str) -> str | None:
    """Return why whoever greets with a word is not reached at an address; None where it is.

    Args:
        address: Address or name of a host.
        port: Where it listens.
        word: The greeting.
    """
    heard = b""
    try:
        with socket.create_connection((address, port), _TRY_SECONDS) as connection:
            connection.settimeout(_TRY_SECONDS)
            while len(heard) <= len(word) and (chunk := connection.recv(64)):
                heard += chunk
    except OSError as error:
        return error.strerror or str(error)
    return None if heard == word.encode() else "another process answers there"

"""Who is found at an address: the one that was meant, another, or nobody."""

from __future__ import annotations

import contextlib
import socket
import threading

from launcher.world.greeting import greet, why_unreached
from tests.distributed.processes import free_port


def test_whoever_greets_with_the_word_is_found() -> None:
    with greet("a1b2") as server:
        port = server.getsockname()[1]
        assert [why_unreached("127.0.0.1", port, "a1b2") for _ in range(3)] == [None] * 3
        assert why_unreached("127.0.0.1", port, "a1b") == "another process answers there"
        assert why_unreached("127.0.0.1", port, "a1b2c3") == "another process answers there"
        server.shutdown(socket.SHUT_RDWR)


def test_nobody_has_a_reason() -> None:
    assert why_unreached("127.0.0.1", free_port(), "a1b2") == "Connection refused"


def test_another_that_talks_without_end_is_not_listened_to() -> None:
    """Symptom guarded against: a rank waits for ever for the last word of a server that is not ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while True:
                    connection.sendall(b"a1b2")

        threading.Thread(target=talk, daemon=True).start()
        assert why_unreached("127.0.0.1", server.getsockname()[1], "a1b2") == "another process answers there"

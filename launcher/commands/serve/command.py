"""`sparring serve RUN`: search in a finished run over HTTP, encode texts and re-rank them.

The socket is bound before the models are loaded, so that a port in use is told at once, and listens only when
everything is loaded: whoever can connect is answered. SIGTERM and Ctrl-C end the server after it has answered what it
was asked.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.log import get_logger
from launcher.terminal.arguments import positive_number, positive_whole_number, typed_path, whole_number

if TYPE_CHECKING:  # an extra, and imported after the words were found right
    from launcher.commands.serve.app import Service

log = get_logger(__name__)
TOKEN_VARIABLE = "SPARRING_TOKEN"
_LIMITS = {
    "max_k": "documents that a search returns",
    "max_texts": "queries or texts of a request",
    "max_query_characters": "characters of a query",
    "max_text_characters": "characters of a text to embed or re-rank",
    "max_body_bytes": "bytes of a body",
    "max_waiting": "texts that wait for the models",
}
_BACKLOG = 2048
"""Connections that wait to be taken; a burst of more is told to come again by the system."""
_DEFAULTS = (1000, 32, 2000, 20_000, 2_000_000, 512)
EXAMPLES = (
    "runs/nq --port 8080",
    "runs/nq/export --no-search --token-file token.txt --host 0.0.0.0",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("path", type=typed_path, metavar="RUN", help="run folder; with --no-search also an export")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen at (127.0.0.1); 0.0.0.0: all"
    )
    parser.add_argument("--port", type=_port, metavar="PORT", default=8080, help="port, 0 for any that is free (8080)")
    parser.add_argument(
        "--token-file",
        type=typed_path,
        metavar="FILE",
        help=f"holds the token that requests must bring; left out, {TOKEN_VARIABLE} of the environment, or none",
    )
    parser.add_argument("--no-search", action="store_true", help="no index: only encode and re-rank texts")
    parser.add_argument("--no-fusion", action="store_true", help="as of `search`")
    parser.add_argument("--shards", type=typed_path, metavar="DIR", help="as of `search`")
    parser.add_argument(
        "--max-batch", type=positive_whole_number, metavar="N", default=32, help="texts computed together (32)"
    )
    for (name, meaning), default in zip(_LIMITS.items(), _DEFAULTS, strict=True):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive_whole_number,
            metavar="N",
            default=default,
            help=f"most {meaning} ({default})",
        )
    parser.add_argument(
        "--stop-seconds",
        type=positive_number,
        metavar="S",
        default=30.0,
        help="how long requests in flight may take after SIGTERM (30)",
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or an interrupt."""
    token = read_token(arguments.token_file)
    _require_packages()
    with bound(arguments.host, arguments.port) as listener:
        is_local = listener.getsockname()[0] in ("127.0.0.1", "::1")
        if token is None and not is_local:
            log.warning("whoever reaches %s may ask: there is no token (--token-file)", arguments.host)
        service = _open_service(arguments)
        from launcher.commands.serve.running import serve_until_stopped

        app = service.application(token=token, only_local_names=token is None and is_local)
        with _told(arguments.host, arguments.port):  # another server may have bound it, too, and listen since
            listener.listen(_BACKLOG)
        print(f"{arguments.path.name or arguments.path} at {_address(listener)}", flush=True)
        serve_until_stopped(app, listener, stop_seconds=arguments.stop_seconds)
        service.close(arguments.stop_seconds)
    log.info("stopped")


def read_token(file: Path | None) -> str | None:
    """Return the token that requests must bring; None where none is asked for.

    Args:
        file: Holds it; None takes the environment's.

    Raises:
        ConfigError: The file cannot be read, or what is given is no token.
    """
    if file is None:
        given, where = os.environ.get(TOKEN_VARIABLE), f"the variable {TOKEN_VARIABLE}"
        if given is None:
            return None
    else:
        where = str(file)
        try:
            given = file.read_text(encoding="utf-8")
            if stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH:
                log.warning("everybody on this machine can read %s: chmod 600", file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the token file {file} cannot be read: {error}", expected="a text file with one token"
            ) from error
    token = given.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{where} holds no token: {len(token)} characters" + (", not all of them printable ASCII" if token else ""),
            expected="one word of printable ASCII",
            remedy="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    return token


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket, which does not listen yet.

    Args:
        host: A name or an address.
        port: 0 takes any that is free.

    Raises:
        ConfigError: There is no such address on this machine, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no address: {error}", expected="such as 127.0.0.1 or 0.0.0.0") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _told(host, port):
            listener.bind(address)
        yield listener


@contextmanager
def _told(host: str, port: int) -> Iterator[None]:
    """Tell why a server cannot listen at an address."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the server cannot listen at {host} port {port}: {error.strerror or error}",
            expected="an address of this machine, and a port that is free and that this user may take",
            remedy="choose another --port; 0 takes any that is free",
        ) from error


def _open_service(arguments: argparse.Namespace) -> Service:
    """Load what answers."""
    from launcher.commands.search_engine import SearchEngine
    from launcher.commands.serve.app import Service
    from launcher.commands.serve.requests import Limits
    from launcher.commands.text_models import TextModels, require_index

    engine = None
    if not arguments.no_search:
        require_index(arguments.path)
        engine = SearchEngine(arguments.path, arguments.shards, fused=not arguments.no_fusion)
    models = TextModels(arguments.path, engine)
    models.load()
    limits = Limits(**{name: getattr(arguments, name) for name in _LIMITS})
    return Service(arguments.path.name, engine, models, limits=limits, max_batch=arguments.max_batch)


def _require_packages() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed, which `serve` needs",
            remedy="pip install 'sparring[serve]', or in the repository: pip install '.[serve]'",
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _port(text: str) -> int:
    port = whole_number(text)
    if port > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to 65535")
    return port

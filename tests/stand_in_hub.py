"""A hub on this machine: answers the calls by which the hub's client makes a repository and uploads into it.

What it knows of the protocol is what a hub says and takes: who is logged in, what a repository is, which files go
through large file storage and which into the commit, and what a commit has in it. Files are kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


@dataclass
class Repository:
    """What a repository has."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class StandIn:
    """A hub's state, and what it was asked.

    Attributes:
        large: Ends of the names of files that go through large file storage.
        role: Of the one token.
        refusals: Parts of paths to (status, message) with which they are answered.
        fails_after: Uploads of large files that are taken before the connection breaks; None for all.
    """

    address: str = ""
    large: tuple[str, ...] = ()
    role: str = "write"
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    fails_after: int | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def stand_in_hub() -> Iterator[StandIn]:
    """Serve a hub on a free port until the body ends."""
    state = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self._refused("GET"):
            return
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            organizations = [{"name": "acme", "type": "org"}]
            auth = {"accessToken": {"role": self.state.role}}
            self._answer({"name": "me", "type": "user", "orgs": organizations, "auth": auth})
        elif path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            repository = self.state.repositories.get(name)
            if repository is None:
                self._error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
                return
            siblings = [{"rfilename": file} for file in repository.files]
            told = {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
            self._answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": _blob(data)}
                    for file, data in repository.files.items()
                ]
                if "/tree/" in path
                else told
            )
        else:
            self._error(404, f"no such call: {path}")

    def do_PUT(self) -> None:
        body = self._body()
        if self._refused("PUT"):
            return
        if self.state.fails_after is not None and len(self.state.stored) >= self.state.fails_after:
            self.close_connection = True
            self.connection.close()
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid, "what arrives is what was announced"
        self.state.stored[oid] = body
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self._refused("POST"):
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.state.repositories:
                self._answer(
                    {"error": "You already created this model repo", "url": f"{self.state.address}/{name}"}, 409
                )
                return
            self.state.repositories[name] = Repository(
                asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self._answer({"url": f"{self.state.address}/{name}"})
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = self._repository(path).files
            self._answer({"files": [self._mode(one["path"], files) for one in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._action(one) for one in json.loads(body)["objects"]]})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), body)
        else:
            self._error(404, f"no such call: {path}")

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.state.repositories[name]
        for line in body.splitlines():
            one = json.loads(line)
            key, value = one["key"], one["value"]
            if key == "header":
                repository.commits.append(value["summary"])
            elif key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.state.stored[value["oid"]]
            elif key == "deletedFile":
                del repository.files[value["path"]]
        self._answer({"commitUrl": f"{self.state.address}/{name}/commit/{repository.sha}", "commitOid": repository.sha})

    def _repository(self, path: str) -> Repository:
        return self.state.repositories["/".join(path.split("/")[3:5])]

    def _mode(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        large = name.endswith(self.state.large) if self.state.large else False
        told: dict[str, Any] = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if name in files:
            told["oid"] = hashlib.sha256(files[name]).hexdigest() if large else _blob(files[name])
        return told

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        told = {"oid": one["oid"], "size": one["size"]}
        there = one["oid"] in self.state.stored
        return told if there else {**told, "actions": {"upload": {"href": f"{self.state.address}/lfs/{one['oid']}"}}}

    def _refused(self, method: str) -> bool:
        self.state.asked.append(f"{method} {self.path.partition('?')[0]}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and method != "PUT":
            self._error(401, "Invalid credentials")
            return True
        for part, (status, message) in self.state.refusals.items():
            if part in self.path:
                self._error(status, message)
                return True
        return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._answer({"error": message}, status, {"X-Error-Message": message, **(headers or {})})

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

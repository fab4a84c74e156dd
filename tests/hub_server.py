"""A hub on this machine: the parts of its protocol that a download uses, with faults on demand.

Two servers, as the real one has: the hub itself (model info, small files, redirects for large ones) and a store of
another origin, which large files are fetched from by a signed link and which must never see a token. Everything that
is sent is noted.

    with TinyHub() as hub:
        commit = hub.publish("org/tiny", directory)
        hub.faults.append(Fault("store", reset_after=1000))
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

LARGE = (".safetensors", "tokenizer.json")  # kept as LFS objects


@dataclass
class Fault:
    """What goes wrong with the next request that it fits, once.

    where   "info", "hub" (a file asked for at the hub) or "store"
    name    of the file, "" for any;   skip: so many fitting requests go well before
    """

    where: str
    name: str = ""
    skip: int = 0
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    reset_after: int | None = None  # bytes, then the connection is reset
    short_after: int | None = None  # bytes, then it is closed as if that were all
    flip_byte: int | None = None
    ignore_range: bool = False
    times: int = 1


@dataclass
class Sent:
    """One answer: to which server, which file, bytes of the body."""

    where: str
    name: str
    start: int
    size: int
    token: str | None


class TinyHub:
    """Both servers, in threads of this process, until the end of the block."""

    def __init__(self, token: str | None = None, gated: bool = False):
        self.token, self.gated = token, gated
        self.repositories: dict[str, dict[str, str]] = {}  # repository -> revision -> commit
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit) -> name -> content
        self.faults: list[Fault] = []
        self.sent: list[Sent] = []
        self.lock = threading.Lock()
        self.servers = {where: self._serve(where) for where in ("hub", "store")}

    def publish(self, repository: str, directory: Path, revision: str = "main") -> str:
        """Make a directory the newest commit of a revision; returns its name."""
        content = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
        commit = hashlib.sha1(b"".join(name.encode() + data for name, data in content.items())).hexdigest()
        self.files[repository, commit] = content
        self.repositories.setdefault(repository, {})[revision] = commit
        return commit

    @property
    def endpoint(self) -> str:
        return self._address("hub")

    def bytes_sent(self, suffix: str = ".safetensors") -> int:
        return sum(sent.size for sent in self.sent if sent.name.endswith(suffix))

    def requests(self) -> Counter[str]:
        return Counter(sent.where for sent in self.sent)

    def __enter__(self) -> TinyHub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def _address(self, where: str) -> str:
        return f"http://127.0.0.1:{self.servers[where].server_address[1]}"

    def _serve(self, where: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                hub._answer(self, where)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # a client that went away

        server = Server(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def _take_fault(self, where: str, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.where == where and name.endswith(fault.name):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None

    def _answer(self, request: BaseHTTPRequestHandler, where: str) -> None:
        parts = [unquote(part) for part in urlparse(request.path).path.split("/")[1:]]
        token = request.headers.get("Authorization")
        if where == "store":
            assert token is None, "the token left the hub"
            repository, commit, name = "/".join(parts[:2]), parts[2], parts[3]
            self._send_file(request, where, name, self.files[repository, commit][name], {})
        elif parts[:2] == ["api", "models"]:
            repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 4 else "main"
            self._send_info(request, repository, revision, token)
        else:
            repository, commit, name = "/".join(parts[:2]), parts[3], parts[4]
            self._send_resolved(request, repository, commit, name, token)

    def _send_info(self, request: BaseHTTPRequestHandler, repository: str, revision: str, token: str | None) -> None:
        commits = self.repositories.get(repository)
        fault = self._take_fault("info", "")
        if fault:
            return self._refuse(request, fault.status, dict(fault.headers))
        if commits is None or (self.token and not self.gated and token != f"Bearer {self.token}"):
            return self._refuse(request, 401, {"X-Error-Code": "RepoNotFound"})
        commit = commits.get(revision, revision)
        if (repository, commit) not in self.files:
            return self._refuse(request, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, Any]] = []
        for name, data in self.files[repository, commit].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_hash(data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
            siblings.append(entry)
        info = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "private": False}
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(info).encode(), None)
        return None

    def _send_resolved(
        self, request: BaseHTTPRequestHandler, repository: str, commit: str, name: str, token: str | None
    ) -> None:
        content = self.files.get((repository, commit), {}).get(name)
        if self.token and token != f"Bearer {self.token}":
            code = "GatedRepo" if self.gated else "RepoNotFound"
            return self._refuse(request, 403 if token else 401, {"X-Error-Code": code})
        if content is None:
            return self._refuse(request, 404, {"X-Error-Code": "EntryNotFound"})
        is_large = name.endswith(LARGE)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(content)}"'}
        if not is_large:
            return self._send_file(request, "hub", name, content, headers)
        headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self._address('store')}/{repository}/{commit}/{name}?Signature=x"
        fault = self._take_fault("hub", name)
        if fault and fault.status:
            return self._refuse(request, fault.status, dict(fault.headers))
        self._send(request, 302, headers | dict(fault.headers if fault else ()), b"", None)
        return None

    def _send_file(
        self, request: BaseHTTPRequestHandler, where: str, name: str, content: bytes, headers: dict[str, str]
    ) -> None:
        fault = self._take_fault(where, name)
        if fault and fault.status:
            return self._refuse(request, fault.status, dict(fault.headers))
        start, end, status = 0, len(content), 200
        asked = request.headers.get("Range")
        if asked and not (fault and fault.ignore_range):
            first, last = asked.removeprefix("bytes=").split("-")
            start, end, status = int(first), min(len(content), int(last) + 1), 206
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        body = bytearray(content[start:end])
        if fault and fault.flip_byte is not None and fault.flip_byte < len(body):
            body[fault.flip_byte] ^= 1
        token = request.headers.get("Authorization")
        with self.lock:
            self.sent.append(Sent(where, name, start, len(body), token))
        self._send(request, status, headers | dict(fault.headers if fault else ()), bytes(body), fault)
        return None

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, fault: Fault | None
    ) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        cut = None if fault is None else fault.reset_after if fault.reset_after is not None else fault.short_after
        if cut is not None:
            request.send_header("Connection", "close")
        request.end_headers()
        try:
            request.wfile.write(body if cut is None else body[:cut])
            request.wfile.flush()
        except ConnectionError:  # the client has what it wanted
            request.close_connection = True
        if cut is not None:
            with self.lock:
                self.sent[-1].size = min(cut, len(body))
            if fault and fault.reset_after is not None:
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close_connection = True

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        self._send(request, status, headers, b"", None)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

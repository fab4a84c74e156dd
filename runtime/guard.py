"""What stands between the network and the application: who may ask, from where, how much, and how slowly.

The server listens on loopback unless told otherwise, and loopback is not a wall: any page in the user's browser can
send requests to it. So a Host header must name this machine (a page that rebinds its DNS name to 127.0.0.1 sends its
own), and an Origin must be the server's. Elsewhere than on loopback every request carries a key. Bodies are read whole
here, within a size, a time, and a bound for all of them together; headers that never end are cut off by the connection.
Not here: TLS (a proxy's work) and limits by client (the queue takes clients in turn).

    app.add_middleware(Guard, policy=policy)
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from moepack.layout.errors import UsageError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/", "/health")  # tell nothing about the model or anybody's words
HEADER_SECONDS = 20.0
LEAST_KEY = 8


@dataclass(frozen=True)
class Policy:
    """What is let in.

    api_key        the key that every request but those to OPEN_PATHS must carry; None: any or none
    hosts          names that a Host header may have, without a port; None: any (the key is what protects then)
    max_body       bytes of one body; max_bodies: of all that are being read or answered
    body_seconds   how long a body may take to arrive
    """

    api_key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK
    max_body: int = 8 * 2**20
    max_bodies: int = 64 * 2**20
    body_seconds: float = 30.0


def read_api_key(path: Path) -> str:
    """The key in a file, blanks around it left out. Raises UsageError."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a key: {getattr(error, 'strerror', None) or error}") from None
    if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{path}: expected a key of at least {LEAST_KEY} printable ASCII characters on one line")
    return key


class Refused(Exception):
    """A request that is not let in: an HTTP status and a reason for the client."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware that applies a policy. Requests behind it have their body in memory."""

    def __init__(self, app: App, policy: Policy):
        self.app, self.policy = app, policy
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        held = 0
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope, headers)
            body = bytearray()
            expected = headers.get("content-length", "0")
            if expected.isdigit() and int(expected) > self.policy.max_body:
                raise Refused(413, f"the body has {expected} bytes, at most {self.policy.max_body} are read")
            deadline = asyncio.get_running_loop().time() + self.policy.body_seconds
            while True:
                message = await self._receive_part(receive, deadline)
                if message["type"] == "http.disconnect":
                    return
                part = message.get("body", b"")
                if len(body) + len(part) > self.policy.max_body:
                    raise Refused(413, f"the body has more than {self.policy.max_body} bytes")
                if self._held_bytes + len(part) > self.policy.max_bodies:
                    raise Refused(503, "too many requests are being read: try again later")
                body += part
                held += len(part)
                self._held_bytes += len(part)
                if not message.get("more_body"):
                    break
            await self.app(scope, _replay(bytes(body), receive), send)
        except Refused as refused:
            await send_refusal(scope["path"], refused, send)
        finally:
            self._held_bytes -= held

    async def _receive_part(self, receive: Receive, deadline: float) -> Message:
        try:
            return await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.policy.body_seconds:g} s") from None

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.policy.hosts is not None and _strip_port(host) not in self.policy.hosts:
            raise Refused(403, f"Host {host[:80]!r} is not this server: ask for {' or '.join(self.policy.hosts)}")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, f"requests from pages of {origin[:80]!r} are not answered")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "requests from pages of other sites are not answered")
        if self.policy.api_key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), self.policy.api_key.encode()):
                raise Refused(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")


ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def describe_error(path: str, status: int, reason: str, param: str | None = None, code: str | None = None) -> Any:
    """An error in the shape of the API that the path belongs to."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if path.startswith("/v1/messages"):
        kind = {413: "request_too_large", 503: "overloaded_error"}.get(status, kind)
        return {"type": "error", "error": {"type": kind, "message": reason}}
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}


async def send_refusal(path: str, refused: Refused, send: Send) -> None:
    """An error response, after which the connection closes: what is left of the body is not read."""
    body = json.dumps(describe_error(path, refused.status, refused.reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body first, then what comes after it: the disconnect."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return parts.pop() if parts else await receive()

    return next_message


def _strip_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 connection, which by itself waits for ever for the end of headers."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline:
            self._deadline.cancel()

    def _watch(self) -> None:
        """While headers are awaited, let the connection live for a while; not longer for what trickles in."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if not is_idle and self._deadline:
            self._deadline.cancel()
            self._deadline = None
        elif is_idle and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

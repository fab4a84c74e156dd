"""Who may ask, from where, how much and how slowly: sent as bytes, because no proper client sends such things."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from moepack.layout.errors import UsageError
from moepack.runtime import guard
from moepack.runtime.guard import Policy, read_api_key
from moepack.runtime.server import open_socket
from served import Served, serve

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def served(demo_pack: Callable[[int], Path]) -> Iterator[Served]:
    patience = guard.HEADER_SECONDS
    guard.HEADER_SECONDS = 0.5
    with serve(demo_pack(2), Policy(max_body=100_000, max_bodies=250_000, body_seconds=0.5)) as running:
        yield running
    guard.HEADER_SECONDS = patience


def send(served: Served, data: bytes) -> bytes:
    """Whatever comes back until the server closes the connection or answers."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(data)
        return connection.recv(65536)


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "localhost", "LOCALHOST"])
def test_names_of_this_machine_are_answered(served: Served, host: str) -> None:
    headers = {"host": host.format(port=served.port)}
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example:80"},
        {"host": "evil.example:127.0.0.1"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_names_and_pages_are_refused(served: Served, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=HELLO, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert httpx.get(f"{served.url}/", headers=headers).status_code == 403


def test_the_servers_own_page_may_ask(served: Served) -> None:
    headers = {"origin": served.url, "sec-fetch-site": "same-origin"}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=HELLO, headers=headers).status_code == 200


def test_long_bodies_are_refused_unread(served: Served) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    for rest in ("Content-Length: 100001\r\n\r\n", "Content-Length: 99999999999999\r\n\r\n"):
        assert send(served, (head + rest).encode()).startswith(b"HTTP/1.1 413")
    chunk = b"%x\r\n%s\r\n" % (60_000, b"a" * 60_000)
    assert send(served, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + 2 * chunk).startswith(b"HTTP/1.1 413")
    answer = httpx.post(f"{served.url}/v1/messages", content=b"a" * 100_001)
    assert answer.json()["error"]["type"] == "request_too_large"


def test_slow_bodies_and_headers_are_cut_off(served: Served) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    assert send(served, head).startswith(b"HTTP/1.1 408")
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        connection.settimeout(0.1)
        while time.monotonic() - started < 20:  # one byte after the other never ends the headers
            try:
                if connection.recv(100) == b"":
                    break
            except TimeoutError:
                pass
            except ConnectionError:
                break
            try:
                connection.sendall(b"a")
            except ConnectionError:
                break
        else:
            pytest.fail("the connection was left open")
    assert send(served, b"") == b""  # a connection that says nothing at all


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_malformed_requests_get_an_error_and_nothing_else(served: Served, data: bytes) -> None:
    try:
        answer = send(served, data)
    except ConnectionError:
        answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize("clients", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_many_clients_at_once_are_all_answered(served: Served, clients: int) -> None:
    alone = httpx.post(f"{served.url}/v1/chat/completions", json=HELLO).json()["choices"]

    def ask(number: int) -> object:
        with httpx.Client(timeout=120) as client:
            if number % 4 == 0:
                return client.post(f"{served.url}/v1/chat/completions", content=b"{").status_code
            return client.post(f"{served.url}/v1/chat/completions", json=HELLO).json().get("choices")

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    assert answers == [400 if number % 4 == 0 else alone for number in range(clients)]


def test_a_full_queue_says_so(demo_pack: Callable[[int], Path], served: Served) -> None:
    scheduler = served.service.scheduler
    most, scheduler.max_waiting = scheduler.max_waiting, 0
    try:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=HELLO)
    finally:
        scheduler.max_waiting = most
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    assert "at most 0 may" in answer.json()["error"]["message"]


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("  correct-horse\n")
    assert read_api_key(key) == "correct-horse"
    for content in ("", "short", "two\nlines of it", "schlüssel-lang"):
        key.write_text(content)
        with pytest.raises(UsageError, match="at least 8 printable"):
            read_api_key(key)
    with pytest.raises(UsageError, match="cannot be read"):
        read_api_key(tmp_path / "none")


def test_a_port_in_use_is_one_line(served: Served) -> None:
    with pytest.raises(UsageError, match=r"127.0.0.1:\d+: Address already in use: choose another"):
        open_socket("127.0.0.1", served.port)


def test_the_openapi_is_ours(served: Served) -> None:
    schema = httpx.get(f"{served.url}/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
    assert "422" not in json.dumps(schema)

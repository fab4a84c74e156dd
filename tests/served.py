"""A server over a pack, in this process, on a free port of loopback: what the tests of the APIs talk to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.process import resident_set_bytes
from moepack.runtime import Engine
from moepack.runtime.guard import Policy
from moepack.runtime.server import create_app, create_server, open_socket
from moepack.runtime.service import Service, Settings

BUDGET_BYTES = 2**29  # beside what this process has gathered from the tests before


@dataclass
class Served:
    """url: of the server. engine: the one behind it, not to be used while a request runs."""

    url: str
    port: int
    service: Service
    engine: Engine


@contextlib.contextmanager
def serve(pack: Path, policy: Policy = Policy(), settings: Settings = Settings(), **options: Any) -> Iterator[Served]:
    """Serve a pack until the block ends."""
    budget = resident_set_bytes() + BUDGET_BYTES
    with Engine.open(pack, memory=budget, threads=1, **options) as engine:
        service = Service(engine, "demo", settings)
        listener = open_socket("127.0.0.1", 0)
        server = create_server(create_app(service, policy))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        port = listener.getsockname()[1]
        try:
            yield Served(f"http://127.0.0.1:{port}", port, service, engine)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_until(is_true: Any, seconds: float = 30) -> None:
    """Poll; fails if it does not become true in that time, which is far above what it takes."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)

"""The page at /, used as a person uses it: in a headless Chromium, over the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moepack.runtime.guard import Policy
from served import Served, serve, wait_until
from test_openai_api import ASK, WEATHER

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DRIVER and CHROMIUM), reason="needs chromium and chromedriver: apt-get install chromium-driver"
    ),
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name for a reference to an element


class Browser:
    """One session of a WebDriver, as far as these tests go."""

    def __init__(self, url: str, profile: Path):
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        chrome = {"binary": CHROMIUM, "args": [*arguments, "--window-size=1200,800"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        self._http = httpx.Client(base_url=url, timeout=60)
        session = self._call("post", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method.upper(), path, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._call("post", f"{self._path}/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._call("post", f"{self._path}/execute/sync", {"script": f"return {script}", "args": []})

    def _find(self, selector: str) -> str:
        found = self._call("post", f"{self._path}/element", {"using": "css selector", "value": selector})
        return f"{self._path}/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self._call("post", f"{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._call("post", f"{self._find(selector)}/value", {"text": text})

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("get", f"{self._path}/screenshot"))

    def complaints(self) -> list[str]:
        entries = self._call("post", f"{self._path}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self) -> None:
        self._call("delete", self._path)


@pytest.fixture(scope="module")
def served(demo_pack: Callable[[int], Path]) -> Iterator[Served]:
    with serve(demo_pack(4), snapshot_bytes=64 * 2**20) as running:
        yield running


@pytest.fixture(scope="module")
def driver() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return bool(httpx.get(f"{url}/status").json()["value"]["ready"])
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, 60)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def browser(driver: str, tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(driver, tmp_path / "profile")
    yield opened
    opened.close()


def test_a_conversation(served: Served, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{served.url}/")
    wait_until(lambda: browser.texts("#model") == ["demo"])
    browser.type("#temperature", "0")
    browser.type("#say", "Hello\n")
    wait_until(lambda: "generated" in "".join(browser.texts(".assistant .note")))
    assert browser.texts(".user") == ["Hello"]
    assert browser.texts(".assistant .text")[0].startswith("Hello")
    assert browser.texts(".assistant details div")[0]  # what it thought, folded
    assert browser.run("document.querySelector('.assistant details').open") is False
    browser.click(".assistant summary")
    assert browser.run("document.querySelector('.assistant details').open") is True
    layers = served.engine.architecture.num_hidden_layers
    wait_until(lambda: len(browser.texts("#layers .row")) == layers)
    browser.type("#say", "Tell me a story about a fox.\n")
    wait_until(lambda: "%" in "".join(browser.texts("#layers .row")))
    wait_until(
        lambda: (
            len(browser.texts(".assistant .text")) == 2
            and not browser.run("document.querySelector('#stop').disabled === false")
        )
    )
    assert "not read again" in browser.texts(".assistant .note")[1]
    picture = browser.screenshot()
    (tmp_path / "page.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert browser.complaints() == []


def test_stop_ends_the_generation(served: Served, browser: Browser) -> None:
    browser.open(f"{served.url}/")
    endless = {str(id_): -100 for id_ in served.engine.tokenizer.stop_token_ids}
    patch = "makeRequest = (make => () => ({...make(), max_tokens: 1900, logit_bias: %s}))(makeRequest)"
    browser.run(patch % json.dumps(endless))
    browser.type("#say", "Tell me a story.\n")
    wait_until(lambda: any(job.generation for job in served.service.scheduler.running))
    browser.click("#stop")
    wait_until(lambda: browser.texts(".assistant .note") == ["stopped"])
    wait_until(lambda: not served.service.scheduler.running)


def test_calls_are_shown_and_answers_are_no_markup(served: Served, browser: Browser) -> None:
    browser.open(f"{served.url}/")
    browser.run(f"document.querySelector('#tools').value = {json.dumps(json.dumps([WEATHER]))}")
    browser.run("makeRequest = (make => () => ({...make(), tool_choice: 'required', temperature: 0}))(makeRequest)")
    browser.type("#say", ASK[0]["content"] + " <b id=x>\n")
    wait_until(lambda: "held to tools" in "".join(browser.texts(".assistant .note")))
    assert browser.texts(".call")[0].startswith("get_weather {")
    assert browser.run("document.querySelector('#x')") is None
    assert browser.complaints() == []


def test_errors_and_keys(demo_pack: Callable[[int], Path], browser: Browser) -> None:
    with serve(demo_pack(4), Policy(api_key="correct horse")) as served:
        browser.open(f"{served.url}/")
        browser.type("#say", "Hello\n")
        wait_until(lambda: "API key is missing" in "".join(browser.texts(".error")))
        browser.type("#key", "correct horse")
        browser.type("#say", "Hello\n")
        wait_until(lambda: "generated" in "".join(browser.texts(".note")))

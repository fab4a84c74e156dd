"""moe-run serve as a process, and what only shows over many requests: memory, strange bodies, a 2-bit model's calls."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moepack.runtime import Engine
from moepack.runtime.cli import main
from moepack.runtime.evaluate import evaluate_tools, read_tool_prompts
from moepack.runtime.service import Settings
from served import serve

RUN = [sys.executable, "-c", "from moepack.runtime.cli import main; main()", "serve"]
TOOLS = Path(__file__).parent / "data" / "tools.jsonl"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
RSS_TOLERANCE = 4 * 2**20  # arenas of the allocator; 1700 leaks of 2.5 KB would be seen


@contextlib.contextmanager
def process(pack: Path, *options: object) -> Iterator[str]:
    """moe-run serve in a process of its own; gives its address."""
    command = [*RUN, str(pack), "--port", "0", "--threads", "1", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        assert server.stderr
        try:
            for line in server.stderr:
                if found := re.match(r"serving (\S+) at (http://\S+)", line):
                    break
            else:
                pytest.fail("the server ended before it served")
            # It writes a line about each request: unread, they would fill the pipe and stop it.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield found[2]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
            assert server.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: give --api-key-file"),
        (["--host", "::"], "give --api-key-file"),
        (["--api-key-file", "none"], "none: cannot be read as a key"),
        (["--host", "256.1.1.1", "--api-key-file", "KEY"], "256.1.1.1:8080: .*: choose another --host or --port"),
        (["--max-waiting", "3"], "max-waiting"),
        (["--snapshot-dir", "KEY"], r"^error: --snapshot-dir \S+key: is no directory: give another, or one that .*\n$"),
    ],
)
def test_what_cannot_be_served_is_said(
    demo_pack: Callable[[int], Path],
    options: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "key").write_text("correct horse battery".replace(" ", "-"))
    options = [str(tmp_path / "key") if option == "KEY" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["moe-run", "serve", str(demo_pack(2)), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.search(reason, capsys.readouterr().err)


def test_the_budget_that_a_refusal_names_is_enough(demo_pack: Callable[[int], Path]) -> None:
    """Though what is set aside for snapshots grows with the budget."""
    command = [*RUN, str(demo_pack(2)), "--port", "0", "--threads", "1", "--memory", "300MiB"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    needed = re.search(r"([\d,]+) MiB are needed .* snapshots \d+ \(1/10 of --memory\)", refused.stderr)
    assert needed, refused.stderr
    with process(demo_pack(2), "--memory", f"{needed[1]}MiB") as url:
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_memory_is_flat_over_many_requests(demo_pack: Callable[[int], Path]) -> None:
    with process(demo_pack(2), "--memory", "700MiB") as url, httpx.Client(base_url=url, timeout=120) as client:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}

        def ask(number: int) -> None:
            body = HELLO | {"max_tokens": 2, "stream": number % 2 == 0}
            if number % 3 == 0:
                body |= {"tools": [tool], "tool_choice": "required"}
            if number % 5 == 0:
                body |= {"temperature": -1}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == (400 if number % 5 == 0 else 200)

        for number in range(300):
            ask(number)
        before = client.get("/stats").json()["resident_bytes"]
        for number in range(1700):
            ask(number)
        stats = client.get("/stats").json()
        assert stats["resident_bytes"] - before < RSS_TOLERANCE
        assert stats["resident_bytes"] < stats["budget_bytes"]


@pytest.mark.slow
def test_a_next_turn_computes_what_is_new_after_a_restart_too(demo_pack: Callable[[int], Path], tmp_path: Path) -> None:
    turns = [
        *HELLO["messages"],
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
    ]
    first = HELLO | {"messages": [{"role": "system", "content": "Be terse. " * 30}, *HELLO["messages"]]}
    second = HELLO | {"messages": [first["messages"][0], *turns]}
    answers = []
    for _ in range(2):
        with process(demo_pack(2), "--snapshot-dir", tmp_path / "states") as url:
            for body in (first, second):
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
                answers.append((answer["choices"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]))
    assert answers[0][1] == 0
    assert answers[1][1] > 0
    assert answers[2][1] > 0  # the process is another one
    assert [choices for choices, _ in answers[:2]] == [choices for choices, _ in answers[2:]]


@pytest.mark.slow
def test_all_calls_of_a_two_bit_pack_are_well_formed(demo_pack: Callable[[int], Path]) -> None:
    prompts = read_tool_prompts(TOOLS)[:24]
    with Engine.open(demo_pack(2)) as engine:  # this process may have grown by then
        scores = evaluate_tools(engine, prompts, is_constrained=True)
    assert scores.n == len(prompts)
    assert scores.well_formed == 1


@pytest.mark.slow
def test_nothing_that_the_openapi_allows_breaks_the_server(demo_pack: Callable[[int], Path], tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        pytest.skip("needs schemathesis: make test-slow installs it")
    with serve(demo_pack(2), settings=Settings(max_seconds=0.05)) as served:
        options = ["--checks", "not_a_server_error,status_code_conformance,unsupported_method", "--seed", "1"]
        options += ["--max-examples", "50", "--phases", "examples,coverage,fuzzing", "--no-color"]
        command = [str(program), "run", f"{served.url}/openapi.json", *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert run.returncode == 0, run.stdout[-4000:]
        assert httpx.get(f"{served.url}/health").status_code == 200

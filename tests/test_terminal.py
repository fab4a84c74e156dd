"""moe-run chat: the conversation, its commands, stopping an answer, tools that run only when agreed to."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack.layout.errors import UsageError
from moepack.runtime import local_tools
from moepack.runtime.answer import ReasoningPiece, TextPiece, ToolCall
from moepack.runtime.conversation import Conversation
from moepack.runtime.engine import Engine
from moepack.runtime.local_tools import LocalTools
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.terminal import ChatSettings, Terminal

GREEDY = SamplingParams(temperature=0, max_tokens=40)
READY = b"\x1b[?2004h"  # a prompt begins by asking the terminal to bracket what is pasted
CALL = ToolCall("now", {"zone": "UTC"})


@pytest.fixture(scope="module")
def engine(demo_pack: Callable[[int], Path]) -> Engine:
    return Engine.open(demo_pack(4), snapshot_bytes=2**26)


@pytest.fixture
def talk(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """talk(lines) has a scripted conversation: (the terminal afterwards, stdout, stderr)."""

    def run(lines: str, conversation: Conversation | None = None, **settings: Any) -> tuple[Terminal, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        template = engine.chat_template()
        assert template is not None
        chosen = ChatSettings(**{"sampling": GREEDY} | settings)
        terminal = Terminal(engine, template, conversation or Conversation(), chosen)
        terminal.run()
        captured = capsys.readouterr()
        return terminal, captured.out, captured.err

    return run


def test_turns_are_remembered_and_answered_as_the_engine_answers(engine: Engine, talk: Any) -> None:
    terminal, out, _ = talk("Hello \\\nthere.\nTell me a story about a fox.\n")
    messages = terminal.conversation.messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "Hello \nthere."
    template = engine.chat_template()
    assert template is not None
    prompt = template.render(messages[:3])
    expected = engine.tokenizer.decode(list(engine.generate(engine.tokenizer.encode(prompt), GREEDY)))
    reasoning, _, answer = expected.partition("</think>")
    assert messages[3]["reasoning_content"] == reasoning.strip()
    assert messages[3]["content"] == answer.strip()
    assert answer.strip() in out


def test_the_next_turn_computes_what_is_new(talk: Any) -> None:
    terminal, _, _ = talk("/system " + "Be kind and brief. " * 12 + "\nHello.\nAnd you?\n")
    assert terminal.last_stats.cached_tokens >= 64


def test_the_last_answer_is_read_while_the_user_types(engine: Engine) -> None:
    template = engine.chat_template()
    assert template is not None
    settings = ChatSettings(SamplingParams(temperature=0, max_tokens=120, ignore_eos=True))
    terminal = Terminal(engine, template, Conversation(thinking=False), settings)
    terminal._is_terminal = True
    lines, expected = iter(["Tell me of a fox.", "And of a hare?", None]), []

    def read_line(_: str) -> str | None:
        terminal._worker.submit(int).result()  # comes after what is read ahead
        if terminal.conversation.messages:
            expected.append(len(terminal.conversation.expect(template, engine.tokenizer.encode)))
        return next(lines)

    terminal._read_line = read_line
    terminal.run()
    assert terminal.last_stats is not None
    assert terminal.last_stats.cached_tokens == expected[0] // 64 * 64 > 0  # the question alone is shorter


def test_a_message_ends_what_is_read_ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    template = engine.chat_template()
    assert template is not None
    terminal = Terminal(engine, template, Conversation(), ChatSettings(GREEDY))
    terminal.conversation.add_user("Hello.")
    terminal._is_terminal = True
    checks = []

    def read_without_end(_: list[int], check: Callable[[float], None]) -> None:
        while True:
            checks.append(0)
            check(0.0)

    monkeypatch.setattr(engine, "read_ahead", read_without_end)
    terminal._read_line = lambda _: None
    terminal.run()
    assert checks


def test_commands(talk: Any, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    terminal, out, err = talk(
        f"/help\n/system Be brief.\nHello.\n/save {saved}\n/clear\n/load {saved}\n/stats\n/think off\n/think hide\n"
        "/temperature 0.5\n/quit\nnot read\n"
    )
    for command in ("help", "system", "temperature", "stats", "save", "load", "tools", "clear", "retry", "quit"):
        assert f"/{command}" in out
    assert "prompt_tokens" in out
    assert "error" not in err
    assert terminal.conversation.system == "Be brief."
    assert len(terminal.conversation.messages) == 2
    assert terminal.conversation.thinking is False
    assert terminal.settings.sampling.temperature == 0.5
    assert not terminal.settings.show_thinking
    assert "not read" not in json.dumps(terminal.conversation.messages)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/nope", "/nope: no such command"),
        ("/temperature warm", "/temperature warm: expected a number"),
        ("/temperature -1", "temperature must be a number >= 0"),
        ("/think maybe", "/think maybe: expected on, off, hide or show"),
        ("/save", "/save: expected a file name"),
        ("/load nowhere.json", "nowhere.json: cannot be read"),
        ("/tools nowhere.json", "nowhere.json: cannot be read"),
        ("/retry", "nothing has been asked yet"),
        ("word " * 3000, "tokens, the model's context holds 2048"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(talk: Any, line: str, text: str) -> None:
    terminal, _, err = talk(f"{line}\nHello.\n")
    assert text in err
    assert "Traceback" not in err
    assert [message["content"] for message in terminal.conversation.messages[:1]] == ["Hello."]


def test_a_conversation_past_the_planned_context_tells_the_options_of_a_chat(
    engine: Engine, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "max_context", 64)
    terminal, _, err = talk("Hello.\n" + "word " * 80 + "\n")
    assert "tokens, memory was planned for 64: /clear forgets what was said, and a larger --context has" in err
    assert "max_context" not in err
    assert [message["role"] for message in terminal.conversation.messages] == ["user", "assistant"]


def test_an_interrupt_stops_the_answer_and_keeps_what_was_written(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepack.runtime import terminal as module

    shown = module._Printer.show

    def show_then_interrupt(printer: Any, pieces: Any) -> None:
        before = len(printer.pieces)
        shown(printer, pieces)
        if before < 3 <= len(printer.pieces):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module._Printer, "show", show_then_interrupt)
    handler = signal.getsignal(signal.SIGINT)
    terminal, _, err = talk("Tell me a story about a fox.\n")
    assert "stopped" in err
    assert signal.getsignal(signal.SIGINT) is handler
    (_, answer) = terminal.conversation.messages
    assert 0 < len(answer.get("reasoning_content", "") + answer["content"]) < 60


def test_a_retry_has_another_seed(talk: Any) -> None:
    warm = SamplingParams(temperature=1.5, max_tokens=20)
    terminal, _, _ = talk("Tell me a story.\n/retry\n", sampling=warm)
    again, _, _ = talk("Tell me a story.\n", sampling=warm)
    assert len(terminal.conversation.messages) == 2
    assert terminal.conversation.messages[1] != again.conversation.messages[1]


# Tools


@pytest.fixture
def tools_file(tmp_path: Path) -> Path:
    """One tool that echoes its arguments into a file, and one that the user answers."""
    log = tmp_path / "ran"
    program = f"import sys; text = sys.stdin.read(); open({str(log)!r}, 'w').write(text); print('noon')"
    function = {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
    entries = [
        {"type": "function", "function": function, "command": [sys.executable, "-c", program]},
        {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {}}}},
    ]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(("reply", "ran"), [("y", True), ("n", False), ("", False)])
def test_a_call_runs_only_after_a_yes(
    talk: Any, tools_file: Path, tmp_path: Path, reply: str, ran: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = LocalTools.load(tools_file)
    terminal, out, _ = talk("/tools\n", tools=tools)
    assert "now: " in out
    assert "ask: answered by you" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{reply}\n"))
    result = terminal._call_tool(CALL)
    assert (tmp_path / "ran").exists() == ran
    assert result == ("noon" if ran else "The user did not allow this call.")
    if ran:
        assert json.loads((tmp_path / "ran").read_text()) == CALL.arguments


def test_the_user_answers_a_call_that_no_command_serves(
    talk: Any, tools_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, _, _ = talk("", tools=LocalTools.load(tools_file))
    monkeypatch.setattr(sys, "stdin", io.StringIO("forty-two\n\n"))
    assert terminal._call_tool(ToolCall("ask", {})) == "forty-two"
    assert terminal._call_tool(ToolCall("ask", {})) is None


def test_a_failing_command_is_a_result(tmp_path: Path) -> None:
    tools = LocalTools([], {"bad": [sys.executable, "-c", "raise SystemExit(3)"], "none": ["/no/such/program"]})
    assert "exit code 3" in tools.run("bad", {})
    assert "cannot be run" in tools.run("none", {})


def test_what_a_slow_command_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_tools, "TIMEOUT_S", 0.5)
    tools = LocalTools([], {"slow": ["sh", "-c", f"(sleep 1; touch {tmp_path}/late) & sleep 30"]})
    started = time.monotonic()
    assert tools.run("slow", {}) == "error: no result after 0.5 seconds"
    assert time.monotonic() - started < 10
    time.sleep(1)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("{", "is no valid JSON"),
        ("{}", "expected a list of tools"),
        ("[1]", "entry 0: expected a function with a name"),
        ('[{"function": {"name": "x"}, "command": "ls"}]', "entry 0: expected command as a list of strings"),
    ],
)
def test_a_bad_tools_file_is_refused(tmp_path: Path, raw: str, text: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(raw)
    with pytest.raises(UsageError, match=text):
        LocalTools.load(path)


# Conversations


def test_a_conversation_survives_its_file(tmp_path: Path) -> None:
    conversation = Conversation("Be brief.", tools=[{"type": "function", "function": {"name": "now"}}], thinking=False)
    conversation.add_user("Grüße")
    calls = conversation.add_answer([ReasoningPiece("Hm. "), TextPiece("I ask."), CALL])
    conversation.add_tool_result("noon")
    conversation.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == conversation
    assert calls == [CALL]
    assert conversation.take_back() == "Grüße"
    assert conversation.messages == []
    assert conversation.take_back() is None


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("[", "is no valid JSON"),
        ("[]", "expected a saved conversation"),
        ('{"messages": [{"role": "robot"}]}', "expected messages with a role"),
        ('{"messages": [], "system": 1}', "expected system as text"),
    ],
)
def test_a_bad_conversation_file_is_refused(tmp_path: Path, raw: str, text: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(raw)
    with pytest.raises(UsageError, match=text):
        Conversation.load(path)


# At a real terminal


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(demo_pack: Callable[[int], Path]) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [str(Path(sys.executable).with_name("moe-run")), "chat", str(demo_pack(4)), "--temperature", "0"]
    command += ["--device", "reference"]  # slow enough that the answer is still being written when it is stopped
    terminal_environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=terminal_environment)
    os.close(child)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            ready, _, _ = select.select([parent], [], [], max(0, deadline - time.monotonic()))
            assert ready, seen
            seen += os.read(parent, 65536)
        seen = seen.partition(text)[2]

    try:
        wait_for(READY)
        os.write(parent, b"Tell me a story about a fox.\r")
        wait_for(b"Ctrl-C stops")  # the line at the foot
        process.send_signal(signal.SIGINT)
        wait_for(b"stopped")
        wait_for(READY)
        os.write(parent, b"Hello.\r")
        wait_for(b" prompt")  # the statistics: the session goes on
        wait_for(READY)
        os.write(parent, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(parent)

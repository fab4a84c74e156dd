"""The Anthropic API, driven by Anthropic's own client against a served pack of the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic

from served import Served, serve

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ASK: list[Any] = [{"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the weather for a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
BARE: Any = {"type": "disabled"}


@pytest.fixture(scope="module")
def served(demo_pack: Callable[[int], Path]) -> Iterator[Served]:
    with serve(demo_pack(2), snapshot_bytes=64 * 2**20) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Anthropic:
    return Anthropic(base_url=served.url, api_key="any", max_retries=0, timeout=120)


def ask(client: Anthropic, messages: list[Any] = HELLO, **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": "demo", "max_tokens": 64, "extra_body": {"temperature": 0}}
    return client.messages.create(messages=messages, **defaults | options)


def test_thinking_and_text_are_blocks(client: Anthropic) -> None:
    answer = ask(client)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[1].text.startswith("Hello")
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0
    bare = ask(client, thinking=BARE, system=[{"type": "text", "text": "Be terse."}])
    assert [block.type for block in bare.content] == ["text"]
    assert ask(client, max_tokens=2).stop_reason == "max_tokens"


def test_a_stream_is_the_answer_in_events(client: Anthropic) -> None:
    whole = ask(client)
    with client.messages.stream(model="demo", max_tokens=64, messages=HELLO, extra_body={"temperature": 0}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.model_dump() for block in final.content] == [block.model_dump() for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


def test_stop_sequences(client: Anthropic) -> None:
    plain = ask(client, thinking=BARE).content[0].text
    word = plain.split()[2]
    stopped = ask(client, thinking=BARE, stop_sequences=["never written", word])
    assert stopped.content[0].text == plain.partition(word)[0]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_tools_from_call_to_answer(client: Anthropic) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200, "thinking": BARE}
    first = ask(client, ASK, tool_choice={"type": "tool", "name": "get_weather"}, **options)
    assert first.stop_reason == "tool_use"
    [call] = [block for block in first.content if block.type == "tool_use"]
    assert type(call.input["city"]) is str
    assert type(call.input["days"]) is int
    with client.messages.stream(
        model="demo", messages=ASK, tool_choice={"type": "any"}, extra_body={"temperature": 0}, **options
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert (streamed[0].name, streamed[0].input) == (call.name, call.input)
    assert "".join(pieces) == json.dumps(call.input, ensure_ascii=False)
    assert len(pieces) > 2
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": '{"sky": "clear"}'}]}
    turns = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = ask(client, turns, tool_choice={"type": "none"}, **options)
    assert last.stop_reason == "end_turn"
    assert last.content[0].text
    assert last.usage.cache_read_input_tokens > 0


def test_the_prompt_is_that_of_the_other_api(served: Served, client: Anthropic) -> None:
    function = {"name": "get_weather", "description": WEATHER["description"], "parameters": WEATHER["input_schema"]}
    history = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Need it.", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Paris", "days": 3}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "4"}]},
    ]
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3}'},
    }
    same = [
        {"role": "system", "content": "Be terse."},
        *ASK,
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Need it.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]
    template = served.engine.chat_template()
    assert template is not None
    expected = template.render(same, [{"type": "function", "function": function}])
    counted = client.messages.count_tokens(model="demo", messages=history, system="Be terse.", tools=[WEATHER])
    assert counted.input_tokens == len(served.engine.tokenizer.encode(expected))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "system", "content": "Hi"}]}, r"messages\[0\]: expected .* role user or assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "holds image, .* text model only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"messages\[0\].content\[0\]: expected"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content: expected"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": None}, "max_tokens: "),
        ({"temperature": -1}, "temperature must be"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice: expected"),
        ({"tools": [{"name": "f", "type": "bash_20250124"}]}, r"tools\[0\]: expected"),
        ({"thinking": {"type": "sometimes"}}, "thinking: expected"),
    ],
)
def test_what_is_wrong_is_said(served: Served, change: dict[str, Any], reason: str) -> None:
    body = {"model": "demo", "messages": HELLO, "max_tokens": 4} | change
    answer = httpx.post(f"{served.url}/v1/messages", content=json.dumps(body))
    assert answer.status_code == 400
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert re.search(reason, error["error"]["message"]), error


def test_the_client_raises_its_own_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages is empty"):
        ask(client, [])

"""The OpenAI API, driven by OpenAI's own client against a served pack of the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from moepack.runtime import SamplingParams
from moepack.runtime.answer import (
    ArgumentsPiece,
    CallStart,
    TextPiece,
    ToolCall,
    opens_reasoning,
    parse_tool_calls,
    split_reasoning,
)
from moepack.runtime.guard import Policy
from moepack.runtime.openai_api import _Deltas
from moepack.runtime.service import Settings
from served import Served, serve, wait_until

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a fox."}]
BARE: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "days": {"type": "integer", "description": "How many days"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "days"],
        },
    },
}
TIMER: Any = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer"}, "loud": {"type": "boolean"}},
            "required": ["minutes", "loud"],
        },
    },
}
ASK: list[Any] = [{"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}]


@pytest.fixture(scope="module")
def served(demo_pack: Callable[[int], Path]) -> Iterator[Served]:
    with serve(demo_pack(2), snapshot_bytes=64 * 2**20) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=120)


def chat(client: OpenAI, messages: list[Any] = HELLO, **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 64}
    return client.chat.completions.create(messages=messages, **defaults | options)


def collect(chunks: Any) -> dict[str, Any]:
    """A stream, joined."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "logprobs": [], "ends": [], "usage": None}
    for chunk in chunks:
        found["usage"] = chunk.usage or found["usage"]
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    found["calls"].append((call.index, call.function.name, [call.function.arguments]))
                else:
                    found["calls"][call.index][2].append(call.function.arguments)
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            found["ends"] += [choice.finish_reason] if choice.finish_reason else []
    return found


def test_the_model_is_listed(served: Served, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}])
def test_answers_are_those_of_generate(served: Served, client: OpenAI, options: dict[str, Any]) -> None:
    answer = chat(client, STORY, max_tokens=40, extra_body={"top_k": 12, "min_p": 0.01}, **options)
    template = served.engine.chat_template()
    assert template is not None
    prompt = template.render(STORY)
    sampling = served.engine.default_sampling(top_k=12, min_p=0.01, max_tokens=40, **options)
    generation = served.engine.generate(served.engine.tokenizer.encode(prompt), sampling)
    reasoning, text = split_reasoning(served.engine.tokenizer.decode(list(generation)), opens_reasoning(prompt))
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (reasoning, text)
    assert answer.choices[0].finish_reason == generation.finish_reason
    assert answer.usage.completion_tokens == len(generation.token_ids)


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client, logprobs=True)
    parts = collect(chat(client, logprobs=True, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    assert (parts["content"], parts["reasoning"]) == (message.content, message.reasoning_content)
    assert parts["ends"] == [whole.choices[0].finish_reason] == ["stop"]
    assert parts["usage"].completion_tokens == whole.usage.completion_tokens == len(parts["logprobs"])
    assert parts["logprobs"] == whole.choices[0].logprobs.content
    assert collect(chat(client, stream=True))["usage"] is None


def test_thinking_can_be_turned_off(client: OpenAI) -> None:
    answer = chat(client, extra_body=BARE)
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.choices[0].message.content.startswith("Hello")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert chat(client).usage.completion_tokens_details.reasoning_tokens > 0


def test_logprobs_cover_every_token(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, extra_body=BARE)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:  # greedy: the chosen one is the likeliest
        assert [one.logprob for one in token.top_logprobs] == sorted(
            (o.logprob for o in token.top_logprobs), reverse=True
        )
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
    assert bytes(byte for token in content for byte in token.bytes).decode() == answer.choices[0].message.content
    assert content[-1].token == "<|im_end|>"
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_sampling_options_do_what_they_say(served: Served, client: OpenAI) -> None:
    first = served.engine.tokenizer.encode("Hello")[0]
    plain = chat(client, extra_body=BARE).choices[0].message.content
    banned = chat(client, extra_body=BARE, logit_bias={str(first): -100}).choices[0].message.content
    assert plain.startswith("Hello")
    assert not banned.startswith("Hello")
    forced = chat(client, extra_body=BARE, logit_bias={str(first): 100}, max_tokens=4).choices[0]
    assert (forced.message.content, forced.finish_reason) == ("Hello" * 4, "length")
    penalized = chat(client, extra_body=BARE, logit_bias={str(first): 20}, frequency_penalty=2, max_tokens=30)
    assert penalized.choices[0].message.content.count("Hello") < 30
    seeds = [chat(client, STORY, temperature=1.5, seed=seed, max_tokens=12).choices[0].message for seed in (1, 1, -2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert chat(client, STORY, max_completion_tokens=3, max_tokens=None).usage.completion_tokens == 3


def test_stop_strings_end_the_answer(client: OpenAI) -> None:
    plain = chat(client, extra_body=BARE).choices[0].message.content
    word = plain.split()[2]
    for stop in (word, ["never written", word]):
        stopped = chat(client, extra_body=BARE, stop=stop)
        assert stopped.choices[0].message.content == plain.partition(word)[0]
        assert stopped.choices[0].finish_reason == "stop"
        assert collect(chat(client, extra_body=BARE, stop=stop, stream=True))["content"] == plain.partition(word)[0]


@pytest.mark.parametrize("thinking", [False, True])
def test_tools_are_called(served: Served, client: OpenAI, thinking: bool) -> None:
    options = {"tools": [WEATHER, TIMER], "max_tokens": 200, "extra_body": {} if thinking else BARE}
    answer = chat(client, ASK, tool_choice="required", **options)
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    assert answer.choices[0].message.content is None or thinking
    arguments = json.loads(call.function.arguments)
    check_call(call.function.name, arguments)
    parts = collect(chat(client, ASK, tool_choice="required", stream=True, **options))
    assert_same_calls(parts["calls"], answer.choices[0].message.tool_calls)
    assert len(parts["calls"][0][2]) > 2, "name, then arguments, which do not come all at once"
    assert parts["ends"] == ["tool_calls"]
    assert answer.usage.constrained == "tools:required"
    assert 0 < answer.usage.constrained_tokens <= answer.usage.completion_tokens


def assert_same_calls(streamed: list[tuple[int, str, list[str]]], whole: list[Any]) -> None:
    expected = [(n, call.function.name, call.function.arguments) for n, call in enumerate(whole)]
    assert [(index, name, "".join(pieces)) for index, name, pieces in streamed] == expected


@pytest.mark.parametrize("seed", range(3))
def test_calls_of_any_arguments_stream_to_the_same_json(client: OpenAI, seed: int) -> None:
    """Of a model that hardly knows what it writes: quotes, backslashes and line ends in text; nested JSON, numbers."""
    properties = {
        "text": {"type": "string"},
        "more": {"type": "string"},
        "either": {"type": ["string", "integer"]},
        "list": {"type": "array", "items": {"type": "object"}},
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tools = [{"type": "function", "function": {"name": "note", "parameters": parameters}}]
    options = {"tools": tools, "tool_choice": "required", "temperature": 1.3, "seed": seed, "max_tokens": 400}
    whole = chat(client, extra_body=BARE, **options)
    parts = collect(chat(client, stream=True, extra_body=BARE, **options))
    calls = whole.choices[0].message.tool_calls or []
    assert_same_calls(parts["calls"][: len(calls)], calls)
    assert parts["ends"] == [whole.choices[0].finish_reason]
    if parts["ends"] == ["tool_calls"]:
        assert (len(parts["calls"]), parts["content"]) == (len(calls), whole.choices[0].message.content or "")


def test_a_call_that_is_cut_stays_unfinished_in_a_stream(client: OpenAI) -> None:
    """As text where the whole answer is sent at once, for nothing else in it could be told to be half a call."""
    options = {"tools": [WEATHER], "tool_choice": "required", "extra_body": BARE}
    whole = chat(client, ASK, max_tokens=200, **options).choices[0].message.tool_calls[0].function
    [length] = {len(chat(client, ASK, max_tokens=200, logprobs=True, **options).choices[0].logprobs.content)}
    parts = collect(chat(client, ASK, stream=True, max_tokens=length - 8, **options))
    [(_, name, pieces)] = parts["calls"]
    assert (name, parts["content"], parts["ends"]) == (whole.name, "", ["length"])
    assert whole.arguments.startswith("".join(pieces))
    assert whole.arguments != "".join(pieces)
    cut = chat(client, ASK, max_tokens=length - 8, **options).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content.lstrip().startswith("<tool_call>")


def test_a_call_after_what_was_begun_as_one_and_is_none() -> None:
    """The grammar of a call can fail within it; the rest is then text, and later calls come whole."""
    pieces = CallStart("f"), ArgumentsPiece('{"a'), TextPiece("<tool_call>"), ToolCall("g", {}), ToolCall("h", {})
    deltas = _Deltas()
    told = [deltas.add(piece) for piece in pieces]
    calls = [delta["tool_calls"][0] for delta in told if delta and "tool_calls" in delta]
    assert [(call["index"], call["function"].get("name")) for call in calls] == [
        (0, "f"),
        (0, None),
        (1, "g"),
        (2, "h"),
    ]


def check_call(name: str, arguments: dict[str, Any]) -> None:
    """A call of one of the two tools, with arguments that fit its schema."""
    properties = {"get_weather": {"city": str, "days": int, "unit": str}, "set_timer": {"minutes": int, "loud": bool}}
    required = {"get_weather": {"city", "days"}, "set_timer": {"minutes", "loud"}}
    assert required[name] <= arguments.keys() <= properties[name].keys()
    assert all(type(value) is properties[name][key] for key, value in arguments.items())
    assert arguments.get("unit", "celsius") in ("celsius", "fahrenheit")


def test_tool_choice_is_followed(client: OpenAI) -> None:
    tools = {"tools": [WEATHER, TIMER], "max_tokens": 200, "extra_body": BARE}
    named = chat(client, ASK, tool_choice={"type": "function", "function": {"name": "set_timer"}}, **tools)
    assert [call.function.name for call in named.choices[0].message.tool_calls] == ["set_timer"]
    assert named.choices[0].finish_reason == "tool_calls"
    none = chat(client, ASK, tool_choice="none", **tools)
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].finish_reason in ("stop", "length")
    assert "<tool_call>" not in none.choices[0].message.content
    one = chat(client, ASK, tool_choice="required", parallel_tool_calls=False, **tools)
    assert len(one.choices[0].message.tool_calls) == 1
    auto = chat(client, HELLO, **tools)
    assert auto.choices[0].message.tool_calls is None
    assert isinstance(auto.choices[0].message.content, str)


def test_calls_stay_well_formed_when_the_model_would_rather_not(client: OpenAI) -> None:
    """At temperature 3 a bare model writes nothing that parses."""
    for seed in range(4):
        options = {
            "tool_choice": "required",
            "tools": [WEATHER, TIMER],
            "extra_body": BARE,
            "parallel_tool_calls": False,
        }
        answer = chat(client, ASK, temperature=3, top_p=1, seed=seed, max_tokens=400, **options)
        if answer.choices[0].finish_reason == "tool_calls":  # a city may be longer than 400 tokens
            [call] = answer.choices[0].message.tool_calls
            check_call(call.function.name, json.loads(call.function.arguments))


def test_an_agent_loop_runs_from_call_to_answer(client: OpenAI) -> None:
    messages = list(ASK)
    first = chat(client, messages, tools=[WEATHER], tool_choice="required", max_tokens=200, extra_body=BARE)
    call = first.choices[0].message.tool_calls[0]
    messages.append(first.choices[0].message.model_dump(exclude_none=True))
    result = json.dumps({"city": json.loads(call.function.arguments)["city"], "temperature": 21, "sky": "clear"})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    last = chat(client, messages, tools=[WEATHER], tool_choice="none", extra_body=BARE)
    assert last.choices[0].message.content
    assert last.choices[0].finish_reason == "stop"
    assert last.usage.prompt_tokens > first.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # what the first turn has read is not read again


@pytest.mark.parametrize("temperature", [0, 2])
def test_json_fits_the_schema(client: OpenAI, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"type": "integer", "enum": [2, 4]}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    answer = chat(client, STORY, response_format=form, temperature=temperature, seed=1, max_tokens=200, extra_body=BARE)
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"name", "legs"}
    assert value["legs"] in (2, 4)
    assert len(value["name"]) <= 12
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.constrained == "json"


def test_json_of_any_kind_begins_as_an_object(client: OpenAI) -> None:
    answer = chat(client, STORY, response_format={"type": "json_object"}, max_tokens=40, extra_body=BARE)
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_texts_are_continued(served: Served, client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12}
    answer = client.completions.create(prompt="Once upon a time", logprobs=2, **options)
    ids = served.engine.tokenizer.encode("Once upon a time")
    generation = served.engine.generate(ids, SamplingParams(temperature=0, max_tokens=12))
    assert answer.choices[0].text == served.engine.tokenizer.decode(list(generation))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(generation.token_ids)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == answer.choices[0].text
    stream = client.completions.create(prompt=["Once upon a time"], stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    assert client.completions.create(model="demo", prompt="A").usage.completion_tokens <= 16  # type: ignore[union-attr]


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "Hi"}, "messages: "),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content: expected a string"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "role"),
        ({"messages": IMAGE}, r"messages\[0\].content\[0\] holds image, .* text model only"),
        ({"messages": [{"role": "user", "content": "a " * 4000}]}, "the prompt has .* tokens, .* holds 2048"),
        ({"temperature": -0.1}, "temperature must be a number >= 0, got -0.1"),
        ({"temperature": "hot"}, "temperature: "),
        ({"temperature": True}, "temperature: "),
        ({"top_p": 0}, "top_p must be"),
        ({"top_k": -3}, "top_k must be"),
        ({"min_p": 2}, "min_p must be"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"max_completion_tokens": -1}, "max_tokens must be"),
        ({"presence_penalty": 3}, "presence_penalty must be"),
        ({"frequency_penalty": -3}, "frequency_penalty must be"),
        ({"n": 2}, "n must be 1, got 2"),
        ({"stop": [""]}, "stop: expected"),
        ({"stop": ["a"] * 17}, "stop: expected at most 16"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids, found 'x'"),
        ({"logit_bias": {"99999": 1}}, "outside the vocabulary of 4096"),
        ({"logit_bias": {"1": 101}}, "logit_bias of token 1 must be"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: expected"),
        ({"tools": [WEATHER, WEATHER]}, "is there twice"),
        ({"tools": [{"type": "function", "function": {"name": "a>b"}}]}, "without < and >"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "there is no tool 'f'"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice: expected"),
        ({"response_format": {"type": "xml"}}, "response_format: expected"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "zebra"}}}},
            "cannot be held to",
        ),
        ({"functions": [{}]}, "send tools"),
        ({"modalities": ["audio"]}, "text model"),
        ({"chat_template_kwargs": {"tools": []}}, "cannot be given there"),
        ({"chat_template_kwargs": {"self": 2}}, "cannot be given there"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
    ],
)
def test_what_is_wrong_is_said(served: Served, change: dict[str, Any], reason: str) -> None:
    answer = httpx.post(
        f"{served.url}/v1/chat/completions", content=json.dumps({"model": "demo", "messages": HELLO} | change)
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(reason, error["message"]), error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b'{"messages": ' + b"[" * 100_000, b"{}"])
def test_bodies_that_are_no_requests_are_refused(served: Served, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
        answer = httpx.post(f"{served.url}{path}", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be") as caught:
        chat(client, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": "a " * 4000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="demo", input="a")


def test_other_roles_and_forms_of_content(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(client, [{"role": "user", "content": parts}]).choices == chat(client).choices
    terse = [{"role": "developer", "content": "Be terse."}, *HELLO]
    assert chat(client, terse).choices == chat(client, [{"role": "system", "content": "Be terse."}, *HELLO]).choices


def test_a_client_that_goes_away_ends_its_generation(served: Served, client: OpenAI) -> None:
    endless = {str(id_): -100 for id_ in served.engine.tokenizer.stop_token_ids}
    cancelled = served.service.metrics.requests.labels("cancelled")
    before = cancelled._value.get()
    stream = chat(client, STORY, stream=True, max_tokens=1900, logit_bias=endless)
    for _ in zip(range(5), stream):
        pass
    assert served.service.scheduler.running
    stream.close()
    wait_until(lambda: not served.service.scheduler.running)
    with pytest.raises(openai.APITimeoutError):  # not a stream, and it gives up
        chat(client, STORY, max_tokens=1900, logit_bias=endless, timeout=0.3)
    wait_until(lambda: cancelled._value.get() == before + 2)
    assert served.service.scheduler.waiting == 0


def test_many_clients_get_their_own_answers(served: Served, client: OpenAI) -> None:
    prompts = [f"Hello, my name is {name}." for name in ("Anna", "Bert", "Carla", "Dora", "Emil", "Frida")]

    def ask(prompt: str) -> Any:
        return chat(client, [{"role": "user", "content": prompt}], max_tokens=16, extra_body=BARE).choices

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, prompts * 2))
    assert together == alone * 2


def test_metrics_are_counted(served: Served, client: OpenAI) -> None:
    chat(client)
    text = httpx.get(f"{served.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['moepack_requests_total{end="stop"}']) >= 1
    for name in ("prompt_tokens", "generated_tokens", "expert_hits", "expert_misses", "read_bytes"):
        assert float(values[f"moepack_{name}_total"]) > 0
    assert float(values["moepack_ttft_seconds_count"]) >= 1
    stats = httpx.get(f"{served.url}/stats").json()
    assert len(stats["hits"]) == len(stats["misses"]) == served.engine.architecture.num_hidden_layers
    assert sum(stats["hits"]) > 0


def test_a_bare_server_says_what_it_cannot_do(demo_pack: Callable[[int], Path]) -> None:
    settings = Settings(constrain=False, quiet_seconds=0.001, max_waiting=64)
    with serve(demo_pack(2), Policy(api_key="correct horse"), settings) as served:
        bare = OpenAI(base_url=f"{served.url}/v1", api_key="correct horse", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="--no-constrain"):
            chat(bare, ASK, tools=[WEATHER], tool_choice="required")
        answer = chat(bare, ASK, tools=[WEATHER], extra_body=BARE)
        assert answer.usage.constrained is None
        template = served.engine.chat_template()
        assert template is not None
        prompt = template.render(ASK, [WEATHER], enable_thinking=False)
        sampling = SamplingParams(temperature=0, max_tokens=64)
        text = served.engine.tokenizer.decode(
            list(served.engine.generate(served.engine.tokenizer.encode(prompt), sampling))
        )
        rest, calls = parse_tool_calls(text, [WEATHER])
        assert len(answer.choices[0].message.tool_calls or []) == len(calls)
        assert (answer.choices[0].message.content or "") == rest
        for key in ("wrong", "correct hors", "correct horse "[:-1] + "e", "ключ"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = httpx.get(f"{served.url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        # A stream that has nothing to say yet says so, in comments, which the client above would skip.
        body = {"messages": STORY, "stream": True, "max_tokens": 3}
        headers = {"authorization": "Bearer correct horse"}
        raw = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers).text
        assert re.search(r"^: prompt \d+ of \d+ tokens$", raw, re.MULTILINE)
        assert raw.endswith("data: [DONE]\n\n")

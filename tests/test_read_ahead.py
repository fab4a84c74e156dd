"""A conversation over the API: a follow-up turn computes its new tokens alone, and is answered as by a cold engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from moepack.runtime.answer import opens_reasoning, split_reasoning
from moepack.runtime.engine import Engine
from moepack.runtime.service import Settings
from served import Served, serve, wait_until
from test_openai_api import BARE, STORY, WEATHER

QUESTION = {"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": '{"sky": "clear", "degrees": 21}'}


@pytest.fixture(scope="module")
def served(demo_pack: Callable[[int], Path]) -> Iterator[Served]:
    with serve(demo_pack(4), settings=Settings(reads_ahead=True), snapshot_bytes=64 * 2**20) as running:
        yield running


@pytest.fixture(scope="module")
def cold(demo_pack: Callable[[int], Path]) -> Iterator[Engine]:
    with Engine.open(demo_pack(4), threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    ("messages", "options", "follow_up"),
    [
        (STORY, {"extra_body": BARE}, {"role": "user", "content": "And then?"}),
        (STORY, {}, {"role": "user", "content": "And then?"}),
        ([QUESTION], {"tools": [WEATHER], "tool_choice": "required"}, RESULT),
    ],
    ids=["bare", "reasoning", "call"],
)
def test_a_follow_up_computes_what_is_new(
    served: Served, cold: Engine, messages: list[Any], options: dict[str, Any], follow_up: dict[str, Any]
) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=120)
    common: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 500, **options}
    first = client.chat.completions.create(messages=messages, **common)
    assert first.usage is not None
    assert first.choices[0].finish_reason in ("stop", "tool_calls")
    turns = [*messages, first.choices[0].message.model_dump(exclude_none=True), follow_up]
    template = cold.chat_template()
    assert template is not None
    arguments = (common.get("extra_body") or {}).get("chat_template_kwargs", {})
    prompt = template.render(turns, tools=options.get("tools"), **arguments)
    ids = cold.tokenizer.encode(prompt)
    known = len(ids) - len(cold.tokenizer.encode(follow_up["content"] + prompt.rpartition(follow_up["content"])[2]))
    assert known - 64 >= first.usage.prompt_tokens // 64 * 64, "more than is kept before an answer"
    wait_until(lambda: served.engine.snapshots.restore(ids, served.engine.new_state(len(ids))) > known - 64)
    options = {**common, "tool_choice": "none"} if "tools" in common else common
    second = client.chat.completions.create(messages=turns, **options)
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(ids)
    assert second.usage.prompt_tokens_details.cached_tokens > known - 64
    generation = cold.generate(ids, cold.default_sampling(temperature=0, max_tokens=500))
    reasoning, text = split_reasoning(cold.tokenizer.decode(list(generation)), opens_reasoning(prompt))
    message = second.choices[0].message
    assert (getattr(message, "reasoning_content", None), message.content) == (reasoning, text)
    assert second.usage.completion_tokens == len(generation.token_ids)

"""Chat: messages to a prompt exactly as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moepack.layout.errors import MoepackError, UsageError
from moepack.runtime.answer import opens_reasoning
from moepack.runtime.chat import ChatTemplate

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
loaded = ChatTemplate.load(DEMO)
assert loaded is not None
template = loaded

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Stadt> & 'Umgebung'",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
HI: dict[str, Any] = {"role": "user", "content": "Hi"}
HELLO: dict[str, Any] = {"role": "assistant", "content": "Hello"}


def call(arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


OSLO, ROME = call({"city": "Oslo", "days": 3}), call({"city": "Rome"})
ASK: dict[str, Any] = {"role": "user", "content": "Weather in Oslo and Rome?"}
PARALLEL = [
    ASK,
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "Two calls.", "tool_calls": [OSLO, ROME]},
    {"role": "tool", "content": '{"temp": 4}'},
    {"role": "tool", "content": '{"temp": 21}'},
]
VALUES = {"true": True, "no": False, "none": None, "list": [1, "ü"], "map": {"a": {"b": 2.5}}, "text": "a\n<b>\n"}

# name: messages, tools, arguments of the template
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = {
    "user": ([HI], None, {}),
    "no prompt": ([HI, HELLO], None, {"add_generation_prompt": False}),
    "thinking": ([HI], None, {"enable_thinking": True}),
    "no thinking": ([HI], None, {"enable_thinking": False}),
    "system": ([{"role": "system", "content": "Be terse."}, HI], None, {}),
    "several turns": ([HI, HELLO, {"role": "user", "content": " Again \n"}], None, {}),
    "spaces": ([{"role": "user", "content": "  a\n\n b\t\n"}], None, {}),
    "non-ASCII": ([{"role": "user", "content": "Grüße 日本語 👩‍👩‍👧 ​ <b>&amp;</b>"}], None, {}),
    "tools": ([HI], [WEATHER], {}),
    "tools and system": ([{"role": "system", "content": "Be terse."}, HI], [WEATHER, WEATHER], {}),
    "no tools": ([HI], [], {}),
    "parallel calls": (PARALLEL, [WEATHER], {}),
    "calls in the past": ([*PARALLEL, HELLO, HI], [WEATHER], {"enable_thinking": False}),
    "call without text": ([ASK, {"role": "assistant", "content": None, "tool_calls": [OSLO]}], [WEATHER], {}),
    "values": ([HI, {"role": "assistant", "content": "", "tool_calls": [call(VALUES)]}], None, {}),
    "no arguments": ([HI, {"role": "assistant", "content": "", "tool_calls": [call({})]}], None, {}),
    "think tags": ([HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, HI], None, {}),
    "reasoning": ([HI, {"role": "assistant", "content": "Hello", "reasoning": "hm"}], None, {}),
    "nulls": ([{"role": "user", "content": "Hi", "name": None, "tool_calls": None}], None, {}),
    "special text": ([{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}], None, {}),
}

# Templates that use what the demo's does not.
SOURCES = {
    "blocks": "{% for m in messages %}\n  {% if m.content %}\n    {{ m.role }}:\n  {% endif %}\n{% endfor %}\n.\n",
    "loop": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role ~ loop.last }}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem is defined }}<{{ loop.nextitem is defined }}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ tools | tojson(True, separators=(',', ':'), sort_keys=True) }}",
    "names": "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}{{ documents is none }}{{ tools is none }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ 'content' in m }}\n{% endfor %}",
    "generation": "{% for m in messages %}\n{% generation %}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "extra": "{{ enable_thinking }}{{ add_generation_prompt }}{{ namespace(a=1).a }}{{ dict(b=2)['b'] }}{{ range(3) }}",
    "macro": "{% macro show(text) %}{{ text is string }}{{ text | trim | safe }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ show(m.content) }}"
    "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}{{ k ~ v ~ v | string }}"
    "{% endfor %}{% endfor %}{% endfor %}{{ ns.n }}",
    "year": "{{ strftime_now('%Y') }}",
}


def render(name: str) -> str:
    messages, tools, arguments = CONVERSATIONS[name]
    return template.render(messages, tools, **arguments)


def test_prompt_of_one_turn() -> None:
    assert render("user") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert render("no thinking").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert render("no prompt") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n"
    )


def test_prompt_of_several_turns_drops_old_reasoning() -> None:
    assert render("think tags") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_prompt_with_tools_calls_and_results() -> None:
    text = render("parallel calls")
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert "\n" + json.dumps(WEATHER, ensure_ascii=False) + "\n</tools>" in text  # neither ASCII nor HTML escapes
    assert text.endswith(
        "<|im_start|>user\nWeather in Oslo and Rome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo calls.\n</think>\n\nLet me see.\n\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"temp": 4}\n</tool_response>'
        '\n<tool_response>\n{"temp": 21}\n</tool_response>'
        "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("blocks", "    user:\n    assistant:\n."),
        ("loop", "userFalseassistantTrue"),
        ("reasoning", "||True\nhm|hm|True\n"),
        ("names", "<e>FalseTrueTrue"),
        ("generation", "Hi\nHello\n"),
        ("extra", "FalseTrue12range(0, 3)"),
    ],
)
def test_templates_run_with_the_usual_settings(source: str, expected: str) -> None:
    messages = [HI, {"role": "assistant", "content": "Hello", "reasoning": "hm"}]
    ours = ChatTemplate(SOURCES[source], named_tokens={"eos_token": "<e>"})
    assert ours.render(messages, enable_thinking=False) == expected


def test_messages_are_left_as_they_are() -> None:
    messages = [HI, {"role": "assistant", "content": None, "tool_calls": [call('{"city": "Oslo"}')]}]
    before = json.dumps(messages)
    template.render(messages)
    assert json.dumps(messages) == before


def test_arguments_as_json_strings_equal_objects() -> None:
    as_text = {"role": "assistant", "content": "", "tool_calls": [call(json.dumps(VALUES)), call("{}")]}
    as_object = {"role": "assistant", "content": "", "tool_calls": [call(VALUES), call(None)]}
    assert template.render([HI, as_text]) == template.render([HI, as_object])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    assert template.render([{"role": "user", "content": parts}]) == template.render(
        [{"role": "user", "content": "Good day"}]
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, r"content\[0\] holds image"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video"}]}, r"content\[1\] holds video"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "text model only"),
        ({"role": "user", "content": [{"image": "x.png"}]}, "text model only"),
        ({"role": "user", "content": [{"type": "text"}]}, 'expected {"type": "text"'),
        ({"role": "user", "content": ["text"]}, 'expected {"type": "text"'),
        ({"role": "user", "content": 3}, "expected a string or a list of parts, found int"),
        ("Hi", "expected an object with role and content, found str"),
        ({"role": "assistant", "tool_calls": {}}, "expected a list, found dict"),
        ({"role": "assistant", "tool_calls": ["f"]}, "expected an object with a function"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "expected an object with a function"),
        ({"role": "assistant", "tool_calls": [call("{city: Oslo}")]}, "arguments are not JSON"),
        ({"role": "assistant", "tool_calls": [call("")]}, "arguments are not JSON"),
        ({"role": "assistant", "tool_calls": [call("[1]")]}, "arguments must be a JSON object, found list"),
        ({"role": "assistant", "tool_calls": [call([1])]}, "arguments must be a JSON object, found list"),
    ],
)
def test_malformed_messages_are_refused(message: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        template.render([HI, message])
    assert str(caught.value).startswith("messages[1]")
    assert "\n" not in str(caught.value)


def test_no_messages_are_refused() -> None:
    with pytest.raises(UsageError, match="messages is empty"):
        template.render([])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('No user\n query') }}", "refuses the messages: No user query"),
        ("{{ messages[0].content.missing.name }}", "refuses the messages: .*no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'x' %}", "refuses the messages"),
        ("{{ messages | length + 'a' }}", "refuses the messages"),
    ],
)
def test_what_a_template_raises_is_one_line_for_the_user(source: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        ChatTemplate(source).render([HI])
    assert "\n" not in str(caught.value)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.load(tmp_path) is None
    config.write_text('{"eos_token": "<e>"}')
    assert ChatTemplate.load(tmp_path) is None
    sources: list[tuple[Any, str]] = [("one{{ eos_token }}", "one<e>")]
    sources.append(([{"name": "rag", "template": "rag"}, {"name": "default", "template": "two"}], "two"))
    for source, expected in sources:
        config.write_text(json.dumps({"eos_token": {"content": "<e>"}, "chat_template": source}))
        found = ChatTemplate.load(tmp_path)
        assert found is not None
        assert found.render([HI]) == expected
    (tmp_path / "chat_template.jinja").write_text("three{{ eos_token }}\n")
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.render([HI]) == "three<e>"


@pytest.mark.parametrize("source", ["{% if %}", 3, [{"name": "rag", "template": "rag"}], ["x"]])
def test_a_template_that_is_none_is_the_packs_fault(tmp_path: Path, source: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(MoepackError, match="template") as caught:
        ChatTemplate.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer_config.json"))
    assert not isinstance(caught.value, UsageError)


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install moepack[parity]")
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("source", [None, *SOURCES])
def test_prompts_are_those_of_transformers(theirs: Any, name: str, source: str | None) -> None:
    messages, tools, arguments = CONVERSATIONS[name]
    arguments = {"add_generation_prompt": True, **arguments}
    ours = template
    if source is not None:
        ours = ChatTemplate(SOURCES[source], named_tokens=theirs.special_tokens_map)
        arguments["chat_template"] = SOURCES[source]
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, **arguments)
    arguments.pop("chat_template", None)
    assert ours.render(messages, tools, **arguments) == expected


def test_the_prompt_says_whether_an_answer_starts_inside() -> None:
    assert opens_reasoning(render("user"))
    assert not opens_reasoning(render("no thinking"))
    assert not opens_reasoning(render("no prompt"))

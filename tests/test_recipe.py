"""The demo model's recipe: its generator repeats, its splits are apart, its files are the checkpoint's.

Training itself is not run here. The recipe's scripts import each other as plain modules, so a fixture lends
them the import path and takes it back.
"""

import importlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from moepack.runtime import recall
from moepack.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "demo" / "recipe"
CHECKPOINT = ROOT / "demo" / "checkpoint"
TOOLS_FILE = ROOT / "tests" / "data" / "tools.jsonl"
SEEDS = range(40)


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules by name, imported when first asked for; afterwards no trace of them is left."""
    names = {path.stem for path in RECIPE.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    sys.path.insert(0, str(RECIPE))

    class Modules(SimpleNamespace):
        def __getattr__(self, name):
            return importlib.import_module(name)

    yield Modules()
    sys.path.remove(str(RECIPE))
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(hidden)


def conversations(recipe, split="train"):
    module = recipe.conversations
    makers = (module.tool_chat, module.plain_chat, module.tool_prompt)
    return [make(Random(seed), split) for seed in SEEDS for make in makers]


@pytest.fixture(scope="module")
def tool_records():
    return [json.loads(line) for line in TOOLS_FILE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_seed_gives_the_same_conversations(recipe, split):
    first, again = (conversations(recipe, split) for _ in range(2))
    assert [chat.segments() for chat in first] == [chat.segments() for chat in again]
    assert len({recipe.chat_format.join_text(chat.segments()) for chat in first}) > 0.9 * len(first)


def test_splits_share_no_entry_of_a_pool(recipe):
    for pool, parts in recipe.vocabulary.POOLS.items():
        words = [word for part in parts.values() for word in part]
        assert all(parts.values()), pool
        assert len(words) == len(set(words)), f"{pool}: an entry stands in two parts or twice in one"
    tools = recipe.everyday_tools.EVERYDAY_TOOLS
    names = [name for specs in tools.values() for spec in specs for name in spec.names]
    assert len(names) == len(set(names))


def test_tools_of_a_split_keep_off_the_other(recipe):
    pools, rng = recipe.vocabulary.POOLS, Random(1)
    tools = [recipe.made_up_tools.MadeUpTool(rng, "dev") for _ in range(200)]
    for pool, used in (("verb", {tool.verb for tool in tools}), ("noun", {tool.noun for tool in tools})):
        part = {split: {word.replace("_", " ") for word in words} for split, words in pools[pool].items()}
        assert used & part["dev"]
        assert not used & part["test"]


def test_the_template_renders_what_the_generator_writes(recipe):
    template = recipe.chat_format.chat_template()
    for chat in conversations(recipe) + conversations(recipe, "dev"):
        rendered = template.render(messages=chat.messages(), tools=chat.tools, enable_thinking=chat.thinking)
        assert rendered == recipe.chat_format.join_text(chat.segments())


def test_the_prompt_of_a_tool_call_ends_where_the_answer_begins(recipe):
    template = recipe.chat_format.chat_template()
    for seed in SEEDS:
        *prompt, (answer, is_trained) = recipe.conversations.tool_prompt(Random(seed), "dev").segments()
        record = recipe.conversations.tool_record(Random(seed), "dev")
        request = {"messages": record["messages"], "tools": record["tools"]}
        rendered = template.render(**request, add_generation_prompt=True, enable_thinking=False)
        assert rendered == recipe.chat_format.join_text(prompt)
        assert is_trained
        assert answer.startswith("<tool_call>\n<function=")


def test_sentences_are_plain_and_many(recipe):
    rng = Random(1)
    sentences = {recipe.sentences.plain_sentence(rng) for _ in range(3000)}
    assert len(sentences) > 2900
    for sentence in sentences:
        assert 20 <= len(sentence) <= 110
        assert sentence.isascii()
        assert sentence[0].isupper()
        assert not set(sentence) & set('"{}\n')


def test_the_tools_file_is_what_the_command_writes(tmp_path):
    out = tmp_path / "tools.jsonl"
    options = ["--split", "dev", "--count", "60", "--seed", "7", str(out)]
    subprocess.run([sys.executable, str(RECIPE / "make_tool_prompts.py"), *options], check=True, cwd=tmp_path)
    assert out.read_bytes() == TOOLS_FILE.read_bytes()


def test_the_tools_file_asks_for_calls_that_can_be_made(recipe, tool_records):
    assert [record["vocabulary"] for record in tool_records] == ["unseen", "seen"] * 30
    assert 2 * sum(map(recipe.make_tool_prompts.is_familiar, tool_records)) >= len(tool_records)
    for record in tool_records:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in record["tools"]}
        assert record["expected_calls"]
        for call in record["expected_calls"]:
            schema, arguments = schemas[call["function"]["name"]], json.loads(call["function"]["arguments"])
            assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])


def test_copies_say_a_list_again_on_other_requests_than_recall_asks_with(recipe):
    module, template = recipe.make_copies, recall.COPY.partition("{}")[0]
    words = recall.list_words(Tokenizer.load(CHECKPOINT))
    assert len(words) >= recall.LEAST_WORDS
    assert not any(request.startswith(template) for request in module.REQUESTS)
    asked = set()
    for seed in SEEDS:
        request, answer = module.copy_chat(Random(seed), words).turns
        assert answer.content in request.content
        assert not request.content.startswith(template)
        asked.add(answer.content)
    assert len(asked) == len(SEEDS)


def test_export_writes_the_files_of_the_bundled_checkpoint(recipe, tmp_path):
    recipe.export.export(CHECKPOINT / "tokenizer.json", tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == 5
    for name in written:
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name


def test_the_training_model_has_the_tensors_of_the_bundled_checkpoint(recipe):
    pytest.importorskip("safetensors", reason="needs safetensors, an extra of the tests")
    state = recipe.checkpoint.hub_state(recipe.model.LanguageModel(recipe.config.Config()))
    stored = {}
    for path in CHECKPOINT.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        stored.update({name: entry for name, entry in header.items() if name != "__metadata__"})
    types = {"torch.bfloat16": "BF16", "torch.float32": "F32"}
    made = {name: (list(tensor.shape), types[str(tensor.dtype)]) for name, tensor in state.items()}
    assert made == {name: (entry["shape"], entry["dtype"]) for name, entry in stored.items()}

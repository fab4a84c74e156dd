"""lm-evaluation-harness on a pack: its own transformers model says the same, and real tasks run from local files.

The tasks are of this file: questions with choices, an answer to generate, a text to score. Nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DEMO
from moepack.layout.errors import MoepackError, UsageError

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: make test-parity installs it")
pytest.importorskip("transformers", reason="needs transformers: make test-parity installs it")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # of a log-likelihood: float32 sums in another order
STORY = "It was a cold night, and the old man sat by the fire. The wind was high. " * 3
QUESTIONS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Rome", "Oslo"], "answer": 0},
    {"question": "What day comes after Monday?", "choices": ["Sunday", "Tuesday", "Friday"], "answer": 1},
    {"question": "What is 2 + 3?", "choices": ["5", "7", "9"], "answer": 0},
    {"question": "What is the opposite of hot?", "choices": ["big", "old", "cold"], "answer": 2},
]
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "generation": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 24}
filter_list:
  - name: last
    filter: [{function: regex, regex_pattern: "(\\\\w+)$"}, {function: take_first}]
metric_list: [{metric: exact_match, ignore_case: true}]
""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def models(demo_pack: Callable[[int], Path]) -> Iterator[tuple[Any, Any]]:
    """The pack at 16 bits, and the checkpoint as the harness itself runs it with transformers."""
    from lm_eval.models.huggingface import HFLM

    from moepack.runtime.harness import PackLM

    ours = PackLM(str(demo_pack(16)), exact=True, threads=1, memory="3GiB")
    yield ours, HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=1)
    ours.engine.close()


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks and their data, with the harness's libraries told to stay off the network."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**question, "text": STORY}) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: demo_{name}\n{COMMON.format(file=data)}{text}")
    return tmp_path


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_loglikelihoods_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    pairs = [
        ("", "The old man said nothing."),
        ("What is the capital of France?", " Paris"),
        ("What is the capital of France?", " Rome and Oslo"),
        ("It was a cold night, and the old ", "man"),  # the blank goes to the continuation
        *(("One of these: A, B, C, D. It is", f" {letter}") for letter in "ABCD"),  # computed together
        (STORY, "It was a cold night, and"),
        ("word " * 3000, "and more"),  # longer than the context
    ]
    ours, theirs = (model.loglikelihood(requests("loglikelihood", pairs)) for model in models)
    for pair, (found, is_greedy), (expected, was_greedy) in zip(pairs, ours, theirs):
        assert found == pytest.approx(expected, abs=TOLERANCE * max(1, abs(expected))), pair
        assert is_greedy == was_greedy, pair
    assert {greedy for _, greedy in ours} == {True, False}


def test_rolling_loglikelihoods_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    texts = [(STORY,), ("One.",), ("The fox ran over the hill. " * 500,)]  # the last in several windows
    ours, theirs = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in models)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_answers_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    prompts = [
        (STORY, {"until": ["."], "max_gen_toks": 40}),
        (STORY, {"until": ["\n\n", "the"], "max_gen_toks": 40, "do_sample": False}),
        ("Once upon a time", {"until": [], "max_gen_toks": 12}),
    ]
    ours, theirs = (model.generate_until(requests("generate_until", prompts)) for model in models)
    assert ours == theirs
    assert all(ours)


def test_conversations_are_rendered_as_transformers_renders_them(models: tuple[Any, Any]) -> None:
    messages = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "The answer is"}]
    ours, theirs = models
    assert ours.apply_chat_template(messages[:1]) == theirs.apply_chat_template(messages[:1])
    continued = [model.apply_chat_template(messages, add_generation_prompt=False) for model in models]
    assert continued[0] == continued[1]
    assert continued[0].endswith("The answer is")


def test_real_tasks_score_what_transformers_scores(models: tuple[Any, Any], tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"demo_{name}" for name in TASKS]
    results = [
        lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
        for model in models
    ]
    ours, theirs = results
    assert ours["demo_choices"]["acc,none"] == theirs["demo_choices"]["acc,none"]
    assert ours["demo_generation"]["exact_match,last"] == theirs["demo_generation"]["exact_match,last"]
    assert ours["demo_text"]["word_perplexity,none"] == pytest.approx(
        theirs["demo_text"]["word_perplexity,none"], rel=10 * TOLERANCE
    )


def test_the_command_runs_a_task_through_the_chat_template(
    demo_pack: Callable[[int], Path], tasks: Path, tmp_path: Path
) -> None:
    arguments = ["lm-eval", "run", "--model", "moepack", "--tasks", "demo_generation", "--include_path", str(tasks)]
    arguments += ["--model_args", f"pretrained={demo_pack(4)},memory=2GiB,threads=1,enable_thinking=false"]
    arguments += ["--apply_chat_template", "--output_path", str(tmp_path / "out")]
    command = [sys.executable, "-c", "from moepack.runtime.cli import main; main()", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "demo_generation" in ran.stdout
    (report,) = (tmp_path / "out").rglob("results_*.json")
    facts = json.loads(report.read_text())
    assert facts["results"]["demo_generation"]["exact_match,last"] >= 0.5  # the demo model knows most of them
    assert facts["chat_template"]


@pytest.mark.parametrize(("given", "message"), [
    ({}, "--model_args: names no pack: give pretrained=PACK"),
    ({"pretrained": "PACK", "colour": "red"}, "--model_args colour: expected one of pretrained, memory"),
    ({"pretrained": "PACK", "max_length": "long"}, "--model_args max_length=long: expected a number from 1 on"),
    ({"pretrained": "PACK", "max_gen_toks": 0}, "--model_args max_gen_toks=0: expected a number from 1 on"),
    ({"pretrained": "PACK", "memory": 1.5}, "--model_args memory=1.5: expected a size, as in 8GiB"),
])  # fmt: skip
def test_arguments_of_other_names_and_kinds_are_refused(given: dict[str, Any], message: str) -> None:
    from moepack.runtime.harness import PackLM

    with pytest.raises(UsageError, match=message):
        PackLM(**given)


def test_fewer_experts_are_said(demo_pack: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    from moepack.runtime.harness import PackLM

    model = PackLM(str(demo_pack(4)), threads=1, memory="2GiB", experts_per_token=4)
    model.engine.close()
    assert "4 experts per token, the model was trained with 6: its answers change" in caplog.text


def test_scores_that_are_no_numbers_end_the_run(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would write NaN into its table, or call a choice wrong."""
    logits = torch.full((1, models[0].engine.architecture.vocab_size), torch.nan)
    monkeypatch.setattr(models[0].engine, "iter_logits", lambda token_ids, first: iter([logits]))
    with pytest.raises(MoepackError, match="scores are not finite: run moe-inspect verify"):
        models[0].loglikelihood(requests("loglikelihood", [("It was", " cold")]))


def test_what_cannot_be_generated_is_refused(models: tuple[Any, Any]) -> None:
    ours = models[0]
    for given, message in (
        ({"until": ["."], "num_beams": 4}, "generation_kwargs: num_beams: expected one of temperature"),
        ({"until": ["."], "max_gen_toks": 4096}, "answers of 4096 tokens: the context holds 2048"),
    ):
        with pytest.raises(UsageError, match=message):
            ours.generate_until(requests("generate_until", [("Hello", given)]))

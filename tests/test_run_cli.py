"""moe-run as a user meets it: a process, its two outputs, its exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from conftest import make_pack
from moepack.layout.trace_file import read_trace
from moepack.runtime.cli import main
from moepack.runtime.engine import Engine
from moepack.runtime.tokenizer import Tokenizer
from tiny_checkpoint import TinyModel, write_checkpoint

RUN = [sys.executable, "-c", "from moepack.runtime.cli import main; main()"]
STATS = {
    *("prompt_tokens", "generated_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "bytes_read", "bytes_per_token"),
    *("expert_hits", "expert_misses", "io_wait_s", "compute_s", "peak_rss_bytes", "memory_budget_bytes"),
    *("experts_per_token", "device"),
}


Result = subprocess.CompletedProcess[str]


def moe_run(*arguments: object, stdin: str | None = None) -> Result:
    """Run moe-run in a process of its own."""
    command = [*RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120, check=False)


@pytest.fixture
def moe_run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The same without a new process, which takes seconds to import torch."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["moe-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return subprocess.CompletedProcess([], code if isinstance(code, int) else 1, *capsys.readouterr())

    return run


def smallest_budget(pack: Path, *arguments: object) -> str:
    """The budget that the refusal of an impossible one names, with a little for the process's own variation."""
    refused = moe_run("generate", pack, *arguments, "--memory", "1MiB")
    assert refused.returncode == 1
    needed = re.search(r"([\d,]+) MiB are needed", refused.stderr)
    assert needed, refused.stderr
    return f"{int(needed[1].replace(',', '')) + 4}MiB"


def test_generate_streams_text_and_ends_with_statistics(demo_pack: Callable[[int], Path]) -> None:
    run = moe_run("generate", demo_pack(4), "Hello", "--no-think", "--temperature", 0)
    assert run.returncode == 0
    assert run.stdout.startswith("Hello!")
    assert "<|im_end|>" not in run.stdout
    assert re.fullmatch(
        r"\[\d+ prompt \+ \d+ tokens \| .* tok/s .* experts per token, .* read \| .* \| cpu\]\n", run.stderr
    )


def test_generate_json_has_every_field_and_holds_its_memory(demo_pack: Callable[[int], Path]) -> None:
    options = ("Tell me a story.", "--temperature", 0, "--max-tokens", 40, "--threads", 1)
    memory = smallest_budget(demo_pack(4), *options)
    run = moe_run("generate", demo_pack(4), *options, "--memory", memory, "--json")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert set(answer) == {"text", "token_ids", "finish_reason", "stats"}
    assert set(answer["stats"]) >= STATS
    stats = answer["stats"]
    assert stats["generated_tokens"] == len(answer["token_ids"])
    assert stats["memory_budget_bytes"] == int(memory.removesuffix("MiB")) * 2**20
    assert stats["peak_rss_bytes"] <= stats["memory_budget_bytes"]
    assert stats["expert_misses"] > 48  # fewer slots than the answer's experts
    again = moe_run("generate", demo_pack(4), *options, "--json")
    assert json.loads(again.stdout)["token_ids"] == answer["token_ids"]


@pytest.mark.slow
def test_a_pack_larger_than_the_budget_stays_within_it(tmp_path: Path) -> None:
    """Experts of 400 MiB under the smallest legal budget, through a prefill of several chunks."""
    model = TinyModel(hidden=512, experts=64, experts_per_tok=4, moe_intermediate=512, max_positions=4096)
    pack = make_pack(write_checkpoint(tmp_path / "source", model), tmp_path / "pack", bits=16)
    options = ("--prompt-file", "-", "--raw", "--temperature", 0, "--max-tokens", 20, "--ignore-eos")
    prompt = "and the theory of the thing " * 100
    needed = moe_run("generate", pack, *options, "--memory", "1MiB", stdin=prompt)
    mib = int(re.search(r"([\d,]+) MiB are needed", needed.stderr)[1].replace(",", "")) + 4  # type: ignore[index]
    run = moe_run("generate", pack, *options, "--memory", f"{mib}MiB", "--json", stdin=prompt)
    stats = json.loads(run.stdout)["stats"]
    assert stats["prompt_tokens"] > 1024
    assert stats["peak_rss_bytes"] <= mib * 2**20
    free = json.loads(moe_run("generate", pack, *options, "--json", stdin=prompt).stdout)
    assert free["token_ids"] == json.loads(run.stdout)["token_ids"]


def test_prompts_from_file_stdin_and_ids_are_the_same(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path], tmp_path: Path
) -> None:
    pack, text = demo_pack(4), "The old man said"
    (tmp_path / "prompt.txt").write_text(text)
    (tmp_path / "ids.json").write_text(str(Tokenizer.load(pack).encode(text)))
    options = ("--raw", "--max-tokens", 5, "--seed", 3, "--json")
    runs = [
        moe_run_here("generate", pack, "--prompt-file", tmp_path / "prompt.txt", *options),
        moe_run_here("generate", pack, "--token-ids", tmp_path / "ids.json", *options),
        moe_run_here("generate", pack, text, *options),
        moe_run("generate", pack, "--prompt-file", "-", *options, stdin=text),
    ]
    answers = [json.loads(run.stdout)["token_ids"] for run in runs]
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--raw"], 2, "expected one of PROMPT, --prompt-file and --token-ids, found 0"),
        (["hi", "--prompt-file", "x"], 2, "found 2"),
        (["--prompt-file", "nowhere.txt"], 2, "nowhere.txt: cannot be read: No such file or directory"),
        (["hi", "--temperature", "-1"], 2, "temperature"),
        (["hi", "--top-p", "0"], 2, "top_p"),
        (["hi", "--memory", "lots"], 2, "size 'lots': expected a number with KiB"),
        (["hi", "--memory", "20MiB"], 1, "memory budget of 20 MiB is too small"),
        (["hi", "--memory", "8"], 1, "memory budget of 8 bytes (--memory takes a unit, as in 8GiB) is too small"),
        (["hi", "--raw", "--system", "x"], 2, "--system is of the chat template, --raw goes without it"),
        (["hi", "--raw", "--think"], 2, "--think is of the chat template, --raw goes without it"),
        (["--token-ids", "x", "--no-think"], 2, "--think is of the chat template, --token-ids goes without it"),
        (["hi", "--device", "tpu"], 2, "--device tpu: expected auto, cpu, metal, cuda, metal-emulated or reference"),
        (["hi", "--experts-per-token", "49"], 2, "--experts-per-token 49: expected 1 to 48"),
        (["<|image_pad|>", "--raw"], 2, "this pack holds the text model only"),
        (["a " * 3000, "--raw"], 2, "the model's context holds 2048"),
    ],
)
def test_bad_requests_get_one_line_and_their_exit_code(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path], arguments: list[str], code: int, text: str
) -> None:
    run = moe_run_here("generate", demo_pack(4), *arguments)
    assert run.returncode == code
    assert text in run.stderr
    errors = [line for line in run.stderr.splitlines() if not line.startswith("note:")]
    assert len(errors) == 1, run.stderr
    assert run.stdout == ""


def test_sampling_that_makes_no_sense_is_refused_before_weights_are_read(
    moe_run_here: Callable[..., Result], tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "open", Mock(side_effect=AssertionError("weights are read")))
    refused = moe_run_here("generate", tiny_pack, "hi", "--temperature", "nan")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "temperature" in refused.stderr


def test_a_missing_damaged_or_future_pack_is_told_apart(
    moe_run_here: Callable[..., Result], tiny_copy: Path, tmp_path: Path
) -> None:
    for arguments in (("generate", tmp_path / "nothing", "hi"), ("eval", tmp_path / "nothing", "--text", __file__)):
        missing = moe_run_here(*arguments)
        assert missing.returncode == 3
        assert "not a pack" in missing.stderr
    manifest = tiny_copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    future = moe_run_here("generate", tiny_copy, "hi")
    assert future.returncode == 4
    assert "format version 9, but this moepack reads version 1" in future.stderr
    manifest.write_text(text)
    (tiny_copy / "experts" / "layer_00.bin").unlink()
    assert moe_run_here("generate", tiny_copy, "hi").returncode == 3


def test_fewer_experts_are_said(moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path]) -> None:
    run = moe_run_here("generate", demo_pack(4), "hi", "--experts-per-token", 2, "--max-tokens", 2)
    assert "note: 2 experts per token, the model was trained with 6: its answers change" in run.stderr


def test_ctrl_c_stops_generation_cleanly(demo_pack: Callable[[int], Path]) -> None:
    command = [*RUN, "generate", str(demo_pack(4)), "Tell me a story.", "--ignore-eos", "--max-tokens", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"error: stopped after" in errors
    assert b"Traceback" not in errors


def test_eval_prints_the_measures(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a cold night, and the old man sat by the fire. " * 20)
    tools = Path(__file__).parent / "data" / "tools.jsonl"
    few = tmp_path / "tools.jsonl"
    few.write_text("".join(line + "\n" for line in tools.read_text().splitlines()[:3]))
    run = moe_run_here("eval", demo_pack(4), "--text", text, "--tools", few, "--reference", demo_pack(16), "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["tokens"] > 100
    assert facts["perplexity"] > 1
    assert 0 < facts["kl_mean"] < 0.2
    assert 0.7 < facts["top1_agreement"] <= 1
    assert facts["tool_calls"]["n"] == 3


def test_eval_prints_recall_by_length_and_depth(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path]
) -> None:
    options = ("eval", demo_pack(4), "--recall", 1, "--lengths", "64,96", "--seed", 5)
    facts = json.loads(moe_run_here(*options, "--json").stdout)["recall"]
    assert (facts["seed"], facts["prompts_per_length"], len(facts["copy"]["by_depth"])) == (5, 1, 5)
    shown = moe_run_here(*options).stdout
    needle = facts["needle"]["by_length"][1]
    low, high = needle["intervals"]["correct"]
    assert re.search(rf"recall: needle: 96 tokens: correct +{needle['correct']:.4f} +{low:.4f} to {high:.4f}\n", shown)
    assert re.search(r"recall: copy: depth 90%: correct +\d", shown)


def test_eval_refuses_what_it_cannot_do(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path], tiny_pack: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("one two three")
    (tmp_path / "tools.jsonl").write_text("{}\n")
    (tmp_path / "nothing.txt").touch()
    for arguments, text in (
        (["--text", tmp_path / "nothing.txt"], f"{tmp_path / 'nothing.txt'}: 0 tokens, expected at least two"),
        ([], "expected --text FILE, --tools FILE or --recall N, found none of them"),
        (["--tools", tmp_path / "tools.jsonl", "--seed", 1], "--lengths and --seed are of --recall N"),
        (["--text", tmp_path / "text.txt", "--constrained"], "--constrained is of --tools FILE"),
        (["--recall", 1, "--lengths", "4096"], "--lengths 4096: expected 64 to 2048 tokens"),
        (["--recall", 1, "--reference", tiny_pack], "a pack of the same model is needed"),
        (["--tools", tmp_path / "tools.jsonl"], "line 1: expected an object with messages, tools, expected_calls"),
        (["--text", tmp_path / "text.txt", "--reference", tiny_pack], "a pack of the same model is needed"),
    ):
        run = moe_run_here("eval", demo_pack(4), *arguments)
        assert run.returncode == 2
        assert text in run.stderr


def test_eval_refuses_recall_before_hours_of_text(
    moe_run_here: Callable[..., Result], tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepack.runtime.evaluate.evaluate_text", None)
    (tmp_path / "text.txt").write_text("one two three")
    run = moe_run_here("eval", tiny_pack, "--text", tmp_path / "text.txt", "--recall", 1)
    assert run.returncode == 2
    assert "--recall: the tokenizer has 0 words of small letters, expected 200" in run.stderr


def test_eval_that_is_interrupted_says_so(
    moe_run_here: Callable[..., Result], tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moepack.runtime.evaluate.evaluate_text", interrupt)
    (tmp_path / "text.txt").write_text("one two three")
    run = moe_run_here("eval", tiny_pack, "--text", tmp_path / "text.txt", "--json")
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr.endswith("interrupted\n")


def test_the_harness_is_an_extra(moe_run_here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "moepack.runtime.harness", raising=False)
    refused = moe_run_here("lm-eval", "run", "--model", "moepack", "--help")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: lm_eval is not installed: pip install 'moepack[lm-eval]'\n"


def test_version_and_help_are_quick_and_complete() -> None:
    started = time.perf_counter()
    assert moe_run("--version").stdout.startswith("moepack ")
    assert time.perf_counter() - started < 10  # torch is not imported; generous for a busy machine
    overview = moe_run("--help").stdout
    assert "generate" in overview
    assert "3 damaged pack" in " ".join(overview.split())
    assert moe_run("generate", "--no-such-option").returncode == 2
    assert "--install-completion" in overview


def test_a_recorded_trace_can_be_replayed(
    moe_run_here: Callable[..., Result], demo_pack: Callable[[int], Path], tmp_path: Path
) -> None:
    options = ("hello there", "--raw", "--max-tokens", 9, "--ignore-eos", "--trace", tmp_path / "run.trace")
    run = moe_run_here("generate", demo_pack(4), *options, "--json")
    assert run.returncode == 0
    trace = read_trace(tmp_path / "run.trace")
    assert (trace.num_hidden_layers, trace.num_experts) == (8, 48)
    decoded = [request for request in trace.requests if not request.is_prefill]
    assert len(decoded) == 8 * 8  # 8 tokens after the first, 8 layers
    assert all(len(request.expert_ids) == 6 for request in decoded)
    stats = json.loads(run.stdout)["stats"]
    assert sum(len(request.expert_ids) for request in trace.requests) == stats["expert_hits"] + stats["expert_misses"]
    refused = moe_run_here("generate", demo_pack(4), "hello", "--trace", tmp_path / "no" / "run.trace")
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr


def test_stats_tell_the_plan_and_how_experts_are_read(moe_run_here: Callable[..., Result], tiny_pack: Path) -> None:
    run = moe_run_here("generate", tiny_pack, "the", "--raw", "--max-tokens", 2, "--memory", "2GiB", "--stats")
    assert run.returncode == 0
    found = dict(re.findall(r"^(?:memory: )?(.+?)(?::|  ) *(.+)$", run.stderr, re.MULTILINE))
    assert found["budget"] == "2.00 GiB"
    assert int(found["num_slots"]) == 4 * 6
    assert re.fullmatch(r"(direct|buffered), \d at a time, into (huge|plain) pages", found["expert reads"])
    assert found["read settings"]
    assert found["expert eviction"] == "lru"
    assert "locked in memory" in found["resident weights"]


def test_verified_reads_end_with_the_block_that_is_damaged(
    moe_run_here: Callable[..., Result], tiny_copy: Path
) -> None:
    options = ("generate", tiny_copy, "the", "--raw", "--max-tokens", 2)
    file = tiny_copy / "experts" / "layer_02.bin"
    data = bytearray(file.read_bytes())
    for block in range(0, len(data), len(data) // 6):
        data[block + 5] ^= 4
    file.write_bytes(data)
    assert moe_run_here(*options).returncode == 0, "nobody has looked"
    run = moe_run_here(*options, "--verify-reads")
    assert run.returncode == 3
    assert re.search(r"error: .*layer_02.bin: layer 2 expert \d at byte \d+: sha256 is", run.stderr)

"""moe-run: tokens from a pack, its experts streamed from the SSD.

moe-run generate PACK "Tell me a story about a fox" --memory 8GiB
moe-run chat PACK
moe-run serve PACK --port 8080
moe-run eval PACK --text book.txt --reference PACK16
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moepack.layout.console import EXIT_CODES, VERSION, create_app, log, open_progress, print_json, print_table, run_app
from moepack.layout.errors import Interrupted, MemoryBudgetError, UsageError
from moepack.layout.sizes import parse_size

if TYPE_CHECKING:  # imported where they are used: torch takes seconds, --help should not
    from tqdm import tqdm

    from moepack.layout.reader import Pack
    from moepack.runtime.engine import Engine
    from moepack.runtime.generate import Generation

PACK = typer.Argument(metavar="PACK", help="Directory that moe-convert wrote.", show_default=False)
MEMORY = typer.Option(
    None,
    "--memory",
    help="Budget of the whole process, as in 8GiB; with cuda of the GPU's memory.  [default: what there is]",
)
DEVICE = typer.Option("auto", "--device", help="auto, cpu, metal or cuda; metal-emulated is for tests.")
THREADS = typer.Option(None, "--threads", help="Threads of the arithmetic.  [default: one per core]", min=1)
EXPERTS = typer.Option(
    None, "--experts-per-token", help="Run this many experts per token instead of the model's number.", min=1
)
EXACT = typer.Option(False, "--exact", help="float32 arithmetic on every backend.")
VERIFY_READS = typer.Option(False, "--verify-reads", help="Check every block that is read against its checksum.")
PREFETCH = typer.Option(
    None,
    "--prefetch/--no-prefetch",
    help="While the disk is idle, read what the next layer will need: for a prompt all of it, for a token what its "
    "router would pick now.  [default: yes, but no guesses where all experts fit]",
)
THINK = typer.Option(None, "--think/--no-think", help="Let the model think first.  [default: the template's choice]")
CONTEXT = typer.Option(None, "--context", help="Tokens to plan memory for.  [default: 16384]", min=64)
MAX_TOKENS = typer.Option(None, "--max-tokens", help="Longest answer.  [default: 2048]", min=1)
SNAPSHOT_MEMORY = typer.Option(
    None,
    "--snapshot-memory",
    help="For states of prompts already read, so that a turn computes what is new.  [default: a tenth of --memory]",
)
SNAPSHOT_DIRECTORY = typer.Option(
    None, "--snapshot-dir", help="Keep such states on disk as well, for the next start. They hold what was said."
)
JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
LONG_PROMPT = 256  # tokens from which the prefill shows a progress bar
TUNING_STEPS = 1000  # unless --steps says otherwise

app = create_app("moe-run")


def main() -> None:
    """Entry point of moe-run."""
    run_app(app)


@app.callback(epilog=EXIT_CODES)
def options(version: bool = VERSION) -> None:
    """Run a model far larger than memory: its experts stream from the SSD."""


@app.command()
def generate(
    pack: Path = PACK,
    prompt: str = typer.Argument(None, metavar="[PROMPT]", help="What to say to the model.", show_default=False),
    prompt_file: Path = typer.Option(None, "--prompt-file", help="Read the prompt from a file; - is stdin."),
    token_ids: Path = typer.Option(None, "--token-ids", help="Read token ids from a file: JSON list or numbers."),
    raw: bool = typer.Option(False, "--raw", help="Feed the prompt as it is, without the chat template."),
    system: str = typer.Option(None, "--system", help="System message for the chat template."),
    think: bool = THINK,
    max_tokens: int = MAX_TOKENS,
    temperature: float = typer.Option(None, help="0 is greedy.  [default: the model's own, as for the next three]"),
    top_p: float = typer.Option(None, help="Smallest set of tokens with this probability."),
    top_k: int = typer.Option(None, help="This many most probable tokens; 0 is off."),
    min_p: float = typer.Option(None, help="Tokens with at least this share of the best one's probability."),
    presence_penalty: float = typer.Option(None, help="Taken off the score of tokens already generated."),
    repetition_penalty: float = typer.Option(None, help="Divides the score of tokens already seen."),
    seed: int = typer.Option(0, help="Of the random choices: the same seed gives the same answer."),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Go on past end tokens."),
    exact: bool = EXACT,
    experts_per_token: int = EXPERTS,
    threads: int = THREADS,
    memory: str = MEMORY,
    device: str = DEVICE,
    verify_reads: bool = VERIFY_READS,
    prefetch: bool = PREFETCH,
    trace: Path = typer.Option(None, "--trace", help="Record which experts are asked for: see moe-inspect trace."),
    stats: bool = typer.Option(False, "--stats", help="Print how memory was split and how experts are read."),
    as_json: bool = JSON,
) -> None:
    """Answer one prompt, streaming the text; ends with a line of statistics on stderr."""
    from moepack.layout.reader import Pack
    from moepack.runtime.chat import ChatTemplate
    from moepack.runtime.engine import Engine, check_prompt, read_architecture, read_sampling
    from moepack.runtime.generate import answer_limit
    from moepack.runtime.prompt import PromptSource, read_prompt
    from moepack.runtime.tokenizer import Tokenizer

    budget = None if memory is None else parse_size(memory)
    with Pack.open(pack) as opened:  # what is asked for is known, and refused, before weights are loaded
        tokenizer, architecture = Tokenizer.load(pack), read_architecture(opened, experts_per_token)
        sampling = read_sampling(
            opened,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
        )
        _note_changes(opened, architecture.num_experts_per_tok)
    source = PromptSource(prompt, prompt_file, token_ids, raw, system, think)
    ids = read_prompt(tokenizer, ChatTemplate.load(pack), source)
    limit = architecture.max_position_embeddings
    check_prompt(ids, architecture, tokenizer, limit)
    engine = Engine.open(
        pack,
        memory=budget,
        device=device,
        exact=exact,
        threads=threads,
        experts_per_token=experts_per_token,
        max_context=len(ids) + answer_limit(len(ids), max_tokens, limit),
        tokenizer=tokenizer,
        verify_reads=verify_reads,
        prefetch=prefetch,
    )
    if engine.settings_note:
        log(f"note: {engine.settings_note}")
    if stats:
        _print_plan(engine)
    with _record_trace(engine, trace), open_progress(len(ids), "prompt", "tok", len(ids) >= LONG_PROMPT) as progress:
        _run_generation(engine, engine.generate(ids, sampling, progress.update), progress, as_json)


@app.command()
def chat(
    pack: Path = PACK,
    system: str = typer.Option(None, "--system", help="System message."),
    think: bool = THINK,
    hide_thinking: bool = typer.Option(False, "--hide-thinking", help="Do not print what the model thinks."),
    tools: Path = typer.Option(None, "--tools", help="Tools file: programs that run after you agree to each call."),
    load: Path = typer.Option(None, "--load", help="Go on with a conversation that /save has written."),
    context: int = CONTEXT,
    max_tokens: int = MAX_TOKENS,
    temperature: float = typer.Option(None, help="0 is greedy.  [default: the model's own]"),
    seed: int = typer.Option(0, help="Of the random choices."),
    exact: bool = EXACT,
    experts_per_token: int = EXPERTS,
    threads: int = THREADS,
    memory: str = MEMORY,
    device: str = DEVICE,
    snapshot_memory: str = SNAPSHOT_MEMORY,
    snapshot_dir: Path = SNAPSHOT_DIRECTORY,
) -> None:
    """Talk with the model at the terminal: streaming, history, /help for its commands."""
    from moepack.runtime.conversation import Conversation
    from moepack.runtime.local_tools import LocalTools
    from moepack.runtime.terminal import ChatSettings, Terminal

    local_tools = None if tools is None else LocalTools.load(tools)
    conversation = Conversation() if load is None else Conversation.load(load)
    conversation.system = system or conversation.system
    conversation.thinking = conversation.thinking if think is None else think
    with _open_for_conversations(
        pack,
        memory,
        snapshot_memory,
        device=device,
        exact=exact,
        threads=threads,
        experts_per_token=experts_per_token,
        max_context=context,
        snapshot_directory=snapshot_dir,
    ) as engine:
        template = engine.chat_template()
        if template is None:
            raise UsageError(f"{pack}: has no chat template: moe-run generate --raw continues plain text")
        sampling = engine.default_sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
        Terminal(engine, template, conversation, ChatSettings(sampling, not hide_thinking, local_tools)).run()


@app.command()
def serve(
    pack: Path = PACK,
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on. Others than loopback need a key."),
    port: int = typer.Option(8080, "--port", help="0 takes a free one.", min=0, max=65535),
    api_key_file: Path = typer.Option(None, "--api-key-file", help="File with the key that requests must carry."),
    name: str = typer.Option(None, "--name", help="What the API calls the model.  [default: the pack's name]"),
    constrain: bool = typer.Option(
        True, "--constrain/--no-constrain", help="Hold tool calls and JSON to their form; without, the model is bare."
    ),
    context: int = CONTEXT,
    max_tokens: int = typer.Option(2048, "--max-tokens", help="Longest answer where a request does not say.", min=1),
    max_waiting: int = typer.Option(256, "--max-waiting", help="Requests that may wait.", min=64),
    parallel: int = typer.Option(
        2, "--parallel", help="Answers written at the same time, each with memory for --context.", min=1, max=64
    ),
    read_ahead: bool = typer.Option(
        True,
        "--read-ahead/--no-read-ahead",
        help="Read an answer for the conversation's next turn while nobody waits, with snapshots.",
    ),
    max_seconds: float = typer.Option(3600, "--max-seconds", help="Longest time for one answer.", min=1),
    seed: int = typer.Option(0, help="Of the random choices where a request does not say.", min=0),
    exact: bool = EXACT,
    experts_per_token: int = EXPERTS,
    threads: int = THREADS,
    memory: str = MEMORY,
    device: str = DEVICE,
    snapshot_memory: str = SNAPSHOT_MEMORY,
    snapshot_dir: Path = SNAPSHOT_DIRECTORY,
) -> None:
    """Serve the APIs of OpenAI and Anthropic on this machine, and a page to talk to the model."""
    from moepack.layout.reader import Pack
    from moepack.runtime.engine import read_architecture
    from moepack.runtime.memory import taken_bytes
    from moepack.runtime.tokenizer import Tokenizer

    try:  # before the budget is split: what they take is part of the process
        from moepack.runtime import server
        from moepack.runtime.constrain import Grammars
        from moepack.runtime.guard import LOOPBACK, Policy, read_api_key
        from moepack.runtime.service import SERVER_BYTES, Service, Settings
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'moepack[serve]'") from None

    api_key = None if api_key_file is None else read_api_key(api_key_file)
    if host not in LOOPBACK and api_key is None:
        raise UsageError(f"--host {host} can be reached from other machines: give --api-key-file FILE")
    listener = server.open_socket(host, port)
    with Pack.open(pack) as opened:
        tokenizer, vocab_size = Tokenizer.load(pack), read_architecture(opened).vocab_size
    grammars = Grammars(tokenizer, vocab_size) if constrain else None
    with _open_for_conversations(
        pack,
        memory,
        snapshot_memory,
        device=device,
        exact=exact,
        threads=threads,
        experts_per_token=experts_per_token,
        max_context=context,
        snapshot_directory=snapshot_dir,
        tokenizer=tokenizer,
        process_bytes=taken_bytes(device, host_bytes=SERVER_BYTES),
        sequences=parallel,
    ) as engine:
        settings = Settings(constrain, max_waiting, parallel, max_seconds, max_tokens, seed, reads_ahead=read_ahead)
        service = Service(engine, name or pack.resolve().name.removesuffix(".moepack"), settings, grammars)
        policy = Policy(api_key, LOOPBACK if host in LOOPBACK else None)
        found = listener.getsockname()
        log(f"serving {service.name} at http://{f'[{found[0]}]' if ':' in found[0] else found[0]}:{found[1]}")
        log(
            "tool calls and JSON answers are held to their form"
            if constrain
            else "note: --no-constrain: nothing is held"
        )
        server.serve(server.create_app(service, policy), listener)


@app.command(name="eval")
def evaluate(
    pack: Path = PACK,
    text: Path = typer.Option(None, "--text", help="Text file: perplexity over windows of 2048 tokens."),
    tools: Path = typer.Option(None, "--tools", help="Tool prompts with expected calls, a JSON object per line."),
    constrained: bool = typer.Option(
        False, "--constrained", help="Hold --tools to calls that are well-formed, where one is expected."
    ),
    recall: int = typer.Option(
        None, "--recall", help="Long prompts: find a fact, repeat a passage. This many of each kind and length.", min=1
    ),
    lengths: str = typer.Option(
        None, "--lengths", help="Tokens of --recall's prompts.  [default: 64,128,256 and so on to the context]"
    ),
    seed: int = typer.Option(None, "--seed", help="Of --recall's prompts.  [default: 0]", min=0),
    reference: Path = typer.Option(
        None, "--reference", help="Pack to compare with: KL, top-1 agreement, equal answers, its own right ones."
    ),
    exact: bool = EXACT,
    experts_per_token: int = EXPERTS,
    threads: int = THREADS,
    memory: str = MEMORY,
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Measure a pack: perplexity on a text, distance to a reference pack, right tool calls, recall of long prompts."""
    from moepack.layout.reader import Pack
    from moepack.runtime.engine import DEFAULT_CONTEXT, Engine, read_architecture
    from moepack.runtime.evaluate import WINDOW, encode_text, evaluate_text, evaluate_tools, read_tool_prompts
    from moepack.runtime.memory import taken_bytes
    from moepack.runtime.prompt import read_text
    from moepack.runtime.recall import RecallPlan, check_plan, choose_lengths, evaluate_recall
    from moepack.runtime.tokenizer import Tokenizer

    if text is None and tools is None and recall is None:
        raise UsageError("expected --text FILE, --tools FILE or --recall N, found none of them")
    if recall is None and (lengths is not None or seed is not None):
        raise UsageError("--lengths and --seed are of --recall N: give it, or leave them out")
    if constrained and tools is None:
        raise UsageError("--constrained is of --tools FILE: give it, or leave it out")
    with Pack.open(pack) as opened:
        context = read_architecture(opened).max_position_embeddings
    passage = None if text is None else encode_text(Tokenizer.load(pack), read_text(text), text)
    prompts = None if tools is None else read_tool_prompts(tools)
    budget = _read_budget(memory, device)
    common: dict[str, Any] = {"device": device, "exact": exact, "threads": threads}
    needed = [WINDOW] if passage is not None else []
    needed += [] if prompts is None else [DEFAULT_CONTEXT]
    plan = None if recall is None else RecallPlan(recall, choose_lengths(lengths, context, DEFAULT_CONTEXT), seed or 0)
    common["max_context"] = max(needed + ([] if plan is None else [plan.lengths[-1]]))
    if reference:
        log("note: --reference opens a second pack: they share the memory budget")
    process = taken_bytes(device)
    share = process + max(0, budget - process) // 2 if reference else budget
    engine = Engine.open(pack, memory=share, experts_per_token=experts_per_token, **common)
    _note_changes(engine.pack, engine.architecture.num_experts_per_tok)
    other = None
    if reference:
        other = Engine.open(reference, memory=budget, process_bytes=engine.memory_plan.total_bytes, **common)
    if plan is not None:
        check_plan(engine, plan)  # before hours of text
    facts: dict[str, Any] = {"tokens": None, "nll": None, "perplexity": None}
    if passage is not None:
        with open_progress(len(passage), "text", "tok") as progress:
            scores = vars(evaluate_text(engine, passage, other, progress.update))
        facts |= {key: value for key, value in scores.items() if reference or value is not None}
    if prompts is not None:
        with open_progress(len(prompts), "tools", "prompt") as progress:
            facts["tool_calls"] = vars(evaluate_tools(engine, prompts, progress.update, constrained, other))
    if plan is not None:
        with open_progress(2 * recall * sum(plan.lengths), "recall", "tok") as progress:
            facts["recall"] = evaluate_recall(engine, plan, other, progress.update)
    if as_json:
        print_json(facts)
    else:
        _print_scores(facts)


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a pack: run --model moepack --model_args pretrained=PACK --tasks NAME."""
    from moepack.runtime.harness import run

    run(context.args)


@app.command()
def calibrate(
    pack: Path = PACK,
    out: Path = typer.Option(..., "--out", "-o", help="File to write, for moe-convert --calibration."),
    text: Path = typer.Option(None, "--text", help="Text to run through the model.  [default: a bundled one]"),
    sample: int = typer.Option(0, "--sample", help="Also this many tokens that the model writes itself.", min=0),
    tools: Path = typer.Option(None, "--tools", help="Also these prompts, as eval takes them, answered by the model."),
    full: bool = typer.Option(False, "--full", help="Whole second moments, which --quantizer gptq needs: larger."),
    tune: Path = typer.Option(
        None, "--tune", help="Quantized pack of the model: tune its experts by the answers of the whole model."
    ),
    steps: int = typer.Option(None, "--steps", help="Of --tune.  [default: 1000]", min=1),
    step_tokens: int = typer.Option(
        None, "--step-tokens", help="Each of --tune's learns from, in whole 512s.  [default: 1024]", min=1
    ),
    level_rate: float = typer.Option(
        None, "--level-rate", help="Largest move of --tune's integers in a step, as a share of 1.  [default: 0.0003]"
    ),
    seed: int = typer.Option(None, "--seed", help="Of the order of windows with --tune.  [default: 0]", min=0),
    threads: int = THREADS,
    memory: str = MEMORY,
    device: str = DEVICE,
) -> None:
    """Record what the experts of a 16- or 8-bit pack read. Stopped at any time, the same command goes on."""
    from moepack.layout.reader import Pack
    from moepack.layout.writer import check_output
    from moepack.runtime import calibrate as calibration
    from moepack.runtime.engine import Engine, read_architecture
    from moepack.runtime.evaluate import WINDOW, encode_text, read_tool_prompts
    from moepack.runtime.prompt import read_text
    from moepack.runtime.tokenizer import Tokenizer
    from moepack.runtime.tune import TuningPlan, check_memory, check_start, choose_device

    check_output(out)
    if out.is_dir():
        raise UsageError(f"{out}: is a directory: give the name of a file in it")
    if tune and full:
        raise UsageError("--full and --tune: expected one of them, statistics or tuned experts")
    given = {"steps": steps, "seed": seed, "step_tokens": step_tokens, "level_rate": level_rate}
    given = {name: value for name, value in given.items() if value is not None}
    if not tune and given:
        raise UsageError(
            "--steps, --step-tokens, --level-rate and --seed are of --tune PACK: give it, or leave them out"
        )
    learns_on = choose_device(device) if tune else None
    plan = dataclasses.replace(TuningPlan(TUNING_STEPS), **given)  # type: ignore[arg-type]
    if tune:
        device = "cpu"  # of the engine, which samples
    passage = calibration.read_default_text() if text is None else read_text(text)
    prompts = read_tool_prompts(tools) if tools else []
    budget, process = _read_budget(memory, device), None
    with Pack.open(pack) as opened:
        tokenizer, a = Tokenizer.load(opened.directory), read_architecture(opened)
        token_ids = encode_text(tokenizer, passage, text or "bundled text")
        if learns_on:
            budget -= check_memory(opened, budget, plan.step_tokens, learns_on)
        else:
            size = min(WINDOW, a.max_position_embeddings)
            tokens = calibration.count_tokens(opened, tokenizer, len(token_ids), sample, prompts, size)
            process = calibration.process_bytes(a, tokens, size, full, device)
    options: dict[str, Any] = {"tokenizer": tokenizer, "process_bytes": process, "max_context": WINDOW}
    try:
        engine = Engine.open(pack, memory=budget, device=device, exact=True, threads=threads, **options)
    except MemoryBudgetError as error:
        counted = "" if process is None else f"; the process includes what {tokens:,} tokens of text take: give less"
        raise MemoryBudgetError(f"{error}{counted}") from None
    calibration.check_source(engine)
    if tune:
        with Pack.open(tune) as start:
            check_start(engine, start)  # before hours of sampling
    try:
        windows, skipped = _gather_windows(engine, token_ids, sample, prompts)
        if learns_on:
            _tune(engine, tune, windows, out, plan, learns_on)
        else:
            with open_progress(engine.architecture.num_hidden_layers, "calibrate", "layer") as progress:
                calibration.calibrate(engine, windows, out, full, progress.update)
    except KeyboardInterrupt:
        raise Interrupted(f"{out}: stopped; the same command goes on from here") from None
    log(f"{out}: {sum(map(len, windows))} tokens, {skipped} left out")


def _gather_windows(engine: Engine, token_ids: Sequence[int], sample: int, prompts: list[Any]) -> tuple[list[Any], int]:
    """Windows of token ids of the passage, of what the model writes itself and of its answers to prompts.

    Returns them with the number of the passage's tokens that are left out.
    """
    from moepack.runtime import calibrate as calibration
    from moepack.runtime.evaluate import WINDOW, split_windows

    size = min(WINDOW, engine.max_context)
    windows, skipped = split_windows(token_ids, size)
    if sample:
        with open_progress(sample, "sample", "tok") as progress:
            windows += calibration.sample_windows(engine, sample, size, progress.update)
    if prompts:
        with open_progress(len(prompts), "answer", "prompt") as progress:
            windows += calibration.answer_windows(engine, prompts, progress.update)
    return windows, skipped


def _tune(engine: Engine, start: Path, windows: list[Any], out: Path, plan: Any, device: Any) -> None:
    from moepack.layout.reader import Pack
    from moepack.runtime.tune import Tuning

    with Pack.open(start) as opened, open_progress(plan.steps, "tune", "step") as progress:
        before, after = Tuning(engine, opened, windows, out, plan, device).run(progress.update)
    log(f"{out}: KL to {engine.pack.directory} on text kept apart {before:.4f}, now {after:.4f}")
    if not after < before:  # as it is not where a number became none
        log(f"note: that is no gain, so the file holds the experts of {start}: give more text or --steps")


def _read_budget(memory: str | None, device: str) -> int:
    """Bytes of --memory, or what the machine can give. Raises UsageError."""
    from moepack.runtime.memory import default_budget_bytes

    return default_budget_bytes(device) if memory is None else parse_size(memory)


def _open_for_conversations(
    pack: Path, memory: str | None, snapshot_memory: str | None, *, device: str, **options: Any
) -> Engine:
    """An engine that keeps the states of earlier turns. options: those of Engine.open, as they are."""
    from moepack.runtime.engine import Engine

    directory = options["snapshot_directory"]
    if directory is not None and directory.exists() and not directory.is_dir():
        raise UsageError(f"--snapshot-dir {directory}: is no directory: give another, or one that shall be made")
    budget = _read_budget(memory, device)
    snapshot_bytes = None if snapshot_memory is None else parse_size(snapshot_memory)
    engine = Engine.open(pack, memory=budget, device=device, snapshot_bytes=snapshot_bytes, **options)
    _note_changes(engine.pack, engine.architecture.num_experts_per_tok)
    return engine


def _run_generation(engine: Engine, generation: Generation, progress: tqdm, as_json: bool) -> None:
    from moepack.runtime.stats import format_stats

    stream = engine.tokenizer.decoder()
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)

    try:
        for token_id in generation:
            progress.close()  # the prompt is done
            show(stream.push(token_id))
        show(stream.finish())
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {len(generation.token_ids)} tokens") from None
    finally:
        progress.close()
        if not as_json:
            print(flush=True)
            log(format_stats(generation.stats()))
    if as_json:
        print_json(
            {
                "text": "".join(pieces),
                "token_ids": generation.token_ids,
                "finish_reason": generation.finish_reason,
                "stats": vars(generation.stats()),
            }
        )


@contextlib.contextmanager
def _record_trace(engine: Engine, path: Path | None) -> Iterator[None]:
    """Record what the engine's store does, if a file is given. Raises UsageError if it cannot be opened."""
    from moepack.layout.machine import load_limits
    from moepack.layout.summary import count_token_bytes
    from moepack.layout.trace_file import TraceWriter

    if path is None:
        yield
        return
    plan, limits = engine.memory_plan, load_limits(engine.pack.directory)
    facts = {"num_slots": plan.num_slots, "block_bytes": plan.slot_bytes, **vars(limits), **engine.describe()}
    facts["token_bytes"] = count_token_bytes(engine.pack, engine.architecture.num_experts_per_tok)
    with TraceWriter.open(path, engine.pack.manifest.model["text_config"], facts) as recorder:
        engine.store.recorder = recorder
        try:
            yield
        finally:
            engine.store.recorder = None


def _note_changes(pack: Pack, experts_per_token: int) -> None:
    """What makes the answer another one than the model's is said, always."""
    from moepack.runtime.engine import describe_changes

    if changes := describe_changes(pack, experts_per_token):
        log(f"note: {changes}")


def _print_plan(engine: Engine) -> None:
    from moepack.layout.sizes import format_size

    for name, value in vars(engine.memory_plan).items():
        title, is_size = name.removesuffix("_bytes"), name.endswith("_bytes")
        log(f"memory: {title:14} {format_size(value) if is_size else value!s:>12}")
    for name, value in engine.describe().items():
        log(f"{name}: {value}")


def _print_scores(facts: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [("measure", "value", "95 % interval")]
    _append_scores(rows, "", facts)
    print_table(rows)


def _append_scores(rows: list[tuple[str, ...]], prefix: str, values: dict[str, Any]) -> None:
    """A row for each number, with its interval; parts of a score, as those by length, have a prefix that names them."""
    for name, value in values.items():
        if isinstance(value, dict) and name != "intervals":
            _append_scores(rows, f"{prefix}{name.replace('_', ' ')}: ", value)
        elif isinstance(value, list) and name.startswith("by_"):
            part = name.removeprefix("by_")
            for one in value:
                label = f"{one[part]:,} tokens" if part == "length" else f"{part} {one[part]:.0%}"
                shown = {key: number for key, number in one.items() if key != part}
                _append_scores(rows, f"{prefix}{label}: ", shown)
        elif isinstance(value, (int, float)):
            low, high = values.get("intervals", {}).get(name, (None, None))
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            rows.append((f"{prefix}{name}", f"{value:.4f}" if isinstance(value, float) else str(value), interval))

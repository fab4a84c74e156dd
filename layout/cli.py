"""moe-inspect: what is in a pack, and is it whole.

moe-inspect show PACK
moe-inspect diff PACK OTHER
moe-inspect verify PACK --quick
moe-inspect doctor PACK
moe-inspect plan config.json --bits 4,2 --memory 48GiB
moe-inspect trace RUN.trace --slots 500,40% --token 17 -o token.png
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moepack.layout.architecture import Architecture
from moepack.layout.console import (
    EXIT_CODES,
    VERSION,
    create_app,
    log,
    open_progress,
    print_json,
    print_lines,
    print_table,
    run_app,
)
from moepack.layout.difference import compare_packs
from moepack.layout.doctor import Finding, examine_disk, examine_machine
from moepack.layout.errors import EXIT_DAMAGED, EXIT_FAILED, MoepackError, UsageError
from moepack.layout.geometry import BlockGeometry
from moepack.layout.machine import MAX_GB_S, MIN_GB_S, Limits, known_machine, save_settings
from moepack.layout.process import resident_set_bytes
from moepack.layout.reader import REDO, Pack
from moepack.layout.report import (
    describe_differences,
    describe_errors,
    describe_pack,
    describe_plan,
    describe_timeline,
    describe_trace_facts,
)
from moepack.layout.sizes import format_size, parse_size
from moepack.layout.spec import MANIFEST_NAME
from moepack.layout.summary import summarize
from moepack.layout.tensor_file import parse_json_object
from moepack.layout.timeline import list_times, trace_token
from moepack.layout.trace import Replay, Trace, compare_policies
from moepack.layout.trace_file import read_trace
from moepack.layout.trace_report import describe_trace
from moepack.layout.verify import Problem, list_regions, verify_contents, verify_structure
from moepack.layout.writer import check_output

if TYPE_CHECKING:  # imported where it is used: looking into a pack needs neither checkpoints nor torch
    from moepack.convert.comparison import ExpertError
    from moepack.runtime.forecast import Candidate, Row, Workload

LONGEST_CHUNK = 512  # of a prompt, to be timed: longer ones cost the same per token, but for attention

app = create_app("moe-inspect")
PACK = typer.Argument(metavar="PACK", help="Directory that moe-convert wrote.", show_default=False)
JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")


def main() -> None:
    """Entry point of moe-inspect."""
    run_app(app)


@app.callback(epilog=EXIT_CODES)
def options(version: bool = VERSION) -> None:
    """Look into a pack: its layout and sizes, and whether every byte of it is right; replay what a run asked for."""


@app.command()
def show(pack: Path = PACK, as_json: bool = JSON) -> None:
    """Print the model, the sizes, bits per weight, blocks and provenance of a pack. Reads the manifest only."""
    with Pack.open(pack) as opened:
        facts = summarize(opened)
    if as_json:
        print_json(facts)
    else:
        print_lines(describe_pack(facts))


@app.command()
def diff(
    pack: Path = PACK,
    other: Path = typer.Argument(metavar="OTHER", help="The pack to compare it with.", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Tell what differs between two packs: settings, model, tiers, experts, resident tensors, copied files.

    Compares what the manifests say, digests included; the files themselves are verify's matter.

    Exit code 0 if the packs are the same, 1 if anything differs.
    """
    with Pack.open(pack) as first, Pack.open(other) as second:
        differences = compare_packs(first.manifest, second.manifest)
    if as_json:
        print_json({"same": not differences, "differences": [vars(difference) for difference in differences]})
    else:
        print_lines(describe_differences(differences) or [f"{pack} and {other}: the same"])
    if differences:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def verify(
    pack: Path = PACK,
    quick: bool = typer.Option(False, "--quick", help="Structure only: manifest, sizes, strays, headers."),
    sample: str = typer.Option(None, "--sample", help="Read a random share of the blocks, as in 5%."),
    source: str = typer.Option(
        None, "--source", help="Compare with the original, a directory or hf://org/repo: the error of each expert."
    ),
    as_json: bool = JSON,
) -> None:
    """Check every byte of a pack against its checksums; name each problem with file, layer, expert and offset.

    Exit code 3 if anything is wrong.
    """
    share = _parse_share(sample)
    if quick and (sample or source):
        raise UsageError("--quick reads no blocks: leave out --sample and --source, or --quick")
    started = time.perf_counter()
    opened, problems = verify_structure(pack)
    structural = {problem.file for problem in problems}
    regions = [] if quick else list_regions(opened, share)
    regions = [region for region in regions if str(pack / region.file) not in structural]
    total = sum(region.size_bytes for region in regions)
    if regions:
        with opened, open_progress(total, "verify") as progress:
            problems += verify_contents(opened, regions, progress.update)
    blocks = [(region.layer, region.expert) for region in regions if region.what == "block"]
    facts = {"bytes_read": total, "blocks": len(blocks), "seconds": round(time.perf_counter() - started, 3)}
    errors: list[ExpertError] = []
    if source:
        damaged = {(problem.layer, problem.expert) for problem in problems}
        errors = _measure_errors(opened, source, [block for block in blocks if block not in damaged])
        problems += _find_unrelated(opened, errors)
    if as_json:
        comparison = {"source": _summarize_errors(errors)} if source else {}
        print_json({"ok": not problems, **facts, "problems": [vars(p) for p in problems], **comparison})
    else:
        extent = "structure only" if quick else f"{len(blocks)} blocks, {format_size(total)} read"
        _print_verdict(pack, problems, extent)
        if source:
            print(f"\nrelative RMS error of {len(errors)} experts against {source}:")
            print_lines(describe_errors(_summarize_errors(errors)))
    if problems:
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def plan(
    model: Path = typer.Argument(
        metavar="PACK|CONFIG", help="A pack, or a config.json of a model to convert.", show_default=False
    ),
    memory: str = typer.Option(
        None, "--memory", help="Budgets, as in 8GiB,16GiB.  [default: what this machine can give, a half, a quarter]"
    ),
    bits: str = typer.Option("4,3,2", "--bits", help="Of the experts, separated by commas; of a config alone."),
    group_size: int = typer.Option(64, "--group-size", help="Of a config alone."),
    resident_bits: int = typer.Option(8, "--resident-bits", help="Of a config alone."),
    disk: Path = typer.Option(None, "--disk", help="Directory on the disk to measure, with a config.  [default: here]"),
    ssd_gbps: float = typer.Option(None, "--ssd-gbps", help="Another disk: GB/s, instead of measuring this one."),
    mem_gbps: float = typer.Option(None, "--mem-gbps", help="Another memory: GB/s of reading it."),
    machine: str = typer.Option(None, "--machine", help="Another machine of a table of Macs, as in m4-max."),
    trace: Path = typer.Option(None, "--trace", help="Take the hit rate from a recorded run."),
    hit_rate: str = typer.Option(None, "--hit-rate", help="State it, as in 60%.  [default: all are equally likely]"),
    prompt_tokens: int = typer.Option(512, "--prompt-tokens", help="Length of the prompt.", min=1),
    context: int = typer.Option(4096, "--context", help="Positions to hold memory for.", min=1),
    threads: int = typer.Option(None, "--threads", help="Threads of the arithmetic.  [default: one per core]", min=1),
    seconds: float = typer.Option(0.7, "--seconds", help="Of each measurement of the disk.", min=0.05, max=60),
    save: bool = typer.Option(True, "--save/--no-save", help="Keep what suits this machine beside the pack."),
    as_json: bool = JSON,
) -> None:
    """Predict what this machine will do with a model: memory, hits, time to the first token, tokens per second.

    Measures the disk, memory and the kernels; with a pack, moe-run then uses what was found. Exit code 1 if no budget
    can hold the model.
    """
    from moepack.kernels.backend import choose_backend
    from moepack.runtime.engine import choose_threads
    from moepack.runtime.forecast import Workload, check_budgets, forecast, list_facts, recommend
    from moepack.runtime.machine_costs import count_steps, measure_machine

    ssd_gb_s, memory_gb_s = _other_machine(machine, ssd_gbps, mem_gbps)
    share = None if hit_rate is None else _parse_share(hit_rate, "--hit-rate")
    work = Workload(prompt_tokens, context, share, None if trace is None else read_trace(trace))
    budgets = _list_budgets(memory)
    architecture, candidates, pack = _open_model(model, bits, group_size, resident_bits)
    ops, _ = choose_backend("auto", threads=choose_threads(threads))
    check_budgets(architecture, candidates, budgets, resident_set_bytes(), context, ops.cache_dtype)
    with open_progress(count_steps(len(candidates)), "measure", "step") as progress:
        measured = measure_machine(
            architecture,
            candidates,
            pack or disk or Path(),
            ops,
            seconds=seconds,
            chunk_tokens=min(prompt_tokens, LONGEST_CHUNK),
            ssd_gb_s=ssd_gb_s,
            memory_gb_s=memory_gb_s,
            on_step=progress.update,
        )
    rows = forecast(architecture, candidates, budgets, measured.machine, work)
    best = recommend(rows)
    advice = _advise(best)
    if pack and save and best and not (ssd_gb_s or memory_gb_s):
        settings = replace(measured.machine.settings, prefetch=best.reads_ahead)
        limits = Limits(
            measured.machine.memory_gb_s, max(speed.gb_s for speed in measured.speeds if not speed.in_order)
        )
        found = {**vars(limits), "disk": [vars(speed) for speed in measured.speeds]}
        advice.append(f"moe-run reads so here from now on: {save_settings(model, settings, found)}")
    report = {
        "model": str(model),
        "machine": measured.facts,
        "disk": [vars(speed) for speed in measured.speeds],
        "while_computing": measured.busy,
        "arithmetic": {title: vars(costs) for title, costs in measured.machine.arithmetic.items()},
        "assumptions": _list_assumptions(work, memory_gb_s),
        "rows": list_facts(rows),
        "recommended": list_facts([best])[0] if best else None,
        "advice": advice,
    }
    if as_json:
        print_json(report)
    else:
        print_lines(describe_plan(report))


def _other_machine(
    name: str | None, ssd_gbps: float | None, mem_gbps: float | None
) -> tuple[float | None, float | None]:
    """GB/s of disk and memory of the machine that is asked about; None is this one's. Raises UsageError."""
    if name:
        known = known_machine(name)
        ssd_gbps, mem_gbps = ssd_gbps or known.ssd_gb_s, mem_gbps or known.memory_gb_s
        log(f"{name}: {known.source}")
    for option, value in (("--ssd-gbps", ssd_gbps), ("--mem-gbps", mem_gbps)):
        if name and value is None:
            raise UsageError(f"--machine {name}: no source says this of it: give {option}")
    return _check_speeds(ssd_gbps, mem_gbps)


def _check_speeds(ssd_gbps: float | None, mem_gbps: float | None) -> tuple[float | None, float | None]:
    """The speeds as they were given. Raises UsageError for impossible ones."""
    for option, value in (("--ssd-gbps", ssd_gbps), ("--mem-gbps", mem_gbps)):
        if value is not None and not MIN_GB_S <= value < MAX_GB_S:
            raise UsageError(f"{option} {value:g}: expected GB/s, from {MIN_GB_S:g} and below {MAX_GB_S}")
    return ssd_gbps, mem_gbps


def _open_model(
    path: Path, bits: str, group_size: int, resident_bits: int
) -> tuple[Architecture, list[Candidate], Pack | None]:
    """The model's sizes and the ways to store it: a pack's own, or those asked for of a config. Raises UsageError."""
    from moepack.convert.recipe import Recipe
    from moepack.convert.sources import Weight
    from moepack.runtime.engine import read_architecture
    from moepack.runtime.forecast import Candidate

    if path.is_dir():
        pack = Pack.open(path)
        return read_architecture(pack), [Candidate.of_pack(pack)], pack
    try:
        config = parse_json_object(path.read_bytes())
        architecture = Architecture.from_config(config)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}: give a pack or a config.json") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    plain = Weight("", (), "BF16", "BF16", 0)  # of a release that is not quantized
    candidates = []
    for text in bits.split(","):
        try:
            recipe = Recipe(int(text), group_size, resident_bits, "minmax")
            block = BlockGeometry.of(
                architecture.hidden_size, architecture.moe_intermediate_size, recipe.expert_schemes
            )
            scheme_of = partial(recipe.resident_scheme, weight=plain)
            one = Candidate.of_schemes(f"{int(text)} bits", architecture, block, scheme_of)
        except ValueError as error:
            raise UsageError(f"--bits {text} in groups of {group_size}: {error}") from None
        candidates.append(one)
    return architecture, candidates, None


def _list_budgets(text: str | None) -> list[int]:
    """The budgets asked for, or what the machine can give, a half and a quarter of it."""
    from moepack.runtime.memory import default_budget_bytes

    if text is not None:
        return [parse_size(part) for part in text.split(",")]
    most = default_budget_bytes()
    return [most // 4, most // 2, most]


def _list_assumptions(work: Workload, mem_gbps: float | None) -> list[str]:
    if work.hit_rate is not None:
        hits = f"{work.hit_rate:.0%} of a token's experts are in memory, as stated"
    elif work.trace:
        hits = "experts are asked for as in the trace"
    else:
        hits = "all experts are equally likely, which is the least that a cache can do: real models repeat themselves"
    scaled = ["arithmetic is as much faster as memory is; a GPU's share in a prompt is not counted"] if mem_gbps else []
    return [hits, f"a prompt of {work.prompt_tokens} tokens that finds no expert in memory", *scaled]


def _advise(best: Row | None) -> list[str]:
    if best is None or best.prediction is None:
        return ["no budget holds the model: raise --memory, lower --context, or take fewer bits"]
    ahead = "on" if best.reads_ahead else "off"
    fewer = " (slower than reading: no more bits were found to be faster)" if best.prediction.decode_tok_s < 5 else ""
    text = f"recommended: {best.title}, --memory {format_size(best.budget_bytes).replace(' ', '')}"
    return [f"{text}, reading ahead {ahead}: {best.prediction.decode_tok_s:.1f} tok/s{fewer}"]


@app.command()
def trace(
    file: Path = typer.Argument(metavar="FILE", help="Written by moe-run generate --trace.", show_default=False),
    slots: str = typer.Option(
        "10%,20%,40%,60%,80%", "--slots", help="Experts in memory: numbers, or shares of all, separated by commas."
    ),
    token: int = typer.Option(None, "--token", help="A decoded token, layer by layer; 1 is the first."),
    out: Path = typer.Option(None, "-o", "--out", help="PNG file for a picture of it.  [default token: a median one]"),
    ssd_gbps: float | None = typer.Option(
        None, "--ssd-gbps", help="The disk's limit, GB/s.  [default: as the run knew it]"
    ),
    mem_gbps: float | None = typer.Option(None, "--mem-gbps", help="The memory's limit, GB/s of reading it."),
    as_json: bool = JSON,
) -> None:
    """Replay a routing trace: which share of the experts would have been in memory, by policy and size of memory.

    lru, lfu and lrfu decide as moe-run can; belady knows the future: nothing hits more. Then who is popular, how good
    guesses are, and where a token's time went beside the limits of the machine.
    """
    ssd_gbps, mem_gbps = _check_speeds(ssd_gbps, mem_gbps)
    limits = Limits(memory_gb_s=mem_gbps, disk_gb_s=ssd_gbps)
    if out:
        check_output(out)
    recorded = read_trace(file)
    sizes = [_parse_slots(text.strip(), recorded) for text in slots.split(",")]
    timeline = trace_token(recorded, token) if token is not None or out else None
    if timeline and out:
        from moepack.layout.picture import draw_timeline

        draw_timeline(timeline, out)
    rows = [(num_slots, compare_policies(recorded, num_slots)) for num_slots in sizes]
    facts = describe_trace(recorded, limits)
    if as_json:
        print_json(_list_replays(recorded, rows) | facts | ({"timeline": list_times(timeline)} if timeline else {}))
        return
    print(f"{file}: {recorded.num_tokens} tokens decoded; hits in decode:\n")
    table: list[tuple[str, ...]] = [("slots", "of all", *rows[0][1])]
    for num_slots, by_policy in rows:
        rates = ("-" if found.hit_rate is None else f"{found.hit_rate:.1%}" for found in by_policy.values())
        table.append((str(num_slots), f"{num_slots / recorded.num_blocks:.0%}", *rates))
    print_table(table)
    print()
    print_lines(describe_trace_facts(facts))
    if timeline:
        print_lines(["", *describe_timeline(timeline), *([f"{out}: drawn"] if out else [])])


@app.command(name="map")
def draw(
    pack: Path = PACK,
    out: Path = typer.Option(..., "-o", "--out", help="PNG file to write.", show_default=False),
    trace: Path = typer.Option(None, "--trace", help="Recorded by moe-run --trace: for the other colours."),
    colour: str = typer.Option(None, "--colour", help="bits, use, hits or read.  [default: bits; use with a trace]"),
    as_json: bool = JSON,
) -> None:
    """Draw a pack as it lies on the disk: every file a row, every block coloured by bits, use, hits or read time."""
    from moepack.layout.picture import KINDS, colours_of_bits, colours_of_trace, draw_map

    kind = colour or ("use" if trace else "bits")
    if kind not in KINDS:
        raise UsageError(f"--colour {kind}: expected one of {', '.join(KINDS)}")
    if kind != "bits" and not trace:
        raise UsageError(f"--colour {kind} needs a recorded run: give --trace FILE")
    check_output(out)
    with Pack.open(pack) as opened:
        manifest = opened.manifest
    recorded = read_trace(trace) if trace else None
    if recorded and (recorded.num_hidden_layers, recorded.num_experts) != (
        manifest.shape.num_hidden_layers,
        manifest.shape.num_experts,
    ):
        raise UsageError(f"{trace}: is of another model than {pack}")
    colours = colours_of_trace(manifest, recorded, kind) if recorded and kind != "bits" else colours_of_bits(manifest)
    draw_map(manifest, colours, out)
    if as_json:
        print_json({"picture": str(out), "colour": kind, "files": len(manifest.expert_files)})
    else:
        print(f"{out}: {len(manifest.expert_files)} files, coloured by {colours.title}")


def _list_replays(recorded: Trace, rows: list[tuple[int, dict[str, Replay]]]) -> dict[str, Any]:
    names = ("num_hidden_layers", "num_experts", "num_experts_per_tok", "facts")
    facts = {name: getattr(recorded, name) for name in names}
    replays = [
        {"slots": slots} | {name: {**vars(found), "hit_rate": found.hit_rate} for name, found in by_policy.items()}
        for slots, by_policy in rows
    ]
    return {**facts, "decoded_tokens": recorded.num_tokens, "replays": replays}


def _parse_slots(text: str, recorded: Trace) -> int:
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%")) / 100 * recorded.num_blocks if share else int(text)
        number = max(1, number) if share and number > 0 else number  # of a tiny model, a share may be less than one
    except ValueError:
        number = 0
    if not 1 <= number <= recorded.num_blocks:
        raise UsageError(f"--slots {text}: expected 1 to {recorded.num_blocks}, or a share such as 40%")
    return int(number)


def _parse_share(text: str | None, option: str = "--sample") -> float:
    if text is None:
        return 1.0
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        what = "a share of the blocks such as 5%" if option == "--sample" else "a share such as 5%"
        raise UsageError(f"{option} {text}: expected {what} or 0.05")
    return share


def _print_verdict(pack: Path, problems: list[Problem], extent: str) -> None:
    for problem in problems:
        print(problem.text)
    if not problems:
        print(f"{pack}: well ({extent})")
        return
    print(f"{pack}: {len(problems)} problem{'s' * (len(problems) > 1)} ({extent})")
    blocks = [problem for problem in problems if problem.repair.startswith(REDO)]
    for repair, count in Counter(problem.repair for problem in problems if problem not in blocks).items():
        log(f"for {count} of them: {repair}")
    if blocks:
        places = " ".join(dict.fromkeys(f"--redo {problem.layer}:{problem.expert}" for problem in blocks))
        log(f"for {len(blocks)} of them: moe-convert SRC {pack} {places}")


@app.command()
def doctor(
    path: Path = typer.Argument(Path(), metavar="[PATH]", help="A pack, or the directory where one shall be."),
    as_json: bool = JSON,
) -> None:
    """Look at this machine: one line for each thing that decides the speed, with advice where it costs some.

    Exit code 1 if moepack cannot run here, whatever its speed.
    """
    directory = path if path.is_dir() else path.parent
    if not directory.is_dir():
        raise UsageError(f"{path}: no such directory: give a pack, or a directory where one shall be")
    lock_bytes = 0
    if (path / MANIFEST_NAME).exists():
        with Pack.open(path) as pack:
            lock_bytes = pack.manifest.resident.size_bytes
    findings = [*_examine_arithmetic(), *examine_machine(lock_bytes), *examine_disk(directory)]
    if as_json:
        print_json({"ok": not any(one.advice for one in findings), "findings": [vars(one) for one in findings]})
    else:
        width = max(len(one.name) for one in findings)
        for one in findings:
            print(f"{one.name:{width}}  {one.text}")
            if one.advice:
                print(f"{'':{width}}  -> {one.advice}")
    if any(one.blocks for one in findings):
        raise typer.Exit(EXIT_FAILED)


def _examine_arithmetic() -> list[Finding]:
    """torch, the backend that would be chosen, and the native core's instruction set."""
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", None, f"missing: {error}", "pip install moepack, with its dependencies", blocks=True)]
    from moepack.kernels.backend import choose_backend, describe_backend
    from moepack.kernels.native_library import isa
    from moepack.runtime.engine import choose_threads

    findings = [Finding("torch", torch.__version__, torch.__version__)]
    try:
        ops, device = choose_backend("auto", threads=choose_threads(None))
        name = isa()
    except MoepackError as error:
        return [*findings, Finding("backend", None, "none", str(error), blocks=True)]
    findings.append(Finding("backend", device, f"{device}: {describe_backend(ops)}"))
    advice = "no kernels for this processor: expect a tenth of the speed" if name == "portable" else None
    return [*findings, Finding("instruction set", name, name, advice)]


def _measure_errors(pack: Pack, source: str, blocks: Sequence[tuple[Any, Any]]) -> list[ExpertError]:
    from moepack.convert.comparison import Original, measure_errors

    with (
        pack,
        Original.find(source, pack) as original,
        open_progress(len(blocks), "compare", "expert") as progress,
    ):
        errors = []
        for error in measure_errors(original, pack, blocks):
            errors.append(error)
            progress.update()
    return errors


def _summarize_errors(errors: list[ExpertError]) -> dict[str, Any]:
    from moepack.convert.comparison import summarize_errors

    return summarize_errors(errors)


def _find_unrelated(pack: Pack, errors: list[ExpertError]) -> list[Problem]:
    """Blocks that hold something else than the source's weights, checksum or not."""
    from moepack.convert.comparison import UNRELATED

    problems = []
    for error in errors:
        wrong = [f"{name} {value:.2f}" for name, value in error.relative_rms.items() if not value < UNRELATED]
        if wrong:
            text = f"is not the source's expert: relative error of {', '.join(wrong)}"
            damage = pack.damaged_block(error.layer, error.expert, text)
            problems.append(Problem.of(damage, f"{REDO} {error.layer}:{error.expert}"))
    return problems

"""moe-inspect: what is in a pack, and is it whole.

moe-inspect show PACK
moe-inspect diff PACK OTHER
moe-inspect verify PACK --quick
moe-inspect doctor PACK
moe-inspect trace ROUTING.jsonl --slots 500,40%
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moepack.layout.console import (
    EXIT_CODES,
    VERSION,
    create_app,
    log,
    open_progress,
    print_json,
    print_table,
    run_app,
)
from moepack.layout.difference import Difference, compare_packs
from moepack.layout.doctor import Finding, examine_disk, examine_machine
from moepack.layout.errors import EXIT_DAMAGED, EXIT_FAILED, MoepackError, UsageError
from moepack.layout.reader import Pack
from moepack.layout.sizes import format_size
from moepack.layout.spec import MANIFEST_NAME
from moepack.layout.summary import summarize
from moepack.layout.trace import Replay, Trace, compare_policies, read_trace
from moepack.layout.verify import REDO, Problem, list_regions, verify_contents, verify_structure

if TYPE_CHECKING:  # imported where it is used: looking into a pack needs neither checkpoints nor torch
    from moepack.convert.comparison import ExpertError

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
        _print_summary(facts)


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
        _print_differences(pack, other, differences)
    if differences:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def verify(
    pack: Path = PACK,
    quick: bool = typer.Option(False, "--quick", help="Structure only: manifest, sizes, strays, headers."),
    sample: str = typer.Option(None, "--sample", help="Read a random share of the blocks, as in 5%."),
    source: Path = typer.Option(
        None, "--source", help="Compare with the original checkpoint: the error of each expert's weights."
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
            _print_errors(source, _summarize_errors(errors))
    if problems:
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def trace(
    file: Path = typer.Argument(metavar="FILE", help="Written by moe-run generate --trace.", show_default=False),
    slots: str = typer.Option(
        "10%,20%,40%,60%,80%", "--slots", help="Experts in memory: numbers, or shares of all, separated by commas."
    ),
    as_json: bool = JSON,
) -> None:
    """Replay a routing trace: which share of the experts would have been in memory, by policy and size of memory.

    lru, lfu and lrfu decide as moe-run can; belady knows the future: nothing hits more.
    """
    recorded = read_trace(file)
    sizes = [_parse_slots(text.strip(), recorded) for text in slots.split(",")]
    rows = [(num_slots, compare_policies(recorded, num_slots)) for num_slots in sizes]
    if as_json:
        print_json(_list_replays(recorded, rows))
        return
    print(f"{file}: {recorded.num_tokens} tokens decoded; hits in decode:\n")
    table: list[tuple[str, ...]] = [("slots", "of all", *rows[0][1])]
    for num_slots, by_policy in rows:
        rates = ("-" if found.hit_rate is None else f"{found.hit_rate:.1%}" for found in by_policy.values())
        table.append((str(num_slots), f"{num_slots / recorded.num_blocks:.0%}", *rates))
    print_table(table)


def _list_replays(recorded: Trace, rows: list[tuple[int, dict[str, Replay]]]) -> dict[str, Any]:
    facts = {name: value for name, value in vars(recorded).items() if name != "requests"}
    replays = [
        {"slots": slots} | {name: {**vars(found), "hit_rate": found.hit_rate} for name, found in by_policy.items()}
        for slots, by_policy in rows
    ]
    return {**facts, "decoded_tokens": recorded.num_tokens, "replays": replays}


def _parse_slots(text: str, recorded: Trace) -> int:
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%")) / 100 * recorded.num_blocks if share else int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= recorded.num_blocks:
        raise UsageError(f"--slots {text}: expected 1 to {recorded.num_blocks}, or a share such as 40%")
    return int(number)


def _parse_share(text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {text}: expected a share of the blocks such as 5% or 0.05")
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


def _measure_errors(pack: Pack, source: Path, blocks: Sequence[tuple[Any, Any]]) -> list[ExpertError]:
    from moepack.convert.comparison import Original, measure_errors

    with pack, open_progress(len(blocks), "compare", "expert") as progress:
        original = Original.open(source, pack)
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


def _print_errors(source: Path, facts: dict[str, Any]) -> None:
    print(f"\nrelative RMS error of {facts['experts']} experts against {source}:")
    rows: list[tuple[str, ...]] = [("", "median", "99 %", "worst", "its layer and expert")]
    for name, part in facts["projections"].items():
        worst = part["worst"]
        place = f"{worst['layer']}:{worst['expert']}"
        rows.append((name, *(_show_error(value) for value in (part["median"], part["p99"], worst["error"])), place))
    print_table(rows)
    named = [f"{one['layer']}:{one['expert']} ({_show_error(one['error'])})" for one in facts["worst_experts"]]
    print(f"worst experts: {', '.join(named)}")


def _show_error(error: float | None) -> str:
    return "infinite" if error is None else f"{error:.4f}"


def _print_differences(pack: Path, other: Path, differences: list[Difference]) -> None:
    if not differences:
        print(f"{pack} and {other}: the same")
        return
    for part, group in groupby(differences, key=lambda difference: difference.part):
        print(f"{part}:")
        for difference in group:
            print(f"  {difference.text}")


def _print_summary(facts: dict[str, Any]) -> None:
    print(f"{facts['pack']}: {facts['architecture']}, format version {facts['format_version']}")
    print(
        f"{facts['num_hidden_layers']} layers, {facts['num_experts']} experts of "
        f"{facts['moe_intermediate_size']} x {facts['hidden_size']}, {facts['num_experts_per_tok']} per token; "
        f"{format_size(facts['size_bytes'])} in {facts['num_files']} files\n"
    )
    blocks = [(title, facts[key]) for title, key in (("experts", "experts"), ("mtp experts", "mtp_experts"))]
    blocks = [(title, part) for title, part in blocks if part]
    rows: list[tuple[str, ...]] = [("weights", "count", "size", "bits per weight")]
    for title, part in blocks:
        rows.append(_row(title, part["weights"], part["payload_bytes"], part["bits_per_weight"]))
        for name, kind in part["classes"].items():
            rows.append(_row(f"  {name}", kind["weights"], kind["payload_bytes"], kind["bits_per_weight"]))
    resident = facts["resident"]
    rows.append(_row("resident", resident["weights"], resident["payload_bytes"], resident["bits_per_weight"]))
    for title, part in resident["classes"].items():
        rows.append(_row(f"  {title}", part["weights"], part["size_bytes"], part["bits_per_weight"]))
    print_table(rows)
    print()
    rows = [("blocks", "count", "bits", "groups", "stride", "padding", "share")]
    for title, part in blocks:
        for tier in part["tiers"]:
            share = tier["padding_bytes"] / tier["block_stride"]
            bits = "/".join(map(str, tier["bits"]))
            groups = "/".join(str(size or "-") for size in tier["group_sizes"])
            sizes = (format_size(tier[key]) for key in ("block_stride", "padding_bytes"))
            rows.append((title, f"{tier['blocks']:,}", bits, groups, *sizes, f"{share:.1%}"))
    print_table(rows)
    print(f"\ncopied files: {', '.join(facts['copied_files']) or 'none'}")
    provenance = facts["provenance"]
    settings = _object(provenance.get("settings"))
    arguments = ", ".join(f"{key} {value}" for key, value in _object(settings.get("arguments")).items())
    print(f"converted from {provenance.get('source')} by moepack {settings.get('tool_version')}: {arguments}")
    notes = provenance.get("notes")
    for note in notes if isinstance(notes, list) else []:
        print(f"note: {note}")


def _object(value: Any) -> dict[str, Any]:
    """Provenance is free-form: what is no object counts as an empty one."""
    return value if isinstance(value, dict) else {}


def _row(title: str, weights: int, size_bytes: int, bits_per_weight: float) -> tuple[str, ...]:
    return title, f"{weights:,}", format_size(size_bytes), f"{bits_per_weight:.3f}"

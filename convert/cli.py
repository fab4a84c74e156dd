"""moe-convert: from an original checkpoint to a pack.

moe-convert Qwen3.5-397B-A17B qwen397b.moepack --bits 4
moe-convert demo/checkpoint demo.moepack --bits 2 --group-size 32 --dry-run
moe-convert Qwen3.5-397B-A17B qwen397b.moepack --bits mixed --target-size 160GB --calibration qwen397b.calibration
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer

from moepack.convert.allocation import Allocation
from moepack.convert.archive import is_archive, pack_archive, unpack_archive
from moepack.convert.export import TARGETS, export, forecast
from moepack.convert.hub import Mirror, is_hub_address
from moepack.convert.journal import finish_interrupted_manifest
from moepack.convert.memory import DEFAULT_MEMORY, fit_threads
from moepack.convert.pipeline import convert, estimate_seconds
from moepack.convert.plan import (
    ConversionPlan,
    check_free_space,
    find_finished,
    finish_interrupted_removal,
    plan_conversion,
    remove_output,
)
from moepack.convert.quantizers import AUTO_QUANTIZER, QUANTIZERS
from moepack.convert.ray_engine import SharedDirectory, convert_layers, import_ray
from moepack.convert.recipe import AUTO_GROUP_SIZE, MIXED, MIXED_BITS, Recipe
from moepack.convert.repair import parse_places, recipe_of, repair_blocks
from moepack.convert.report import Report
from moepack.convert.url_output import UrlOutput, is_url
from moepack.layout.calibration import Calibration
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
from moepack.layout.errors import CalibrationError, Interrupted, NotEnoughSpace, UsageError
from moepack.layout.process import peak_rss_bytes
from moepack.layout.sizes import format_size, parse_size
from moepack.layout.spec import (
    GROUP_SIZES,
    MANIFEST_NAME,
    PROJECTIONS,
    QUANTIZED_BITS,
    RESIDENT_NAME,
    UNQUANTIZED_BITS,
)
from moepack.layout.writer import check_output

DEFAULT_BITS = "4"
ENGINES = ("local", "ray")
RESIDENT_BITS = (4, 8, UNQUANTIZED_BITS)
# Parameters that say how a pack's weights are made: without a meaning where a pack is taken as it is.
SETTINGS = ("bits", "bpw", "target_size", "group_size", "resident_bits", "quantizer")
MAKING = (*SETTINGS, "calibration", "memory", "scratch", "engine", "overwrite", "redo")


def main() -> None:
    """Entry point of moe-convert."""
    run_app(app)


app = create_app("moe-convert")


@app.command(epilog=EXIT_CODES)
def convert_checkpoint(
    context: typer.Context,
    source: str = typer.Argument(
        metavar="SRC", help="Directory of the original checkpoint, or hf://org/repo[@revision].", show_default=False
    ),
    out: str = typer.Argument(
        metavar="OUT", help="Directory to write the pack into; with --engine ray also a URL.", show_default=False
    ),
    to: str = typer.Option("pack", help="pack; or from a pack: mlx or hf (a checkpoint), archive (one file)."),
    bits: str = typer.Option(
        None,
        help="Bits of the routed experts: 2, 3, 4, 8, 16 for bf16 as it is, or mixed: see --bpw, --target-size.  "
        "[default: 4, or those of a tuned CALIBRATION]",
    ),
    bpw: float = typer.Option(None, help="With --bits mixed: bits per weight of the routed experts, scales included."),
    target_size: str = typer.Option(None, help="With --bits mixed: most that the whole pack may take, as in 160GB."),
    group_size: int = typer.Option(
        None, help="Weights that share a scale and a bias: 32, 64 or 128.  [default: the source's own, or 64]"
    ),
    resident_bits: int = typer.Option(8, help="Bits of the other large matrices: 4, 8, or 16 for as they are."),
    quantizer: str = typer.Option(
        "auto",
        help=f"auto or {', '.join(QUANTIZERS)}; auto takes {AUTO_QUANTIZER}, or the best that CALIBRATION allows.",
    ),
    calibration: Path = typer.Option(None, "--calibration", help="File of moe-run calibrate for the same checkpoint."),
    workers: int = typer.Option(None, help="Experts quantized side by side.  [default: number of cores]", min=1),
    memory: str = typer.Option(DEFAULT_MEMORY, help="Most memory that the whole process may take: fewer workers."),
    scratch: str = typer.Option(
        None, help="Most disk for shards from the hub while they are converted.  [default: two shards]"
    ),
    engine: str = typer.Option("local", help="local, or ray: layers on all machines of a Ray cluster (extra: ray)."),
    overwrite: bool = typer.Option(
        False, "--overwrite/--resume", help="Replace what is at OUT, or go on with an unfinished conversion."
    ),
    redo: list[str] = typer.Option(
        [], metavar="LAYER:EXPERT", help="Only make this block of a finished pack anew, as it was; may be repeated."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the source, print sizes and time, write nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
    version: bool = VERSION,
) -> None:
    """Quantize a checkpoint's experts and repack each into one page-aligned block of a pack.

    Safe to stop at any time: the same command goes on where it ended, and writes the same bytes.
    """
    workers = workers or os.cpu_count() or 1
    if not source or not out:
        raise UsageError("SRC or OUT is empty: expected a checkpoint and a place for the pack")
    if is_url(out) and (engine != "ray" or redo or to != "pack"):
        raise UsageError(f"{out}: only a conversion with --engine ray writes to a URL: give a directory")
    if not is_hub_address(source) and (to != "pack" or is_archive(Path(source))):
        _ship(context, Path(source), Path(out), to, workers, dry_run, as_json)
        return
    if to != "pack":
        raise UsageError(f"--to {to} needs a pack, {source} is a checkpoint: convert it to a pack first")
    if all((Path(source) / name).exists() for name in (MANIFEST_NAME, RESIDENT_NAME)):
        raise UsageError(
            f"{source}: is a pack, expected the checkpoint that it was made from: give that, or what to make of the "
            f"pack with --to {', '.join(TARGETS)} or archive"
        )
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if bits == MIXED and is_hub_address(source):
        raise UsageError(f"--bits mixed looks at every expert first, {source} is on the hub: download it")
    if engine == "ray" and is_hub_address(source):
        raise UsageError(f"--engine ray needs a directory that every machine sees, {source} is on the hub: download it")
    if redo:
        _redo(context, source, out, redo, calibration, scratch, as_json)
        return
    known = None if calibration is None else Calibration.open(calibration)
    target_bytes = None if target_size is None else parse_size(target_size)
    recipe = _make_recipe(bits, group_size, resident_bits, quantizer, known, bpw, target_bytes)
    memory_bytes = parse_size(memory)
    scratch_bytes = parse_size(scratch) if scratch else None
    with _planned(source, out, recipe, known, scratch_bytes, overwrite) as (plan, remote):
        _convert(plan, remote, engine, overwrite, dry_run, workers, memory_bytes, as_json)


def _refuse_options(context: typer.Context, names: tuple[str, ...], other: str, why: str) -> None:
    """Raise UsageError for the first of these parameters that the user gave: what is ignored is not accepted."""
    for name, (option, value) in _list_given(context).items():
        if name in names and value is not False:  # --resume is what happens anyway
            raise UsageError(f"{option} does not go with {other}, {why}: leave it out")


def _list_given(context: typer.Context) -> dict[str, tuple[str, Any]]:
    """The parameters that stand on the command line, be it with their default values: name -> option, value."""
    given = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = (parameter.opts[0], context.params[name])
    return given


def _redo(
    context: typer.Context,
    source: str,
    out: str,
    redo: list[str],
    calibration: Path | None,
    scratch: str | None,
    as_json: bool,
) -> None:
    """Make single blocks of a finished pack anew."""
    others = ("memory", "engine", "overwrite", "workers", "dry_run")
    _refuse_options(context, others, "--redo", "which makes a block as it was and writes it at once")
    places = parse_places(redo)
    recipe = recipe_of(Path(out))
    _refuse_other_settings(context, out, recipe)
    known = None if calibration is None else Calibration.open(calibration)
    scratch_bytes = parse_size(scratch) if scratch else None
    with _planned(source, out, recipe, known, scratch_bytes, overwrite=False) as (plan, _):
        repair_blocks(plan, places)
    if as_json:
        blocks = [{"layer": layer, "expert": expert} for layer, expert in places]
        print_json({"source": source, "pack": out, "blocks": blocks})
    else:
        print(f"{out}: {len(places)} block{'s' * (len(places) != 1)} written again, with the checksum they had")


def _refuse_other_settings(context: typer.Context, out: str, recipe: Recipe) -> None:
    """Raise UsageError for an option that is not what the pack was converted with: its blocks stay what they are."""
    names = {"bpw": "bits_per_weight", "target_size": "target_bytes"}
    for name, (option, value) in _list_given(context).items():
        if name in SETTINGS and value != "auto":
            wanted = parse_size(value) if name == "target_size" else value
            made = recipe.arguments.get(names.get(name, name))
            if str(wanted) != str(made):
                found = "without it" if made is None else f"with {made}"
                raise UsageError(
                    f"{option} {value} does not go with --redo, which makes a block as it was: {out} was converted "
                    f"{found}: leave it out"
                )


@contextmanager
def _planned(
    source: str, out: str, recipe: Recipe, known: Calibration | None, scratch_bytes: int | None, overwrite: bool
) -> Iterator[tuple[ConversionPlan, UrlOutput | None]]:
    """The plan of a conversion from a directory or from the hub, usable until the end of the block, and its URL."""
    if is_url(out):
        with tempfile.TemporaryDirectory(prefix="moepack-") as staging:
            plan = plan_conversion(Path(source), Path(staging), recipe, known)
            yield plan, UrlOutput(plan, out)
        return
    check_output(Path(out))
    if not is_hub_address(source):
        yield plan_conversion(Path(source), Path(out), recipe, known), None
    else:
        with Mirror.open(source, None if overwrite else Path(out)) as mirror:
            plan = plan_conversion(mirror.directory, Path(out), recipe, known, mirror.origin)
            mirror.reader.prepare(plan, scratch_bytes)
            yield plan, None


def _convert(
    plan: ConversionPlan,
    remote: UrlOutput | None,
    engine: str,
    overwrite: bool,
    dry_run: bool,
    workers: int,
    memory_bytes: int,
    as_json: bool,
) -> None:
    out = remote.url if remote else str(plan.out)
    if not dry_run:
        if overwrite:
            _refuse_early(plan, engine, workers, memory_bytes)
        _clear(plan, remote, overwrite)
    finished = None if overwrite else remote.find_finished() if remote else find_finished(plan)
    for note in plan.notes:
        log(f"note: {note}")
    if dry_run:
        _print_forecast(plan, out, None if remote else partial(check_free_space, plan), workers, as_json)
        return
    if finished:
        log(f"{out}: converted already with these settings: nothing to do")
    report, started = Report(), time.perf_counter()
    if finished and remote:
        remote.tidy()
    elif not finished:
        _run(plan, remote, engine, workers, memory_bytes, report)
    seconds = time.perf_counter() - started
    facts = {**_describe(plan, out), "seconds": round(seconds, 3), "already_converted": finished is not None}
    if as_json:
        print_json(facts | {"peak_rss_bytes": peak_rss_bytes()} | report.describe())
    elif not finished:
        _print_report(plan, out, report, seconds)


def _refuse_early(plan: ConversionPlan, engine: str, workers: int, memory_bytes: int) -> None:
    """What the conversion itself would refuse when it begins: with --overwrite the old pack would be gone by then.

    Raises UsageError, MemoryBudgetError.
    """
    if engine == "ray":
        import_ray()  # here already, for its memory counts too
    fit_threads(plan, workers, memory_bytes)


def _clear(plan: ConversionPlan, remote: UrlOutput | None, overwrite: bool) -> None:
    """Delete what is to be replaced, or finish what was nearly done."""
    if remote and overwrite:
        remote.remove()
    elif overwrite:
        check_free_space(plan)  # before anything is deleted for it
        remove_output(plan)
    elif not remote:
        finish_interrupted_manifest(plan.out)
        finish_interrupted_removal(plan)


def _ship(
    context: typer.Context, source: Path, out: Path, target: str, workers: int, dry_run: bool, as_json: bool
) -> None:
    """What neither reads nor makes weights: a pack to a checkpoint or an archive, an archive to a pack."""
    if target not in ("pack", "archive", *TARGETS):
        raise UsageError(f"--to {target}: expected one of pack, {', '.join(TARGETS)}, archive")
    check_output(out)
    if target != "pack" and not (source / MANIFEST_NAME).exists():
        found = "an archive: unpack it first" if is_archive(source) else "no pack: convert the checkpoint to one first"
        raise UsageError(f"{source}: --to {target} needs a pack, this is {found}")
    what = "an archive as SRC" if target == "pack" else f"--to {target}"
    _refuse_options(context, MAKING, what, "which takes the pack as it is and replaces nothing")
    if target not in TARGETS:
        _refuse_options(context, ("dry_run",), what, "whose size is known when it is written")
    if dry_run:
        _print_export_forecast(source, out, target, as_json)
        return
    run = {"pack": unpack_archive, "archive": pack_archive}.get(target) or partial(export, target=target)
    started = time.perf_counter()
    with open_progress(0, f"to {target}") as progress:

        def show(size_bytes: int, total_bytes: int) -> None:
            progress.total = total_bytes
            progress.update(size_bytes)

        try:
            facts = run(source, out, workers=workers, on_bytes=show)
        except KeyboardInterrupt:
            raise Interrupted(f"{out}: stopped; the same command goes on from here") from None
    seconds = time.perf_counter() - started
    if facts.get("already_exported"):
        log(f"{out}: exported already from this pack: nothing to do")
    if as_json:
        print_json({"source": str(source), "out": str(out), **facts, "seconds": round(seconds, 3)})
    elif not facts.get("already_exported"):
        sizes = ", ".join(f"{format_size(facts[key])} {key.partition('_')[0]}" for key in facts if "bytes" in key)
        print(f"{out}: {sizes}, {seconds:.1f} s")


def _print_export_forecast(source: Path, out: Path, target: str, as_json: bool) -> None:
    facts = forecast(source, out, target)
    if facts["already_exported"]:
        log(f"{out}: exported already from this pack: nothing to do")
    if as_json:
        print_json({"source": str(source), "out": str(out), **facts})
    else:
        sizes = {"in all": "total_bytes", "still to write": "needed_bytes", "free on the disk": "free_bytes"}
        print_table([("", "size"), *((what, format_size(facts[key])) for what, key in sizes.items())])


def _make_recipe(
    bits: str | None,
    group_size: int | None,
    resident_bits: int,
    quantizer: str,
    calibration: Calibration | None,
    bits_per_weight: float | None,
    target_bytes: int | None,
) -> Recipe:
    given = (bits, group_size, bits_per_weight, target_bytes)
    bits = DEFAULT_BITS if bits is None else bits
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("--bits", bits, (*map(str, (*QUANTIZED_BITS, UNQUANTIZED_BITS)), MIXED)),
        ("--group-size", group_size, (None, *GROUP_SIZES)),
        ("--resident-bits", resident_bits, RESIDENT_BITS),
        ("--quantizer", quantizer, ("auto", *QUANTIZERS)),
    ]
    for option, value, allowed in choices:
        if value not in allowed:
            raise UsageError(f"{option} {value}: expected one of {', '.join(str(one) for one in allowed if one)}")
    if calibration is not None and calibration.tuned is not None:
        if quantizer != "auto" or any(value is not None for value in given):
            raise UsageError(
                f"--calibration {calibration.path}: is tuned, which settles the experts' bits and groups: leave out "
                "--bits, --group-size, --quantizer, --bpw and --target-size"
            )
        try:
            return Recipe.of_arguments({**calibration.tuned["arguments"], "resident_bits": resident_bits})
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"{calibration.path}: arguments of the tuned pack: {error}: make it again") from None
    targets = [target for target in (bits_per_weight, target_bytes) if target is not None]
    if targets and given[0] is None:
        option = "--target-size" if bits_per_weight is None else "--bpw"
        raise UsageError(f"{option} goes with mixed bits, found no --bits: give --bits mixed with it, or leave it out")
    if len(targets) != (bits == MIXED):
        expected, cure = ("one", "give one") if bits == MIXED else ("none", "give --bits mixed, or leave it out")
        raise UsageError(f"--bits {bits}: expected {expected} of --bpw and --target-size, found {len(targets)}: {cure}")
    if bits_per_weight is not None and not 0 < bits_per_weight <= UNQUANTIZED_BITS:
        raise UsageError(f"--bpw {bits_per_weight:g}: expected a number above 0, at most {UNQUANTIZED_BITS}")
    return Recipe(
        bits=MIXED_BITS if bits == MIXED else int(bits),
        group_size=group_size or AUTO_GROUP_SIZE,
        resident_bits=resident_bits,
        quantizer=_choose_quantizer(quantizer, calibration),
        bits_per_weight=bits_per_weight,
        target_bytes=target_bytes,
    )


def _choose_quantizer(quantizer: str, calibration: Calibration | None) -> str:
    """The quantizer by name, "auto" resolved. Raises UsageError where it needs what the calibration lacks."""
    has_moments = calibration is not None and calibration.has_full_moments
    if quantizer == "auto":
        return "gptq" if has_moments else AUTO_QUANTIZER
    if quantizer == "gptq" and not has_moments:
        raise UsageError("--quantizer gptq needs second moments: give --calibration FILE of moe-run calibrate --full")
    return quantizer


def _run(
    plan: ConversionPlan, remote: UrlOutput | None, engine: str, workers: int, memory_bytes: int, report: Report
) -> None:
    with open_progress(plan.bytes_to_read, "convert") as progress:

        def show(size_bytes: int) -> None:
            if progress.update(size_bytes):  # it was time to draw: the disk is not asked more often than that
                free = shutil.disk_usage(plan.out).free
                facts = (report.step, f"{format_size(report.bytes_out)} out", f"{format_size(free)} free")
                progress.set_postfix_str(", ".join(facts), refresh=False)

        shown = 0

        def show_rest(size_bytes: int) -> None:
            """Without what the other engine has shown already."""
            nonlocal shown
            again = min(size_bytes, shown)
            shown -= again
            show(size_bytes - again)

        try:
            if engine == "ray":
                report.bytes_in = shown = convert_layers(remote or SharedDirectory(plan), workers, show)
            manifest = convert(remote.stage() if remote else plan, workers, show_rest, report, memory_bytes)
            if remote:
                remote.finish(manifest)
        except KeyboardInterrupt:
            out = remote.url if remote else plan.out
            raise Interrupted(f"{out}: stopped; the same command goes on from here") from None


def _print_report(plan: ConversionPlan, out: str, report: Report, seconds: float) -> None:
    size, bpw = format_size(plan.forecast.total_bytes), plan.forecast.bits_per_weight
    rate = report.bytes_in / seconds / 1e9
    print(f"{out}: {size}, {bpw:.2f} bits per weight, {seconds:.1f} s, {rate:.2f} GB/s of source")
    facts = report.describe()
    if facts["rounding"]:
        rows = [("rounding", "relative error", "largest error")]
        for kind, error in facts["rounding"].items():
            rows.append((kind, f"{error['relative_error']:.4f}", f"{error['largest_error']:.3g}"))
        print_table(rows)
    if facts["slowest_stage"]:
        stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in facts["thread_seconds"].items())
        log(f"slowest stage: {facts['slowest_stage']} (of all threads together: {stages})")


def _describe(plan: ConversionPlan, out: str) -> dict[str, Any]:
    forecast = plan.forecast
    return {
        "source": plan.source_name,
        "pack": out,
        **plan.recipe.arguments,
        "expert_files": len(forecast.expert_file_bytes),
        "expert_file_bytes": max(forecast.expert_file_bytes),
        "experts_bytes": sum(forecast.expert_file_bytes),
        "resident_bytes": forecast.resident_bytes,
        "total_bytes": forecast.total_bytes,
        "weights": forecast.num_weights,
        "bits_per_weight": forecast.bits_per_weight,
        "experts_bits_per_weight": forecast.experts_bits_per_weight,
        "sensitivity": plan.allocation.describe() if plan.allocation else None,
        "notes": list(plan.notes),
    }


def _print_sensitivity(allocation: Allocation) -> None:
    """For each layer where the bits go and what they leave; errors in hundredths of the stream's energy."""
    layers = allocation.describe()
    uniform = list(layers[0]["error_at"])
    rows: list[tuple[str, ...]] = [("layer", *PROJECTIONS, "error", *(f"all {name}" for name in uniform))]
    for facts in layers:
        errors = (facts["error"], *(facts["error_at"][name] for name in uniform))
        bits = (f"{value:.2f}" for value in facts["bits"].values())
        rows.append((str(facts["layer"]), *bits, *(f"{100 * error:.3f}" for error in errors)))
    print_table(rows)


def _print_forecast(
    plan: ConversionPlan, out: str, check_space: Callable[[], tuple[int, int]] | None, workers: int, as_json: bool
) -> None:
    facts = {**_describe(plan, out), "expected_seconds": round(estimate_seconds(plan, workers), 1)}
    shortage = None
    try:
        if check_space:  # of a URL nobody knows
            facts["needed_bytes"], facts["free_bytes"] = check_space()
    except NotEnoughSpace as error:
        shortage = error
    if as_json and not shortage:
        print_json(facts)
    elif not as_json:
        forecast = plan.forecast
        files = forecast.expert_file_bytes
        size = f"{len(files)} x {format_size(files[0])}" if len(set(files)) == 1 else format_size(sum(files))
        rows = [("", "size"), ("experts", size)]
        rows += [("resident", format_size(forecast.resident_bytes)), ("in all", format_size(forecast.total_bytes))]
        rows += [
            ("bits per weight", f"{forecast.bits_per_weight:.3f}"),
            ("expected time", f"{facts['expected_seconds']:.0f} s"),
        ]
        rows += [("free on the disk", format_size(facts["free_bytes"]))] if "free_bytes" in facts else []
        print_table(rows)
        if plan.allocation:
            _print_sensitivity(plan.allocation)
    if shortage:
        raise shortage

"""Everything about a conversion that can be known and refused before the first byte is written.

plan = plan_conversion(Path("checkpoint"), Path("pack"), Recipe(4, 64, 8, "minmax"))
plan.forecast.total_bytes, plan.notes
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moepack.convert.allocation import (
    Allocation,
    allocate,
    list_candidates,
    make_schemes,
    measure_costs,
    num_weights,
    widest_uniform,
)
from moepack.convert.checkpoint import CONFIG_NAME, FLOAT_DTYPES, Checkpoint, read_json
from moepack.convert.journal import JOURNAL_NAME, SETTINGS_FILE, locked
from moepack.convert.names import SourceMap, map_tensors
from moepack.convert.recipe import AUTO_GROUP_SIZE, MIXED_BITS, Forecast, LayerSchemes, Recipe
from moepack.convert.shard_reader import ShardReader
from moepack.convert.sources import GptqWeight, Quantization
from moepack.layout.architecture import Architecture
from moepack.layout.calibration import Calibration
from moepack.layout.errors import CalibrationError, CheckpointError, MoepackError, NotEnoughSpace, UsageError
from moepack.layout.manifest import Manifest, ModelShape
from moepack.layout.reader import Pack
from moepack.layout.spec import (
    FORMAT_VERSION,
    MAGIC,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    RESIDENT_NAME,
    UNQUANTIZED_BITS,
    expert_file_name,
)
from moepack.layout.tensor_file import LENGTH_BYTES

TOKENIZER_NAME = "tokenizer.json"
# Copied where present. Without a tokenizer nothing can be run; the absence of some others is worth a word.
COPIED_FILES = (
    *(CONFIG_NAME, TOKENIZER_NAME, "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "LICENSE", "README.md"),
)
MISSED_FILES = {
    "generation_config.json": "sampling defaults and some end tokens are unknown",
    "tokenizer_config.json": "the end token of a turn may be unknown",
}
MARGIN_BYTES = 16 * 2**20  # manifest, journal, the file system's own needs
MANIFEST_PARTIAL = MANIFEST_NAME + PARTIAL_SUFFIX
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a shard's data, to tell it from another of the same shapes
EXPERT_FILE = re.compile(rf"(layer|mtp)_\d+\.bin({re.escape(PARTIAL_SUFFIX)})?")


@dataclass(frozen=True)
class Origin:
    """A source elsewhere, of which the directory holds only what a plan needs.

    name       as a user gives it
    settings   what tells it from others, beside its files
    reader     what reads its shards
    """

    name: str
    settings: dict[str, Any]
    reader: ShardReader


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that has been checked and can start.

    schemes       of each layer's experts
    allocation    why these, where bits are mixed
    calibration   what is known of the experts' inputs, if anything
    settings   what decides the output's bytes: fingerprints of the source, arguments, tool and format version
    notes      facts about the result that the user should be told
    source_name   for people
    """

    checkpoint: Checkpoint
    architecture: Architecture
    source: SourceMap
    recipe: Recipe
    schemes: tuple[LayerSchemes, ...]
    allocation: Allocation | None
    forecast: Forecast
    shape: ModelShape
    calibration: Calibration | None
    out: Path
    settings: dict[str, Any]
    notes: tuple[str, ...]
    source_name: str

    @cached_property
    def layer_source_bytes(self) -> list[int]:
        """Source bytes of each layer's experts."""
        layers = [
            {place.weight.name: place.weight.source_bytes for expert in experts for place in expert.values()}
            for experts in self.source.experts
        ]
        return [sum(sizes.values()) for sizes in layers]

    def layer_shards(self, layer: int) -> set[str]:
        """The files that a layer's experts lie in."""
        weights = {place.weight.name: place.weight for one in self.source.experts[layer] for place in one.values()}
        return {self.checkpoint.shard_of(tensor) for weight in weights.values() for tensor in weight.tensors}

    @property
    def resident_shards(self) -> set[str]:
        """The files that the other weights lie in."""
        tensors = (tensor for weight in self.source.residents.values() for tensor in weight.tensors)
        return {self.checkpoint.shard_of(tensor) for tensor in tensors}

    @property
    def expert_tensors(self) -> Iterator[str]:
        """Every tensor of every routed expert; those of several experts come several times."""
        for layer in self.source.experts:
            for expert in layer:
                for place in expert.values():
                    yield from place.weight.tensors

    @property
    def resident_source_bytes(self) -> int:
        return sum(weight.source_bytes for weight in self.source.residents.values())

    @property
    def bytes_to_read(self) -> int:
        """Every used tensor once."""
        return sum(self.layer_source_bytes) + self.resident_source_bytes

    def check_source(self, shards: Iterable[str]) -> None:
        """Raise CheckpointError if a shard is not what was planned with: size, time of change, samples of its bytes."""
        shards = sorted(shards)
        self.checkpoint.check_unchanged(shards)
        for shard in shards:
            path = self.checkpoint.directory / shard
            if _fingerprint(path) != self.settings["source"][shard]:
                raise CheckpointError(
                    f"{path}: changed while it was read (other bytes): restore it and run the same command again, or "
                    "start over with --overwrite"
                )

    def describes(self, manifest: Manifest) -> bool:
        """Whether a finished pack is what this plan would write."""
        return bool(manifest.provenance.get("settings") == self.settings)


def plan_conversion(
    directory: Path,
    out: Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    origin: Origin | None = None,
) -> ConversionPlan:
    """Read the source's headers, assign every tensor, compute every size. Nothing is written.

    calibration   statistics of the same model, from moe-run calibrate
    origin        where the source comes from, if that is not the directory

    Raises CheckpointError, CalibrationError or UsageError.
    """
    checkpoint = Checkpoint.open(directory)
    if origin:
        checkpoint.reader = origin.reader
    config_path = directory / CONFIG_NAME
    if not (directory / TOKENIZER_NAME).exists():
        raise CheckpointError(f"{directory}: lacks {TOKENIZER_NAME}: download it from where the weights came from")
    for path in list_copied_files(directory):
        if path.suffix == ".json":
            read_json(path)  # half a download is found here, not when the pack is first run
    try:
        architecture = Architecture.from_config(checkpoint.config)
        quantization = Quantization.of(checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f"{config_path}: {error}") from None
    try:
        source = map_tensors(checkpoint.tensors, architecture, quantization)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{directory}: {error}") from None
    recipe = recipe.with_groups_of(source)
    shape = ModelShape(
        architecture.hidden_size,
        architecture.moe_intermediate_size,
        architecture.num_experts,
        architecture.num_hidden_layers,
    )
    settings: dict[str, Any] = {
        "source": {path.name: _fingerprint(path) for path in list_copied_files(directory)}
        | {shard: _fingerprint(directory / shard) for shard in checkpoint.shards},
        **(origin.settings if origin else {}),
        "arguments": recipe.arguments,
        "tool_version": version("moepack"),
        "format_version": FORMAT_VERSION,
    }
    if calibration is not None:
        calibration.check_model(shape, settings["source"])
        settings["calibration"] = calibration.identity
    schemes, allocation = _choose_schemes(recipe, checkpoint, source, shape, calibration)
    forecast = Forecast.of(recipe, source, shape, schemes)
    name = origin.name if origin else str(directory)
    notes = tuple(_notes(checkpoint, architecture, source, recipe, schemes))
    if calibration is not None and calibration.tuned is not None:
        notes += ("the routed experts are as they were tuned: moe-run calibrate --tune",)
    return ConversionPlan(
        *(checkpoint, architecture, source, recipe, schemes, allocation, forecast, shape, calibration, out),
        *(settings, notes, name),
    )


def _choose_schemes(
    recipe: Recipe, checkpoint: Checkpoint, source: SourceMap, shape: ModelShape, calibration: Calibration | None
) -> tuple[tuple[LayerSchemes, ...], Allocation | None]:
    """The schemes of each layer's experts, and why, where bits are mixed. Raises UsageError, CalibrationError."""
    if calibration is not None and calibration.tuned is not None:
        layers = tuple(LayerSchemes(*layer) for layer in calibration.tuned_schemes())
        if len(layers) != len(source.experts):
            raise CalibrationError(
                f"{calibration.path}: tells of {len(layers)} layers, the checkpoint has {len(source.experts)}: start "
                "from a pack of this checkpoint with moe-run calibrate --tune"
            )
        return layers, None
    if recipe.bits != MIXED_BITS:
        return (LayerSchemes.uniform(recipe.expert_schemes, shape.num_experts),) * len(source.experts), None
    if calibration is None:
        raise UsageError("--bits mixed needs --calibration FILE of moe-run calibrate: what experts are used for")
    candidates = list_candidates(shape, recipe.group_size if recipe.group_size != AUTO_GROUP_SIZE else None)
    if not candidates:
        raise UsageError(f"routed experts: groups of {recipe.group_size} divide no row: choose another --group-size")
    costs = measure_costs(checkpoint, source, shape, calibration, candidates)

    def choose(bits_per_weight: float) -> Allocation:
        budget_bytes = bits_per_weight / 8 * num_weights(shape) * shape.num_experts * shape.num_hidden_layers
        choices = allocate(costs, shape, candidates, budget_bytes)
        rest = widest_uniform(shape, candidates, bits_per_weight)
        return Allocation(costs, candidates, choices, make_schemes(choices, candidates, len(source.experts), rest))

    if recipe.bits_per_weight is not None:
        allocation = choose(recipe.bits_per_weight)
        return allocation.schemes, allocation
    assert recipe.target_bytes is not None
    bits_per_weight = candidates[-1].bits + 1.0  # scales and biases take one bit at most
    while True:  # blocks are padded to pages: the size is known when the choice is made
        allocation = choose(bits_per_weight)
        total_bytes = Forecast.of(recipe, source, shape, allocation.schemes).total_bytes
        if total_bytes <= recipe.target_bytes:
            return allocation.schemes, allocation
        bits_per_weight *= min(0.999, recipe.target_bytes / total_bytes)


def find_finished(plan: ConversionPlan) -> Manifest | None:
    """The manifest of a finished pack that is what the plan would write, None if there is no pack yet.

    Raises UsageError if the output holds anything else: another pack, or files that are not ours.
    """
    out = plan.out
    if not _is_directory(out) or not any(out.iterdir()):
        return None
    if (out / MANIFEST_NAME).exists():
        try:
            with Pack.open(out) as pack:
                manifest = pack.manifest
        except MoepackError as error:
            raise UsageError(f"{error}; or start over with --overwrite") from None
        if not plan.describes(manifest):
            raise UsageError(
                f"{out}: holds a pack of another source or with other settings: choose another directory, "
                "or replace it with --overwrite"
            )
        return manifest
    if not (out / JOURNAL_NAME).is_dir():
        raise UsageError(f"{out}: is not empty and no conversion of ours: choose another directory")
    return None


def remove_output(plan: ConversionPlan) -> None:
    """Delete the pack or unfinished conversion at the output, manifest first.

    Raises UsageError, with nothing deleted, if the directory holds anything that moe-convert did not write or
    another process is at work in it.
    """
    out = plan.out
    if not _is_directory(out) or not any(out.iterdir()):
        return
    ours = {MANIFEST_NAME, RESIDENT_NAME, JOURNAL_NAME, *COPIED_FILES, "experts"}
    entries = list(out.iterdir())
    foreign = [entry.name for entry in entries if entry.name.removesuffix(PARTIAL_SUFFIX) not in ours]
    inside = (out / "experts").iterdir() if (out / "experts").is_dir() else ()
    foreign += [f"experts/{entry.name}" for entry in inside if not EXPERT_FILE.fullmatch(entry.name)]
    if foreign or (entries and not _is_ours(out)):
        found = f"holds {', '.join(sorted(foreign)[:4])}" if foreign else "is no pack"
        raise UsageError(f"{out}: {found}: --overwrite deletes packs only; move your files away first")
    with locked(out):
        if (out / MANIFEST_NAME).exists():
            os.replace(out / MANIFEST_NAME, out / MANIFEST_PARTIAL)  # no pack any more, but known as ours
        (out / JOURNAL_NAME).mkdir(exist_ok=True)
        (out / JOURNAL_NAME / SETTINGS_FILE).unlink(missing_ok=True)  # killed from here on: finish_interrupted_removal
        for entry in sorted(out.iterdir(), key=lambda entry: entry.name != MANIFEST_PARTIAL):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            elif entry.name != JOURNAL_NAME:
                shutil.rmtree(entry)
        shutil.rmtree(out / JOURNAL_NAME)


def finish_interrupted_removal(plan: ConversionPlan) -> None:
    """Delete the rest of an output whose replacement was killed, as a journal without settings shows."""
    journal = plan.out / JOURNAL_NAME
    if journal.is_dir() and not (journal / SETTINGS_FILE).exists():
        remove_output(plan)


def check_free_space(plan: ConversionPlan) -> tuple[int, int]:
    """(bytes still to write, bytes free). Raises NotEnoughSpace with both where they do not fit."""
    folder = next(parent for parent in (plan.out, *plan.out.absolute().parents) if parent.is_dir())
    written = 0
    layers = range(len(plan.source.experts))
    names = [expert_file_name(layer, plan.shape.num_hidden_layers) for layer in layers]
    for name in (*names, RESIDENT_NAME):
        paths = (plan.out / name, plan.out / (name + PARTIAL_SUFFIX))  # what a kill left is written over
        written += sum(path.stat().st_size for path in paths if path.exists())
    copied = sum(path.stat().st_size for path in list_copied_files(plan.checkpoint.directory))
    needed = max(0, plan.forecast.total_bytes - written) + copied + MARGIN_BYTES
    needed += plan.checkpoint.reader.scratch_bytes + plan.forecast.spilled_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NotEnoughSpace(
            f"{plan.out}: {needed:,} bytes are still to be written, {free:,} are free: make space or change disks"
        )
    return needed, free


def _notes(
    checkpoint: Checkpoint,
    architecture: Architecture,
    source: SourceMap,
    recipe: Recipe,
    schemes: Sequence[LayerSchemes],
) -> list[str]:
    notes = [f"skipped {count} tensors ({reason})" for reason, count in source.skipped.items()]
    if architecture.mtp_num_hidden_layers and not source.num_mtp_layers(architecture):
        notes.append("the config names an MTP head, the checkpoint has none: the pack is without it")
    notes += _rounding_notes(checkpoint, source, recipe, schemes)
    directory = checkpoint.directory
    notes += [f"{name} is missing: {loss}" for name, loss in MISSED_FILES.items() if not (directory / name).exists()]
    has_template = (directory / "chat_template.jinja").exists() or '"chat_template"' in _read_text(
        directory / "tokenizer_config.json"
    )
    if not has_template:
        notes.append("no chat template: the pack answers raw prompts only")
    return notes


def _rounding_notes(
    checkpoint: Checkpoint, source: SourceMap, recipe: Recipe, schemes: Sequence[LayerSchemes]
) -> list[str]:
    """What is rounded a second time, and what is kept, of a source that is not plain bf16."""
    firsts = [
        (own[0][name], place.weight) for layer, own in zip(source.experts, schemes) for name, place in layer[0].items()
    ]
    kinds = {weight.kind for _, weight in firsts}
    notes = []
    if recipe.bits == UNQUANTIZED_BITS and kinds != {"BF16"}:
        notes.append(f"experts are {', '.join(sorted(kinds))} in the source: 16 bits rounds them to bf16")
    kept = {weight.kind for scheme, weight in firsts if weight.keeps_integers(scheme)}
    if kept:
        notes.append(f"experts keep the source's integers ({', '.join(sorted(kept))})")
    again = {weight.kind for _, weight in firsts if weight.scheme} - kept
    if again and recipe.bits != UNQUANTIZED_BITS:
        own = next(weight.scheme for _, weight in firsts if weight.scheme and weight.kind in again)
        notes.append(
            f"experts are {', '.join(sorted(again))} in the source and rounded again: "
            f"--bits {own.bits} --group-size {own.group_size} keeps them as they are"
        )
    gptq = next((weight for _, weight in firsts if isinstance(weight, GptqWeight) and weight.kind in kept), None)
    if gptq:
        moved = gptq.scale_rounding(checkpoint)
        notes.append(
            "GPTQ's scales are rounded from F16 to bf16, which moves a weight by 0.4 % of itself at most "
            f"({100 * moved.max():.2f} % at most, {100 * moved.mean():.2f} % on average in {gptq.stem})"
        )
    rounded = Counter(
        weight.kind
        for name, weight in source.residents.items()
        if weight.kind not in FLOAT_DTYPES and not recipe.resident_scheme(name.removesuffix(".weight"), weight)
    )
    notes += [f"{count} resident weights are {kind} in the source, bf16 in the pack" for kind, count in rounded.items()]
    return notes


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def list_copied_files(directory: Path) -> list[Path]:
    """The files of a source that go into the pack as they are."""
    return [directory / name for name in COPIED_FILES if (directory / name).exists()]


def _is_ours(out: Path) -> bool:
    manifests = [path for path in (out / MANIFEST_NAME, out / MANIFEST_PARTIAL) if path.exists()]
    return (out / JOURNAL_NAME).is_dir() or any(f'"{MAGIC}"'.encode() in path.read_bytes() for path in manifests)


def _is_directory(out: Path) -> bool:
    for path in (out, *out.parents):
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{path}: is a link that leads nowhere, expected a directory to write the pack into")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, expected a directory to write the pack into")
    return out.exists()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a small file; of a shard the hash of its header and of samples spread over its data.

    Enough to tell a source from another, a fine-tune of the same shapes included, without reading all of it.
    Raises CheckpointError if it cannot be read.
    """
    try:
        return _sample(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _sample(path: Path) -> dict[str, Any]:
    size_bytes, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            digest.update(file.read())
        else:
            head = file.read(LENGTH_BYTES)
            digest.update(head + file.read(int.from_bytes(head, "little")))
            for offset in sample_offsets(file.tell(), size_bytes):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return {"size_bytes": size_bytes, "fingerprint": digest.hexdigest()}


def sample_offsets(start: int, size_bytes: int) -> list[int]:
    """Where the samples of a shard's fingerprint begin, each of SAMPLE_BYTES or less; its data begin at `start`."""
    last = max(0, size_bytes - start - SAMPLE_BYTES)
    return [start + last * sample // (SAMPLES - 1) for sample in range(SAMPLES)]

"""What moe-convert writes: every tensor of every layout, bit for bit, in little memory, the same on every run.

The source is read here by the safetensors library and the names are undone by hand, so that nothing of moepack's own
reading of checkpoints is trusted.
"""

import hashlib
import json
import os
import re
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert_command import SMALL, files_of, problems_of, run_convert
from moepack.convert import pipeline
from moepack.convert.plan import check_free_space, plan_conversion
from moepack.convert.quantizers import define_minmax
from moepack.convert.recipe import Recipe
from moepack.convert.shard_reader import ShardReader
from moepack.layout.reader import Pack
from tiny_checkpoint import TinyModel, write_checkpoint

SAME_EXPERTS = {
    "qwen3.5": {}, "qwen3.6": {"mtp_experts": "fused", "float32_state": False},
    "per_expert": {"experts": "per_expert", "shards": 5},
    "all_fused_one_file": {"mtp_experts": "fused", "single_file": True},
    "flat": {"prefix": "model.", "config": "flat"}, "nested_short": {"prefix": "model."},
    "flat_long": {"config": "flat", "experts": "per_expert", "float32_state": False}, "one_shard": {"shards": 1},
    "tied": {"model": replace(SMALL, tie=True)}, "no_vision": {"model": replace(SMALL, vision=False)},
}  # fmt: skip
LAYOUTS = SAME_EXPERTS | {
    "no_mtp": {"model": replace(SMALL, mtp=False)},
    "f16": {"dtype": "F16", "float32_state": False}, "f32": {"dtype": "F32", "experts": "per_expert"},
    "odd": {"model": TinyModel(layers=3, experts=5, moe_intermediate=96, full_attention_interval=2, hidden=160)},
}  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALWAYS_AS_IT_IS = ("norm", "mlp.gate.", "shared_expert_gate", "conv1d", "A_log", "dt_bias", "in_proj_a", "in_proj_b")


def write_source(directory, layout):
    """A checkpoint in one of LAYOUTS."""
    return write_checkpoint(directory, **{"model": SMALL, **LAYOUTS[layout]})


def layers_of(layout):
    return LAYOUTS[layout].get("model", SMALL).layers


def read_source(directory, num_layers):
    """Resident tensors by the pack's names, and expert matrices by (layer, expert, projection)."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    residents, experts = {}, {}
    for name, tensor in tensors.items():
        stem, found, rest = name.replace("language_model.", "").partition(".mlp.experts.")
        layer = int(stem.split(".")[-1]) + num_layers * stem.startswith("mtp") if found else None
        if rest == "gate_up_proj":
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                experts |= {(layer, expert, "gate_proj"): gate, (layer, expert, "up_proj"): up}
        elif rest == "down_proj":
            experts |= {(layer, expert, "down_proj"): matrix for expert, matrix in enumerate(tensor)}
        elif found:
            expert, projection, _ = rest.split(".")
            experts[layer, int(expert), projection] = tensor
        elif not name.startswith("model.visual."):
            residents[stem] = tensor
    return residents, experts


def raw(array):
    """The bytes of a torch or numpy array."""
    if isinstance(array, torch.Tensor):
        array = array.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()


def stored_arrays(weights, bits, group_size):
    """What a pack must hold for a matrix."""
    if bits == 16:
        return {"weight": raw(weights.to(torch.bfloat16))}
    arrays = define_minmax(weights.float().numpy(), bits, group_size).arrays
    return {name: raw(array) for name, array in arrays.items()}


def check_experts(out, experts, bits, group_size):
    """Each block holds its expert's arrays at the places that the geometry names, and zeros elsewhere."""
    with Pack.open(out) as pack:
        layers = range(len(pack.manifest.expert_files))
        blocks = {(layer, expert) for layer in layers for expert in range(pack.manifest.shape.num_experts)}
        assert {(layer, expert) for layer, expert, _ in experts} == blocks
        for layer, expert in sorted(blocks):
            geometry = pack.geometry(layer).block(expert)
            with open(out / pack.manifest.expert_files[layer].file, "rb") as file:
                file.seek(pack.geometry(layer).offsets[expert])
                block = bytearray(file.read(geometry.block_stride))
            for projection in PROJECTIONS:
                arrays = stored_arrays(experts[layer, expert, projection], bits, group_size)
                for section in geometry.sections:
                    matrix, _, array = section.name.partition(".")
                    if matrix == projection:
                        place = slice(section.offset_bytes, section.offset_bytes + section.size_bytes)
                        assert block[place] == arrays[array], (layer, expert, section.name)
                        block[place] = bytes(section.size_bytes)
            assert not any(block), "a gap or the padding is not zero"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bits_keep_every_tensor_bit_for_bit(tmp_path, layout):
    source, out = write_source(tmp_path / "source", layout), tmp_path / "pack"
    assert run_convert(source, out, "--bits", 16, "--resident-bits", 16).code == 0
    residents, experts = read_source(source, layers_of(layout))
    check_experts(out, experts, 16, None)
    written = load_file(out / "resident.safetensors")
    assert written.keys() == residents.keys()
    for name, tensor in residents.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(written[name]) == raw(tensor), name
    assert problems_of(out) == []


@pytest.mark.parametrize(
    ("layout", "bits"), [("qwen3.5", 2), ("qwen3.5", 3), ("qwen3.5", 4), ("qwen3.5", 8), ("f16", 4), ("odd", 3)]
)
def test_blocks_are_the_quantized_rows_of_the_source(tmp_path, layout, bits):
    source, out = write_source(tmp_path / "source", layout), tmp_path / "pack"
    resident_bits = 4 if bits == 3 else 8
    options = ("--bits", bits, "--resident-bits", resident_bits, "--group-size", 32, "--quantizer", "minmax")
    assert run_convert(source, out, *options).code == 0
    residents, experts = read_source(source, layers_of(layout))
    check_experts(out, experts, bits, 32)
    written = load_file(out / "resident.safetensors")
    expected = {}
    for name, tensor in residents.items():
        if any(part in name for part in ALWAYS_AS_IT_IS):
            expected[name] = raw(tensor)
            continue
        arrays = stored_arrays(tensor, resident_bits, 32)
        matrix = name.removesuffix(".weight")
        expected |= {name: arrays["w_q"], f"{matrix}.scales": arrays["scales"], f"{matrix}.biases": arrays["biases"]}
    assert {name: raw(tensor) for name, tensor in written.items()} == expected
    assert problems_of(out) == []


def test_all_layouts_of_the_same_weights_give_the_same_expert_files(tmp_path):
    packs = {}
    for name in SAME_EXPERTS:
        source = write_source(tmp_path / name, name)
        assert run_convert(source, tmp_path / f"{name}.pack", "--bits", 3, "--group-size", 32).code == 0
        packs[name] = {path.name: path.read_bytes() for path in (tmp_path / f"{name}.pack" / "experts").iterdir()}
    first = packs["qwen3.5"]
    assert sorted(first) == ["layer_00.bin", "layer_01.bin", "mtp_00.bin"]
    assert [name for name, files in packs.items() if files != first] == []


def test_layouts_with_the_same_types_give_the_same_residents(tmp_path):
    names = ("qwen3.5", "per_expert", "flat", "nested_short", "no_vision")
    written = set()
    for name in names:
        source = write_source(tmp_path / name, name)
        assert run_convert(source, tmp_path / f"{name}.pack", "--group-size", 32).code == 0
        written.add((tmp_path / f"{name}.pack" / "resident.safetensors").read_bytes())
    assert len(written) == 1


def test_downloads_that_are_links_convert(tmp_path):
    """The cache of the hub's own client holds links into a folder of blobs."""
    real, linked = write_source(tmp_path / "blobs", "qwen3.5"), tmp_path / "snapshot"
    linked.mkdir()
    for number, path in enumerate(real.iterdir()):
        (linked / path.name).symlink_to(path.rename(real / f"blob{number}"))
    assert run_convert(linked, tmp_path / "pack", "--group-size", 32).code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "pack").rglob("*"))
    assert problems_of(tmp_path / "pack") == []


def test_reads_one_matrix_of_one_expert_at_a_time(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "all_fused_one_file")
    matrix_bytes = 64 * 96 * 2
    sizes, read = [], ShardReader.read

    def watched(reader, path, offset, size, tensor):
        sizes.append(size)
        return read(reader, path, offset, size, tensor)

    monkeypatch.setattr(ShardReader, "read", watched)
    monkeypatch.setattr(pipeline, "PIECE_BYTES", matrix_bytes)  # so that the same bound holds for the residents
    assert run_convert(source, tmp_path / "pack", "--group-size", 32).code == 0
    assert sizes.count(matrix_bytes) >= 3 * 3 * 3
    assert max(sizes) == matrix_bytes, "more than one expert's matrix was read at once"


def test_memory_stays_at_a_few_experts(tmp_path, monkeypatch):
    model = TinyModel(layers=1, experts=80, hidden=256, moe_intermediate=128, mtp=False, vision=False)
    source = write_checkpoint(tmp_path / "source", model, single_file=True)
    fused_bytes, expert_bytes = 80 * 256 * 256 * 2, 3 * 256 * 128 * 2
    monkeypatch.setattr(pipeline, "PIECE_BYTES", expert_bytes)
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    tracemalloc.start()
    try:
        pipeline.convert(plan, 2, lambda size_bytes: time.sleep(0.006))  # a disk slower than the workers
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Per worker one matrix in float32 and its integers as they are packed, 8 bytes a weight; and the finished blocks.
    assert peak_bytes < 18 * expert_bytes < fused_bytes / 2, f"{peak_bytes / expert_bytes:.1f} experts"


def test_workers_do_not_change_a_byte_and_the_source_stays(tmp_path):
    source = write_source(tmp_path / "source", "qwen3.5")
    before = files_of(source)
    packs = []
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        assert run_convert(source, out, "--group-size", 32, "--workers", workers).code == 0
        packs.append(files_of(out))
    assert packs[0] == packs[1] == packs[2]
    assert files_of(source) == before


def test_a_pack_holds_what_it_lists_and_the_sources_own_files(tmp_path):
    source, out = write_source(tmp_path / "source", "qwen3.5"), tmp_path / "pack"
    (source / "README.md").write_text("About the model.\n")
    (source / "notes.txt").write_text("Not part of a model.\n")
    assert run_convert(source, out, "--group-size", 32).code == 0
    copied = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    files, origin = files_of(out), files_of(source)
    assert {name for name in files if not name.startswith("experts/")} == {
        "manifest.json", "resident.safetensors", "README.md", *copied
    }  # fmt: skip
    assert all(files[name] == origin[name] for name in (*copied, "README.md"))
    with Pack.open(out) as pack:
        names = pack.manifest.provenance["source_sha256"].keys()
    tensors = {name for path in source.glob("*.safetensors") for name in load_file(path)}
    expected = {re.sub(r"experts\.\d+\..*", "experts.*", name) for name in tensors if ".visual." not in name}
    assert names == expected


@pytest.mark.parametrize("layout", ["qwen3.6", "per_expert"])
def test_hashes_of_the_source_are_those_of_its_pieces(tmp_path, layout):
    """sha256 over the sha256 of each expert's matrix, or of a resident tensor's one piece, made here by hand."""
    source, out = write_source(tmp_path / "source", layout), tmp_path / "pack"
    assert run_convert(source, out, "--group-size", 32, "--workers", 3).code == 0
    with Pack.open(out) as pack:
        found = pack.manifest.provenance["source_sha256"]
    residents, experts = read_source(source, SMALL.layers)
    digest = {place: hashlib.sha256(raw(matrix)).digest() for place, matrix in experts.items()}
    stem = "model.language_model.layers.1.mlp.experts"
    order = [(1, expert, projection) for expert in range(SMALL.experts) for projection in PROJECTIONS]
    parts = {f"{stem}.*": order}
    if layout == "qwen3.6":
        down = [place for place in order if place[2] == "down_proj"]
        parts = {f"{stem}.gate_up_proj": [place for place in order if place not in down], f"{stem}.down_proj": down}
    for name, places in parts.items():
        assert found[name] == hashlib.sha256(b"".join(digest[place] for place in places)).hexdigest()
    name = "lm_head.weight"
    assert found[name] == hashlib.sha256(hashlib.sha256(raw(residents[name])).digest()).hexdigest()


def test_progress_ends_at_its_total_fresh_and_resumed(tmp_path):
    source = write_checkpoint(tmp_path / "source", SMALL, experts="per_expert", dtype="F16")
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    seen = []

    def stop_half_way(size_bytes):
        seen.append(size_bytes)
        if sum(seen) > plan.bytes_to_read / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.convert(plan, 2, stop_half_way)
    for out in (plan.out, tmp_path / "fresh"):
        sizes = []
        pipeline.convert(plan_conversion(source, out, plan.recipe), 2, sizes.append)
        assert sum(sizes) == plan.bytes_to_read
    assert files_of(plan.out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["moe_intermediate_size", "num_experts"])
def test_a_config_that_leaves_sizes_to_the_familys_defaults_converts(tmp_path, name):
    """Released configs name them all; a config saved again by other software may leave out what equals a default."""
    size = {"moe_intermediate_size": {"moe_intermediate": 512}, "num_experts": {"experts": 256}}[name]
    model = TinyModel(layers=1, hidden=32, mtp=False, **{"experts": 3, "moe_intermediate": 32, **size})
    source = write_checkpoint(tmp_path / "source", model)
    config = json.loads((source / "config.json").read_text())
    del config["text_config"][name]
    (source / "config.json").write_text(json.dumps(config))
    assert run_convert(source, tmp_path / "pack", "--group-size", 32).code == 0
    assert problems_of(tmp_path / "pack") == []


def test_scales_that_wait_in_a_file_are_planned_for(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "checkpoint", SMALL)
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    copies, temporary = [], pipeline.tempfile.TemporaryFile

    def watched(**options):
        file = temporary(**options)
        copies.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(pipeline.tempfile, "TemporaryFile", watched)
    before = check_free_space(plan)[0]
    pipeline.convert(plan, 1, lambda count: None)
    assert plan.forecast.spilled_bytes == os.fstat(copies[0]).st_size > 0
    assert before > plan.forecast.total_bytes + plan.forecast.spilled_bytes
    os.close(copies[0])


def test_the_demo_checkpoint_plans():
    demo = Path(__file__).parents[1] / "demo" / "checkpoint"
    plan = plan_conversion(demo, demo / "pack", Recipe(4, 64, 8, "minmax"))
    assert plan.forecast.total_bytes > 0

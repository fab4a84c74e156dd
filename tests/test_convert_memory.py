"""--memory bounds a conversion whatever the size of the model: fewer workers, the same bytes; or a clear no."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert_command import SMALL, files_of, finish, run_convert, start_convert
from moepack.convert.memory import READS_AHEAD, fit_threads, thread_bytes
from moepack.convert.plan import plan_conversion
from moepack.convert.quantizers import define_minmax
from moepack.convert.recipe import Recipe
from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import MemoryBudgetError
from moepack.layout.process import resident_set_bytes
from moepack.layout.quantized import float32_to_bf16
from moepack.layout.reader import Pack
from moepack.layout.tensor_file import layout_tensors
from tiny_checkpoint import TinyModel, write_checkpoint

GROUP = ("--group-size", 32, "--quantizer", "minmax")
MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SMALL)


def test_a_small_budget_takes_fewer_threads(source, tmp_path):
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    assert fit_threads(plan, 6, 4096 * MIB) == 6 + READS_AHEAD
    spare = resident_set_bytes() + 60 * MIB
    assert fit_threads(plan, 50, spare + 3 * thread_bytes(plan)) in (3, 4)


def test_what_a_thread_needs_does_not_grow_with_the_model(source, tmp_path):
    larger = write_checkpoint(tmp_path / "larger", replace(SMALL, layers=6, experts=12))
    plans = [plan_conversion(path, tmp_path / "pack", Recipe(4, 32, 8, "minmax")) for path in (source, larger)]
    assert thread_bytes(plans[0]) == thread_bytes(plans[1])


def test_a_budget_that_holds_no_expert_is_refused_with_the_numbers(source, tmp_path, monkeypatch):
    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    monkeypatch.setattr("moepack.convert.memory.resident_set_bytes", lambda: 60 * MIB)  # whatever other tests left
    with pytest.raises(MemoryBudgetError, match=r"20\.00 MiB is too small: .* give at least \d+\.\d+ MiB"):
        fit_threads(plan, 2, 20 * MIB)
    result = run_convert(source, tmp_path / "pack", *GROUP, "--memory", "20MiB")
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert run_convert(source, tmp_path / "pack", *GROUP, "--memory", "much").code == 2
    assert run_convert(source, tmp_path / "pack", *GROUP).code == 0


def test_the_process_keeps_its_budget_and_the_bytes_are_the_same(tmp_path):
    """200 MB of source through a process of at most 200 MiB, of which interpreter and numpy take a fifth."""
    model = TinyModel(layers=2, full_attention_interval=2, hidden=512, experts=64, moe_intermediate=512, vision=False)
    source = write_checkpoint(tmp_path / "source", model, mtp_experts="fused")
    reports = []
    for memory, workers in (("200MiB", 8), ("4GiB", 2)):
        arguments = ("--memory", memory, "--workers", workers, "--json")
        result = finish(start_convert(source, tmp_path / memory, *GROUP, *arguments))
        assert (result.code, result.errors) == (0, [])
        reports.append(json.loads(result.out))
    assert reports[0]["peak_rss_bytes"] < 200 * MIB
    assert files_of(tmp_path / "200MiB") == files_of(tmp_path / "4GiB")
    for report in reports:
        assert report["bytes_read"] > 200e6
        assert {"read", "hash", "quantize"} < report["thread_seconds"].keys()
        assert 0.05 < report["rounding"]["gate_proj"]["relative_error"] < 0.15


TRUE_397B = {
    "hidden_size": 4096,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
    "mtp_num_hidden_layers": 0,
}


def write_sparse(directory: Path) -> tuple[Path, dict[int, np.ndarray]]:
    """One layer of Qwen3.5-397B in true shapes, 17.7 GB that take no disk but for some pages of two experts.

    Returns the pages' rows, by expert: rows 100 to 103 of its gate_proj.
    """
    write_checkpoint(directory, TinyModel(layers=1, mtp=False, vision=False), single_file=True)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= TRUE_397B
    (directory / "config.json").write_text(json.dumps(config))
    a = Architecture.from_config(config)
    stem = "model.layers.0.mlp.experts"
    shapes = resident_shapes(a, 0) | {
        f"{stem}.gate_up_proj": (a.num_experts, 2 * a.moe_intermediate_size, a.hidden_size),
        f"{stem}.down_proj": (a.num_experts, a.hidden_size, a.moe_intermediate_size),
    }
    arrays = [(name.replace("model.", "model.language_model.", 1), "BF16", shape) for name, shape in shapes.items()]
    header, specs = layout_tensors(arrays)
    place = next(spec.offset_bytes for spec in specs if spec.name.endswith("gate_up_proj"))
    rows = {}
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(specs[-1].offset_bytes + specs[-1].size_bytes)
        for expert in (7, 511):
            values = np.random.default_rng(expert).standard_normal((4, a.hidden_size)).astype(np.float32)
            rows[expert] = float32_to_bf16(values)
            file.seek(place + (expert * 2 * a.moe_intermediate_size + 100) * a.hidden_size * 2)
            file.write(rows[expert].tobytes())
    return directory, rows


@pytest.mark.slow
def test_a_layer_of_397b_in_true_shapes_keeps_the_budget(tmp_path):
    """A fused tensor of 8 GiB through half a GiB; what lies between the holes arrives at its place."""
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("needs 10 GB of free disk")
    source, rows = write_sparse(tmp_path / "source")
    if (source / "model.safetensors").stat().st_blocks * 512 > 2**30:
        pytest.skip("needs a file system with sparse files")
    out = tmp_path / "pack"
    arguments = ("--memory", "512MiB", "--workers", os.cpu_count() or 1, "--quantizer", "minmax", "--json")
    result = finish(start_convert(source, out, *arguments))
    assert (result.code, result.errors) == (0, [])
    facts = json.loads(result.out)
    assert facts["bytes_read"] > 17e9
    assert facts["peak_rss_bytes"] < 512 * MIB, f"{facts['peak_rss_bytes'] / MIB:.0f} MiB"
    with Pack.open(out) as pack:
        for expert, patterns in rows.items():
            geometry = pack.geometry(0).block(expert)
            assert geometry.block_stride == 7_077_888
            block = bytearray(geometry.block_stride)
            pack.read_block(0, expert, memoryview(block))
            pack.check_block(0, expert, memoryview(block))
            sections = [section for section in geometry.sections if section.name.startswith("gate_proj.")]
            types = {"U32": "<u4", "BF16": "<u2"}
            flat = [np.frombuffer(block, types[s.dtype], s.shape[0] * s.shape[1], s.offset_bytes) for s in sections]
            arrays = [array.reshape(section.shape) for array, section in zip(flat, sections)]
            expected = define_minmax(patterns, 4, 64).arrays.values()
            for array, quantized in zip(arrays, expected):
                assert np.array_equal(array[100:104], quantized)
                assert not array[:100].any()
                assert not array[104:].any()
    shutil.rmtree(out)

"""moe-convert --to: the originals' names and bytes given back, and checkpoints that the real programs load.

The result is read by the safetensors library, never by moepack's own reading of checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import DEMO, make_pack
from convert_command import SMALL, files_of, run_convert
from moepack.convert.export import export
from moepack.kernels.native_quantize import dequantize_bf16
from moepack.layout.errors import DamagedPack, UsageError
from moepack.layout.quantized import dequantize, float32_to_bf16
from moepack.layout.reader import Pack
from moepack.runtime import Engine
from tiny_checkpoint import write_checkpoint

LAYOUTS = {
    "qwen3.5": {},
    "qwen3.6": {"mtp_experts": "fused", "float32_state": False},
    "per expert": {"experts": "per_expert", "shards": 5},
    "flat": {"prefix": "model.", "config": "flat"},
    "tied": {"model": replace(SMALL, tie=True)},
    "no MTP": {"model": replace(SMALL, mtp=False)},
}
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
GROUP = ("--group-size", 32)
MLX_LOGITS = 0.02  # of the range of the logits: mlx-lm rounds 1 + w of every norm to bf16
PROMPT = "It was a fine morning, and the two friends walked down to the river. " * 6


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check_index(directory: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """The index names every tensor in the file that has it; each file says for which loader it is."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": form}
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(directory.rglob("*.partial"))
    assert not (directory / ".convert").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_16_bit_pack_gives_back_its_source(tmp_path: Path, layout: str) -> None:
    source = write_checkpoint(tmp_path / "source", **{"model": SMALL, **LAYOUTS[layout]})
    pack = make_pack(source, tmp_path / "pack", bits=16, resident_bits=16)
    assert run_convert(pack, tmp_path / "hf", "--to", "hf").code == 0
    found = tensors_of(tmp_path / "hf")
    expected = {name: tensor for name, tensor in tensors_of(source).items() if not name.startswith("model.visual.")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name
    check_index(tmp_path / "hf", found, "pt")
    for name in ("config.json", *COPIED):
        written, original = ((folder / name).read_bytes() for folder in (tmp_path / "hf", source))
        assert written == original or (name == "config.json" and json.loads(written) == json.loads(original))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_pack_gives_the_nearest_bf16_of_its_weights(tmp_path: Path, bits: int) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL)
    pack = make_pack(source, tmp_path / "pack", bits=bits, resident_bits=4)
    assert run_convert(pack, tmp_path / "hf", "--to", "hf").code == 0
    found = tensors_of(tmp_path / "hf")
    with Pack.open(pack) as opened:
        for name in opened.manifest.resident.quantized:
            expected = float32_to_bf16(opened.read_resident_matrix(name))
            ours = (
                f"{name}.weight".replace("model.", "model.language_model.", 1)
                if name[:4] != "mtp."
                else f"{name}.weight"
            )
            assert raw(found[ours]) == expected.tobytes(), name
        inner = opened.manifest.shape.moe_intermediate_size
        for layer, expert in ((0, 2), (1, 0)):
            fused = found[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
            down = found[f"model.language_model.layers.{layer}.mlp.experts.down_proj"][expert]
            for projection, part in (("gate_proj", fused[:inner]), ("up_proj", fused[inner:]), ("down_proj", down)):
                arrays = expert_arrays(opened, layer, expert, projection)
                scheme = dict(opened.geometry(layer).block(expert).matrices)[projection].scheme
                weights = dequantize(*arrays, bits=bits, group_size=scheme.group_size or 0)
                assert raw(part) == float32_to_bf16(weights).tobytes(), (layer, expert, projection)


def expert_arrays(pack: Pack, layer: int, expert: int, projection: str) -> list[np.ndarray]:
    """The arrays of one matrix as they lie in its block."""
    geometry = pack.geometry(layer).block(expert)
    block = bytearray(geometry.block_stride)
    pack.read_block(layer, expert, memoryview(block))
    sections = [section for section in geometry.sections if section.name.startswith(f"{projection}.")]
    types = {"U32": "<u4", "BF16": "<u2"}
    flat = [np.frombuffer(block, types[s.dtype], s.shape[0] * s.shape[1], s.offset_bytes) for s in sections]
    return [array.reshape(section.shape) for array, section in zip(flat, sections)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_native_dequantizing_is_the_definition_rounded(bits: int) -> None:
    chance = np.random.default_rng(bits)
    w_q = chance.integers(0, 2**32, (7, 5 * 64 * bits // 32), dtype=np.uint32)
    scales, biases = (float32_to_bf16(chance.standard_normal((7, 5)).astype(np.float32)) for _ in range(2))
    expected = float32_to_bf16(dequantize(w_q, scales, biases, bits=bits, group_size=64))
    assert np.array_equal(dequantize_bf16(w_q, scales, biases, bits=bits, group_size=64), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_mlx_gets_the_experts_bytes_as_they_are(tmp_path: Path, bits: int) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL)
    pack = make_pack(source, tmp_path / "pack", bits=bits, resident_bits=8)
    assert run_convert(pack, tmp_path / "mlx", "--to", "mlx").code == 0
    found = tensors_of(tmp_path / "mlx")
    check_index(tmp_path / "mlx", found, "mlx")
    parts = ["weight"] if bits == 16 else ["weight", "scales", "biases"]
    with Pack.open(pack) as opened:
        for layer in range(SMALL.layers):
            for expert in range(SMALL.experts):
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    stem = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}"
                    arrays = expert_arrays(opened, layer, expert, projection)
                    assert [raw(found[f"{stem}.{part}"][expert]) for part in parts] == [a.tobytes() for a in arrays]
    original = tensors_of(source)
    assert not [name for name in found if "mtp" in name]
    norm = original["model.language_model.layers.0.input_layernorm.weight"]
    assert torch.equal(found["language_model.model.layers.0.input_layernorm.weight"], (norm.float() + 1).bfloat16())
    plain = original["model.language_model.layers.0.linear_attn.norm.weight"]
    assert torch.equal(found["language_model.model.layers.0.linear_attn.norm.weight"], plain)
    conv = original["model.language_model.layers.0.linear_attn.conv1d.weight"]
    assert torch.equal(found["language_model.model.layers.0.linear_attn.conv1d.weight"], conv.moveaxis(2, 1))


def test_a_stopped_export_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    pack = make_pack(write_checkpoint(tmp_path / "source", SMALL), tmp_path / "pack", bits=4, resident_bits=8)
    sizes: list[int] = []
    facts = export(pack, tmp_path / "whole", "hf", 2, lambda size, total: sizes.append(size))
    assert sum(sizes) == facts["total_bytes"]
    for stop_at in range(0, len(sizes), 7):
        out, seen = tmp_path / str(stop_at), []

        def stop(size_bytes: int, total_bytes: int, seen: list[int] = seen, stop_at: int = stop_at) -> None:
            seen.append(size_bytes)
            if len(seen) > stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(pack, out, "hf", 2, stop)
        assert not (out / "model.safetensors.index.json").exists()
        again: list[int] = []
        export(pack, out, "hf", 1, lambda size, total, again=again: again.append(size))
        assert sum(again) == facts["total_bytes"]
        assert files_of(out) == files_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack; not to be changed."""
    folder = tmp_path_factory.mktemp("four_bits")
    return make_pack(write_checkpoint(folder / "source", SMALL), folder / "pack", bits=4, resident_bits=8)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x29  # of the blank at a header's end it makes a tab, which is JSON too
    path.write_bytes(content)


def places_of(pack: Path) -> dict[str, tuple[str, int, tuple[str, ...]]]:
    """Where a byte may be damaged: file, offset, and what the error must name."""
    with Pack.open(pack) as opened:
        geometry, tensors = opened.geometry(1), opened.manifest.resident.tensors
        start, block = geometry.offsets[1], geometry.block(1)
        table, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        header_end = min(tensor.offset_bytes for tensor in tensors.values())
    experts, resident, named = "experts/layer_01.bin", "resident.safetensors", ("layer 1 expert 1", "--redo 1:1")
    return {
        "block, first byte": (experts, start, named),
        "block, scales": (experts, start + block.sections[-2].offset_bytes + 3, named),
        "block, last byte": (experts, start + block.block_stride - 1, named),
        "quantized resident": (resident, table.offset_bytes + table.size_bytes - 1, ("model.embed_tokens.weight",)),
        "its scales": (resident, tensors["model.embed_tokens.scales"].offset_bytes, ("model.embed_tokens.scales",)),
        "norm": (resident, norm.offset_bytes + 2, ("model.norm.weight",)),
        "resident header": (resident, header_end - 1, ("resident.safetensors",)),
        "tokenizer": ("tokenizer.json", 5, ("tokenizer.json", "restore it")),
        "config": ("config.json", 1, ("config.json", "restore it")),
    }


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_a_damaged_pack_is_not_exported(tmp_path: Path, four_bits: Path, target: str) -> None:
    """Each damage is named; nothing stands there as if whole, and the mended pack's export goes on."""
    assert run_convert(four_bits, tmp_path / "whole", "--to", target).code == 0
    whole = files_of(tmp_path / "whole")
    for number, (what, (file, offset, named)) in enumerate(places_of(four_bits).items()):
        pack, out = shutil.copytree(four_bits, tmp_path / f"pack{number}"), tmp_path / f"out{number}"
        flip(pack / file, offset)
        result = run_convert(pack, out, "--to", target)
        assert (result.code, result.out, len(result.errors)) == (3, "", 1), (what, result)
        assert not [part for part in (file, *named) if part not in result.errors[0]], (what, result.errors)
        left = files_of(out) if out.exists() else {}
        assert not [name for name in left if name.endswith(".partial")], what
        assert "model.safetensors.index.json" not in left, what
        assert "config.json" not in left, what
        assert all(whole[name] == digest for name, digest in left.items() if not name.startswith(".convert")), what
        flip(pack / file, offset)
        assert run_convert(pack, out, "--to", target).code == 0
        assert files_of(out) == whole


def test_damage_in_what_comes_in_many_pieces(tmp_path: Path, four_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays larger than a piece; whatever the number of workers."""
    monkeypatch.setattr("moepack.convert.export.PIECE_BYTES", 1000)
    monkeypatch.setattr("moepack.convert.shard_writer.BUFFER_BYTES", 4096)
    for target in ("hf", "mlx"):
        for workers in (1, 5):
            export(four_bits, tmp_path / f"{target}{workers}", target, workers, lambda size, total: None)
        assert files_of(tmp_path / f"{target}1") == files_of(tmp_path / f"{target}5")
        assert run_convert(four_bits, tmp_path / target, "--to", target).code == 0
        assert files_of(tmp_path / target) == files_of(tmp_path / f"{target}5")
    for what in ("quantized resident", "its scales", "norm"):
        file, offset, named = places_of(four_bits)[what]
        pack = shutil.copytree(four_bits, tmp_path / what)
        flip(pack / file, offset)
        with pytest.raises(DamagedPack, match=named[0]):
            export(pack, tmp_path / "damaged", "hf", 3, lambda size, total: None)


@pytest.mark.parametrize("refused", ["flag", "writes", "third write"])
def test_file_systems_without_direct_writes_get_the_same_bytes(
    tmp_path: Path, four_bits: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    export(four_bits, tmp_path / "usual", "hf", 2, lambda size, total: None)
    genuine, seen = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append(offset)
        is_direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        if is_direct and len(seen) >= (3 if refused == "third write" else 1):
            raise OSError(errno.EINVAL, "no direct writes here")
        return genuine(descriptor, data if is_direct else data[: len(data) // 2 + 1], offset)  # short ones happen, too

    if refused == "flag":
        monkeypatch.setattr("moepack.convert.shard_writer.start_direct", lambda descriptor: False)
    monkeypatch.setattr(os, "pwrite", pwrite)
    export(four_bits, tmp_path / "other", "hf", 2, lambda size, total: None)
    assert len(seen) > 3
    assert files_of(tmp_path / "other") == files_of(tmp_path / "usual")


def test_every_byte_is_read_once(tmp_path: Path, four_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing the checksums costs no second pass over the blocks and resident arrays."""
    read: dict[str, int] = {}
    genuine = Pack.read_range

    def count(self: Pack, name: str, offset: int, into: memoryview, **options: object) -> None:
        read[name] = read.get(name, 0) + len(into)
        genuine(self, name, offset, into, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Pack, "read_range", count)
    export(four_bits, tmp_path / "hf", "hf", 2, lambda size, total: None)
    sizes = {path: (four_bits / path).stat().st_size for path in read if path != "config.json"}
    assert sizes == {name: size for name, size in read.items() if name != "config.json"}
    assert len(sizes) == SMALL.layers + 2


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_dry_run_tells_the_size_and_writes_nothing(tmp_path: Path, four_bits: Path, target: str) -> None:
    out = tmp_path / "out"
    told = json.loads(run_convert(four_bits, out, "--to", target, "--dry-run", "--json").out)
    table = run_convert(four_bits, out, "--to", target, "--dry-run")
    assert (table.code, table.errors) == (0, [])
    assert [line.rsplit("  ", 1)[0].strip() for line in table.out.splitlines()][1:] == [
        *("in all", "still to write", "free on the disk"),
    ]
    assert list(tmp_path.iterdir()) == []
    done = json.loads(run_convert(four_bits, out, "--to", target, "--json").out)
    assert {key: told[key] for key in ("shards", "tensors", "total_bytes")} == {
        key: done[key] for key in ("shards", "tensors", "total_bytes")
    }
    assert told["needed_bytes"] == told["total_bytes"] == sum(t.nbytes for t in tensors_of(out).values())
    before = files_of(out)
    again = json.loads(run_convert(four_bits, out, "--to", target, "--dry-run", "--json").out)
    assert (again["already_exported"], again["needed_bytes"]) == (True, 0)
    assert files_of(out) == before


def test_a_finished_export_is_left_alone(tmp_path: Path, four_bits: Path) -> None:
    out = tmp_path / "out"
    assert run_convert(four_bits, out, "--to", "mlx").code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = run_convert(four_bits, out, "--to", "mlx")
    assert (result.code, result.out, result.errors) == (0, "", [])
    assert "nothing to do" in result.err
    assert json.loads(run_convert(four_bits, out, "--to", "mlx", "--json").out)["already_exported"] is True
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = make_pack(four_bits.parent / "source", tmp_path / "other", bits=2, resident_bits=8)
    for pack, target in ((other, "mlx"), (four_bits, "hf")):
        assert run_convert(pack, out, "--to", target).code == 2
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run_convert(four_bits, out, "--to", "mlx").code == 2


@pytest.mark.parametrize("target", ["hf", "mlx", "archive"])
def test_what_does_not_go_with_a_pack_as_it_is(tmp_path: Path, four_bits: Path, target: str) -> None:
    """And an archive is no place for --dry-run: how far it compresses nobody knows before."""
    options: list[tuple[object, ...]] = [("--bits", 3), GROUP, ("--calibration", "x"), ("--resident-bits", 8)]
    options += [("--quantizer", "mse"), ("--bpw", 3), ("--target-size", "1GB"), ("--redo", "0:1"), ("--overwrite",)]
    options += [("--memory", "4GiB"), ("--scratch", "1GB"), ("--engine", "ray")]
    options += [("--dry-run",)] if target == "archive" else []
    for option in options:
        result = run_convert(four_bits, tmp_path / "out", "--to", target, *option)
        assert (result.code, result.out, len(result.errors)) == (2, "", 1), (option, result)
        assert f"{option[0]} does not go with --to {target}" in result.errors[0]
    assert list(tmp_path.iterdir()) == []
    assert run_convert(four_bits, tmp_path / "out", "--to", target, "--resume", "--workers", 1).code == 0
    if target == "archive":
        for option in (("--bits", 3), ("--dry-run",), ("--overwrite",)):
            result = run_convert(tmp_path / "out", tmp_path / "again", *option)
            assert (result.code, len(result.errors)) == (2, 1)
            assert f"{option[0]} does not go with an archive as SRC" in result.errors[0]
        assert not (tmp_path / "again").exists()


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SMALL)
    pack = make_pack(source, tmp_path / "pack", bits=4, resident_bits=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for arguments, expected in (
        ((source, tmp_path / "out", "--to", "hf"), "--to hf needs a pack, this is no pack"),
        ((pack, tmp_path / "out", "--to", "gguf"), "--to gguf: expected one of pack, mlx, hf, archive"),
        ((pack, tmp_path / "mine", "--to", "mlx"), "mine: exists and is no unfinished export"),
    ):
        result = run_convert(*arguments)
        assert (result.code, result.out, len(result.errors)) == (2, "", 1)
        assert expected in result.errors[0]
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    mixed = Path(__file__).parent / "golden" / "v1" / "mixed"
    with pytest.raises(UsageError, match="its experts have different bits"):
        export(mixed, tmp_path / "out", "mlx", 1, lambda size, total: None)


def test_the_configs_own_quantization_is_replaced(tmp_path: Path) -> None:
    pack = make_pack(write_checkpoint(tmp_path / "source", SMALL), tmp_path / "pack", bits=2, resident_bits=8)
    assert run_convert(pack, tmp_path / "mlx", "--to", "mlx").code == 0
    quantization = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"], quantization["mode"]) == (2, 32, "affine")
    assert quantization["language_model.lm_head"] == {"bits": 8, "group_size": 32}
    assert not [name for name in quantization if re.search("switch_mlp|mtp", name)]


@pytest.mark.parity
def test_transformers_loads_the_demo_model_and_computes_what_we_compute(tmp_path: Path) -> None:
    """Exported at 16 bits, and at 4 bits, whose bf16 weights make another 16-bit pack: the same logits as ours."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity installs it")
    for bits in (16, 4):
        pack = make_pack(DEMO, tmp_path / f"pack{bits}", bits=bits, resident_bits=16 if bits == 16 else 8)
        out = tmp_path / f"hf{bits}"
        assert run_convert(pack, out, "--to", "hf").code == 0
        again = make_pack(out, tmp_path / f"again{bits}", bits=16, resident_bits=16)
        engine = Engine.open(again, exact=True)
        ids = engine.tokenizer.encode(PROMPT)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        with torch.no_grad():
            expected = model.eval()(torch.tensor([ids])).logits[0]
        difference = (engine.logits(ids) - expected).abs().max()
        assert difference <= 1e-3 * (expected.max() - expected.min())
        assert transformers.AutoTokenizer.from_pretrained(out)(PROMPT)["input_ids"] == ids


@pytest.mark.parity
@pytest.mark.parametrize("bits", [4, 16])
def test_mlx_lm_loads_the_demo_model_and_generates(tmp_path: Path, bits: int) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-parity installs it")
    mx = pytest.importorskip("mlx.core", reason="needs mlx: make test-parity installs it")
    pack = make_pack(DEMO, tmp_path / "pack", bits=bits, resident_bits=16 if bits == 16 else 8)
    assert run_convert(pack, tmp_path / "mlx", "--to", "mlx").code == 0
    model, tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    if bits == 16:
        model.set_dtype(mx.float32)  # on the CPU mlx multiplies plain expert weights in float32 only
    text = mlx_lm.generate(model, tokenizer, prompt="Once upon a time", max_tokens=20)
    assert len(text.split()) > 5
    engine = Engine.open(pack, exact=True)
    ids = engine.tokenizer.encode(PROMPT)
    ours = engine.logits(ids).numpy()
    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array([ids])))[0]
    assert np.abs(ours - theirs).max() <= MLX_LOGITS * (ours.max() - ours.min())
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.95

"""The other releases against the software they come from: transformers on FP8, MLX on its own conversions.

And end to end: a pack made from each release gives the logits that transformers computes with the dequantized weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert_command import SMALL, run_convert
from moepack.runtime import Engine
from test_releases import read_blocks, read_residents
from tiny_checkpoint import TinyModel, write_checkpoint
from tiny_releases import (
    WEIGHTS,
    dequantize_release,
    dequantize_tensors,
    read_tensors,
    write_fp8,
    write_gptq,
    write_mlx,
    write_plain,
)

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity installs it")
pytestmark = pytest.mark.parity

LOGIT_TOLERANCE = 1e-3  # of the range of the logits: float32 sums in another order, over all layers
# What is neither kept as integers nor exact in bf16 moves by up to 2^-8 of itself. Routers near a tie then choose other
# experts, so that single logits move much further: the mean is held.
ROUNDED_TOLERANCE = 5e-3
PROMPT = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
MODEL = TinyModel(hidden=128, moe_intermediate=64, shared_intermediate=64, linear_value_head_dim=32)
RELEASES: dict[str, Callable[[Path], Path]] = {
    "fp8": lambda directory: write_fp8(directory, MODEL, block=32),
    "fp8, odd edges": lambda directory: write_fp8(directory, replace(MODEL, hidden=160, moe_intermediate=96)),
    "gptq": lambda directory: write_gptq(directory, replace(MODEL, moe_intermediate=128), group_size=128),
    "gptq, order of activations": lambda directory: write_gptq(directory, MODEL, group_size=64, desc_act=True),
    "mlx": lambda directory: write_mlx(directory, MODEL, 4, 64),
    "mlx, 3 bits": lambda directory: write_mlx(directory, MODEL, 3, 32),
    "mlx, bf16": lambda directory: write_mlx(directory, MODEL, None),
}


def logits_of(source: Path) -> torch.Tensor:
    """transformers' logits of a plain checkpoint in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0]


def as_a_pack_holds_it(name: str, values: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
    """A release's weight after the one rounding that a pack may do: `stored` is what it comes from."""
    is_small = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "in_proj_a.weight", "in_proj_b.weight"))
    fp8 = stored is not None and stored.dtype == torch.float8_e4m3fn
    return values.bfloat16().float() if fp8 or is_small else values


@pytest.mark.parametrize("name", RELEASES)
def test_a_pack_computes_what_transformers_computes_with_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    """Tightly with the weights as the pack rounds them, if it does; and on average with the release's very own."""
    source = RELEASES[name](tmp_path / "source")
    bits = {"gptq": 4, "mlx": 4, "mlx, 3 bits": 3}.get(name, 16)  # integers that are kept
    result = run_convert(source, tmp_path / "pack", "--bits", bits, "--resident-bits", 16)
    assert result.code == 0, result.err
    assert bits == 16 or any("keep the source's integers" in note for note in result.notes)
    logits = Engine.open(tmp_path / "pack", exact=True).logits(PROMPT)
    own = write_plain(tmp_path / "own", source, torch.float32)
    expected = logits_of(own)
    scale = (expected.max() - expected.min()).item()
    assert (logits - expected).abs().mean() <= ROUNDED_TOLERANCE * scale
    if name == "gptq":  # the scales as bf16 holds them
        tensors = read_tensors(source)
        rounded = {n: t.bfloat16().half() if n.endswith(".scales") else t for n, t in tensors.items()}
        weights = dequantize_tensors(rounded, json.loads((source / "config.json").read_text()))
    else:
        stored = read_tensors(source)
        weights = {n: as_a_pack_holds_it(n, t, stored.get(n)) for n, t in read_tensors(own).items()}
    if bits == 16:
        weights = {n: t.bfloat16().float() if ".experts." in n else t for n, t in weights.items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, own / WEIGHTS)
    difference = (logits - logits_of(own)).abs()
    assert difference.max() <= LOGIT_TOLERANCE * scale, f"max {difference.max():.2e} of range {scale:.2f}"


def test_fp8_means_what_transformers_reads(tmp_path: Path) -> None:
    """Its own dequantization on the CPU, to bf16; sizes that its blocks divide, the others are not read by it."""
    source = write_fp8(tmp_path / "source", MODEL, block=32)
    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config
    ).eval()
    theirs = model.state_dict()
    assert run_convert(source, tmp_path / "pack", "--bits", 16, "--resident-bits", 16).code == 0
    blocks, residents = read_blocks(tmp_path / "pack"), read_residents(tmp_path / "pack")
    for layer in range(MODEL.layers):
        stem = f"model.layers.{layer}.mlp.experts"
        for expert in range(MODEL.experts):
            parts = [blocks[layer, expert, f"{name}_proj.weight"] for name in ("gate", "up", "down")]
            gate, up, down = (torch.from_numpy(part.view(np.int16)).view(torch.bfloat16) for part in parts)
            assert torch.equal(torch.cat([gate, up]), theirs[f"{stem}.gate_up_proj"][expert])
            assert torch.equal(down, theirs[f"{stem}.down_proj"][expert])
    for name, values in residents.items():
        if not name.startswith("mtp."):
            assert torch.equal(torch.from_numpy(values).bfloat16(), theirs[name].bfloat16()), name


@pytest.mark.parametrize(("bits", "dtype"), [(4, None), (8, None), (6, None), (None, "bfloat16")])
def test_what_mlx_lm_converts_is_what_the_pack_holds(tmp_path: Path, bits: int | None, dtype: str | None) -> None:
    """mlx_lm.convert of a tiny checkpoint: experts bit for bit, every other weight as MLX dequantizes it."""
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-parity installs it")
    import mlx.core as mx
    from mlx_lm import convert

    model = replace(MODEL, layers=2, full_attention_interval=2, mtp=False, head_dim=32, heads=4)
    origin = write_checkpoint(tmp_path / "origin", model)
    target = tmp_path / "mlx"
    convert(str(origin), str(target), quantize=bits is not None, q_bits=bits, q_group_size=64, dtype=dtype)
    shutil.copy(origin / "tokenizer.json", target)
    pack_bits = bits if bits in (4, 8) else 16
    result = run_convert(target, tmp_path / "pack", "--bits", pack_bits, "--resident-bits", 16)
    assert result.code == 0, result.err
    arrays = {}
    for path in target.glob("*.safetensors"):
        arrays |= mx.load(str(path))
    said = json.loads((target / "config.json").read_text()).get("quantization", {})

    def value_of(stem: str) -> np.ndarray:
        weight = arrays[f"{stem}.weight"]
        if f"{stem}.scales" in arrays:
            own = said.get(stem) or said
            weight = mx.dequantize(
                weight, arrays[f"{stem}.scales"].astype(mx.float32), arrays[f"{stem}.biases"].astype(mx.float32),
                group_size=own["group_size"], bits=own["bits"],
            )  # fmt: skip
        return np.array(weight.astype(mx.float32))

    blocks, residents = read_blocks(tmp_path / "pack"), read_residents(tmp_path / "pack")
    for (layer, expert, section), found in blocks.items():
        projection, part = section.split(".")
        stem = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}"
        if part == "weight":
            rounded = torch.from_numpy(value_of(stem)[expert]).bfloat16().view(torch.int16).numpy()
            assert np.array_equal(found.view(np.int16), rounded)
        else:
            stored = arrays[f"{stem}.{'weight' if part == 'w_q' else part}"][expert]
            bytes_of = stored if stored.dtype == mx.uint32 else stored.view(mx.uint16)
            assert np.array_equal(found, np.array(bytes_of)), (layer, expert, section)
    original = dict(dequantize_release(target))
    assert len(residents) == sum("experts" not in name for name in original)
    for name, values in residents.items():
        theirs = f"language_model.{name}"
        stem = theirs.removesuffix(".weight")
        expected = value_of(stem) if theirs.endswith(".weight") else np.array(arrays[theirs].astype(mx.float32))
        if name.endswith("conv1d.weight"):
            expected = np.moveaxis(expected, 1, 2)
        elif name.endswith(("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")):
            expected = expected - np.float32(1)
        np.testing.assert_allclose(values, expected, rtol=2**-8, atol=0, err_msg=name)  # half a step of bf16 at most


def test_a_pack_of_an_mlx_checkpoint_computes_what_mlx_computes(tmp_path: Path) -> None:
    """Logits of mlx-lm itself, whose activations are float32 here; its quantized products sum in another order."""
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: make test-parity installs it")
    import mlx.core as mx
    from mlx_lm import convert
    from mlx_lm.utils import load_model

    model = replace(MODEL, mtp=False, linear_key_head_dim=32)
    origin, target = write_checkpoint(tmp_path / "origin", model), tmp_path / "mlx"
    convert(str(origin), str(target), quantize=True, q_bits=4, q_group_size=64)
    shutil.copy(origin / "tokenizer.json", target)
    loaded, _ = load_model(target)
    loaded.set_dtype(mx.float32)
    expected = torch.from_numpy(np.array(loaded(mx.array([PROMPT])).astype(mx.float32)))[0]
    assert run_convert(target, tmp_path / "pack", "--resident-bits", 16).code == 0
    logits = Engine.open(tmp_path / "pack", exact=True).logits(PROMPT)
    difference, scale = (logits - expected).abs(), (expected.max() - expected.min()).item()
    assert difference.mean() <= ROUNDED_TOLERANCE * scale, f"mean {difference.mean():.2e} of range {scale:.2f}"


def test_the_twins_hold_the_release(tmp_path: Path) -> None:
    """The builder's packing is the inverse of its unpacking, and its error that of the bits it claims."""
    plain = read_tensors(write_checkpoint(tmp_path / "plain", SMALL, experts="per_expert"))
    for name, write, most in (("fp8", write_fp8, 0.07), ("gptq", write_gptq, 0.2), ("mlx", write_mlx, 0.2)):
        weights = dequantize_release(write(tmp_path / name, SMALL))
        for weight, values in weights.items():
            expected = plain[weight].float()
            away = (values.float() - expected).norm() / expected.norm()
            assert away <= most, (name, weight, away)

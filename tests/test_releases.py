"""Packs made from the FP8, GPTQ and MLX releases: the same weights as from a BF16 release that holds them dequantized.

The dequantization is tiny_releases.py's own. At 16 bits both packs hold bf16 of the same floats, so their expert
files are equal to the byte; where integers are kept, they, their scales and biases are compared one by one.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_command import SMALL, problems_of, run_convert
from golden_packs import moe_inspect
from moepack.layout.quantized import bf16_to_float32, dequantize, unpack_integers
from moepack.layout.reader import Pack
from tiny_checkpoint import TinyModel, write_checkpoint
from tiny_releases import WEIGHTS, dequantize_release, read_tensors, write_fp8, write_gptq, write_mlx, write_plain

ODD = TinyModel(
    layers=2, full_attention_interval=2, experts=3, hidden=160, moe_intermediate=224, shared_intermediate=96
)
RELEASES = {
    "fp8": lambda directory: write_fp8(directory, SMALL),
    "fp8, odd edges": lambda directory: write_fp8(directory, ODD),
    "fp8, F32 scales": lambda directory: write_fp8(directory, ODD, block=64, scale_dtype=torch.float32),
    "gptq": lambda directory: write_gptq(directory, SMALL),
    "gptq, order of activations": lambda directory: write_gptq(directory, SMALL, desc_act=True),
    "gptq, zero points": lambda directory: write_gptq(directory, ODD, sym=False),
    "gptq, 8 bits": lambda directory: write_gptq(directory, SMALL, bits=8),
    "gptq, 2 bits, second format": lambda directory: write_gptq(directory, SMALL, bits=2, version=2),
    "mlx": lambda directory: write_mlx(directory, SMALL),
    "mlx, 3 bits": lambda directory: write_mlx(directory, ODD, bits=3),
    "mlx, 6 bits": lambda directory: write_mlx(directory, SMALL, bits=6),
    "mlx, 5 bits": lambda directory: write_mlx(directory, SMALL, bits=5),
    "mlx, bf16": lambda directory: write_mlx(directory, SMALL, bits=None),
}


def convert(source: Path, out: Path, *options: object):
    result = run_convert(source, out, *options)
    assert result.code == 0, result.err
    assert problems_of(out) == []
    return result


def expert_files(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (pack / "experts").iterdir()}


def read_residents(pack: Path) -> dict[str, np.ndarray]:
    """Every resident weight as float32."""
    with Pack.open(pack) as opened:
        quantized = opened.manifest.resident.quantized
        result = {}
        for name, tensor in opened.manifest.resident.tensors.items():
            matrix = name.removesuffix(".weight")
            if matrix in quantized:
                result[name] = opened.read_resident_matrix(matrix)
            elif name.rpartition(".")[0] not in quantized:
                values = opened.read_resident(name)
                result[name] = bf16_to_float32(values) if tensor.dtype == "BF16" else values.astype(np.float32)
        return result


def read_blocks(pack: Path) -> dict[tuple[int, int, str], np.ndarray]:
    """(layer, expert, section) -> array, of every block."""
    with Pack.open(pack) as opened:
        result = {}
        for layer in range(len(opened.manifest.expert_files)):
            geometry = opened.geometry(layer)
            for expert in range(geometry.num_experts):
                block = bytearray(geometry.block(expert).block_stride)
                opened.read_block(layer, expert, memoryview(block))
                for section in geometry.block(expert).sections:
                    dtype = "<u4" if section.dtype == "U32" else "<u2"
                    values = np.frombuffer(block, dtype, section.shape[0] * section.shape[1], section.offset_bytes)
                    result[layer, expert, section.name] = values.reshape(section.shape)
        return result


EXACT = {"gptq": 0.004, "mlx": 0.0, "mlx, 3 bits": 0.0}  # integers are kept: only GPTQ's scales are rounded
ROUNDED = ("fp8", "fp8, odd edges", "gptq, order of activations", "mlx, 6 bits")


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_verify_compares_with_what_a_release_means(name, tmp_path):
    """The error against the release is that against the floats which it stands for."""
    source = RELEASES[name](tmp_path / "source")
    bits = ("--bits", 3) if "3 bits" in name else ()
    convert(source, tmp_path / "pack", *bits, "--group-size", 32)
    twin = write_plain(tmp_path / "twin", source, torch.float32)
    found, expected = (
        json.loads(moe_inspect("verify", tmp_path / "pack", "--source", original, "--json").stdout)["source"]
        for original in (source, twin)
    )
    assert found["experts"] == len(found["errors"]) == expected["experts"] > 0
    for one, other in zip(found["errors"], expected["errors"]):
        assert one == pytest.approx(other, abs=1e-6)
    usual = max(part["median"] for part in found["projections"].values())  # GPTQ's MTP head is bf16, and rounded
    assert usual <= EXACT[name] if name in EXACT else 0.01 < usual < 0.2


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_gives_the_weights_of_its_dequantized_twin(name, tmp_path):
    source = RELEASES[name](tmp_path / "source")
    plain = write_plain(tmp_path / "plain", source, torch.float32)  # so that norms are not rounded again
    options = ("--bits", 16, "--resident-bits", 16)
    convert(source, tmp_path / "pack", *options)
    convert(plain, tmp_path / "twin", *options)
    assert expert_files(tmp_path / "pack") == expert_files(tmp_path / "twin")
    found, expected = read_residents(tmp_path / "pack"), read_residents(tmp_path / "twin")
    assert found.keys() == expected.keys()
    with Pack.open(tmp_path / "pack") as pack:
        arrays, kept = pack.manifest.resident.tensors, pack.manifest.resident.quantized
    for weight, values in expected.items():
        exact = weight.removesuffix(".weight") in kept or arrays[weight].dtype == "F32"
        rounded = values if exact else torch.from_numpy(values).bfloat16().float().numpy()
        np.testing.assert_array_equal(found[weight], rounded, err_msg=weight)


def test_fp8_rounded_to_four_bits_starts_from_the_exact_floats(tmp_path):
    """And not from bf16: that would round twice."""
    source = write_fp8(tmp_path / "source", ODD)
    twin = write_plain(tmp_path / "plain", source, torch.float32)
    result = convert(source, tmp_path / "pack", "--group-size", 32)
    convert(twin, tmp_path / "twin", "--group-size", 32)
    assert expert_files(tmp_path / "pack") == expert_files(tmp_path / "twin")
    assert not any("bf16 in the pack" in note for note in result.notes)  # the large matrices are at 8 bits


def fields(name: str) -> tuple[str, str]:
    projection, _, part = name.partition(".")
    return projection, part


@pytest.mark.parametrize("group_size", [None, 32])
def test_gptq_integers_are_kept(tmp_path, group_size):
    """In its own groups by default; in smaller ones with the scale of the group they are part of."""
    model = replace(SMALL, hidden=256, moe_intermediate=128)
    source = write_gptq(tmp_path / "source", model, group_size=128)
    options = () if group_size is None else ("--group-size", group_size)
    result = convert(source, tmp_path / "pack", *options, "--resident-bits", 16)
    weights, tensors, repeats = dequantize_release(source), read_tensors(source), 128 // (group_size or 128)
    blocks = read_blocks(tmp_path / "pack")
    for layer, expert, projection in {(key[0], key[1], fields(key[2])[0]) for key in blocks if key[0] < model.layers}:
        stem = f"model.language_model.layers.{layer}.mlp.experts.{expert}.{projection}"
        w_q, scales, biases = (blocks[layer, expert, f"{projection}.{part}"] for part in ("w_q", "scales", "biases"))
        original = tensors[f"{stem}.scales"].T.repeat_interleave(repeats, 1)
        rounded = original.bfloat16().float()
        np.testing.assert_array_equal(bf16_to_float32(scales), rounded.numpy())
        np.testing.assert_array_equal(bf16_to_float32(biases), -8 * rounded.numpy())
        steps = weights[f"{stem}.weight"] / original.float().repeat_interleave(128 // repeats, 1)
        np.testing.assert_array_equal(unpack_integers(w_q, 4), steps.round() + 8)
        found = torch.from_numpy(dequantize(w_q, scales, biases, bits=4, group_size=128 // repeats))
        away = (found - weights[f"{stem}.weight"]).abs()
        assert (away <= weights[f"{stem}.weight"].abs() * 2**-8).all(), "more than half a step of bf16"
    assert any("experts keep the source's integers (GPTQ at 4 bits in groups of 128)" in note for note in result.notes)
    assert any("F16 to bf16" in note and "0.4 % of itself at most" in note for note in result.notes)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (2, 32), (8, 64)])
def test_mlx_experts_and_large_matrices_are_kept_bit_for_bit(tmp_path, bits, group_size):
    model = replace(
        SMALL, hidden=192, moe_intermediate=64, shared_intermediate=64, linear_value_head_dim=48, head_dim=48
    )
    source = write_mlx(tmp_path / "source", model, bits, group_size)
    result = convert(source, tmp_path / "pack", "--bits", bits)
    tensors, blocks = read_tensors(source), read_blocks(tmp_path / "pack")
    assert len(blocks) == model.layers * model.experts * 9
    for (layer, expert, section), found in blocks.items():
        projection, part = fields(section)
        stem = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}"
        stored = tensors[f"{stem}.{'weight' if part == 'w_q' else part}"][expert]
        assert found.tobytes() == stored.contiguous().view(torch.uint8).numpy().tobytes(), (layer, expert, section)
    written = load_file(tmp_path / "pack" / "resident.safetensors")
    kept = [name for name in written if name.endswith((".scales", ".biases"))]
    assert {"model.embed_tokens.scales", "lm_head.biases", "model.layers.1.self_attn.q_proj.scales"} <= set(kept)
    for name in kept:
        theirs = (
            f"language_model.{name}"
            if name.startswith("lm_head")
            else name.replace("model.", "language_model.model.", 1)
        )
        assert torch.equal(written[name], tensors[theirs]), name
        stem, theirs = name.rpartition(".")[0], theirs.rpartition(".")[0]
        assert torch.equal(written[f"{stem}.weight"], tensors[f"{theirs}.weight"]), name
    assert written["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert written["model.layers.0.linear_attn.in_proj_a.weight"].dtype == torch.bfloat16
    assert any("MTP head, the checkpoint has none" in note for note in result.notes)
    assert any("resident weights are MLX at 8 bits" in note and "bf16 in the pack" in note for note in result.notes)


def test_other_bits_than_the_sources_round_again_and_say_how_not_to(tmp_path):
    source = write_mlx(tmp_path / "source", SMALL, 4, 32)
    result = convert(source, tmp_path / "pack", "--bits", 2, "--group-size", 32)
    assert any("rounded again: --bits 4 --group-size 32 keeps them" in note for note in result.notes)


def test_qwen36_fp8_has_its_mtp_in_a_file_of_its_own(tmp_path):
    source = write_fp8(tmp_path / "source", SMALL)
    expected = write_plain(tmp_path / "plain", source, torch.float32)
    tensors = read_tensors(source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    mtp = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")}
    save_file(tensors, source / "model-00001-of-00001.safetensors")
    save_file(mtp, source / "mtp.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | dict.fromkeys(mtp, "mtp.safetensors")
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "pack", "--group-size", 32)
    convert(expected, tmp_path / "twin", "--group-size", 32)
    assert expert_files(tmp_path / "pack") == expert_files(tmp_path / "twin")


EXPERT = "model.language_model.layers.0.mlp.experts.1.up_proj"
MLX_UP = "language_model.model.layers.0.mlp.switch_mlp.up_proj"
NAN_SCALE = torch.full((1, 1), float("nan"))
WRONG = {
    "fp8 scale missing": (
        "fp8",
        lambda t: t.pop(f"{EXPERT}.weight_scale_inv"),
        f"1 missing: {EXPERT}.weight_scale_inv",
    ),
    "fp8 scale alone": (
        "fp8",
        lambda t: t.pop(f"{EXPERT}.weight"),
        "1 missing: model.layers.0.mlp.experts.1.up_proj.weight",
    ),
    "fp8 scale misshapen": (
        "fp8",
        lambda t: t.update({f"{EXPERT}.weight_scale_inv": torch.ones(2, 1)}),
        f"1 misshapen: {EXPERT}.weight_scale_inv is [2, 1], expected [1, 1]",
    ),
    "fp8 scale of another type": (
        "fp8",
        lambda t: t.update({f"{EXPERT}.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
        "weight_scale_inv is I32, expected BF16 or F32",
    ),
    "bf16 among fp8": (
        "fp8",
        lambda t: t.update({f"{EXPERT}.weight": torch.zeros(64, 96, dtype=torch.bfloat16)}),
        f"of another type: {EXPERT}.weight is BF16, that of expert 0 F8_E4M3",
    ),
    "fp8 misshapen": (
        "fp8",
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:32].clone()}),
        "is [32, 96], expected [64, 96]",
    ),
    "gptq scales missing": ("gptq", lambda t: t.pop(f"{EXPERT}.scales"), f"1 missing: {EXPERT}.scales"),
    "gptq zeros missing": ("gptq", lambda t: t.pop(f"{EXPERT}.qzeros"), f"1 missing: {EXPERT}.qzeros"),
    "gptq weight missing": ("gptq", lambda t: t.pop(f"{EXPERT}.qweight"), "3 unexpected"),
    "gptq of other groups": (
        "gptq",
        lambda t: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"][:1].clone()}),
        f"{EXPERT}.scales is [1, 64], expected [3, 64]",
    ),
    "gptq weight as floats": (
        "gptq",
        lambda t: t.update({f"{EXPERT}.qweight": t[f"{EXPERT}.qweight"].float()}),
        "expected an I32 matrix",
    ),
    "mlx scales missing": ("mlx", lambda t: t.pop(f"{MLX_UP}.scales"), f"1 missing: {MLX_UP}.scales"),
    "mlx biases misshapen": (
        "mlx",
        lambda t: t.update({f"{MLX_UP}.biases": t[f"{MLX_UP}.biases"][:2].clone()}),
        f"{MLX_UP}.biases is [2, 64, 3], expected [3, 64, 3]",
    ),
    "mlx projection missing": (
        "mlx",
        lambda t: [t.pop(f"{MLX_UP}.{part}") for part in ("weight", "scales", "biases")],
        "1 missing:",
    ),
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    return {kind: RELEASES[kind](folder / kind) for kind in ("fp8", "gptq", "mlx")}


def rewrite(source: Path, copy: Path, change) -> Path:
    """A copy of a release with its tensors changed, in one file."""
    shutil.copytree(source, copy)
    tensors = read_tensors(copy)
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize("case", WRONG)
def test_releases_that_are_not_whole_are_refused_before_any_work(releases, tmp_path, case):
    kind, change, expected = WRONG[case]
    source = rewrite(releases[kind], tmp_path / "source", change)
    result = run_convert(source, tmp_path / "pack")
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert result.err.startswith(f"error: {source}: ")
    assert expected in result.err
    assert not (tmp_path / "pack").exists()


WRONG_VALUES = {
    "fp8 NaN": ("fp8", lambda t: t[f"{EXPERT}.weight"].view(torch.uint8)[3, 5].fill_(0x7F), "NaN"),
    "fp8 NaN scale": ("fp8", lambda t: t.update({f"{EXPERT}.weight_scale_inv": NAN_SCALE}), "NaN"),
    "gptq NaN scale": ("gptq", lambda t: t[f"{EXPERT}.scales"][1, 2].fill_(float("inf")), "NaN"),
    "gptq zero point": ("gptq", lambda t: t[f"{EXPERT}.qzeros"].fill_(0), "says sym, expected 8 everywhere, found 1"),
    "gptq order": ("gptq", lambda t: t[f"{EXPERT}.g_idx"].copy_(t[f"{EXPERT}.g_idx"].flip(0)), "not in order"),
    "mlx NaN": ("mlx", lambda t: t[f"{MLX_UP}.biases"][2, 3, 1].fill_(float("nan")), "NaN"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_values_that_cannot_be_are_named_and_leave_no_pack(releases, tmp_path, case):
    kind, change, expected = WRONG_VALUES[case]
    source = rewrite(releases[kind], tmp_path / "source", change)
    result = run_convert(source, tmp_path / "pack", "--group-size", 32)
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert result.errors[0].startswith(f"error: {source}: ")
    assert expected in result.errors[0]
    assert not (tmp_path / "pack" / "manifest.json").exists()


def test_an_order_beyond_the_groups_is_refused(tmp_path):
    source = write_gptq(tmp_path / "made", SMALL, desc_act=True)
    changed = rewrite(source, tmp_path / "source", lambda t: t[f"{EXPERT}.g_idx"][7].fill_(3))
    result = run_convert(changed, tmp_path / "pack", "--group-size", 32)
    assert (result.code, len(result.errors)) == (1, 1)
    assert "g_idx names groups that do not exist" in result.errors[0]


def test_mixed_bits_by_path_and_dry_run_sizes(tmp_path):
    """MLX recipes give some layers' down_proj more bits: what fits is kept, the rest rounded to what is asked for."""
    source = write_mlx(tmp_path / "source", SMALL, 4, 32)
    told = json.loads(run_convert(source, tmp_path / "pack", "--dry-run", "--json").out)
    convert(source, tmp_path / "pack")
    assert (tmp_path / "pack" / "resident.safetensors").stat().st_size == told["resident_bytes"]
    assert told["group_size"] == 32


def test_the_folders_name_tells_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "Qwen3.5-397B-A17B-GPTQ-Int4", SMALL)
    result = convert(source, tmp_path / "pack", "--group-size", 32)
    assert not any("GPTQ" in note for note in result.notes)

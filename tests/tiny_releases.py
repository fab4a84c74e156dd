"""The other releases of a tiny checkpoint: FP8, GPTQ and MLX, in the official layouts, and what their weights mean.

Made from the BF16 checkpoint of tiny_checkpoint.py by the formulas of the formats, in plain torch, so that nothing of
moepack's own reading is trusted. `dequantize_release` gives the floats back under the names of the BF16 release.

    source = write_fp8(tmp_path / "source", TinyModel(hidden=160), scale_dtype=torch.float32)
    write_plain(tmp_path / "plain", source)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tiny_checkpoint import TinyModel, write_checkpoint, write_shards

Tensors = dict[str, torch.Tensor]
EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
FP8_ELSEWHERE = re.compile(
    r".*\.(linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|self_attn\.[qkvo]_proj|shared_expert\.(gate|up|down)_proj)\.weight"
)
MLX_LINEAR = re.compile(r".*(_proj|in_proj_\w+|embed_tokens|lm_head|mlp\.gate|shared_expert_gate)\.weight")
MLX_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "_norm.weight")
WEIGHTS = "model.safetensors"


def read_tensors(directory: Path) -> Tensors:
    """Every tensor of a checkpoint."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def write_fp8(
    directory: Path, model: TinyModel = TinyModel(), block: int = 128, scale_dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The official FP8 layout: experts one by one and the large matrices as F8_E4M3, each with its block scales."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            if EXPERT.fullmatch(name) or FP8_ELSEWHERE.fullmatch(name):
                weight = tensor.float()
                tops = torch.stack([
                    torch.stack([part.abs().max() for part in rows.split(block, 1)]) for rows in weight.split(block, 0)
                ])  # fmt: skip
                scales = (tops / 448).to(scale_dtype)
                result[name] = (weight / spread(scales.float(), block, weight.shape)).to(torch.float8_e4m3fn)
                result[f"{name}_scale_inv"] = scales
            else:
                result[name] = tensor
        return result

    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return _write(directory, model, change, {"quantization_config": said | {"modules_to_not_convert": ["lm_head"]}})


def write_gptq(
    directory: Path,
    model: TinyModel = TinyModel(),
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    version: int = 1,
) -> Path:
    """The official GPTQ layout: the trunk's experts alone, one by one, packed along the input dimension."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            if name.startswith("mtp.") or not EXPERT.fullmatch(name):
                result[name] = tensor
                continue
            stem, weight = name.removesuffix(".weight"), tensor.float().T  # [K, N]
            columns = weight.shape[0]
            order = torch.arange(columns) // group_size
            if desc_act:
                order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(len(name)))]
            groups = [weight[order == group] for group in range(columns // group_size)]
            top = 2**bits - 1
            if sym:
                scales = torch.stack([rows.abs().amax(0) for rows in groups]) / (top // 2)
                zeros = torch.full(scales.shape, (top + 1) // 2)
            else:
                scales = torch.stack([rows.amax(0) - rows.amin(0) for rows in groups]) / top
                zeros = (-torch.stack([rows.amin(0) for rows in groups]) / scales).round().clamp(1, top).int()
            scales = scales.half()
            q = (weight / scales.float()[order] + zeros[order]).round().clamp(0, top).int()
            result[f"{stem}.qweight"] = pack_along(q, bits, 0)
            result[f"{stem}.scales"] = scales
            result[f"{stem}.qzeros"] = pack_along(zeros - int(version == 1), bits, 1)
            result[f"{stem}.g_idx"] = order.int()
        return result

    said = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    said |= {"dynamic": {"-:.*attn.*": {}, "-:.*shared_expert.*": {}, "-:.*mtp.*": {}}, "lm_head": False}
    said |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return _write(directory, model, change, {"quantization_config": said})


def write_mlx(directory: Path, model: TinyModel = TinyModel(), bits: int | None = 4, group_size: int = 32) -> Path:
    """mlx-lm's layout: experts stacked by projection, +1 on the norms, gates at 8 bits; bits None: bf16 throughout."""
    modules: dict[str, Any] = {}

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        stacked: dict[str, list[torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(("mtp.", "model.visual.")):
                continue
            name = name.replace("model.language_model.", "language_model.model.").replace(
                "lm_head", "language_model.lm_head"
            )
            if EXPERT.fullmatch(name):
                stem, _, rest = name.partition(".experts.")
                stacked.setdefault(f"{stem}.switch_mlp.{rest.split('.')[1]}.weight", []).append(tensor)
            elif name.endswith("conv1d.weight"):
                result[name] = tensor.moveaxis(2, 1).contiguous()
            elif name.endswith(MLX_NORMS) and "linear_attn" not in name:
                result[name] = tensor + 1.0
            else:
                result[name] = tensor if name.endswith("A_log") else tensor.bfloat16()
        result |= {name: torch.stack(parts) for name, parts in sorted(stacked.items())}
        for name in [name for name in result if bits and MLX_LINEAR.fullmatch(name)]:
            stem = name.removesuffix(".weight")
            width = 8 if name.endswith("gate.weight") else bits
            if width != bits:
                modules[stem] = {"group_size": group_size, "bits": width}
            groups = result.pop(name).float().unflatten(-1, (-1, group_size))
            low, high = groups.amin(-1), groups.amax(-1)
            scales, biases = ((high - low) / (2**width - 1)).bfloat16(), low.bfloat16()
            q = (groups - biases.float()[..., None]) / scales.float()[..., None]
            q = q.nan_to_num(0).round().clamp(0, 2**width - 1).flatten(-2).to(torch.uint8)
            result |= {name: pack_stream(q, width), f"{stem}.scales": scales, f"{stem}.biases": biases}
        return result

    said: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"} if bits else {}
    written = _write(directory, model, change, {})
    config = json.loads((written / "config.json").read_text())
    if bits:
        config |= {"quantization": said | modules, "quantization_config": said | modules}
    (written / "config.json").write_text(json.dumps(config))
    return written


def dequantize_release(directory: Path) -> Tensors:
    """The weights of a release as float32, under the names of a per-expert BF16 release; other tensors as they are."""
    return dequantize_tensors(read_tensors(directory), json.loads((directory / "config.json").read_text()))


def dequantize_tensors(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """dequantize_release of tensors that are in memory."""
    said = config.get("quantization_config", {})
    if said.get("quant_method") == "fp8":
        block = said["weight_block_size"][0]
        return {
            name: tensor.float() * spread(tensors[f"{name}_scale_inv"].float(), block, tensor.shape)
            if tensor.dtype == torch.float8_e4m3fn
            else tensor
            for name, tensor in tensors.items()
            if not name.endswith("_scale_inv")
        }
    if said.get("quant_method") == "gptq":
        return _dequantize_gptq(tensors, said)
    return _dequantize_mlx(tensors, said)


def write_plain(directory: Path, release: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The BF16 (or F32) release that has the weights of another one."""
    directory.mkdir(parents=True)
    for path in release.iterdir():
        if path.suffix != ".safetensors" and path.name != f"{WEIGHTS}.index.json":
            shutil.copy(path, directory)
    config = json.loads((directory / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    (directory / "config.json").write_text(json.dumps(config))
    state = ("A_log", "linear_attn.norm.weight")
    tensors = dequantize_release(release)
    save_file(
        {n: t if n.endswith(state) else t.to(dtype).contiguous() for n, t in tensors.items()}, directory / WEIGHTS
    )
    return directory


def spread(scales: torch.Tensor, block: int, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """A scale for each weight of a matrix, from one for each block."""
    return scales.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]


def pack_along(integers: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Integers packed into int32 along an axis, the first in the low bits; the last word is filled up with zeros."""
    lists = np.moveaxis(integers.numpy().astype(np.uint64), axis, 0)
    per = 32 // bits
    lists = np.concatenate([lists, np.zeros((-len(lists) % per, *lists.shape[1:]), np.uint64)])
    words = sum(lists[element::per] << np.uint64(element * bits) for element in range(per))
    return torch.from_numpy(np.moveaxis(np.asarray(words).astype(np.uint32).view(np.int32), 0, axis).copy())


def pack_stream(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers uint8 [..., K] as MLX packs them: a stream of bits, little end first."""
    stream = np.unpackbits(integers.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(stream.reshape(*integers.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.uint32))


def _dequantize_gptq(tensors: Tensors, said: dict[str, Any]) -> Tensors:
    bits, result = said["bits"], {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            order, scales = tensors[f"{stem}.g_idx"].long(), tensors[f"{stem}.scales"].float()
            k, n = torch.arange(len(order)), torch.arange(scales.shape[1])
            per = 32 // bits
            q = (tensor[k // per] >> (bits * (k % per))[:, None].int()) & (2**bits - 1)
            zeros = (tensors[f"{stem}.qzeros"][:, n // per] >> (bits * (n % per)).int()) & (2**bits - 1)
            zeros = zeros + int(said.get("checkpoint_format") != "gptq_v2")
            result[f"{stem}.weight"] = ((q - zeros[order]) * scales[order]).T.contiguous()
        elif part not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor
    return result


def _dequantize_mlx(tensors: Tensors, said: dict[str, Any]) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if tensor.dtype == torch.uint32:
            own = said.get(stem, said)
            bits, group_size = own["bits"], own["group_size"]
            stream = np.unpackbits(tensor.numpy().view(np.uint8), axis=-1, bitorder="little")
            q = stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))
            groups = torch.from_numpy(q).float().unflatten(-1, (-1, group_size))
            scales, biases = (tensors[f"{stem}.{part}"].float()[..., None] for part in ("scales", "biases"))
            tensor = (groups * scales + biases).flatten(-2)
        elif name.endswith("conv1d.weight"):
            tensor = tensor.moveaxis(1, 2).contiguous()
        elif name.endswith(MLX_NORMS) and "linear_attn" not in name:
            tensor = tensor.float() - 1.0
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        if ".switch_mlp." in name:
            stem, _, rest = name.partition(".switch_mlp.")
            result |= {f"{stem}.experts.{expert}.{rest}": rows.clone() for expert, rows in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _write(
    directory: Path, model: TinyModel, change: Callable[[Tensors], Tensors], config_keys: dict[str, Any]
) -> Path:
    write_checkpoint(directory, model, experts="per_expert", single_file=True)
    tensors = change(load_file(directory / WEIGHTS))
    (directory / WEIGHTS).unlink()
    write_shards(directory, dict(sorted(tensors.items())), 3)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | config_keys))
    return directory

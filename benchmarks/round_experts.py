"""A checkpoint whose routed experts went through a peer's rounding and back to bf16: the peer's weights, our yardstick.

All else stays as it is, so that one evaluation compares what rounding alone costs. Going back to bf16 adds an error of
0.2 % at most to each weight. The bits that the peer's bytes take are counted and written to rounding.json.

    python benchmarks/round_experts.py mlx-2 OUT        # mlx.core.quantize, affine, groups of 64 (mlx-2/32: of 32)
    python benchmarks/round_experts.py ggml-q4_K OUT --ggml LIB.so --calibration FILE    # llama.cpp, by importance

llama.cpp's types of 256 weights need rows of 256: other matrices fall back as its own quantizer has it (FALLBACK). The
importance of a column is the mean square of its inputs (moe-run calibrate), what its importance matrix holds. Its
mixtures (_M and the like) give single tensors more bits; here every expert has the named type.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moepack.layout.calibration import Calibration

ROOT = Path(__file__).resolve().parent.parent
STACKED = {".mlp.experts.gate_up_proj": "gate_proj", ".mlp.experts.down_proj": "down_proj"}  # whose inputs they have
FALLBACK = {"q2_K": "q4_0", "q3_K": "q4_0", "q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0"}  # iq types: iq4_nl
Rounder = Callable[[np.ndarray, "np.ndarray | None"], tuple[np.ndarray, int]]  # rows, importance -> rows, bytes


def main() -> None:
    """Parse the arguments, round every expert, copy the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheme", help="mlx-BITS[/GROUP] or ggml-TYPE")
    parser.add_argument("out", type=Path, help="directory to write the checkpoint into")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo" / "checkpoint")
    parser.add_argument("--calibration", type=Path, help="importance of the inputs, for ggml")
    parser.add_argument("--ggml", type=Path, help="libggml-base.so, as llama-cpp-python has it")
    arguments = parser.parse_args()
    kind, _, name = arguments.scheme.partition("-")
    if kind == "mlx":
        bits, _, group_size = name.partition("/")
        rounder: Rounder = partial(round_by_mlx, bits=int(bits), group_size=int(group_size or 64))
    elif kind == "ggml" and arguments.ggml:
        rounder = Ggml(arguments.ggml, name).round
    else:
        parser.error(f"{arguments.scheme}: expected mlx-BITS, or ggml-TYPE with --ggml")
    known = Calibration.open(arguments.calibration) if arguments.calibration else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    counts = {"bytes": 0, "weights": 0}
    for path in sorted(arguments.checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for tensor in tensors:
                round_tensor(tensors, tensor, rounder, known, counts)
            save_file(tensors, arguments.out / path.name, {"format": "pt"})
        else:
            shutil.copyfile(path, arguments.out / path.name)
    facts = {"scheme": arguments.scheme, "bits_per_weight": 8 * counts["bytes"] / counts["weights"]}
    (arguments.out / "rounding.json").write_text(json.dumps(facts))
    print(json.dumps(facts))


def round_tensor(
    tensors: dict[str, torch.Tensor], name: str, rounder: Rounder, known: Calibration | None, counts: dict[str, int]
) -> None:
    """Replace a stacked tensor of the trunk's experts [E, N, K]; leave any other."""
    projection = next((value for end, value in STACKED.items() if name.endswith(end)), None)
    if projection is None or ".layers." not in name or name.startswith("mtp"):
        return
    layer = int(name.split(".layers.")[1].split(".")[0])
    for expert, weights in enumerate(tensors[name]):
        moments = known.moments(layer, expert, projection) if known else None
        importance = moments if moments is None or moments.ndim == 1 else np.diagonal(moments)
        rounded, size = rounder(weights.float().numpy(), importance)
        tensors[name][expert] = torch.from_numpy(rounded)
        counts["bytes"] += size
        counts["weights"] += weights.numel()


def round_by_mlx(
    weights: np.ndarray, importance: np.ndarray | None, *, bits: int, group_size: int
) -> tuple[np.ndarray, int]:
    """MLX's affine mode, as mlx_lm.convert uses it; scales and biases in bf16."""
    import mlx.core as mx

    given = mx.array(weights).astype(mx.bfloat16)
    parts = mx.quantize(given, group_size=group_size, bits=bits)
    rounded = mx.dequantize(*parts, group_size=group_size, bits=bits).astype(mx.float32)
    return np.array(rounded), sum(part.nbytes for part in parts)


class TypeTraits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """llama.cpp's own rounding, from its library."""

    def __init__(self, library: Path, name: str):
        self.library = ctypes.CDLL(str(library))
        self.library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self.library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        self.types = {}
        for number in range(40):
            traits = self.library.ggml_get_type_traits(number).contents
            if traits.type_name:
                self.types[traits.type_name.decode()] = (number, traits)
        self.name = name
        if name not in self.types:
            raise SystemExit(f"ggml-{name}: expected one of {', '.join(self.types)}")

    def round(self, weights: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Rows [N, K] there and back."""
        rows, columns = weights.shape
        number, traits = self.types[self.name]
        if columns % traits.block_size:
            number, traits = self.types[FALLBACK.get(self.name, "iq4_nl")]
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        size = rows * columns // traits.block_size * traits.type_size
        packed, rounded = np.empty(size, np.uint8), np.empty_like(weights)
        given = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        address = None if given is None else given.ctypes.data
        self.library.ggml_quantize_chunk(number, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, address)
        traits.to_float(packed.ctypes.data, rounded.ctypes.data, weights.size)
        return rounded, size


if __name__ == "__main__":
    main()

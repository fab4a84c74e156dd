"""How the rows of a weight come out of a source: floats as they are, FP8 blocks, GPTQ integers, MLX's groups.

Releases of one model store the same weight in different tensors: one of floats; bytes and a scale for each block of
128x128; integers, scales and zero points packed along the input dimension; or integers, scales and biases as a pack
has them. What a checkpoint holds is told by its config and the names and types of its tensors, never by a folder's
name. A weight gives its rows as floats; where its integers mean exactly what a pack's mean, it gives those.

    weights = assemble_weights(names, checkpoint.tensors, Quantization.of(checkpoint.config)).weights
    weights["model.layers.0.mlp.experts.7.up_proj.weight"].read_rows(checkpoint, 0, 128)

Not here: which weights a model needs (names.py), and fused experts in FP8 or GPTQ, which no release has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from moepack.convert.checkpoint import FLOAT_DTYPES, Checkpoint, Rows
from moepack.convert.quantizers import QuantizedMatrix
from moepack.layout.errors import CheckpointError
from moepack.layout.geometry import Scheme
from moepack.layout.quantized import bf16_to_float32, float32_to_bf16
from moepack.layout.spec import GROUP_SIZES, QUANTIZED_BITS
from moepack.layout.tensor_file import TensorSpec

CONFIG_KEYS = ("quantization_config", "quantization")  # transformers' and mlx's; mlx writes both
PLAIN, FP8, GPTQ, MLX = "plain", "fp8", "gptq", "mlx"
READABLE = "give its BF16, FP8, GPTQ or MLX (affine) release"
FP8_DTYPE, FP8_SCALE = "F8_E4M3", "_scale_inv"
GPTQ_BITS = (2, 4, 8)  # widths that fill a 32-bit word evenly
MLX_BITS = (2, 3, 4, 5, 6, 8)
WORD_BITS = 32
# mlx adds 1 to the norms that are stored as a distance from 1, and moves the convolution's axis.
MLX_SHIFTED_NORMS = (
    *(".input_layernorm.weight", ".post_attention_layernorm.weight"),
    *("model.norm.weight", ".q_norm.weight", ".k_norm.weight"),
)
MLX_MOVED = ".linear_attn.conv1d.weight"
MLX_EXPERTS = ".switch_mlp."


def _fp8_values() -> np.ndarray:
    """The 256 values of an F8_E4M3 byte: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6)) * np.where(codes < 128, 1.0, -1.0)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


FP8_VALUES = _fp8_values()


@dataclass(frozen=True)
class Quantization:
    """What a config says about the quantization of its checkpoint.

    block        rows and columns that share an FP8 scale
    bits, group_size, zero_shift   of GPTQ: zero_shift is added to a stored zero point (1 in its first format)
    keeps_order  GPTQ without desc_act: group g is columns g*group_size onwards
    modules      MLX: path of a module -> its own bits and group_size, None if it is not quantized
    """

    method: str = PLAIN
    block: tuple[int, int] = (128, 128)
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    keeps_order: bool = True
    zero_shift: int = 1
    modules: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantization:
        """Read a config.json, nested or flat. Raises ValueError naming the key, what was expected and found."""
        text_config = config.get("text_config")
        holders = [config, text_config if isinstance(text_config, Mapping) else {}]
        found = [holder[key] for holder in holders for key in CONFIG_KEYS if holder.get(key)]
        if not found:
            return cls()
        said = found[0]
        if not isinstance(said, Mapping):
            raise ValueError(f"quantization: expected an object, found {str(said)[:40]!r}: {READABLE}")
        method = said.get("quant_method", MLX if "bits" in said else None)
        if method == FP8:
            return cls(FP8, block=_block(said))
        if method == GPTQ:
            return cls(
                GPTQ,
                bits=_choice(said, "bits", GPTQ_BITS),
                group_size=_choice(said, "group_size", (-1, *range(8, 2**16))),
                symmetric=_choice(said, "sym", (True, False), True),
                keeps_order=not _choice(said, "desc_act", (False, True), False),
                zero_shift=0 if _choice(said, "checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq_v2" else 1,
            )
        if method == MLX:
            _choice(said, "mode", ("affine",), "affine")
            own = {path: value for path, value in said.items() if isinstance(value, Mapping) or value is False}
            modules = {path: _mlx_scheme(value, said) if value else None for path, value in own.items()}
            bits, group_size = _mlx_scheme(said, said)
            return cls(MLX, bits=bits, group_size=group_size, modules=modules)
        raise ValueError(f"quant_method: {str(method)[:40]!r} is not read: {READABLE}")


def _block(said: Mapping[str, Any]) -> tuple[int, int]:
    size = said.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 2**24 for n in size):
        raise ValueError(f"weight_block_size: expected two sizes, found {str(size)[:40]}: {READABLE}")
    return size[0], size[1]


def _choice(said: Mapping[str, Any], key: str, allowed: tuple[Any, ...] | range, default: Any = None) -> Any:
    value = said.get(key)
    value = default if value is None else value
    if not any(type(value) is type(one) and value == one for one in allowed):
        few = ", ".join(map(str, allowed[:8]))
        raise ValueError(f"quantization {key}: expected one of {few}, found {str(value)[:40]!r}: {READABLE}")
    return value


def _mlx_scheme(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, int]:
    _choice(said, "mode", ("affine",), "affine")
    bits = _choice(said, "bits", MLX_BITS, defaults.get("bits"))
    return bits, _choice(said, "group_size", GROUP_SIZES, defaults.get("group_size"))


@dataclass(frozen=True)
class Weight:
    """One weight of the model in the source.

    name     its tensor, for messages (the first, if it has several)
    shape    in weights
    dtype    what it becomes where it is not quantized: BF16, F16 or F32
    kind     how the source stores it, for people
    source_bytes   of all its tensors
    scheme   bits and group size of its integers, if a pack can hold these as they are
    working_bytes   memory that reading takes per weight, beyond the source's bytes
    reads_ahead     whether prefetch does anything
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    source_bytes: int
    scheme: Scheme | None = None
    working_bytes: ClassVar[int] = 0
    reads_ahead: ClassVar[bool] = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that it is read from."""
        return (self.name,)

    @property
    def num_rows(self) -> int:
        """Of the weight seen as a matrix; a vector is one row."""
        return math.prod(self.shape[:-1])

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        """Rows first .. first+count-1 as floats, [count, K]. Raises CheckpointError."""
        raise NotImplementedError

    def prefetch(self, checkpoint: Checkpoint, first: int, count: int) -> None:
        """Rows will be read soon; where computing is the slower by far, nothing is done about it."""

    def list_pieces(self, piece_bytes: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of pieces of about so many bytes of the source."""
        step = max(1, piece_bytes * self.num_rows // max(1, self.source_bytes))
        yield from ((first, min(step, self.num_rows - first)) for first in range(0, self.num_rows, step))

    def keeps_integers(self, scheme: Scheme) -> bool:
        """Whether the source's integers are those of a pack at this scheme.

        A smaller group takes the scale and bias of the larger one that it is part of.
        """
        own = self.scheme
        if own is None or own.group_size is None or scheme.group_size is None:
            return False
        return own.bits == scheme.bits and own.group_size % scheme.group_size == 0

    def read_integers(self, checkpoint: Checkpoint, first: int, count: int, group_size: int) -> QuantizedMatrix:
        """Rows as the source's own integers, scales and biases, for a scheme that keeps_integers."""
        stored = self._read_integers(checkpoint, first, count)
        own = self.scheme.group_size if self.scheme else None
        repeats = (own or group_size) // group_size
        return QuantizedMatrix(stored.w_q, np.repeat(stored.scales, repeats, -1), np.repeat(stored.biases, repeats, -1))

    def _read_integers(self, checkpoint: Checkpoint, first: int, count: int) -> QuantizedMatrix:
        raise NotImplementedError


@dataclass(frozen=True)
class FloatWeight(Weight):
    """A tensor of floats, used as it is."""

    reads_ahead: ClassVar[bool] = True

    def prefetch(self, checkpoint: Checkpoint, first: int, count: int) -> None:
        checkpoint.prefetch(self.name, first, count)

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        return checkpoint.read_rows(self.name, first, count)


@dataclass(frozen=True)
class ShiftedNorm(FloatWeight):
    """A norm that MLX stores as 1 + w. The difference is kept in F32, where it is exact."""

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        return Rows("F32", super().read_rows(checkpoint, first, count).to_float32() - np.float32(1))


@dataclass(frozen=True)
class MovedConvolution(FloatWeight):
    """The convolution of a DeltaNet layer, [C, taps, 1] in MLX for [C, 1, taps]: the same bytes."""

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        taps = self.shape[-1]
        rows = checkpoint.read_rows(self.name, first * taps, count * taps)
        return Rows(rows.dtype, rows.values.reshape(count, taps))


@dataclass(frozen=True)
class Fp8Weight(Weight):
    """Bytes [N, K] and a multiplier for each block of them, [ceil(N/128), ceil(K/128)], whatever its name says."""

    working_bytes: ClassVar[int] = 12  # float32, and the scales of a block's columns
    scale_name: str = ""
    block: tuple[int, int] = (128, 128)

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.name, self.scale_name

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        high, wide = self.block
        codes = checkpoint.read_raw(self.name, first, count)
        first_block, end_block = first // high, -(-(first + count) // high)
        scales = checkpoint.read_rows(self.scale_name, first_block, end_block - first_block).to_float32()
        block_of_row = np.arange(first, first + count) // high - first_block
        values = FP8_VALUES[codes]
        for block, start in enumerate(range(0, values.shape[1], wide)):
            values[:, start : start + wide] *= scales[block_of_row, block, None]
        return Rows("F32", values)


@dataclass(frozen=True)
class GptqWeight(Weight):
    """Integers packed along the input dimension, scales in F16, zero points: w[n, k] = (q[k, n] - zero) * scale.

    With one zero point in the middle, a power of two, bias = -zero * scale is exact in bf16: only the scale is rounded.
    """

    working_bytes: ClassVar[int] = 24  # bytes, and float32 of them, of the scales and zero points spread out, twice
    stem: str = ""
    quantization: Quantization = Quantization()
    has_order: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        parts = ("qweight", "scales", "qzeros", *(("g_idx",) if self.has_order else ()))
        return tuple(f"{self.stem}.{part}" for part in parts)

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        rows = slice(first, first + count)
        scales = checkpoint.read_rows(f"{self.stem}.scales", 0, self._num_groups).to_float32()[:, rows]  # [G, count]
        zeros = self._read_zeros(checkpoint)[:, rows].astype(np.float32)
        group_of = self._read_order(checkpoint)
        integers = self._read_columns(checkpoint)[:, rows].astype(np.float32)  # [K, count]
        return Rows("F32", np.ascontiguousarray(((integers - zeros[group_of]) * scales[group_of]).T))

    def scale_rounding(self, checkpoint: Checkpoint) -> np.ndarray:
        """How far each scale moves as it is rounded to bf16, relative to itself."""
        scales = checkpoint.read_rows(f"{self.stem}.scales", 0, self._num_groups).to_float32()
        rounded = bf16_to_float32(float32_to_bf16(scales))
        return np.divide(np.abs(rounded - scales), np.abs(scales), out=np.zeros_like(scales), where=scales != 0)

    def _read_integers(self, checkpoint: Checkpoint, first: int, count: int) -> QuantizedMatrix:
        middle = 2 ** (self.quantization.bits - 1)
        zeros = self._read_zeros(checkpoint)
        if not (zeros == middle).all():
            raise CheckpointError(
                f"{checkpoint.directory}: {self.stem}.qzeros: config.json says sym, expected {middle} everywhere, "
                f"found {int(zeros[zeros != middle][0])}: set sym to false if that is what the weights mean"
            )
        self._read_order(checkpoint)
        rows = slice(first, first + count)
        scales = checkpoint.read_rows(f"{self.stem}.scales", 0, self._num_groups).to_bf16()[:, rows].T
        integers = np.ascontiguousarray(self._read_columns(checkpoint)[:, rows].T)  # [count, K]
        scales = np.ascontiguousarray(scales)
        biases = float32_to_bf16(bf16_to_float32(scales) * np.float32(-middle))
        return QuantizedMatrix(_pack_words(integers, self.quantization.bits), scales, biases)

    @property
    def _num_groups(self) -> int:
        return -(-self.shape[1] // self._group_size)

    @property
    def _group_size(self) -> int:
        return self.quantization.group_size if self.quantization.group_size > 0 else self.shape[1]

    def _read_columns(self, checkpoint: Checkpoint) -> np.ndarray:
        """The integers, uint8 [K, N]: word w of a column holds its elements from w * 32/bits on, low bits first."""
        bits = self.quantization.bits
        words = checkpoint.read_raw(f"{self.stem}.qweight", 0, self.shape[1] * bits // WORD_BITS)
        return _unpack_words(words.view(np.uint32)[:, None, :], bits, 1).reshape(self.shape[1], -1)

    def _read_zeros(self, checkpoint: Checkpoint) -> np.ndarray:
        bits = self.quantization.bits
        words = checkpoint.read_raw(f"{self.stem}.qzeros", 0, self._num_groups).view(np.uint32)
        stored = _unpack_words(words[:, :, None], bits, 2).reshape(self._num_groups, -1)[:, : self.shape[0]]
        return stored.astype(np.int32) + self.quantization.zero_shift

    def _read_order(self, checkpoint: Checkpoint) -> np.ndarray:
        """The group of each column, [K]."""
        plain = np.arange(self.shape[1]) // self._group_size
        if not self.has_order:
            return plain
        order = checkpoint.read_raw(f"{self.stem}.g_idx", 0, 1)[0]
        if self.quantization.keeps_order and not np.array_equal(order, plain):
            raise CheckpointError(
                f"{checkpoint.directory}: {self.stem}.g_idx is not in order, though config.json says desc_act false"
            )
        if order.min() < 0 or order.max() >= self._num_groups:
            raise CheckpointError(f"{checkpoint.directory}: {self.stem}.g_idx names groups that do not exist")
        return order


@dataclass(frozen=True)
class MlxWeight(Weight):
    """Integers, scales and biases as in a pack; experts of a layer stacked, [E, N, words]."""

    working_bytes: ClassVar[int] = 48  # a byte and a float32 for each bit
    stem: str = ""
    bits: int = 4
    group_size: int = 64

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.name, f"{self.stem}.scales", f"{self.stem}.biases"

    def read_rows(self, checkpoint: Checkpoint, first: int, count: int) -> Rows:
        words = checkpoint.read_raw(self.name, first, count)
        stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(count, -1, self.bits)
        integers = stream @ (1 << np.arange(self.bits, dtype=np.uint8)).astype(np.float32)  # [count, K]
        scales, biases = (part.to_float32()[:, :, None] for part in self._read_parts(checkpoint, first, count))
        groups = integers.reshape(count, -1, self.group_size)
        return Rows("F32", (groups * scales + biases).reshape(count, -1))

    def _read_integers(self, checkpoint: Checkpoint, first: int, count: int) -> QuantizedMatrix:
        scales, biases = (part.to_bf16() for part in self._read_parts(checkpoint, first, count))
        return QuantizedMatrix(checkpoint.read_raw(self.name, first, count), scales, biases)

    def _read_parts(self, checkpoint: Checkpoint, first: int, count: int) -> list[Rows]:
        return [checkpoint.read_rows(f"{self.stem}.{part}", first, count) for part in ("scales", "biases")]


def _unpack_words(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Elements of 32-bit words along a new axis, which has length 1 in `words`; low bits first. uint8."""
    shape = [1] * words.ndim
    shape[axis] = WORD_BITS // bits
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32).reshape(shape)
    return ((words >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)


def _pack_words(integers: np.ndarray, bits: int) -> np.ndarray:
    """As layout.quantized.pack_integers, fast, for widths that divide a byte: uint8 [N, K], uint32 [N, K*bits/32]."""
    packed = integers[:, :: 8 // bits].copy()
    for element in range(1, 8 // bits):
        packed |= integers[:, element :: 8 // bits] << np.uint8(element * bits)
    return packed.view("<u4")


@dataclass
class Assembly:
    """The weights of a checkpoint by the pack's spelling, and what does not fit together, by the checkpoint's."""

    weights: dict[str, Weight] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def assemble_weights(
    found: Mapping[str, str], tensors: Mapping[str, TensorSpec], quantization: Quantization
) -> Assembly:
    """Make one weight of the tensors that belong together.

    found     the pack's spelling of each tensor's name -> the checkpoint's
    Raises ValueError if the config names a quantization of which the tensors show nothing.
    """
    assembler = _Assembler(found, tensors, quantization)
    main_part = {FP8: f".weight{FP8_SCALE}", GPTQ: ".qweight", MLX: ".scales"}.get(quantization.method)
    if main_part and not any(name.endswith(main_part) for name in found):
        raise ValueError(
            f"config.json says {quantization.method}, but no tensor is named *{main_part}: config and weights are of "
            "different releases: download both from one"
        )
    return assembler.run()


class _Assembler:
    def __init__(self, found: Mapping[str, str], tensors: Mapping[str, TensorSpec], quantization: Quantization):
        self.found, self.tensors, self.quantization = found, tensors, quantization
        self.is_mlx = any(MLX_EXPERTS in name for name in found)
        self.result, self.used = Assembly(), set[str]()

    def run(self) -> Assembly:
        method, result = self.quantization.method, self.result
        for name in self.found:
            spec = self._spec(name)
            if method == FP8 and spec.dtype == FP8_DTYPE and name.endswith(".weight"):
                self._add_fp8(name)
            elif method == GPTQ and name.endswith(".qweight"):
                self._add_gptq(name.removesuffix(".qweight"))
            elif method == MLX and spec.dtype == "U32" and name.endswith(".weight"):
                self._add_mlx(name.removesuffix(".weight"))
        for name in self.found:
            if name not in self.used:
                if name.endswith((FP8_SCALE, ".qzeros", ".scales", ".g_idx", ".biases")):
                    result.unexpected.append(self.found[name])
                else:
                    result.weights[name] = self._float_weight(name)
        return result

    def _spec(self, name: str) -> TensorSpec:
        return self.tensors[self.found[name]]

    def _take(self, main: str, parts: Mapping[str, tuple[int, ...]]) -> bool:
        """Use up a weight's tensors; False if one is missing or not of its shape, which is noted."""
        whole = True
        for part, shape in parts.items():
            self.used.add(part)
            if part not in self.found:
                self.result.missing.append(self.found[main].removesuffix(main.rpartition(".")[2]) + part.split(".")[-1])
                whole = False
            elif self._spec(part).shape != shape:
                text = f"{self.found[part]} is {list(self._spec(part).shape)}, expected {list(shape)}"
                self.result.misshapen.append(f"{text} beside {self.found[main]} {list(self._spec(main).shape)}")
                whole = False
        return whole

    def _bytes(self, names: Mapping[str, Any]) -> int:
        return sum(self._spec(name).size_bytes for name in names if name in self.found)

    def _float_weight(self, name: str) -> Weight:
        spec = self._spec(name)
        facts = (spec.dtype, spec.dtype, spec.size_bytes)
        if self.is_mlx and name.endswith(MLX_SHIFTED_NORMS) and spec.dtype in FLOAT_DTYPES:
            return ShiftedNorm(spec.name, spec.shape, "F32", spec.dtype, spec.size_bytes)
        if self.is_mlx and name.endswith(MLX_MOVED) and len(spec.shape) == 3 and spec.shape[2] == 1:
            return MovedConvolution(spec.name, (spec.shape[0], 1, spec.shape[1]), *facts)
        return FloatWeight(spec.name, spec.shape, *facts)

    def _add_fp8(self, name: str) -> None:
        spec, block = self._spec(name), self.quantization.block
        scale = name + FP8_SCALE
        blocks = tuple(-(-size // step) for size, step in zip(spec.shape, block))
        parts = {name: spec.shape, scale: blocks}
        if self._take(name, parts):
            known = self._spec(scale).dtype in ("BF16", "F32")
            if not known or len(spec.shape) != 2:
                self.result.misshapen.append(f"{self.found[scale]} is {self._spec(scale).dtype}, expected BF16 or F32")
        self.result.weights[name] = Fp8Weight(
            name=spec.name,
            shape=spec.shape,
            dtype="BF16",
            kind=FP8_DTYPE,
            source_bytes=self._bytes(parts),
            scale_name=self.found.get(scale, ""),
            block=block,
        )

    def _add_gptq(self, stem: str) -> None:
        q, main = self.quantization, f"{stem}.qweight"
        words = self._spec(main)
        if len(words.shape) != 2 or words.dtype != "I32":
            self.used.add(main)
            self.result.misshapen.append(f"{words.name} is {words.dtype} {list(words.shape)}, expected an I32 matrix")
            return
        columns, rows = words.shape[0] * WORD_BITS // q.bits, words.shape[1]
        groups = -(-columns // q.group_size) if q.group_size > 0 else 1
        parts: dict[str, tuple[int, ...]] = {
            main: words.shape,
            f"{stem}.scales": (groups, rows),
            f"{stem}.qzeros": (groups, -(-rows * q.bits // WORD_BITS)),
        }
        has_order = f"{stem}.g_idx" in self.found
        if has_order or not q.keeps_order:
            parts[f"{stem}.g_idx"] = (columns,)
        self._take(main, parts)
        for part, dtypes in ((f"{stem}.scales", tuple(FLOAT_DTYPES)), (f"{stem}.qzeros", ("I32",))):
            if part in self.found and self._spec(part).dtype not in dtypes:
                self.result.misshapen.append(
                    f"{self.found[part]} is {self._spec(part).dtype}, expected {', '.join(dtypes)}"
                )
        holds = q.bits in QUANTIZED_BITS and q.group_size in GROUP_SIZES and columns % q.group_size == 0
        scheme = Scheme(q.bits, q.group_size) if holds and q.symmetric and q.keeps_order else None
        self.result.weights[f"{stem}.weight"] = GptqWeight(
            name=words.name,
            shape=(rows, columns),
            dtype="BF16",
            kind=f"GPTQ at {q.bits} bits in groups of {q.group_size}",
            source_bytes=self._bytes(parts),
            scheme=scheme,
            stem=words.name.removesuffix(".qweight"),
            quantization=q,
            has_order=has_order,
        )

    def _add_mlx(self, stem: str) -> None:
        main = f"{stem}.weight"
        spec = self._spec(main)
        original = spec.name.removesuffix(".weight")
        own = self.quantization.modules.get(original, (self.quantization.bits, self.quantization.group_size))
        if own is None or len(spec.shape) < 2:
            self.used.update((main, f"{stem}.scales", f"{stem}.biases"))
            self.result.misshapen.append(f"{spec.name} is {spec.dtype} {list(spec.shape)}, expected floats")
            return
        bits, group_size = own
        *stack, words = spec.shape
        columns = words * WORD_BITS // bits
        grouped = (*stack, columns // group_size)
        parts = {main: spec.shape, f"{stem}.scales": grouped, f"{stem}.biases": grouped}
        self._take(main, parts)
        scales = self.tensors.get(f"{original}.scales")
        is_exact = scales is not None and scales.dtype == "BF16" and bits in QUANTIZED_BITS
        self.result.weights[main] = MlxWeight(
            name=spec.name,
            shape=(*stack, columns),
            dtype="BF16",
            kind=f"MLX at {bits} bits in groups of {group_size}",
            source_bytes=self._bytes(parts),
            scheme=Scheme(bits, group_size) if is_exact else None,
            stem=original,
            bits=bits,
            group_size=group_size,
        )

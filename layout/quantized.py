"""What the bytes of a quantized matrix mean: packing, unpacking, dequantizing, bf16. The definition for all kernels.

Affine quantization per group along the input dimension: w ≈ q * scale + bias, with q an integer of `bits` bits and
scale and bias in bf16, one pair per `group_size` consecutive weights of a row. Element j of a row is bits
j*bits .. j*bits+bits-1 of the row's little-endian byte stream (true for 3 bits as well, where elements cross byte
borders). This equals the affine mode of MLX byte for byte.

Plain numpy: obvious and slow. Limits: whole matrices in memory; the fast paths are in kernels/.

    w = dequantize(w_q, scales, biases, bits=4, group_size=64)
"""

from __future__ import annotations

import numpy as np

from moepack.layout.spec import QUANTIZED_BITS

ELEMENTS_PER_UNIT = 8  # 8 elements of b bits fill b whole bytes: the smallest unit that works for 3 bits too


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bf16 (nearest, ties to even), as uint16 bit patterns of the same shape. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def bf16_to_float32(patterns: np.ndarray) -> np.ndarray:
    """Widen bf16 bit patterns (uint16) to float32 of the same shape; exact."""
    return (np.ascontiguousarray(patterns, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_integers(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers [N, K] (each below 2**bits) into words: uint32 [N, K*bits/32], low bits first.

    Raises ValueError if bits is not 2, 3, 4 or 8 or the row does not fill whole words.
    """
    rows, columns = integers.shape
    _check_row(columns, bits)
    units = integers.reshape(rows, columns // ELEMENTS_PER_UNIT, ELEMENTS_PER_UNIT).astype(np.uint64, order="C")
    units <<= np.arange(ELEMENTS_PER_UNIT, dtype=np.uint64) * np.uint64(bits)
    stream = np.bitwise_or.reduce(units, axis=-1).astype("<u8")  # [N, K/8], the low `bits` bytes hold 8 elements
    unit_bytes = stream.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits]
    return np.ascontiguousarray(unit_bytes).reshape(rows, -1).view("<u4")


def unpack_integers(w_q: np.ndarray, bits: int) -> np.ndarray:
    """Unpack words uint32 [N, K*bits/32] into integers uint8 [N, K]; the inverse of pack_integers."""
    rows, words = w_q.shape
    columns = words * 32 // max(1, bits)
    _check_row(columns, bits)
    unit_bytes = np.ascontiguousarray(w_q, dtype="<u4").view(np.uint8).reshape(rows, -1, bits)
    padded = np.zeros((rows, columns // ELEMENTS_PER_UNIT, 8), dtype=np.uint8)
    padded[:, :, :bits] = unit_bytes
    shifts = np.arange(ELEMENTS_PER_UNIT, dtype=np.uint64) * np.uint64(bits)
    units = padded.view("<u8") >> shifts  # [N, K/8, 1] >> [8] -> [N, K/8, 8]
    return (units & np.uint64(2**bits - 1)).astype(np.uint8).reshape(rows, columns)


def dequantize(w_q: np.ndarray, scales: np.ndarray, biases: np.ndarray, *, bits: int, group_size: int) -> np.ndarray:
    """Unpack one matrix to float32. This is the definition of a row; every kernel is tested against it.

    w_q      uint32 [N, K*bits/32]     integers packed low bits first
    scales   uint16 [N, K/group_size]  bf16 bit patterns
    biases   uint16 [N, K/group_size]  bf16 bit patterns
    returns  float32 [N, K]: w[n, k] = q[n, k]*scales[n, g] + biases[n, g], with g = k // group_size

    Raises ValueError if bits is not 2, 3, 4 or 8 or the shapes disagree. Source: FORMAT.md, "Quantized matrix".
    """
    integers = unpack_integers(w_q, bits)
    rows, columns = integers.shape
    if columns % group_size or scales.shape != (rows, columns // group_size) or biases.shape != scales.shape:
        raise ValueError(
            f"w_q {w_q.shape} at {bits} bits needs scales and biases ({rows}, {columns}/{group_size}), "
            f"got {scales.shape} and {biases.shape}"
        )
    grouped = integers.reshape(rows, columns // group_size, group_size).astype(np.float32)  # [N, G, group_size]
    weights = grouped * bf16_to_float32(scales)[:, :, None] + bf16_to_float32(biases)[:, :, None]
    return weights.reshape(rows, columns)


def _check_row(columns: int, bits: int) -> None:
    if bits not in QUANTIZED_BITS:
        raise ValueError(f"bits must be one of {QUANTIZED_BITS}, got {bits}")
    if columns % 32:
        raise ValueError(f"a row of {columns} elements does not fill whole 32-bit words at every width")

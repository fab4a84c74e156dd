"""Tensors and matrices as the native core sees them: addresses, and structures that hold them.

linear(place(matrix), floats(x).data_ptr())
"""

from __future__ import annotations

import ctypes

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_library import ADDRESS, INT

STORAGES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
QUANTIZED = 0


class _Matrix(ctypes.Structure):
    """struct Matrix of native/matrix_kernels.h."""

    _fields_ = [
        ("data", ADDRESS),
        ("scales", ADDRESS),
        ("biases", ADDRESS),
        ("rows", INT),
        ("columns", INT),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("storage", ctypes.c_int32),
    ]


class _Expert(ctypes.Structure):
    """struct Expert of native/matrix_kernels.h."""

    _fields_ = [("gate", ADDRESS), ("up", ADDRESS), ("down", ADDRESS)]


def floats(x: torch.Tensor) -> torch.Tensor:
    """x as the library reads it: float32, contiguous, on the CPU. A copy only where it is not."""
    if x.dtype != torch.float32:
        raise TypeError(f"expected float32, got {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def place(weights: Matrix | Expert) -> int:
    """Address of the native description of a matrix or an expert, made once and kept with it."""
    place = weights.__dict__.get("_native")
    if place is None:
        native = _describe_matrix(weights) if isinstance(weights, Matrix) else _describe_expert(weights)
        # Frozen dataclasses: what they are does not change, this only remembers it.
        object.__setattr__(weights, "_native_struct", native)
        object.__setattr__(weights, "_native", place := ctypes.addressof(native))
    return place


def _describe_matrix(matrix: Matrix) -> _Matrix:
    data, scales, biases = matrix.data, matrix.scales, matrix.biases
    if not all(part is None or part.is_contiguous() for part in (data, scales, biases)):
        raise ValueError("a matrix must be contiguous")
    if scales is None or biases is None:
        storage = STORAGES[data.dtype]
        return _Matrix(data.data_ptr(), None, None, matrix.out_features, matrix.in_features, matrix.bits, 0, storage)
    group_size = matrix.in_features // scales.shape[1]
    return _Matrix(
        data.data_ptr(),
        scales.data_ptr(),
        biases.data_ptr(),
        matrix.out_features,
        matrix.in_features,
        matrix.bits,
        group_size,
        QUANTIZED,
    )


def _describe_expert(expert: Expert) -> _Expert:
    return _Expert(place(expert.gate_proj), place(expert.up_proj), place(expert.down_proj))

"""The native core as Python sees it: a shared library of plain C functions, called with the GIL released.

Functions take addresses and sizes; a signature is declared where the function is used. The library is built by the
package's own build and lies beside this file.

    lib = library()
    rms_norm = declare("rms_norm", FLOATS, FLOATS, FLOATS, INT, INT, FLOAT)
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.errors import UsageError

LIBRARY = Path(__file__).with_name("native_core.so")
ADDRESS, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
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


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once. Raises UsageError if it was never built."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise UsageError(f"{LIBRARY}: {error}; install moepack again, with a C++ compiler at hand") from None


def declare(name: str, *parameters: Any, returns: Any = None) -> Callable[..., Any]:
    """A function of the library by its name without the prefix, with its signature."""
    function = getattr(library(), f"moepack_{name}")
    function.argtypes, function.restype = parameters, returns
    return function


def floats(x: torch.Tensor) -> torch.Tensor:
    """x as the library reads it: float32, contiguous, on the CPU. A copy only where it is not."""
    if x.dtype != torch.float32:
        raise TypeError(f"expected float32, got {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def set_threads(threads: int) -> None:
    """Threads of the native operations; they are kept between calls."""
    declare("set_threads", ctypes.c_int)(threads)


def count_threads() -> int:
    """How many threads the native operations have."""
    return declare("threads", returns=ctypes.c_int)()


def isa() -> str:
    """The instruction set in use: amx, avx512, avx2, neon or portable."""
    return declare("isa", returns=ctypes.c_char_p)().decode()


def set_isa(name: str) -> bool:
    """Use another instruction set; whether this processor has it. For tests and benchmarks."""
    return bool(declare("set_isa", ctypes.c_char_p, returns=ctypes.c_int)(name.encode()))


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

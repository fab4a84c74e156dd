"""The CPU backend: the operations of reference.py in C++, on the bytes of the pack as they lie.

Activations meet quantized weights as int8 (about 0.6 % of relative error, less than a tenth of what 4-bit weights
have); with exact=True everything is float32. Matrices of plain floats are always multiplied in float32. A result does
not depend on the number of threads, and with several tokens a token's result does not depend on the others.

    ops = NativeOps(exact=False)
    y = ops.linear(x, matrix)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_floats import FloatOps
from moepack.kernels.native_library import ADDRESS, INT, declare, floats

STORAGES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
QUANTIZED = 0
FLOAT_BYTES = 4


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


class NativeOps(FloatOps):
    """One backend, with its arithmetic chosen. Threads: native_library.set_threads."""

    def __init__(self, exact: bool = False):
        super().__init__()
        self.exact = exact
        self._linear = declare("linear", ADDRESS, ADDRESS, INT, ADDRESS, INT, ctypes.c_int)
        self._run_experts = declare("run_experts", ADDRESS, ADDRESS, ADDRESS, INT, ctypes.c_int)
        self._add_expert = declare("add_expert", ADDRESS, ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS, ctypes.c_int)
        self._embed = declare("embed", ADDRESS, ADDRESS, ADDRESS, INT)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.linears(x, (matrix,))[0]

    def linears(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
        x, tokens = floats(x), x.shape[0]
        outs = [torch.empty(tokens, matrix.out_features) for matrix in matrices]
        addresses = (ADDRESS * len(outs))(*[out.data_ptr() for out in outs])
        places = (ADDRESS * len(outs))(*[_place(matrix) for matrix in matrices])
        self._linear(addresses, x.data_ptr(), tokens, places, len(outs), self.exact)
        return outs

    def embed(self, matrix: Matrix, token_ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(token_ids), matrix.in_features)
        token_ids = token_ids.contiguous()
        self._embed(out.data_ptr(), _place(matrix), token_ids.data_ptr(), len(token_ids))
        return out

    def run_experts(self, x: torch.Tensor, experts: Sequence[Expert], out: torch.Tensor, rows: Sequence[int]) -> None:
        x, count = floats(x), len(experts)
        base, row_bytes = out.data_ptr(), out.stride(0) * FLOAT_BYTES
        outs = (ADDRESS * count)(*[base + row * row_bytes for row in rows])
        places = (ADDRESS * count)(*[_place(expert) for expert in experts])
        self._run_experts(outs, x.data_ptr(), places, count, self.exact)

    def add_expert(
        self, out: torch.Tensor, x: torch.Tensor, expert: Expert, tokens: torch.Tensor, weights: torch.Tensor
    ) -> None:
        x, weights, tokens = floats(x), floats(weights), tokens.contiguous()
        self._add_expert(
            out.data_ptr(),
            x.data_ptr(),
            tokens.data_ptr(),
            weights.data_ptr(),
            len(tokens),
            _place(expert),
            self.exact,
        )

    def route(self, x: torch.Tensor, router: Matrix, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.choose_experts(self.linear(x, router), num_chosen)


def read_stream(memory: torch.Tensor) -> None:
    """Read a tensor once with all threads: what memory delivers is the limit of the other operations."""
    declare("read_stream", ADDRESS, INT, returns=INT)(memory.data_ptr(), memory.numel() * memory.element_size())


def _place(weights: Matrix | Expert) -> int:
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
    return _Expert(_place(expert.gate_proj), _place(expert.up_proj), _place(expert.down_proj))

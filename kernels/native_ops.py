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

from moepack.kernels import reference
from moepack.kernels.expert_step import ExpertStep, HostExpertStep, StepSettings
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_floats import FloatOps
from moepack.kernels.native_library import ADDRESS, INT, declare
from moepack.kernels.native_matrix import floats, place
from moepack.kernels.native_token import TokenOps
from moepack.kernels.slots import HostSlots, view_host_pages
from moepack.layout.pages import Pages

FLOAT_BYTES = 4


class NativeOps(FloatOps, TokenOps):
    """One backend, with its arithmetic chosen. Threads: native_library.set_threads."""

    new_slots, new_pages = HostSlots, Pages
    view_pages, zeros, upload = staticmethod(view_host_pages), staticmethod(torch.zeros), staticmethod(reference.upload)
    begin_read, batch = staticmethod(reference.begin_read), reference.batch
    argmax = staticmethod(reference.argmax)

    def __init__(self, exact: bool = False):
        FloatOps.__init__(self)
        TokenOps.__init__(self)
        self.exact = exact
        self.cache_dtype = torch.float32 if exact else torch.bfloat16  # of keys and values
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
        places = (ADDRESS * len(outs))(*[place(matrix) for matrix in matrices])
        self._linear(addresses, x.data_ptr(), tokens, places, len(outs), self.exact)
        return outs

    def embed(self, matrix: Matrix, token_ids: torch.Tensor, lane: int = 0) -> torch.Tensor:
        out = torch.empty(len(token_ids), matrix.in_features)
        token_ids = token_ids.to(torch.int64).contiguous()
        self._embed(out.data_ptr(), place(matrix), token_ids.data_ptr(), len(token_ids))
        return out

    def run_experts(self, x: torch.Tensor, experts: Sequence[Expert], out: torch.Tensor, rows: Sequence[int]) -> None:
        x, count = floats(x), len(experts)
        base, row_bytes = out.data_ptr(), out.stride(0) * FLOAT_BYTES
        outs = (ADDRESS * count)(*[base + row * row_bytes for row in rows])
        places = (ADDRESS * count)(*[place(expert) for expert in experts])
        self._run_experts(outs, x.data_ptr(), places, count, self.exact)

    def add_expert(
        self, out: torch.Tensor, x: torch.Tensor, expert: Expert, tokens: torch.Tensor, weights: torch.Tensor
    ) -> None:
        x, weights, tokens = floats(x), floats(weights), tokens.to(torch.int64).contiguous()
        self._add_expert(
            out.data_ptr(),
            x.data_ptr(),
            tokens.data_ptr(),
            weights.data_ptr(),
            len(tokens),
            place(expert),
            self.exact,
        )

    def add_experts(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        experts: Sequence[Expert],
        counts: Sequence[int],
        tokens: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        for expert, at, weight in zip(experts, tokens.split(list(counts)), weights.split(list(counts))):
            self.add_expert(out, x, expert, at, weight)

    def expert_step(
        self, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, settings: StepSettings
    ) -> ExpertStep:
        choose = reference.chooser(self, norm, router, shared_gate, settings.num_chosen, settings.eps)
        return HostExpertStep(choose, self.route, self.run_experts, self.add_rows)

    def route(self, x: torch.Tensor, router: Matrix, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.choose_experts(self.linear(x, router), num_chosen)


def read_stream(memory: torch.Tensor) -> int:
    """Read a tensor once with all threads: what memory delivers is the limit of the other operations.

    Returns the sum of its 32-bit words (small ones: lanes wrap) but for less than 256 bytes at the end.
    """
    return declare("read_stream", ADDRESS, INT, returns=INT)(memory.data_ptr(), memory.numel() * memory.element_size())

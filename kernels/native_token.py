"""One token through what a layer does between two reads of the SSD, each in one native call.

The same operations in the same order as the model file's, so the same bits. Streaming weights leaves nothing of the
interpreter in the processor's caches, and each operation called from Python then costs 10 us beside its work; a
layer has twenty of them. Each function here takes the weights once and returns what runs a token.

    mix = ops.fuse_delta_net(norm, in_projs, conv, a_log, dt_bias, gate_norm, out_proj, 16, 32, 1e-6)
    mix(x, conv_state, recurrent_state)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moepack.kernels.matrix import Matrix
from moepack.kernels.native_floats import angles
from moepack.kernels.native_library import ADDRESS, FLOAT, INT, declare
from moepack.kernels.native_matrix import place

Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class _DeltaNet(ctypes.Structure):
    """struct DeltaNetWeights of native/token_ops.cpp."""

    _fields_ = [
        ("norm", ADDRESS),
        ("in_projs", ADDRESS * 4),
        ("conv", ADDRESS),
        ("a_log", ADDRESS),
        ("dt_bias", ADDRESS),
        ("gate_norm", ADDRESS),
        ("out_proj", ADDRESS),
        *((name, INT) for name in ("key_heads", "value_heads", "key_width", "value_width", "taps")),
        ("eps", FLOAT),
    ]


class _Attention(ctypes.Structure):
    """struct AttentionWeights of native/token_ops.cpp."""

    _fields_ = [
        ("norm", ADDRESS),
        ("in_projs", ADDRESS * 3),
        ("q_norm", ADDRESS),
        ("k_norm", ADDRESS),
        ("out_proj", ADDRESS),
        *((name, INT) for name in ("heads", "kv_heads", "width", "half")),
        ("eps", FLOAT),
    ]


class _Router(ctypes.Structure):
    """struct RouterWeights of native/token_ops.cpp."""

    _fields_ = [("norm", ADDRESS), ("matrices", ADDRESS * 2), ("experts", INT), ("chosen", INT), ("eps", FLOAT)]


class TokenOps:
    """Whole parts of a layer for one token. `exact` comes with the class that this one is part of."""

    exact: bool
    fuses_tokens = True

    def __init__(self) -> None:
        self._delta_net = declare("delta_net_token", *[ADDRESS] * 4, ctypes.c_int)
        self._attention_token = declare("attention_token", *[ADDRESS] * 4, INT, INT, ADDRESS, ctypes.c_int)
        self._route_token = declare("route_token", *[ADDRESS] * 5, ctypes.c_int)
        self._add_rows = declare("add_rows", ADDRESS, ADDRESS, ADDRESS, INT, INT)

    def fuse_delta_net(
        self,
        norm: torch.Tensor,
        in_projs: Sequence[Matrix],
        conv: torch.Tensor,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        gate_norm: torch.Tensor,
        out_proj: Matrix,
        key_heads: int,
        value_heads: int,
        eps: float,
    ) -> Mix:
        """run(x, conv_state, recurrent_state): x [1, D] += DeltaNet(norm(x)), and the states move on."""
        vectors = (norm, conv, a_log, dt_bias, gate_norm)
        value_width = len(gate_norm)
        key_width = (len(conv) - value_heads * value_width) // (2 * key_heads)
        native = _DeltaNet(
            norm.data_ptr(),
            (ADDRESS * 4)(*map(place, in_projs)),
            *(vector.data_ptr() for vector in vectors[1:]),
            place(out_proj),
            *(key_heads, value_heads, key_width, value_width, conv.shape[1]),
            eps,
        )
        address, exact, call = ctypes.addressof(native), self.exact, self._delta_net
        owners = (native, vectors, in_projs, out_proj)

        def run(x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor, _: Any = owners) -> None:
            call(x.data_ptr(), address, conv_state.data_ptr(), recurrent_state.data_ptr(), exact)

        return run

    def fuse_attention(
        self,
        norm: torch.Tensor,
        in_projs: Sequence[Matrix],
        q_norm: torch.Tensor,
        k_norm: torch.Tensor,
        out_proj: Matrix,
        heads: int,
        kv_heads: int,
        rotary_dim: int,
        theta: float,
        eps: float,
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]:
        """run(x, keys, values, position): x [1, D] += attention(norm(x)); the caches get the token at `position`.

        keys, values   [Hkv, max_positions, Dh]
        """
        width = len(q_norm)
        native = _Attention(
            norm.data_ptr(),
            (ADDRESS * 3)(*map(place, in_projs)),
            q_norm.data_ptr(),
            k_norm.data_ptr(),
            place(out_proj),
            *(heads, kv_heads, width, rotary_dim // 2),
            eps,
        )
        address, exact, call = ctypes.addressof(native), self.exact, self._attention_token
        owners = (native, norm, in_projs, q_norm, k_norm, out_proj)

        def run(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, _: Any = owners) -> None:
            turn = angles(position, 1, theta, rotary_dim)
            caches = (keys.data_ptr(), values.data_ptr(), keys.stride(0))
            call(x.data_ptr(), address, *caches, position, turn.data_ptr(), exact)

        return run

    def fuse_router(
        self, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, num_chosen: int, eps: float
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, list[int], list[float]]]:
        """run(x): norm(x) [1, D], the ids of the chosen experts, and their weights with the shared expert's behind."""
        native = _Router(
            norm.data_ptr(), (ADDRESS * 2)(place(router), place(shared_gate)), router.out_features, num_chosen, eps
        )
        address, exact, call = ctypes.addressof(native), self.exact, self._route_token
        ids, weights = (INT * num_chosen)(), (FLOAT * (num_chosen + 1))()
        owners = (native, norm, router, shared_gate)

        def run(x: torch.Tensor, _: Any = owners) -> tuple[torch.Tensor, list[int], list[float]]:
            normed = torch.empty_like(x)
            call(ctypes.addressof(ids), ctypes.addressof(weights), normed.data_ptr(), x.data_ptr(), address, exact)
            return normed, list(ids), list(weights)

        return run

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: Sequence[float]) -> None:
        count, width = rows.shape
        self._add_rows(x.data_ptr(), rows.data_ptr(), (FLOAT * count)(*weights), count, width)

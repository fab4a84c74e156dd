"""Native operations on activations and states: same names and arguments as reference.py, float32 throughout.

Views are read where they lie as long as their rows are evenly spaced; states are updated in place, so they must be
contiguous. Shapes are the caller's to get right: the library sees addresses only.

    ops = FloatOps()
    y = ops.rms_norm(x, weight, eps)
"""

from __future__ import annotations

import ctypes
import functools

import torch

from moepack.kernels.native_library import ADDRESS, FLOAT, INT, declare
from moepack.kernels.native_matrix import floats

MAX_CONV_TAPS = 8  # CONV_TAPS of native/rows.inl
CACHE_DTYPES = (torch.float32, torch.bfloat16)  # of keys and values; arithmetic is float32 with either


class FloatOps:
    """The operations that have no weight matrix.

    A token's result does not depend on the number of threads, nor on the other tokens of the call but for gated_delta,
    whose chunks of 64 count from the call's first token.
    """

    def __init__(self) -> None:
        row = (ADDRESS, INT)  # address and stride
        self._rms_norm = declare("rms_norm", ADDRESS, *row, ADDRESS, INT, INT, FLOAT)
        self._gated_rms_norm = declare("gated_rms_norm", ADDRESS, *row, *row, ADDRESS, INT, INT, FLOAT)
        self._gated = declare("gated", ADDRESS, *row, *row, INT, INT)
        self._silu_mul = declare("silu_mul", ADDRESS, *row, *row, INT, INT)
        self._decay_and_strength = declare("decay_and_strength", *[ADDRESS] * 6, INT, INT)
        self._causal_conv = declare("causal_conv", ADDRESS, *row, ADDRESS, ADDRESS, INT, INT, INT)
        self._rope = declare("rope", ADDRESS, ADDRESS, ADDRESS, INT, INT, INT, INT)
        self._choose_experts = declare("choose_experts", ADDRESS, ADDRESS, *row, INT, INT, INT)
        self._gated_delta = declare("gated_delta", ADDRESS, *row, *row, *row, *[ADDRESS] * 3, *[INT] * 5)
        self._attention = declare("attention", ADDRESS, ADDRESS, *row, *row, ctypes.c_int, *[INT] * 5)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, stride = _rows(x)
        out, width = torch.empty_like(x), x.shape[-1]
        self._rms_norm(out.data_ptr(), x.data_ptr(), stride, weight.data_ptr(), x.numel() // width, width, eps)
        return out

    def gated_rms_norm(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        (x, x_stride), (gate, gate_stride) = _rows(x), _rows(gate)
        out, width = torch.empty_like(x), x.shape[-1]
        rows, norm = x.numel() // width, weight.data_ptr()
        self._gated_rms_norm(
            out.data_ptr(), x.data_ptr(), x_stride, gate.data_ptr(), gate_stride, norm, rows, width, eps
        )
        return out

    def gated(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        (x, x_stride), (gate, gate_stride) = _rows(x), _rows(gate)
        out, width = torch.empty_like(x), x.shape[-1]
        self._gated(out.data_ptr(), x.data_ptr(), x_stride, gate.data_ptr(), gate_stride, x.numel() // width, width)
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
        out, width = torch.empty_like(up), up.shape[-1]
        rows = up.numel() // width
        self._silu_mul(out.data_ptr(), gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, rows, width)
        return out

    def decay_and_strength(
        self, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = floats(a), floats(b)
        decay, strength = torch.empty_like(a), torch.empty_like(a)
        addresses = [tensor.data_ptr() for tensor in (decay, strength, a, b, a_log, dt_bias)]
        self._decay_and_strength(*addresses, *a.shape)
        return decay, strength

    def causal_conv(self, x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        channels, taps = weight.shape
        if taps > MAX_CONV_TAPS:
            raise ValueError(f"causal_conv: expected at most {MAX_CONV_TAPS} taps, got {taps}")
        x, stride = _rows(x)
        out, tokens, weights = torch.empty_like(x), x.shape[0], weight.data_ptr()
        self._causal_conv(out.data_ptr(), x.data_ptr(), stride, weights, _in_place(state), tokens, channels, taps)
        return out

    def gated_delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        (q, q_stride), (k, k_stride), (v, v_stride) = _spaced(q), _spaced(k), _spaced(v)
        decay, beta, (heads, key_width, value_width) = floats(decay), floats(beta), state.shape
        out, (tokens, key_heads, _) = torch.empty_like(v), q.shape
        self._gated_delta(
            *(out.data_ptr(), q.data_ptr(), q_stride, k.data_ptr(), k_stride, v.data_ptr(), v_stride),
            *(decay.data_ptr(), beta.data_ptr(), _in_place(state)),
            *(tokens, key_heads, heads, key_width, value_width),
        )
        return out

    def rope(self, x: torch.Tensor, first_position: int, theta: float, rotary_dim: int) -> torch.Tensor:
        x = floats(x)
        out, (tokens, heads, width) = torch.empty_like(x), x.shape
        turns = angles(first_position, tokens, theta, rotary_dim)
        self._rope(out.data_ptr(), x.data_ptr(), turns.data_ptr(), tokens, heads, width, rotary_dim // 2)
        return out

    def attention(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        stored = keys.dtype
        if stored not in CACHE_DTYPES or values.dtype != stored:
            raise TypeError(f"expected keys and values of one of {CACHE_DTYPES}, got {stored} and {values.dtype}")
        q, (keys, key_stride), (values, value_stride) = floats(q), _spaced(keys, stored), _spaced(values, stored)
        out, (tokens, heads, width), (kv_heads, context, _) = torch.empty_like(q), q.shape, keys.shape
        self._attention(
            *(out.data_ptr(), q.data_ptr(), keys.data_ptr(), key_stride, values.data_ptr(), value_stride),
            *(stored == torch.bfloat16, tokens, heads, kv_heads, context, width),
        )
        return out

    def choose_experts(self, logits: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, stride = _rows(logits)
        tokens, experts = logits.shape
        if not 0 < num_chosen <= experts:
            raise ValueError(f"choose_experts: expected 1..{experts} of {experts} experts, got {num_chosen}")
        ids, weights = torch.empty((tokens, num_chosen), dtype=torch.int64), torch.empty((tokens, num_chosen))
        outputs = (ids.data_ptr(), weights.data_ptr())
        self._choose_experts(*outputs, logits.data_ptr(), stride, tokens, experts, num_chosen)
        return ids, weights


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x as rows of its last dimension and the distance between them: a copy only where it is uneven."""
    if x.dtype == torch.float32:
        if x.is_contiguous():
            return x, x.shape[-1]
        *outer, stride, column = x.stride()
        if column == 1 and stride >= x.shape[-1] and outer in ([], [x.shape[-2] * stride]):
            return x, stride
    return floats(x), x.shape[-1]


def _spaced(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, int]:
    """x [A, B, C] and the distance between its contiguous [B, C]: a copy only where they are not."""
    stride, *inner = x.stride()
    if inner == [x.shape[2], 1] and x.dtype == dtype:
        return x, stride
    x = x.contiguous() if dtype != torch.float32 else floats(x)
    return x, x.stride(0)


def _in_place(state: torch.Tensor) -> int:
    """The address of a state, which a copy would leave as it was."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise TypeError(f"expected a contiguous float32 state, got {state.dtype} with strides {state.stride()}")
    return state.data_ptr()


@functools.lru_cache(maxsize=1)  # a token's queries and keys, in every layer, turn by the same angles
def angles(first_position: int, tokens: int, theta: float, rotary_dim: int) -> torch.Tensor:
    """Cosines and sines [T, 2, rotary_dim/2], computed in double: in float32 position 262144 is 0.01 radians off."""
    positions = torch.arange(first_position, first_position + tokens, dtype=torch.float64)
    turns = positions[:, None, None] * _frequencies(theta, rotary_dim)  # [T, 1, half]
    return torch.cat([turns.cos(), turns.sin()], dim=1).float()


@functools.lru_cache(maxsize=1)
def _frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    half = rotary_dim // 2
    return theta ** -(torch.arange(half, dtype=torch.float64) / half)

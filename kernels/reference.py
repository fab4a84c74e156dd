"""Every operation of the model in plain torch and float32: the definition that faster backends are tested against.

Obvious rather than fast. Activations are float32 throughout; weights are widened tile by tile, so that no operation
needs more than a few MiB beside its operands. Shapes: T tokens, D hidden, N x K a matrix, H heads, S context.

    y = linear(x, matrix)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moepack.kernels.batch import BatchSizes
from moepack.kernels.expert_step import Choice, ExpertStep, HostExpertStep, StepSettings
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.slots import HostSlots, view_host_pages
from moepack.layout.pages import Pages

TILE_WEIGHTS = 2**20  # weights widened at a time: 4 MiB of float32, small enough to stay in cache
DELTA_CHUNK = 64  # tokens solved together in the gated delta rule; the model's own choice
SCORE_TILE = 2**22  # attention scores held at a time: 16 MiB
new_slots, new_pages, view_pages = HostSlots, Pages, view_host_pages  # memory for experts and for other weights
zeros = torch.zeros  # memory for activations and states
settles = False  # whether it runs faster once every expert is in memory
cache_dtype = torch.float32  # of keys and values
has_lanes = True  # whether several tokens can be under way, each in a run of the layers (and steps) of its own
batch = BatchSizes(experts=512, mixer=512)
fuses_tokens = False  # a backend that does has fuse_layers and its like: native_token.py
ELEMENTS_PER_UNIT = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}  # bits -> (bytes of a unit, elements in it)


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor where the operations read it: it is there already."""
    return tensor


def begin_read(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function for a tensor's values on the processor; what is asked for in between need not be waited for."""
    return lambda: tensor


def dequantize(matrix: Matrix, first: int, count: int) -> torch.Tensor:
    """Rows first .. first+count-1 of a matrix as float32 [count, K]. See layout/quantized.py for the meaning."""
    data = matrix.data[first : first + count]
    if matrix.scales is None or matrix.biases is None:
        return data.float()
    scales, biases = matrix.scales[first : first + count].float(), matrix.biases[first : first + count].float()
    grouped = unpack(data, matrix.bits).view(*scales.shape, -1).float()  # [count, G, group_size]
    return grouped.mul_(scales.unsqueeze(-1)).add_(biases.unsqueeze(-1)).view(count, -1)


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed bytes uint8 [N, K*bits/8] -> integers [N, K]."""
    unit_bytes, elements = ELEMENTS_PER_UNIT[bits]
    if elements == 1:
        return data
    if unit_bytes == 1:
        units = data.unsqueeze(-1)
    else:  # three bytes hold eight 3-bit integers
        parts = data.view(data.shape[0], -1, 3).int()
        units = (parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16).unsqueeze(-1)
    shifts = torch.arange(elements, dtype=units.dtype, device=units.device) * bits
    return ((units >> shifts) & (2**bits - 1)).flatten(1)


def linear(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """x [T, K] times a matrix [N, K] transposed: [T, N]."""
    step = max(1, TILE_WEIGHTS // matrix.in_features)
    if step >= matrix.out_features:
        return x @ dequantize(matrix, 0, matrix.out_features).T
    result = x.new_empty(x.shape[0], matrix.out_features)
    for first in range(0, matrix.out_features, step):
        count = min(step, matrix.out_features - first)
        result[:, first : first + count] = x @ dequantize(matrix, first, count).T
    return result


def linears(x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
    """x [T, K] times several matrices of the same K: what shares an input is multiplied together."""
    return [linear(x, matrix) for matrix in matrices]


def embed(matrix: Matrix, token_ids: torch.Tensor, lane: int = 0) -> torch.Tensor:
    """Rows of the embedding [V, D] for token ids [T]: float32 [T, D].

    lane   of one token: which of those under way together it is; a backend may keep a place for each
    """
    return dequantize(matrix.take_rows(token_ids), 0, len(token_ids))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight) over the last dimension: the weight is centred on zero."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight * silu(gate) over the last dimension: here the weight is plain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * F.silu(gate)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate)."""
    return x * gate.sigmoid()


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def causal_conv(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Depthwise causal convolution and SiLU: [T, C] -> [T, C].

    weight   [C, W]; the last tap multiplies the current token
    state    [W-1, C], the inputs before x; replaced by the last W-1 inputs
    """
    width, tokens = weight.shape[1], x.shape[0]
    padded = torch.cat([state, x])  # [W-1+T, C]
    state.copy_(padded[-(width - 1) :])
    result = padded[:tokens] * weight[:, 0]
    for tap in range(1, width):
        result = torch.addcmul(result, padded[tap : tap + tokens], weight[:, tap])
    return F.silu(result)


def gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """The gated delta rule: one token by the recurrence, several by chunks. Returns [T, H, Dv], updates `state`.

    q, k    [T, Hk, Dk], not yet normalized; value head h reads key head h // (H/Hk)
    v       [T, H, Dv]
    decay   [T, H], logarithm of the forgetting factor, <= 0
    beta    [T, H], strength of the update, 0..1
    state   [H, Dk, Dv]

    S = exp(decay) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q
    """
    shared = v.shape[1] // q.shape[1]
    q = (_l2_norm(q) * q.shape[-1] ** -0.5).repeat_interleave(shared, dim=1)
    k = _l2_norm(k).repeat_interleave(shared, dim=1)
    if q.shape[0] == 1:
        return gated_delta_step(q[0], k[0], v[0], decay[0], beta[0], state).unsqueeze(0)
    results, current = [], state.clone()  # not changed in place, so that gradients pass through it
    for first in range(0, q.shape[0], DELTA_CHUNK):
        c = slice(first, first + DELTA_CHUNK)
        result, current = gated_delta_chunk(q[c], k[c], v[c], decay[c], beta[c], current)
        results.append(result)
    state.copy_(current.detach())
    return torch.cat(results)


def gated_delta_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token of the recurrence, all heads: shapes as in gated_delta without T, q and k normalized."""
    state.mul_(decay.exp()[:, None, None])  # decay first
    recalled = torch.einsum("hkv,hk->hv", state, k)
    state.add_(k[:, :, None] * (beta[:, None] * (v - recalled))[:, None, :])
    return torch.einsum("hkv,hk->hv", state, q)  # read after the update


def gated_delta_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of C tokens at once, and the state after it: equal to C steps. Shapes as in gated_delta, q, k normalized.

    The updates of a chunk depend on each other through a unit lower triangular system, solved directly.
    """
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))  # [H, C, .]
    beta = beta.T.unsqueeze(-1)  # [H, C, 1]
    total = decay.T.cumsum(-1)  # [H, C], log of the decay from the chunk's start
    length = q.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool).tril()
    between = (total[:, :, None] - total[:, None, :]).masked_fill(~lower, -torch.inf).exp()  # [H, C, C], <= 1
    from_start = total.exp().unsqueeze(-1)  # [H, C, 1]
    system = ((beta * k) @ k.transpose(1, 2) * between).tril(-1)  # the solver takes the diagonal as ones
    right = torch.cat([beta * v, beta * k * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    updates = solved[..., : v.shape[-1]] - solved[..., v.shape[-1] :] @ state  # [H, C, Dv]
    result = (q * from_start) @ state + (q @ k.transpose(1, 2) * between) @ updates
    to_end = (total[:, -1:] - total).exp().unsqueeze(-1)  # [H, C, 1]
    after = state * total[:, -1].exp()[:, None, None] + (k * to_end).transpose(1, 2) @ updates
    return result.transpose(0, 1), after


def rope(x: torch.Tensor, first_position: int, theta: float, rotary_dim: int) -> torch.Tensor:
    """Turn the first rotary_dim dimensions of each head [T, H, Dh] by its position; the rest passes through.

    Pairs are (i, i + rotary_dim/2). For text all three streams of the family's interleaved rope are the same position.
    """
    half = rotary_dim // 2
    frequencies = theta ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
    positions = torch.arange(first_position, first_position + x.shape[0], dtype=torch.float32, device=x.device)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, half]
    first, second = x[..., :half], x[..., half:rotary_dim]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]], dim=-1)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last T positions of a context: [T, H, Dh] -> [T, H, Dh].

    q              [T, H, Dh]
    keys, values   [Hkv, S, Dh]; query t sees the first S - T + t + 1 of them; head h reads kv head h // (H/Hkv)
    """
    tokens, heads, width = q.shape
    kv_heads, context, _ = keys.shape
    keys, values = keys.to(q.dtype), values.to(q.dtype)  # stored as bf16 where a backend says so
    result = torch.empty_like(q)
    step = max(1, SCORE_TILE // (heads * context))
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        tile = q[first : first + count].view(count, kv_heads, -1, width).permute(1, 2, 0, 3)  # [Hkv, R, C, Dh]
        scores = tile.flatten(1, 2) @ keys.transpose(1, 2) * width**-0.5  # [Hkv, R*C, S]
        last_seen = torch.arange(context - tokens + first, context - tokens + first + count)
        hidden = torch.arange(context) > last_seen[:, None]  # [C, S]
        scores = scores.view(kv_heads, -1, count, context).masked_fill(hidden, -torch.inf)
        mixed = scores.softmax(-1).flatten(1, 2) @ values  # [Hkv, R*C, Dh]
        result[first : first + count] = (
            mixed.view(kv_heads, -1, count, width).permute(2, 0, 1, 3).reshape(count, heads, width)
        )
    return result


def route(x: torch.Tensor, router: Matrix, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts: (expert_ids [T, K], expert_weights [T, K]); the weights of a token sum to one."""
    return choose_experts(linear(x, router), num_chosen)


def choose_experts(logits: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable of E experts per token, best first, a tie to the lower id: (ids [T, K], weights [T, K]).

    Probabilities are the softmax of logits [T, E]; the weights are those of the chosen, scaled to sum to one.
    """
    expert_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    weights = logits.softmax(-1).gather(-1, expert_ids)
    return expert_ids, weights / weights.sum(-1, keepdim=True)


def run_expert(x: torch.Tensor, expert: Expert) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): [T, D] -> [T, D]."""
    return linear(silu_mul(linear(x, expert.gate_proj), linear(x, expert.up_proj)), expert.down_proj)


def run_experts(x: torch.Tensor, experts: Sequence[Expert], out: torch.Tensor, rows: Sequence[int]) -> None:
    """out[rows[i]] = experts[i](x): several experts of one token, each by itself.

    x     [1, D]
    out   [R, D]
    """
    for row, expert in zip(rows, experts):
        out[row] = run_expert(x, expert)[0]


def add_expert(out: torch.Tensor, x: torch.Tensor, expert: Expert, tokens: torch.Tensor, weights: torch.Tensor) -> None:
    """out[tokens] += weights * expert(x[tokens]): one expert for those of T tokens that chose it.

    out, x   [T, D]
    tokens   int64 [n], distinct rows
    weights  [n]
    """
    out.index_add_(0, tokens, run_expert(x[tokens], expert) * weights.unsqueeze(-1))


def add_experts(
    out: torch.Tensor,
    x: torch.Tensor,
    experts: Sequence[Expert],
    counts: Sequence[int],
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """add_expert for several experts, one after the other.

    counts           how many of tokens and weights belong to each expert; they follow each other
    tokens, weights  int64 and float [sum of counts]; tokens lie on the processor
    """
    for expert, at, weight in zip(experts, tokens.split(list(counts)), weights.split(list(counts))):
        add_expert(out, x, expert, at, weight)


def argmax(logits: torch.Tensor) -> tuple[int, float]:
    """The likeliest token of logits [1, V], the lowest id of equal ones, and its logit; NaN wins."""
    token_id = int(logits[0].numpy().argmax())
    return token_id, float(logits[0, token_id])


def add_rows(x: torch.Tensor, rows: torch.Tensor, weights: Sequence[float]) -> None:
    """x [1, D] += the sum of rows [R, D], each with its weight."""
    x += torch.tensor([weights]) @ rows


def expert_step(norm: torch.Tensor, router: Matrix, shared_gate: Matrix, settings: StepSettings) -> ExpertStep:
    """What runs the experts of one token, of a layer with this norm and router."""
    choose = chooser(sys.modules[__name__], norm, router, shared_gate, settings.num_chosen, settings.eps)
    return HostExpertStep(choose, route, run_experts, add_rows)


def chooser(
    ops: Any, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, num_chosen: int, eps: float
) -> Callable[[torch.Tensor], Choice]:
    """x -> norm(x), the ids of its experts, and their weights with the shared expert's behind; by a backend's ops."""

    def choose(x: torch.Tensor) -> Choice:
        normed = ops.rms_norm(x, norm, eps)
        expert_ids, expert_weights = ops.route(normed, router, num_chosen)
        shared_weight = ops.linear(normed, shared_gate).sigmoid()
        return normed, expert_ids[0].tolist(), [*expert_weights[0].tolist(), shared_weight.item()]

    return choose


def decay_and_strength(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of the delta rule, per value head: decay -exp(A_log) softplus(a + dt_bias) and strength sigmoid(b)."""
    return -a_log.exp() * F.softplus(a + dt_bias), b.sigmoid()


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

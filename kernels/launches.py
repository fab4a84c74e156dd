"""What runs where: for each kernel of metal/, its arguments in order, its constants packed, its grid and threadgroup.

Geometry is part of a kernel: how many rows a threadgroup takes decides how many there are. It stands here once, for
the executor, for Metal and for CUDA alike; a host only turns a Launch into a call. Nothing here depends on a token's
values, only on shapes, so a Launch can be kept and repeated. Buffers are contiguous tensors; float buffers start on 16
bytes.

    launch = rms_norm(x, weight, out, eps=1e-6)
    simt.Executor().run(launch)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moepack.kernels import msl
from moepack.kernels.forms import count_groups, count_places, count_segments, forms_side_by_side
from moepack.kernels.matrix import Matrix
from moepack.kernels.msl import pack_struct

UNIT, SIMDGROUPS, LANES = 32, 4, 32  # metal/matrix.h
LINEAR_ROWS, LINEAR_SIMDGROUPS = 2, 8  # metal/linears.metal
GATE_UP_ROWS, DOWN_ROWS, MAX_PLACES, MAX_CHUNKS, MAX_ROWS, DOWN_SIMDGROUPS = 2, 4, 32, 4, 64, 12  # metal/experts.metal
DOWN_GROUPS = 256  # threadgroups of experts_down that fill a large GPU: more rows go to each instead
MAX_TAPS, CONV_TOKENS = 8, 16  # metal/causal_conv.metal
DELTA_ROWS, DELTA_COLUMNS, DELTA_THREADS = 16, 128, 512  # metal/delta_step.metal
MAX_WIDTH = 256  # the same, rope_cache.metal, attention_step.metal
QUERIES = 4  # metal/attention.h
SPLIT_POSITIONS, MAX_SPLITS, SPLIT_SIMDGROUPS, COMBINE_SIMDGROUPS = 32, 256, 8, 4  # metal/attention_step.metal
MAX_EXPERTS, MAX_CHOSEN = 1024, 31  # metal/choose_experts.metal
ARGMAX_PART, ARGMAX_THREADS = 4096, 256  # metal/argmax.metal
TILE, TILE_THREADS = 32, 128  # metal/tile.h
SCAN_COLUMNS, SCAN_SIMDGROUPS = 4, 8  # metal/delta_scan.metal
TILES_SIMDGROUPS = 8  # metal/attention_tiles.metal


@dataclass(frozen=True)
class Launch:
    """One dispatch.

    arguments   buffers in the order of the kernel's signature; bytes are a packed `constant` struct
    grid        threadgroups, not threads
    group       threads of a threadgroup
    """

    file: str
    kernel: str
    arguments: tuple[torch.Tensor | bytes, ...]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]


def lanes_of_row(columns: int) -> int:
    """How many lanes share a row of this many columns: the largest power of two that leaves none without a unit."""
    lanes = LANES
    while lanes > 1 and lanes * UNIT > columns:
        lanes //= 2
    return lanes


def rows_of_group(lanes: int, team_rows: int, simdgroups: int) -> int:
    """Rows that a threadgroup multiplies."""
    return simdgroups * LANES // lanes * team_rows


def spread_width(columns: int) -> int:
    """Floats of a vector that lies spread over whole units, as metal/matrix.h has it."""
    return -(-columns // UNIT) * UNIT


def hidden_width(width: int) -> int:
    """Floats that experts_gate_up leaves of each expert for experts_down; width: of the widest expert."""
    return spread_width(width)


def matrix_forms(matrices: Sequence[Matrix], base: torch.Tensor) -> bytes:
    """The MatrixForms of matrices that share an input, for linears: results and threadgroups follow each other."""
    rows = rows_of_group(lanes_of_row(matrices[0].in_features), LINEAR_ROWS, LINEAR_SIMDGROUPS)
    return forms_side_by_side(matrices, base, count_groups(matrices, rows))


def tile_forms(matrices: Sequence[Matrix], base: torch.Tensor) -> bytes:
    """The same for matmul, whose threadgroups have other sizes."""
    return forms_side_by_side(matrices, base, count_groups(matrices, TILE))


def linears(
    weights: torch.Tensor,
    forms: torch.Tensor,
    matrices: Sequence[Matrix],
    x: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    accumulate: bool = False,
    eps: float = 0.0,
) -> Launch:
    """out [T, R] (+)= [x or rms_norm(x, norm)] times matrices of together R rows, side by side.

    weights   the memory of the matrices, from its base
    forms     matrix_forms(matrices, weights) in a tensor
    x         [T, at least K]; its rows may be longer than K
    normed    [T, spread_width(K)], gets rms_norm(x, norm), spread, if given
    """
    lanes = lanes_of_row(matrices[0].in_features)
    groups = sum(count_groups(matrices, rows_of_group(lanes, LINEAR_ROWS, LINEAR_SIMDGROUPS)))
    sizes = {"columns": matrices[0].in_features, "shift": lanes.bit_length() - 1}
    rest = (weights, forms, matrices, x, out, norm, normed, accumulate, eps)
    return linears_by("linears", sizes, groups, LINEAR_SIMDGROUPS, *rest)


def linears_by(
    file: str,
    sizes: dict[str, int],
    groups: int,
    simdgroups: int,
    weights: torch.Tensor,
    forms: torch.Tensor,
    matrices: Sequence[Matrix],
    x: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor | None,
    normed: torch.Tensor | None,
    accumulate: bool,
    eps: float,
) -> Launch:
    """linears by a file's kernel, of so many threadgroups of so many simdgroups. sizes: its own."""
    if any(matrix.in_features != matrices[0].in_features for matrix in matrices):
        raise ValueError("matrices of one dispatch have one number of columns")
    if normed is not None and norm is None:
        raise ValueError("without a norm there is nothing to keep")
    strides = {"x_stride": x.shape[-1], "out_stride": out.shape[-1]}
    choices = {"is_normed": norm is not None, "keeps_normed": normed is not None, "accumulates": accumulate}
    shape = pack_struct(file, "LinearsShape", count=len(matrices), **sizes, **strides, **choices, eps=eps)
    arguments = (weights, forms, x, x if norm is None else norm, out if normed is None else normed, out, shape)
    return Launch(file, "linears", arguments, (groups, x.shape[0], 1), (simdgroups * LANES, 1, 1))


def experts_gate_up(
    banks: Sequence[torch.Tensor], forms: torch.Tensor, places: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor
) -> Launch:
    """hidden [ranks, hidden_width(widest expert)] of experts in places, from x [1, spread_width(D)]; both spread."""
    check_spread(x, hidden)
    lanes = lanes_of_row(x.shape[-1])
    shape = pack_struct("experts", "GateUpShape", shift=lanes.bit_length() - 1, hidden_stride=hidden.shape[-1])
    grid = (-(-hidden.shape[-1] // rows_of_group(lanes, GATE_UP_ROWS, SIMDGROUPS)), count_places(places), 1)
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, places, x, hidden, shape)
    return Launch("experts", "experts_gate_up", arguments, grid, (SIMDGROUPS * LANES, 1, 1))


def experts_down(
    banks: Sequence[torch.Tensor],
    forms: torch.Tensor,
    places: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    x: torch.Tensor,
) -> Launch:
    """x [1, D] += the sum over places, which are in the order of their ranks, of weights[rank] * down(hidden[rank])."""
    count, rows = count_places(places), x.shape[-1]
    if count > MAX_PLACES:
        raise ValueError(f"at most {MAX_PLACES} experts of a token in one dispatch, got {count}")
    check_spread(hidden)
    lanes = max(lanes_of_row(hidden.shape[-1]), LANES * MAX_CHUNKS * DOWN_ROWS // MAX_ROWS)
    in_chunk = rows_of_group(lanes, DOWN_ROWS, 1)
    chunks = max(1, min(MAX_CHUNKS, rows // (in_chunk * DOWN_GROUPS)))
    shape = pack_struct(
        "experts",
        "DownShape",
        places=count,
        chunks=chunks,
        shift=lanes.bit_length() - 1,
        hidden_stride=hidden.shape[-1],
        rows=rows,
    )
    grid = (-(-rows // (chunks * in_chunk)), 1, 1)
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, places, hidden, weights, x, shape)
    return Launch("experts", "experts_down", arguments, grid, (min(count, DOWN_SIMDGROUPS) * LANES, 1, 1))


def check_spread(*vectors: torch.Tensor) -> None:
    """Raises ValueError for vectors that are not whole units."""
    for vector in vectors:
        if vector.shape[-1] % UNIT:
            raise ValueError(f"a spread vector has whole units of {UNIT}, got {vector.shape[-1]} numbers")


def embed(
    weights: torch.Tensor, form: torch.Tensor, matrix: Matrix, token_ids: torch.Tensor, out: torch.Tensor
) -> Launch:
    """out [T, K] = rows of a matrix for int32 token_ids [T]; form is its matrix_form in a tensor."""
    grid = (-(-matrix.in_features // 256), token_ids.shape[0], 1)
    return Launch("embed", "embed", (weights, form, token_ids, out), grid, (256, 1, 1))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> Launch:
    """out = x / rms(x) * (1 + weight) over the last dimension W of contiguous x and out."""
    width = weight.shape[0]
    shape = pack_struct("norms", "NormShape", width=width, heads=1, gate_stride=0, eps=eps)
    return Launch("norms", "rms_norm", (x, weight, out, shape), (x.numel() // width, 1, 1), _threads_for(width))


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, gate_stride: int
) -> Launch:
    """out [T, H, W] = x / rms(x) * weight * silu(gate); token t's gates [H, W] start at gate[t * gate_stride]."""
    heads, width = x.shape[-2:]
    shape = pack_struct("norms", "NormShape", width=width, heads=heads, gate_stride=gate_stride, eps=eps)
    grid = (x.numel() // width, 1, 1)
    return Launch("norms", "gated_rms_norm", (x, gate, weight, out, shape), grid, _threads_for(width))


def _threads_for(width: int) -> tuple[int, int, int]:
    return (min(msl.MAX_THREADS, -(-width // LANES) * LANES), 1, 1)


def causal_conv(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, out: torch.Tensor) -> Launch:
    """out [T, C] from the first C columns of x [T, any]; weight [C, W], state [W - 1, C] moves on."""
    channels, taps = weight.shape
    if taps > MAX_TAPS:
        raise ValueError(f"a convolution has at most {MAX_TAPS} taps, got {taps}")
    shape = pack_struct(
        "causal_conv", "ConvShape", channels=channels, taps=taps, tokens=x.shape[0], x_stride=x.shape[-1]
    )
    grid = (-(-channels // 256), -(-x.shape[0] // CONV_TOKENS), 1)
    return Launch("causal_conv", "causal_conv", (x, weight, state, out, shape), grid, (256, 1, 1))


def delta_step(
    mixed: torch.Tensor,
    projected: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    key_heads: int,
    z_offset: int,
    a_offset: int,
    b_offset: int,
    eps: float,
) -> Launch:
    """One token: out [H, Dv] from mixed [C] and the z, a, b in projected; state [H, Dk, Dv] moves on."""
    value_heads, key_width, value_width = state.shape
    threads = -(-key_width // DELTA_ROWS) * -(-value_width // DELTA_COLUMNS) * LANES
    if threads > DELTA_THREADS or key_width > MAX_WIDTH:
        raise ValueError(f"the delta rule takes heads of up to 128 x 256, got {key_width} x {value_width}")
    sizes = {"key_heads": key_heads, "value_heads": value_heads, "key_width": key_width, "value_width": value_width}
    places = {"z_offset": z_offset, "a_offset": a_offset, "b_offset": b_offset}
    shape = pack_struct("delta_step", "DeltaShape", **sizes, **places, eps=eps)
    arguments = (mixed, projected, a_log, dt_bias, norm, state, out, shape)
    return Launch("delta_step", "delta_step", arguments, (value_heads, 1, 1), (threads, 1, 1))


def rope_cache(
    projected: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    frequencies: torch.Tensor,
    position: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    eps: float,
) -> Launch:
    """q [T, H, Dh], and rows position .. of keys and values [Hkv, max_positions, Dh], from projected [T, any]."""
    (tokens, heads, width), (kv_heads, max_positions, _) = q.shape, keys.shape
    _check_head(width)
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "rotary": 2 * frequencies.shape[0]}
    places = {"max_positions": max_positions, "stride": projected.shape[-1]}
    shape = pack_struct("rope_cache", "RopeShape", **sizes, **places, eps=eps)
    arguments = (projected, q_norm, k_norm, frequencies, position, q, keys, values, shape)
    return Launch("rope_cache", "rope_cache", arguments, (heads + 2 * kv_heads, tokens, 1), (LANES, 1, 1))


def _check_head(width: int) -> None:
    if width > MAX_WIDTH:
        raise ValueError(f"attention heads have at most {MAX_WIDTH} dimensions, got {width}")


def rope_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """Turns per position of each pair of dimensions, float32 [rotary_dim / 2], as reference.rope has them."""
    half = rotary_dim // 2
    return theta ** -(torch.arange(half, dtype=torch.float32) / half)


def attention_split(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
) -> Launch:
    """Attention of one token, q [H, Dh], in parts: partial [H, splits, Dh], stats [H, splits, 2]."""
    (heads, splits, width), (kv_heads, _, _) = partial.shape, keys.shape
    _check_head(width)
    blocks = -(-heads // kv_heads // QUERIES)
    if blocks > SPLIT_SIMDGROUPS:
        raise ValueError(f"at most 32 heads share keys and values, got {heads // kv_heads}")
    arguments = (q, keys, values, position, partial, stats, _attention_shape(partial, keys))
    group = (SPLIT_SIMDGROUPS // blocks * blocks * LANES, 1, 1)
    return Launch("attention_step", "attention_split", arguments, (kv_heads, splits, 1), group)


def attention_combine(
    partial: torch.Tensor,
    stats: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    gate: torch.Tensor,
    out: torch.Tensor,
) -> Launch:
    """out [H, Dh] = the parts together, times sigmoid of the gate, which lies with the queries: [H, 2 Dh]."""
    heads, splits, width = partial.shape
    if splits > MAX_SPLITS:
        raise ValueError(f"at most {MAX_SPLITS} parts of a context, got {splits}")
    arguments = (partial, stats, position, gate, out, _attention_shape(partial, keys))
    grid = (heads, -(-width // LANES), 1)
    return Launch("attention_step", "attention_combine", arguments, grid, (COMBINE_SIMDGROUPS * LANES, 1, 1))


def count_splits(max_positions: int) -> int:
    """Parts of a context for attention_split: as many as a cache can fill, so that no answer depends on its length."""
    return min(MAX_SPLITS, -(-max_positions // SPLIT_POSITIONS))


def _attention_shape(partial: torch.Tensor, keys: torch.Tensor) -> bytes:
    (heads, splits, width), (kv_heads, max_positions, _) = partial.shape, keys.shape
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "max_positions": max_positions, "splits": splits}
    return pack_struct("attention_step", "AttentionStepShape", **sizes)


def choose_experts(
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    table: torch.Tensor,
    places: torch.Tensor,
    places_wanted: bool = True,
) -> Launch:
    """ids int32 [R, K] and weights [R, K + 1] from logits [R, E + 1], the shared expert's gate last in both.

    table    Place [E + 1]: where this layer's experts lie, the shared one last
    places   Place [K + 1], gets those of row 0's choice; if they are not wanted, both may hold anything
    """
    rows, experts = logits.shape[0], logits.shape[1] - 1
    if experts > MAX_EXPERTS:
        raise ValueError(f"a router chooses among at most {MAX_EXPERTS} experts, got {experts}")
    if ids.shape[1] > MAX_CHOSEN:
        raise ValueError(f"a router chooses at most {MAX_CHOSEN} experts, got {ids.shape[1]}")
    shape = pack_struct(
        "choose_experts", "ChooseShape", experts=experts, chosen=ids.shape[1], places_wanted=places_wanted
    )
    arguments = (logits, ids, weights, table, places, shape)
    return Launch("choose_experts", "choose_experts", arguments, (rows, 1, 1), (LANES, 1, 1))


def argmax_parts(logits: torch.Tensor, part_ids: torch.Tensor, part_orders: torch.Tensor) -> Launch:
    """The largest of each part of logits [R, V], for argmax: part_ids and part_orders int32 [R, count_parts(V)]."""
    grid = (part_ids.shape[1], len(logits), 1)
    arguments = (logits, part_ids, part_orders, _argmax_shape(logits.shape[-1]))
    return Launch("argmax", "argmax_parts", arguments, grid, (ARGMAX_THREADS, 1, 1))


def argmax(
    part_ids: torch.Tensor, part_orders: torch.Tensor, ids: torch.Tensor, largest: torch.Tensor, width: int
) -> Launch:
    """ids int32 [R] and values of the largest of each row of logits of this width, from its parts; NaN wins."""
    arguments = (part_ids, part_orders, ids, largest, _argmax_shape(width))
    return Launch("argmax", "argmax", arguments, (len(ids), 1, 1), (LANES, 1, 1))


def count_parts(width: int) -> int:
    """Parts of a row of logits that argmax_parts takes."""
    return -(-width // ARGMAX_PART)


def _argmax_shape(width: int) -> bytes:
    return pack_struct("argmax", "ArgmaxShape", width=width, parts=count_parts(width))


# A prompt


def matmul(
    weights: torch.Tensor,
    forms: torch.Tensor,
    matrices: Sequence[Matrix],
    x: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
) -> Launch:
    """out [T, R] (+)= x [T, at least K] times matrices of together R rows; forms: tile_forms(matrices, weights)."""
    tokens = x.shape[0]
    shape = pack_struct(
        "matmul",
        "MatmulShape",
        count=len(matrices),
        tokens=tokens,
        x_stride=x.shape[-1],
        out_stride=out.shape[-1],
        accumulates=accumulate,
    )
    grid = (sum(_tiles(matrix.out_features) for matrix in matrices), _tiles(tokens), 1)
    return Launch("matmul", "matmul", (weights, forms, x, out, shape), grid, (TILE_THREADS, 1, 1))


def _tiles(rows: int) -> int:
    return -(-rows // TILE)


def experts_gate_up_rows(
    banks: Sequence[torch.Tensor],
    forms: torch.Tensor,
    segments: torch.Tensor,
    tokens: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    most_pairs: int,
) -> Launch:
    """hidden [pairs, widest expert] of each segment's expert for x [T, D] of the pairs' tokens, int32 [pairs].

    most_pairs   of any segment
    """
    shape = pack_struct("experts_prefill", "ExpertRowsShape", x_stride=x.shape[-1], out_stride=hidden.shape[-1])
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, segments, tokens, x, hidden, shape)
    grid = (_tiles(hidden.shape[-1]), _tiles(most_pairs), count_segments(segments))
    return Launch("experts_prefill", "experts_gate_up_rows", arguments, grid, (TILE_THREADS, 1, 1))


def experts_down_rows(
    banks: Sequence[torch.Tensor],
    forms: torch.Tensor,
    segments: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    most_pairs: int,
) -> Launch:
    """rows [pairs, D] = each segment's expert's down times hidden [pairs, widest expert]."""
    shape = pack_struct("experts_prefill", "ExpertRowsShape", x_stride=hidden.shape[-1], out_stride=rows.shape[-1])
    arguments: tuple[torch.Tensor | bytes, ...] = (*banks, forms, segments, hidden, rows, shape)
    grid = (_tiles(rows.shape[-1]), _tiles(most_pairs), count_segments(segments))
    return Launch("experts_prefill", "experts_down_rows", arguments, grid, (TILE_THREADS, 1, 1))


def add_expert_rows(
    rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, first: int = 0
) -> Launch:
    """out [T, D] += weights[p] * rows[p - first] for each pair p of order int32 [T, K] that has a row, in this order.

    -1 in `order` is no pair.
    """
    width, (tokens, most) = out.shape[-1], order.shape
    sizes = {"width": width, "most": most, "first": first, "count": len(rows)}
    shape = pack_struct("experts_prefill", "AddRowsShape", **sizes)
    arguments = (rows, order, weights, out, shape)
    threads = min(256, -(-width // LANES) * LANES)
    return Launch("experts_prefill", "add_expert_rows", arguments, (-(-width // 256), tokens, 1), (threads, 1, 1))


def delta_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
) -> Launch:
    """The gated delta rule, as reference.gated_delta: q, k [T, Hk, Dk] and v [T, H, Dv] may be parts of longer rows."""
    (tokens, key_heads, _), (value_heads, key_width, value_width) = q.shape, state.shape
    if key_width > MAX_WIDTH:
        raise ValueError(f"the delta rule takes keys of up to {MAX_WIDTH} dimensions, got {key_width}")
    sizes = {"key_heads": key_heads, "value_heads": value_heads, "key_width": key_width, "value_width": value_width}
    strides = {"q_stride": q.stride(0), "k_stride": k.stride(0), "v_stride": v.stride(0)}
    shape = pack_struct("delta_scan", "ScanShape", **sizes, **strides, tokens=tokens)
    arguments = (_span(q), _span(k), _span(v), decay, beta, state, out, shape)
    grid = (-(-value_width // (SCAN_COLUMNS * SCAN_SIMDGROUPS)), value_heads, 1)
    return Launch("delta_scan", "delta_scan", arguments, grid, (SCAN_SIMDGROUPS * LANES, 1, 1))


def _span(rows: torch.Tensor) -> torch.Tensor:
    """All that lies between the first and the last number of rows [T, H, W], which follow each other with gaps."""
    tokens, heads, width = rows.shape
    if rows.stride()[1:] != (width, 1):
        raise ValueError(f"heads must follow each other without gaps, got strides {rows.stride()}")
    return rows.as_strided(((tokens - 1) * rows.stride(0) + heads * width,), (1,))


def attention_tiles(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> Launch:
    """Causal attention, as reference.attention: keys and values [Hkv, S, Dh] may be the front of longer caches."""
    (tokens, heads, width), (kv_heads, context, _) = q.shape, keys.shape
    _check_head(width)
    if values.stride() != keys.stride():
        raise ValueError("keys and values must lie alike")
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "tokens": tokens, "context": context}
    shape = pack_struct("attention_tiles", "AttentionTilesShape", **sizes, kv_stride=keys.stride(0))
    simdgroups = -(-tokens // QUERIES) * (heads // kv_heads)
    grid = (kv_heads, -(-simdgroups // TILES_SIMDGROUPS), 1)
    arguments = (q, _span(keys), _span(values), out, shape)
    return Launch("attention_tiles", "attention_tiles", arguments, grid, (TILES_SIMDGROUPS * LANES, 1, 1))

"""The GPU backend: the operations of reference.py on a device, float32 throughout.

What one token needs are kernels alone (gpu_token.py). So is a prompt, but for what is small beside its matrices, which
is torch on the device by the reference's own text, and where a device has kernels of its own for products of a prompt
(Device.prompt_launches) for the matrices that those do not take.

    ops = GpuOps(MetalDevice())
    y = ops.linear(x, matrix)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moepack.kernels import launches, reference
from moepack.kernels.device import Device, DeviceSlots, Step
from moepack.kernels.forms import matrix_form, pack_segments
from moepack.kernels.gpu_token import TokenOps, form_of, memory_of
from moepack.kernels.launches import Launch
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.settled_experts import SettledExperts
from moepack.layout.pages import Pages

WIDENED_WEIGHTS = 2**25  # at a time: 128 MiB of float32
UPLOAD_ALIGNMENT = 256  # of arrays that are uploaded together


def row_tiles(matrix: Matrix) -> list[tuple[int, int]]:
    """(first row, rows) of the parts in which a matrix is widened."""
    step = max(1, WIDENED_WEIGHTS // matrix.in_features)
    return [(first, min(step, matrix.out_features - first)) for first in range(0, matrix.out_features, step)]


def _order_by_token(tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    """int32 [T, most]: the places in `tokens` that hold each token, ascending, then -1."""
    is_short = num_tokens <= 2**16  # numpy sorts short integers by their digits, ten times as fast as others
    places = np.argsort(tokens.astype(np.uint16) if is_short else tokens, kind="stable")
    counts = np.bincount(tokens, minlength=num_tokens)
    rank = np.arange(len(tokens)) - (counts.cumsum() - counts).repeat(counts)
    order = np.full((num_tokens, counts.max()), -1, np.int32)
    order[tokens[places], rank] = places
    return order


class GpuOps(TokenOps):
    """One backend over one device."""

    cache_dtype = torch.float32  # of keys and values

    def __init__(self, device: Device, exact: bool = False):
        self.device, self.exact, self.batch = device, exact, device.batch
        super().__init__()
        self._streams: dict[tuple[int, int], tuple[torch.Tensor, Step]] = {}  # hidden states of the tokens under way
        self._products: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, Step, Sequence[Matrix]]] = {}
        self._tiles: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, Sequence[Matrix]]] = {}
        self._rows = torch.zeros(0, dtype=torch.int32)
        self._embeddings: dict[int, tuple[torch.Tensor, torch.Tensor, Matrix]] = {}
        self._token = device.upload(torch.zeros(1, dtype=torch.int32))
        self._likeliest: tuple[torch.Tensor, list[Step]] | None = None  # logits of one shape, in their own memory
        self._found = device.new_mailbox(8)  # an id and a logit

    # Memory

    def new_slots(self, num_slots: int, slot_bytes: int, huge: bool = True) -> DeviceSlots:
        slots = self.device.new_slots(num_slots, slot_bytes, huge)
        self.forms.set_slots(slots.banks)
        slots.code_of = self.forms.code_of
        return slots

    def new_pages(self, size_bytes: int) -> Pages:
        return self.device.new_pages(size_bytes)

    def view_pages(self, pages: Pages) -> torch.Tensor:
        memory = self.device.view_pages(pages)
        self.forms.set_resident(memory_of(memory))
        return memory

    def zeros(self, *shape: int) -> torch.Tensor:
        """Memory for a state. Another sequence begins: what was bound to the last one's is let go."""
        self.forget_states()
        return self.device.zeros(*shape)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.device.upload(tensor)

    def begin_read(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return self.device.begin_read(tensor)

    # Operations

    def embed(self, matrix: Matrix, token_ids: torch.Tensor, lane: int = 0) -> torch.Tensor:
        if len(token_ids) == 1:
            self._token.fill_(int(token_ids))
            known = self._streams.get((id(matrix), lane))
            if known is None:
                stream = self.device.empty(1, matrix.in_features)
                known = (stream, self.device.bind(self._embedding(matrix, self._token, stream)))
                self._streams[id(matrix), lane] = known
            stream, step = known
            step()
            return stream
        out = self.device.empty(len(token_ids), matrix.in_features)
        self.device.run(self._embedding(matrix, self.device.upload(token_ids.to(torch.int32)), out))
        return out

    def _embedding(self, matrix: Matrix, ids: torch.Tensor, out: torch.Tensor) -> Launch:
        if id(matrix) not in self._embeddings:
            memory = memory_of(matrix.data)
            form = self.device.upload_bytes(matrix_form(matrix, memory))
            self._embeddings[id(matrix)] = (memory, form, matrix)
        return launches.embed(*self._embeddings[id(matrix)], ids, out)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.linears(x, (matrix,))[0]

    def linears(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
        if len(x) > 1:
            return self._products_of_rows(x, matrices)
        key = tuple(map(id, matrices))
        if key not in self._products:
            x_row = self.device.empty(1, matrices[0].in_features)
            out = self.device.empty(1, sum(matrix.out_features for matrix in matrices))
            self._products[key] = (x_row, out, self.device.bind(self.linears_of(matrices)(x_row, out)), matrices)
        x_row, out, step, _ = self._products[key]
        x_row.copy_(x)
        step()
        return list(out.clone().split([matrix.out_features for matrix in matrices], dim=1))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, out = x.contiguous(), self.device.empty(*x.shape)
        self.device.run(launches.rms_norm(x.view(-1, x.shape[-1]), weight, out.view(-1, x.shape[-1]), eps))
        return out

    def gated_rms_norm(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        gate = gate.contiguous()
        out = self.device.empty(*x.shape)
        self.device.run(launches.gated_rms_norm(x, gate, weight, out, eps, gate[0].numel()))
        return out

    def gated(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self._on_device(reference.gated, x, gate)

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._on_device(reference.silu_mul, gate, up)

    def causal_conv(self, x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        out = self.device.empty(*x.shape)
        self.device.run(launches.causal_conv(x.contiguous(), weight, state, out))
        return out

    def decay_and_strength(
        self, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._on_device(reference.decay_and_strength, a, b, a_log, dt_bias)

    def gated_delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        out = self.device.empty(*v.shape)
        self.device.run(launches.delta_scan(q, k, v, decay.contiguous(), beta.contiguous(), state, out))
        return out

    def rope(self, x: torch.Tensor, first_position: int, theta: float, rotary_dim: int) -> torch.Tensor:
        return self._on_device(reference.rope, x, first_position, theta, rotary_dim)

    def attention(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = self.device.empty(*q.shape)
        self.device.run(launches.attention_tiles(q.contiguous(), keys, values, out))
        return out

    def route(self, x: torch.Tensor, router: Matrix, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.choose_experts(self.linear(x, router), num_chosen)

    def choose_experts(self, logits: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._on_device(reference.choose_experts, logits, num_chosen)

    def add_experts(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        experts: Sequence[Expert],
        counts: Sequence[int],
        tokens: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        x, tokens_on_host = x.contiguous(), tokens.numpy().astype(np.int32)
        places = np.array([self.forms.place_of(expert) for expert in experts])
        width = max(expert.gate_proj.out_features for expert in experts)
        ends = np.cumsum(counts)
        parts = self.split(x) if self.forms.are_fit[places[:, 1]].any() else None
        for first in range(0, len(tokens), self.batch.experts):
            last = min(first + self.batch.experts, len(tokens))
            # Of each expert what lies between first and last: none, all, or a part.
            starts, stops = np.clip(ends - counts, first, last), np.clip(ends, first, last)
            segments = np.column_stack([places, starts - first, stops - starts])[stops > starts]
            self._add_pairs(out, x, parts, segments, tokens_on_host[first:last], weights[first:last], width)

    def settle_experts(self, codes: Sequence[int], shared: Expert, width: int) -> SettledExperts | None:
        """Experts of a layer that are all in memory for good, and the shared one, as a prompt takes them.

        codes   where each of them is, as the store's `places` have it
        width   of the widest

        None where the device has no kernels for such prompts, or not for all of these experts.
        """
        codes = [*codes, self.forms.code_of(shared)]
        are_fit = self.forms.are_fit[[form_of(code) for code in codes]].all()  # none is, on other devices
        return SettledExperts(self, codes, width) if are_fit else None

    def argmax(self, logits: torch.Tensor) -> tuple[int, float]:
        if self._likeliest is None or self._likeliest[0].shape != logits.shape:
            own, found = self.device.empty(*logits.shape), self._found.bytes
            width, parts = logits.shape[1], launches.count_parts(logits.shape[1])
            part_ids, orders = (self.device.empty(len(logits), parts, dtype=torch.int32) for _ in range(2))
            token, largest = found[:4].view(torch.int32), found[4:].view(torch.float32)
            parts_first = launches.argmax_parts(own, part_ids, orders)
            joined = launches.argmax(part_ids, orders, token, largest, width)
            self._likeliest = (own, [self.device.bind(call) for call in (parts_first, joined)])
        own, steps = self._likeliest
        own.copy_(logits)
        for step in steps:
            step()
        answer = self._found.read()
        return answer[:4].cast("i")[0], answer[4:8].cast("f")[0]

    def split(self, x: torch.Tensor) -> Any:
        """The rows of x as the device's own kernels for prompts read them."""
        own = self.device.prompt_launches
        parts = own.Parts.of(self.device, *x.shape)
        self.device.run(own.split_rows(x.contiguous(), parts))
        return parts

    def _products_of_rows(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
        """x [T, K] times each matrix transposed."""
        own = self.device.prompt_launches
        if own is None:
            return self._tiled_products(launches, matrices, x.contiguous(), len(x))
        packed = [matrix for matrix in matrices if own.is_fit(matrix)]
        found = iter(self._tiled_products(own, packed, self.split(x), len(x)) if packed else [])
        return [next(found) if own.is_fit(matrix) else self._widened_product(x, matrix) for matrix in matrices]

    def _tiled_products(self, calls: Any, matrices: Sequence[Matrix], rows: Any, num_rows: int) -> list[torch.Tensor]:
        """The same in one dispatch, by the matmul of launches or of the device's own module, which reads its `rows`."""
        known = self._tiles.get(key := tuple(map(id, matrices)))
        if known is None:
            memory = memory_of(matrices[0].data)
            forms = self.device.upload_bytes(calls.tile_forms(matrices, memory))
            known = self._tiles[key] = (memory, forms, matrices)
        sizes = [matrix.out_features for matrix in matrices]
        out = self.device.empty(num_rows, sum(sizes))
        self.device.run(calls.matmul(*known, rows, out))
        return list(out.split(sizes, dim=1))

    def _add_pairs(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        parts: Any,
        segments: np.ndarray,
        tokens: np.ndarray,
        weights: torch.Tensor,
        width: int,
    ) -> None:
        """out += the experts' results for some pairs of a token and an expert.

        parts      of x, if any expert is for the device's own kernels for prompts
        segments   as forms.pack_segments takes them
        width      of the widest expert
        """
        banks, table, device, own = self.forms.banks, self.forms.table, self.device, self.device.prompt_launches
        is_fit = self.forms.are_fit[segments[:, 1]]
        plain, fit = segments[~is_fit], segments[is_fit]
        tables = pack_segments(own.cut_segments(fit) if fit.size else fit), pack_segments(plain)
        raw = [np.frombuffer(part, np.uint8) for part in tables]
        fit_table, plain_table, of_pairs, order = self._upload_together(*raw, tokens, _order_by_token(tokens, len(x)))
        hidden, rows = device.empty(len(tokens), width), device.empty(len(tokens), x.shape[1])
        if fit.size:
            device.run(own.experts_gate_up_rows(banks, table, fit_table, of_pairs, parts, hidden))
            device.run(own.experts_down_rows(banks, table, fit_table, self.split(hidden), rows))
        if plain.size:
            most = int(plain[:, 3].max())
            device.run(launches.experts_gate_up_rows(banks, table, plain_table, of_pairs, x, hidden, most))
            device.run(launches.experts_down_rows(banks, table, plain_table, hidden, rows, most))
        device.run(launches.add_expert_rows(rows, order, weights.contiguous(), out))

    def _upload_together(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Arrays on the device, by one copy."""
        ends = list(accumulate(-(-array.nbytes // UPLOAD_ALIGNMENT) * UPLOAD_ALIGNMENT for array in arrays))
        whole = np.empty(ends[-1], np.uint8)
        for array, start in zip(arrays, [0, *ends]):
            whole[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
        there = self.device.upload(torch.from_numpy(whole))
        found = []
        for array, start in zip(arrays, [0, *ends]):
            kind = torch.int32 if array.dtype == np.int32 else torch.uint8
            found.append(there[start : start + array.nbytes].view(kind).view(array.shape))
        return found

    def _widened_product(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """x [T, K] times a matrix transposed, by torch on weights that a kernel has widened, some rows at a time.

        The last bits of a token's result may depend on T: torch chooses by it how to add up.
        """
        parts = [x @ self._widen(matrix, first, count).T for first, count in row_tiles(matrix)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _widen(self, matrix: Matrix, first: int, count: int) -> torch.Tensor:
        """Rows of a matrix as float32 [count, K], until the next call."""
        steps = matrix.__dict__.setdefault("_widen_steps", {})  # a frozen dataclass: this only remembers what it is
        if (first, count) not in steps:
            wide = self.scratch("wide", count * matrix.in_features).view(count, -1)
            memory = memory_of(matrix.data)
            form = self.device.upload_bytes(matrix_form(matrix, memory))
            rows = self._row_numbers(first + count)[first:]
            steps[first, count] = (self.device.bind(launches.embed(memory, form, matrix, rows, wide)), wide)
        step, wide = steps[first, count]
        step()
        return wide

    def _row_numbers(self, count: int) -> torch.Tensor:
        if len(self._rows) < count:
            self._rows = self.device.upload(torch.arange(count, dtype=torch.int32))
        return self._rows[:count]

    def _on_device(self, operation: Any, *arguments: Any) -> Any:
        """An operation by its definition; what it makes on the way is on the device too."""
        with torch.device(self.device.place):
            return operation(*arguments)

"""One token through a layer on a GPU: the calls of kernels that are handed over, bound once and repeated.

A DeltaNet layer is eight dispatches, an attention layer nine; gpu_layers.py makes few calls of them. Where the experts
stream from the SSD the caller waits once a layer, for the ids that the router has chosen: that wait also tells which
slots are free again. The weights of the choice stay on the GPU. Experts in memory run while the others load; the sum is
one dispatch at the end, in the order of the ranks, so that it does not depend on what was in memory.

    mix = ops.fuse_delta_net(norm, in_projs, conv, a_log, dt_bias, gate_norm, out_proj, 16, 32, 1e-6)
    mix(x, conv_state, recurrent_state)
    step = ops.expert_step(norm, router, shared_gate, StepSettings(num_chosen=8, width=512, eps=1e-6, bits={4}))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch

from moepack.kernels import launches
from moepack.kernels.device import Device, Step
from moepack.kernels.expert_step import Choice, ExpertStep, StepSettings
from moepack.kernels.forms import RESIDENT_BANK, SLOT_BANKS, expert_form, pack_places, struct_bytes
from moepack.kernels.gpu_layers import GpuLayers
from moepack.kernels.launches import Launch
from moepack.kernels.matrix import Expert, Matrix

MAX_FORMS = 1024  # kinds of blocks and shared experts: 160 bytes each
INT_BYTES = 4
OFFSET_BITS = 48  # of a place in one number; the form, counted from one, is above


class TokenOps:
    """Whole parts of a layer for one token, as native_token.TokenOps has them for the processor."""

    device: Device
    fuses_tokens, settles, has_lanes = True, True, True

    def __init__(self) -> None:
        self._repeats: list[Repeat] = []
        self._linears: dict[tuple[int, ...], Callable[..., Launch]] = {}
        self._scratch: dict[tuple[str, int], torch.Tensor] = {}
        self._positions: dict[int, torch.Tensor] = {}  # by the hidden state of a token under way
        self._steps: dict[int, list[GpuExpertStep]] = {}  # by the router, then by lane: of a model that is being made
        self._layers: list[GpuLayers] = []
        self.forms = ExpertForms(self.device)

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
    ) -> Repeat:
        """run(x, conv_state, recurrent_state): x [1, D] += DeltaNet(norm(x)), and the states move on."""
        inputs, output = self.linears_of(in_projs), self.linears_of([out_proj])
        projected = self.scratch("projected", sum(matrix.out_features for matrix in in_projs))
        mixed, out = self.scratch("mixed", len(conv)), self.scratch("out", out_proj.in_features)
        # qkv first, then z, a, b: where the last three start in a row of what is projected
        z, a, b = accumulate(matrix.out_features for matrix in in_projs[:3])

        def describe(x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor) -> list[Launch]:
            return [
                inputs(x, projected, norm=norm, eps=eps),
                launches.causal_conv(projected, conv, conv_state, mixed),
                launches.delta_step(
                    *(mixed, projected, a_log, dt_bias, gate_norm, recurrent_state, out, key_heads, z, a, b, eps)
                ),
                output(out, x, accumulate=True),
            ]

        return self.repeat(describe)

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
    ) -> Repeat:
        """run(x, keys, values): x [1, D] += attention(norm(x)); the caches get the token at the position set before.

        keys, values   [Hkv, max_positions, Dh]
        """
        inputs, output = self.linears_of(in_projs), self.linears_of([out_proj])
        width = len(q_norm)
        projected = self.scratch("projected", sum(matrix.out_features for matrix in in_projs))
        q, out = self.scratch("q", heads * width).view(1, heads, width), self.scratch("out", heads * width)
        frequencies = self.device.upload(launches.rope_frequencies(theta, rotary_dim))

        def describe(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[Launch]:
            splits = launches.count_splits(keys.shape[1])
            partial = self.scratch("partial", heads * splits * width).view(heads, splits, width)
            stats = self.scratch("stats", heads * splits * 2).view(heads, splits, 2)
            position = self.position_of(x)
            return [
                inputs(x, projected, norm=norm, eps=eps),
                launches.rope_cache(projected, q_norm, k_norm, frequencies, position, q, keys, values, eps),
                launches.attention_split(q[0], keys, values, position, partial, stats),
                launches.attention_combine(partial, stats, keys, position, projected, out),
                output(out, x, accumulate=True),
            ]

        return self.repeat(describe)

    def position_of(self, x: torch.Tensor) -> torch.Tensor:
        """Where the position of a token is, int32 [1], for all layers: by the memory of its hidden state."""
        if id(x) not in self._positions:
            self._positions[id(x)] = self.device.upload(torch.zeros(1, dtype=torch.int32))
        return self._positions[id(x)]

    def fuse_router(
        self, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, num_chosen: int, eps: float
    ) -> list[GpuExpertStep]:
        """The steps, by lane, of the layer that this router belongs to: choosing is a part of them."""
        return self._steps.pop(id(router))  # a later model of the same weights has steps of its own

    def fuse_layers(
        self,
        mixers: Sequence[Repeat],
        routers: Sequence[list[GpuExpertStep]],
        shared_experts: Sequence[Expert],
        lane: int = 0,
    ) -> GpuLayers:
        """Layers of a mixer, a router and a shared expert each, for the tokens of a lane."""
        self._layers.append(GpuLayers(self, mixers, [steps[lane] for steps in routers], shared_experts))
        return self._layers[-1]

    def expert_step(
        self, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, settings: StepSettings
    ) -> GpuExpertStep:
        """The next lane's step of a layer. What lasts from one call of its to the next is the lane's own."""
        steps = self._steps.setdefault(id(router), [])
        steps.append(GpuExpertStep(self, norm, router, shared_gate, settings, len(steps)))
        return steps[-1]

    # Parts

    def linears_of(self, matrices: Sequence[Matrix]) -> Callable[..., Launch]:
        """launches.linears with the matrices given, which stay where they are."""
        known = self._linears.get(key := tuple(map(id, matrices)))
        if known is None:
            memory = memory_of(matrices[0].data)
            forms = self.device.upload_bytes(self.device.launches.matrix_forms(matrices, memory))
            known = self._linears[key] = functools.partial(self.device.launches.linears, memory, forms, matrices)
        return known

    def scratch(self, name: str, size: int) -> torch.Tensor:
        """A row that the layers share: [1, size]. What it holds lasts to the next layer."""
        key = (name, size)
        if key not in self._scratch:
            self._scratch[key] = self.device.empty(1, size)
        return self._scratch[key]

    def repeat(self, describe: Callable[..., Iterable[Launch]]) -> Repeat:
        """A function of tensors that hands over what `describe` lists for them."""
        self._repeats.append(Repeat(self.device, describe))
        return self._repeats[-1]

    def forget_states(self) -> None:
        """Let go of the tensors that calls are bound to: another sequence's come."""
        for repeat in self._repeats:
            repeat.forget()
        for layers in self._layers:
            layers.forget()


class Repeat:
    """Calls bound to the tensors they are first made with, those of several sequences that take turns."""

    def __init__(self, device: Device, describe: Callable[..., Iterable[Launch]]):
        self._device, self._describe = device, describe
        self._bound: dict[tuple[int, ...], tuple[tuple[torch.Tensor, ...], list[Step]]] = {}  # the tensors are kept

    def __call__(self, *tensors: torch.Tensor) -> None:
        key = tuple(map(id, tensors))
        if key not in self._bound:
            self._bound[key] = (tensors, [self._device.bind(launch) for launch in self._describe(*tensors)])
        for step in self._bound[key][1]:
            step()

    def forget(self) -> None:
        self._bound = {}


class ExpertForms:
    """How experts lie in their blocks, as the kernels read it: one entry for each kind of block, made when it is met.

    banks   the memories that experts may lie in: two of slots, and that of the resident weights
    """

    def __init__(self, device: Device):
        self._device = device
        self.banks: list[torch.Tensor] = []
        self._known: dict[bytes, int] = {}
        self.are_fit = np.zeros(MAX_FORMS, bool)  # by form: whether the device's kernels for prompts take experts of it
        self._form_bytes = struct_bytes("ExpertForm")
        self._box = device.new_mailbox(MAX_FORMS * self._form_bytes)

    @property
    def table(self) -> torch.Tensor:
        return self._box.bytes

    def set_slots(self, banks: Sequence[torch.Tensor]) -> None:
        """The banks of slots; the bank of resident weights is the first slots' until it is set."""
        self.banks = [banks[0], banks[-1], *(self.banks[RESIDENT_BANK:] or banks[:1])]

    def set_resident(self, memory: torch.Tensor) -> None:
        self.banks = [*(self.banks[:RESIDENT_BANK] or [memory] * len(SLOT_BANKS)), memory]

    def place_of(self, expert: Expert) -> tuple[int, int]:
        """(offset in its bank, index of its form), found once and kept with the expert."""
        place = expert.__dict__.get("_gpu_place")
        if place is None:
            place = self._find(expert)
            object.__setattr__(expert, "_gpu_place", place)  # a frozen dataclass: this only remembers what it is
        return place

    def code_of(self, expert: Expert) -> int:
        """place_of in one number that is not 0."""
        offset, form = self.place_of(expert)
        return form + 1 << OFFSET_BITS | offset

    def upload_places(self, codes: Iterable[int]) -> torch.Tensor:
        """Places on the device, of any rank, from where experts are (code_of)."""
        return self._device.upload_bytes(pack_places(unpack_place(code, 0) for code in codes))

    def _find(self, expert: Expert) -> tuple[int, int]:
        matrices = (expert.gate_proj, expert.up_proj, expert.down_proj)
        parts = [part for m in matrices for part in (m.data, m.scales, m.biases) if part is not None]
        first = min(parts, key=lambda part: part.data_ptr())
        storage = first.untyped_storage().data_ptr()
        bank = next(n for n, memory in enumerate(self.banks) if memory.untyped_storage().data_ptr() == storage)
        form = expert_form(expert, first, bank)
        index = self._known.get(form)
        if index is None:
            index = len(self._known)
            if index == MAX_FORMS:
                raise ValueError(f"more than {MAX_FORMS} kinds of experts")
            self._known[form] = index
            own = self._device.prompt_launches
            self.are_fit[index] = own is not None and own.is_fit_expert(expert)
            self._box.write(index * self._form_bytes, form)
        return first.data_ptr() - self.banks[bank].data_ptr(), index


class GpuExpertStep(ExpertStep):
    """The experts of one token on a GPU: chosen there, weighted there; the processor learns the ids alone.

    Row r of the sum is the r-th choice of the router: the sum goes by rank.

    go_on   hands over the sum, and whatever comes before the next wait (gpu_layers.py); the sum alone at first
    """

    def __init__(
        self,
        ops: TokenOps,
        norm: torch.Tensor,
        router: Matrix,
        shared_gate: Matrix,
        settings: StepSettings,
        lane: int,
    ):
        self._ops, self._norm, self._eps = ops, norm, settings.eps
        self._matrices, self._num_chosen = [router, shared_gate], settings.num_chosen
        rows, device = settings.num_chosen + 1, ops.device
        self._place_bytes = struct_bytes("Place")
        self._normed = ops.scratch(f"normed {lane}", launches.spread_width(router.in_features))
        self._experts = device.expert_launches(router.in_features, settings.width, settings.bits)
        width = self._experts.hidden_width(settings.width)
        self._hidden = ops.scratch(f"hidden {lane}", rows * width).view(rows, width)
        # Two lists of places: in the order in which experts arrive, and in that of their ranks.
        self._places = device.new_mailbox(2 * rows * self._place_bytes)
        self._ranked: dict[int, tuple[int, int, int]] = {}  # row -> place, of those that have come
        self._arrived = 0
        self.guessed: list[int] = []  # and of the other router that was asked about
        self.chosen: list[int] = []  # ids of the last token's experts, as far as they are known here
        self._gate_up: dict[tuple[int, int], Step] = {}
        self._choose_step, self._down_step = ops.repeat(self._describe_choice), ops.repeat(self._describe_down)
        self._next_router: Matrix | None = None  # whose choice for the same token is made along with this layer's
        self._wanted: Matrix | None = None
        self._set_routers(1)
        self._unused = device.empty((router.out_features + 1) * self._place_bytes, dtype=torch.uint8)
        self.go_on: Callable[[], object] = lambda: self.hand_over_sum(self._x)

    def choose(self, x: torch.Tensor) -> list[int]:
        self.follow_guess()
        self.hand_over_choice(x)
        self._ops.device.wait()  # the one wait of the layer
        return self.take(x, (x, self.look_at_choice(), []))

    def take(self, x: torch.Tensor, choice: Choice) -> list[int]:
        self._x, self._ranked, self._arrived = x, {}, 0
        return choice[1]

    def hand_over_choice(self, x: torch.Tensor) -> None:
        """Choose; look_at_choice tells what, after a wait."""
        self._choose_step(x)
        self._ids.fetch()

    def look_at_choice(self) -> list[int]:
        """The ids that had been chosen last when the device was waited for."""
        ids = self._ids.look().cast("i").tolist()
        self.guessed = ids[self._num_chosen :]
        self.chosen = ids[: self._num_chosen]
        return self.chosen

    def read_ids(self) -> list[int]:
        """The ids that were chosen last, once they are known."""
        self._ids.read()
        return self.look_at_choice()

    def guess(self, router: Matrix) -> list[int]:
        """From the second token on: the other router then goes with the first, so that there is no second wait."""
        self._wanted = router
        return self.guessed

    def follow_guess(self) -> bool:
        """Between two tokens: take up the router that was asked about. Whether the calls are others from now on."""
        if self._wanted is self._next_router:
            return False
        self._next_router = self._wanted
        self._set_routers(2)
        return True

    def _set_routers(self, rows: int) -> None:
        """Results for the choice of this layer, and for the guess of the next one's in a second row."""
        device = self._ops.device
        self._inputs = self._ops.linears_of(self._matrices + ([self._next_router] if self._next_router else []))
        self._logits = self._ops.scratch("logits", rows * (self._matrices[0].out_features + 1))
        self._ids = device.new_mailbox(rows * self._num_chosen * INT_BYTES)
        self._weights = device.empty(rows, self._num_chosen + 1)
        self._choose_step.forget()
        self._down_step.forget()

    def run(self, experts: Sequence[Expert], rows: Sequence[int]) -> None:
        self.run_codes([self._ops.forms.code_of(expert) for expert in experts], rows)

    def run_codes(self, codes: Sequence[int], rows: Sequence[int]) -> None:
        """run() of experts by where they are (ExpertForms.code_of)."""
        first, count = self._arrived, len(codes)
        if not count:
            return
        places = [unpack_place(code, row) for code, row in zip(codes, rows)]
        self._ranked.update((row, place) for row, place in zip(rows, places))
        self._places.put(first * self._place_bytes, pack_places(places))
        self._arrived += count
        if self._arrived > self._num_chosen:  # the last ones: both lists are complete
            self._put_ranked()
            size = 2 * (self._num_chosen + 1) * self._place_bytes
        else:
            size = self._arrived * self._place_bytes
        self._places.send(first * self._place_bytes, size - first * self._place_bytes)
        step = self._gate_up.get((first, count))
        if step is None:
            step = self._gate_up[first, count] = self._ops.device.bind(self._describe_gate_up(first, count))
        step()

    def add(self) -> None:
        self.go_on()

    def start_over(self) -> None:
        self._ops.device.wait()  # the places of what was run may still be on their way
        self._ranked, self._arrived = {}, 0

    def hand_over_sum(self, x: torch.Tensor) -> None:
        """Add the rows of the experts that have been run to x."""
        self._down_step(x)

    def _put_ranked(self) -> None:
        rows = self._num_chosen + 1
        self._places.put(rows * self._place_bytes, pack_places(self._ranked[row] for row in range(rows)))

    def settle(self, codes: Sequence[int], shared: Expert) -> None:
        """All experts of the layer are in memory for good: from now on run_settled can be used."""
        codes = [*codes, self._ops.forms.code_of(shared)]
        table = self._ops.forms.upload_places(codes)
        rows = self._num_chosen + 1
        places = self._ops.device.upload_bytes(bytes(rows * self._place_bytes))
        chosen = self._ids.bytes[: self._num_chosen * INT_BYTES].view(torch.int32).view(1, -1)
        logits, weights = self._logits[:, : len(codes)], self._weights[:1]

        def describe(x: torch.Tensor) -> list[Launch]:
            forms = self._ops.forms
            return [
                self._inputs(x, self._logits, norm=self._norm, normed=self._normed, eps=self._eps),
                launches.choose_experts(logits, chosen, weights, table, places),
                self._experts.experts_gate_up(forms.banks, forms.table, places, self._normed, self._hidden),
                self._experts.experts_down(forms.banks, forms.table, places, self._hidden, weights, x),
            ]

        self.run_settled = self._ops.repeat(describe)

    def _describe_choice(self, x: torch.Tensor) -> list[Launch]:
        rows = self._weights.shape[0]
        ids = self._ids.bytes.view(torch.int32).view(rows, -1)
        logits = self._logits.view(rows, -1)
        return [
            self._inputs(x, self._logits, norm=self._norm, normed=self._normed, eps=self._eps),
            launches.choose_experts(logits, ids, self._weights, self._unused, self._unused, places_wanted=False),
        ]

    def _describe_gate_up(self, first: int, count: int) -> Launch:
        forms = self._ops.forms
        places = self._places.bytes[first * self._place_bytes : (first + count) * self._place_bytes]
        return self._experts.experts_gate_up(forms.banks, forms.table, places, self._normed, self._hidden)

    def _describe_down(self, x: torch.Tensor) -> list[Launch]:
        forms = self._ops.forms
        places = self._places.bytes[(self._num_chosen + 1) * self._place_bytes :]
        return [self._experts.experts_down(forms.banks, forms.table, places, self._hidden, self._weights, x)]


def unpack_place(code: int, rank: int) -> tuple[int, int, int]:
    """(offset, form, rank) of an expert by its code."""
    return code & (1 << OFFSET_BITS) - 1, form_of(code), rank


def form_of(code: int) -> int:
    """The index of an expert's form by its code."""
    return (code >> OFFSET_BITS) - 1


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All the memory that a tensor is a view of: uint8."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())  # type: ignore[call-overload]

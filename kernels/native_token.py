"""One token through all layers whose experts are in memory, in one native call.

The same operations in the same order as the model file's, so the same bits. Streaming weights leaves nothing of the
interpreter in the processor's caches, and each operation called from Python then costs 10 us beside its work; a
layer has twenty of them. Weights are described once; a run stops at the first layer that has chosen an expert which is
not in memory, and goes on behind it when the caller has run that layer's experts.

    layers = ops.fuse_layers(mixers, routers, shared_experts)
    layers.start(x, states, experts, position=7, pauses=False)
    reached = layers.run(first=0)
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moepack.kernels.expert_step import Choice
from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_floats import angles
from moepack.kernels.native_library import ADDRESS, FLOAT, INT, declare
from moepack.kernels.native_matrix import place


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


class _Layer(ctypes.Structure):
    """struct LayerWeights of native/token_ops.cpp."""

    _fields_ = [(name, ADDRESS) for name in ("delta_net", "attention", "router", "shared_expert")]


class _State(ctypes.Structure):
    """struct LayerState of native/token_ops.cpp."""

    _fields_ = [
        *((name, ADDRESS) for name in ("conv", "recurrent", "keys", "values")),
        *((name, INT) for name in ("head_stride", "is_bf16")),
    ]


class _Run(ctypes.Structure):
    """struct TokenRun of native/token_ops.cpp."""

    _fields_ = [
        *((name, ADDRESS) for name in ("layers", "states", "experts", "angles")),
        *((name, INT) for name in ("position", "num_layers", "pauses", "exact")),
        *((name, ADDRESS) for name in ("normed", "ids", "weights")),
    ]


class FusedPart:
    """Weights of one part of a layer as the library reads them; keeps alive what they point to.

    rope   theta and the rotated width, of attention
    """

    def __init__(self, native: ctypes.Structure, owners: Any, rope: tuple[float, int] | None = None):
        self.native, self.address, self.rope, self._owners = native, ctypes.addressof(native), rope, owners


class FusedLayers:
    """The layers of a model, run by one token at a time. Made by TokenOps.fuse_layers."""

    def __init__(
        self,
        run_token: Callable[..., int],
        mixers: Sequence[FusedPart],
        routers: Sequence[FusedPart],
        shared_experts: Sequence[Expert],
        exact: bool,
    ):
        count, self._run_token, self._owners = len(mixers), run_token, (mixers, routers, shared_experts)
        self._rope = next((mixer.rope for mixer in mixers if mixer.rope), None)
        self._layers = (_Layer * count)()
        for layer, mixer, router, shared in zip(self._layers, mixers, routers, shared_experts):
            setattr(layer, "attention" if mixer.rope else "delta_net", mixer.address)
            layer.router, layer.shared_expert = router.address, place(shared)
        router_weights = routers[0].native
        self._chosen = router_weights.chosen
        self._ids, self._weights = (INT * (count * self._chosen))(), (FLOAT * (count * (self._chosen + 1)))()
        self._normed = torch.empty(1, shared_experts[0].gate_proj.in_features)
        self._states = (_State * count)()
        self._run = _Run(
            layers=ctypes.addressof(self._layers),
            states=ctypes.addressof(self._states),
            num_layers=count,
            exact=exact,
            normed=self._normed.data_ptr(),
            ids=ctypes.addressof(self._ids),
            weights=ctypes.addressof(self._weights),
        )
        self._kept: Any = None  # what the native description of a token points to
        # The first of the states that the native ones are of. Whose answer has ended is not kept in memory by it.
        self._described: Callable[[], torch.Tensor | None] = lambda: None

    def start(
        self,
        x: torch.Tensor,
        states: Sequence[tuple[torch.Tensor, torch.Tensor]],
        experts: torch.Tensor,
        position: int,
        pauses: bool,
        watched: bool = False,
    ) -> None:
        """Describe a token; run() then changes x and the states in place.

        x         [1, D]
        states    of each layer: conv_state and recurrent_state, or keys and values [Hkv, max_positions, Dh]; the
                  same tensors for every token of a sequence are described once
        experts   int64 [layers, E]: address of the description of each expert that is in memory, 0 for others
        position  of the token; the caches get it there
        pauses    stop after each layer's router, so that the caller sees what was chosen as early as can be
        watched   nothing here: it then stops in any case
        """
        turn = angles(position, 1, *self._rope) if self._rope else None
        if states[0][0] is not self._described():
            self._describe(states)
        run, self._kept = self._run, (x, experts, turn)
        run.experts, run.angles = experts.data_ptr(), turn.data_ptr() if turn is not None else None
        run.position, run.pauses = position, pauses

    def _describe(self, states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for native, layer, (first, second) in zip(self._states, self._layers, states):
            if layer.attention:
                native.keys, native.values = first.data_ptr(), second.data_ptr()
                native.head_stride, native.is_bf16 = first.stride(0), first.dtype == torch.bfloat16
            else:
                native.conv, native.recurrent = first.data_ptr(), second.data_ptr()
        self._described = weakref.ref(states[0][0])

    def run(self, first: int) -> int:
        """Go on with layer `first`. Returns the layer whose experts are chosen but not run; their number if all are."""
        return self._run_token(self._kept[0].data_ptr(), ctypes.addressof(self._run), first)

    def ids(self, layer: int) -> list[int]:
        """The experts that a layer has chosen, ascending."""
        return self._ids[layer * self._chosen : (layer + 1) * self._chosen]

    def choice(self, layer: int) -> Choice:
        """What the layer that a run has reached has chosen: norm(x), ids, and weights, the shared expert's behind."""
        weights = self._weights[layer * (self._chosen + 1) : (layer + 1) * (self._chosen + 1)]
        return self._normed, self.ids(layer), weights


class TokenOps:
    """Descriptions of a layer's parts, and the layers made of them. `exact` comes with the class this is part of."""

    exact: bool
    fuses_tokens, settles, has_lanes = True, False, True

    def __init__(self) -> None:
        self._run_token = declare("run_token", ADDRESS, ADDRESS, INT, returns=INT)
        self._add_rows = declare("add_rows", ADDRESS, ADDRESS, ADDRESS, INT, INT)

    def fuse_layers(
        self,
        mixers: Sequence[FusedPart],
        routers: Sequence[FusedPart],
        shared_experts: Sequence[Expert],
        lane: int = 0,
    ) -> FusedLayers:
        """Layers of a mixer, a router and a shared expert each. What one lane is given serves any."""
        return FusedLayers(self._run_token, mixers, routers, shared_experts, self.exact)

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
    ) -> FusedPart:
        """x += DeltaNet(norm(x)), and the states move on."""
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
        return FusedPart(native, (vectors, in_projs, out_proj))

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
    ) -> FusedPart:
        """x += attention(norm(x)), and the caches get the token at its position."""
        native = _Attention(
            norm.data_ptr(),
            (ADDRESS * 3)(*map(place, in_projs)),
            q_norm.data_ptr(),
            k_norm.data_ptr(),
            place(out_proj),
            *(heads, kv_heads, len(q_norm), rotary_dim // 2),
            eps,
        )
        return FusedPart(native, (norm, in_projs, q_norm, k_norm, out_proj), rope=(theta, rotary_dim))

    def fuse_router(
        self, norm: torch.Tensor, router: Matrix, shared_gate: Matrix, num_chosen: int, eps: float
    ) -> FusedPart:
        """The experts chosen for norm(x), and their weights with the shared expert's."""
        native = _Router(
            norm.data_ptr(), (ADDRESS * 2)(place(router), place(shared_gate)), router.out_features, num_chosen, eps
        )
        return FusedPart(native, (norm, router, shared_gate))

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: Sequence[float]) -> None:
        count, width = rows.shape
        self._add_rows(x.data_ptr(), rows.data_ptr(), (FLOAT * count)(*weights), count, width)

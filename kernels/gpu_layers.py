"""The layers of a model on a GPU, run by one token at a time: waiting once a layer, or not at all.

Where experts stream, the processor must learn what the router has chosen: it waits, looks whether all of it is in
memory, and hands over the rest of the layer and the next one, or stops for the store to read. Where every expert is in
memory for good, the GPU finds them by itself in a table, and nothing is waited for before the logits: on NVIDIA's that
is one CUDA graph, recorded at a sequence's second token.

    layers = ops.fuse_layers(mixers, routers, shared_experts)
    layers.start(x, states, places, position, pauses=False)
    reached = layers.run(0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from moepack.kernels.device import Step
from moepack.kernels.expert_step import Choice
from moepack.kernels.matrix import Expert

if TYPE_CHECKING:
    from moepack.kernels.gpu_token import GpuExpertStep, TokenOps

Mixer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
States = Sequence[tuple[torch.Tensor, torch.Tensor]]


class GpuLayers:
    """Layers of a mixer, the experts' step and a shared expert each. The interface is native_token.FusedLayers'."""

    def __init__(
        self, ops: TokenOps, mixers: Sequence[Mixer], steps: Sequence[GpuExpertStep], shared_experts: Sequence[Expert]
    ):
        self._ops, self._mixers, self._steps, self._shared = ops, mixers, steps, shared_experts
        self._is_settled = False
        self.forget()

    def start(self, x: torch.Tensor, states: States, places: torch.Tensor, position: int, pauses: bool) -> None:
        """Take up a token; run() then changes x and the states in place.

        x         [1, D]
        states    of each layer: conv_state and recurrent_state, or keys and values [Hkv, max_positions, Dh]
        places    int64 [layers, E]: where each expert is that is in memory (ExpertForms.code_of), 0 for others
        position  of the token; the caches get it there
        pauses    stop after each layer's router, so that the caller sees what was chosen as early as can be
        """
        self._x, self._states, self._pauses = x, states, pauses
        self._places = places[: len(self._steps)].numpy()
        self._ops.set_position(position)
        if not self._is_settled and self._places.all():
            for step, row, shared in zip(self._steps, self._places, self._shared):
                step.settle(row.tolist(), shared)
            self._is_settled = True

    def run(self, first: int) -> int:
        """Go on with layer `first`. Returns the layer whose experts are chosen but not run; their number if all are."""
        if self._is_settled:
            self._run_settled()
            return len(self._steps)
        for layer in range(first, len(self._steps)):
            step = self._steps[layer]
            self._mixers[layer](self._x, *self._states[layer])
            codes = self._places[layer, step.choose(self._x)]
            if self._pauses or not codes.all():
                return layer
            step.run_codes(codes.tolist(), range(len(codes)))
            step.run([self._shared[layer]], [len(codes)])
            step.add()
        return len(self._steps)

    def ids(self, layer: int) -> list[int]:
        """The experts that a layer has chosen. Where nothing was waited for, this waits."""
        step = self._steps[layer]
        return step.read_ids() if self._is_settled else step.chosen

    def choice(self, layer: int) -> Choice:
        """What the layer that a run has reached has chosen, for its step to take."""
        return self._x, self.ids(layer), []

    def forget(self) -> None:
        """Let go of the tensors of the last token."""
        self._recorded: tuple[torch.Tensor, ...] = ()
        self._replay: Step | None = None

    def _run_settled(self) -> None:
        tensors = (self._x, *(tensor for pair in self._states for tensor in pair))
        device = self._ops.device
        if len(tensors) != len(self._recorded) or any(a is not b for a, b in zip(tensors, self._recorded)):
            self._hand_over()  # binds every call, as recording must not
            self._recorded, self._replay = tensors, None
            return
        if self._replay is None:
            self._replay = device.capture(self._hand_over) if device.can_capture else self._hand_over
        self._replay()

    def _hand_over(self) -> None:
        for mixer, states, step in zip(self._mixers, self._states, self._steps):
            mixer(self._x, *states)
            step.run_settled(self._x)

"""The layers of a model on a GPU, run by one token at a time: waiting once a layer, or not at all.

Where experts stream, the processor must learn what the router has chosen: it waits, looks whether all of it is in
memory, hands over the experts, or stops for the store to read. What lies between two waits and needs no decision is a
stretch: the sum of a layer's experts, the next layer's mixer, its router. Where every expert is in memory for good, the
GPU finds them by itself in a table, and all layers are one stretch, with no wait before the logits. A device that can
record work (NVIDIA's, as a CUDA graph) gets a stretch in one call from the second time on.

    layers = ops.fuse_layers(mixers, routers, shared_experts)
    layers.start(x, states, places, position, pauses=False)
    reached = layers.run(0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from moepack.kernels.device import Device, Step
from moepack.kernels.expert_step import Choice
from moepack.kernels.matrix import Expert

if TYPE_CHECKING:
    from moepack.kernels.gpu_token import GpuExpertStep, TokenOps

Mixer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
States = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Stretch:
    """Work that is handed over again and again: call by call the first time, which binds it, then recorded."""

    def __init__(self, device: Device, hand_over: Callable[[], object]):
        self._device, self._hand_over = device, hand_over
        self._replay: Step | None = None
        self._is_recorded = False

    def __call__(self) -> None:
        if self._replay is None:
            self._hand_over()
            self._replay = self._hand_over
        else:
            if not self._is_recorded and self._device.can_capture:
                self._replay = self._device.capture(self._hand_over)
            self._is_recorded = True
            self._replay()

    def forget(self) -> None:
        """What it hands over is about to change."""
        self._replay, self._is_recorded = None, False


class _Run:
    """The work of a token by its stretches, for the tensors of one sequence.

    whole    all layers, where every expert is in memory for good
    parts    by layer, and one more: the sum of the experts of the layer before; the layer's mixer and router
    """

    def __init__(
        self,
        device: Device,
        mixers: Sequence[Mixer],
        steps: Sequence[GpuExpertStep],
        x: torch.Tensor,
        states: States,
    ):
        self._mixers, self._steps, self._x, self._states = mixers, steps, x, states
        self.whole = Stretch(device, self._hand_over_all)
        self.parts = [Stretch(device, functools.partial(self._hand_over, layer)) for layer in range(len(steps) + 1)]

    def _hand_over(self, layer: int) -> None:
        if layer:
            self._steps[layer - 1].hand_over_sum(self._x)
        if layer < len(self._steps):
            self._mixers[layer](self._x, *self._states[layer])
            self._steps[layer].hand_over_choice(self._x)

    def _hand_over_all(self) -> None:
        for mixer, states, step in zip(self._mixers, self._states, self._steps):
            mixer(self._x, *states)
            step.run_settled(self._x)


class GpuLayers:
    """Layers of a mixer, the experts' step and a shared expert each. The interface is native_token.FusedLayers'."""

    def __init__(
        self, ops: TokenOps, mixers: Sequence[Mixer], steps: Sequence[GpuExpertStep], shared_experts: Sequence[Expert]
    ):
        self._ops, self._mixers, self._steps, self._shared = ops, mixers, steps, shared_experts
        self._is_settled = False
        self._runs: dict[tuple[int, ...], _Run] = {}  # by their tensors: several sequences take turns
        for layer, step in enumerate(steps):
            step.go_on = functools.partial(self._go_on, layer + 1)

    def start(
        self,
        x: torch.Tensor,
        states: States,
        places: torch.Tensor,
        position: int,
        pauses: bool,
        watched: bool = False,
    ) -> None:
        """Take up a token; run() then changes x and the states in place.

        x         [1, D]
        states    of each layer: conv_state and recurrent_state, or keys and values [Hkv, max_positions, Dh]
        places    int64 [layers, E]: where each expert is that is in memory (ExpertForms.code_of), 0 for others
        position  of the token; the caches get it there
        pauses    stop after each layer's router, so that the caller sees what was chosen as early as can be; but go on
                  if it and what the next layer's router would choose are all in memory: nothing is to be read then
        watched   stop even so: others take the step together with this one, or somebody records what was guessed
        """
        self._x, self._pauses, self._watched = x, pauses, watched
        self._places = places[: len(self._steps)].numpy()
        self._ops.position_of(x).fill_(position)
        if not self._is_settled and not (pauses and watched) and self._places.all():
            for step, row, shared in zip(self._steps, self._places, self._shared):
                step.settle(row.tolist(), shared)
            self._is_settled = True
        if not self._is_settled:
            self._follow_guesses()
        key = (id(x), *(id(tensor) for pair in states for tensor in pair))
        if key not in self._runs:
            self._runs[key] = _Run(self._ops.device, self._mixers, self._steps, x, states)
        self._run = self._runs[key]

    def run(self, first: int) -> int:
        """Go on with layer `first`. Returns the layer whose experts are chosen but not run; their number if all are."""
        if self._is_settled and not (self._pauses and self._watched):
            self._run.whole()
            return len(self._steps)
        if first == 0:
            self._go_on(0)
        for layer in range(first, len(self._steps)):
            step = self._steps[layer]
            self._ops.device.wait()  # the one of this layer
            routed = self._places[layer, step.look_at_choice()]
            if not routed.all() or (self._pauses and self._may_read_ahead(layer)):
                return layer
            step.take(self._x, self.choice(layer))
            codes = [*routed.tolist(), self._ops.forms.code_of(self._shared[layer])]
            step.run_codes(codes, range(len(codes)))
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
        """Let go of the tensors of all tokens so far."""
        if self._runs:
            self._ops.device.wait()  # what is recorded may still be under way
        for run in self._runs.values():
            for stretch in (run.whole, *run.parts):
                stretch.forget()
        self._runs = {}

    def _may_read_ahead(self, layer: int) -> bool:
        """Whether the caller may have something to read before the next layer asks for it."""
        if self._watched:
            return True
        if layer + 1 == len(self._steps):
            return False
        guessed = self._steps[layer].guessed
        return not guessed or not self._places[layer + 1, guessed].all()

    def _follow_guesses(self) -> None:
        """Let the routers whose guesses were asked for last time go with those of the layers before."""
        for layer, step in enumerate(self._steps):
            if step.follow_guess():
                for run in self._runs.values():
                    run.parts[layer].forget()
                    run.parts[layer + 1].forget()

    def _go_on(self, layer: int) -> None:
        """Hand over all that can be done before the experts of a layer are known."""
        self._run.parts[layer]()

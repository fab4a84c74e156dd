"""What a sequence remembers: keys and values of the attention layers, two states of each DeltaNet layer.

Allocated once for a fixed number of positions; float32, keys and values bf16 where the arithmetic is rounded anyway:
half the memory, and half of what a token of a long context reads. The recurrent state of a DeltaNet layer
cannot be cut back to an earlier position: a sequence only ever grows. What it was at some position can be kept and put
back: snapshots.py.

    state = SequenceState(architecture, max_positions=2048)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moepack.layout.architecture import LINEAR, Architecture
from moepack.layout.errors import UsageError

FLOAT_BYTES = 4
Zeros = Callable[..., torch.Tensor]  # makes a tensor of a shape (and dtype) where the operations keep their states


@dataclass
class DeltaState:
    """One DeltaNet layer: conv_state [W-1, C] are the inputs before the next token, recurrent_state [H, Dk, Dv]."""

    conv_state: torch.Tensor
    recurrent_state: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv_state, self.recurrent_state


@dataclass
class KeyValueCache:
    """One attention layer: keys and values [Hkv, max_positions, Dh], of which the first ones are filled."""

    keys: torch.Tensor
    values: torch.Tensor
    position: int = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def next_position(self) -> int:
        """The place of one more token, taken. Raises UsageError if the cache is full."""
        if self.position == self.keys.shape[1]:
            raise UsageError(f"the state holds {self.position} positions: make a new one for more")
        self.position += 1
        return self.position - 1

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [T, Hkv, Dh] of the next T positions and return all so far, [Hkv, S, Dh]."""
        start, end = self.position, self.position + keys.shape[0]
        self.keys[:, start:end] = keys.transpose(0, 1)
        self.values[:, start:end] = values.transpose(0, 1)
        self.position = end
        return self.keys[:, :end], self.values[:, :end]


class SequenceState:
    """All layers' state of one sequence of at most max_positions tokens, its keys and values of the given dtype."""

    def __init__(
        self,
        architecture: Architecture,
        max_positions: int,
        zeros: Zeros = torch.zeros,
        cache_dtype: torch.dtype = torch.float32,
    ):
        self.layers: list[DeltaState | KeyValueCache] = [
            _new_delta_state(architecture, zeros)
            if kind == LINEAR
            else _new_cache(architecture, max_positions, zeros, cache_dtype)
            for kind in architecture.layer_types
        ]
        self.tensors = [layer.tensors for layer in self.layers]  # filled in place, never exchanged

    def pieces(self, position: int | None = None) -> list[torch.Tensor]:
        """What the state consists of, each piece in one run of memory: views, not copies.

        position   as many as this of the caches' positions; default: what they hold
        """
        found: list[torch.Tensor] = []
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                found += [layer.conv_state, layer.recurrent_state]
            else:
                end = layer.position if position is None else position
                found += [head[:end] for cache in (layer.keys, layer.values) for head in cache]
        return found

    def fill(self, position: int, pieces: Iterable[torch.Tensor]) -> None:
        """Become the state after `position` tokens, from its pieces in the order of pieces().

        Raises UsageError, unchanged, if there is no room for so many.
        """
        for layer in self.layers:
            if isinstance(layer, KeyValueCache) and position > layer.keys.shape[1]:
                raise UsageError(f"the state holds {layer.keys.shape[1]} positions: make a new one for {position}")
        for own, given in zip(self.pieces(position), pieces):
            own.copy_(given)
        self._set_position(position)

    def clear(self) -> None:
        """Become the state before the first token."""
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.conv_state.zero_()
                layer.recurrent_state.zero_()
        self._set_position(0)

    def _set_position(self, position: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KeyValueCache):
                layer.position = position

    def next_position(self) -> int:
        """The place of one more token, taken in every cache. Raises UsageError if they are full."""
        caches = [layer for layer in self.layers if isinstance(layer, KeyValueCache)]
        return max((cache.next_position() for cache in caches), default=0)

    @staticmethod
    def size_bytes(architecture: Architecture, max_positions: int, cache_dtype: torch.dtype = torch.float32) -> int:
        """Memory that a state takes."""
        a = architecture
        delta = (a.linear_conv_kernel_dim - 1) * a.conv_dim
        delta += a.linear_num_value_heads * a.linear_key_head_dim * a.linear_value_head_dim
        cache = 2 * a.num_key_value_heads * a.head_dim * max_positions
        return sum(FLOAT_BYTES * delta if kind == LINEAR else cache_dtype.itemsize * cache for kind in a.layer_types)


def _new_delta_state(a: Architecture, zeros: Zeros) -> DeltaState:
    return DeltaState(
        zeros(a.linear_conv_kernel_dim - 1, a.conv_dim),
        zeros(a.linear_num_value_heads, a.linear_key_head_dim, a.linear_value_head_dim),
    )


def _new_cache(a: Architecture, max_positions: int, zeros: Zeros, dtype: torch.dtype) -> KeyValueCache:
    shape = (a.num_key_value_heads, max_positions, a.head_dim)
    if dtype == torch.float32:
        return KeyValueCache(zeros(*shape), zeros(*shape))
    return KeyValueCache(zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype))

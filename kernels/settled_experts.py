"""Experts of a prompt on a GPU that holds all of them for good: which token meets which expert is found there.

Where experts stream, a layer of a prompt waits for the router's ids: the processor lists each expert's tokens and hands
over what is there. Here it never learns the ids, and is ahead of the GPU by whole layers. The sums are the same bit for
bit: of each token the shared expert, then its others in the order of their ids.

    experts = SettledExperts(ops, codes, width=512)
    read_use = experts.add(out, x, expert_ids, expert_weights, shared_weights)
    tokens_of_each = read_use()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moepack.kernels import launches
from moepack.kernels.gpu_token import INT_BYTES

if TYPE_CHECKING:
    from moepack.kernels.gpu_ops import GpuOps


class SettledExperts:
    """The experts of a layer, for a device that has kernels of its own for prompts."""

    def __init__(self, ops: GpuOps, codes: Sequence[int], width: int):
        """
        codes   where each expert is (ExpertForms.code_of), the shared one last
        width   of the widest of them
        """
        self._ops, self._width, self._num_experts = ops, width, len(codes) - 1
        self._counts = ops.device.new_mailbox(self._num_experts * INT_BYTES)
        self._table = ops.forms.upload_places(codes)

    def add(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        shared_weights: torch.Tensor,
    ) -> Callable[[], np.ndarray]:
        """out [T, D] += the weighted experts of x [T, D], the shared one among them.

        expert_ids, weights   [T, K], int64 and float32: of the chosen
        shared_weights        [T]: of the shared expert

        Returns a function that waits for the choice and tells, int32 [E], how many tokens each expert had. To be called
        before the next prompt, or not at all.
        """
        device, own = self._ops.device, self._ops.device.prompt_launches
        ids, counts = expert_ids.to(torch.int32).contiguous(), self._counts.bytes.view(torch.int32)
        pairs = own.Pairs.of(device, *ids.shape, self._num_experts, self._ops.batch.experts)
        device.run(own.count_choices(ids, counts))
        chosen = (ids, weights.contiguous(), shared_weights.contiguous(), counts)
        device.run(own.order_pairs(*chosen, self._table, pairs))
        self._counts.fetch()
        wait = device.mark()
        banks, forms, inputs = self._ops.forms.banks, self._ops.forms.table, self._ops.split(x)
        for number, segments in enumerate(pairs.segments):
            first = number * pairs.part
            tokens = pairs.tokens[first : first + pairs.part]
            hidden, rows = device.empty(len(tokens), self._width), device.empty(len(tokens), x.shape[1])
            device.run(own.experts_gate_up_rows(banks, forms, segments, tokens, inputs, hidden))
            device.run(own.experts_down_rows(banks, forms, segments, self._ops.split(hidden), rows))
            device.run(launches.add_expert_rows(rows, pairs.order, pairs.weights, out, first))

        def read_use() -> np.ndarray:
            wait()
            return np.frombuffer(self._counts.look(), np.int32)

        return read_use

"""The experts of one token: chosen, run in the order in which they come off the disk, added in the order of their ids.

The order of a sum changes its last bits, so what was in memory must not decide it. A backend makes one step for each
layer (ops.expert_step) and keeps it.

    settings = StepSettings(num_chosen=8, width=512, eps=1e-6, bits={4})
    step = ops.expert_step(norm, router, shared_gate, settings)
    expert_ids = step.choose(x)
    step.run([expert], rows=[3])      # expert_ids[3], as soon as it is there
    step.add()                        # x += all of them, each with its weight
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from moepack.kernels.matrix import Expert, Matrix

Choice = tuple[torch.Tensor, list[int], list[float]]
Route = Callable[[torch.Tensor, Matrix, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepSettings:
    """What the steps of a layer have in common.

    num_chosen   experts of a token, the shared one not counted
    width        of the widest expert
    eps          of the norm
    bits         of all routed experts' matrices: by them and the width a GPU's kernels are chosen
    """

    num_chosen: int
    width: int
    eps: float
    bits: Collection[int]


class ExpertStep(ABC):
    """x [1, D] += the chosen experts of norm(x), for one layer and one token after the other."""

    @abstractmethod
    def choose(self, x: torch.Tensor) -> list[int]:
        """The ids of the experts of x [1, D]: row r is the expert of the r-th id, the last row the shared expert."""

    @abstractmethod
    def take(self, x: torch.Tensor, choice: Choice) -> list[int]:
        """The same, for a choice that has been made already."""

    @abstractmethod
    def guess(self, router: Matrix) -> list[int]:
        """The experts that another layer's router would choose for the same token, the likeliest first."""

    @abstractmethod
    def run(self, experts: Sequence[Expert], rows: Sequence[int]) -> None:
        """Run some of the experts, each once a token."""

    @abstractmethod
    def add(self) -> None:
        """Add all rows to x."""

    @abstractmethod
    def start_over(self) -> None:
        """Some experts have been run, others could not be read: all of them will be run once more."""


class HostExpertStep(ExpertStep):
    """By operations that have their results when they return."""

    def __init__(
        self,
        choose: Callable[[torch.Tensor], Choice],
        route: Route,
        run_experts: Callable[[torch.Tensor, Sequence[Expert], torch.Tensor, Sequence[int]], None],
        add_rows: Callable[[torch.Tensor, torch.Tensor, Sequence[float]], None],
    ):
        """
        choose   x -> norm(x) [1, D], the ids of its experts, and their weights with the shared expert's behind
        The others are operations of reference.py.
        """
        self._choose, self._route, self._run_experts, self._add_rows = choose, route, run_experts, add_rows

    def choose(self, x: torch.Tensor) -> list[int]:
        return self.take(x, self._choose(x))

    def take(self, x: torch.Tensor, choice: Choice) -> list[int]:
        self._x = x
        self._normed, expert_ids, weights = choice
        order = sorted(range(len(expert_ids)), key=expert_ids.__getitem__)
        self._weights = [*(weights[place] for place in order), weights[-1]]
        self._results = x.new_empty(len(weights), x.shape[1])
        return [expert_ids[place] for place in order]

    def guess(self, router: Matrix) -> list[int]:
        expert_ids, _ = self._route(self._normed, router, len(self._weights) - 1)
        return expert_ids[0].tolist()

    def run(self, experts: Sequence[Expert], rows: Sequence[int]) -> None:
        self._run_experts(self._normed, experts, self._results, rows)

    def start_over(self) -> None:
        """Nothing to do: every row is written anew."""

    def add(self) -> None:
        self._add_rows(self._x, self._results, self._weights)

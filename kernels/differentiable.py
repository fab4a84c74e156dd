"""The operations for learning: those of reference.py, with gradients at a bearable price, on any device of torch's.

reference.py can be differentiated as it stands, but works through attention by tiles, the delta rule by chunks and
experts one by one, and every piece is a step back as well. Here attention is torch's own, the chunks of the delta rule
are prepared all at once, and a layer's chosen experts are a few products of batches. Same arguments, same results
within float32; float32 throughout.

The rows of an operation may be several windows of equal length, one behind the other: `windows` says how many. Each is
a sequence of its own.

Limits: whole windows, from an empty state, which is not brought up to date. Memory grows with the window.

    ops = DifferentiableOps(torch.device("cuda"))
    ops.windows = 8
    out = ops.run_chosen(x, expert_ids, expert_weights, gate_proj, up_proj, down_proj)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moepack.kernels import reference
from moepack.kernels.slots import view_host_pages
from moepack.layout.pages import Pages

BATCH = 8  # experts with about as many tokens that are run together, padded to the busiest of them


class DifferentiableOps:
    """A backend for learning; what is not here is the reference's own.

    windows   of equal length, that the rows of what is given consist of
    """

    def __init__(self, device: torch.device = torch.device("cpu"), windows: int = 1):
        self.device, self.windows = device, windows

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def view_pages(self, pages: Pages) -> torch.Tensor:
        """Pages where the device reads them: on a GPU a copy."""
        return view_host_pages(pages).to(self.device)

    def causal_conv(self, x: torch.Tensor, weight: torch.Tensor, state: Any) -> torch.Tensor:
        """reference.causal_conv of every window [T, C]."""
        x, width = x.unflatten(0, (self.windows, -1)), weight.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        taps = [padded[:, tap : tap + x.shape[1]] * weight[:, tap] for tap in range(width)]
        return F.silu(sum(taps[1:], taps[0])).flatten(0, 1)

    def rope(self, x: torch.Tensor, first_position: int, theta: float, rotary_dim: int) -> torch.Tensor:
        """reference.rope of every window [T, H, Dh], each from first_position on."""
        by_position = x.unflatten(0, (self.windows, -1)).transpose(0, 1)  # [L, B, H, Dh]
        turned = reference.rope(by_position.flatten(1, 2), first_position, theta, rotary_dim)
        return turned.view(by_position.shape).transpose(0, 1).flatten(0, 1)

    def attention(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """reference.attention of whole windows: q [T, H, Dh], keys and values [Hkv, T, Dh]."""
        q = q.unflatten(0, (self.windows, -1)).transpose(1, 2)  # [B, H, L, Dh]
        keys, values = (x.unflatten(1, (self.windows, -1)).transpose(0, 1) for x in (keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).contiguous()

    def gated_delta(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: Any
    ) -> torch.Tensor:
        """reference.gated_delta of whole windows.

        A chunk turns the state S before it into move S + add; only that runs chunk by chunk.
        """
        (rows, heads, value_width), windows = v.shape, self.windows
        tokens, shared = rows // windows, heads // q.shape[1]
        padding = -tokens % reference.DELTA_CHUNK  # tokens that forget nothing and write nothing

        def by_chunk(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(windows, tokens, heads, -1)
            x = F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, reference.DELTA_CHUNK))
            return x.permute(1, 0, 3, 2, 4).flatten(1, 2)  # [N, B * H, C, .]

        q = by_chunk((_unit(q) * q.shape[-1] ** -0.5).repeat_interleave(shared, dim=1))
        k = by_chunk(_unit(k).repeat_interleave(shared, dim=1))
        v, beta, total = by_chunk(v), by_chunk(beta), by_chunk(decay)[..., 0].cumsum(-1)
        lower = torch.ones(reference.DELTA_CHUNK, reference.DELTA_CHUNK, dtype=torch.bool, device=v.device).tril()
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()  # [N, B*H, C, C]
        from_start = total.exp().unsqueeze(-1)
        system = ((beta * k) @ k.transpose(-1, -2) * between).tril(-1)
        right = torch.cat([beta * v, beta * k * from_start], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        new, old = solved[..., :value_width], solved[..., value_width:]
        late_keys = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
        adds = late_keys @ new  # [N, B*H, Dk, Dv]
        diagonal = torch.eye(k.shape[-1], device=k.device)
        moves = diagonal * total[..., -1].exp()[..., None, None] - late_keys @ old  # [N, B*H, Dk, Dk]
        states = [torch.zeros_like(adds[0])]
        for move, add in zip(moves[:-1].unbind(0), adds[:-1].unbind(0)):
            states.append(torch.baddbmm(add, move, states[-1]))
        before = torch.stack(states)  # [N, B*H, Dk, Dv]
        out = (q * from_start) @ before + (q @ k.transpose(-1, -2) * between) @ (new - old @ before)
        by_token = out.unflatten(1, (windows, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)  # [B, N * C, H, Dv]
        return by_token[:, :tokens].reshape(rows, heads, value_width).contiguous()

    def run_chosen(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> torch.Tensor:
        """The chosen experts of every token, weighted and summed: [T, D] -> [T, D].

        expert_ids, expert_weights   [T, K], as reference.route gives them
        gate_proj, up_proj           float32 [E, I, D]
        down_proj                    float32 [E, D, I]

        Gradients reach all but the ids. No sum depends on an order that a GPU chooses.
        """
        chosen, matrices = expert_ids.flatten(), (gate_proj, up_proj, down_proj)
        # [E, T * K]: along the rows in memory; down its columns a GPU adds up one after the other.
        before = F.one_hot(chosen, len(gate_proj)).T.contiguous().cumsum(1)
        order = before[:, -1].argsort(descending=True, stable=True)
        counts = before[:, -1][order].tolist()  # the one wait for a GPU
        batches = [counts[first : first + BATCH] for first in range(0, len(counts), BATCH)]
        rows = torch.tensor([batch[0] for batch in batches for _ in batch], device=x.device)  # of each expert, padded
        first_row = torch.empty_like(order).index_copy(0, order, rows.cumsum(0) - rows)
        places = first_row[chosen] + before.gather(0, chosen[None]).squeeze(0) - 1
        sizes = [len(batch) * batch[0] for batch in batches]
        inputs = x.new_zeros(sum(sizes), x.shape[1])
        inputs = inputs.index_copy(0, places, x.repeat_interleave(expert_ids.shape[1], 0))
        stacks = zip(*(matrix.index_select(0, order).transpose(1, 2).split(BATCH) for matrix in matrices))
        answers = []
        for batch, own, (gate, up, down) in zip(batches, inputs.split(sizes), stacks):
            own = own.view(len(batch), batch[0], x.shape[1])
            answers.append((F.silu(own @ gate) * (own @ up) @ down).flatten(0, 1))
        chosen_answers = torch.cat(answers).index_select(0, places).view(*expert_ids.shape, -1)
        return (chosen_answers * expert_weights.unsqueeze(-1)).sum(1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

"""The operations for learning: those of reference.py, with gradients at a bearable price.

reference.py can be differentiated as it stands, but works through attention by tiles, the delta rule by chunks and
experts one by one, and every piece is a step back as well. Here attention is torch's own, the chunks of the delta rule
are prepared all at once, and a layer's chosen experts are one step with its gradient written out. Same arguments, same
results within float32; float32 throughout.

Limits: a whole window at a time, from an empty state, which is not brought up to date. Memory grows with the window.

    ops = DifferentiableOps()
    out = ops.run_chosen(x, expert_ids, expert_weights, gate_proj, up_proj, down_proj)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moepack.kernels import reference


class DifferentiableOps:
    """A backend for learning; what is not here is the reference's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def attention(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """reference.attention of a whole window: q [T, H, Dh], keys and values [Hkv, T, Dh]."""
        q = q.transpose(0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, keys[None], values[None], is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def gated_delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """reference.gated_delta of a whole window.

        A chunk turns the state S before it into move S + add; only that runs chunk by chunk.
        """
        tokens, heads, value_width = v.shape
        chunk, shared = reference.DELTA_CHUNK, heads // q.shape[1]
        padding = -tokens % chunk  # tokens that forget nothing and write nothing

        def by_chunk(x: torch.Tensor) -> torch.Tensor:
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding))
            return x.view(-1, chunk, heads, x.shape[2] if x.ndim > 2 else 1).transpose(1, 2)  # [N, H, C, .]

        q = by_chunk((_unit(q) * q.shape[-1] ** -0.5).repeat_interleave(shared, dim=1))
        k = by_chunk(_unit(k).repeat_interleave(shared, dim=1))
        v, beta, total = by_chunk(v), by_chunk(beta), by_chunk(decay)[..., 0].cumsum(-1)
        lower = torch.ones(chunk, chunk, dtype=torch.bool).tril()
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()  # [N, H, C, C]
        from_start = total.exp().unsqueeze(-1)
        system = ((beta * k) @ k.transpose(-1, -2) * between).tril(-1)
        right = torch.cat([beta * v, beta * k * from_start], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        new, old = solved[..., :value_width], solved[..., value_width:]
        late_keys = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
        adds = late_keys @ new  # [N, H, Dk, Dv]
        moves = torch.eye(k.shape[-1]) * total[..., -1].exp()[..., None, None] - late_keys @ old  # [N, H, Dk, Dk]
        states = [state.clone()]
        for move, add in zip(moves[:-1].unbind(0), adds[:-1].unbind(0)):
            states.append(torch.baddbmm(add, move, states[-1]))
        before = torch.stack(states)  # [N, H, Dk, Dv]
        out = (q * from_start) @ before + (q @ k.transpose(-1, -2) * between) @ (new - old @ before)
        return out.transpose(1, 2).reshape(-1, heads, value_width)[:tokens]

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

        Gradients reach all but the ids.
        """
        out: torch.Tensor = _RunChosen.apply(x, expert_ids, expert_weights, gate_proj, up_proj, down_proj)  # type: ignore[no-untyped-call]
        return out


class _RunChosen(torch.autograd.Function):
    """Each expert on its tokens' rows, which are sorted by expert; every matrix's gradient is one product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor) -> Any:
        gate_proj, up_proj, down_proj = matrices
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=len(gate_proj)).tolist()
        tokens, by_row = order // ids.shape[1], weights.flatten()[order]
        rows = x[tokens]  # [T*K, D]
        answers, inner = torch.empty_like(rows), []
        for expert, (own, answer) in enumerate(zip(rows.split(counts), answers.split(counts))):
            gate, up = own @ gate_proj[expert].T, own @ up_proj[expert].T
            product = F.silu(gate) * up
            torch.matmul(product, down_proj[expert].T, out=answer)
            inner.append((gate, up, product))
        ctx.save_for_backward(x, order, tokens, by_row, rows, answers, *matrices)
        ctx.counts, ctx.inner, ctx.shape = counts, inner, weights.shape
        return torch.zeros_like(x).index_add_(0, tokens, answers * by_row[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, order, tokens, by_row, rows, answers, *matrices = ctx.saved_tensors
        gate_proj, up_proj, down_proj = matrices
        of_answers = gradients[0][tokens]  # [T*K, D]
        of_weights = torch.zeros(len(order)).index_copy_(0, order, (of_answers * answers).sum(-1)).view(ctx.shape)
        of_answers.mul_(by_row[:, None])
        of_gate_proj, of_up_proj, of_down_proj = (torch.zeros_like(matrix) for matrix in matrices)
        of_rows = torch.empty_like(rows)
        parts = zip(rows.split(ctx.counts), of_answers.split(ctx.counts), of_rows.split(ctx.counts))
        for expert, (own, of_answer, of_own) in enumerate(parts):
            gate, up, product = ctx.inner[expert]
            torch.matmul(of_answer.T, product, out=of_down_proj[expert])
            of_product = of_answer @ down_proj[expert]
            sigmoid = gate.sigmoid()
            of_up = of_product * gate * sigmoid
            of_gate = of_product * up * sigmoid * (1 + gate * (1 - sigmoid))
            torch.matmul(of_gate.T, own, out=of_gate_proj[expert])
            torch.matmul(of_up.T, own, out=of_up_proj[expert])
            torch.addmm(of_gate @ gate_proj[expert], of_up, up_proj[expert], out=of_own)
        of_x = torch.zeros_like(x).index_add_(0, tokens, of_rows)
        return of_x, None, of_weights, of_gate_proj, of_up_proj, of_down_proj


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

"""The demo model as it is trained: Qwen3.5-MoE (text) in plain PyTorch, whole sequences, no caches.

    tokens ─► embedding ─► 8 x [ norm ─► DeltaNet or attention ─► + ─► norm ─► experts ─► + ] ─► norm ─► head
                                         3 of 4      every 4th                                    └► MTP layer

Parameter names are those of the published checkpoints without their prefix. A sequence's length must be a
multiple of 64, the chunk of the DeltaNet rule. On a GPU the experts run as one grouped product in bfloat16;
on a CPU one by one in float32, which is for tests and small scores. This is the training code; runtime/ has
the model that runs.

Dimension letters: B sequences, T tokens, D hidden, H heads, E experts, K experts per token, C chunk, N
chunks.

    hidden, balance_loss = LanguageModel(Config()).hidden(token_ids)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import Config

CHUNK = 64  # tokens; the smallest length a sequence may be a multiple of


class RmsNorm(nn.Module):
    """Root-mean-square norm with a weight stored as its distance from 1."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension, in float32."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).type_as(x)


def _unit_length(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Run the gated delta rule over whole sequences, in chunks, in float32.

    query, key  [B, T, H, Dk]   normalized here
    value       [B, T, H, Dv]
    log_decay   [B, T, H]       logarithm of what is kept of the state, at most 0
    beta        [B, T, H]       how much of the old value under a key is replaced, 0 to 1
    returns     [B, T, H, Dv]

    The rule is S = exp(g) S + k (beta (v - (exp(g) S)ᵀ k))ᵀ, out = Sᵀ q. Inside a chunk the steps are one
    triangular system; between chunks the state moves by S' = move S + add. Raises ValueError if T is not a
    multiple of 64.
    """
    B, T, H, Dk = query.shape
    Dv, C, N = value.shape[-1], CHUNK, T // CHUNK
    if T % C:
        raise ValueError(f"sequence length must be a multiple of {C}, got {T}: pad it")

    def by_chunk(x: Tensor) -> Tensor:
        return x.float().view(B, N, C, H, -1).transpose(2, 3)  # [B, N, H, C, *]

    q, k, v = _unit_length(by_chunk(query)) * Dk**-0.5, _unit_length(by_chunk(key)), by_chunk(value)
    b, g = by_chunk(beta), by_chunk(log_decay)[..., 0].cumsum(-1)  # g: decay since the start of the chunk
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    gap = g[..., :, None] - g[..., None, :]
    decay = torch.where(lower, gap, torch.full_like(gap, -1e9)).exp()  # [B, N, H, C, C], 0 above the diagonal

    kept = g.exp()[..., None]
    system = ((k * b) @ k.transpose(-1, -2) * decay).tril(-1) + torch.eye(C, device=q.device)
    right_side = torch.cat([v * b, k * b * kept], -1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    new_value, old_key = solved[..., :Dv], solved[..., Dv:]

    total = g[..., -1]
    late_key = (k * (total[..., None] - g).exp()[..., None]).transpose(-1, -2)  # [B, N, H, Dk, C]
    move = torch.eye(Dk, device=q.device) * total.exp()[..., None, None] - late_key @ old_key
    moves = move.transpose(1, 2).reshape(B * H, N, Dk, Dk).unbind(1)
    adds = (late_key @ new_value).transpose(1, 2).reshape(B * H, N, Dk, Dv).unbind(1)
    states = [torch.zeros(B * H, Dk, Dv, device=q.device)]  # the state before each chunk
    for n in range(N - 1):
        states.append(torch.baddbmm(adds[n], moves[n], states[-1]))
    state = torch.stack(states, 1).view(B, H, N, Dk, Dv).transpose(1, 2)  # [B, N, H, Dk, Dv]

    written = new_value - old_key @ state
    out = (q * kept) @ state + (q @ k.transpose(-1, -2) * decay) @ written
    return out.transpose(2, 3).reshape(B, T, H, Dv)


class GatedDeltaNet(nn.Module):
    """Linear attention: a short convolution, the gated delta rule, and a gated norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.key_size = config.linear_num_key_heads * config.linear_key_head_dim
        self.value_size = config.linear_num_value_heads * config.linear_value_head_dim
        D, heads, channels = (
            config.hidden_size,
            config.linear_num_value_heads,
            2 * self.key_size + self.value_size,
        )
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, self.value_size, bias=False)
        self.in_proj_b = nn.Linear(D, heads, bias=False)
        self.in_proj_a = nn.Linear(D, heads, bias=False)
        taps = config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(config.linear_value_head_dim))
        self.out_proj = nn.Linear(self.value_size, D, bias=False)

    def _convolve(self, x: Tensor) -> Tensor:
        """Causal convolution per channel, written as a sum of shifted copies. [B, T, channels] both ways"""
        T, taps = x.shape[1], self.config.linear_conv_kernel_dim
        weight = self.conv1d.weight[:, 0].to(x.dtype)  # [channels, taps]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        out = padded[:, :T] * weight[:, 0]
        for i in range(1, taps):
            out = out + padded[:, i : i + T] * weight[:, i]
        return F.silu(out)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens. [B, T, D] both ways"""
        config, (B, T, _) = self.config, x.shape
        key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        parts = self._convolve(self.in_proj_qkv(x)).split([self.key_size, self.key_size, self.value_size], -1)
        copies = value_heads // key_heads
        query, key = (part.reshape(B, T, key_heads, -1).repeat_interleave(copies, 2) for part in parts[:2])
        value = parts[2].reshape(B, T, value_heads, -1)
        beta = self.in_proj_b(x).float().sigmoid()
        log_decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias.float())
        with torch.autocast(x.device.type, enabled=False):
            out = gated_delta_rule(query, key, value, log_decay, beta)  # [B, T, H, Dv]
        gate = self.in_proj_z(x).view(B, T, value_heads, -1).float()
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        out = out * self.norm.weight.float() * F.silu(gate)
        return self.out_proj(out.reshape(B, T, -1).to(x.dtype))


class GatedAttention(nn.Module):
    """Causal attention with fewer key than query heads, partial rotary positions and a gate on its output."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * size * 2, bias=False)  # query, gate per head
        self.k_proj = nn.Linear(D, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, D, bias=False)
        self.q_norm = RmsNorm(size, config.rms_norm_eps)
        self.k_norm = RmsNorm(size, config.rms_norm_eps)

    def _rotary(self, T: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, rotary size] for positions 0 to T-1."""
        size = int(self.config.head_dim * self.config.partial_rotary_factor)
        inverse = 1 / self.config.rope_theta ** (torch.arange(0, size, 2, device=like.device).float() / size)
        angles = torch.arange(T, device=like.device).float()[:, None] * inverse
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens. [B, T, D] both ways"""
        config, (B, T, _) = self.config, x.shape
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        query, gate = self.q_proj(x).view(B, T, heads, -1).chunk(2, -1)
        query = self.q_norm(query).transpose(1, 2)  # [B, H, T, head_dim]
        key = self.k_norm(self.k_proj(x).view(B, T, key_heads, -1)).transpose(1, 2)
        value = self.v_proj(x).view(B, T, key_heads, -1).transpose(1, 2)
        cos, sin = self._rotary(T, x)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        key, value = (part.repeat_interleave(heads // key_heads, 1) for part in (key, value))
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj((out.transpose(1, 2) * torch.sigmoid(gate)).reshape(B, T, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first part of each head by its position; the rest passes. [B, H, T, head_dim] both ways"""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    halves = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    return torch.cat([turned * cos + halves * sin, rest], -1)


# --- experts ---


class _SortRows(torch.autograd.Function):
    """Copy each token's row to its K experts, in the order of the experts; the gradient sums them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None, None


class _UnsortRows(torch.autograd.Function):
    """Put the rows back in the order of the tokens; both directions are plain gathers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix.

    x [rows, in], sorted by expert; weight [E, out, in]; ends [E] int32, the row after each expert's last
    returns [rows, out]
    """
    if x.is_cuda:
        if _grouped_mm is None:
            raise RuntimeError("a GPU needs torch.nn.functional.grouped_mm: install PyTorch 2.11 or later")
        return _grouped_mm(x, weight.transpose(1, 2), offs=ends)
    bounds = [0, *ends.tolist()]
    return torch.cat([x[bounds[e] : bounds[e + 1]] @ weight[e].T for e in range(len(weight))])


@dataclass(frozen=True)
class Routing:
    """What one pass through a mixture of experts did, for calibration and statistics."""

    ids: Tensor  # [tokens, K] the chosen experts
    weights: Tensor  # [tokens, K] their shares
    inputs: Tensor  # [tokens*K, D] what the experts read, sorted by expert
    inner: Tensor  # [tokens*K, I] what their down projections read
    ends: Tensor  # [E] the row after each expert's last


class SparseMoe(nn.Module):
    """Routed experts, K of E per token, and a gated expert that always works."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, E, inner = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.gate = nn.Linear(D, E, bias=False)  # the router; its name is that of the checkpoints
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * inner, D) * 0.02)
        self.experts.down_proj = nn.Parameter(torch.randn(E, D, inner) * 0.02)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(D, shared, bias=False),
                "up_proj": nn.Linear(D, shared, bias=False),
                "down_proj": nn.Linear(shared, D, bias=False),
            }
        )
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)
        self.recorder: Callable[[Routing], None] | None = None  # sees each pass, where somebody counts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output [B, T, D] and its balance loss, 1 when all experts are used alike."""
        config, shape = self.config, x.shape
        E, K = config.num_experts, config.num_experts_per_tok
        x = x.reshape(-1, shape[-1])  # [tokens, D]
        scores = self.gate(x).float().softmax(-1)
        weights, ids = scores.topk(K, -1)  # [tokens, K]
        weights = weights / weights.sum(-1, keepdim=True)

        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = (flat[:, None] == torch.arange(E, device=x.device)).sum(0)
        ends = counts.cumsum(0).to(torch.int32)
        balance_loss = E * (counts.float() / len(flat) * scores.mean(0)).sum()

        rows = _SortRows.apply(x.to(torch.bfloat16) if x.is_cuda else x, order, inverse, K)  # [tokens*K, D]
        gate, up = grouped_linear(rows, self.experts.gate_up_proj.to(rows.dtype), ends).chunk(2, -1)
        inner = F.silu(gate) * up
        out = grouped_linear(inner, self.experts.down_proj.to(rows.dtype), ends)
        if self.recorder is not None:
            self.recorder(Routing(ids, weights, rows, inner, ends))
        out = _UnsortRows.apply(out, order, inverse).view(len(x), K, -1)
        out = (out * weights.to(out.dtype)[..., None]).sum(1)

        shared = self.shared_expert
        always = shared["down_proj"](F.silu(shared["gate_proj"](x)) * shared["up_proj"](x))
        out = out + torch.sigmoid(self.shared_expert_gate(x)) * always
        return out.view(shape), balance_loss


# --- the whole model ---


class DecoderLayer(nn.Module):
    """Token mixing and experts, each behind a norm and added to what came in."""

    def __init__(self, config: Config, layer_type: str):
        super().__init__()
        self.is_linear = layer_type == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoe(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output [B, T, D] and the balance loss of its experts."""
        mix = self.linear_attn if self.is_linear else self.self_attn
        x = x + mix(self.input_layernorm(x))
        out, balance_loss = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance_loss


class MtpHead(nn.Module):
    """One more layer that predicts the token after the next (multi-token prediction)."""

    def __init__(self, config: Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, "full_attention")])
        self.norm = RmsNorm(size, eps)
        self.pre_fc_norm_embedding = RmsNorm(size, eps)
        self.pre_fc_norm_hidden = RmsNorm(size, eps)


class LanguageModel(nn.Module):
    """The demo model with its output head and MTP layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, config.layer_type(i)) for i in range(config.num_hidden_layers)]
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MtpHead(config)
        self._run_layer: Callable[..., tuple[Tensor, Tensor]] = DecoderLayer.forward
        self._initialize()

    def _initialize(self) -> None:
        """Draw the weights: matrices that end a residual branch are smaller, the deeper the model."""
        ends = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
        for name, parameter in self.named_parameters():
            if name.endswith(ends):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def compile_layers(self) -> None:
        """Compile the layers for their one shape; the loop over them stays plain."""
        self._run_layer = torch.compile(DecoderLayer.forward, dynamic=False)

    def hidden(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed output of the last layer [B, T, D] for ids [B, T], and the mean balance loss."""
        x = self.embed_tokens(token_ids)
        x = x.to(torch.bfloat16) if x.is_cuda else x
        losses = []
        for layer in self.layers:
            x, loss = self._run_layer(layer, x)
            losses.append(loss)
        return self.norm(x), torch.stack(losses).mean()

    def mtp_hidden(self, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the MTP layer's output [B, T, D] and balance loss.

        Position t sees the hidden state of t and token t+1 and predicts token t+2; the last two are void.
        """
        mtp = self.mtp
        following = self.embed_tokens(torch.roll(token_ids, -1, 1)).to(hidden.dtype)
        x = mtp.fc(torch.cat([mtp.pre_fc_norm_embedding(following), mtp.pre_fc_norm_hidden(hidden)], -1))
        x, balance_loss = self._run_layer(mtp.layers[0], x)
        return mtp.norm(x), balance_loss

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return logits [B, T, vocab_size] for ids [B, T]."""
        with torch.autocast(token_ids.device.type, dtype=torch.bfloat16, enabled=token_ids.is_cuda):
            hidden, _ = self.hidden(token_ids)
            return self.lm_head(hidden)

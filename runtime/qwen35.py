"""Qwen3.5-MoE, the text model, from token ids to logits. Reads top to bottom; the SSD is one line of it.

    token ids ─► embedding ─► layers ─► norm ─► head ─► logits

    a layer:   x ─► norm ─► mixer ─►(+)─► norm ─► experts ─►(+)─►
               mixer: gated DeltaNet, every fourth layer gated attention
               experts: K of E chosen by the router, streamed; one shared expert, resident

Symbols: T tokens, D hidden_size, H heads, Dh head size, I expert width, E experts, K chosen experts, V vocabulary.

| tensor                                       | shape                                       |
| -------------------------------------------- | ------------------------------------------- |
| in_proj_qkv, in_proj_z                       | [q + k + v, D], [v, D]                      |
| in_proj_a, in_proj_b                         | [value heads, D]: decay, strength           |
| conv1d                                       | [q + k + v, 1, 4], the last tap is now      |
| q_proj                                       | [H * 2 * Dh, D]: per head query, then gate  |
| routed expert: gate_proj, up_proj, down_proj | [I, D], [I, D], [D, I]                      |

Computes in float32. All K experts that the router picks are run, with the weights it gives them.

    model = Qwen35(architecture, weights, store, ops)
    logits = model.logits(model(token_ids, state))
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from moepack.kernels.matrix import Expert
from moepack.layout.architecture import LINEAR, Architecture
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.resident import ResidentWeights
from moepack.runtime.state import DeltaState, KeyValueCache, SequenceState


class GatedDeltaNet:
    """Linear attention with a decaying memory: constant state, whatever the context."""

    def __init__(self, stem: str, a: Architecture, weights: ResidentWeights, ops: ModuleType):
        self.a, self.ops = a, ops
        self.in_proj_qkv = weights.matrix(f"{stem}.in_proj_qkv")
        self.in_proj_z = weights.matrix(f"{stem}.in_proj_z")
        self.in_proj_a = weights.matrix(f"{stem}.in_proj_a")
        self.in_proj_b = weights.matrix(f"{stem}.in_proj_b")
        self.conv = weights.vector(f"{stem}.conv1d.weight").squeeze(1)  # [C, 4]
        self.a_log = weights.vector(f"{stem}.A_log")
        self.dt_bias = weights.vector(f"{stem}.dt_bias")
        self.norm = weights.vector(f"{stem}.norm.weight")
        self.out_proj = weights.matrix(f"{stem}.out_proj")

    def __call__(self, x: torch.Tensor, state: DeltaState) -> torch.Tensor:
        a, ops, tokens = self.a, self.ops, x.shape[0]
        mixed = ops.causal_conv(ops.linear(x, self.in_proj_qkv), self.conv, state.conv_state)
        q, k, v = mixed.split([a.linear_key_dim, a.linear_key_dim, a.linear_value_dim], dim=-1)
        shared = a.linear_num_value_heads // a.linear_num_key_heads  # value head h uses key head h // shared
        q, k = (heads.view(tokens, a.linear_num_key_heads, -1).repeat_interleave(shared, dim=1) for heads in (q, k))
        decay, beta = ops.decay_and_strength(
            ops.linear(x, self.in_proj_a), ops.linear(x, self.in_proj_b), self.a_log, self.dt_bias
        )
        v = v.reshape(tokens, a.linear_num_value_heads, -1)
        out = ops.gated_delta(q, k, v, decay, beta, state.recurrent_state)  # [T, H, Dv]
        gate = ops.linear(x, self.in_proj_z).view(out.shape)
        return ops.linear(ops.gated_rms_norm(out, gate, self.norm, a.rms_norm_eps).flatten(1), self.out_proj)


class GatedAttention:
    """Grouped-query attention with partial rope, normalized queries and keys, and a gate on its output."""

    def __init__(self, stem: str, a: Architecture, weights: ResidentWeights, ops: ModuleType):
        self.a, self.ops = a, ops
        self.q_proj = weights.matrix(f"{stem}.q_proj")
        self.k_proj = weights.matrix(f"{stem}.k_proj")
        self.v_proj = weights.matrix(f"{stem}.v_proj")
        self.o_proj = weights.matrix(f"{stem}.o_proj")
        self.q_norm = weights.vector(f"{stem}.q_norm.weight")
        self.k_norm = weights.vector(f"{stem}.k_norm.weight")

    def __call__(self, x: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        a, ops, tokens, position = self.a, self.ops, x.shape[0], cache.position
        q, gate = ops.linear(x, self.q_proj).view(tokens, a.num_attention_heads, -1).chunk(2, dim=-1)
        k = ops.linear(x, self.k_proj).view(tokens, a.num_key_value_heads, -1)
        v = ops.linear(x, self.v_proj).view(tokens, a.num_key_value_heads, -1)
        q = ops.rope(ops.rms_norm(q, self.q_norm, a.rms_norm_eps), position, a.rope_theta, a.rotary_dim)
        k = ops.rope(ops.rms_norm(k, self.k_norm, a.rms_norm_eps), position, a.rope_theta, a.rotary_dim)
        keys, values = cache.append(k, v)
        out = ops.attention(q, keys, values) * gate.sigmoid()  # [T, H, Dh]
        return ops.linear(out.flatten(1), self.o_proj)


class SparseMoe:
    """The router's K experts of a token, weighted, and the shared expert through its gate."""

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: ModuleType):
        stem = f"model.layers.{layer}.mlp"
        self.layer, self.a, self.store, self.ops = layer, a, store, ops
        self.router = weights.matrix(f"{stem}.gate")
        self.shared_expert: Expert = weights.expert(f"{stem}.shared_expert")
        self.shared_expert_gate = weights.matrix(f"{stem}.shared_expert_gate")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ops = self.ops
        expert_ids, expert_weights = ops.route(x, self.router, self.a.num_experts_per_tok)  # [T, K] each
        out = ops.linear(x, self.shared_expert_gate).sigmoid() * ops.run_expert(x, self.shared_expert)
        chosen = expert_ids.unique().tolist()
        for expert_id, expert in self.store.fetch(self.layer, chosen):  # the seam to the SSD
            token, choice = (expert_ids == expert_id).nonzero(as_tuple=True)
            weighted = ops.run_expert(x[token], expert) * expert_weights[token, choice].unsqueeze(-1)
            out.index_add_(0, token, weighted)
        return out


class DecoderLayer:
    """Mixer and experts, each behind a norm and added to the stream."""

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: ModuleType):
        stem = f"model.layers.{layer}"
        self.a, self.ops = a, ops
        self.input_norm = weights.vector(f"{stem}.input_layernorm.weight")
        self.post_norm = weights.vector(f"{stem}.post_attention_layernorm.weight")
        self.mixer: Callable[[torch.Tensor, Any], torch.Tensor] = (
            GatedDeltaNet(f"{stem}.linear_attn", a, weights, ops)
            if a.layer_types[layer] == LINEAR
            else GatedAttention(f"{stem}.self_attn", a, weights, ops)
        )
        self.experts = SparseMoe(layer, a, weights, store, ops)

    def __call__(self, x: torch.Tensor, state: DeltaState | KeyValueCache) -> torch.Tensor:
        x = x + self.mixer(self.ops.rms_norm(x, self.input_norm, self.a.rms_norm_eps), state)
        return x + self.experts(self.ops.rms_norm(x, self.post_norm, self.a.rms_norm_eps))


class Qwen35:
    """The whole text model over resident weights and a store of experts."""

    def __init__(self, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: ModuleType):
        self.a, self.ops = a, ops
        self.embedding = weights.matrix("model.embed_tokens")
        self.layers = [DecoderLayer(layer, a, weights, store, ops) for layer in range(a.num_hidden_layers)]
        self.norm = weights.vector("model.norm.weight")
        self.head = self.embedding if a.tie_word_embeddings else weights.matrix("lm_head")

    def __call__(self, token_ids: torch.Tensor, state: SequenceState) -> torch.Tensor:
        """Run tokens [T] after what the state has seen; returns the normed hidden states [T, D]."""
        x = self.ops.embed(self.embedding, token_ids)
        for layer, layer_state in zip(self.layers, state.layers):
            x = layer(x, layer_state)
        return self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token: [T, D] -> [T, V], rows beyond the tokenizer included."""
        return self.ops.linear(hidden, self.head)

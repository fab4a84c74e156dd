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

State and activations are float32. All K experts that the router picks are run, with the weights it gives them.

    model = Qwen35(architecture, weights, store, ops)
    logits = model.logits(model(token_ids, state))
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.architecture import LINEAR, Architecture
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.resident import ResidentWeights
from moepack.runtime.state import DeltaState, KeyValueCache, SequenceState

SCAN_CHOICES = 4  # for each expert, in a prompt: evenly spread, 2 % of the experts are then chosen by nobody
Observer = Callable[[int, Expert, torch.Tensor, torch.Tensor], None]  # expert id, expert, inputs [n, D], weights [n]


class GatedDeltaNet:
    """Linear attention with a decaying memory: constant state, whatever the context."""

    def __init__(self, stem: str, a: Architecture, weights: ResidentWeights, ops: Any):
        self.a, self.ops = a, ops
        self.in_projs = [weights.matrix(f"{stem}.in_proj_{name}") for name in ("qkv", "z", "a", "b")]
        self.conv = weights.vector(f"{stem}.conv1d.weight").squeeze(1)  # [C, 4]
        self.a_log = weights.vector(f"{stem}.A_log")
        self.dt_bias = weights.vector(f"{stem}.dt_bias")
        self.norm = weights.vector(f"{stem}.norm.weight")
        self.out_proj = weights.matrix(f"{stem}.out_proj")

    def __call__(self, x: torch.Tensor, state: DeltaState) -> torch.Tensor:
        a, ops, tokens = self.a, self.ops, x.shape[0]
        qkv, gate, decay, strength = ops.linears(x, self.in_projs)
        mixed = ops.causal_conv(qkv, self.conv, state.conv_state)
        q, k, v = mixed.split([a.linear_key_dim, a.linear_key_dim, a.linear_value_dim], dim=-1)
        q, k = (heads.unflatten(-1, (a.linear_num_key_heads, -1)) for heads in (q, k))
        v = v.unflatten(-1, (a.linear_num_value_heads, -1))
        decay, strength = ops.decay_and_strength(decay, strength, self.a_log, self.dt_bias)
        out = ops.gated_delta(q, k, v, decay, strength, state.recurrent_state)  # [T, H, Dv]
        out = ops.gated_rms_norm(out, gate.view(out.shape), self.norm, a.rms_norm_eps)
        return ops.linear(out.view(tokens, -1), self.out_proj)

    def fuse(self, norm: torch.Tensor) -> Any:
        """One token, norm and sum included, as a part of the backend's own run: x += self(norm(x))."""
        a = self.a
        weights = (norm, self.in_projs, self.conv, self.a_log, self.dt_bias, self.norm, self.out_proj)
        return self.ops.fuse_delta_net(*weights, a.linear_num_key_heads, a.linear_num_value_heads, a.rms_norm_eps)


class GatedAttention:
    """Grouped-query attention with partial rope, normalized queries and keys, and a gate on its output."""

    def __init__(self, stem: str, a: Architecture, weights: ResidentWeights, ops: Any):
        self.a, self.ops = a, ops
        self.in_projs = [weights.matrix(f"{stem}.{name}_proj") for name in ("q", "k", "v")]
        self.o_proj = weights.matrix(f"{stem}.o_proj")
        self.q_norm = weights.vector(f"{stem}.q_norm.weight")
        self.k_norm = weights.vector(f"{stem}.k_norm.weight")

    def __call__(self, x: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        a, ops, tokens, position = self.a, self.ops, x.shape[0], cache.position
        q, k, v = ops.linears(x, self.in_projs)
        q, gate = q.view(tokens, a.num_attention_heads, -1).chunk(2, dim=-1)
        k, v = (heads.view(tokens, a.num_key_value_heads, -1) for heads in (k, v))
        q = ops.rope(ops.rms_norm(q, self.q_norm, a.rms_norm_eps), position, a.rope_theta, a.rotary_dim)
        k = ops.rope(ops.rms_norm(k, self.k_norm, a.rms_norm_eps), position, a.rope_theta, a.rotary_dim)
        keys, values = cache.append(k, v)
        out = ops.gated(ops.attention(q, keys, values), gate)  # [T, H, Dh]
        return ops.linear(out.view(tokens, -1), self.o_proj)

    def fuse(self, norm: torch.Tensor) -> Any:
        """One token, norm and sum included, as a part of the backend's own run: x += self(norm(x))."""
        a = self.a
        weights = (norm, self.in_projs, self.q_norm, self.k_norm, self.o_proj)
        sizes = (a.num_attention_heads, a.num_key_value_heads, a.rotary_dim, a.rope_theta, a.rms_norm_eps)
        return self.ops.fuse_attention(*weights, *sizes)


class SparseMoe:
    """The router's K experts of a token, weighted, and the shared expert through its gate, added to the stream."""

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: Any):
        stem = f"model.layers.{layer}"
        self.layer, self.a, self.store, self.ops = layer, a, store, ops
        self.norm = weights.vector(f"{stem}.post_attention_layernorm.weight")
        self.router = weights.matrix(f"{stem}.mlp.gate")
        self.shared_expert: Expert = weights.expert(f"{stem}.mlp.shared_expert")
        self.shared_expert_gate = weights.matrix(f"{stem}.mlp.shared_expert_gate")
        self.next_router: Matrix | None = None  # set where the next layer's experts are to be guessed
        self.scans_ahead = False  # whether those of the next layer are read early when a prompt needs them all
        width = max(a.moe_intermediate_size, a.shared_expert_intermediate_size)
        sizes = (a.num_experts_per_tok, width, a.rms_norm_eps)
        self.step = ops.expert_step(self.norm, self.router, self.shared_expert_gate, *sizes)
        self.observe: Observer | None = None  # shown what each expert of several tokens reads (calibrate.py)

    def fuse(self) -> Any:
        """The choice of one token's experts, norm included, as a part of the backend's own run."""
        sizes = (self.a.num_experts_per_tok, self.a.rms_norm_eps)
        return self.ops.fuse_router(self.norm, self.router, self.shared_expert_gate, *sizes)

    def add_one_token(self, x: torch.Tensor, choice: Any = None) -> None:
        """x [1, D] += experts(norm(x)). They may arrive in any order; they are added in that of the ids.

        choice   norm(x), ids and weights, where the backend has chosen them by itself
        """
        chosen = self.step.take(x, choice) if choice else self.step.choose(x)
        row_of = {expert_id: row for row, expert_id in enumerate(chosen)}
        batches = self.store.fetch(self.layer, chosen)  # the seam to the SSD: reads start here
        if self.next_router is not None:
            self.store.prefetch(self.layer + 1, self.step.guess(self.next_router))
        waiting, rows = [self.shared_expert], [len(chosen)]  # needs no read: it goes with what is in memory
        for batch in batches:  # first what is in memory, be it nothing, then what arrives
            waiting += [expert for _, expert in batch]
            rows += [row_of[expert_id] for expert_id, _ in batch]
            self.step.run(waiting, rows)
            waiting, rows = [], []
        self.step.add()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x + experts(norm(x)) for T tokens: each expert once, in the order of ids, which is the file's."""
        normed = self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps)
        expert_ids, expert_weights = self.ops.route(normed, self.router, self.a.num_experts_per_tok)  # [T, K] each
        shared_weights = self.ops.linear(normed, self.shared_expert_gate).sigmoid().squeeze(-1)  # [T]
        out = torch.zeros_like(x)
        everyone = torch.arange(len(x))
        self.ops.add_experts(out, normed, [self.shared_expert], [len(x)], everyone, shared_weights)
        chosen_ids = expert_ids.flatten().cpu()  # the one wait for a GPU in a layer
        counts = chosen_ids.bincount(minlength=self.a.num_experts).tolist()
        by_expert = chosen_ids.argsort(stable=True)
        tokens, weights = by_expert // expert_ids.shape[1], expert_weights.flatten()[by_expert]
        first = 0
        chosen = [expert_id for expert_id, count in enumerate(counts) if count]
        for batch in self.store.fetch(self.layer, chosen, in_order=True):  # the seam to the SSD
            sizes = [counts[expert_id] for expert_id, _ in batch]
            part = slice(first, first + sum(sizes))
            if self.observe is not None:
                for (expert_id, expert), at, some in zip(batch, tokens[part].split(sizes), weights[part].split(sizes)):
                    self.observe(expert_id, expert, normed[at], some)
            self.ops.add_experts(out, normed, [expert for _, expert in batch], sizes, tokens[part], weights[part])
            first += sum(sizes)
        if self.scans_ahead and chosen_ids.numel() >= SCAN_CHOICES * self.a.num_experts:
            self.store.prefetch(self.layer + 1, range(self.a.num_experts), is_scan=True)  # beside the next mixer
        return x + out


class DecoderLayer:
    """Mixer and experts, each behind a norm and added to the stream."""

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: Any):
        stem = f"model.layers.{layer}"
        self.a, self.ops = a, ops
        self.norm = weights.vector(f"{stem}.input_layernorm.weight")
        self.mixer: Any = (
            GatedDeltaNet(f"{stem}.linear_attn", a, weights, ops)
            if a.layer_types[layer] == LINEAR
            else GatedAttention(f"{stem}.self_attn", a, weights, ops)
        )
        self.experts = SparseMoe(layer, a, weights, store, ops)

    def __call__(self, x: torch.Tensor, state: DeltaState | KeyValueCache) -> torch.Tensor:
        x = x + self.mixer(self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps), state)
        if len(x) > 1:
            return self.experts(x)
        self.experts.add_one_token(x)
        return x


class Qwen35:
    """The whole text model over resident weights and a store of experts."""

    def __init__(
        self,
        a: Architecture,
        weights: ResidentWeights,
        store: ExpertStore,
        ops: Any,
        prefetch: bool = False,
        scans_ahead: bool = False,
    ):
        self.a, self.ops, self.store, self.prefetches = a, ops, store, prefetch
        self.embedding = weights.matrix("model.embed_tokens")
        self.layers = layers = [DecoderLayer(layer, a, weights, store, ops) for layer in range(a.num_hidden_layers)]
        for layer, following in pairwise(layers):
            layer.experts.scans_ahead = scans_ahead
            layer.experts.next_router = following.experts.router if prefetch else None
        self.fused: Any = None
        if ops.fuses_tokens:
            mixers = [layer.mixer.fuse(layer.norm) for layer in layers]
            routers = [layer.experts.fuse() for layer in layers]
            self.fused = ops.fuse_layers(mixers, routers, [layer.experts.shared_expert for layer in layers])
        self.norm = weights.vector("model.norm.weight")
        self.head = self.embedding if a.tie_word_embeddings else weights.matrix("lm_head")

    def __call__(
        self, token_ids: torch.Tensor, state: SequenceState, after_layer: Callable[[], object] = lambda: None
    ) -> torch.Tensor:
        """Run tokens [T] after what the state has seen; returns the normed hidden states [T, D]."""
        x = self.ops.embed(self.embedding, token_ids)
        if self.fused and len(x) == 1:
            self._run_fused(x, state)
        else:
            for layer, layer_state in zip(self.layers, state.layers):
                x = layer(x, layer_state)
                after_layer()
        return self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps)

    def _run_fused(self, x: torch.Tensor, state: SequenceState) -> None:
        """x [1, D] through all layers: the backend goes on by itself from a layer whose experts are not all in memory.

        Where experts are read ahead it pauses at each layer instead, so that reads start as early as can be.
        """
        self.fused.start(x, state.tensors, self.store.places, state.next_position(), self.prefetches)
        done = 0
        while (reached := self.fused.run(done)) < len(self.layers):
            self._note_fused(done, reached)
            self.layers[reached].experts.add_one_token(x, self.fused.choice(reached))
            done = reached + 1
        self._note_fused(done, reached)

    def _note_fused(self, done: int, reached: int) -> None:
        if self.store.holds_everything:
            self.store.counts.hits += (reached - done) * self.a.num_experts_per_tok
            return
        for layer in range(done, reached):
            self.store.note_use(layer, self.fused.ids(layer))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token: [T, D] -> [T, V], rows beyond the tokenizer included."""
        return self.ops.linear(hidden, self.head)

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

Several sequences may take a step together: layer by layer, with one fetch for the experts of all. Each has a lane of
its own, where its token is computed as it would be alone.

    model = Qwen35(architecture, weights, store, ops)
    logits = model.logits(model(token_ids, state))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise, starmap
from typing import Any

import numpy as np
import torch

from moepack.kernels.expert_step import StepSettings
from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.architecture import LINEAR, Architecture
from moepack.layout.errors import MoepackError
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.resident import ResidentWeights
from moepack.runtime.state import DeltaState, KeyValueCache, SequenceState

SCAN_CHOICES = 4  # for each expert, in a prompt: evenly spread, 2 % of the experts are then chosen by nobody
LAYERS_AHEAD = 4  # of a prompt: the GPU never lacks work, and who breaks it off or watches it is not far ahead
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

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: Any, lanes: int):
        stem = f"model.layers.{layer}"
        self.layer, self.a, self.store, self.ops = layer, a, store, ops
        self.norm = weights.vector(f"{stem}.post_attention_layernorm.weight")
        self.router = weights.matrix(f"{stem}.mlp.gate")
        self.shared_expert: Expert = weights.expert(f"{stem}.mlp.shared_expert")
        self.shared_expert_gate = weights.matrix(f"{stem}.mlp.shared_expert_gate")
        self.next_router: Matrix | None = None  # set where the next layer's experts are to be guessed
        self.scans_ahead = False  # whether those of the next layer are read early when a prompt needs them all
        self.width = max(a.moe_intermediate_size, a.shared_expert_intermediate_size)
        settings = StepSettings(a.num_experts_per_tok, self.width, a.rms_norm_eps, store.expert_bits(layer))
        parts = (self.norm, self.router, self.shared_expert_gate, settings)
        self.steps = [ops.expert_step(*parts) for _ in range(lanes)]
        self.observe: Observer | None = None  # shown what each expert of several tokens reads (calibrate.py)
        self._settled: Any = None  # the backend's own way with a prompt, once every expert is in memory
        self._may_settle: bool = ops.settles
        self._read_use: Callable[[], np.ndarray] | None = None  # tokens by expert, of a prompt that went that way

    def fuse(self) -> Any:
        """The choice of one token's experts, norm included, as a part of the backend's own run."""
        sizes = (self.a.num_experts_per_tok, self.a.rms_norm_eps)
        return self.ops.fuse_router(self.norm, self.router, self.shared_expert_gate, *sizes)

    def add_one_token(self, x: torch.Tensor, choice: Any = None) -> None:
        """x [1, D] += experts(norm(x)). They may arrive in any order; they are added in that of the ids.

        choice   norm(x), ids and weights, where the backend has chosen them by itself
        """
        self._run({0: self._choose(0, x, choice)})
        self.steps[0].add()

    def add_tokens(self, xs: dict[int, torch.Tensor], choices: dict[int, Any]) -> dict[int, MoepackError]:
        """The same for a token in each of several lanes, with one fetch for all.

        Returns the lanes whose experts cannot be read, each with its error; their x is left as it is.
        """
        chosen = {lane: self._choose(lane, x, choices.get(lane)) for lane, x in xs.items()}
        try:
            self._run(chosen)
            failed: dict[int, MoepackError] = {}
        except MoepackError:  # who can do without what cannot be read is to go on: once more, each alone
            failed = dict(filter(None, starmap(self._run_alone, chosen.items())))
        for lane in chosen.keys() - failed.keys():
            self.steps[lane].add()
        return failed

    def _run_alone(self, lane: int, expert_ids: list[int]) -> tuple[int, MoepackError] | None:
        self.steps[lane].start_over()
        try:
            self._run({lane: expert_ids})
        except MoepackError as error:
            return lane, error
        return None

    def _choose(self, lane: int, x: torch.Tensor, choice: Any) -> list[int]:
        return self.steps[lane].take(x, choice) if choice else self.steps[lane].choose(x)

    def _run(self, chosen: dict[int, list[int]]) -> None:
        """Run the experts that the lanes have chosen, each as soon as it is there, for all who want it."""
        takers: dict[int, list[tuple[int, int]]] = {}  # by expert: lanes, and its row in each one's step
        for lane, expert_ids in chosen.items():
            for row, expert_id in enumerate(expert_ids):
                takers.setdefault(expert_id, []).append((lane, row))
        batches = self.store.fetch(self.layer, list(takers))  # the seam to the SSD: reads start here
        self.store.counts.hits += sum(map(len, chosen.values())) - len(takers)  # one lane's miss is the next one's hit
        if self.next_router is not None:
            guesses = [self.steps[lane].guess(self.next_router) for lane in chosen]
            self.store.prefetch(self.layer + 1, list(chain.from_iterable(zip(*guesses))))  # each one's likeliest first
        elif self.scans_ahead and self.store.has_room_for_all:
            self.store.fill()
        # The shared expert needs no read: it goes with what is in memory.
        work = {lane: ([self.shared_expert], [len(expert_ids)]) for lane, expert_ids in chosen.items()}
        for batch in batches:  # first what is in memory, be it nothing, then what arrives
            for expert_id, expert in batch:
                for lane, row in takers[expert_id]:
                    experts, rows = work.setdefault(lane, ([], []))
                    experts.append(expert)
                    rows.append(row)
            for lane, (experts, rows) in work.items():
                self.steps[lane].run(experts, rows)
            work = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x + experts(norm(x)) for T tokens: each expert once, in the order of ids, which is the file's."""
        normed = self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps)
        expert_ids, weights = self.ops.route(normed, self.router, self.a.num_experts_per_tok)  # [T, K] each
        out = torch.zeros_like(x)
        if self._is_settled():
            self._read_use = self._settled.add(out, normed, expert_ids, weights, self._weigh_shared(normed))
        else:
            self._add_fetched(out, normed, expert_ids, weights)
        return x + out

    def _add_fetched(
        self, out: torch.Tensor, normed: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> None:
        """Add the experts as the store brings them."""
        read_ids = self.ops.begin_read(expert_ids)
        everyone, shared_weights = torch.arange(len(out)), self._weigh_shared(normed)
        self.ops.add_experts(out, normed, [self.shared_expert], [len(out)], everyone, shared_weights)
        chosen_ids = read_ids().flatten()  # the one wait for a GPU in a layer, which has the shared expert to do
        counts = chosen_ids.bincount(minlength=self.a.num_experts).tolist()
        # numpy sorts short integers by their digits, ten times as fast as torch.
        by_expert = torch.from_numpy(chosen_ids.numpy().astype(np.uint16).argsort(kind="stable"))
        tokens, weights = by_expert // expert_ids.shape[1], expert_weights.flatten()[self.ops.upload(by_expert)]
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

    def _weigh_shared(self, normed: torch.Tensor) -> torch.Tensor:
        """[T]"""
        return self.ops.linear(normed, self.shared_expert_gate).sigmoid().squeeze(-1)

    def _is_settled(self) -> bool:
        """Whether the backend finds all experts by itself: then nothing is fetched, and nobody waits for the ids."""
        if self.observe is not None or not self.store.keeps(self.layer):
            return False
        if self._may_settle:
            places = self.store.places[self.layer].tolist()
            self._settled = self.ops.settle_experts(places, self.shared_expert, self.width)
            self._may_settle = False
        return self._settled is not None

    def note_use(self) -> None:
        """Tell the store what the last prompt has used without asking it; waits until that is known."""
        if self._read_use is not None:
            read, self._read_use = self._read_use, None
            self.store.note_use(self.layer, read().nonzero()[0].tolist(), in_order=True)

    def forget_use(self) -> None:
        """The last prompt has been broken off."""
        self._read_use = None


def part_sizes(tokens: int, most: int, cuts: Sequence[int] = ()) -> list[int]:
    """Tokens in parts of so many, which also end at the cuts, ascending.

    A last single one joins the part before: it has operations of its own.
    """
    pieces = pairwise([0, *cuts, tokens])
    sizes = [min(most, end - first) for start, end in pieces for first in range(start, end, most)]
    return [*sizes[:-2], sizes[-2] + 1] if sizes[-1] == 1 < len(sizes) else sizes


class DecoderLayer:
    """Mixer and experts, each behind a norm and added to the stream."""

    def __init__(self, layer: int, a: Architecture, weights: ResidentWeights, store: ExpertStore, ops: Any, lanes: int):
        stem = f"model.layers.{layer}"
        self.a, self.ops = a, ops
        self.norm = weights.vector(f"{stem}.input_layernorm.weight")
        self.mixer: Any = (
            GatedDeltaNet(f"{stem}.linear_attn", a, weights, ops)
            if a.layer_types[layer] == LINEAR
            else GatedAttention(f"{stem}.self_attn", a, weights, ops)
        )
        self.experts = SparseMoe(layer, a, weights, store, ops, lanes)

    def __call__(self, x: torch.Tensor, state: DeltaState | KeyValueCache) -> torch.Tensor:
        """x [T, D], which is overwritten, through the layer.

        Experts see all tokens once. The mixer, which needs more memory for each, has a part of them at a time.
        """
        if len(x) > 1:
            for part in x.split(part_sizes(len(x), self.ops.batch.mixer)):
                part.copy_(self.mix(part, state))
            return self.experts(x)
        x = self.mix(x, state)
        self.experts.add_one_token(x)
        return x

    def mix(self, x: torch.Tensor, state: DeltaState | KeyValueCache) -> torch.Tensor:
        """x + mixer(norm(x))"""
        return x + self.mixer(self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps), state)


class Qwen35:
    """The whole text model over resident weights and a store of experts.

    lanes   how many sequences can take a step together
    """

    def __init__(
        self,
        a: Architecture,
        weights: ResidentWeights,
        store: ExpertStore,
        ops: Any,
        prefetch: bool = False,
        scans_ahead: bool = False,
        sequences: int = 1,
    ):
        self.a, self.ops, self.store, self.prefetches = a, ops, store, prefetch
        self.lanes = lanes = sequences if ops.has_lanes else 1
        self.embedding = weights.matrix("model.embed_tokens")
        self.layers = layers = [
            DecoderLayer(layer, a, weights, store, ops, lanes) for layer in range(a.num_hidden_layers)
        ]
        for layer, following in pairwise(layers):
            layer.experts.scans_ahead = scans_ahead
            layer.experts.next_router = following.experts.router if prefetch else None
        self.fused: list[Any] = []  # by lane
        if ops.fuses_tokens:
            mixers = [layer.mixer.fuse(layer.norm) for layer in layers]
            routers = [layer.experts.fuse() for layer in layers]
            shared_experts = [layer.experts.shared_expert for layer in layers]
            self.fused = [ops.fuse_layers(mixers, routers, shared_experts, lane) for lane in range(lanes)]
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
            x = self._run_layers(x, state, after_layer)
        return self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps)

    def _run_layers(self, x: torch.Tensor, state: SequenceState, after_layer: Callable[[], object]) -> torch.Tensor:
        """One after the other. A GPU that finds its experts by itself is LAYERS_AHEAD behind what is handed over."""
        try:
            for number, (layer, layer_state) in enumerate(zip(self.layers, state.layers)):
                x = layer(x, layer_state)
                if number >= LAYERS_AHEAD:
                    self.layers[number - LAYERS_AHEAD].experts.note_use()
                after_layer()
            for layer in self.layers[-LAYERS_AHEAD:]:
                layer.experts.note_use()
        finally:
            for layer in self.layers:
                layer.experts.forget_use()
        return x

    def step_together(
        self, token_ids: Sequence[int], states: Sequence[SequenceState]
    ) -> list[torch.Tensor | MoepackError]:
        """One token of each of at most `lanes` sequences, with the bits that each would have alone.

        Returns the normed hidden state [1, D] of each, or why it has none: its experts cannot be read. Its state is
        then of no use any more.
        """
        ids = {lane: torch.tensor([token_id]) for lane, token_id in enumerate(token_ids)}
        xs = {lane: self.ops.embed(self.embedding, one, lane) for lane, one in ids.items()}
        for x, state, fused in zip(xs.values(), states, self.fused):
            fused.start(x, state.tensors, self.store.places, state.next_position(), pauses=True, watched=True)
        results: dict[int, torch.Tensor | MoepackError] = {}
        for number, layer in enumerate(self.layers):
            choices = {}
            for lane in xs:
                if self.fused:
                    self.fused[lane].run(number)
                    choices[lane] = self.fused[lane].choice(number)
                else:
                    xs[lane] = layer.mix(xs[lane], states[lane].layers[number])
            failed = layer.experts.add_tokens(xs, choices)
            results |= failed
            xs = {lane: x for lane, x in xs.items() if lane not in failed}
        results |= {lane: self.ops.rms_norm(x, self.norm, self.a.rms_norm_eps) for lane, x in xs.items()}
        return [results[lane] for lane in range(len(token_ids))]

    def _run_fused(self, x: torch.Tensor, state: SequenceState) -> None:
        """x [1, D] through all layers: the backend goes on by itself from a layer whose experts are not all in memory.

        Where experts are read ahead it pauses at each layer instead, so that reads start as early as can be.
        """
        fused = self.fused[0]
        watched = self.store.recorder is not None
        fused.start(x, state.tensors, self.store.places, state.next_position(), self.prefetches, watched)
        done = 0
        while (reached := fused.run(done)) < len(self.layers):
            self._note_fused(done, reached)
            self.layers[reached].experts.add_one_token(x, fused.choice(reached))
            done = reached + 1
        self._note_fused(done, reached)

    def _note_fused(self, done: int, reached: int) -> None:
        if self.store.holds_everything:  # the ids are of no interest, and not here yet
            self.store.counts.hits += (reached - done) * self.a.num_experts_per_tok
            return
        for layer in range(done, reached):
            self.store.note_use(layer, self.fused[0].ids(layer))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token: [T, D] -> [T, V], rows beyond the tokenizer included."""
        return self.ops.linear(hidden, self.head)

"""A token's arithmetic, timed without a model: its own layers, run on random weights of the right sizes.

Models of two layers of each kind, and a part of the head, are made and run by the code that runs the real one, so what
is timed is what will run, calls and all. Caches are emptied before each token, as a real model's weights would do it.
Experts come from a store that has everything in memory and hands them out as a real one does: not at all, because
native code finds them by itself; together, as hits are; or one by one, as misses arrive.

What it cannot tell: how fast the disk is, and how the model routes. Random routers choose evenly.

    costs, work = rehearse(architecture, ops, pack_schemes(pack), block=geometry, chunk_tokens=512)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.kernels.native_matrix import place
from moepack.kernels.native_ops import read_stream
from moepack.layout.architecture import FULL, LINEAR, Architecture, resident_shapes
from moepack.layout.geometry import BlockGeometry, MatrixGeometry, Scheme, align_up
from moepack.layout.plan import Arithmetic
from moepack.layout.reader import Pack
from moepack.layout.spec import PROJECTIONS, SECTION_ALIGNMENT, UNQUANTIZED_BITS
from moepack.runtime.expert_store import StoreCounts
from moepack.runtime.qwen35 import DecoderLayer, Qwen35
from moepack.runtime.state import SequenceState

SchemeOf = Callable[[str], "Scheme | None"]  # a matrix's name without ".weight" -> how it is stored; None: bf16
POOL_BYTES = 384 * 2**20  # of experts in turn: more than caches hold
HEAD_BYTES = 64 * 2**20  # of the head; its time is that of a part of its rows
FLUSH_BYTES = 128 * 2**20  # read between two measurements
LAYERS = 2  # of a model to time: enough for one to guess the next one's experts
FEW_ROWS = 64  # of their vocabulary
ROUNDS = 12
FEWEST_EXPERTS = 1  # of a token, to tell what an expert costs apart from the rest
SEED = 0
SCALE = 0.01  # of weights


def rehearse(
    a: Architecture,
    ops: Any,
    scheme_of: SchemeOf,
    block: BlockGeometry,
    chunk_tokens: int,
    on_step: Callable[[int], object] = lambda steps: None,
    cache_dtype: torch.dtype = torch.float32,
) -> tuple[Arithmetic, Callable[[], object]]:
    """Time the parts of a token and of a chunk of a prompt, in rounds; their costs, and what keeps all threads busy.

    scheme_of      how each resident matrix is stored
    block          how an expert is stored
    chunk_tokens   prompt tokens run together
    on_step        called with 1 after each of NUM_STEPS
    cache_dtype    of keys and values
    """
    generator = torch.Generator().manual_seed(SEED)
    store: Any = _AllInMemory(a, ops, block, generator)
    kinds = [kind for kind in (LINEAR, FULL) if kind in a.layer_types]
    counts = {kind: a.layer_types.count(kind) for kind in kinds}
    cuts = {kind: dataclasses.replace(a, layer_types=(kind,) * LAYERS, vocab_size=FEW_ROWS) for kind in kinds}
    weights: dict[str, Any] = {kind: RandomWeights(cut, ops, scheme_of, generator) for kind, cut in cuts.items()}
    few = dataclasses.replace(cuts[kinds[0]], num_experts_per_tok=FEWEST_EXPERTS)
    how: Any = (store, ops, cache_dtype)
    tokens = {f"{kind}, resident": _Token(cut, weights[kind], *how, prefetch=False) for kind, cut in cuts.items()}
    tokens |= {f"{kind}, together": _Token(cut, weights[kind], *how, prefetch=True) for kind, cut in cuts.items()}
    tokens["one by one"] = tokens[f"{kinds[0]}, together"]
    tokens["few"] = _Token(few, weights[kinds[0]], *how, prefetch=True)
    head, head_share = _make_head(a, ops, scheme_of, generator)
    x = ops.upload(torch.randn(1, a.hidden_size, generator=generator))
    flush = ops.view_pages(ops.new_pages(FLUSH_BYTES))
    flush.fill_(1)
    on_step(1)
    times: dict[str, list[float]] = {name: [] for name in (*tokens, "head")}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, token in tokens.items():
                store.one_by_one = name == "one by one"
                read_stream(flush)  # a token finds its weights in memory, not in a cache
                times[name].append(_seconds(token.run) / LAYERS)
            times["head"].append(_seconds(lambda: ops.linear(x, head)))
        store.one_by_one = False
        on_step(1)
        chunk = ops.upload(torch.randn(chunk_tokens, a.hidden_size, generator=generator))
        layers = {kind: tokens[f"{kind}, together"].model.layers[0] for kind in kinds}
        mixers, experts = _time_chunk(layers, a, ops, chunk, cache_dtype)
        on_step(1)
    # What disturbs a measurement makes it longer, never shorter: of the rounds, one of the better ones.
    typical = {name: sorted(values)[ROUNDS // 4] for name, values in times.items()}
    together_s, chosen = typical[f"{kinds[0]}, together"], a.num_experts_per_tok
    more = chosen - FEWEST_EXPERTS
    # Whatever disturbed the measurements, an expert costs no more than its share, the rest being one more.
    hit_s = min(max(0.0, together_s - typical["few"]) / max(1, more), together_s / (chosen + 1))
    miss_s = hit_s + max(0.0, typical["one by one"] - together_s) / chosen
    costs = Arithmetic(
        resident_s=sum(counts[kind] * typical[f"{kind}, resident"] for kind in kinds),
        mixers_s=sum(counts[kind] * max(0.0, typical[f"{kind}, together"] - chosen * hit_s) for kind in kinds),
        hit_s=hit_s,
        miss_s=miss_s,
        head_s=typical["head"] / head_share,
        chunk_tokens=chunk_tokens,
        chunk_mixers_s=sum(counts[kind] * mixers[kind] for kind in kinds),
        chunk_experts_s=experts,
        meanwhile_s=min(sorted(store.meanwhile_s)[len(store.meanwhile_s) // 4], together_s - chosen * hit_s),
    )
    return costs, functools.partial(ops.linear, x, head)


class _Token:
    """A model of a few layers of one kind that decodes the same token again and again."""

    def __init__(
        self, a: Architecture, weights: Any, store: Any, ops: Any, cache_dtype: torch.dtype, *, prefetch: bool
    ):
        self.model = Qwen35(a, weights, store, ops, prefetch)
        self.state = SequenceState(a, 2 * ROUNDS + 1, ops.zeros, cache_dtype)
        self.token_ids = torch.tensor([1])

    def run(self) -> None:
        self.model(self.token_ids, self.state)


NUM_STEPS = 3


def pack_schemes(pack: Pack) -> SchemeOf:
    """How a pack stores its resident matrices."""
    return lambda name: pack.manifest.resident.quantized.get(name)


class RandomWeights:
    """Resident weights of the right shapes, made when they are first asked for; the interface of ResidentWeights."""

    def __init__(self, a: Architecture, ops: Any, scheme_of: SchemeOf, generator: torch.Generator):
        self._shapes = resident_shapes(a, mtp_layers=0)
        self._ops, self._scheme_of, self._generator = ops, scheme_of, generator
        self._matrices: dict[str, Matrix] = {}

    def matrix(self, name: str) -> Matrix:
        """A matrix by its name without ".weight"."""
        if name not in self._matrices:
            scheme = self._scheme_of(name) or Scheme(UNQUANTIZED_BITS, None)
            rows, columns = self._shapes[f"{name}.weight"]
            geometry = MatrixGeometry(rows, columns, scheme)
            arrays = _place(self._ops, _random_arrays(geometry, self._generator))
            self._matrices[name] = Matrix.from_arrays(geometry, arrays)
        return self._matrices[name]

    def vector(self, name: str) -> torch.Tensor:
        """A small tensor by its full name, in float32."""
        return self._ops.upload(SCALE * torch.randn(self._shapes[name], generator=self._generator))

    def expert(self, stem: str) -> Expert:
        """A shared expert."""
        return Expert(*(self.matrix(f"{stem}.{name}") for name in PROJECTIONS))


class _AllInMemory:
    """Random experts that are always there, each another one than the last; the interface of ExpertStore."""

    holds_everything, recorder = True, None

    def __init__(self, a: Architecture, ops: Any, block: BlockGeometry, generator: torch.Generator):
        count, stride = max(2, POOL_BYTES // block.block_stride), block.block_stride
        sections = {section.name: section for section in block.sections}
        pages = ops.new_pages(count * stride)
        for projection, matrix in block.matrices:
            for (name, _, _), values in zip(matrix.arrays, _random_arrays(matrix, generator)):
                offset = sections[f"{projection}.{name}"].offset_bytes
                for start in range(offset, count * stride, stride):  # the same weights in many places
                    pages.buffer[start : start + len(values)] = values.numpy().data
        data = ops.view_pages(pages)
        self._pool = [
            Expert.from_block(block, data[start : start + stride]) for start in range(0, count * stride, stride)
        ]
        self._bits = {matrix.scheme.bits for _, matrix in block.matrices}
        self._next, self.one_by_one = 0, False
        self.meanwhile_s: list[float] = []  # from each fetch, one by one, until the first expert is waited for
        self.counts = StoreCounts()
        addresses = [place(expert) for expert in self._pool]
        chosen = [addresses[number % count] for number in range(LAYERS * a.num_experts)]
        self.places = torch.tensor(chosen, dtype=torch.int64).view(LAYERS, a.num_experts)

    def fetch(
        self, layer: int, expert_ids: Sequence[int], in_order: bool = False
    ) -> Iterator[list[tuple[int, Expert]]]:
        """All at once, or, where one_by_one is set, nothing first and then one after the other."""
        return self._hand_out([(expert_id, self._take()) for expert_id in expert_ids], time.perf_counter())

    def _hand_out(self, batch: list[tuple[int, Expert]], asked_s: float) -> Iterator[list[tuple[int, Expert]]]:
        if not self.one_by_one:
            yield batch
            return
        yield []
        self.meanwhile_s.append(time.perf_counter() - asked_s)
        for one in batch:
            yield [one]

    def prefetch(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Nothing to do."""

    def note_use(self, layer: int, expert_ids: Sequence[int], in_order: bool = False) -> None:
        """Nothing to note."""

    def keeps(self, layer: int) -> bool:
        """No: it is experts that come and go whose cost is wanted."""
        return False

    def expert_bits(self, layer: int) -> set[int]:
        """Of the one kind of block that there is."""
        return self._bits

    def _take(self) -> Expert:
        self._next = (self._next + 1) % len(self._pool)
        return self._pool[self._next]


def _time_chunk(
    layers: dict[str, DecoderLayer], a: Architecture, ops: Any, chunk: torch.Tensor, cache_dtype: torch.dtype
) -> tuple[dict[str, float], float]:
    """Seconds of each kind of mixer for a chunk, from an empty state, and of one layer's experts."""
    mixers = {}
    for kind, layer in layers.items():
        state = SequenceState(a, len(chunk), ops.zeros, cache_dtype).layers[a.layer_types.index(kind)]
        normed = ops.rms_norm(chunk, layer.norm, a.rms_norm_eps)
        mixers[kind] = _seconds(lambda layer=layer, normed=normed, state=state: layer.mixer(normed, state))  # type: ignore[misc]
    experts = next(iter(layers.values())).experts
    return mixers, min(_seconds(lambda: experts(chunk)) for _ in range(2))


def _make_head(a: Architecture, ops: Any, scheme_of: SchemeOf, generator: torch.Generator) -> tuple[Matrix, float]:
    """Rows of the head, as many as are worth timing, and the share that they are."""
    rows = min(a.vocab_size, max(1, HEAD_BYTES // a.hidden_size))
    weights = RandomWeights(dataclasses.replace(a, vocab_size=rows), ops, scheme_of, generator)
    return weights.matrix("model.embed_tokens" if a.tie_word_embeddings else "lm_head"), rows / a.vocab_size


def _random_arrays(geometry: MatrixGeometry, generator: torch.Generator) -> list[torch.Tensor]:
    """The bytes of a matrix's arrays (uint8, flat), with scales of a plausible size: subnormals would be slow."""
    arrays = []
    for name, _, shape in geometry.arrays:
        if name == "w_q":
            arrays.append(torch.randint(0, 256, (4 * shape[0] * shape[1],), dtype=torch.uint8, generator=generator))
            continue
        if name == "weight":
            values = SCALE * torch.randn(shape, generator=generator)
        else:
            values = torch.full(shape, SCALE if name == "scales" else -SCALE * 2 ** (geometry.scheme.bits - 1))
        arrays.append(values.bfloat16().flatten().view(torch.uint8))
    return arrays


def _place(ops: Any, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same bytes in the memory that the backend computes from, one after the other."""
    starts = [0, *accumulate(align_up(len(values), SECTION_ALIGNMENT) for values in arrays)]
    pages = ops.new_pages(starts[-1])
    for start, values in zip(starts, arrays):
        pages.buffer[start : start + len(values)] = values.numpy().data
    data = ops.view_pages(pages)
    return [data[start : start + len(values)] for start, values in zip(starts, arrays)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

"""What a model will do on a machine: sizes and measured costs in, tokens per second out. Pure arithmetic.

A token goes through its layers one after the other. In each, the mixer and the router come first; then the experts that
are in memory are computed while the missing ones are read, and each of those is computed when it has come. While the
disk has nothing else to do, experts that the next layer will probably want are read ahead; the last of these is still
under way when that layer asks, and its rest comes first. So

    layer = mixer and router + max(hits computed, reads done) + what is left to compute        averaged over misses

and a prompt is read chunk by chunk, each chunk asking every layer for nearly all of its experts, in order.

What it does not know: other programs, a disk that slows down when warm, and how a model routes; hits are an assumption
unless a trace says them. Costs come from measuring (kernels and disk) or from data sheets; nothing is measured here.

    predict(model, costs, Memory(num_slots=900, prefill_chunk=512), hit_rate=0.4, prompt_tokens=512)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

LOOKAHEAD_RECALL = 0.8  # of guesses that the next layer asks for, measured: EXPERIMENTS.md; a trace tells its own


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides its speed."""

    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        return self.num_layers * self.num_experts


@dataclass(frozen=True)
class Arithmetic:
    """Seconds that computing takes with all threads, weights read from memory and not from a cache.

    resident_s         all layers of one token, where every expert of the model is in memory
    mixers_s           all layers' attention, DeltaNet, routers and shared experts, where they are not
    hit_s, miss_s      one expert of one token: among others of a batch, and alone as it comes off the disk
    head_s             embedding, last norm, scores of the vocabulary
    chunk_tokens       prompt tokens computed together for the two below
    chunk_mixers_s     all layers' mixers for a chunk
    chunk_experts_s    one layer's experts for a chunk, all in memory
    meanwhile_s        of one layer's mixers_s, what is computed when its experts are asked for already: guesses, the
                       shared expert
    """

    resident_s: float
    mixers_s: float
    hit_s: float
    miss_s: float
    head_s: float
    chunk_tokens: int
    chunk_mixers_s: float
    chunk_experts_s: float
    meanwhile_s: float = 0.0

    def scale(self, factor: float) -> Arithmetic:
        """Everything so many times as long: for a machine whose memory is slower by that factor."""
        times = {name: value * factor for name, value in vars(self).items() if name.endswith("_s")}
        return replace(self, **times)


@dataclass(frozen=True)
class Disk:
    """Bytes per second of whole blocks: at random by the number of reads in flight, and in order.

    busy_bytes_s   at random while all threads compute, which costs some; empty: it costs nothing
    max_hints      reads ahead that a layer may start; 0 reads nothing ahead
    hints_at_once  of these, how many run at the same time
    start_s        from asking for a block until its read begins
    """

    random_bytes_s: dict[int, float]
    in_order_bytes_s: float
    queue_depth: int
    max_hints: int = 0
    hints_at_once: int = 1
    busy_bytes_s: dict[int, float] = field(default_factory=dict)
    start_s: float = 0.0

    def read_s(self, size_bytes: float, in_flight: float, computing_s: float = 0.0) -> float:
        """Time until so much has come, of so many blocks at a time, while at first so long something is computed."""
        idle_bytes_s, busy_bytes_s = self.idle_speed(in_flight), self.busy_speed(in_flight)
        if size_bytes <= busy_bytes_s * computing_s:
            return size_bytes / busy_bytes_s
        return computing_s + (size_bytes - busy_bytes_s * computing_s) / idle_bytes_s

    def busy_speed(self, in_flight: float) -> float:
        """Bytes per second while all threads compute."""
        return min(self._speed(self.busy_bytes_s or self.random_bytes_s, in_flight), self.idle_speed(in_flight))

    def idle_speed(self, in_flight: float) -> float:
        """Bytes per second while nothing is computed."""
        return self._speed(self.random_bytes_s, in_flight)

    def _speed(self, bytes_s: dict[int, float], in_flight: float) -> float:
        known = sorted(bytes_s.items())
        depth = min(in_flight, self.queue_depth)  # between two that are known: in proportion
        return float(np.interp(depth, [depth for depth, _ in known], [speed for _, speed in known]))


@dataclass(frozen=True)
class Prediction:
    """What to expect. Shares are of a decoded token's time.

    bytes_per_token   read from the disk in decode
    compute_share     in which something is computed; the rest waits for the disk
    disk_share        in which the disk is busy with what was asked for: 1 means that only a faster disk helps
    """

    hit_rate: float
    decode_tok_s: float
    prefill_tok_s: float
    ttft_s: float
    bytes_per_token: float
    compute_share: float
    disk_share: float


def predict(
    model: ModelSizes,
    arithmetic: Arithmetic,
    disk: Disk,
    *,
    hit_rate: float,
    num_slots: int,
    prefill_chunk: int,
    prompt_tokens: int,
    recall: float = LOOKAHEAD_RECALL,
) -> Prediction:
    """Speed of decode once caches hold what they will, and of a first prompt, which finds them empty.

    hit_rate        share of a decoded token's experts in memory, reads ahead apart
    num_slots       experts that fit in memory
    prefill_chunk   prompt tokens run together
    """
    if num_slots >= model.num_blocks:
        token_s = computed_s = arithmetic.resident_s + arithmetic.head_s
        read_s = read_bytes = 0.0
    else:
        layer_s, compute_s, read_s, read_bytes = _average_layer(model, arithmetic, disk, hit_rate, recall)
        others_s = arithmetic.mixers_s - model.num_layers * arithmetic.meanwhile_s + arithmetic.head_s
        token_s, computed_s = others_s + model.num_layers * layer_s, others_s + model.num_layers * compute_s
    ttft_s = _prompt_s(model, arithmetic, disk, num_slots, prefill_chunk, prompt_tokens) + arithmetic.head_s
    return Prediction(
        hit_rate=hit_rate,
        decode_tok_s=1 / token_s,
        prefill_tok_s=prompt_tokens / ttft_s,
        ttft_s=ttft_s,
        bytes_per_token=model.num_layers * read_bytes,
        compute_share=computed_s / token_s,
        disk_share=model.num_layers * read_s / token_s,
    )


def uniform_hit_rate(model: ModelSizes, num_slots: int) -> float:
    """Hits if every expert were as likely as any other, token by token: the least that a cache can do."""
    return min(1.0, num_slots / model.num_blocks)


@dataclass(frozen=True)
class _Layer:
    """A layer from when it asks for its experts: its time, of that computing, the disk's time, and the bytes read."""

    time_s: float
    computing_s: float
    disk_s: float
    read_bytes: float


def _average_layer(
    model: ModelSizes, arithmetic: Arithmetic, disk: Disk, hit_rate: float, recall: float
) -> tuple[float, ...]:
    """The fields of a _Layer, over its misses."""
    chosen = model.num_experts_per_tok
    sums = [0.0] * 4
    for misses in range(chosen + 1):
        likelihood = math.comb(chosen, misses) * (1 - hit_rate) ** misses * hit_rate ** (chosen - misses)
        for place, value in enumerate(vars(_run_layer(model, arithmetic, disk, misses, recall)).values()):
            sums[place] += likelihood * value
    return tuple(sums)


def _run_layer(model: ModelSizes, arithmetic: Arithmetic, disk: Disk, misses: int, recall: float) -> _Layer:
    """A layer that misses so many experts, reads ahead apart."""
    chosen, block = model.num_experts_per_tok, model.block_bytes
    # Those that are read at the same time come nearly at the same time, and are computed then.
    last_s = min(misses, disk.queue_depth) * arithmetic.miss_s
    # The layer before has, on average, as much to read as this one: from its last block on the disk was free.
    free_s = last_s + arithmetic.mixers_s / model.num_layers - arithmetic.meanwhile_s
    ahead, ahead_bytes_s = 0.0, disk.busy_speed(disk.hints_at_once)
    if disk.max_hints and misses:  # those that run when the next layer asks are half done
        ahead = min(free_s * ahead_bytes_s / block + disk.hints_at_once / 2, disk.max_hints, misses / recall)
    left_bytes = max(0.0, ahead * block - free_s * ahead_bytes_s)
    demanded = max(0.0, misses - recall * ahead)
    hits_s = arithmetic.meanwhile_s + (chosen - demanded) * arithmetic.hit_s
    computing_s = hits_s + demanded * arithmetic.miss_s
    read_bytes = (demanded + ahead) * block
    disk_s = read_bytes / disk.idle_speed(max(1.0, demanded))
    if not demanded:
        return _Layer(computing_s, computing_s, disk_s, read_bytes)
    waits_s = disk.start_s + disk.read_s(demanded * block + left_bytes, max(1.0, demanded), hits_s)
    last_s = min(demanded, disk.queue_depth) * arithmetic.miss_s
    return _Layer(max(computing_s - last_s, waits_s) + last_s, computing_s, disk_s, read_bytes)


def _prompt_s(
    model: ModelSizes, arithmetic: Arithmetic, disk: Disk, num_slots: int, prefill_chunk: int, prompt_tokens: int
) -> float:
    """Time of a prompt that starts with nothing in memory, the scores of its last token apart."""
    total_s, position = 0.0, 0
    while position < prompt_tokens:
        tokens = min(prefill_chunk, prompt_tokens - position)
        # A scan larger than memory keeps most of what it finds there: eviction.is_flushing_scan.
        held = min(1.0, num_slots / model.num_blocks) if position else 0.0
        asked = model.num_experts * (1 - (1 - model.num_experts_per_tok / model.num_experts) ** tokens)
        read_s = asked * (1 - held) * model.block_bytes / disk.in_order_bytes_s
        share = tokens / arithmetic.chunk_tokens
        experts_s = arithmetic.chunk_experts_s * share
        # The last expert is computed when all have been read.
        layer_s = max(experts_s, read_s) + min(experts_s, read_s) / max(1.0, asked)
        total_s += arithmetic.chunk_mixers_s * share + model.num_layers * layer_s
        position += tokens
    return total_s

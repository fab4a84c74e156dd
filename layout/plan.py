"""What a model will do on a machine: sizes and measured costs in, tokens per second out. Pure arithmetic.

A token goes through its layers one after the other. In each, the mixer and the router come first; then the experts that
are in memory are computed while the missing ones are read, and each of those is computed when it has come. While the
disk has nothing else to do, experts that the next layer will probably want are read ahead. So

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
    """

    resident_s: float
    mixers_s: float
    hit_s: float
    miss_s: float
    head_s: float
    chunk_tokens: int
    chunk_mixers_s: float
    chunk_experts_s: float

    def scale(self, factor: float) -> Arithmetic:
        """Everything so many times as long: for a machine whose memory is slower by that factor."""
        times = {name: value * factor for name, value in vars(self).items() if name.endswith("_s")}
        return replace(self, **times)


@dataclass(frozen=True)
class Disk:
    """Bytes per second of whole blocks: at random by the number of reads in flight, and in order.

    busy_bytes_s   at random while all threads compute, which costs some; empty: it costs nothing
    max_hints      reads ahead that a layer may start; 0 reads nothing ahead
    """

    random_bytes_s: dict[int, float]
    in_order_bytes_s: float
    queue_depth: int
    max_hints: int = 0
    busy_bytes_s: dict[int, float] = field(default_factory=dict)

    def read_s(self, num_blocks: int, block_bytes: int, computing_s: float = 0.0) -> float:
        """Time until so many blocks asked for at once have come, while at first so long something is computed."""
        if not num_blocks:
            return 0.0
        size_bytes, idle_bytes_s = num_blocks * block_bytes, self._speed(self.random_bytes_s, num_blocks)
        busy_bytes_s = min(idle_bytes_s, self._speed(self.busy_bytes_s or self.random_bytes_s, num_blocks))
        if size_bytes <= busy_bytes_s * computing_s:
            return size_bytes / busy_bytes_s
        return computing_s + (size_bytes - busy_bytes_s * computing_s) / idle_bytes_s

    def _speed(self, bytes_s: dict[int, float], num_blocks: int) -> float:
        known = sorted(bytes_s.items())
        in_flight = min(num_blocks, self.queue_depth)  # between two that are known: in proportion
        return float(np.interp(in_flight, [depth for depth, _ in known], [speed for _, speed in known]))


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
        token_s = arithmetic.mixers_s + arithmetic.head_s + model.num_layers * layer_s
        computed_s = arithmetic.mixers_s + arithmetic.head_s + model.num_layers * compute_s
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


def _average_layer(
    model: ModelSizes, arithmetic: Arithmetic, disk: Disk, hit_rate: float, recall: float
) -> tuple[float, float, float, float]:
    """(time without the mixer, of that computing, of that the disk busy, bytes read) of a layer, over its misses."""
    chosen = model.num_experts_per_tok
    mixer_s = arithmetic.mixers_s / model.num_layers
    sums = [0.0, 0.0, 0.0, 0.0]
    for misses in range(chosen + 1):
        likelihood = math.comb(chosen, misses) * (1 - hit_rate) ** misses * hit_rate ** (chosen - misses)
        # What was read ahead in the layer before covers a part; how large depends on how long the disk was idle there,
        # which depends on that layer's own misses: on average the same as here.
        ahead = _read_ahead(model, arithmetic, disk, misses, mixer_s, recall) if misses else 0.0
        total_s, computed_s = _layer_s(model, arithmetic, disk, misses - ahead, chosen)
        guessed = ahead / recall if ahead else 0.0
        read_s = disk.read_s(misses, model.block_bytes) * (misses - ahead + guessed) / misses if misses else 0.0
        read_bytes = (misses - ahead + guessed) * model.block_bytes
        for place, value in enumerate((total_s, computed_s, read_s, read_bytes)):
            sums[place] += likelihood * value
    return sums[0], sums[1], sums[2], sums[3]


def _layer_s(model: ModelSizes, arithmetic: Arithmetic, disk: Disk, misses: float, chosen: int) -> tuple[float, float]:
    """(experts of a layer, of that computing), with so many of them still to be read."""
    hits_s = (chosen - misses) * arithmetic.hit_s
    computed_s = hits_s + misses * arithmetic.miss_s
    if misses <= 0:
        return computed_s, computed_s
    whole = math.ceil(misses)
    read_s = disk.read_s(whole, model.block_bytes, hits_s) * misses / whole
    # All but the last to come are computed while others are read, as far as that is the slower: those that are read at
    # the same time come nearly at the same time.
    last_s = min(misses, disk.queue_depth) * arithmetic.miss_s
    return max(computed_s - last_s, read_s) + last_s, computed_s


def _read_ahead(
    model: ModelSizes, arithmetic: Arithmetic, disk: Disk, misses: int, mixer_s: float, recall: float
) -> float:
    """Of so many misses, those that are in memory because they were read ahead while the disk was idle."""
    if not disk.max_hints:
        return 0.0
    read_s = disk.read_s(misses, model.block_bytes)
    layer_s, _ = _layer_s(model, arithmetic, disk, misses, model.num_experts_per_tok)
    idle_s = mixer_s + layer_s - read_s
    fitting = idle_s / disk.read_s(1, model.block_bytes, idle_s)  # what is idle for the disk is computed in
    return recall * max(0.0, min(fitting, disk.max_hints, misses))


def _prompt_s(
    model: ModelSizes, arithmetic: Arithmetic, disk: Disk, num_slots: int, prefill_chunk: int, prompt_tokens: int
) -> float:
    """Time of a prompt that starts with nothing in memory, the scores of its last token apart."""
    total_s, position = 0.0, 0
    while position < prompt_tokens:
        tokens = min(prefill_chunk, prompt_tokens - position)
        # A scan larger than memory keeps most of what it finds there: FORMAT of the store, eviction.is_flushing_scan.
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

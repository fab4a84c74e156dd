"""What a generation cost, as one record and as one line.

print(format_stats(generation.stats()))
"""

from __future__ import annotations

from dataclasses import dataclass

from moepack.layout.sizes import format_size


@dataclass(frozen=True)
class GenerationStats:
    """Times in seconds; None where nothing was measured.

    cached_tokens     prompt tokens that a snapshot has spared the computation of
    ttft_s            from the start of the prefill to the first token
    prefill_tok_s     prompt tokens that were computed, over ttft_s
    decode_tok_s      tokens after the first over their time
    bytes_read        bytes requested from expert files; the system may have served them from its cache
    bytes_per_token   the same for tokens after the first, each
    io_wait_s         time in which the computation waited for reads; compute_s is the rest
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    bytes_read: int
    bytes_per_token: float | None
    expert_hits: int
    expert_misses: int
    io_wait_s: float
    compute_s: float
    peak_rss_bytes: int
    memory_budget_bytes: int
    experts_per_token: int
    device: str


def format_stats(stats: GenerationStats) -> str:
    """One line for people."""

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} tok/s"

    cached = f" ({stats.cached_tokens} known)" if stats.cached_tokens else ""
    fetched = stats.expert_hits + stats.expert_misses
    hit_rate = f"{stats.expert_hits / fetched:.0%}" if fetched else "-"
    return (
        f"[{stats.prompt_tokens} prompt{cached} + {stats.generated_tokens} tokens | "
        f"first after {stats.ttft_s or 0:.2f} s | prefill {rate(stats.prefill_tok_s)} | "
        f"decode {rate(stats.decode_tok_s)} | {stats.experts_per_token} experts per token, {hit_rate} hits | "
        f"{format_size(stats.bytes_read)} read | {format_size(stats.peak_rss_bytes)} of "
        f"{format_size(stats.memory_budget_bytes)} | {stats.device}]"
    )

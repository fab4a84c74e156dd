"""The engine on tiny and demo packs: decode equals prefill, streaming equals resident, seeds, limits, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import budget_of, make_pack
from moepack.kernels.batch import BatchSizes
from moepack.layout.errors import DamagedPack, MemoryBudgetError, MoepackError, UsageError
from moepack.layout.reader import Pack
from moepack.runtime import Engine, SamplingParams, qwen35
from moepack.runtime import engine as engine_module
from moepack.runtime.engine import read_sampling
from moepack.runtime.tokenizer import Tokenizer
from tiny_checkpoint import TOKEN_IDS, TinyModel, write_checkpoint

# Decode runs matrix-vector products and the recurrence where prefill runs matrix products and chunks: the same sums in
# another order, in float32.
DECODE_TOLERANCE = 1e-4  # of the largest logit
IDS = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_pack: Path) -> Engine:
    return Engine.open(tiny_pack)


def test_decode_one_token_at_a_time_equals_prefill(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, exact=True)
    prefill = engine.logits(IDS)
    state = engine.new_state(len(IDS))
    with torch.inference_mode():
        steps = [engine.model.logits(engine.model(torch.tensor([token]), state)) for token in IDS]
    difference = (torch.cat(steps) - prefill).abs().max()
    assert difference <= DECODE_TOLERANCE * prefill.abs().max(), f"max difference {difference}"


def test_int8_decode_is_near_int8_prefill(engine: Engine) -> None:
    """Sums of float32 in another order, 1e-6, sometimes move a value by one of 127 steps: 1 % of the range."""
    prefill, state = engine.logits(IDS), engine.new_state(len(IDS))
    with torch.inference_mode():
        steps = [engine.model.logits(engine.model(torch.tensor([token]), state)) for token in IDS]
    assert (torch.cat(steps) - prefill).abs().max() <= 1e-2 * prefill.abs().max()


def test_scores_from_a_position_on_are_those_of_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "memory_plan", dataclasses.replace(engine.memory_plan, prefill_chunk=64))
    whole = engine.logits(IDS)
    for first in (0, 1, 64, 100):
        assert torch.equal(torch.cat(list(engine.iter_logits(IDS, first))), whole[first:])
    (last,) = engine.iter_logits(IDS, len(IDS) - 1)  # one row has operations of its own
    assert (last - whole[-1:]).abs().max() <= 1e-2 * whole.abs().max()


def test_prefill_in_two_parts_equals_one(tiny_pack: Path) -> None:
    """Chunks that end at odd places: the state carries over."""
    engine = Engine.open(tiny_pack, exact=True)
    whole, state = engine.logits(IDS), engine.new_state(len(IDS))
    with torch.inference_mode():
        parts = [
            engine.model.logits(engine.model(torch.tensor(part), state)) for part in (IDS[:70], IDS[70:71], IDS[71:])
        ]
    assert (torch.cat(parts) - whole).abs().max() <= DECODE_TOLERANCE * whole.abs().max()


def test_a_prompt_longer_than_a_prefill_chunk(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack)
    ids = (IDS * 5)[:700]
    assert (engine.logits(ids)[:150] - engine.logits(ids[:150])).abs().max() <= 1e-4


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_streaming_with_the_smallest_budget_equals_all_resident_bit_for_bit(
    demo_pack: Callable[[int], Path], bits: int
) -> None:
    pack, ids = demo_pack(bits), IDS[:80]
    resident = Engine.open(pack, max_context=128)
    small = Engine.open(pack, **budget_of(resident, 48))  # 8 layers with 6 experts per token
    assert 48 <= small.store.num_slots < 8 * 48 // 2  # a small budget also takes shorter chunks
    assert resident.store.num_slots == 8 * 48
    everything = [torch.cat(list(engine.iter_logits(ids))) for engine in (resident, small)]
    assert torch.equal(*everything)
    generated = [list(engine.generate(ids, GREEDY)) for engine in (resident, small)]
    assert generated[0] == generated[1]
    assert small.store.counts.misses > resident.store.counts.misses


def test_the_same_seed_gives_the_same_tokens(engine: Engine) -> None:
    def sample(seed: int) -> list[int]:
        return list(
            engine.generate(IDS[:5], SamplingParams(temperature=1.5, seed=seed, max_tokens=20, ignore_eos=True))
        )

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_logits_cover_every_position_and_padding_rows(engine: Engine) -> None:
    logits = engine.logits(IDS[:9])
    assert logits.shape == (9, 320)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert engine.tokenizer.decode([300, 319]) == ""


def test_generation_ends_at_max_tokens_and_knows_why(engine: Engine) -> None:
    generation = engine.generate(IDS[:4], GREEDY)
    assert generation.finish_reason is None
    tokens = list(generation)
    assert len(tokens) == 12
    assert generation.token_ids == tokens
    assert generation.finish_reason == "length"
    stats = generation.stats()
    assert stats.generated_tokens == 12
    assert stats.prompt_tokens == 4
    assert stats.expert_hits + stats.expert_misses > 0
    assert stats.bytes_read == stats.expert_misses * engine.store.slot_bytes
    assert stats.compute_s > 0
    assert stats.experts_per_token == 2


def test_one_token_has_no_decode_rate(engine: Engine) -> None:
    generation = engine.generate(IDS[:4], SamplingParams(temperature=0, max_tokens=1))
    list(generation)
    assert generation.stats().decode_tok_s is None
    assert generation.stats().bytes_per_token is None


def test_generation_stops_on_every_end_id(demo_pack: Callable[[int], Path]) -> None:
    """The config names <|endoftext|>, generation_config and tokenizer <|im_end|>: the demo model ends with that."""
    engine = Engine.open(demo_pack(4))
    assert engine.tokenizer.stop_token_ids == {4070, 4072}
    template = engine.chat_template()
    assert template is not None
    prompt = engine.tokenizer.encode(template.render([{"role": "user", "content": "Hello"}], enable_thinking=False))
    generation = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=60))
    tokens = list(generation)
    assert generation.finish_reason == "stop"
    assert tokens[-1] == 4072
    longer = list(engine.generate(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    assert longer[: len(tokens)] == tokens
    assert len(longer) == 60


def test_default_sampling_is_the_models_own(engine: Engine, demo_pack: Callable[[int], Path]) -> None:
    sampling = Engine.open(demo_pack(4)).default_sampling(top_k=None, seed=3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.7, 0.8, 20, 3)


def test_fewer_experts_per_token_change_the_answer(tiny_pack: Path, engine: Engine) -> None:
    one = Engine.open(tiny_pack, experts_per_token=1)
    assert one.architecture.num_experts_per_tok == 1
    assert not torch.equal(one.logits(IDS[:5]), engine.logits(IDS[:5]))
    with pytest.raises(UsageError, match="experts-per-token 7: expected 1 to 6"):
        Engine.open(tiny_pack, experts_per_token=7)


def test_exact_is_the_references_arithmetic_and_int8_is_near(demo_pack: Callable[[int], Path]) -> None:
    """int8 activations: 5 % of the logits' norm; products are off by 0.5 % and eight layers add up."""
    pack = demo_pack(4)
    ids = Tokenizer.load(pack).encode("The old man looked at the sea. " * 4)
    reference = Engine.open(pack, device="reference").logits(ids)
    exact, rounded = (Engine.open(pack, exact=exact).logits(ids) for exact in (True, False))
    assert (exact - reference).abs().max() <= 1e-4
    assert 1e-4 < (rounded - reference).norm() / reference.norm() < 0.05


@pytest.mark.parametrize("exact", [True, False])
def test_where_a_prompt_is_cut_does_not_change_a_bit(demo_pack: Callable[[int], Path], exact: bool) -> None:
    ids = (IDS * 3)[:385]  # 3 chunks of 128 and one token, or 6 of 64 and one, or all at once
    whole = Engine.open(demo_pack(4), exact=exact, max_context=1024)
    expected = whole.logits(ids)
    assert whole.memory_plan.prefill_chunk >= 512
    for chunk in (64, 128):
        whole.memory_plan = dataclasses.replace(whole.memory_plan, prefill_chunk=chunk)
        assert torch.equal(whole.logits(ids), expected), f"chunks of {chunk}"


@pytest.mark.parametrize("exact", [True, False])
def test_how_much_of_a_chunk_a_mixer_has_at_a_time_does_not_change_a_bit(
    demo_pack: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    engine = Engine.open(demo_pack(4), exact=exact, max_context=1024)
    for ids in ((IDS * 3)[:385], (IDS * 3)[:200]):  # whole parts and one token, and a shorter part
        expected = engine.logits(ids)
        for tokens in (64, 128):
            with monkeypatch.context() as patch:
                patch.setattr(engine.model.ops, "batch", BatchSizes(512, tokens))
                assert torch.equal(engine.logits(ids), expected), f"parts of {tokens}"


def test_a_prompt_that_is_read_holds_one_row(tiny_pack: Path) -> None:
    """Others may be read before its next step: a view of the chunk would be beyond the plan."""
    engine = Engine.open(tiny_pack, max_context=64)
    last = engine.generate(IDS[:50], GREEDY)._prefill(engine.new_state(64), lambda tokens: None)
    assert last.untyped_storage().nbytes() == last.nbytes == 4 * engine.architecture.hidden_size


def test_a_mixer_never_has_one_token_of_several() -> None:
    sizes = {tokens: qwen35.part_sizes(tokens, 64) for tokens in range(2, 300)}
    assert all(sum(parts) == tokens for tokens, parts in sizes.items())
    assert all(set(parts[:-1]) <= {64} and 1 < parts[-1] <= 65 for parts in sizes.values())


def test_the_number_of_threads_does_not_change_a_bit(demo_pack: Callable[[int], Path]) -> None:
    logits = [Engine.open(demo_pack(4), threads=threads).logits(IDS[:70]) for threads in (1, 2, 3)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    "options", [{"prefetch": True}, {"prefetch": False}, {"verify_reads": True}, {"policy": "lfu"}]
)
def test_how_experts_are_read_does_not_change_a_token(demo_pack: Callable[[int], Path], options: dict) -> None:
    plain = Engine.open(demo_pack(4), max_context=128)
    small = Engine.open(demo_pack(4), **budget_of(plain, 60), **options)
    assert list(small.generate(IDS[:20], GREEDY)) == list(plain.generate(IDS[:20], GREEDY))


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "the prompt is empty"),
        ([1] * 1025, "the prompt has 1025 tokens, the model's context holds 1024"),
        ([5, 320], "token id 320 is outside the vocabulary of 320"),
        ([-1], "token id -1 is outside the vocabulary of 320"),
        ([5, TOKEN_IDS["<|image_pad|>"]], "stands for an image or a video: this pack holds the text model only"),
    ],
)
def test_bad_prompts_are_refused(engine: Engine, ids: list[int], text: str) -> None:
    with pytest.raises(UsageError, match=text.replace("(", r"\(")):
        engine.generate(ids, GREEDY)
    with pytest.raises(UsageError):
        engine.logits(ids)


def test_a_prompt_past_the_planned_context_is_refused_with_both_numbers(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, max_context=100)
    with pytest.raises(UsageError, match="has 101 tokens, memory was planned for 100"):
        engine.generate([1] * 101, GREEDY)
    generation = engine.generate([1] * 100, GREEDY)
    assert len(list(generation)) == 1  # the last position still predicts a token
    assert generation.finish_reason == "length"


def test_an_impossible_budget_is_refused_with_the_numbers(tiny_pack: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"memory budget of 10 MiB is too small: \d+ MiB are needed \(process"):
        Engine.open(tiny_pack, memory="10MiB")
    smallest = budget_of(Engine.open(tiny_pack, max_context=64), 8)  # 4 layers with 2 experts per token
    Engine.open(tiny_pack, **smallest)
    with pytest.raises(MemoryBudgetError, match="the 8 experts of one token"):
        Engine.open(tiny_pack, **{**smallest, "memory": smallest["memory"] - 1})


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_an_engine_that_cannot_be_opened_leaves_no_file_open(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it fails."""

    def fail(*_: object) -> None:
        raise MoepackError("no more memory")

    Engine.open(tiny_pack).close()
    monkeypatch.setattr(engine_module, "Qwen35", fail)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(MoepackError):
            Engine.open(tiny_pack)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("config", ['{"temperature": "hot"}', "[1]", "{"])
def test_suggestions_that_make_no_sense_are_the_packs(tiny_pack: Path, config: str) -> None:
    with Pack.open(tiny_pack) as pack:
        pack.read_file = lambda name: config.encode()  # type: ignore[method-assign]
        with pytest.raises(DamagedPack, match=r"generation_config\.json"):
            read_sampling(pack)
        with pytest.raises(DamagedPack, match=r"generation_config\.json"):
            read_sampling(pack, temperature=0)


def test_unknown_device_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match="--device tpu: expected auto, cpu, metal, cuda"):
        Engine.open(tiny_pack, device="tpu")


def test_a_block_that_cannot_be_read_stops_generation_and_is_named(tiny_copy: Path) -> None:
    engine = Engine.open(tiny_copy)
    file = tiny_copy / "experts" / "layer_01.bin"
    with open(file, "r+b") as opened:
        opened.truncate(1)
    with pytest.raises(DamagedPack, match=r"layer_01.bin: layer 1 expert \d at byte \d+: read of \d+ bytes") as caught:
        engine.logits(IDS)
    assert caught.value.layer == 1
    assert caught.value.expert is not None


def test_an_odd_model_runs(tmp_path: Path) -> None:
    """One layer of each kind, one expert per token, key and value heads of different size, tied embeddings."""
    model = TinyModel(layers=2, full_attention_interval=2, experts=3, experts_per_tok=1, linear_key_head_dim=8,
                      linear_value_head_dim=24, conv_kernel=3, tie=True, mtp=False)  # fmt: skip
    pack = make_pack(write_checkpoint(tmp_path / "source", model), tmp_path / "pack", bits=3)
    engine = Engine.open(pack, exact=True)
    prefill, state = engine.logits(IDS[:70]), engine.new_state(70)
    with torch.inference_mode():
        steps = [engine.model.logits(engine.model(torch.tensor([token]), state)) for token in IDS[:70]]
    assert (torch.cat(steps) - prefill).abs().max() <= DECODE_TOLERANCE * prefill.abs().max()


def test_ids_of_any_integer_type_are_the_same_prompt(engine: Engine) -> None:
    expected = list(engine.generate(IDS[:20], GREEDY))
    for dtype in (np.int32, np.uint16, np.int64):
        assert list(engine.generate(np.array(IDS[:20], dtype=dtype), GREEDY)) == expected


def test_a_full_state_refuses_another_token(engine: Engine) -> None:
    state = engine.new_state(3)
    with torch.inference_mode():
        for token in IDS[:3]:
            engine.model(torch.tensor([token]), state)
        with pytest.raises(UsageError, match="the state holds 3 positions"):
            engine.model(torch.tensor([IDS[3]]), state)


def test_the_next_layers_experts_are_read_ahead_where_not_all_fit(
    demo_pack: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Engine.open(demo_pack(4), max_context=128)
    small = Engine.open(demo_pack(4), **budget_of(whole, 60))
    monkeypatch.setattr(whole.store, "prefetch", None)  # where all fit nothing is guessed: calling it would fail
    monkeypatch.setattr(whole.store, "fill", lambda: None)  # what is brought in for another reason
    for engine in (whole, small):
        list(engine.generate(IDS[:20], GREEDY))
    assert whole.store.counts.prefetched == 0
    assert small.store.counts.prefetched > small.store.counts.prefetch_used > 0


def test_a_prompt_that_needs_all_experts_has_those_of_the_next_layer_read_meanwhile(
    demo_pack: Callable[[int], Path],
) -> None:
    answers, hints = [], []
    for prefetch in (False, None):
        with Engine.open(demo_pack(4), max_context=128, prefetch=prefetch) as engine:
            answers.append(list(engine.generate(IDS[:60], GREEDY)))
            hints.append((engine.store.counts.prefetched, engine.store.counts.prefetch_used))
    assert answers[0] == answers[1]
    assert hints[0] == (0, 0)
    assert hints[1][0] >= hints[1][1] > 0


def test_an_unknown_policy_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(UsageError, match="eviction policy 'best': expected one of lru"):
        Engine.open(tiny_pack, policy="best")


def test_keys_and_values_are_bf16_where_the_arithmetic_is_rounded_anyway(demo_pack: Callable[[int], Path]) -> None:
    rounded, exact = (Engine.open(demo_pack(4), exact=exact, max_context=512) for exact in (False, True))
    plain = Engine.open(demo_pack(16), max_context=512)
    dtypes = [
        {tensor.dtype for layer in engine.new_state(8).layers for tensor in layer.tensors}
        for engine in (rounded, exact, plain)
    ]
    assert dtypes == [{torch.float32, torch.bfloat16}, {torch.float32}, {torch.float32}]
    a = rounded.architecture
    caches = 2 * 2 * a.num_key_value_heads * a.head_dim * 512  # two layers of eight have attention
    assert exact.memory_plan.state_bytes - rounded.memory_plan.state_bytes == 2 * caches


def test_a_token_with_all_its_experts_in_memory_is_counted_and_traced(tiny_pack: Path) -> None:
    """Native code runs it without asking the store, which is told afterwards."""
    engine = Engine.open(tiny_pack, max_context=64)
    list(engine.generate(IDS[:20], GREEDY))
    before, fetches = engine.store.counts.copy(), []
    engine.store.on_fetch = lambda *fetch: fetches.append(fetch)
    with torch.inference_mode():
        engine.model(torch.tensor([IDS[0]]), engine.new_state(1))
    layers, chosen = engine.architecture.num_hidden_layers, engine.architecture.num_experts_per_tok
    counts = engine.store.counts.since(before)
    assert counts.hits + counts.misses == layers * chosen
    assert [(layer, len(set(ids)), is_prefill) for layer, ids, is_prefill in fetches] == [
        (layer, chosen, False) for layer in range(layers)
    ]

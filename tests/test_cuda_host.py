"""The CUDA host without a GPU: its driver calls, run as late as streams may, give the tokens of --device cpu."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import fake_cuda
from conftest import budget_of, make_pack
from moepack.kernels import cuda_device, cuda_slots, launches, token_launches
from moepack.kernels.batch import BatchSizes
from moepack.layout.errors import MoepackError
from moepack.runtime import Engine, SamplingParams, qwen35
from moepack.runtime.evaluate import evaluate_text
from moepack.runtime.expert_io import Read
from test_emulated_device import CONTEXT, IDS, greedy, open_with

UPLOAD = cuda_device.CudaDevice.upload  # before the double takes its place

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.Driver:
    return fake_cuda.install(monkeypatch)


@pytest.mark.parametrize("least", [0, 2**20])
@pytest.mark.parametrize(("slots", "prefetch"), [(24, False), (12, True), (8, False), (8, True)])
def test_tokens_are_those_of_the_cpu_backend(
    driver: fake_cuda.Driver,
    tiny_pack: Path,
    slots: int,
    prefetch: bool,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once with cuda/'s kernels for its experts, and once as it is: for them it is too small."""
    monkeypatch.setattr(token_launches, "LEAST_WEIGHTS", dict.fromkeys(token_launches.LEAST_WEIGHTS, least))
    expected = greedy(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), 8)
    with open_with(slots, tiny_pack, device="cuda", prefetch=prefetch) as engine:
        assert greedy(engine, 8) == expected
        assert greedy(engine, 8) == expected  # another sequence
        assert driver.calls["graph"]


def test_experts_gate_up_finds_its_inputs_before_it_waits(
    driver: fake_cuda.Driver, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of cuda/ reads x first: what is before it has waited for whoever wrote x, in a graph or not."""
    monkeypatch.setattr(token_launches, "LEAST_WEIGHTS", dict.fromkeys(token_launches.LEAST_WEIGHTS, 0))
    for slots, expected in ((24, {"choose_experts/choose_experts"}), (8, {"copy"})):
        driver.log.clear()
        with open_with(slots, tiny_pack, device="cuda", prefetch=True) as engine:
            one, other = (engine.generate(IDS, SamplingParams(temperature=0, max_tokens=6)) for _ in "ab")
            assert list(zip(one, other))
        places = [i for i, name in enumerate(driver.log) if name.startswith("experts_vector/experts_gate_up")]
        assert {driver.log[i - 1] for i in places} == expected


def test_what_the_gpu_holds_at_a_time_is_planned_for(
    driver: fake_cuda.Driver, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than a chunk can have: a budget that is enough for short chunks is not refused."""
    plans = {}
    for tokens in (512, 2048):
        monkeypatch.setattr(cuda_device.CudaDevice, "batch", BatchSizes(tokens, 512))
        for context in (64, 1024):
            with Engine.open(tiny_pack, device="cuda", exact=True, max_context=context) as engine:
                plans[tokens, engine.memory_plan.prefill_chunk] = engine.memory_plan.scratch_bytes
    pair = 4 * (2 * 96 + 4 * 64)  # floats of the hidden size and of an expert's width
    assert plans[2048, 1024] - plans[512, 1024] == (2048 - 512) * pair
    assert plans[2048, 64] == plans[512, 64]  # 65 tokens of two experts each, and the shared one


def step_once(engine: Engine, token_id: int, state: object) -> int:
    """One token; the likeliest next."""
    with torch.inference_mode():
        return int(engine.model.ops.argmax(engine.model.logits(engine.model(torch.tensor([token_id]), state)))[0])


def test_scores_of_the_gpu_serve_whoever_wants_them(driver: fake_cuda.Driver, tiny_pack: Path) -> None:
    """Sampled, with log-probabilities, from a kept state, evaluated against a reference."""
    cpu = Engine.open(tiny_pack, exact=True, max_context=256)
    gpu = Engine.open(tiny_pack, exact=True, max_context=256, device="cuda", snapshot_bytes=2**22)
    ids = [place % 60 for place in range(150)]
    assert gpu.read_ahead(ids) == 128
    for sampling in (
        SamplingParams(temperature=1, seed=3, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0, top_logprobs=3, max_tokens=8, ignore_eos=True),
    ):
        generation = gpu.generate(ids, sampling)
        assert list(generation) == list(cpu.generate(ids, sampling))
        assert generation.cached_tokens == 128
    scores = evaluate_text(gpu, ids, reference=cpu)
    assert scores.perplexity == pytest.approx(evaluate_text(cpu, ids).perplexity, rel=1e-5)
    assert scores.top1_agreement == 1


def calls_of_a_token(driver: fake_cuda.Driver, engine: Engine) -> tuple[Counter[str], int]:
    """The driver's calls for a token whose experts are all in memory, and how often the GPU is waited for."""
    state, token_id = engine.new_state(40), IDS[0]
    for count in range(40):
        driver.calls.clear()
        misses, epoch = engine.store.counts.misses, engine.model.ops.device.epoch
        token_id = step_once(engine, token_id, state)
        if engine.store.counts.misses == misses and count > 2:
            break
    return Counter(driver.calls), engine.model.ops.device.epoch - epoch


def test_a_token_is_few_calls(driver: fake_cuda.Driver, tiny_pack: Path) -> None:
    """All in memory for good: one graph. Else a layer: its experts' places, their kernel, a graph, a wait."""
    with open_with(24, tiny_pack, device="cuda") as engine:
        layers = len(engine.model.layers)
        settled, waits = calls_of_a_token(driver, engine)
        assert (settled["graph"], settled["copy"], settled["recorded"], waits) == (1, 1, 0, 1)  # a copy of the answer
        assert settled["kernel"] <= 5  # embed, norm, head, the likeliest
    with open_with(23, tiny_pack, device="cuda", prefetch=False) as engine:
        streamed, waits = calls_of_a_token(driver, engine)
        assert streamed == settled + Counter(graph=layers, copy=layers, kernel=layers)
        assert waits == layers + 1


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_prompt_asks_nobody_where_everything_is_in_memory(
    driver: fake_cuda.Driver, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, is_watched: bool
) -> None:
    """The GPU finds who chose which expert, a few pairs at a time: the bits and the counts of the other way."""
    monkeypatch.setattr(cuda_device.CudaDevice, "batch", BatchSizes(64, 512))
    ids = [place * place % 61 for place in range(60)]
    few = budget_of(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), 12)
    found, fetched = [], []
    for name, options in (("streamed", few), ("asking", {}), ("settled", {})):
        with (
            monkeypatch.context() as patch,
            Engine.open(tiny_pack, **{**options, "device": "cuda", "exact": True, "max_context": len(ids)}) as engine,
        ):
            assert engine.store.has_room_for_all == (name != "streamed")
            if name == "asking":
                patch.setattr(engine.model.ops, "settle_experts", lambda *_: None)
            if name == "settled":
                patch.setattr(engine.store, "fetch", lambda *_, **__: pytest.fail("waits for the router"))
            if is_watched and name != "streamed":
                engine.store.on_fetch = lambda *fetch, name=name: fetched.append((name, *fetch))
            driver.log.clear()
            found.append((torch.cat(list(engine.iter_logits(ids))), engine.store.counts.hits))
            assert driver.log.count("order_pairs/order_pairs") == (name == "settled") * len(engine.model.layers)
    (streamed, _), (asking, asked), (settled, used) = found
    assert torch.equal(settled, streamed)
    assert torch.equal(settled, asking)
    assert used == asked
    assert [use for name, *use in fetched if name == "settled"] == [use for name, *use in fetched if name == "asking"]
    assert bool(fetched) == is_watched


def test_a_prompt_that_is_broken_off_leaves_nothing_to_the_next(
    driver: fake_cuda.Driver, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it used is counted while it runs, some layers behind what is handed over, and not by who comes next."""
    monkeypatch.setattr(qwen35, "LAYERS_AHEAD", 2)
    ids, notes = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), []
    with Engine.open(tiny_pack, device="cuda", exact=True, max_context=CONTEXT) as engine:
        engine.store.on_fetch = lambda layer, expert_ids, in_order: notes.append(layer)
        done = []

        def stop_at_the_fourth() -> None:
            done.append(len(notes))
            if len(done) == 4:
                raise KeyboardInterrupt

        with torch.inference_mode():
            with pytest.raises(KeyboardInterrupt):
                engine.model(ids, engine.new_state(8), stop_at_the_fourth)
            assert done == [0, 0, 1, 2]
            notes.clear()
            state = engine.new_state(16)
            engine.model(ids, state)
            assert notes == list(range(len(engine.model.layers)))
            engine.close()
            with pytest.raises(RuntimeError, match="closed"):
                engine.model(ids, state)


def test_a_prompt_of_plain_experts_goes_by_the_processor(
    driver: fake_cuda.Driver, tiny_source: Path, tmp_path: Path
) -> None:
    """No kernel of cuda/ takes them."""
    pack = make_pack(tiny_source, tmp_path / "plain", bits=16)
    expected = greedy(Engine.open(pack, exact=True, max_context=CONTEXT), 4)
    with Engine.open(pack, device="cuda", exact=True, max_context=CONTEXT) as engine:
        assert engine.store.keeps(0)
        assert greedy(engine, 4) == expected
    assert "order_pairs/order_pairs" not in driver.log


def test_sequences_that_take_turns_keep_their_graphs(driver: fake_cuda.Driver, tiny_pack: Path) -> None:
    engine = open_with(23, tiny_pack, device="cuda", prefetch=True)
    expected = greedy(engine, 12)
    one, other = (engine.generate(IDS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)) for _ in "ab")
    pairs = [(next(one), next(other)) for _ in range(5)]
    driver.calls.clear()
    pairs += [(next(one), next(other)) for _ in range(7)]
    assert not driver.calls["recorded"]
    assert pairs == list(zip(expected, expected))


def test_graphs_end_with_their_sequence(driver: fake_cuda.Driver, tiny_pack: Path) -> None:
    engine = open_with(12, tiny_pack, device="cuda")
    gc.disable()  # not when the collector comes round to them
    try:
        for _ in range(3):
            greedy(engine, 6)
            assert driver.graphs == len(engine.model.layers) + 1
        engine.new_state(8)
        assert driver.graphs == 0
    finally:
        gc.enable()


def test_pieces_are_given_back(driver: fake_cuda.Driver, tiny_pack: Path) -> None:
    engine = open_with(8, tiny_pack, device="cuda")
    greedy(engine, 4)
    registered = fake_cuda.CudaTensor.cuda.registered
    assert 0 < len(registered) <= 2 * engine.store.describe()["queue_depth"]
    engine.close()
    gc.collect()
    assert not registered


@pytest.mark.parametrize("fault", ["admitted", "seen"])
def test_a_copy_that_nobody_waits_for_changes_the_answer(
    driver: fake_cuda.Driver, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The tests above would notice if kernels did not wait for it."""
    expected = greedy(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), 12)
    if fault == "admitted":
        monkeypatch.setattr(cuda_slots.CudaSlots, "admit", lambda slots, buffers: None)
    else:
        monkeypatch.setattr(fake_cuda.Stream, "wait_event", lambda stream, event: None)
    with open_with(8, tiny_pack, device="cuda", prefetch=True) as engine:
        try:
            found = greedy(engine, 12)
        except MoepackError:  # memory that was never written is full of NaN
            found = []
    assert found != expected


@pytest.mark.parametrize(
    "tensor", [torch.arange(12).view(3, 4).T, torch.ones(3, dtype=torch.bfloat16), torch.tensor(5), torch.zeros(0)]
)
def test_what_is_uploaded_by_way_of_pinned_memory_stays_what_it_was(
    driver: fake_cuda.Driver, monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor
) -> None:
    device = cuda_device.CudaDevice()
    monkeypatch.setattr(device, "place", "cpu")  # no device that a tensor would be on already
    found = UPLOAD(device, tensor)
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    assert not tensor.numel() or found.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_that_has_begun_waits_for_what_came_before_it_alone(
    driver: fake_cuda.Driver, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    if not waits:
        monkeypatch.setattr(fake_cuda.Event, "synchronize", lambda event: None)
    device = cuda_device.CudaDevice()
    x, weight, out = device.upload(torch.ones(1, 32)), device.upload(torch.zeros(32)), device.empty(1, 32)
    device.run(launches.rms_norm(x, weight, out, 0.0))
    read = device.begin_read(out)
    device.run(launches.rms_norm(x, weight, out, 3.0))
    assert read().tolist() == [[float(waits)] * 32]
    assert device.read(out).tolist() == [[0.5] * 32]


@pytest.mark.parametrize("waits", [True, False])
def test_a_piece_is_read_into_when_nothing_is_copied_from_it_any_more(
    driver: fake_cuda.Driver, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Three reads of one thread, whose copies run as late as can be: with two pieces the third one has to wait."""
    if not waits:
        monkeypatch.setattr(fake_cuda.Event, "synchronize", lambda event: None)
    slots = cuda_device.CudaDevice().new_slots(3, 4096)
    execute = slots.reads_into(lambda read: read.buffers[0].__setitem__(slice(4096), bytes([read.layer]) * 4096))
    reads = [Read(layer, (0,), [slots.buffer(layer, 4096)]) for layer in range(3)]
    for read in reads:
        execute(read)
    for read in reads:
        slots.admit(read.buffers)
    slots.wait_until_free(2)
    with torch._C.DisableTorchFunctionSubclass():
        found = [slots.block(slot)[0].item() for slot in range(3)]
    assert found == ([0, 1, 2] if waits else [2, 1, 2])


def test_a_slot_is_in_use_until_the_copy_into_it_has_ended(driver: fake_cuda.Driver) -> None:
    """Whether or not a kernel has read it: two copies in two streams have no order."""
    device = cuda_device.CudaDevice()
    slots = device.new_slots(2, 4096)
    read = Read(0, (0,), [slots.buffer(1, 4096)])

    def fill(read: Read) -> None:
        read.buffers[0][:4] = b"read"

    slots.reads_into(fill)(read)
    assert not slots.is_in_use(1)
    slots.admit(read.buffers)
    assert slots.is_in_use(1)
    slots.wait_until_free(1)
    with torch._C.DisableTorchFunctionSubclass():
        assert slots.block(1)[:4].tolist() == list(b"read")

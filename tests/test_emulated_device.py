"""Generation on the Metal kernels, run by the processor as late as a GPU might: the tokens are those of --device cpu.

What a host can get wrong shows here: which buffer goes where, sizes and types, the order of the calls, and every place
where one must wait before memory is written again.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import budget_of, make_pack
from kernel_memory import lay_out
from moepack.kernels import backend, gpu_ops, launches, metal_device, msl, reference
from moepack.kernels.backend import describe_arithmetic, describe_backend
from moepack.kernels.batch import BatchSizes
from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.device import DeviceSlots
from moepack.kernels.emulated_device import EmulatedDevice, EmulatedTensor
from moepack.kernels.gpu_ops import GpuOps
from moepack.kernels.launches import Launch
from moepack.kernels.msl import KernelTextError
from moepack.kernels.simt import Executor
from moepack.layout.errors import UsageError
from moepack.layout.reader import Pack
from moepack.runtime import Engine, SamplingParams
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.memory import default_budget_bytes, taken_bytes
from test_native_matrices import quantized
from tiny_checkpoint import TinyModel, write_checkpoint

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")

IDS = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(1)).tolist()
LOGIT_TOLERANCE = 2e-5  # of the largest logit: the same float32 sums in another order, layer after layer
CONTEXT = 64
RECORDED = ("note_fetch", "note_guess", "note_read", "note_wait")


def greedy(engine: Engine, num_tokens: int, ids: list[int] = IDS) -> list[int]:
    return list(engine.generate(ids, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)))


def logits_by_token(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt that is run one token at a time."""
    state = engine.new_state(len(ids))
    with torch.inference_mode():
        rows = [engine.model.logits(engine.model(torch.tensor([token]), state)).cpu() for token in ids]
    return torch.cat([row.as_subclass(torch.Tensor) for row in rows])


def open_with(slots: int, pack: Path, **options: Any) -> Engine:
    """An engine on the emulated device whose budget is for so many slots."""
    budget = budget_of(Engine.open(pack, exact=True, max_context=CONTEXT), slots)
    engine = Engine.open(pack, **{"device": "metal-emulated", "exact": True, **budget, **options})
    assert engine.store.num_slots == slots
    return engine


def test_the_demo_model_gives_the_tokens_of_the_cpu_backend(demo_pack: Callable[[int], Path]) -> None:
    pack = demo_pack(4)
    expected = greedy(Engine.open(pack, exact=True, max_context=CONTEXT), 6)
    engine = Engine.open(pack, device="metal-emulated", exact=True, max_context=CONTEXT)
    assert greedy(engine, 6) == expected
    assert greedy(engine, 6) == expected  # a second sequence in the same engine: other states


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("prefetch", [False, True])
def test_the_demo_model_streamed(demo_pack: Callable[[int], Path], bits: int, prefetch: bool) -> None:
    """With no more slots than one token's experts, every one of which is refilled again and again."""
    pack = demo_pack(bits)
    expected = greedy(Engine.open(pack, exact=True, max_context=CONTEXT), 20)
    engine = open_with(48, pack, prefetch=prefetch)
    assert greedy(engine, 20) == expected
    assert engine.store.counts.misses > 300
    assert bool(engine.store.counts.prefetched) == prefetch


@pytest.mark.parametrize("exact", [False, True])
def test_it_is_said_how_it_computes(exact: bool) -> None:
    """Kept states go by these words too: those of the processor are not taken for a GPU's."""
    ops = GpuOps(EmulatedDevice(), exact)
    assert describe_backend(ops) == describe_arithmetic(ops) == "float32, Metal kernels emulated on the processor"


def test_a_greedy_answer_takes_every_kernel(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called by a host, in the prompt or in the answer."""
    names: set[str] = set()
    add = EmulatedTensor.queue.add
    monkeypatch.setattr(EmulatedTensor.queue, "add", lambda launch: (names.add(launch.kernel), add(launch)))
    greedy(Engine.open(tiny_pack, device="metal-emulated", exact=True, max_context=CONTEXT), 3)
    assert names == {kernel for name in msl.list_files() for kernel in msl.load(name).kernels}


def test_experts_of_a_prompt_may_come_in_any_parts(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whether pairs are computed at once or by three: an expert is then split, and so is a token.

    And whether a mixer has all tokens at once or 64.
    """
    results = []
    for batch in (EmulatedDevice.batch, BatchSizes(3, 64)):
        monkeypatch.setattr(EmulatedDevice, "batch", batch)
        engine = Engine.open(tiny_pack, device="metal-emulated", exact=True, max_context=70)
        results.append(engine.logits((IDS * 8)[:66]).as_subclass(torch.Tensor))
    assert torch.equal(*results)


def test_logits_of_a_small_odd_model_are_those_of_the_cpu_backend(tmp_path: Path) -> None:
    """One key head for three value heads, other bits for the shared expert, blocks that do not fill their pages."""
    model = TinyModel(layers=4, experts=6, linear_key_heads=1, linear_value_heads=3)
    pack = make_pack(write_checkpoint(tmp_path / "source", model), tmp_path / "pack", bits=2, resident_bits=16)
    expected = logits_by_token(Engine.open(pack, exact=True, max_context=CONTEXT), IDS)
    found = logits_by_token(Engine.open(pack, device="metal-emulated", exact=True, max_context=CONTEXT), IDS)
    assert (found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("slots", "waits_per_layer"), [(24, 0), (23, 1), (8, 1)])
def test_a_token_waits_once_a_layer_and_not_at_all_where_all_experts_are_in_memory(
    tiny_pack: Path, slots: int, waits_per_layer: int
) -> None:
    engine = open_with(slots, tiny_pack)
    device, state = engine.model.ops.device, engine.new_state(8)
    with torch.inference_mode():
        for token in IDS[:3]:
            engine.model(torch.tensor([token]), state)
        before = device.epoch
        engine.model(torch.tensor([IDS[3]]), state)
    assert device.epoch - before == waits_per_layer * len(engine.model.layers)


def test_experts_in_memory_are_handed_over_before_the_others_are_waited_for(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_with(8, tiny_pack)
    log: list[str] = []
    add, submit = EmulatedTensor.queue.add, DeviceSlots.submit
    monkeypatch.setattr(EmulatedTensor.queue, "add", lambda launch: (log.append(launch.kernel), add(launch)))
    monkeypatch.setattr(DeviceSlots, "submit", lambda slots: (log.append("wait for the disk"), submit(slots)))
    logits_by_token(engine, IDS)
    while "wait for the disk" in log:
        place = log.index("wait for the disk")
        assert log[place - 1] == "experts_gate_up"  # the shared expert's at least
        del log[place]


def test_a_slot_is_not_filled_while_work_that_reads_it_is_under_way() -> None:
    """And the device is late enough to notice: what is handed over sees what is in memory when somebody waits."""

    def norm_of_slot(wait: bool) -> torch.Tensor:
        device = EmulatedDevice()
        slots = device.new_slots(2, 4096)
        slots.buffer(0, 4)[:] = struct.pack("<f", 3.0)
        out = device.empty(1, 1)
        device.run(launches.rms_norm(slots.block(0)[:4].view(torch.float32), device.upload(torch.zeros(1)), out, 0.0))
        slots.mark_used([0])
        assert slots.is_in_use(0)
        assert not slots.is_in_use(1)
        if wait:
            slots.wait_until_free(0)
            assert not slots.is_in_use(0)
        slots.buffer(0, 4)[:] = struct.pack("<f", -3.0)
        return device.read(out)

    assert norm_of_slot(wait=True) == 1
    assert norm_of_slot(wait=False) == -1


def test_a_hint_takes_no_slot_of_the_token_under_way(tiny_pack: Path) -> None:
    """Its experts are all read once more, by experts_down, when the last of them has come."""
    with Pack.open(tiny_pack) as pack:
        store = ExpertStore(pack, 2, new_slots=EmulatedDevice().new_slots)
        experts = dict(chain.from_iterable(store.fetch(0, [1, 4])))  # the last batch has been given back
        seen = {expert_id: expert.down_proj.data.clone() for expert_id, expert in experts.items()}
        for batch in store.fetch(0, [1, 4]):
            store.prefetch(1, [2, 3])
            assert all(torch.equal(expert.down_proj.data, seen[expert_id]) for expert_id, expert in batch)
            assert store.counts.prefetched == 0
        with pytest.raises(ValueError, match="3 experts at once need as many slots, there are 2"):
            store.fetch(0, [1, 2, 3])
        store.close()


def test_torch_waits_its_turn() -> None:
    device = EmulatedDevice()
    x, weight, out = device.upload(torch.randn(3, 40)), device.upload(torch.randn(40)), device.empty(3, 40)
    device.run(launches.rms_norm(x, weight, out, 1e-6))
    with torch._C.DisableTorchFunctionSubclass():
        assert out.isnan().all()  # not yet
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a[:-1], "takes 4 buffers, got 3"),
        (lambda a: (a[0].to(torch.bfloat16), *a[1:]), "x is device float, got a tensor of torch.bfloat16"),
        (lambda a: (a[0].T, *a[1:]), "not contiguous"),
        (lambda a: (*a[:3], a[3] + b"\0"), "got 17 bytes"),
        (lambda a: (*a[:3], torch.zeros(3, dtype=torch.int32)), "got a tensor of 12 bytes"),
    ],
)
def test_arguments_that_do_not_fit_a_kernel_are_refused_when_bound(change: Any, text: str) -> None:
    x = torch.randn(8, 40)
    launch = launches.rms_norm(x, torch.ones(40), torch.empty(8, 40), 1e-6)
    wrong = Launch(launch.file, launch.kernel, change(launch.arguments), launch.grid, launch.group)
    with pytest.raises(KernelTextError, match=text):
        EmulatedDevice().bind(wrong)


def test_a_group_larger_than_the_kernel_allows_is_refused() -> None:
    launch = launches.rms_norm(torch.randn(8, 40), torch.ones(40), torch.empty(8, 40), 1e-6)
    with pytest.raises(KernelTextError, match="threadgroups of up to"):
        EmulatedDevice().bind(Launch(launch.file, launch.kernel, launch.arguments, launch.grid, (2048, 1, 1)))


# The Metal host, with the executor behind torch's own interface


@pytest.fixture
def fake_mps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.mps as MetalDevice uses it, kernels run by the executor; the names of those that ran."""
    names: list[str] = []

    class Library:
        def __init__(self, text: str):
            self.text = text

        def __getattr__(self, kernel: str) -> Any:
            file = next(name for name in metal_device.msl.list_files() if metal_device.msl.load(name).text == self.text)
            call = partial(run, file, kernel)
            return type(
                "Kernel", (), {"max_threads_per_threadgroup": 1024, "__call__": lambda _, *a, **o: call(*a, **o)}
            )()

    def run(file: str, kernel: str, *tensors: torch.Tensor, threads: list[int], group_size: list[int]) -> None:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        grid = tuple(total // size for total, size in zip(threads, group_size))
        names.append(kernel)
        Executor().run(Launch(file, kernel, tensors, grid, tuple(group_size)))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(metal_device.MetalDevice, "place", torch.device("cpu"))
    monkeypatch.setattr(torch.mps, "compile_shader", Library)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.mps, "_host_alias_storage", lambda storage: storage, raising=False)
    monkeypatch.setattr(torch._C, "_mps_maxBufferLength", lambda: 2**21 + 10 * 2**16, raising=False)
    return names


def test_the_metal_host_hands_over_what_the_emulated_one_does(fake_mps: list[str], tiny_pack: Path) -> None:
    """Not a proof that Apple's GPU does: of what this host passes to torch, in slots of two buffers."""
    expected = logits_by_token(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), IDS)
    engine = Engine.open(tiny_pack, device="metal", exact=True, max_context=CONTEXT)
    found = logits_by_token(engine, IDS)
    assert (found - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()
    assert {"linears", "delta_step", "attention_split", "choose_experts", "experts_down"} <= set(fake_mps)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert list(engine.generate(IDS, sampling)) == greedy(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), 4)


def test_the_gpu_works_beside_what_is_measured(fake_mps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "GPU_LOAD_FLOATS", 8)
    log: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: log.append("GPU waited for"))
    backend.share_memory_load(lambda: log.append("work"))()
    assert log == ["work", "GPU waited for"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert backend.share_memory_load(log.clear) == log.clear


def test_an_old_torch_is_told_what_metal_needs(fake_mps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.mps, "_host_alias_storage")
    with pytest.raises(UsageError, match=r"needs torch 2\.13 or newer"):
        metal_device.MetalDevice()


def test_a_gpu_that_is_not_there_is_said(tiny_pack: Path) -> None:
    for device in ("metal", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UsageError, match=f"--device {device}: torch finds no"):
            Engine.open(tiny_pack, device=device)


def test_a_budget_is_of_the_gpus_own_memory_where_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "memory", staticmethod(lambda: (2**30, 10 * 2**30)))
    assert taken_bytes("cuda") == 2**30
    assert default_budget_bytes("cuda") == 10 * 2**30
    monkeypatch.setattr("moepack.runtime.memory.available_bytes", lambda: 2**50)
    for device in ("cpu", "metal-emulated"):
        assert default_budget_bytes(device) > 2**49


def test_more_slots_than_two_buffers_hold_are_refused_with_the_numbers(fake_mps: list[str]) -> None:
    ops = GpuOps(metal_device.MetalDevice())
    with pytest.raises(UsageError, match=r"buffers hold .* GiB of experts"):
        ops.new_slots(100, 2**16)


def test_a_widened_matrix_gives_the_product_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a prompt meets plain weights on NVIDIA's: a kernel widens some rows at a time, torch multiplies."""
    monkeypatch.setattr(gpu_ops, "WIDENED_WEIGHTS", 2000)
    ops, x = GpuOps(EmulatedDevice()), torch.randn(3, 128)
    for bits in (2, 3, 4, 8):
        _, (matrix,) = lay_out([quantized(70, 128, bits, 32)])
        expected = reference.linear(x, matrix)
        found = ops._widened_product(ops.upload(x), matrix).as_subclass(torch.Tensor)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("recorded", [False, True])
def test_layers_with_nothing_to_read_ahead_are_not_stopped_at(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """With all but one expert in memory most layers have what they chose, and what the next one would choose."""
    expected = greedy(Engine.open(tiny_pack, exact=True, max_context=CONTEXT), 20)
    engine = open_with(23, tiny_pack, prefetch=True)
    if recorded:
        monkeypatch.setattr(engine.store, "recorder", SimpleNamespace(**dict.fromkeys(RECORDED, lambda *facts: None)))
    stops: list[int] = []
    run = engine.model.fused[0].run
    monkeypatch.setattr(engine.model.fused[0], "run", lambda first: (stops.append(run(first)), stops[-1])[1])
    assert greedy(engine, 20) == expected
    layers, steps = len(engine.model.layers), 19  # the first token comes from the prompt
    stopped = sum(stop < layers for stop in stops)
    if recorded:
        assert stopped == steps * layers
    else:
        assert layers <= stopped < steps * layers / 3  # the second token knows of no guesses yet
    counts = engine.store.counts
    assert counts.hits + counts.misses >= steps * layers * engine.architecture.num_experts_per_tok

"""NVIDIA's GPUs: the .metal text, translated by msl.py, compiled by NVRTC for the GPU at hand; a simdgroup is a warp.

Experts lie in the GPU's memory. A reading thread fills pinned memory of its own from the disk and lets the GPU's
copy engine bring them into the slot, on a stream of its own: other reads, copies and the kernels go on meanwhile.
What a token does between two waits is recorded once as a CUDA graph (capture).

    ops, device = choose_backend("cuda")
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from moepack.kernels import byte_launches, msl
from moepack.kernels.device import Device, DeviceSlots, Mailbox, Step
from moepack.kernels.launches import Launch
from moepack.kernels.slots import Read, view_host_pages
from moepack.layout.errors import UsageError
from moepack.layout.pages import Pages

CONTEXT_BYTES = 640 * 2**20  # of the driver and torch on the GPU; an H100 with CUDA 13 showed 621 MiB
UPLOAD_BYTES = 256 * 2**20  # of resident weights at a time


class CudaDevice(Device):
    """The current CUDA device of torch. Raises UsageError where there is none, or NVRTC is missing."""

    launches = byte_launches
    can_capture = True
    expert_pairs = 4096
    widens_weights = True  # benchmarks/gpu_prompt.py

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no NVIDIA GPU here: use --device cpu")
        self.place = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=self.place)  # the context is torch's
        self._driver, self._nvrtc = _bindings()
        major, minor = torch.cuda.get_device_capability(self.place)
        if major < 8:
            raise UsageError(f"--device cuda needs a GPU of compute capability 8.0, this one has {major}.{minor}")
        self._architecture = f"sm_{major}{minor}"
        self._overlaps_starts = major >= 9
        self.name = f"{torch.cuda.get_device_name(self.place)}, {self._architecture}"
        self._stream = 0  # torch's default stream
        self._modules: dict[str, Any] = {}

    @staticmethod
    def memory() -> tuple[int, int] | None:
        """What the driver's context takes counts as taken; other processes' memory as not to be had."""
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        return CONTEXT_BYTES + torch.cuda.memory_reserved(), free

    def new_mailbox(self, size_bytes: int) -> Mailbox:
        return _CudaMailbox(self, size_bytes)

    def new_pages(self, size_bytes: int) -> Pages:
        return Pages(size_bytes)

    def view_pages(self, pages: Pages) -> torch.Tensor:
        """A copy of the pages on the GPU."""
        host, copy = view_host_pages(pages), self.empty(pages.size_bytes, dtype=torch.uint8)
        for part, place in zip(host.split(UPLOAD_BYTES), copy.split(UPLOAD_BYTES)):
            place.copy_(part)
        return copy

    def new_slots(self, num_slots: int, slot_bytes: int, huge: bool = True) -> DeviceSlots:
        return _CudaSlots(self, num_slots, slot_bytes)

    def capture(self, work: Callable[[], object]) -> Step:
        """Record what `work` hands over, without running it; the result runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._stream = torch.cuda.current_stream().cuda_stream
            try:
                work()
            finally:
                self._stream = 0
        return graph.replay

    def _place_argument(self, argument: torch.Tensor | bytes) -> torch.Tensor | bytes:
        return argument

    def _bind(self, source: msl.Source, launch: Launch, arguments: list[torch.Tensor | bytes]) -> Step:
        kernel = self._kernel(source, launch.kernel)
        values: list[Any] = []
        for parameter, argument in zip(source.kernels[launch.kernel].buffers, arguments):
            if parameter.is_reference:  # by value
                raw = argument if isinstance(argument, bytes) else bytes(argument.cpu().numpy())
                values.append(ctypes.create_string_buffer(raw, len(raw)))
            else:
                assert isinstance(argument, torch.Tensor)
                values.append(ctypes.c_void_p(argument.data_ptr()))
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        call, config, address = self._driver.cuLaunchKernelEx, self._config(launch), ctypes.addressof(places)
        stream = 0

        def step(_: Any = (arguments, values, places)) -> None:
            nonlocal stream
            if stream != self._stream:
                config.hStream = stream = self._stream
            (error,) = call(config, kernel, address, 0)
            if error:
                raise RuntimeError(f"{launch.kernel}: {error!r}")

        return step

    def _config(self, launch: Launch) -> Any:
        """How a kernel is launched: where the GPU can, ready before the last one has ended (wait_for_last)."""
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.group
        if self._overlaps_starts:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def _kernel(self, source: msl.Source, name: str) -> Any:
        module = self._modules.get(source.text)
        if module is None:
            binary = compile_text(self._nvrtc, source, self._architecture)
            error, module = self._driver.cuModuleLoadData(binary)
            _check(error, f"{source.name}.metal cannot be loaded")
            self._modules[source.text] = module
        error, function = self._driver.cuModuleGetFunction(module, name.encode())
        _check(error, f"{source.name}.metal: {name}")
        return function

    def _wait(self) -> None:
        torch.cuda.synchronize()


class _CudaMailbox(Mailbox):
    """A few bytes on the GPU with their twin in pinned memory: written and read through it."""

    def __init__(self, device: CudaDevice, size_bytes: int):
        self._twin = torch.zeros(size_bytes, dtype=torch.uint8).pin_memory()
        super().__init__(device, self._twin.to(device.place), self._twin.numpy().data)

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset, data)
        end = offset + len(data)
        self.bytes[offset:end].copy_(self._twin[offset:end], non_blocking=True)

    def read(self) -> memoryview:
        self._twin.copy_(self.bytes, non_blocking=True)
        return super().read()


@dataclasses.dataclass(frozen=True)
class _Range:
    """Where a read shall land on the GPU."""

    slot: int
    size_bytes: int

    def __len__(self) -> int:
        return self.size_bytes


class _CudaSlots(DeviceSlots):
    """Slots in the GPU's memory, filled by way of pinned memory: a piece of it for each reading thread."""

    def __init__(self, device: CudaDevice, num_slots: int, slot_bytes: int):
        bank = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device.place)
        super().__init__(device, [bank], num_slots, slot_bytes)
        self._own = threading.local()
        self.is_huge = Pages(1).is_huge

    def buffer(self, slot: int, size_bytes: int) -> Any:
        return _Range(slot, size_bytes)

    def reads_into(self, execute: Callable[[Read], None]) -> Callable[[Read], None]:
        def read_and_copy(read: Any) -> None:
            ranges = read.buffers
            staging, stream = self._staging(sum(map(len, ranges)))
            views, end = [], 0
            for place in ranges:
                views.append(staging[end : end + len(place)].numpy().data)
                end += len(place)
            landed = dataclasses.replace(read, buffers=views)
            try:
                execute(landed)
            finally:
                read.retries = landed.retries
            end = 0
            with torch.cuda.stream(stream):
                for place in ranges:
                    piece = staging[end : end + len(place)]
                    self.block(place.slot)[: len(place)].copy_(piece, non_blocking=True)
                    end += len(place)
            stream.synchronize()

        return read_and_copy

    def _staging(self, size_bytes: int) -> tuple[torch.Tensor, torch.cuda.Stream]:
        """This thread's pinned memory, at least so large, and its stream."""
        if getattr(self._own, "size_bytes", 0) < size_bytes:
            self._own.staging, self._own.size_bytes = (
                torch.empty(size_bytes, dtype=torch.uint8).pin_memory(),
                size_bytes,
            )
            self._own.stream = torch.cuda.Stream()
        return self._own.staging, self._own.stream


def compile_text(nvrtc: Any, source: msl.Source, architecture: str) -> bytes:
    """The kernels of a file as machine code for sm_90 and its like. Needs no GPU. Raises RuntimeError with the log."""
    headers = msl.cuda_headers()
    texts, names = ([text.encode() for text in part] for part in (headers.values(), headers.keys()))
    text, name = msl.translate(source, "cuda").encode(), f"{source.name}.cu".encode()
    error, program = nvrtc.nvrtcCreateProgram(text, name, len(headers), texts, names)
    _check(error, "NVRTC")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", "--extra-device-vectorization"]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if failed:
        log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        raise RuntimeError(f"{source.name}.metal does not compile for {architecture}:\n{log}")
    binary = _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(program)
    return binary


def _fetch(get_size: Callable[..., Any], get: Callable[..., Any], program: Any) -> bytes:
    error, size = get_size(program)
    _check(error, "NVRTC")
    data = bytes(size)
    (error,) = get(program, data)
    _check(error, "NVRTC")
    return data


def _check(error: Any, text: str) -> None:
    if int(error):
        raise RuntimeError(f"{text}: {error!r}")


@functools.cache
def _bindings() -> tuple[Any, Any]:
    """NVIDIA's own bindings of the driver and of NVRTC. Raises UsageError if they are not installed."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise UsageError(f"--device cuda needs cuda-bindings: pip install moepack[cuda] ({error})") from None
    return driver, nvrtc

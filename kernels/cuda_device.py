"""NVIDIA's GPUs: the .metal text, translated by msl.py, compiled by NVRTC for the GPU at hand; a simdgroup is a warp.

Experts lie in the GPU's memory, brought there beside the kernels (cuda_slots.py). What a token does between two waits
is recorded once as a CUDA graph (capture), by the driver itself: torch's way waits, empties caches and is for work that
takes memory, which this does not.

    ops, device = choose_backend("cuda")
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch

from moepack.kernels import msl, prompt_launches, token_launches
from moepack.kernels.batch import BatchSizes
from moepack.kernels.cuda_slots import CudaSlots
from moepack.kernels.device import Device, DeviceSlots, Mailbox, Step
from moepack.kernels.launches import Launch
from moepack.kernels.slots import view_host_pages
from moepack.layout.errors import UsageError
from moepack.layout.pages import Pages

CONTEXT_BYTES = 640 * 2**20  # of the driver and torch on the GPU; an H100 with CUDA 13 showed 621 MiB
UPLOAD_BYTES = 256 * 2**20  # of resident weights at a time
PINNED_BYTES = 2**20  # of an upload by way of pinned memory, at most: torch keeps such memory for the next ones


class CudaDevice(Device):
    """The current CUDA device of torch. Raises UsageError where there is none, or NVRTC is missing."""

    launches = token_launches
    can_capture = True
    batch = BatchSizes(experts=8192, mixer=2048)  # half of either was slower: runtime/EXPERIMENTS.md
    prompt_launches: Any = prompt_launches

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
        self._stream, self._order = 0, torch.cuda.current_stream(self.place)  # torch's default stream
        error, self._recording = self._driver.cuStreamCreate(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        _check(error, "a stream")
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    @staticmethod
    def memory() -> tuple[int, int] | None:
        """What the driver's context takes counts as taken; other processes' memory as not to be had."""
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        return CONTEXT_BYTES + torch.cuda.memory_reserved(), free

    def expert_launches(self, columns: int, width: int, bits: Collection[int]) -> Any:
        is_own = token_launches.takes_experts(columns, width, bits)
        return self.launches if is_own else super().expert_launches(columns, width, bits)

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
        return CudaSlots(self, num_slots, slot_bytes)

    def capture(self, work: Callable[[], object]) -> Step:
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # reading threads go on
        (error,) = driver.cuStreamBeginCapture(self._recording, mode)
        _check(error, "a CUDA graph")
        self._stream = int(self._recording)
        try:
            work()
        finally:
            self._stream = 0
            error, graph = driver.cuStreamEndCapture(self._recording)
        _check(error, "a CUDA graph")
        error, executable = driver.cuGraphInstantiate(graph, 0)
        _check(error, "a CUDA graph")
        driver.cuGraphDestroy(graph)

        def replay() -> None:
            (error,) = driver.cuGraphLaunch(executable, self._stream)
            _check(error, "a CUDA graph")

        weakref.finalize(replay, driver.cuGraphExecDestroy, executable).atexit = False
        return replay

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """From pinned memory, so that nobody waits: torch's copy of other memory waits for all work handed over."""
        if tensor.device == self.place or tensor.nbytes > PINNED_BYTES:
            return tensor.to(self.place)
        tensor = tensor.contiguous()
        own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        ctypes.memmove(own.data_ptr(), tensor.data_ptr(), tensor.nbytes)  # torch's own copy wakes all cores for 32 KB
        return own.to(self.place, non_blocking=True)  # torch keeps it for as long as the copy takes

    def begin_read(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        twin = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        twin.copy_(tensor, non_blocking=True)
        wait = self.mark()

        def finish() -> torch.Tensor:
            wait()
            return twin

        return finish

    def mark(self) -> Callable[[], None]:
        event, epoch = torch.cuda.Event(), self.epoch
        event.record()
        self.epoch += 1

        def wait() -> None:
            event.synchronize()
            self.done = max(self.done, epoch)

        return wait

    def copy_in(self, place: int, source: int, size_bytes: int) -> None:
        """Copy pinned memory of the processor to the GPU, by addresses, in the order of the kernels."""
        (error,) = self._driver.cuMemcpyHtoDAsync(place, source, size_bytes, self._stream)
        _check(error, "a copy to the GPU")

    def copy_out(self, place: int, source: int, size_bytes: int) -> None:
        """The way back."""
        (error,) = self._driver.cuMemcpyDtoHAsync(place, source, size_bytes, self._stream)
        _check(error, "a copy from the GPU")

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
        function = self._functions.get((source.text, name))
        if function is None:
            function = self._functions[source.text, name] = self._load(source, name)
        return function

    def _load(self, source: msl.Source, name: str) -> Any:
        module = self._modules.get(source.text)
        if module is None:
            binary = compile_text(self._nvrtc, source, self._architecture)
            error, module = self._driver.cuModuleLoadData(binary)
            _check(error, f"{source.name} cannot be loaded")
            self._modules[source.text] = module
        error, function = self._driver.cuModuleGetFunction(module, name.encode())
        _check(error, f"{source.name}: {name}")
        return function

    def _wait(self) -> None:
        self._order.synchronize()  # and not for copies of experts that are read ahead


class _CudaMailbox(Mailbox):
    """A few bytes on the GPU with their twin in pinned memory, which the processor sees."""

    def __init__(self, device: CudaDevice, size_bytes: int):
        self._twin = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
        own = torch.zeros(size_bytes, dtype=torch.uint8, device=device.place)
        super().__init__(device, own, self._twin.numpy().data)
        self._copy_in, self._copy_out = device.copy_in, device.copy_out

    def send(self, offset: int, size_bytes: int) -> None:
        self._copy_in(self.bytes.data_ptr() + offset, self._twin.data_ptr() + offset, size_bytes)

    def fetch(self) -> None:
        self._copy_out(self._twin.data_ptr(), self.bytes.data_ptr(), len(self._twin))


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
        raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{log}")
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

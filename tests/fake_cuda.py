"""NVIDIA's driver and torch.cuda as cuda_device.py and cuda_slots.py use them, kernels run by the CPU executor.

As late as anything may be: a stream does nothing before somebody waits for it, and what a copy reads is what is there
then. So a small buffer written too early, a slot told filled too early, or a piece of memory read into too early
changes the answer, here every time. Memory of the GPU is the processor's. What it cannot show: that the driver takes
the calls as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moepack.kernels import cuda_device, cuda_slots, gpu_ops, gpu_token, msl, reference
from moepack.kernels.cuda_device import CudaDevice
from moepack.kernels.emulated_device import VIEWS, EmulatedTensor
from moepack.kernels.simt import load_library

Work = Callable[[], object]


class Stream:
    """Work in order. number 0 is the one that kernels and torch's operations are in."""

    numbers = itertools.count(1)

    def __init__(self, number: int | None = None):
        self.cuda_stream = next(self.numbers) if number is None else number
        self._waiting: deque[Work] = deque()
        self._handed_over = self._done = 0
        self._lock = threading.RLock()
        self.recording: list[Work] | None = None

    def __int__(self) -> int:
        return self.cuda_stream

    def add(self, work: Work) -> None:
        if self.recording is not None:
            self.recording.append(work)
            return
        with self._lock:
            self._waiting.append(work)
            self._handed_over += 1

    def position(self) -> int:
        return self._handed_over

    def run(self, until: int | None = None) -> None:
        with self._lock, torch._C.DisableTorchFunctionSubclass():
            while self._waiting and (until is None or self._done < until):
                self._waiting.popleft()()
                self._done += 1

    def synchronize(self) -> None:
        self.run()

    def wait_event(self, event: Event) -> None:
        stream, position = event.place
        if stream is not None:
            self.add(lambda: stream.run(position))


class Event:
    """A place in a stream."""

    def __init__(self, blocking: bool = False):
        self.place: tuple[Stream | None, int] = (None, 0)

    def record(self) -> None:
        stream = CudaTensor.cuda.current_stream()
        self.place = (stream, stream.position())

    def synchronize(self) -> None:
        stream, position = self.place
        if stream is not None:
            stream.run(position)


class Cuda:
    """torch.cuda."""

    def __init__(self) -> None:
        self.default, self._own = Stream(0), threading.local()
        self.registered: set[int] = set()
        self.memory: dict[int, torch.Tensor] = {}  # of the GPU, by address
        self.Stream, self.Event = lambda place: Stream(), Event

    def current_stream(self, place: Any = None) -> Stream:
        return getattr(self._own, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._own.stream = stream
        yield
        del self._own.stream

    def cudart(self) -> Any:
        def register(place: int, size_bytes: int, flags: int) -> int:
            self.registered.add(place)
            return 0

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=self.registered.remove)

    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    get_device_capability = staticmethod(lambda place: (9, 0))
    get_device_name = staticmethod(lambda place: "an emulated GPU")
    memory_reserved = staticmethod(lambda: 0)
    mem_get_info = staticmethod(lambda: (2**36, 2**36))


class CudaTensor(EmulatedTensor):
    """A tensor on the GPU: copies that do not wait go into the thread's stream, all else runs the kernels' first.

    Like torch's it does not meet a tensor of the processor, but for single values, indices and copies.
    """

    cuda: Cuda

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if name == "copy_" and (kwargs or {}).get("non_blocking"):
            to, source = args
            cls.cuda.current_stream().add(lambda: to.copy_(source))
            return args[0]
        if name == "numpy":
            raise TypeError("can't convert a tensor of the GPU to numpy: use .cpu() first")
        if name == "cpu":
            cls.queue.run()
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor).clone()
        if name not in (*VIEWS, "copy_", "__getitem__", "__setitem__") and any(map(_is_of_the_processor, _list(args))):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        return _keep(super().__torch_function__(function, types, args, kwargs))


def _list(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _list(value) if isinstance(value, (list, tuple)) else (value,)


def _is_of_the_processor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) and value.dim() > 0


def _keep(result: Any) -> Any:
    """What is on the GPU stays there: torch gives what is freed to later work only, here to none."""
    for one in _list((result,)):
        if isinstance(one, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                CudaTensor.cuda.memory[one.untyped_storage().data_ptr()] = one
    return result


def _adopt(tensor: torch.Tensor) -> torch.Tensor:
    return _keep(tensor.as_subclass(CudaTensor))


def _check_place(device: CudaDevice, argument: torch.Tensor | bytes) -> torch.Tensor | bytes:
    """A kernel's arguments are on the GPU."""
    assert isinstance(argument, bytes) or argument.untyped_storage().data_ptr() in CudaTensor.cuda.memory
    return argument


class Driver:
    """cuda.bindings.driver.

    calls   counts them by name
    log     what the kernels' stream has done: "copy", or a file and its kernel
    """

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=1)
    CUlaunchConfig = staticmethod(lambda: SimpleNamespace(hStream=0))
    CUlaunchAttribute = staticmethod(lambda: SimpleNamespace(value=SimpleNamespace()))

    def __init__(self, cuda: Cuda):
        self._streams = {0: cuda.default}
        self._load = functools.cache(lambda name: load_library(msl.load(name)))
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.graphs = 0  # that exist

    def cuStreamCreate(self, flags: int) -> tuple[int, Stream]:
        stream = Stream()
        self._streams[stream.cuda_stream] = stream
        return 0, stream

    def cuStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[int]:
        stream.recording = []
        return (0,)

    def cuStreamEndCapture(self, stream: Stream) -> tuple[int, list[Work]]:
        assert stream.recording is not None
        recorded, stream.recording = stream.recording, None
        return 0, recorded

    def cuGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        self.graphs += 1
        return 0, list(graph)

    def cuGraphDestroy(self, graph: list[Work]) -> tuple[int]:
        graph.clear()
        return (0,)

    def cuGraphExecDestroy(self, executable: list[Work]) -> tuple[int]:
        self.graphs -= 1
        executable.clear()
        return (0,)

    def cuGraphLaunch(self, executable: list[Work], stream: int) -> tuple[int]:
        self.calls["graph"] += 1
        for work in list(executable):
            self._streams[stream].add(work)
        return (0,)

    def cuMemcpyHtoDAsync(self, place: int, source: int, size_bytes: int, stream: int) -> tuple[int]:
        return self._copy(place, source, size_bytes, stream)

    def cuMemcpyDtoHAsync(self, place: int, source: int, size_bytes: int, stream: int) -> tuple[int]:
        return self._copy(place, source, size_bytes, stream)

    def _copy(self, place: int, source: int, size_bytes: int, stream: int) -> tuple[int]:
        self.calls["copy" if self._streams[stream].recording is None else "recorded"] += 1
        self._streams[stream].add(lambda: (self.log.append("copy"), ctypes.memmove(place, source, size_bytes)))
        return (0,)

    def cuModuleLoadData(self, binary: bytes) -> tuple[int, msl.Source]:
        return 0, msl.load(binary.decode())

    def cuModuleGetFunction(self, module: msl.Source, name: bytes) -> tuple[int, Any]:
        return 0, (module, module.kernels[name.decode()])

    def cuLaunchKernelEx(self, config: Any, kernel: tuple[msl.Source, msl.Signature], arguments: int, _: int) -> Any:
        source, signature = kernel
        places = (ctypes.c_void_p * len(signature.buffers)).from_address(arguments)
        values: list[Any] = []  # as the driver does: copied when it is launched
        for parameter, place in zip(signature.buffers, places):
            if parameter.is_reference:
                raw = ctypes.string_at(place, signature.structs[parameter.type].size_bytes)
                values.append(ctypes.create_string_buffer(raw, len(raw)))
            else:
                values.append(ctypes.c_void_p.from_address(place).value)
        grid = (ctypes.c_uint * 3)(config.gridDimX, config.gridDimY, config.gridDimZ)
        group = (ctypes.c_uint * 3)(config.blockDimX, config.blockDimY, config.blockDimZ)

        def run() -> None:
            self.log.append(f"{source.name}/{signature.name}")
            library = self._load(source.name)
            pointers = [one if isinstance(one, int) else ctypes.addressof(one) for one in values]
            buffers = (ctypes.c_void_p * len(pointers))(*pointers)
            function = ctypes.cast(getattr(library, signature.name), ctypes.c_void_p)
            assert not library.simt_launch(function, buffers, grid, group, 0), library.simt_error().decode()

        stream = self._streams[config.hStream]
        self.calls["kernel" if stream.recording is None else "recorded"] += 1
        stream.add(run)
        return (0,)


class _OnGpu(TorchFunctionMode):
    """`with torch.device(...)` of the GPU: what is made inside is on it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return _adopt(result) if function.__name__ in ("arange", "empty", "ones", "tensor", "zeros") else result


class _Torch:
    """torch, where a GPU is the processor."""

    def __init__(self, cuda: Cuda):
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, kind: Any, number: int | None = None) -> Any:
        return torch.device("cpu") if isinstance(kind, str) else _OnGpu()

    def zeros(self, *shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = torch.zeros(*shape, **options)
        return _adopt(made) if "device" in options else made

    def empty(self, *shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = torch.zeros(*shape, **options) if pin_memory else torch.empty(*shape, **options)
        return _adopt(made) if "device" in options else made


def install(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let CudaDevice find a GPU; what is counted of its driver."""
    cuda = Cuda()
    driver = Driver(cuda)
    monkeypatch.setattr(CudaTensor, "cuda", cuda, raising=False)
    monkeypatch.setattr(CudaTensor, "queue", cuda.default)
    for module in (cuda_device, cuda_slots, gpu_ops, gpu_token):
        monkeypatch.setattr(module, "torch", _Torch(cuda))
    monkeypatch.setattr(cuda_device, "_bindings", lambda: (driver, None))
    monkeypatch.setattr(cuda_device, "compile_text", lambda nvrtc, source, architecture: source.name.encode())
    monkeypatch.setattr(CudaDevice, "zeros", lambda self, *shape: _adopt(torch.zeros(shape)))
    monkeypatch.setattr(CudaDevice, "empty", _empty)
    # Budgets of tests are those of the processor, whose kernels hold as much at a time.
    monkeypatch.setattr(CudaDevice, "batch", reference.batch)
    monkeypatch.setattr(CudaDevice, "_place_argument", _check_place)
    monkeypatch.setattr(CudaDevice, "upload", lambda self, tensor: _adopt(tensor.clone()))
    return driver


def _empty(self: CudaDevice, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    empty = torch.empty(shape, dtype=dtype)
    return _adopt(empty.fill_(torch.nan if dtype.is_floating_point else -1))  # what is read unwritten shows

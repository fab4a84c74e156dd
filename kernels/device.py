"""What a backend asks of a GPU, and no more: memory, kernels in order, and to know when it has done with something.

Work handed to a device is done in the order given, later, while the caller goes on. Tensors of the device are torch's
own, so that torch's operations on them keep that order; kernels are the text in metal/, as launches.py describes each
call. Three devices have this interface: Metal, NVIDIA's, and one emulated on the processor, which is as late as
anything may be. Every call is checked against the kernel's signature when it is bound.

    device = MetalDevice()
    step = device.bind(launches.rms_norm(x, weight, out, eps))
    step()                                   # as often as wanted, the tensors stay
    device.wait()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from moepack.kernels import launches, msl
from moepack.kernels.batch import BatchSizes
from moepack.kernels.launches import Launch
from moepack.kernels.matrix import Expert
from moepack.kernels.slots import HostSlots
from moepack.layout.pages import Pages

Step = Callable[[], object]


class Device(ABC):
    """A GPU as the operations see it.

    name     for people: what it is, and how the kernels came to it
    place    torch's name of it
    epoch    counts the waits: work handed over now belongs to this number
    done     work of this epoch and of all before has ended
    """

    launches: Any = launches  # the module with the calls of a token's products: its own where a device has better ones

    name: str
    place: torch.device
    can_capture = False  # whether capture works
    batch = BatchSizes(experts=512, mixer=2048)
    prompt_launches: Any = None  # the module with the calls of a prompt's products, if it is not that of all devices

    def __init__(self) -> None:
        self.epoch, self.done = 1, 0
        self._structs: dict[bytes, torch.Tensor] = {}

    def bind(self, launch: Launch) -> Step:
        """A call that can be repeated. Raises KernelTextError if the arguments do not fit the kernel."""
        source = msl.load(launch.file)
        source.kernels[launch.kernel].check(launch.arguments, launch.group)
        return self._bind(source, launch, [self._place_argument(argument) for argument in launch.arguments])

    def run(self, launch: Launch) -> None:
        """Hand over one call."""
        self.bind(launch)()

    def wait(self) -> None:
        """Return once all work handed over is done."""
        self._wait()
        self.epoch, self.done = self.epoch + 1, self.epoch

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's values on the processor, once all work handed over is done."""
        values = self._read(tensor)
        self.epoch, self.done = self.epoch + 1, self.epoch
        return values

    @staticmethod
    def memory() -> tuple[int, int] | None:
        """Bytes of the device's own memory that this process has taken and may still take; None if it has none."""
        return None

    def expert_launches(self, columns: int, width: int, bits: Collection[int]) -> Any:
        """The module with the calls of a token's experts, for inputs of so many columns, this width and these bits."""
        return launches

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self.place)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.place)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the device."""
        return tensor.to(self.place)

    def begin_read(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What `read` does, in two parts: work handed over before the function is called need not be waited for."""
        return lambda: self.read(tensor)

    def mark(self) -> Callable[[], None]:
        """A function that returns once all work handed over before this call is done."""
        return self.wait

    def upload_bytes(self, raw: bytes) -> torch.Tensor:
        """Packed structs on the device: uint8."""
        return self.upload(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

    def submit(self) -> None:  # noqa: B027  most devices begin by themselves
        """Begin the work handed over so far: the caller is about to wait for something else."""

    @abstractmethod
    def new_mailbox(self, size_bytes: int) -> Mailbox:
        """Memory for small things that go back and forth."""

    @abstractmethod
    def new_pages(self, size_bytes: int) -> Pages:
        """Memory that the processor fills and view_pages then shows to the kernels."""

    @abstractmethod
    def view_pages(self, pages: Pages) -> torch.Tensor:
        """Pages as the kernels see them: uint8. Filled for good."""

    @abstractmethod
    def new_slots(self, num_slots: int, slot_bytes: int, huge: bool = True) -> DeviceSlots:
        """Memory for experts."""

    def capture(self, work: Callable[[], object]) -> Step:
        """Record the calls of kernels and the fetches of mailboxes that `work` hands over, without running them.

        The result hands all of them over at once. What they read and write has to stay where it is meanwhile, and
        every call in it must have been bound before. Only where can_capture.
        """
        raise NotImplementedError

    @abstractmethod
    def _bind(self, source: msl.Source, launch: Launch, arguments: list[Any]) -> Step: ...

    @abstractmethod
    def _wait(self) -> None: ...

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()  # torch waits by itself

    def _place_argument(self, argument: torch.Tensor | bytes) -> torch.Tensor | bytes:
        """Structs of sizes are few and never change: each lies on the device once."""
        if isinstance(argument, torch.Tensor):
            return argument
        place = self._structs.get(argument)
        if place is None:
            place = self._structs[argument] = self.upload_bytes(argument)
        return place


class Mailbox:
    """A few bytes that the processor and the kernels both write and read.

    Whoever writes sees to it that the other has done: what a kernel reads of it is free again after the next wait.
    Here both see the same memory; where they do not, send and fetch copy.

    bytes   the memory as a tensor of the device: uint8
    """

    def __init__(self, device: Device, tensor: torch.Tensor, shared: memoryview):
        self.bytes, self._device, self._shared = tensor, device, shared

    def put(self, offset: int, data: bytes) -> None:
        """Write bytes that kernels see once they have been sent."""
        self._shared[offset : offset + len(data)] = data

    def send(self, offset: int, size_bytes: int) -> None:
        """Let the kernels handed over from now on see what has been put there."""

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes where the kernels handed over from now on see them."""
        self.put(offset, data)
        self.send(offset, len(data))

    def fetch(self) -> None:
        """Let the processor see after the next wait what the kernels handed over so far will have written."""

    def look(self) -> memoryview:
        """All bytes, as the last fetch and wait have left them."""
        return self._shared

    def read(self) -> memoryview:
        """All bytes, once the work handed over so far is done."""
        self.fetch()
        self._device.wait()
        return self.look()


class DeviceSlots(HostSlots):
    """Slots that a GPU reads: which of them it may still be reading is known by the epoch in which they were used.

    The one wait of each layer, for the router's choice, ends an epoch. So a slot is nearly always free again when
    another expert wants it, without an event of its own; only a store of few slots has to wait.

    banks     the memory, uint8: one tensor, or more where a buffer of the device must not be so large
    code_of   where an expert is, in a number: set by the operations
    """

    are_read_to_the_end = True  # experts_down is one dispatch for all of a token's experts

    def __init__(self, device: Device, banks: Sequence[torch.Tensor], slots_per_bank: int, slot_bytes: int):
        self.banks, self._device = banks, device
        self._slots_per_bank, self._slot_bytes = slots_per_bank, slot_bytes
        self._used_in: dict[int, int] = {}  # slot -> epoch
        self.code_of: Callable[[Expert], int] = lambda expert: 1
        self.is_huge = False

    def place_of(self, slot: int) -> tuple[int, int]:
        """The bank of a slot and its first byte there."""
        bank, place = divmod(slot, self._slots_per_bank)
        return bank, place * self._slot_bytes

    def block(self, slot: int) -> torch.Tensor:
        bank, first = self.place_of(slot)
        return self.banks[bank][first : first + self._slot_bytes]

    def describe(self, expert: Expert) -> int:
        return self.code_of(expert)

    def mark_used(self, slots: Sequence[int]) -> None:
        self._used_in.update(dict.fromkeys(slots, self._device.epoch))

    def is_in_use(self, slot: int) -> bool:
        return self._used_in.get(slot, 0) > self._device.done

    def wait_until_free(self, slot: int) -> None:
        if self.is_in_use(slot):
            self._device.wait()

    def submit(self) -> None:
        self._device.submit()


class UnifiedSlots(DeviceSlots):
    """Slots in memory that the processor and the GPU share: the disk writes where the kernels read."""

    def __init__(
        self,
        device: Device,
        banks: Sequence[torch.Tensor],
        buffers: Sequence[memoryview],
        slots_per_bank: int,
        slot_bytes: int,
    ):
        super().__init__(device, banks, slots_per_bank, slot_bytes)
        self._buffers = buffers

    def buffer(self, slot: int, size_bytes: int) -> memoryview:
        bank, first = self.place_of(slot)
        return self._buffers[bank][first : first + size_bytes]

"""The Metal kernels as text: found, put together, understood, and rewritten for other compilers.

Kernels are plain Metal Shading Language in a restricted style, one operation per file in metal/; cuda/ has those that
need what only NVIDIA's GPUs can do, in the same language. The text of a file, its own #includes filled in, is what
Apple's compiler gets, and what everything here starts from: the signatures, against which every call is checked, the
structs that hosts must fill, and the translations, which are the same text with the address spaces dropped, threadgroup
variables given a home, and an entry point for each kernel.

    source = load("linears")
    source.kernels["linears"].parameters        # name, address space, type of each buffer
    source.structs["MatrixForm"].pack(data=0, scales=4096, ...)
    translate(source, "cuda")                   # for NVRTC, with cuda_headers()

Restrictions, each checked here or by a test: kernels are written `[[kernel, max_total_threads_per_threadgroup(N)]]
void name(...)`; every parameter has an attribute; buffers are numbered from 0 without gaps; a threadgroup variable is
declared alone, in a kernel's body; no function constants, since torch.mps.compile_shader cannot set them.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

METAL = Path(__file__).with_name("metal")
CUDA = Path(__file__).with_name("cuda")
SHIM = Path(__file__).with_name("shim")
MAX_THREADS = 1024  # of a threadgroup, on every Apple GPU
THREADGROUP_BYTES, CUDA_THREADGROUP_BYTES = 32768, 49152  # of memory that a kernel may declare, on Apple's and NVIDIA's

_INCLUDE = re.compile(r'^#include "(\w+\.h)"\n', re.M)
_COMMENT = re.compile(r"//[^\n]*")
_KERNEL = re.compile(
    r"\[\[kernel, max_total_threads_per_threadgroup\((\w+)\)\]\]\s*void\s+(\w+)\s*\(((?:[^()]|\([^()]*\))*)\)\s*\{"
)
_PARAMETER = re.compile(r"(.+?)(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", re.S)
_BUFFER = re.compile(r"(device|constant) (const )?(\w+)\s*([*&])")
_STRUCT = re.compile(r"\bstruct (\w+) \{(.*?)\};", re.S)
_FIELD = re.compile(r"(\w+)((?: \w+(?:\[\w+\])?,?)+)")
_CONSTANT = re.compile(r"\bconstant constexpr uint (\w+) = (\w+);")
_DEFINE = re.compile(r"^#define (\w+) (\d+)$", re.M)
# A threadgroup variable: no * or & between the keyword and the name.
_SHARED = re.compile(r"\bthreadgroup (\w+) (\w+)((?:\[[\w *]+\])*);")
_ADDRESS_SPACE = re.compile(r"\b(device|thread|threadgroup) ")

_SCALARS = {"uint": "I", "int": "i", "float": "f", "ulong": "Q", "long": "q"}
_DTYPES = {
    "uchar": (torch.uint8,),
    "ushort": (torch.int16, torch.bfloat16, torch.float16),
    "uint": (torch.int32,),
    "int": (torch.int32,),
    "ulong": (torch.int64,),
    "long": (torch.int64,),
    "float": (torch.float32,),
}
# Grid builtins by attribute: the C++ expression, from the shim's own view of where a lane is.
_CPU_BUILTINS = {
    "threadgroup_position_in_grid": "metal::uint3(at.threadgroup[0], at.threadgroup[1], at.threadgroup[2])",
    "threadgroups_per_grid": "metal::uint3(at.threadgroups[0], at.threadgroups[1], at.threadgroups[2])",
    "thread_index_in_threadgroup": "at.index",
    "thread_index_in_simdgroup": "at.lane",
    "simdgroup_index_in_threadgroup": "at.simdgroup",
    "simdgroups_per_threadgroup": "at.threads / 32",
}
_CUDA_BUILTINS = {
    "threadgroup_position_in_grid": "metal::uint3(blockIdx.x, blockIdx.y, blockIdx.z)",
    "threadgroups_per_grid": "metal::uint3(gridDim.x, gridDim.y, gridDim.z)",
    "thread_index_in_threadgroup": "threadIdx.x",
    "thread_index_in_simdgroup": "threadIdx.x % 32",
    "simdgroup_index_in_threadgroup": "threadIdx.x / 32",
    "simdgroups_per_threadgroup": "blockDim.x / 32",
}
# Threadgroups that one of NVIDIA's multiprocessors shall hold at once, where the compiler would take more registers: by
# kernel, or file and kernel.
_CUDA_GROUPS = {
    # 397B's ten places are 640 threadgroups of gate and up, eleven are 704: 132 multiprocessors hold 660 by fives (96
    # registers) and 792 by sixes (80).
    "experts_vector/experts_gate_up": 6,
    "experts_gate_up_few": 5,
    "experts_down": 2,
    "experts_down_few": 2,
    "linears": 2,
    "linears_plain/linears": 1,
    "attention_tiles": 2,
    "delta_scan": 2,
}
# Kernels that wait for the one before and only then let the next one begin: experts_gate_up of cuda/, which follows
# choose_experts, reads what was written before the choice without a wait of its own (experts_vector.cu).
_WAITING_FIRST = {"choose_experts"}


class KernelTextError(ValueError):
    """A kernel file leaves the restricted style, or a call does not fit a kernel's signature."""


@dataclass(frozen=True)
class Struct:
    """A struct of a .metal file: fields as (name, scalar format or struct, count), laid out as C does."""

    name: str
    fields: tuple[tuple[str, str | Struct, int], ...]

    @functools.cached_property
    def alignment(self) -> int:
        return max(_alignment(kind) for _, kind, _ in self.fields)

    @property
    def size_bytes(self) -> int:
        return self._layout[1]

    def pack(self, **values: Any) -> bytes:
        """The bytes of a struct with these fields: numbers, bytes of inner structs, or sequences of them.

        Raises KernelTextError if a field is missing or unknown.
        """
        names = {name for name, _, _ in self.fields}
        if names != set(values):
            raise KernelTextError(f"struct {self.name} has the fields {sorted(names)}, got {sorted(values)}")
        offsets, size = self._layout
        result = bytearray(size)
        for (name, kind, count), offset in zip(self.fields, offsets):
            items = values[name] if count > 1 else [values[name]]
            if len(items) != count:
                raise KernelTextError(f"struct {self.name}: {name} has {count} elements, got {len(items)}")
            data = b"".join(item if isinstance(kind, Struct) else struct.pack(f"<{kind}", item) for item in items)
            result[offset : offset + len(data)] = data
        return bytes(result)

    def pack_rows(self, rows: Iterable[Sequence[float]]) -> bytes:
        """The bytes of structs that follow each other, from the numbers of each, those of inner structs among them."""
        layout = self._flat_layout
        return b"".join(layout.pack(*row) for row in rows)

    def pack_array(self, rows: np.ndarray) -> bytes:
        """The same from integers [n, numbers of a struct], all at once: faster from some tens of rows on."""
        table = np.zeros(len(rows), self._flat_dtype)
        for column, name in enumerate(table.dtype.names or ()):
            table[name] = rows[:, column]
        return table.tobytes()

    @functools.cached_property
    def _flat_dtype(self) -> np.dtype[np.void]:
        places = self._flat_places()
        names, formats = [str(number) for number in range(len(places))], [f"={kind}" for _, kind in places]
        offsets = [offset for offset, _ in places]
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size_bytes})

    def _flat_places(self) -> list[tuple[int, str]]:
        """(offset, scalar format) of each number, those of inner structs among them."""
        places: list[tuple[int, str]] = []
        for (_, kind, count), first in zip(self.fields, self._layout[0]):
            for offset in range(first, first + count * _size(kind), _size(kind)):
                inner = kind._flat_places() if isinstance(kind, Struct) else [(0, kind)]
                places += [(offset + start, scalar) for start, scalar in inner]
        return places

    @functools.cached_property
    def _flat_layout(self) -> struct.Struct:
        parts, end = [], 0
        for offset, kind in self._flat_places():
            parts.append(f"{offset - end}x{kind}")
            end = offset + _size(kind)
        return struct.Struct(f"<{''.join(parts)}{self.size_bytes - end}x")

    @functools.cached_property
    def _layout(self) -> tuple[list[int], int]:
        offsets, end = [], 0
        for _, kind, count in self.fields:
            offset = _align(end, _alignment(kind))
            offsets.append(offset)
            end = offset + count * _size(kind)
        return offsets, _align(end, self.alignment)


def _alignment(kind: str | Struct) -> int:
    return kind.alignment if isinstance(kind, Struct) else struct.calcsize(kind)


def _size(kind: str | Struct) -> int:
    return kind.size_bytes if isinstance(kind, Struct) else struct.calcsize(kind)


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    attribute     buffer, or the grid builtin it stands for
    index         of a buffer
    space         device or constant
    is_written    whether the kernel may write it
    is_reference  `constant Shape&`: one struct, where a pointer is an array
    """

    name: str
    attribute: str
    type: str
    index: int = -1
    space: str = ""
    is_written: bool = False
    is_reference: bool = False


@dataclass(frozen=True)
class Signature:
    """A kernel: its buffers in order, its grid builtins, and the most threads a threadgroup of it may have."""

    name: str
    max_threads: int
    parameters: tuple[Parameter, ...]
    structs: Mapping[str, Struct]

    @functools.cached_property
    def buffers(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.attribute == "buffer")

    def check(self, arguments: Sequence[torch.Tensor | bytes], group: Sequence[int]) -> None:
        """Raise KernelTextError unless these arguments, in order, and threads per threadgroup fit this kernel."""
        buffers = self.buffers
        if len(arguments) != len(buffers):
            raise KernelTextError(f"{self.name} takes {len(buffers)} buffers, got {len(arguments)}")
        for parameter, argument in zip(buffers, arguments):
            self._check_argument(parameter, argument)
        threads = group[0] * group[1] * group[2]
        if not 0 < threads <= self.max_threads or threads % 32 or group[1:] != (1, 1):
            text = f"takes threadgroups of up to ({self.max_threads}, 1, 1) threads, in whole simdgroups of 32"
            raise KernelTextError(f"{self.name} {text}, got {tuple(group)}")

    def _check_argument(self, parameter: Parameter, argument: torch.Tensor | bytes) -> None:
        if misfit := self._find_misfit(parameter, argument):
            raise KernelTextError(f"{self.name}: {parameter.name} is {parameter.space} {parameter.type}{misfit}")

    def _find_misfit(self, parameter: Parameter, argument: torch.Tensor | bytes) -> str:
        """What is wrong with an argument, in words; "" if nothing is."""
        layout = self.structs.get(parameter.type)
        if isinstance(argument, bytes):
            is_fitting = layout is not None and parameter.is_reference and len(argument) == layout.size_bytes
            return "" if is_fitting else f", got {len(argument)} bytes"
        if not argument.is_contiguous():
            return f", got a tensor {tuple(argument.shape)} that is not contiguous"
        if layout is None:
            return "" if argument.dtype in _DTYPES[parameter.type] else f", got a tensor of {argument.dtype}"
        size_bytes = argument.nbytes
        is_fitting = size_bytes == layout.size_bytes if parameter.is_reference else size_bytes % layout.size_bytes == 0
        if is_fitting and size_bytes:
            return ""
        return f" of {layout.size_bytes} bytes, got a tensor of {size_bytes} bytes"


@dataclass(frozen=True)
class Source:
    """A kernel file, its own includes filled in: `text` is what Apple's compiler gets."""

    name: str
    text: str
    kernels: Mapping[str, Signature]
    structs: Mapping[str, Struct]


@functools.cache
def load(name: str) -> Source:
    """The kernel file metal/<name>.metal or cuda/<name>.cu. Raises KernelTextError if it is not in the style."""
    path = METAL / f"{name}.metal"
    if not path.exists():
        path = CUDA / f"{name}.cu"
    return parse(name, _include(path.read_text(encoding="utf-8"), set()))


@functools.lru_cache(4096, typed=True)
def pack_struct(file: str, struct: str, **values: Any) -> bytes:
    """A packed struct of a kernel file (Struct.pack)."""
    return load(file).structs[struct].pack(**values)


def list_files() -> list[str]:
    """Names of all files in metal/, which is what a Mac compiles."""
    return sorted(path.stem for path in METAL.glob("*.metal"))


def _include(text: str, done: set[str]) -> str:
    """Put the text of metal/*.h and cuda/*.h where it is included, each once."""

    def fill(match: re.Match[str]) -> str:
        if match[1] in done:
            return ""
        done.add(match[1])
        folder = METAL if (METAL / match[1]).exists() else CUDA
        return _include((folder / match[1]).read_text(encoding="utf-8"), done)

    return _INCLUDE.sub(fill, text)


def parse(name: str, text: str) -> Source:
    """A kernel file from its text, includes filled in."""
    bare = _COMMENT.sub("", text)
    constants = {**dict(_DEFINE.findall(bare)), **dict(_CONSTANT.findall(bare))}
    structs: dict[str, Struct] = {}
    for struct_name, body in _STRUCT.findall(bare):
        if "*" in body:
            continue  # it holds pointers: a lane's own, no host fills it
        structs[struct_name] = Struct(struct_name, tuple(_parse_fields(struct_name, body, structs, constants)))
    kernels = {}
    for threads, kernel, parameters in _KERNEL.findall(bare):
        signature = Signature(kernel, _number(threads, constants), _parse_parameters(kernel, parameters), structs)
        if not 32 <= signature.max_threads <= MAX_THREADS:
            raise KernelTextError(f"{kernel}: {signature.max_threads} threads, at most {MAX_THREADS} are possible")
        kernels[kernel] = signature
    if len(kernels) != len(re.findall(r"\[\[kernel|\bkernel void", bare)):
        raise KernelTextError(f"{name}.metal: a kernel is not written in the restricted style")
    return Source(name, text, kernels, structs)


def _parse_fields(
    name: str, body: str, structs: Mapping[str, Struct], constants: Mapping[str, str]
) -> list[tuple[str, str | Struct, int]]:
    fields: list[tuple[str, str | Struct, int]] = []
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        match = _FIELD.fullmatch(" ".join(statement.split()))
        kind = match and (_SCALARS.get(match[1]) or structs.get(match[1]))
        if not match or not kind:
            raise KernelTextError(f"struct {name}: cannot read the field {statement!r}")
        for field in match[2].split(","):
            field_name, _, count = field.strip().rstrip("]").partition("[")
            fields.append((field_name, kind, _number(count, constants) if count else 1))
    return fields


def _parse_parameters(kernel: str, text: str) -> tuple[Parameter, ...]:
    parameters = [_parse_parameter(kernel, " ".join(part.split())) for part in re.split(r",(?![^\[]*\]\])", text)]
    indices = [parameter.index for parameter in parameters if parameter.attribute == "buffer"]
    if indices != list(range(len(indices))):
        raise KernelTextError(f"{kernel}: buffers are numbered {indices}, not 0, 1, 2 in order")
    return tuple(parameters)


def _parse_parameter(kernel: str, text: str) -> Parameter:
    match = _PARAMETER.fullmatch(text)
    if not match:
        raise KernelTextError(f"{kernel}: parameter without an attribute: {text!r}")
    kind, name, attribute, index = match.groups()
    if attribute != "buffer":
        if attribute not in _CPU_BUILTINS:
            raise KernelTextError(f"{kernel}: {name}: attribute {attribute} is not among those the shims know")
        return Parameter(name, attribute, kind.strip())
    buffer = _BUFFER.fullmatch(kind.strip())
    if not buffer or (buffer[1] == "constant" and buffer[2]) or (buffer[4] == "&" and buffer[1] != "constant"):
        raise KernelTextError(f"{kernel}: {name}: a buffer is `device T*`, `device const T*` or `constant T&` or `T*`")
    is_written = buffer[1] == "device" and not buffer[2]
    return Parameter(name, attribute, buffer[3], int(index), buffer[1], is_written, buffer[4] == "&")


def _number(text: str, constants: Mapping[str, str]) -> int:
    while text in constants:
        text = constants[text]
    try:
        return int(text)
    except ValueError:
        raise KernelTextError(f"{text} is not a number that is known here") from None


def translate(source: Source, target: str) -> str:
    """The file for a C++ compiler with the headers of shim/: target cpu (the SIMT executor) or cuda (NVRTC)."""
    body = _COMMENT.sub("", source.text).replace("#include <metal_stdlib>", "").replace("using namespace metal;", "")
    body = _KERNEL.sub(lambda match: f"inline void {match[2]}({_drop_attributes(match[3])}) {{", body)
    number = iter(range(1000))
    if target == "cpu":
        shared = r"{0}(&{1}){2} = *({0}(*){2})simt_threadgroup_memory({3}, sizeof({0}{2}));"
        body = _SHARED.sub(lambda match: shared.format(match[1], match[2], match[3], next(number)), body)
    else:
        body = _SHARED.sub(r"__shared__ \1 \2\3;", body)
    body = re.sub(r"\bconstant ", "const ", _ADDRESS_SPACE.sub("", body))
    if target == "cuda":
        body = re.sub(r"\binline ", "__device__ __forceinline__ ", body)
    if target == "cpu":
        entries = [_cpu_entry(kernel) for kernel in source.kernels.values()]
        limit = CUDA_THREADGROUP_BYTES if (CUDA / f"{source.name}.cu").exists() else THREADGROUP_BYTES
        entries.append(f'extern "C" const size_t simt_threadgroup_limit = {limit};')
    else:
        entries = [_cuda_entry(source.name, kernel, "wait_for_last()" in body) for kernel in source.kernels.values()]
    return f'#include "{target}.h"\nnamespace metal_text {{\n{body}\n}}\n' + "\n".join(entries) + "\n"


def opencl_text(source: Source) -> str:
    """The text for clang's OpenCL C++ front end, with shim/opencl on its path: only kernels are marked another way."""
    return _KERNEL.sub(r"kernel void \2(\3) {", source.text)


def _drop_attributes(parameters: str) -> str:
    return re.sub(r"\s*\[\[.*?\]\]", "", parameters)


def _pointer(parameter: Parameter) -> str:
    type_name = parameter.type if parameter.type not in _DTYPES else f"metal::{parameter.type}"
    type_name = {"metal::int": "int", "metal::float": "float", "metal::long": "long"}.get(type_name, type_name)
    scope = type_name if parameter.type in _DTYPES else f"metal_text::{type_name}"
    return f"{'' if parameter.is_written else 'const '}{scope}*"


def _value(parameter: Parameter, buffer: str, builtins: Mapping[str, str]) -> str:
    """What an entry point passes to a kernel for one parameter."""
    if parameter.attribute == "buffer":
        return f"*{buffer}" if parameter.is_reference and builtins is _CPU_BUILTINS else buffer
    value = builtins[parameter.attribute]
    return value if parameter.type.endswith("3") or "uint3" not in value else f"{value}.x"


def _cpu_entry(kernel: Signature) -> str:
    values = [
        _value(parameter, f"(({_pointer(parameter)})buffers[{parameter.index}])", _CPU_BUILTINS)
        for parameter in kernel.parameters
    ]
    head = f'extern "C" void {kernel.name}(void** buffers) {{ const simt_place& at = simt_here(); (void)at;'
    return f"{head} metal_text::{kernel.name}({', '.join(values)}); }}"


def _cuda_entry(file: str, kernel: Signature, waits_by_itself: bool) -> str:
    """References are structs that are passed by value: they are there when the kernel begins."""
    values = [_value(parameter, f"buffer{parameter.index}", _CUDA_BUILTINS) for parameter in kernel.parameters]
    pointers = [
        f"const metal_text::{parameter.type} buffer{parameter.index}"
        if parameter.is_reference
        else f"{_pointer(parameter)} buffer{parameter.index}"
        for parameter in kernel.buffers
    ]
    groups = _CUDA_GROUPS.get(f"{file}/{kernel.name}", _CUDA_GROUPS.get(kernel.name, 1))
    bounds = f"{kernel.max_threads}, {groups}"
    head = f'extern "C" __global__ void __launch_bounds__({bounds}) {kernel.name}({", ".join(pointers)})'
    turns = ["metal::launch_next();", "metal::wait_for_last();"]
    turn = "" if waits_by_itself else " ".join(turns[::-1] if kernel.name in _WAITING_FIRST else turns)
    return f"{head} {{ {turn} metal_text::{kernel.name}({', '.join(values)}); }}"


def cuda_headers() -> dict[str, str]:
    """The headers that a CUDA translation includes, by name."""
    return {
        name: (SHIM / name).read_text(encoding="utf-8")
        for name in ("cuda.h", "types.h", "simdgroup_matrix.h", "names.h")
    }

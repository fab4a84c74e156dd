"""The native core as Python sees it: a shared library of plain C functions, called with the GIL released.

Functions take addresses and sizes; a signature is declared where the function is used. The library is built by the
package's own build and lies beside this file. No torch here: moe-convert uses the library without it.

    lib = library()
    rms_norm = declare("rms_norm", FLOATS, FLOATS, FLOATS, INT, INT, FLOAT)
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError

LIBRARY = Path(__file__).with_name("native_core.so")
ADDRESS, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once. Raises UsageError if it was never built."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise UsageError(f"{LIBRARY}: {error}; install moepack again, with a C++ compiler at hand") from None


def declare(name: str, *parameters: Any, returns: Any = None) -> Callable[..., Any]:
    """A function of the library by its name without the prefix, with its signature."""
    function = getattr(library(), f"moepack_{name}")
    function.argtypes, function.restype = parameters, returns
    return function


def set_threads(threads: int) -> None:
    """Threads of the native operations; they are kept between calls."""
    declare("set_threads", ctypes.c_int)(threads)


def count_threads() -> int:
    """How many threads the native operations have."""
    return declare("threads", returns=ctypes.c_int)()


def isa() -> str:
    """The instruction set in use: amx, avx512, avx2, neon or portable."""
    return declare("isa", returns=ctypes.c_char_p)().decode()


def set_isa(name: str) -> bool:
    """Use another instruction set; whether this processor has it. For tests and benchmarks."""
    return bool(declare("set_isa", ctypes.c_char_p, returns=ctypes.c_int)(name.encode()))

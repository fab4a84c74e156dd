"""SHA-256 of several messages at once: two side by side take no longer than one.

The same digests as hashlib's, which is what computes them where the processor has no instructions for it or is no x86.
hashlib hashes one message at a time, and that waits for itself half of the time: kernels/native/sha256_ops.cpp.

    digests = sha256_each([gate, up, down, block])
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepack.kernels.native_library import ADDRESS, INT, declare

DIGEST_BYTES = 32


def sha256_each(messages: Sequence[Any]) -> list[bytes]:
    """The digest of each message: contiguous buffers of any length. On the caller's thread, without Python's lock."""
    arrays = [np.frombuffer(message, np.uint8) for message in messages]
    digests = np.empty((len(arrays), DIGEST_BYTES), np.uint8)
    addresses = np.array([array.ctypes.data for array in arrays], np.uintp)
    sizes = np.array([array.size for array in arrays], np.int64)
    sha256 = declare("sha256", INT, ADDRESS, ADDRESS, ADDRESS, returns=ctypes.c_int)
    if sha256(len(arrays), addresses.ctypes.data, sizes.ctypes.data, digests.ctypes.data):
        return [row.tobytes() for row in digests]
    return [hashlib.sha256(array.data).digest() for array in arrays]

"""The digests of several messages against hashlib's."""

import hashlib

import numpy as np
import pytest

from moepack.kernels.native_hash import sha256_each

# Around the borders of a block of 64 bytes, and of its last 8, which hold the length.
LENGTHS = [0, 1, 3, 54, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 1000, 4096, 65537]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, len(LENGTHS), 40])
def test_digests_are_those_of_hashlib(count):
    random = np.random.default_rng(count)
    messages = [random.bytes(LENGTHS[place]) for place in random.integers(0, len(LENGTHS), count)]
    assert sha256_each(messages) == [hashlib.sha256(message).digest() for message in messages]


@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1]], ids=["growing", "shrinking"])
def test_messages_of_unequal_length_keep_their_places(order):
    messages = [bytes(range(256)) * 300 for _ in order]
    messages = [message[:length] for message, length in zip(messages, order)]
    assert sha256_each(messages) == [hashlib.sha256(message).digest() for message in messages]


def test_any_contiguous_buffer_at_any_address():
    data = np.random.default_rng(0).integers(0, 256, 1001, dtype=np.uint8)
    messages = [data[1:], memoryview(bytearray(data[3:200])), data[7:777].data]
    assert sha256_each(messages) == [hashlib.sha256(message).digest() for message in messages]


def test_without_the_instructions_hashlib_computes_them(monkeypatch):
    monkeypatch.setattr("moepack.kernels.native_hash.declare", lambda *_, **__: lambda *_: 0)
    assert sha256_each([b"abc", b""]) == [hashlib.sha256(b"abc").digest(), hashlib.sha256(b"").digest()]

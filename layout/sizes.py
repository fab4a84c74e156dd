"""Sizes with units, as people write and read them.

parse_size("8GiB")          # 8589934592
format_size(8589934592)     # "8.00 GiB"
"""

from __future__ import annotations

import re

from moepack.layout.errors import UsageError

UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """A number of bytes from "8GiB", "1.5 GB", "4096". Raises UsageError."""
    match = SIZE.fullmatch(text)
    factor = match and {unit.lower(): factor for unit, factor in UNITS.items()}.get(match[2].lower())
    if not match or not factor:
        raise UsageError(f"size {text!r}: expected a number with KiB, MiB, GiB, KB, MB or GB, as in 8GiB")
    if not 1 <= float(match[1]) * factor < 2**63:
        raise UsageError(f"size {text!r}: expected at least one byte and less than 8 EiB")
    return int(float(match[1]) * factor)


def format_size(size_bytes: float) -> str:
    """A size for people: the largest binary unit that keeps the number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} TiB"

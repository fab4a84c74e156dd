"""Which backend runs the operations: chosen once, by name, when an engine is opened.

A backend is a module with the functions of reference.py. Nothing outside this folder asks which one it is.

    ops, device = choose_backend("auto")
"""

from __future__ import annotations

from types import ModuleType

from moepack.kernels import reference
from moepack.layout.errors import UsageError

BACKENDS: dict[str, ModuleType] = {"cpu": reference}
AUTO_DEVICE = "cpu"


def choose_backend(device: str) -> tuple[ModuleType, str]:
    """The backend for a device and the device's name; "auto" takes the best one here. Raises UsageError."""
    name = AUTO_DEVICE if device == "auto" else device
    if name not in BACKENDS:
        raise UsageError(f"--device {device}: this version computes on {', '.join(BACKENDS)} only")
    return BACKENDS[name], name

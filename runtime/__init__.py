"""Run a pack: the model, the store that streams its experts, generation and evaluation.

from moepack.runtime import Engine
engine = Engine.open("model.moepack", memory="8GiB")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepack.runtime.engine import Engine
    from moepack.runtime.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import on first use: `moe-run --help` need not wait for torch."""
    if name == "Engine":
        from moepack.runtime.engine import Engine

        return Engine
    if name == "SamplingParams":
        from moepack.runtime.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

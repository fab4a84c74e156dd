"""What a conversion did: bytes, time by stage, and what rounding cost each kind of matrix.

Filled by the pipeline as results come in, read by the progress display while it runs and by the command at its end.
Stages are the seconds of all threads together; the slowest is where more speed would come from.

    report = Report()
    convert(plan, limits, on_bytes, report)
    report.describe()
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moepack.kernels.native_quantize import RoundingError

RESIDENT = "resident"  # the kind of every matrix outside the routed experts


class Rounding(dict[str, RoundingError]):
    """What rounding cost, by projection of the routed experts, or "resident"."""

    def add(self, errors: Mapping[str, RoundingError]) -> None:
        for kind, error in errors.items():
            self[kind] = self.get(kind, RoundingError()) + error


@dataclass
class Report:
    """The facts of one run; rounding covers resumed layers too, times and bytes do not.

    step       what is being written: a layer file or the resident weights
    seconds    stage -> seconds of all threads
    """

    step: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    rounding: Rounding = field(default_factory=Rounding)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def describe(self) -> dict[str, Any]:
        """The facts as JSON has them."""
        seconds = {stage: round(value, 3) for stage, value in sorted(self.seconds.items(), key=lambda item: -item[1])}
        return {
            "bytes_read": self.bytes_in,
            "bytes_written": self.bytes_out,
            "thread_seconds": seconds,
            "slowest_stage": next(iter(seconds), None),
            "rounding": {
                kind: {"relative_error": error.relative, "largest_error": error.largest}
                for kind, error in self.rounding.items()
                if error.squared_weight
            },
        }

"""How many of a prompt's tokens a backend computes together: what its scratch memory is planned by.

More of them keep a GPU busy, and change no bit of the result: what a mixer has is whole chunks of DeltaNet (64 tokens).
"""

from __future__ import annotations

from typing import NamedTuple

FEWEST = 512  # that are still worth it where memory is short


class BatchSizes(NamedTuple):
    """At most so many at a time.

    experts   tokens of one expert, or of several together
    mixer     tokens in a mixer
    """

    experts: int
    mixer: int

    def __str__(self) -> str:
        return f"{self.experts} of experts, {self.mixer} in a mixer"

    def divided(self, share: int) -> BatchSizes:
        """A part of them in so many, but not less than FEWEST where there are as many."""
        return BatchSizes(*(min(size, max(FEWEST, size // share)) for size in self))

"""One line at the foot of a terminal that shows how an answer is coming along, while the answer scrolls above it.

The terminal's scroll region is set to all lines but the last one for as long as the line is there. Where the output is
no terminal, or a tiny one, nothing is written at all.

    with StatusLine(sys.stdout) as status:
        status.show("prompt 512 of 2048 tokens")
"""

from __future__ import annotations

import os
import time
from typing import TextIO

FEWEST_LINES = 5
PAUSE_S = 0.1  # between two updates: more are not read, and cost time of the answer
SAVE, RESTORE, DIM, PLAIN, CLEAR = "\x1b7", "\x1b8", "\x1b[2m", "\x1b[0m", "\x1b[2K"


class StatusLine:
    """Shown between entering and leaving; `show` may be called as often as one likes."""

    def __init__(self, screen: TextIO):
        self._screen = screen
        self._lines = 0
        self._shown_at = 0.0

    def __enter__(self) -> StatusLine:
        if self._screen.isatty():
            _, lines = os.get_terminal_size(self._screen.fileno())
            if lines >= FEWEST_LINES:
                self._lines = lines
                # A line feed makes room if the cursor is on the last line; setting the region moves it, so: put back.
                self._write(f"\n\x1b[A{SAVE}\x1b[1;{lines - 1}r{RESTORE}")
        return self

    def show(self, text: str) -> None:
        """Replace what the line says, unless it was replaced just now."""
        now = time.monotonic()
        if self._lines and now - self._shown_at >= PAUSE_S:
            self._shown_at = now
            columns, _ = os.get_terminal_size(self._screen.fileno())
            self._write(f"{SAVE}\x1b[{self._lines};1H{CLEAR}{DIM}{text[: columns - 1]}{PLAIN}{RESTORE}")

    def __exit__(self, *_: object) -> None:
        if self._lines:
            self._write(f"{SAVE}\x1b[{self._lines};1H{CLEAR}\x1b[r{RESTORE}")
            self._lines = 0

    def _write(self, text: str) -> None:
        self._screen.write(text)
        self._screen.flush()

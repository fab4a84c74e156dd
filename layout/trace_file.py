"""A trace in a file: lines of JSON, compressed with zstd, written while a run goes on.

The first line says what was run: the three sizes of the model, and in "run" how it was set up, for people; for the
report of times also "token_bytes", the weights that a token is computed with, and the machine's limits "memory_gb_s"
and "disk_gb_s", null where moe-inspect plan has not measured them.

    {"trace": "moepack routing", "version": 2, "num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8,
     "run": {...}}

Every other line is an event, a list that begins with its kind. Times are whole microseconds since the recording began.

    ["fetch", at, layer, [expert, ...], [missing expert, ...]]              of one token in decode
    ["prefill", at, layer, [expert, ...], [missing expert, ...]]            of all tokens of a chunk
    ["guess", at, layer, [expert, ...]]                                     what a layer will probably ask for
    ["read", start, end, layer, [expert, ...], bytes, is ahead (0 or 1)]    in the order of their ends
    ["wait", start, end]                                                    the computation waited for reads

A file whose run was killed ends early; what is there is read. `zstd -dc FILE` shows it. Layers whose experts are all in
memory run in one native call: their fetches have the time of its end.

    with TraceWriter.open(Path("run.trace"), text_config) as recorder: store.recorder = recorder
    trace = read_trace(Path("run.trace"))
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import zstandard

from moepack.layout.errors import UsageError
from moepack.layout.trace import Guess, ReadTime, Request, Trace, Wait
from moepack.layout.writer import check_output

KIND, VERSION = "moepack routing", 2
SIZES = ("num_hidden_layers", "num_experts", "num_experts_per_tok")
COMPRESSION_LEVEL = 3
MAX_LINE_BYTES = 2**22  # far above a fetch of every expert
PIECE_BYTES = 2**20
MICRO = 1e6
MAX_DIGITS = 18  # of an integer: more is no size, no time and no number of bytes


class TraceWriter:
    """Writes a trace as a run goes on; close it, or use it in a `with`.

    text_config   of the pack's manifest: num_hidden_layers, num_experts, num_experts_per_tok
    run           how the run was set up
    """

    def __init__(self, file: IO[bytes], text_config: Mapping[str, Any], run: Mapping[str, Any] | None = None):
        self._file: Any = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).stream_writer(file, closefd=True)
        self._start_s = perf_counter()
        sizes = {name: text_config[name] for name in SIZES}
        self._write({"trace": KIND, "version": VERSION, **sizes, "run": dict(run or {})})

    @classmethod
    def open(cls, path: Path, text_config: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> TraceWriter:
        """A new file, or an old one overwritten. Raises UsageError if it cannot be, or is one of a pack's."""
        check_output(path)
        try:
            return cls(open(path, "wb"), text_config, run)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None

    def note_fetch(
        self, layer: int, expert_ids: Sequence[int], is_prefill: bool = False, missing: Sequence[int] = ()
    ) -> None:
        """A layer asks for experts now, of which some are missing."""
        kind = "prefill" if is_prefill else "fetch"
        self._write([kind, self._time(perf_counter()), layer, list(expert_ids), list(missing)])

    def note_guess(self, layer: int, expert_ids: Sequence[int]) -> None:
        """A layer is expected to ask for experts."""
        self._write(["guess", self._time(perf_counter()), layer, list(expert_ids)])

    def note_read(
        self, layer: int, expert_ids: Sequence[int], size_bytes: int, start_s: float, end_s: float, is_ahead: bool
    ) -> None:
        """A read that has ended; times by time.perf_counter."""
        times = self._time(start_s), self._time(end_s)
        self._write(["read", *times, layer, list(expert_ids), size_bytes, int(is_ahead)])

    def note_wait(self, start_s: float, end_s: float) -> None:
        """The computation has waited; times by time.perf_counter."""
        self._write(["wait", self._time(start_s), self._time(end_s)])

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time(self, seconds: float) -> int:
        return max(0, round((seconds - self._start_s) * MICRO))  # reads may have begun before the recording

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


def read_trace(path: Path) -> Trace:
    """Read and check a trace. Raises UsageError naming the line that is wrong."""
    lines = enumerate(_read_lines(path), start=1)
    header = _parse(path, *next(lines, (1, b"")))
    if not isinstance(header, dict) or header.get("trace") != KIND:
        raise UsageError(f'{path}: line 1: expected a header with "trace": "{KIND}": record one with moe-run --trace')
    if header.get("version") != VERSION:
        raise UsageError(f"{path}: trace version {header.get('version')!r}, but this moepack reads {VERSION}")
    sizes = {name: header.get(name) for name in SIZES}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise UsageError(f"{path}: line 1: expected positive integers, found {sizes}")
    found = _Events(header["num_hidden_layers"], header["num_experts"])
    for number, line in lines:
        event = _parse(path, number, line)
        try:
            found.add(event)
        except (ValueError, TypeError) as error:
            text = str(error) if isinstance(error, _Unexpected) else "no event of a trace"
            raise UsageError(f"{path}: line {number}: {text}: {line[:60].decode(errors='replace')!r}") from None
    run = header.get("run")
    return Trace(
        num_hidden_layers=header["num_hidden_layers"],
        num_experts=header["num_experts"],
        num_experts_per_tok=header["num_experts_per_tok"],
        requests=found.requests,
        guesses=found.guesses,
        reads=found.reads,
        waits=found.waits,
        facts=run if isinstance(run, dict) else {},
    )


class _Unexpected(ValueError):
    """What is wrong with an event, in words."""


class _Events:
    """Events by their kind, each checked when it is added."""

    def __init__(self, layers: int, experts: int):
        self._layers, self._experts = layers, experts
        self.requests: list[Request] = []
        self.guesses: list[Guess] = []
        self.reads: list[ReadTime] = []
        self.waits: list[Wait] = []

    def add(self, event: Any) -> None:
        """Take in an event. Raises ValueError or TypeError if it is none."""
        kind, *values = event
        if kind in ("fetch", "prefill"):
            at, layer, ids, missing = values
            ids, missing = self._ids(layer, ids), self._ids(layer, missing, least=0)
            if not set(missing) <= set(ids):
                raise _Unexpected("expected what is missing among what is asked for")
            self.requests.append(Request(layer, ids, kind == "prefill", _seconds(at), missing))
        elif kind == "guess":
            at, layer, ids = values
            self.guesses.append(Guess(layer, self._ids(layer, ids), _seconds(at)))
        elif kind == "read":
            start, end, layer, ids, size_bytes, is_ahead = values
            if type(size_bytes) is not int or size_bytes < 1 or is_ahead not in (0, 1):
                raise _Unexpected("expected a number of bytes, and 0 or 1")
            times = _span(start, end)
            self.reads.append(ReadTime(layer, self._ids(layer, ids), size_bytes, *times, bool(is_ahead)))
        elif kind == "wait":
            self.waits.append(Wait(*_span(*values)))
        else:
            raise _Unexpected("expected fetch, prefill, guess, read or wait")

    def _ids(self, layer: Any, ids: Any, least: int = 1) -> tuple[int, ...]:
        if type(layer) is not int or not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise _Unexpected("expected a layer and a list of experts")
        in_range = 0 <= layer < self._layers and all(0 <= one < self._experts for one in ids)
        if not in_range or len(set(ids)) < len(ids) or len(ids) < least:
            raise _Unexpected(f"expected a layer below {self._layers} and different experts below {self._experts}")
        return tuple(ids)


def _seconds(micros: Any) -> float:
    if type(micros) is not int or micros < 0:
        raise _Unexpected("expected a time in whole microseconds")
    return micros / MICRO


def _span(start: Any, end: Any) -> tuple[float, float]:
    times = _seconds(start), _seconds(end)
    if times[1] < times[0]:
        raise _Unexpected("expected an end after its start")
    return times


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a compressed file, without their ends; the last one may be cut off, and is left out then."""
    rest = b""
    try:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            while piece := _next_piece(stream):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
                if len(rest) > MAX_LINE_BYTES:
                    raise UsageError(f"{path}: a line of more than {MAX_LINE_BYTES} bytes: not a trace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except zstandard.ZstdError:
        raise UsageError(f"{path}: not compressed with zstd: record one with moe-run --trace") from None


def _next_piece(stream: Any) -> bytes:
    return stream.read(PIECE_BYTES)


def _parse(path: Path, number: int, line: bytes) -> Any:
    def bounded(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(digits)
        return int(digits)

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(text)
        return number

    try:
        return json.loads(line, parse_int=bounded, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path}: line {number}: not JSON, or a number too large: {line[:60].decode(errors='replace')!r}"
        ) from None

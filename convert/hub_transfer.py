"""Bytes of a repository of the hub, at one commit: whole files by their hash, ranges of them, downloads that go on.

Whatever goes wrong on the way (resets, short answers, 429 and 5xx with or without Retry-After, signed links that have
expired) is tried again with growing pauses, from the byte that came last; eight failures in a row without a byte in
between end it. An answer about another commit, ETag or size than was asked for ends it at once.

    repository = Repository.open("Qwen/Qwen3.5-397B-A17B", "main")
    repository.download("model.safetensors-00001-of-00094.safetensors", path, stopped=lambda: False)
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack.layout.errors import CheckpointError, UsageError
from moepack.layout.spec import PARTIAL_SUFFIX
from moepack.layout.writer import naming_failures, sync_directory

logger = logging.getLogger(__name__)

SCHEME = "hf://"
MAX_FAILURES = 8  # in a row, without a single byte in between
FIRST_WAIT_S, LONGEST_WAIT_S, NOTED_WAIT_S = 1.0, 60.0, 1.0
MAX_SMALL_BYTES = 256 * 2**20
CHUNK_BYTES = 2**20
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
TIMEOUT_S = 60.0


class _Retry(Exception):
    """Something that may be better in a moment. wait_s: what the server asked for; progressed: bytes came before it."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        self.wait_s, self.progressed = wait_s, False
        super().__init__(reason)


@dataclass(frozen=True)
class HubFile:
    """What the hub says of a file: its size and the hash of its contents, sha256 of large ones, git's of small ones."""

    size_bytes: int
    etag: str
    sha256: str | None


class Repository:
    """A repository of the hub at one commit. Safe to use from several threads.

    files   name -> what the hub says of it
    """

    def __init__(self, name: str, revision: str, commit: str, files: dict[str, HubFile]):
        self.name, self.revision, self.commit, self.files = name, revision, commit, files

    @classmethod
    def open(cls, name: str, revision: str, commit: str | None = None) -> Repository:
        """Resolve a revision, or take the commit it was resolved to before. Raises CheckpointError, UsageError."""
        hub = _library()
        api = hub.HfApi(endpoint=_endpoint())
        said = f"{SCHEME}{name}@{commit or revision}"

        def ask() -> Any:
            try:
                return api.model_info(name, revision=commit or revision, files_metadata=True, timeout=TIMEOUT_S)
            except hub.errors.OfflineModeIsEnabled:
                raise CheckpointError(f"{said}: HF_HUB_OFFLINE is set: unset it, or give a directory") from None
            except hub.errors.HfHubHTTPError as error:
                raise _refusal(said, error.response.status_code, error.response.headers, error) from None
            except _broken_connections() as error:
                raise _Retry(_describe(error)) from None
            except ValueError as error:
                raise CheckpointError(f"{said}: the hub's answer cannot be read: {error}") from None

        info = _persist(said, ask)
        files = {}
        for entry in info.siblings or ():
            lfs = entry.lfs.sha256 if entry.lfs else None
            if entry.size is not None:
                files[entry.rfilename] = HubFile(entry.size, lfs or entry.blob_id or "", lfs)
        return cls(name, revision, str(info.sha), files)

    def url(self, file: str) -> str:
        """The address of a file at this commit, for people and for requests."""
        return str(_library().hf_hub_url(self.name, file, revision=self.commit, endpoint=_endpoint()))

    def read_small(self, file: str) -> bytes:
        """A whole file, compared with its hash. Raises CheckpointError."""
        known = self.files[file]
        if known.size_bytes > MAX_SMALL_BYTES:
            raise CheckpointError(f"{self.url(file)}: is {known.size_bytes:,} bytes long, which no such file is")
        for _ in range(2):
            content = self.read_range(file, 0, known.size_bytes)
            if known.sha256:
                found = hashlib.sha256(content).hexdigest()
            else:
                found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if found == known.etag or not known.etag:
                return content
        raise CheckpointError(f"{self.url(file)}: its hash is {found[:12]}…, the hub says {known.etag[:12]}…, twice")

    def read_range(self, file: str, offset: int, size: int, stopped: Callable[[], bool] = lambda: False) -> bytes:
        """Bytes of a file. Raises CheckpointError."""
        content = bytearray()
        self._stream(file, offset, offset + size, content.extend, stopped)
        return bytes(content)

    def download(self, file: str, path: Path, stopped: Callable[[], bool]) -> None:
        """Fetch a file, going on with what is there of it, and compare its sha256; then it has its own name.

        Raises CheckpointError, also if its hash is wrong twice, and NotEnoughSpace.
        """
        known = self.files[file]
        for _ in range(2):
            found = self._fetch_rest(file, path.with_name(path.name + PARTIAL_SUFFIX), stopped)
            if found == known.sha256 or not known.sha256:
                os.replace(path.with_name(path.name + PARTIAL_SUFFIX), path)
                sync_directory(path.parent)
                return
            path.with_name(path.name + PARTIAL_SUFFIX).unlink()
        raise CheckpointError(f"{self.url(file)}: its sha256 is {found[:12]}…, the hub says {known.etag[:12]}…, twice")

    def _fetch_rest(self, file: str, partial: Path, stopped: Callable[[], bool]) -> str:
        """Complete a download that may have begun, safe on the disk; its sha256."""
        digest = hashlib.sha256()
        with open(partial, "ab+") as target:
            if target.tell() > self.files[file].size_bytes:
                target.truncate(0)
            target.seek(0)
            while piece := target.read(CHUNK_BYTES):
                digest.update(piece)

            def sink(piece: bytes) -> None:
                target.write(piece)
                digest.update(piece)

            with naming_failures(partial):
                self._stream(file, target.tell(), self.files[file].size_bytes, sink, stopped)
                target.flush()
                os.fsync(target.fileno())
        return digest.hexdigest()

    def _stream(
        self,
        file: str,
        start: int,
        end: int,
        sink: Callable[[bytes], object],
        stopped: Callable[[], bool],
    ) -> None:
        """Give the bytes start .. end of a file to `sink`, in order, through whatever goes wrong on the way."""
        url, position = self.url(file), start

        def attempt() -> None:
            nonlocal position
            before = position
            try:
                for piece in self._request(file, url, position, end) if position < end else ():
                    if stopped():
                        raise CheckpointError(f"{url}: stopped")
                    position += len(piece)
                    sink(piece)
            except _Retry as error:
                error.progressed = position > before
                raise

        _persist(url, attempt, stopped)

    def _request(self, file: str, url: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of one request for a range, never more than asked for. Raises _Retry, CheckpointError."""
        hub = _library()
        client = hub.utils.get_session()
        headers = hub.utils.build_hf_headers(library_name="moepack") | {
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            with client.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
                if response.status_code not in (200, 206):
                    if response.status_code == 403 and response.history:  # a signed link lives for an hour
                        raise _Retry("the link it was sent to has expired")
                    raise _refusal(url, response.status_code, response.headers, None)
                self._check_headers(file, url, [*response.history, response])
                skip = self._find_skip(file, response, start)
                wanted = end - start
                for piece in response.iter_bytes(CHUNK_BYTES):
                    dropped = min(skip, len(piece))
                    skip -= dropped
                    kept = piece[dropped : dropped + wanted]
                    wanted -= len(kept)
                    if kept:
                        yield kept
                    if dropped + len(kept) < len(piece):  # more than was asked for
                        return
                if not wanted:  # read to its end, so that the connection serves the next request
                    return
                raise _Retry(f"the connection ended {wanted:,} bytes early")
        except _broken_connections() as error:
            raise _Retry(_describe(error)) from None

    def _check_headers(self, file: str, url: str, responses: list[Any]) -> None:
        """That the answer is about the commit and the contents which were asked for."""
        commit = next((r.headers["X-Repo-Commit"] for r in responses if "X-Repo-Commit" in r.headers), self.commit)
        if commit != self.commit:
            raise CheckpointError(f"{url}: the hub answers with commit {commit[:12]}…: run the command again")
        first, known = responses[0].headers, self.files[file]
        etag = (first.get("X-Linked-Etag") or first.get("ETag") or known.etag).removeprefix("W/").strip('"')
        size = first.get("X-Linked-Size", str(known.size_bytes))
        if (known.etag and etag != known.etag) or size != str(known.size_bytes):
            raise CheckpointError(
                f"{url}: the file changed: expected {known.size_bytes} bytes with ETag {known.etag[:12]}…, the hub "
                f"now says {size} and {etag[:12]}…: start over with --overwrite"
            )

    def _find_skip(self, file: str, response: Any, start: int) -> int:
        """Bytes before the wanted ones: none in an answer of ranges, all where the server ignores them."""
        size_bytes = self.files[file].size_bytes
        if response.status_code == 200:
            length = response.headers.get("Content-Length", str(size_bytes))
            if length != str(size_bytes):
                raise _Retry(f"it is announced with {length} bytes, expected {size_bytes}")
            return start
        said = response.headers.get("Content-Range", "")
        if not said.startswith(f"bytes {start}-") or not said.endswith((f"/{size_bytes}", "/*")):
            raise _Retry(f"the server sent {said or 'an unnamed range'}, asked for byte {start} of {size_bytes}")
        return 0


def _persist(what: str, attempt: Callable[[], Any], stopped: Callable[[], bool] = lambda: False) -> Any:
    """The result of an attempt, repeated with growing pauses while it raises _Retry; bytes that came begin anew."""
    failures = 0
    while True:
        try:
            return attempt()
        except _Retry as error:  # noqa: PERF203 (the network is slower)
            failures = 1 if error.progressed else failures + 1
            if failures >= MAX_FAILURES:
                raise CheckpointError(
                    f"{what}: {error}, {failures} times in a row: check the connection, then run the same command "
                    "again to go on from here"
                ) from None
            wait_s = max(error.wait_s, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1)))
            if wait_s >= NOTED_WAIT_S:  # all of them take two minutes: not without a word
                logger.warning("note: %s: %s: again in %.0f s", what, error, wait_s)
            _pause(wait_s, stopped)


def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, 0.2))


def _refusal(what: str, status: int, headers: Any, error: Exception | None) -> Exception:
    """The error for a status that is no success."""
    if status in RETRIED_STATUSES:
        asked = headers.get("Retry-After", "")
        return _Retry(f"the hub answers {status}", float(asked) if asked.isdigit() else 0.0)
    code = headers.get("X-Error-Code", "") or type(error).__name__
    if status in (401, 403):
        gated = "Gated" in code
        reason = "its licence must be accepted on its page first" if gated else "no access, or no such repository"
        return CheckpointError(f"{what}: {status}, {reason}: set HF_TOKEN to a token that may read it")
    if status == 404:
        missing = {"RevisionNotFound": "no such revision", "EntryNotFound": "no such file"}
        reason = next((text for key, text in missing.items() if key in code), "no such repository")
        return CheckpointError(f"{what}: 404, {reason}: check the spelling")
    return CheckpointError(f"{what}: the hub answers {status}: try again later")


def _broken_connections() -> tuple[type[Exception], ...]:
    """What the library's HTTP client raises when a connection breaks."""
    client = type(_library().utils.get_session()).__module__.partition(".")[0]
    return importlib.import_module(client).HTTPError, ConnectionError, TimeoutError


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UsageError(f"{SCHEME} needs the extra hub: pip install 'moepack[hub]'") from None

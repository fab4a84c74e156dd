"""A checkpoint on the hub, converted without keeping it: shards come one by one, are checked, used and deleted.

A branch or tag is resolved to its commit once, and everything is asked for by that commit: what is published meanwhile
does not mix in, and a conversion that goes on later goes on with the same files. Configs, tokenizer, and of all shards
the headers and the samples of their fingerprints are fetched first, so that a plan is made and refused as for a
directory. A shard with experts is downloaded to the output's disk, compared with the sha256 that the hub lists, and
deleted when the last layer that lies in it is written. Resident weights, a few percent, are read by HTTP range at the
end, against hashes taken from the checked file: these percents are fetched twice. Broken connections go on where they
broke.

    with Mirror.open("hf://Qwen/Qwen3.5-397B-A17B@main", out) as mirror:
        plan = plan_conversion(mirror.directory, out, recipe, origin=mirror.origin)
        mirror.reader.prepare(plan, scratch_bytes=None)

Needs the extra `hub`. HF_ENDPOINT and HF_TOKEN are those of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from moepack.convert.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_weight_map
from moepack.convert.hub_transfer import SCHEME, Repository
from moepack.convert.journal import JOURNAL_NAME, SETTINGS_FILE
from moepack.convert.memory import PIECE_BYTES
from moepack.convert.plan import COPIED_FILES, SAMPLE_BYTES, ConversionPlan, Origin, sample_offsets
from moepack.convert.shard_reader import Record, ShardReader
from moepack.layout.errors import CheckpointError, UsageError
from moepack.layout.sizes import format_size
from moepack.layout.spec import MANIFEST_NAME, MAX_TENSOR_HEADER_BYTES, PARTIAL_SUFFIX, RESIDENT_NAME
from moepack.layout.tensor_file import LENGTH_BYTES
from moepack.layout.writer import atomic_file

SHARDS_FOLDER = "shards"  # in the journal's folder: what is left there when a conversion ends is deleted with it
DEFAULT_SHARDS = 2
REQUESTS = 8  # at a time, for headers and samples


def is_hub_address(source: str) -> bool:
    return source.startswith(SCHEME)


def parse_address(address: str) -> tuple[str, str]:
    """(org/repo, revision) of hf://org/repo[@revision]. Raises UsageError."""
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts) or (not revision and "@" in address):
        raise UsageError(f"{address}: expected {SCHEME}org/repo or {SCHEME}org/repo@revision")
    return repository, revision or "main"


class Mirror:
    """What of a repository is here: small files, and files of the shards' sizes with headers and a few samples."""

    def __init__(self, repository: Repository, directory: Path):
        self.repository, self.directory, self.reader = repository, directory, HubReader(repository)

    @classmethod
    @contextmanager
    def open(cls, address: str, out: Path | None = None) -> Iterator[Mirror]:
        """Fetch what a plan needs into a temporary directory.

        out   where an earlier run may have begun: its commit is gone on with
        Raises UsageError, CheckpointError.
        """
        name, revision = parse_address(address)
        pinned = _find_pinned(out, name, revision) if out else None
        repository = Repository.open(name, revision, pinned)
        with tempfile.TemporaryDirectory(prefix="moepack-") as folder:
            directory = Path(folder) / name.replace("/", "--")
            directory.mkdir()
            mirror = cls(repository, directory)
            mirror._fetch_small_files()
            yield mirror

    @property
    def origin(self) -> Origin:
        """Where the files come from, for a plan's settings, and what reads them."""
        files = self.repository.files
        shards = {path.name: files[path.name].sha256 for path in sorted(self.directory.glob("*.safetensors"))}
        names = {"repository": self.repository.name, "asked": self.repository.revision}
        facts = {**names, "commit": self.repository.commit, "sha256": shards}
        return Origin(f"{SCHEME}{self.repository.name}@{self.repository.commit}", {"hub": facts}, self.reader)

    def _fetch_small_files(self) -> None:
        files = self.repository.files
        for name in (*COPIED_FILES, INDEX_NAME):
            if name in files:
                (self.directory / name).write_bytes(self.repository.read_small(name))
        if CONFIG_NAME not in files:
            raise CheckpointError(f"{self.repository.url(CONFIG_NAME)}: there is no such file: is this a checkpoint?")
        if INDEX_NAME in files:
            shards = sorted(set(read_weight_map(self.directory).values()))
        else:
            shards = [SINGLE_NAME] if SINGLE_NAME in files else []
        for shard in shards:
            if shard not in files:
                raise CheckpointError(f"{self.repository.url(shard)}: the index names it, the repository lacks it")
        with ThreadPoolExecutor(REQUESTS) as pool:  # a dozen small requests a shard
            list(pool.map(self._fetch_sparse, shards))

    def _fetch_sparse(self, shard: str) -> None:
        """A file of the shard's size with its header and what its fingerprint is of: the disk stores no more than that.

        So a calibration of the same checkpoint fits, wherever either was made, and one of a fine-tune does not.
        """
        size_bytes = self.repository.files[shard].size_bytes
        head = self.repository.read_range(shard, 0, min(LENGTH_BYTES, size_bytes))
        length = min(int.from_bytes(head, "little"), MAX_TENSOR_HEADER_BYTES, max(0, size_bytes - LENGTH_BYTES))
        header = self.repository.read_range(shard, LENGTH_BYTES, length) if length else b""
        done = len(head + header)
        with open(self.directory / shard, "wb") as file:
            file.write(head + header)
            file.truncate(size_bytes)
            for offset in sample_offsets(done, size_bytes):
                start, done = max(offset, done), min(offset + SAMPLE_BYTES, size_bytes)
                if start < done:
                    file.seek(start)
                    file.write(self.repository.read_range(shard, start, done - start))


def _live_bytes(layers: list[set[str]], sizes: dict[str, int]) -> int:
    """The most bytes of shards that are needed at a time, each from its first layer to its last."""
    last = {shard: index for index, shards in enumerate(layers) for shard in shards}
    live: set[str] = set()
    most = 0
    for index, shards in enumerate(layers):
        live |= shards
        most = max(most, sum(sizes[shard] for shard in live))
        live = {shard for shard in live if last[shard] > index}
    return most


class HubReader(ShardReader):
    """Reads experts from shards that one thread downloads in the order of the layers, and the rest by range.

    A shard is fetched when its space is free and deleted when the last layer that needs it is written. Before that the
    pieces in which its resident weights will be asked for are hashed, and that is written down: so the ranges that are
    fetched at the end are held against bytes whose file had the right sha256.
    """

    reads_ahead = False

    def __init__(self, repository: Repository):
        super().__init__()
        self.repository = repository
        self.folder = Path()
        self._plan: ConversionPlan | None = None
        self._expert_tensors: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._needs: dict[str, set[str]] = {}  # layer file of the pack -> shards, while it is not written
        self._here: set[str] = set()
        self._digests: dict[str, dict[str, str]] = {}  # shard -> piece of a resident weight -> sha256
        self._failure: BaseException | None = None
        self._stopped = False
        self._downloads: threading.Thread | None = None

    def prepare(self, plan: ConversionPlan, scratch_bytes: int | None) -> None:
        """Settle how many bytes of shards may lie beside a plan's output at a time.

        scratch_bytes   None for DEFAULT_SHARDS shards, more where a layer lies in more
        Raises UsageError if the shards of a layer do not fit.
        """
        sizes = {shard: self.repository.files[shard].size_bytes for shard in plan.checkpoint.shards}
        layers = [plan.layer_shards(layer) for layer in range(len(plan.source.experts))]
        needed = max(_live_bytes(layers, sizes), *(sizes[shard] for shard in plan.resident_shards))
        usual = sum(sorted(sizes.values())[-DEFAULT_SHARDS:])
        if scratch_bytes is not None and scratch_bytes < needed:
            raise UsageError(
                f"--scratch {format_size(scratch_bytes)}: the shards that one layer lies in take "
                f"{format_size(needed)} ({needed:,} bytes): give at least that"
            )
        self.scratch_bytes = max(usual, needed) if scratch_bytes is None else scratch_bytes
        self.folder = plan.out / JOURNAL_NAME / SHARDS_FOLDER
        self._plan, self._expert_tensors = plan, frozenset(plan.expert_tensors)

    def begin(self, needs: dict[str, set[str]]) -> None:
        """Start to download what the unfinished files of the pack need, in their order."""
        self._needs = {file: set(shards) for file, shards in needs.items() if file != RESIDENT_NAME}
        order = list(dict.fromkeys(shard for shards in self._needs.values() for shard in sorted(shards)))
        self.folder.mkdir(parents=True, exist_ok=True)
        residents = needs.get(RESIDENT_NAME, set())
        for shard in residents:
            record = self.folder / f"{shard}.json"
            if record.exists():
                self._digests[shard] = json.loads(record.read_bytes())
        order += sorted(residents - self._digests.keys() - set(order))
        for path in self.folder.iterdir():  # of an earlier run, and no longer needed
            if path.suffix != ".json" and path.name.removesuffix(PARTIAL_SUFFIX) not in order:
                path.unlink()
        self._downloads = threading.Thread(target=self._download_all, args=(order,), daemon=True)
        self._downloads.start()

    def finished(self, file: str) -> None:
        """A file of the pack is written: delete the shards that no layer needs any more."""
        with self._changed:
            for shard in sorted(self._needs.pop(file, ())):
                self._drop_if_done(shard)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the downloads; whoever waits for one gets an error."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._downloads:
            self._downloads.join(timeout=5)  # it may wait for a server; it ends with the process

    def prefetch(self, path: Path, offset: int, size: int) -> None:
        """Nothing: the shard has to be here first."""

    def read(self, path: Path, offset: int, size: int, tensor: str) -> np.ndarray:
        shard = path.name
        if self._downloads is None:  # still planning
            return self._read_range(shard, offset, size, tensor)
        probed: dict[str, str] | None = getattr(self._thread, "probed", None)
        if probed is not None:
            if not (self.folder / shard).exists():  # a scale in another file than its weight
                return self._read_range(shard, offset, size, tensor)
            raw = super().read(self.folder / shard, offset, size, tensor)
            probed[_piece(tensor, offset, size)] = hashlib.sha256(raw.data).hexdigest()
            return raw
        if tensor in self._expert_tensors:
            self._wait_for(shard, self._here)
            return super().read(self.folder / shard, offset, size, tensor)
        self._wait_for(shard, self._digests)
        expected = self._digests[shard].get(_piece(tensor, offset, size))
        for _ in range(2):
            raw = self._fetch_range(shard, offset, size)
            if expected in (None, hashlib.sha256(raw.data).hexdigest()):
                return self._note(tensor, raw)
        raise CheckpointError(
            f"{self.repository.url(shard)}: {tensor} at byte {offset} differs from the file's first download, twice"
        )

    def _read_range(self, shard: str, offset: int, size: int, tensor: str) -> np.ndarray:
        return self._note(tensor, self._fetch_range(shard, offset, size))

    def _fetch_range(self, shard: str, offset: int, size: int) -> np.ndarray:
        record: Record | None = getattr(self._thread, "record", None)
        with (record or Record()).timed("read"):
            return np.frombuffer(self.repository.read_range(shard, offset, size, lambda: self._stopped), np.uint8)

    def _wait_for(self, shard: str, ready: Container[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: shard in ready or self._failure or self._stopped)
            if shard not in ready:
                raise self._failure or CheckpointError(f"{self.repository.url(shard)}: stopped")

    def _download_all(self, order: list[str]) -> None:
        sizes = {shard: self.repository.files[shard].size_bytes for shard in order}

        def may_go_on(shard: str) -> bool:
            return self._stopped or sum(sizes[one] for one in self._here) + sizes[shard] <= self.scratch_bytes

        try:
            for shard in order:
                with self._changed:
                    self._changed.wait_for(partial(may_go_on, shard))
                if self._stopped:
                    return
                path = self.folder / shard
                if not path.exists():
                    self.repository.download(shard, path, lambda: self._stopped)
                digests = self._probe(shard)
                with self._changed:
                    self._here.add(shard)
                    self._digests[shard] = digests
                    self._drop_if_done(shard)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _probe(self, shard: str) -> dict[str, str]:
        """The hashes of the pieces in which the resident weights of a shard will be read."""
        assert self._plan is not None
        checkpoint = self._plan.checkpoint
        probed: dict[str, str] = {}
        self._thread.probed = probed
        for weight in self._plan.source.residents.values():
            if checkpoint.shard_of(weight.name) == shard:
                for first, count in weight.list_pieces(PIECE_BYTES):
                    weight.read_rows(checkpoint, first, count)
        del self._thread.probed
        with atomic_file(self.folder / f"{shard}.json") as file:
            file.write(json.dumps(probed).encode())
        return probed

    def _drop_if_done(self, shard: str) -> None:
        """Delete a shard that no unwritten layer needs; with the lock held."""
        if not any(shard in shards for shards in self._needs.values()):
            self._here.discard(shard)
            self.forget(self.folder / shard)
            (self.folder / shard).unlink(missing_ok=True)


def _piece(tensor: str, offset: int, size: int) -> str:
    return f"{tensor}@{offset}+{size}"


def _find_pinned(out: Path, name: str, revision: str) -> str | None:
    """The commit that an earlier run into `out` resolved the same revision to."""
    for path, keys in ((out / JOURNAL_NAME / SETTINGS_FILE, ()), (out / MANIFEST_NAME, ("provenance", "settings"))):
        try:
            found = json.loads(path.read_bytes())
            for key in (*keys, "hub"):
                found = found[key]
            if (found["repository"], found["asked"]) == (name, revision):
                return str(found["commit"])
        except (OSError, ValueError, KeyError, TypeError):  # noqa: PERF203 (two files)
            continue
    return None

"""A pack written to an object store, or to any other place that fsspec knows, by the tasks of ray_engine.py.

There each object is written once, whole, from start to end: no renames, and no places inside a file. So a range of a
layer's experts becomes an object of its own, under `.convert/`; when all of a layer are there, one task streams them
into the layer's file. The journal's records are objects, too. What is left (resident weights, copied files, manifest)
is made by the ordinary conversion in a local directory, in which empty files of the right size stand for the layers,
and is uploaded: the manifest last, and then `.convert/` is removed.

    output = UrlOutput(plan_conversion(source, staging, recipe), "s3://models/qwen397b.moepack")
    convert_layers(output, workers, on_bytes)
    output.finish(convert(output.stage(), workers, on_bytes))

Not here: a lock. Two conversions of the same settings write the same bytes; of others, the second is refused.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moepack.convert.journal import JOURNAL_NAME, SETTINGS_FILE, Journal, check_settings
from moepack.convert.pipeline import encode_expert
from moepack.convert.plan import COPIED_FILES, EXPERT_FILE, ConversionPlan
from moepack.convert.ray_engine import READ_BYTES, WrittenRange, layer_file, record_layer
from moepack.layout.errors import MoepackError, UsageError, WriteError
from moepack.layout.manifest import Manifest
from moepack.layout.spec import MANIFEST_NAME, RESIDENT_NAME

UPLOAD_BYTES = 8 * 2**20  # of a file at a time


def is_url(out: str) -> bool:
    return "://" in out


class UrlOutput:
    """A pack at a URL of fsspec; the plan's own output is the local directory for what is made here.

    Sent to other machines it opens the place anew, with their credentials.
    """

    def __init__(self, plan: ConversionPlan, url: str):
        self.plan, self.url = plan, url.rstrip("/")

    # What ray_engine.Output asks for

    @contextmanager
    def open(self) -> Iterator[UrlOutput]:
        earlier = self.get(Path(SETTINGS_FILE).stem)
        if earlier is not None:
            check_settings(self.url, earlier, json.loads(json.dumps(self.plan.settings)))
        elif self._list():
            raise UsageError(f"{self.url}: is not empty and no conversion of ours: choose another place")
        else:
            self.put(Path(SETTINGS_FILE).stem, self.plan.settings)
        yield self

    def is_finished(self, journal: UrlOutput, layer: int) -> bool:
        name = layer_file(self.plan, layer)
        record = journal.get(Path(name).stem)
        return record is not None and self._size(name) == record["entry"]["size_bytes"]

    def write_range(self, layer: int, first: int, count: int) -> WrittenRange:
        written = []
        with self._writing(self._range_name(layer, first)) as file:
            for expert in range(first, first + count):
                encoded = encode_expert(self.plan, layer, expert)
                file.write(encoded.arrays.pop("block"))
                written.append(encoded)
        return WrittenRange(tuple(written))

    def join_layer(self, layer: int, *ranges: WrittenRange) -> dict[str, Any]:
        name = layer_file(self.plan, layer)
        firsts, first = [], 0
        for part in ranges:
            firsts.append(first)
            first += len(part.experts)
        with self._writing(name) as target:

            def pieces() -> Iterator[bytes]:
                for first in firsts:
                    with self._fs.open(self._path(self._range_name(layer, first)), "rb") as file:
                        while piece := file.read(READ_BYTES):
                            target.write(piece)
                            yield piece

            return record_layer(self.plan, layer, ranges, pieces(), f"{self.url}/{name}")

    def noted(self, layer: int) -> None:
        """The ranges are needed no more."""
        stem = f"{Path(layer_file(self.plan, layer)).stem}."
        for name in self._list(JOURNAL_NAME):
            if name.startswith(f"{JOURNAL_NAME}/{stem}") and not name.endswith(".json"):
                self._remove(name)

    # The journal

    def get(self, step: str) -> dict[str, Any] | None:
        """The record of a finished step, None if it is not finished."""
        raw = self._read(f"{JOURNAL_NAME}/{step}.json")
        return None if raw is None else json.loads(raw)

    def put(self, step: str, record: dict[str, Any]) -> None:
        """Note a step as finished."""
        self._write(f"{JOURNAL_NAME}/{step}.json", json.dumps(record).encode())

    # Before and after

    def find_finished(self) -> Manifest | None:
        """The manifest of a finished pack that is what the plan would write, None if there is none yet.

        Raises UsageError if there is another pack.
        """
        raw = self._read(MANIFEST_NAME)
        if raw is None:
            return None
        manifest = Manifest.from_bytes(raw, Path(MANIFEST_NAME))
        if not self.plan.describes(manifest):
            raise UsageError(
                f"{self.url}: holds a pack of another source or with other settings: choose another place, or replace "
                "it with --overwrite"
            )
        return manifest

    def tidy(self) -> None:
        """Delete what a run left that was killed when all but this was done."""
        self._remove_all(self._list(JOURNAL_NAME))

    def remove(self) -> None:
        """Delete the pack or unfinished conversion there, manifest first. Raises UsageError for anything else."""
        names = self._list()
        foreign = [name for name in names if not _is_ours(name)]
        if foreign or (names and not {MANIFEST_NAME, f"{JOURNAL_NAME}/{SETTINGS_FILE}"} & set(names)):
            found = f"holds {', '.join(sorted(foreign)[:4])}" if foreign else "is no pack"
            raise UsageError(f"{self.url}: {found}: --overwrite deletes packs only; move your files away first")
        self._remove_all(sorted(names, key=lambda name: name != MANIFEST_NAME))

    def stage(self) -> ConversionPlan:
        """Let the local directory look as if the layers had been written there; the plan to go on with."""
        with Journal.open(self.plan.out, self.plan.settings) as journal:
            for layer in range(len(self.plan.source.experts)):
                name = layer_file(self.plan, layer)
                record = self.get(Path(name).stem)
                if record is not None:
                    path = self.plan.out / name
                    path.parent.mkdir(exist_ok=True)
                    with open(path, "wb") as file:
                        file.truncate(record["entry"]["size_bytes"])
                    journal.put(path.stem, record)
        return self.plan

    def finish(self, manifest: Manifest, on_file: Callable[[str], object] = lambda name: None) -> None:
        """Upload what was made here; the manifest makes it a pack."""
        for name in (RESIDENT_NAME, *(entry.file for entry in manifest.copied_files)):
            on_file(name)
            with open(self.plan.out / name, "rb") as source, self._writing(name) as target:
                shutil.copyfileobj(source, target, UPLOAD_BYTES)
        on_file(MANIFEST_NAME)
        self._write(MANIFEST_NAME, (self.plan.out / MANIFEST_NAME).read_bytes())
        self.tidy()

    # The place

    @property
    def _fs(self) -> Any:
        return self._find()[0]

    def _path(self, name: str) -> str:
        root = self._find()[1]
        return f"{root}/{name}" if name else root

    def _find(self) -> tuple[Any, str]:
        """fsspec keeps one object for each place; what it has listed there it must not keep."""
        try:
            fs, root = importlib.import_module("fsspec").core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{self.url}: {error}: pip install 'moepack[ray]' and what fsspec needs for it") from None
        return fs, root.rstrip("/")

    def _range_name(self, layer: int, first: int) -> str:
        return f"{JOURNAL_NAME}/{Path(layer_file(self.plan, layer)).stem}.{first:06d}"

    @contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        """A file piece by piece. What an error cuts off may stand there all the same, but nothing names it."""
        with self._asking(name), self._fs.open(self._make_room(name), "wb") as file:
            yield file

    def _write(self, name: str, content: bytes) -> None:
        """A file in one request: it is there whole, or not at all."""
        with self._asking(name):
            self._fs.pipe_file(self._make_room(name), content)

    def _make_room(self, name: str) -> str:
        path = self._path(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    def _read(self, name: str) -> bytes | None:
        with self._asking(name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def _size(self, name: str) -> int | None:
        with self._asking(name):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def _list(self, folder: str = "") -> list[str]:
        """Names of all files in a folder and below."""
        with self._asking(folder):
            root = self._path("")
            return [name.removeprefix(root).lstrip("/") for name in self._fs.find(self._path(folder))]

    def _remove(self, name: str) -> None:
        with self._asking(name):
            self._fs.rm_file(self._path(name))

    def _remove_all(self, names: list[str]) -> None:
        for name in names:
            self._remove(name)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Name the place in whatever error the library has for it."""
        try:
            yield
        except (MoepackError, KeyboardInterrupt):
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            text = f"{self.url}/{name}: {said}: mend that, then run the same command again to go on from here"
            raise WriteError(text) from None


def _is_ours(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == "experts":
        return bool(EXPERT_FILE.fullmatch(file))
    return name in (MANIFEST_NAME, RESIDENT_NAME, *COPIED_FILES) or folder == JOURNAL_NAME

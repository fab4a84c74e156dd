"""Disks that fail: an I/O error in source, output or pack is one line that names the place, and work goes on later.

The error comes from below Python: a small library that is loaded before the C library answers EIO where a test says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert_command import SMALL, files_of, problems_of, run_convert
from moepack.layout.reader import Pack
from moepack.layout.spec import MANIFEST_NAME
from moepack.layout.tensor_file import read_tensor_header
from tiny_checkpoint import write_checkpoint

GROUP = ("--group-size", 32)
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* FAULT is "call path offset": that call fails where it touches this byte of a file whose path ends so. */
static int fails(const char *call, int fd, long start, size_t size) {
    char kind[16], end[512], link[64], path[4096];
    long offset;
    const char *fault = getenv("FAULT");
    if (!fault || sscanf(fault, "%15s %511s %ld", kind, end, &offset) != 3 || strcmp(kind, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < (ssize_t)strlen(end)) return 0;
    path[length] = 0;
    if (strcmp(path + length - strlen(end), end) || offset < start || offset >= start + (long)size) return 0;
    errno = EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fails_parts(int fd, const struct iovec *parts, int count, long offset) {
    size_t size = 0;
    for (int i = 0; i < count; ++i) size += parts[i].iov_len;
    return fails("read", fd, offset, size);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return fails_parts(fd, parts, count, offset) ? -1 : REAL(preadv64)(fd, parts, count, offset);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    return fails_parts(fd, parts, count, offset) ? -1 : REAL(preadv64v2)(fd, parts, count, offset, flags);
}
ssize_t read(int fd, void *buffer, size_t size) {
    return fails("read", fd, lseek(fd, 0, SEEK_CUR), size) ? -1 : REAL(read)(fd, buffer, size);
}
ssize_t write(int fd, const void *buffer, size_t size) {
    return fails("write", fd, lseek(fd, 0, SEEK_CUR), size) ? -1 : REAL(write)(fd, buffer, size);
}
int fsync(int fd) { return fails("fsync", fd, 0, 1) ? -1 : REAL(fsync)(fd); }
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a compiler")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "shim.so"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SMALL, single_file=True)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed conversion."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return files_of(out)


def run_failing(shim: Path, fault: str, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(command)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULT": fault}
    return subprocess.run([program, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120)


def error_of(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what went wrong."""
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_source_that_cannot_be_read(shim: Path, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    spec = read_tensor_header(source / "model.safetensors").tensors[name]
    place = spec.offset_bytes + spec.size_bytes // 2  # in the second of its three experts
    out = tmp_path / "pack"
    ended = run_failing(shim, f"read /model.safetensors {place}", "moe-convert", source, out, *GROUP)
    start = spec.offset_bytes + spec.size_bytes // 3
    assert ended.returncode == 1
    expected = f"error: {source / 'model.safetensors'}: {name} at byte {start} cannot be read: Input/output error"
    assert error_of(ended).startswith(expected)
    assert "run the same command again" in error_of(ended)
    assert not (out / MANIFEST_NAME).exists()
    assert (out / "experts/layer_00.bin").exists(), "what was finished is kept"
    assert run_convert(source, out, *GROUP).code == 0
    assert files_of(out) == whole


@pytest.mark.parametrize(
    ("call", "file", "at"),
    [
        ("write", "experts/layer_01.bin", " at byte 0"),
        ("fsync", "resident.safetensors", ""),
        ("write", ".convert/layer_00.json", ""),
        ("write", "tokenizer.json", ""),
    ],
)
def test_an_output_that_cannot_be_written(
    shim: Path, source: Path, whole: dict[str, str], tmp_path: Path, call: str, file: str, at: str
) -> None:
    out = tmp_path / "pack"
    ended = run_failing(shim, f"{call} {out / file}.partial 0", "moe-convert", source, out, *GROUP)
    assert ended.returncode == 1
    assert error_of(ended).startswith(f"error: {out / file}: cannot be written: Input/output error{at}: check the disk")
    assert not (out / MANIFEST_NAME).exists()
    assert not list(out.rglob("*.partial"))
    assert run_convert(source, out, *GROUP).code == 0
    assert files_of(out) == whole


def test_a_small_file_of_the_source(shim: Path, source: Path, tmp_path: Path) -> None:
    """Read when the output is all there but for it, and before anything when it is a shard's samples."""
    out = tmp_path / "pack"
    ended = run_failing(shim, "read /config.json 0", "moe-convert", source, out, *GROUP)
    assert (ended.returncode, error_of(ended).startswith(f"error: {source / 'config.json'}: cannot be read")) == (
        1,
        True,
    )
    last = (source / "model.safetensors").stat().st_size - 1
    ended = run_failing(shim, f"read /model.safetensors {last}", "moe-convert", source, out, *GROUP)
    expected = f"error: {source / 'model.safetensors'}: cannot be read: Input/output error"
    assert (ended.returncode, error_of(ended).startswith(expected)) == (1, True)
    assert not out.exists()


def test_a_pack_that_cannot_be_read(shim: Path, source: Path, tmp_path: Path) -> None:
    """Named by verify with its repair, and ends a run: nothing is put in the block's place."""
    out = tmp_path / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    with Pack.open(out) as pack:
        offset = pack.geometry(0).offsets[1]
    fault = f"read /layer_00.bin {offset}"
    ended = run_failing(shim, fault, "moe-inspect", "verify", out)
    assert ended.returncode == 3
    assert f"layer 0 expert 1 at byte {offset}" in ended.stdout
    assert "Input/output error" in ended.stdout
    assert f"moe-convert SRC {out} --redo 0:1" in ended.stderr
    prompt = tmp_path / "ids.json"
    prompt.write_text("[1, 2, 3, 4, 5, 6, 7, 8]")
    ended = run_failing(shim, fault, "moe-run", "generate", out, "--token-ids", prompt, "--max-tokens", 4)
    assert (ended.returncode, ended.stdout.strip()) == (3, "")
    assert f"layer 0 expert 1 at byte {offset}" in error_of(ended)
    assert problems_of(out) == []


def test_a_repair_that_cannot_be_written(shim: Path, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    fault = f"fsync {out / 'experts/layer_00.bin'} 0"
    ended = run_failing(shim, fault, "moe-convert", source, out, *GROUP, "--redo", "0:1")
    assert ended.returncode == 1
    assert error_of(ended).startswith(f"error: {out / 'experts/layer_00.bin'}: cannot be written: Input/output error")
    assert run_convert(source, out, *GROUP, "--redo", "0:1").code == 0
    assert files_of(out) == whole

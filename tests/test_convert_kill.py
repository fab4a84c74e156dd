"""A conversion stopped at any instant goes on to the same bytes, or leaves no manifest.

Stopped by Ctrl-C, by a real kill -9, before each single change it makes on the disk, and by a disk that is full.
What cannot be shown here is a loss of power: that every rename waits for the flush of its file is shown instead.
"""

import builtins
import json
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from convert_command import SMALL, Result, convert_in_fork, files_of, finish, problems_of, run_convert, start_convert
from moepack.convert.pipeline import convert
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe
from moepack.layout.errors import CheckpointError
from moepack.layout.spec import MANIFEST_NAME, PARTIAL_SUFFIX
from tiny_checkpoint import TinyModel, write_checkpoint

GROUP = ("--group-size", 32)
# What a conversion changes on the disk; writes into an open file show up at its flush and rename.
CHANGES = [(os, "mkdir"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (builtins, "open")]
if sys.version_info < (3, 11):  # there pathlib keeps its own references
    CHANGES += [(pathlib._normal_accessor, "mkdir"), (pathlib._normal_accessor, "unlink")]
MIB = 2**20


class Killed(BaseException):
    """Stands for the end of the process: after it nothing changes on the disk, no clean-up either."""


class Stop:
    """Lets `allowed` changes of the disk happen and stops the next, once (Ctrl-C) or for good (a kill)."""

    def __init__(self, allowed: float, kind: type[BaseException]):
        self.allowed, self.kind, self.changes = allowed, kind, 0

    def guard(self, original):
        def guarded(*arguments, **options):
            if original is builtins_open and "w" not in (*arguments, "r")[1]:
                return original(*arguments, **options)
            self.changes += 1
            late = self.changes > self.allowed + 1 and self.kind is Killed
            if self.changes == self.allowed + 1 or late:
                raise self.kind
            return original(*arguments, **options)

        return guarded

    @contextmanager
    def armed(self):
        with ExitStack() as patches:
            for module, name in CHANGES:
                patches.enter_context(patch.object(module, name, self.guard(getattr(module, name))))
            yield self


builtins_open = builtins.open


def run_stopped(stop: Stop, *arguments: object) -> Result | None:
    """Run moe-convert under a Stop; None if it was killed."""
    try:
        with stop.armed():
            return run_convert(*arguments)
    except Killed:
        return None


def count_changes(*arguments: object) -> int:
    stop = Stop(float("inf"), Killed)
    assert run_stopped(stop, *arguments).code == 0
    return stop.changes


def assert_no_half_pack(out: Path) -> None:
    """Either no manifest or a pack that verifies."""
    if (out / MANIFEST_NAME).exists():
        assert problems_of(out) == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """As few files as a checkpoint can have: each is several changes of the disk."""
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    model = TinyModel(layers=1, experts=2, full_attention_interval=1, mtp=False, vision=False)
    write_checkpoint(directory, model, single_file=True)
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    return directory


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return files_of(out)


@pytest.mark.parametrize("kind", [Killed, KeyboardInterrupt])
def test_stopped_before_any_change_it_goes_on_to_the_same_bytes(source, whole, tmp_path, kind):
    total = count_changes(source, tmp_path / "counted", *GROUP)
    assert total > 25
    for allowed in range(total):
        out = tmp_path / str(allowed)
        result = run_stopped(Stop(allowed, kind), source, out, *GROUP)
        assert result is None if kind is Killed else (result.code, result.out) == (130, "")
        assert_no_half_pack(out)
        again = run_convert(source, out, *GROUP)
        assert (again.code, again.errors) == (0, []), f"stopped before change {allowed + 1} of {total}"
        assert files_of(out) == whole, f"stopped before change {allowed + 1} of {total}"


@pytest.mark.parametrize(
    ("finished", "kind", "then"),
    [(True, Killed, ()), (True, KeyboardInterrupt, ("--overwrite",)), (False, Killed, ())],
)
def test_stopped_while_it_replaces_what_was_there(source, whole, tmp_path, finished, kind, then):
    """The old pack is there or on its way out: the same command, or --overwrite where that is asked for, ends well.

    Nothing stays of the old one, which came from another source and had more files.
    """
    old = tmp_path / "old"
    other = write_checkpoint(tmp_path / "other", SMALL)
    run_stopped(Stop(float("inf") if finished else 25, Killed), other, old, *GROUP, "--bits", 2)
    assert (old / MANIFEST_NAME).exists() == finished
    arguments = (*GROUP, "--overwrite")
    total = count_changes(source, shutil.copytree(old, tmp_path / "counted"), *arguments)
    deletions = total - count_changes(source, tmp_path / "fresh", *GROUP)
    assert deletions > 5
    for allowed in range(deletions + 4):  # what follows is a conversion like any other
        out = shutil.copytree(old, tmp_path / str(allowed))
        run_stopped(Stop(allowed, kind), source, out, *arguments)
        assert_no_half_pack(out)
        again = run_convert(source, out, *GROUP, *then)
        if again.code == 2 and not then:
            assert "--overwrite" in again.errors[0]
            again = run_convert(source, out, *arguments)
        assert (again.code, again.errors) == (0, []), f"stopped before change {allowed + 1} of {total}"
        assert files_of(out) == whole, f"stopped before change {allowed + 1} of {total}"


@pytest.fixture
def all_but_renamed(source, tmp_path):
    """A conversion killed with its manifest safe under the temporary name: what the last rename is left to do."""
    for allowed in range(count_changes(source, tmp_path / "counted", *GROUP) - 1, 0, -1):
        out = tmp_path / f"pack{allowed}"
        run_stopped(Stop(allowed, Killed), source, out, *GROUP)
        if not (out / ".convert").exists() and not (out / MANIFEST_NAME).exists():
            assert (out / (MANIFEST_NAME + PARTIAL_SUFFIX)).exists()
            return out
    pytest.fail("no kill fell between the journal's removal and the manifest's rename")


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_killed_between_the_journals_removal_and_the_manifests_rename(source, whole, all_but_renamed, options):
    assert run_convert(source, all_but_renamed, *GROUP, *options).code == 0
    assert files_of(all_but_renamed) == whole


def test_killed_while_it_replaces_what_only_the_rename_was_missing_from(source, whole, all_but_renamed, tmp_path):
    """The manifest under its temporary name must not come back to a pack whose files are gone."""
    total = count_changes(source, shutil.copytree(all_but_renamed, tmp_path / "again"), *GROUP, "--overwrite")
    deletions = total - count_changes(source, tmp_path / "fresh", *GROUP)
    for allowed in range(deletions + 4):
        out = shutil.copytree(all_but_renamed, tmp_path / str(allowed))
        run_stopped(Stop(allowed, Killed), source, out, *GROUP, "--overwrite")
        assert run_convert(source, out, *GROUP).code == 0
        assert files_of(out) == whole, f"killed before change {allowed + 1}"


@pytest.mark.slow
def test_killed_again_and_again(source, whole, tmp_path):
    """Up to four kills of one conversion, each before a random change."""
    generator = random.Random(7)
    for attempt in range(150):
        out = tmp_path / str(attempt)
        for _ in range(generator.randint(2, 4)):
            run_stopped(Stop(generator.randrange(40), Killed), source, out, *GROUP)
            assert_no_half_pack(out)
        assert run_convert(source, out, *GROUP).code == 0
        assert files_of(out) == whole


def test_each_rename_waits_for_the_flush_of_its_file_and_is_flushed_itself(source, tmp_path):
    flushed, problems = set(), []
    fsync, replace, rmdir = os.fsync, os.replace, os.rmdir
    renamed_in = set()

    def watched_fsync(descriptor):
        facts = os.fstat(descriptor)
        flushed.add(facts.st_ino)
        if stat.S_ISDIR(facts.st_mode):
            renamed_in.discard(facts.st_ino)
        fsync(descriptor)

    def watched_replace(origin, target):
        if os.stat(origin).st_ino not in flushed:
            problems.append(f"{target} was renamed before it was flushed")
        if Path(target).name == MANIFEST_NAME and renamed_in:
            problems.append("the manifest was renamed before other renames were flushed")
        replace(origin, target)
        renamed_in.add(os.stat(Path(target).parent).st_ino)

    def watched_rmdir(path, **options):
        facts = os.stat(path, **options)
        renamed_in.discard(facts.st_ino)
        rmdir(path, **options)

    plan = plan_conversion(source, tmp_path / "pack", Recipe(4, 32, 8, "minmax"))
    watched = {"fsync": watched_fsync, "replace": watched_replace, "rmdir": watched_rmdir}
    with patch.multiple(os, **watched):
        convert(plan, 1, lambda size_bytes: None)
    assert problems == []
    assert renamed_in == set(), "a rename was not flushed"


# A program of its own, killed for real: a checkpoint that takes a second or two.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    model = TinyModel(layers=3, experts=64, hidden=128, moe_intermediate=96)
    return write_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint", model, mtp_experts="fused")


@pytest.fixture(scope="module")
def large_whole(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("large_whole") / "pack"
    assert run_convert(large, out, *GROUP).code == 0
    return files_of(out)


def written_bytes(out: Path) -> int:
    """Bytes that lie below a directory while another process works in it."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names]
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # renamed since
            total += os.stat(path).st_size
    return total


def stop_when(process: subprocess.Popen, reached, number: int) -> bool:
    """Send a signal once `reached()`; False if the process ended before."""
    while process.poll() is None:
        if reached():
            process.send_signal(number)
            return True
        time.sleep(0.002)
    return False


def test_killed_three_times_it_goes_on_to_the_same_bytes(large, large_whole, tmp_path):
    out, total, generator = tmp_path / "pack", 0, random.Random(3)
    total = json_total(large, out)
    for third in range(3):
        share = (third + generator.uniform(0.2, 0.8)) / 3
        process = start_convert(large, out, *GROUP)
        assert stop_when(process, lambda share=share: written_bytes(out) >= share * total, signal.SIGKILL)
        assert finish(process).code == -signal.SIGKILL
        assert_no_half_pack(out)
    assert finish(start_convert(large, out, *GROUP)).code == 0
    assert files_of(out) == large_whole


def json_total(source: Path, out: Path) -> int:
    return json.loads(run_convert(source, out, *GROUP, "--dry-run", "--json").out)["total_bytes"]


@pytest.mark.slow
def test_killed_at_a_hundred_random_instants(large, large_whole, tmp_path):
    """kill -9, spread over the time from the first change of the disk to the last; every second run is killed twice."""
    generator = random.Random(20)
    timed = tmp_path / "timed"
    process = convert_in_fork(large, timed, *GROUP)
    while not timed.exists():
        time.sleep(0.001)
    started = time.monotonic()
    process.join()
    assert process.exitcode == 0
    seconds, unfinished = time.monotonic() - started, 0
    for number in range(100):
        out = tmp_path / str(number)
        for _ in range(1 + number % 2):
            process = convert_in_fork(large, out, *GROUP)
            while not out.exists() and process.is_alive():
                time.sleep(0.001)
            time.sleep((number + generator.random()) / 100 * seconds)
            process.kill()
            process.join()
            unfinished += not (out / MANIFEST_NAME).exists()
            assert_no_half_pack(out)
        result = run_convert(large, out, *GROUP)
        assert (result.code, result.errors) == (0, [])
        assert files_of(out) == large_whole
        shutil.rmtree(out)
    assert unfinished >= 50, "the kills fell after the end: nothing was tested"


def test_ctrl_c_says_so_in_one_line_and_the_same_command_goes_on(large, large_whole, tmp_path):
    out = tmp_path / "pack"
    process = start_convert(large, out, *GROUP, "--workers", 3)
    assert stop_when(process, lambda: (out / "experts" / "layer_01.bin").exists(), signal.SIGINT)
    result = finish(process)
    assert (result.code, result.out, len(result.errors)) == (130, "", 1)
    assert result.errors[0] == f"error: {out}: stopped; the same command goes on from here"
    assert not (out / MANIFEST_NAME).exists()
    assert not list(out.rglob("*.partial"))
    kept = (out / "experts" / "layer_00.bin").stat().st_mtime_ns
    assert finish(start_convert(large, out, *GROUP)).code == 0
    assert (out / "experts" / "layer_00.bin").stat().st_mtime_ns == kept, "what was finished was written again"
    assert files_of(out) == large_whole


def test_a_second_process_is_refused_and_changes_nothing(large, large_whole, tmp_path):
    out = tmp_path / "pack"
    process = start_convert(large, out, *GROUP)
    assert stop_when(process, lambda: (out / "experts" / "layer_00.bin").exists(), signal.SIGSTOP)
    before = files_of(out)
    for options in ((), ("--overwrite",), ("--bits", 2, "--overwrite"), ("--workers", 1)):
        result = run_convert(large, out, *GROUP, *options)
        assert (result.code, result.out, len(result.errors)) == (2, "", 1)
        assert f"{out}: another moe-convert is at work here" in result.errors[0]
    assert run_convert(large, out, *GROUP, "--dry-run").code == 0
    assert files_of(out) == before
    process.send_signal(signal.SIGCONT)
    assert finish(process).code == 0
    assert files_of(out) == large_whole


def assert_no_space(result: Result, out: Path) -> None:
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert result.errors[0].startswith(f"error: {out}")
    assert "make space" in result.errors[0]
    assert "run the same command again" in result.errors[0]
    assert not (out / MANIFEST_NAME).exists()
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("limit", ["resident.safetensors", ".convert/settings.json"])
def test_a_file_size_limit(source, whole, tmp_path, limit):
    """One byte short of what a file needs."""
    pytest.importorskip("resource", reason="file size limits need a Unix")
    probe = tmp_path / "probe"
    assert run_convert(source, probe, *GROUP).code == 0
    sizes = {name: (probe / name).stat().st_size for name in whole if not name.endswith("/")}
    size_bytes = sizes.get(limit, 200)
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes - 1}, {size_bytes - 1}))"
    out = tmp_path / "pack"
    result = finish(start_convert(source, out, *GROUP, prelude=prelude))
    assert_no_space(result, out)
    assert limit in result.errors[0]
    assert run_convert(source, out, *GROUP).code == 0
    assert files_of(out) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a file system of a size; called again it resizes it."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def of_size(size_bytes: int, again: str = "") -> Path:
        options = f"size={size_bytes}{again}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mounted], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        return mounted

    if shutil.which("mount") is None or os.uname().sysname != "Linux":
        pytest.skip("needs Linux and mount")
    yield of_size
    subprocess.run(["umount", mounted], capture_output=True)


CLAIM_SPACE = """
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=2**40)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_during_the_work(large, large_whole, small_disk):
    """Others fill it after the space was checked: at whatever byte that is, it is said, and the work goes on later."""
    generator = random.Random(5)
    total = None
    for attempt in range(6):
        disk = small_disk(64 * MIB, ",remount" if attempt else "")
        out = disk / "pack"
        shutil.rmtree(out, ignore_errors=True)
        total = total or json_total(large, out)
        for share in sorted(generator.uniform(0, 1) for _ in range(2)):
            small_disk(max(64 * 1024, int(share * total)), ",remount")
            assert_no_space(finish(start_convert(large, out, *GROUP, prelude=CLAIM_SPACE)), out)
        small_disk(64 * MIB, ",remount")
        assert finish(start_convert(large, out, *GROUP)).code == 0
        assert files_of(out) == large_whole


def test_a_full_disk(source, whole, small_disk):
    """Full from the first byte on; refused by the check, and caught where the check was told wrong."""
    disk = small_disk(64 * 1024)
    (disk / "other").write_bytes(bytes(64 * 1024))
    out = disk / "pack"
    refused = finish(start_convert(source, out, *GROUP))
    assert (refused.code, len(refused.errors)) == (1, 1)
    assert "0 are free" in refused.errors[0]
    assert_no_space(finish(start_convert(source, out, *GROUP, prelude=CLAIM_SPACE)), out)
    small_disk(64 * MIB, ",remount")
    assert finish(start_convert(source, out, *GROUP)).code == 0
    assert files_of(out) == whole


CHANGES_UNDER_US = {
    "time": lambda path: os.utime(path, ns=(1, 1)),
    "size": lambda path: os.truncate(path, path.stat().st_size + 1),
    "file": lambda path: (shutil.copy2(path, f"{path}.new"), os.replace(f"{path}.new", path)),
    "other bytes": lambda path: _flip_and_keep_the_time(path),
    "vanished": lambda path: path.unlink(),
}


def _flip_and_keep_the_time(path: Path) -> None:
    facts = path.stat()
    with open(path, "r+b") as file:  # the last bytes are always among the samples
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES_UNDER_US)
def test_a_source_that_changes_under_us(tmp_path, change):
    """Found before the file made from it counts as done; restored, the same command goes on to the same bytes."""
    source = write_checkpoint(tmp_path / "source", SMALL, single_file=True)
    kept = Path(shutil.copytree(source, tmp_path / "kept"))
    plain = (*GROUP, "--quantizer", "minmax")
    assert run_convert(kept, tmp_path / "whole", *plain).code == 0
    out, seen = tmp_path / "pack", []
    plan = plan_conversion(source, out, Recipe(4, 32, 8, "minmax"))

    def change_once(size_bytes):
        seen.append(size_bytes)
        if len(seen) == 2:
            CHANGES_UNDER_US[change](source / "model.safetensors")

    with pytest.raises(CheckpointError, match="while it was read"):
        convert(plan, 1, change_once)
    assert not (out / MANIFEST_NAME).exists()
    assert not (out / ".convert" / "layer_00.json").exists()
    shutil.copy2(kept / "model.safetensors", source / "model.safetensors")
    assert run_convert(source, out, *plain).code == 0
    whole, found = files_of(tmp_path / "whole"), files_of(out)
    assert {n: d for n, d in found.items() if n != MANIFEST_NAME} == {
        n: d for n, d in whole.items() if n != MANIFEST_NAME
    }


def test_a_read_only_output_is_one_line(source, small_disk):
    disk = small_disk(64 * MIB)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True, capture_output=True)
    result = finish(start_convert(source, disk / "pack", *GROUP))
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert str(disk / "pack") in result.errors[0]
    assert "Read-only" in result.errors[0]


def test_another_argument_is_named_with_both_values(source, tmp_path):
    out = tmp_path / "pack"
    run_stopped(Stop(20, Killed), source, out, *GROUP, "--bits", 2)
    result = run_convert(source, out, *GROUP, "--resident-bits", 4)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "(bits 2, now 4; resident_bits 8, now 4)" in result.errors[0]

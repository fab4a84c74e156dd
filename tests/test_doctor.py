"""moe-inspect doctor: facts of this machine, and advice where, and only where, something costs speed."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from golden_packs import GOLDEN, moe_inspect, moe_inspect_process
from moepack.layout import doctor
from moepack.layout.doctor import Finding, examine_disk, examine_machine, file_system_of


def find(findings: list[Finding], name: str) -> Finding:
    return next(one for one in findings if one.name == name)


@pytest.fixture
def system_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of the system by path, in place of what this machine has."""
    files: dict[str, str] = {}
    read = doctor._read
    monkeypatch.setattr(doctor, "_read", lambda path: files[str(path)] if str(path) in files else read(path))
    return files


def test_the_command_reports_this_machine() -> None:
    shown = moe_inspect_process("doctor", GOLDEN / "mixed")
    assert (shown.returncode, shown.stderr) == (0, "")
    facts = json.loads(moe_inspect("doctor", GOLDEN / "mixed", "--json").stdout)
    found = {one["name"]: one for one in facts["findings"]}
    assert {"torch", "backend", "instruction set", "cores", "memory", "swap", "huge pages"} <= set(found)
    assert {"locked memory", "file system", "direct I/O", "free space"} <= set(found)
    assert found["cores"]["value"]["present"] == os.cpu_count()
    assert found["memory"]["value"]["total_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts["ok"] == (not any(one["advice"] for one in facts["findings"]))
    for name in found:
        assert any(line.startswith(f"{name} ") for line in shown.stdout.splitlines())


def test_direct_io_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(examine_disk(tmp_path), "direct I/O")
    assert (found.value, found.advice is None) in ((True, True), (False, False))
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    monkeypatch.setattr(doctor, "_reads_directly", lambda path: False)
    refused = find(examine_disk(GOLDEN / "mixed"), "direct I/O")
    assert (refused.value, refused.text) == (False, "refused")
    assert "ext4" in (refused.advice or "")


def test_huge_pages_that_are_off_cost_speed(system_files: dict[str, str]) -> None:
    setting = str(doctor.THP_SETTING)
    for text, expected in (("always [madvise] never", None), ("always madvise [never]", "echo madvise")):
        system_files[setting] = text
        advice = find(examine_machine(), "huge pages").advice
        assert (advice is None) if expected is None else (expected in (advice or ""))


def test_a_quota_is_said_with_the_threads_that_fit(system_files: dict[str, str]) -> None:
    system_files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    cores = find(examine_machine(), "cores")
    assert cores.value["quota"] == 1.5
    if (os.cpu_count() or 1) > 1:
        assert "--threads 1" in (cores.advice or "")
    system_files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert find(examine_machine(), "cores").value["quota"] is None or "cpu" in os.listdir("/sys/fs/cgroup")


def test_swap_in_use_is_a_sign(system_files: dict[str, str]) -> None:
    meminfo = "MemTotal: 1000 kB\nMemAvailable: 100 kB\nSwapTotal: 2000000 kB\nSwapFree: {} kB\n"
    system_files["/proc/meminfo"] = meminfo.format(1000000)
    assert "close other programs" in (find(examine_machine(), "swap").advice or "")
    system_files["/proc/meminfo"] = meminfo.format(1999999)
    assert find(examine_machine(), "swap").advice is None


def test_the_lock_limit_is_compared_with_the_weights(
    system_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system_files["/proc/self/status"] = "CapEff:\t0000000000000000\n"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**20, 2**20))
    assert find(examine_machine(2**20), "locked memory").advice is None
    short = find(examine_machine(2**21), "locked memory")
    assert short.value == {"limit_bytes": 2**20, "needed_bytes": 2**21, "can_lock": False}
    assert "ulimit -l 2049" in (short.advice or "")
    system_files["/proc/self/status"] = f"CapEff:\t{1 << 14:016x}\n"
    assert find(examine_machine(2**21), "locked memory").advice is None


def test_the_longest_mount_point_decides(system_files: dict[str, str], tmp_path: Path) -> None:
    real = tmp_path.resolve()
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/b {real} nfs4 rw 0 0\n/dev/c {real}x xfs rw 0 0\n"
    system_files["/proc/self/mounts"] = mounts
    assert file_system_of(real / "pack") == "nfs4"
    assert "network" in (find(examine_disk(real), "file system").advice or "")
    assert file_system_of(real.parent) == "ext4"


def test_little_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert "make space" in (find(examine_disk(tmp_path), "free space").advice or "")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    refused = moe_inspect("doctor", tmp_path / "none" / "deeper")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no such directory" in refused.stderr

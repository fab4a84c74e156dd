"""The golden packs for tests: copies to damage, manifests to edit and sign again, moe-inspect to run on them.

pack = copy_pack("mixed", tmp_path)
edit_manifest(pack, lambda manifest: manifest["resident"].update(size_bytes=7))
assert moe_inspect("verify", pack).returncode == 3
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moepack.layout.cli import main
from moepack.layout.reader import Pack
from moepack.layout.verify import Problem, list_regions, verify_contents, verify_structure

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1"
NAMES = ("minimal", "mixed")
STATED_DIGEST = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')


def copy_pack(name: str, folder: Path) -> Path:
    """A golden pack of the test's own."""
    return Path(shutil.copytree(GOLDEN / name, folder / name))


def sign(raw: bytes) -> bytes:
    """Manifest bytes with the digest that they need, whatever they say."""
    zeros = STATED_DIGEST.sub(b'"manifest_sha256": "' + b"0" * 64 + b'"', raw, count=1)
    return zeros.replace(b"0" * 64, hashlib.sha256(zeros).hexdigest().encode(), 1)


def to_bytes(manifest: Any) -> bytes:
    """A manifest object as a file's bytes, signed. One line, as a manifest may be too."""
    return sign(json.dumps(manifest).encode())


def read_manifest(pack: Path) -> dict[str, Any]:
    """The manifest as plain JSON, unchecked."""
    return json.loads((pack / "manifest.json").read_bytes())


def edit_manifest(pack: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in place and sign it, so that nothing but the change can be found."""
    manifest = read_manifest(pack)
    change(manifest)
    (pack / "manifest.json").write_bytes(to_bytes(manifest))


def find_problems(pack: Path) -> list[Problem]:
    """All that verification finds, as `moe-inspect verify` does it; raises what cannot be collected."""
    opened, problems = verify_structure(pack)
    broken = {problem.file for problem in problems}
    regions = [region for region in list_regions(opened) if str(pack / region.file) not in broken]
    return problems + list(verify_contents(opened, regions, workers=1))


def read_everything(pack: Path) -> None:
    """Open a pack and read every block, array and file of it."""
    with Pack.open(pack) as opened:
        for layer in range(len(opened.manifest.expert_files)):
            geometry = opened.geometry(layer)
            for expert in range(geometry.num_experts):
                opened.read_block(layer, expert, memoryview(bytearray(geometry.block(expert).block_stride)))
        for name in opened.manifest.resident.tensors:
            opened.read_resident(name)
        for name in opened.manifest.resident.quantized:
            opened.read_resident_matrix(name)
        for entry in opened.manifest.copied_files:
            opened.read_file(entry.file)


def moe_inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: what it prints and its exit code, and the traceback of any other error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    command = ["moe-inspect", *map(str, arguments)]
    with patch.object(sys, "argv", command), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return subprocess.CompletedProcess(command, code, out, err)


def moe_inspect_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as its entry point does."""
    command = [sys.executable, "-c", "from moepack.layout.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)

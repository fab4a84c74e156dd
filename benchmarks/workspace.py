"""The files a speed measurement needs, in one folder: each made if it is not there, by the command that makes it.

checkpoint/                     make_checkpoint.py: put another one there first to measure that instead
experts4.moepack, ...2.moepack  moe-convert, resident weights at 4 bits as the peer's
peer.q4_0.gguf                  make_gguf.py in the peer's Python
ids/                            token ids of prompts, and of the answer that is fed to the peer

Workspace(Path("build/speed"), peer_python, peer_sources).prepare()
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BITS = (4, 2)
PROMPT_SEED = 0


@dataclass(frozen=True)
class Workspace:
    """Where things are. peer_python may be None: then only moepack is measured."""

    directory: Path
    peer_python: Path | None
    peer_sources: Path | None

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def gguf(self) -> Path:
        return self.directory / "peer.q4_0.gguf"

    @property
    def answer(self) -> Path:
        return self.directory / "ids" / "answer.json"

    def pack(self, bits: int) -> Path:
        return self.directory / f"experts{bits}.moepack"

    def prompt(self, num_tokens: int, name: str) -> Path:
        """Random token ids, the same for the same name and number, as a JSON file."""
        path = self.directory / "ids" / f"{name}{num_tokens}.json"
        if not path.exists():
            config = json.loads((self.checkpoint / "config.json").read_text())
            vocab = config.get("text_config", config)["vocab_size"]
            choose = random.Random(f"{PROMPT_SEED} {name}")
            path.write_text(json.dumps([choose.randrange(vocab) for _ in range(num_tokens)]))
        return path

    def prepare(self) -> None:
        """Make what is missing. Raises CalledProcessError if a command fails; what it said is on stderr."""
        self.answer.parent.mkdir(parents=True, exist_ok=True)
        if not (self.checkpoint / "model.safetensors.index.json").exists():
            _run([sys.executable, HERE / "make_checkpoint.py", self.checkpoint])
        for bits in BITS:
            if not (self.pack(bits) / "manifest.json").exists():
                convert = Path(sys.executable).with_name("moe-convert")
                _run([convert, self.checkpoint, self.pack(bits), "--bits", bits, "--resident-bits", 4])
        if self.peer_python and not self.gguf.exists():
            if not self.peer_sources:
                raise FileNotFoundError(f"{self.gguf}: not there, and making it takes --peer-sources (README.md)")
            script = [self.peer_python, HERE / "make_gguf.py", self.checkpoint, self.gguf]
            _run([*script, "--converter", self.peer_sources])


def _run(command: list[object]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)

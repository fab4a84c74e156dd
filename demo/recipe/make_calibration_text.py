"""Write the text that moe-run calibrate uses where none is given: prose, code of the project, chats and tool calls.

    python make_calibration_text.py PACK16 ../../runtime/calibration_text.txt.xz

The prose is sampled from a 16-bit pack of the demo model (temperature 1, nothing cut off), so that nobody's text is in
it; chats and tool calls come from the generator, in the demo model's own format; the code is a few files of moepack.
Sampling takes a few minutes. The same pack and machine write the same file.
"""

import argparse
import lzma
from collections.abc import Callable
from pathlib import Path
from random import Random

from conversations import plain_chat, tool_chat
from moepack.runtime import Engine, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
CODE = ("layout/geometry.py", "kernels/reference.py", "runtime/sampling.py")
PROSE, TOOLS, CHATS = 150_000, 60_000, 20_000  # characters
LONGEST_CHAT = 6_000
PASSAGE_TOKENS = 2040
END = "<|endoftext|>"


def sample_prose(pack: Path, characters: int) -> str:
    """Passages that the model invents, each from an end token on."""
    with Engine.open(pack, memory="2GiB", exact=True, threads=1) as engine:
        start, passages = engine.tokenizer.encode(END), []
        while sum(map(len, passages)) < characters:
            seed = len(passages)
            sampling = SamplingParams(temperature=1, seed=seed, max_tokens=PASSAGE_TOKENS, ignore_eos=True)
            passages.append(engine.tokenizer.decode(list(engine.generate(start, sampling))))
    return END.join(passages)


def write_chats(make: Callable, rng: Random, characters: int) -> list[str]:
    """Conversations in the model's format, of the training vocabulary with fresh values."""
    chats: list[str] = []
    while sum(map(len, chats)) < characters:
        chat = "".join(text for text, _ in make(rng, "train").segments())
        if len(chat) <= LONGEST_CHAT:
            chats.append(chat)
    return chats


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, help="16-bit pack of the demo model")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = Random(2026)
    chats = write_chats(tool_chat, rng, TOOLS) + write_chats(plain_chat, rng, CHATS)
    rng.shuffle(chats)
    code = END.join((ROOT / name).read_text(encoding="utf-8") for name in CODE)
    text = END.join([sample_prose(args.pack, PROSE), "".join(chats), code])
    args.out.write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    main()

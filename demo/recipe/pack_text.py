"""Shuffle the chapters and write them as 32 compressed parts, small enough to carry to the training machine.

    python pack_text.py text.jsonl PARTS

Each part is a bz2 file with a JSON list of chapters; the held-out books go to heldout.json as they are.
"""

import argparse
import bz2
import json
from multiprocessing import Pool
from pathlib import Path
from random import Random

PARTS = 32


def write_part(job: tuple[Path, list[str]]) -> None:
    """Write one compressed part."""
    path, chapters = job
    path.write_bytes(bz2.compress(json.dumps(chapters, ensure_ascii=False).encode()))


def main() -> None:
    """Split text.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="text.jsonl of corpus.py")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.text, encoding="utf-8") as file:
        chapters = [json.loads(line) for line in file]
    held_out = [(chapter["book"], chapter["text"]) for chapter in chapters if chapter["held_out"]]
    (args.out / "heldout.json").write_text(json.dumps(held_out), encoding="utf-8")
    texts = [chapter["text"] for chapter in chapters if not chapter["held_out"]]
    Random(1).shuffle(texts)
    jobs = [(args.out / f"text{i:02d}.bz2", texts[i::PARTS]) for i in range(PARTS)]
    with Pool() as pool:
        pool.map(write_part, jobs, chunksize=1)


if __name__ == "__main__":
    main()

"""Tokenize the prose and write the conversations: rows of 2048 tokens, ready for training.

    python prep.py PARTS TOKENIZER ROWS [--scale 1.0]

Reads the parts that pack_text.py wrote and writes ROWS/{text,tool,chat}.npy and the same with `_val`, uint16
arrays of rows; the highest bit of an entry marks a token that is trained on (in conversations, what the
assistant writes). Prose is one long stream; a conversation never crosses a row. Validation prose is the
held-out books, validation conversations are of the `dev` split. --scale shrinks everything, for a second
stage or for a try.
"""

import argparse
import bz2
import json
import os
import time
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from chat_format import Segment
from config import CONTEXT_TOKENS as ROW_TOKENS
from config import TRAINED_BIT
from conversations import plain_chat, tool_chat

TOOL_JOBS, TOOL_CHATS = 128, 1250  # jobs, conversations per job
PLAIN_JOBS, PLAIN_CHATS = 64, 2500
VAL_TOOL_CHATS, VAL_PLAIN_CHATS = 400, 800


@dataclass(frozen=True)
class Job:
    """One piece of work: prose (documents or a file of them), or conversations from a seed."""

    kind: str  # text, tool, chat, or one of them with _val
    tokenizer: str
    source: str = ""  # bz2 file
    documents: tuple[str, ...] = ()
    seed: int = 0
    count: int = 0


def encode(tokenizer: Tokenizer, segments: list[Segment]) -> list[int]:
    """Return the tokens of a conversation, marked where trained on. Segments are tokenized one by one."""
    encodings = tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False)
    marks = [TRAINED_BIT if trained else 0 for _, trained in segments]
    return [token | mark for encoding, mark in zip(encodings, marks, strict=True) for token in encoding.ids]


def pack_conversations(conversations: list[list[int]], padding_id: int) -> np.ndarray:
    """Put conversations into rows; one that does not fit starts a row, one longer than a row is left out."""
    rows: list[list[int]] = [[]]
    for tokens in conversations:
        if len(tokens) > ROW_TOKENS:
            continue
        if len(rows[-1]) + len(tokens) > ROW_TOKENS:
            rows.append([])
        rows[-1] += tokens
    padded = [row + [padding_id] * (ROW_TOKENS - len(row)) for row in rows if row]
    return np.array(padded, dtype=np.uint16).reshape(-1, ROW_TOKENS)


def pack_prose(tokenizer: Tokenizer, documents: list[str], end_id: int) -> np.ndarray:
    """Join documents to one stream, an end token after each, and cut it into rows; the rest is dropped."""
    stream: list[int] = []
    for i in range(0, len(documents), 50):
        for encoding in tokenizer.encode_batch(documents[i : i + 50], add_special_tokens=False):
            stream += [token | TRAINED_BIT for token in encoding.ids] + [end_id | TRAINED_BIT]
    count = len(stream) // ROW_TOKENS
    return np.array(stream[: count * ROW_TOKENS], dtype=np.uint16).reshape(count, ROW_TOKENS)


def run_job(job: Job) -> tuple[str, np.ndarray]:
    """Return the rows of one job with its kind."""
    tokenizer = Tokenizer.from_file(job.tokenizer)
    end_id = tokenizer.token_to_id("<|endoftext|>")
    if job.kind.startswith("text"):
        documents = list(job.documents)
        if job.source:
            documents = json.loads(bz2.decompress(Path(job.source).read_bytes()))
        return job.kind, pack_prose(tokenizer, documents, end_id)
    rng, split = Random(job.seed), "dev" if job.kind.endswith("_val") else "train"
    make = tool_chat if job.kind.startswith("tool") else plain_chat
    conversations = [encode(tokenizer, make(rng, split).segments()) for _ in range(job.count)]
    return job.kind, pack_conversations(conversations, end_id)


def list_jobs(parts: Path, tokenizer: str, scale: float) -> list[Job]:
    """Return all jobs; a scale below 1 takes fewer parts of the prose and fewer conversations."""

    def scaled(count: int, factor: float) -> int:
        return max(1, int(count * factor))

    files = sorted(parts.glob("text*.bz2"))
    jobs = [Job("text", tokenizer, source=str(file)) for file in files[: scaled(len(files), min(1, scale))]]
    held_out = json.loads((parts / "heldout.json").read_text(encoding="utf-8"))
    jobs.append(Job("text_val", tokenizer, documents=tuple(text for _, text in held_out)))
    tool_count, plain_count = scaled(TOOL_CHATS, scale), scaled(PLAIN_CHATS, scale)
    jobs += [Job("tool", tokenizer, seed=1000 + i, count=tool_count) for i in range(TOOL_JOBS)]
    jobs += [Job("chat", tokenizer, seed=5000 + i, count=plain_count) for i in range(PLAIN_JOBS)]
    val_scale = min(1, 5 * scale)
    jobs.append(Job("tool_val", tokenizer, seed=99991, count=scaled(VAL_TOOL_CHATS, val_scale)))
    jobs.append(Job("chat_val", tokenizer, seed=99992, count=scaled(VAL_PLAIN_CHATS, val_scale)))
    return jobs


def main() -> None:
    """Run all jobs on all cores and write one array per kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, help="folder written by pack_text.py")
    parser.add_argument("tokenizer", help="tokenizer.json")
    parser.add_argument("rows", type=Path, help="folder to write")
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    start = time.time()
    args.rows.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below already use every core
    found: dict[str, list[np.ndarray]] = {}
    with Pool() as pool:
        for kind, rows in pool.imap(run_job, list_jobs(args.parts, args.tokenizer, args.scale)):
            found.setdefault(kind, []).append(rows)
    for kind, parts in found.items():
        rows = np.concatenate(parts)
        np.save(args.rows / f"{kind}.npy", rows)
        print(f"{kind}: {len(rows)} rows, {float((rows >> 15).mean()):.3f} of the tokens trained on")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

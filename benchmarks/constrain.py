"""What holding a tool call to its form costs a decoded token, with a vocabulary of the real models' size.

The tokenizer is made here: 248,320 rows, byte-level, its words grown by random merges, so that its merges are its own.
Timed is all that a constraint adds to a step: the mask, its use by the sampler, the grammar's and our own progress. The
share is of a decode step of --step-ms, by default 53 ms: 19 tok/s, what a model of 35B's sizes reaches on two cores.

    python benchmarks/constrain.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moepack.runtime.constrain import AnswerConstraint, Grammars
from moepack.runtime.sampling import Sampler, SamplingParams
from moepack.runtime.tokenizer import Tokenizer

ROWS, WORDS = 248320, 248044
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
COMMON = ["> Ċ", "< /", '" :', '" ,', "Ġ {", "} ,", "p a", "r a", "pa ra", "m e", "t e", "te r", "me ter", "para meter"]
TOOL = {
    "type": "function",
    "function": {
        "name": "place_order",
        "parameters": {
            "type": "object",
            "properties": {
                "note": {"type": "string"},
                "kind": {"type": "string", "enum": ["tea", "coffee", "water"]},
                "lines": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"id": {"type": "integer"}, "name": {"type": "string"}},
                        "required": ["id", "name"],
                    },
                },
            },
            "required": ["note", "lines"],
        },
    },
}
LINES = json.dumps([{"id": number, "name": f"some thing number {number}"} for number in range(8)])
NOTE = "please bring it to the second floor, and ring twice\n" * 6
CALL = f"""<tool_call>
<function=place_order>
<parameter=note>
{NOTE}
</parameter>
<parameter=kind>
tea
</parameter>
<parameter=lines>
{LINES}
</parameter>
</function>
</tool_call>"""


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of WORDS words, each one the merge of two earlier ones."""
    rng = random.Random(0)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = set(words)
    letters = [word for word in words if word.isascii() and word.isalpha()]
    parts = ["Ġ" + letter for letter in letters] + letters
    merges = []
    for left, right in [pair.split(" ") for pair in COMMON] + [["Ġ", letter] for letter in letters]:
        merges.append((left, right))
        words.append(left + right)
        known.add(left + right)
    while len(words) < WORDS:
        left, right = rng.choice(parts), rng.choice(letters if rng.random() < 0.7 else parts).lstrip("Ġ")
        if left + right not in known and right in known and len(left + right) < 16:
            known.add(left + right)
            words.append(left + right)
            merges.append((left, right))
            parts.append(left + right)
    backend = Backend(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, normalized=False, special="|" in text) for text in ADDED])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id("<|im_end|>")}))
    return Tokenizer.load(folder)


def time_call(grammars: Grammars, logits: Any) -> list[float]:
    """Milliseconds that each token of CALL costs under a constraint, beyond the same token without one."""
    constraint = AnswerConstraint(grammars, False, [TOOL], "required")
    held, free = Sampler(SamplingParams(temperature=0), []), Sampler(SamplingParams(temperature=0), [])
    costs = []
    for token_id in grammars.tokenizer.encode(CALL):
        started = time.perf_counter()
        allowed = constraint.list_allowed()
        held.next(logits, allowed)
        constraint.push(token_id)
        held_s = time.perf_counter() - started
        assert allowed is not None
        assert allowed[token_id], grammars.tokenizer.describe(token_id)
        started = time.perf_counter()
        free.next(logits)
        costs.append(1000 * (held_s - (time.perf_counter() - started)))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=53.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    started = time.perf_counter()
    grammars = Grammars(tokenizer, ROWS)
    loading_s = time.perf_counter() - started
    logits = np.random.default_rng(0).standard_normal(ROWS).astype(np.float32)
    rounds = [time_call(grammars, logits) for _ in range(1 + options.rounds)]
    first, rest = rounds[0], [cost for costs in rounds[1:] for cost in costs]
    mean, step = statistics.mean(rest), options.step_ms
    print(f"tokens of the call {len(first)}, loading {loading_s:.2f} s")
    print(
        f"first call, grammars compiled on the way: mean {statistics.mean(first):.3f} ms, largest {max(first):.2f} ms"
    )
    print(f"after: median {statistics.median(rest):.3f} ms, mean {mean:.3f} ms, largest {max(rest):.2f} ms")
    print(f"share of a step of {step:g} ms: {mean / step:.2%}, first call {statistics.mean(first) / step:.2%}")


if __name__ == "__main__":
    main()

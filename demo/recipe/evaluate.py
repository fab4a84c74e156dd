"""Score a checkpoint: prose, tool calls, MTP, routing, and what quantized experts lose.

    python make_tool_prompts.py --split dev --count 300 --seed 11 --familiar 0 tools.jsonl
    python evaluate.py CKPT ROWS tools.jsonl OUT [--generations 50]

Writes OUT/results.json and OUT/eval_log.txt. The checkpoint's own tokenizer is used. On a GPU the whole table
takes a few minutes; a CPU is for a few rows. The numbers are those of the training model (bfloat16 products
on a GPU), not of a pack.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import quant
from checkpoint import load_model
from scoring import (
    ToolPrompt,
    read_tool_prompts,
    routing_statistics,
    score_exact_calls,
    score_generated_calls,
    score_mtp,
    score_rows,
    token_ids,
)

SCORED_ROWS = {"text": None, "tool": 24, "chat": 16}  # None: all
CALIBRATION_ROWS = {"text": 24, "tool": 24, "chat": 16}
MTP_ROWS, ROUTING_ROWS, BATCH = 8, 6, 8
GENERATED = ("4bit g64 minmax", "2bit g64 minmax", "2bit g64 MSE", "2bit g64 GPTQ")


class Evaluation:
    """One run over a checkpoint; `results` grows and is written after each part."""

    def __init__(self, checkpoint: Path, rows: Path, tools: Path, out: Path, generations: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.out, self.generations = out, generations
        out.mkdir(parents=True, exist_ok=True)
        self.start = time.time()
        self.results: dict[str, Any] = {}
        self.model = load_model(checkpoint, self.device)
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        names = [kind + end for kind in SCORED_ROWS for end in ("", "_val")]
        arrays = {name: np.load(rows / f"{name}.npy").astype(np.int32) for name in names}
        self.rows = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        self.sets = {kind: self.rows[f"{kind}_val"][:count] for kind, count in SCORED_ROWS.items()}
        self.prompts: dict[str, list[ToolPrompt]] = {}
        for prompt in read_tool_prompts(tools, self.tokenizer):
            self.prompts.setdefault(prompt.vocabulary, []).append(prompt)

    def log(self, *words: object) -> None:
        """Print a line and keep it in eval_log.txt."""
        line = f"[{time.time() - self.start:6.1f} s] " + " ".join(map(str, words))
        print(line, flush=True)
        with open(self.out / "eval_log.txt", "a", encoding="utf-8") as file:
            print(line, file=file)

    def keep(self, key: str, value: Any) -> None:
        """Store a result and write all of them."""
        self.results[key] = value
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def score_variant(
        self, name: str, reference: dict[str, list[torch.Tensor]] | None
    ) -> dict[str, list[torch.Tensor]]:
        """Score the model as it is now; return its logits."""
        scores, logits = score_rows(self.model, self.sets, reference, BATCH)
        exact = {
            vocabulary: score_exact_calls(self.model, self.tokenizer, prompts, self.device)
            for vocabulary, prompts in self.prompts.items()
        }
        self.keep(name, {"sets": scores, "exact_calls": exact})
        self.log(name, scores, exact)
        if self.generations and (reference is None or name in GENERATED):
            self.generate(name)
        return logits

    def generate(self, name: str) -> None:
        """Let the model write tool calls and score them."""
        found = {}
        for vocabulary, prompts in self.prompts.items():
            found[vocabulary] = score_generated_calls(
                self.model, self.tokenizer, prompts[: self.generations], self.device
            )
            shares = {key: value for key, value in found[vocabulary].items() if key != "wrong"}
            self.log(name, "generated calls,", vocabulary, shares)
        self.keep(name, {**self.results[name], "generated_calls": found})

    def run(self) -> None:
        """Score the bfloat16 model, its MTP layer and its routing, then each variant of quantized experts."""
        reference = self.score_variant("bf16", None)
        mtp = {kind: score_mtp(self.model, rows[:MTP_ROWS], self.device) for kind, rows in self.sets.items()}
        self.keep("mtp", mtp)
        self.log("MTP", mtp)
        few_rows = {kind: rows[:ROUTING_ROWS] for kind, rows in self.sets.items()}
        routing = {kind: routing_statistics(self.model, rows) for kind, rows in few_rows.items()}
        self.keep("routing", routing)
        for kind, layers in routing.items():
            means = {key: round(float(np.mean([layer[key] for layer in layers])), 3) for key in layers[0]}
            self.log("routing", kind, means)
        calibration = torch.cat([self.rows[kind][:count] for kind, count in CALIBRATION_ROWS.items()])
        statistics = quant.calibrate(self.model, token_ids(calibration), BATCH)
        self.log("rare experts per layer:", [int((entry.rows < quant.RARE).sum()) for entry in statistics])
        originals = quant.take_experts(self.model)
        for name, variant in quant.VARIANTS.items():
            quant.apply_variant(self.model, originals, statistics, variant)
            self.score_variant(name, reference)


def main() -> None:
    """Evaluate one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("rows", type=Path, help="folder written by prep.py")
    parser.add_argument("tools", type=Path, help="tools file, see make_tool_prompts.py")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--generations", type=int, default=50, help="calls to write per vocabulary")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    Evaluation(args.checkpoint, args.rows, args.tools, args.out, args.generations).run()


if __name__ == "__main__":
    main()

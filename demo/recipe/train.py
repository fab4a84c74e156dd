"""Train the demo model on token rows and write it as a checkpoint. One GPU; a CPU for a try.

    python train.py --rows ROWS --out CKPT --seconds 562                         stage 1
    python train.py --rows ROWS2 --out CKPT2 --seconds 212 --init CKPT \\
                    --lr 7e-4 --hold 0.45 --mix 0.3,0.52,0.18                    stage 2
    python train.py --rows ROWS --out CKPT --cpu --steps 3 --batch 2             a try on a CPU

AdamW; the learning rate rises for 200 steps, holds, and falls to 0.5 % of itself. The loss is that of the
next token, plus 0.15 of the MTP layer's, plus 0.01 of the routers' balance loss; tokens of conversations
weigh twice those of prose. Prose seen too often is noticed: stage 1 goes back to an earlier step if the
held-out text had been predicted better there. The length is a time or a number of steps, so a faster machine
trains further; only a given number of steps repeats.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_model, save_model
from config import Config
from model import LanguageModel
from scoring import score_rows, token_ids, trained_mask

KINDS = ("text", "tool", "chat")
WEIGHTS = {"text": 1.0, "tool": 2.0, "chat": 2.0}  # of a trained token
VALIDATION_ROWS = {"text_val": 48, "tool_val": 24, "chat_val": 12}
MTP_WEIGHT, BALANCE_WEIGHT, MTP_BALANCE_SHARE = 0.15, 0.01, 0.2
WARMUP_STEPS, LAST_RATE_SHARE = 200, 0.005
LOG_STEPS, FINITE_STEPS, VALIDATION_STEPS = 200, 50, 1000
BEST_AFTER = 0.6  # progress from which on a step may be gone back to
WORSE_NLL = 0.002  # by which the end must be worse than the best step to go back


class RowMixture:
    """Draws batches from the three kinds of rows by their shares; a kind that runs out is shuffled again."""

    def __init__(self, rows: dict[str, Tensor], shares: dict[str, float]):
        self.rows, self.shares = rows, shares
        self.order = {kind: torch.randperm(len(rows[kind])) for kind in shares}
        self.position = dict.fromkeys(shares, 0)
        self.used = dict.fromkeys(shares, 0)
        self.generator = np.random.default_rng(0)

    def _take(self, kind: str, count: int) -> Tensor:
        parts = []
        while count:
            left = self.order[kind][self.position[kind] :]
            if not len(left):
                self.order[kind], self.position[kind] = torch.randperm(len(self.rows[kind])), 0
                continue
            chosen = left[:count]
            parts.append(self.rows[kind][chosen.to(self.rows[kind].device)])
            self.position[kind] += len(chosen)
            self.used[kind] += len(chosen)
            count -= len(chosen)
        return torch.cat(parts) if parts else self.rows[kind][:0]

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return rows [batch, T] and the weight of each row [batch, 1]."""
        kinds = list(self.shares)
        drawn = self.generator.choice(len(kinds), batch, p=list(self.shares.values()))
        counts = np.bincount(drawn, minlength=len(kinds))
        rows = torch.cat([self._take(kind, int(count)) for kind, count in zip(kinds, counts, strict=True)])
        weights = np.repeat([WEIGHTS[kind] for kind in kinds], counts)
        return rows, torch.tensor(weights, dtype=torch.float32, device=rows.device)[:, None]

    def epochs(self) -> dict[str, float]:
        """Return how often each kind has been seen."""
        return {kind: round(self.used[kind] / len(self.rows[kind]), 2) for kind in self.shares}


def _weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    flat = weights.flatten()
    return (losses * flat).sum() / flat.sum()


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, rows: Tensor, row_weights: Tensor, rate: float
) -> dict[str, Tensor]:
    """Make one step; return the losses of next token, MTP layer and routers, and the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    ids, weights = token_ids(rows), trained_mask(rows).float() * row_weights
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.is_cuda):
        hidden, balance = model.hidden(ids)
        next_loss = _weighted_loss(model.lm_head(hidden[:, :-1]), ids[:, 1:], weights[:, 1:])
        mtp_hidden, mtp_balance = model.mtp_hidden(hidden, ids)
        mtp_loss = _weighted_loss(model.lm_head(mtp_hidden[:, :-2]), ids[:, 2:], weights[:, 2:])
    balance_loss = balance + MTP_BALANCE_SHARE * mtp_balance
    (next_loss + MTP_WEIGHT * mtp_loss + BALANCE_WEIGHT * balance_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": next_loss.detach(),
        "mtp": mtp_loss.detach(),
        "balance": balance.detach(),
        "gradient": norm,
    }


def learning_rate(peak: float, step: int, progress: float, hold: float) -> float:
    """Return the rate of a step (from 0) at a progress from 0 to 1: up, flat until `hold`, straight down."""
    falling = 1.0 if progress < hold else max(LAST_RATE_SHARE, (1 - progress) / (1 - hold))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * falling


def make_optimizer(model: LanguageModel, rate: float, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices, but not on embeddings, convolutions and vectors."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "conv" not in name and "embed" not in name
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


class Training:
    """One run: the model, its rows, the log, and the loop."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.time()
        self.device = "cpu" if args.cpu else "cuda"
        args.out.mkdir(parents=True, exist_ok=True)
        names = [*KINDS, *VALIDATION_ROWS]
        arrays = {name: np.load(args.rows / f"{name}.npy").astype(np.int32) for name in names}
        rows = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        self.log("rows", {name: tuple(part.shape) for name, part in rows.items()})
        model = load_model(args.init, self.device) if args.init else LanguageModel(Config()).to(self.device)
        self.model = model.train()
        self.log("parameters", sum(parameter.numel() for parameter in self.model.parameters()))
        if not args.cpu:
            self.model.compile_layers()
        self.mixture = RowMixture({kind: rows[kind] for kind in KINDS}, args.mix)
        self.row_tokens = rows["text"].shape[1]
        self.validation_sets = {name: rows[name][:count] for name, count in VALIDATION_ROWS.items()}
        self.optimizer = make_optimizer(self.model, args.lr, fused=not args.cpu)

    def log(self, *words: object) -> None:
        """Print a line and keep it in train_log.txt."""
        line = f"[{time.time() - self.start:6.1f} s] " + " ".join(map(str, words))
        print(line, flush=True)
        with open(self.args.out / "train_log.txt", "a", encoding="utf-8") as file:
            print(line, file=file)

    def validate(self) -> dict[str, float]:
        """Return the loss per trained token of each validation set."""
        self.model.eval()
        scores, _ = score_rows(self.model, self.validation_sets, batch=8)
        self.model.train()
        return {name: round(score["nll"], 4) for name, score in scores.items()}

    def progress(self, step: int) -> float:
        """Return the share of the run that is done before this step."""
        if self.args.steps:
            return step / self.args.steps
        return (time.time() - self.start) / self.args.seconds

    def run(self) -> int:
        """Train to the end; return the number of steps. A loss that is not finite raises ArithmeticError."""
        args, step, best, timed_from = self.args, 0, None, 0.0
        while (progress := self.progress(step)) < 1:
            if step == 5:  # the first steps compile
                timed_from = time.time()
            rate = learning_rate(args.lr, step, progress, args.hold)
            losses = train_step(self.model, self.optimizer, *self.mixture.draw(args.batch), rate)
            step += 1
            if step % FINITE_STEPS == 0 and not math.isfinite(float(losses["loss"])):
                raise ArithmeticError(f"the loss of step {step} is {float(losses['loss'])}: lower --lr")
            if step % LOG_STEPS == 0 or step == args.steps:
                tokens = (step - 5) * args.batch * self.row_tokens
                speed = tokens / (time.time() - timed_from) if timed_from else 0
                shown = " ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
                line = f"step {step} {shown} rate {rate:.2e} tok/s {speed:.0f} epochs"
                self.log(line, self.mixture.epochs())
            if step % VALIDATION_STEPS == 0 and not args.init:
                nll = self.validate()
                self.log("validation", nll)
                if progress > BEST_AFTER and (best is None or nll["text_val"] < best[0]):
                    state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
                    best = nll["text_val"], step, state
        if not args.init:
            nll = self.validate()
            self.log("validation at the end", nll)
            if best and best[0] < nll["text_val"] - WORSE_NLL:
                self.log("back to step", best[1])
                self.model.load_state_dict(best[2])
        return step


def _shares(text: str) -> dict[str, float]:
    shares = [float(part) for part in text.split(",")]
    if len(shares) != len(KINDS) or abs(sum(shares) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"expected shares of {', '.join(KINDS)} with sum 1, got {text}")
    return dict(zip(KINDS, shares, strict=True))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder written by prep.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from (stage 2)")
    parser.add_argument("--seconds", type=float, default=540, help="length of the training")
    parser.add_argument("--steps", type=int, default=0, help="length in steps, in place of --seconds")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--hold", type=float, default=0.35, help="progress at which the rate begins to fall")
    parser.add_argument("--mix", type=_shares, default="0.46,0.37,0.17", help="shares of text, tool, chat")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU: slow, for a try")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    training = Training(args)
    steps = training.run()
    tokens = steps * args.batch * training.row_tokens
    summary = {"steps": steps, "tokens": tokens, "epochs": training.mixture.epochs()}
    training.log(summary)
    training.log("shards", save_model(training.model, args.out))
    (args.out / "train.json").write_text(json.dumps(summary), encoding="utf-8")


if __name__ == "__main__":
    main()

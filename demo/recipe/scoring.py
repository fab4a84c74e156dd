"""Scores of a model: perplexity and KL, tool calls word for word, generation, routing statistics.

Rows are those of prep.py: token ids with a mark on the tokens that count. A tool prompt counts as exact when
the model's greedy answer is the expected call, token for token; this is checked in one pass over prompt and
answer. `generate` runs the whole prefix again for each token, which is slow and has no state to get wrong.

    scores, logits = score_rows(model, {"text": rows})
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from chat_format import Call, call_text, chat_template, value_text
from config import ID_MASK, TRAINED_BIT
from model import CHUNK, LanguageModel, Routing


def token_ids(rows: Tensor) -> Tensor:
    """Return the ids of rows as int64."""
    return (rows & ID_MASK).long()


def trained_mask(rows: Tensor) -> Tensor:
    """Return True where a row's token is trained on."""
    return (rows & TRAINED_BIT) != 0


@torch.no_grad()
def score_rows(
    model: LanguageModel,
    sets: dict[str, Tensor],
    reference: dict[str, list[Tensor]] | None = None,
    batch: int = 16,
) -> tuple[dict[str, dict[str, float]], dict[str, list[Tensor]]]:
    """Return nll, ppl and, given reference logits, kl of each set; and the logits [batch, T-1, V]."""
    scores, kept = {}, {}
    for name, rows in sets.items():
        nll = kl = count = 0.0
        kept[name] = []
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            ids, counted = token_ids(part), trained_mask(part[:, 1:])
            logits = model(ids)[:, :-1]
            log_p = logits.float().log_softmax(-1)
            nll -= log_p.gather(-1, ids[:, 1:, None])[..., 0][counted].sum().item()
            count += counted.sum().item()
            if reference is not None:
                log_r = reference[name][i // batch].float().log_softmax(-1)
                kl += (log_r.exp() * (log_r - log_p)).sum(-1)[counted].sum().item()
            kept[name].append(logits.to(torch.bfloat16))
        nll /= max(count, 1)
        scores[name] = {"ppl": math.exp(nll), "nll": nll}
        if reference is not None:
            scores[name]["kl"] = kl / max(count, 1)
    return scores, kept


# --- tool calls ---


@dataclass(frozen=True)
class ToolPrompt:
    """A prompt in tokens with the calls that answer it, arguments as texts."""

    vocabulary: str  # seen or unseen
    prompt_ids: list[int]
    calls: list[Call]

    @property
    def answer(self) -> str:
        """The expected reply, to the end of the message."""
        return "\n".join(call_text(*call) for call in self.calls) + "<|im_end|>"


def read_tool_prompts(path: Path, tokenizer: Tokenizer) -> list[ToolPrompt]:
    """Read a tools file (make_tool_prompts.py) and render its prompts, thinking off."""
    template, prompts = chat_template(), []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = template.render(
            messages=record["messages"],
            tools=record["tools"],
            add_generation_prompt=True,
            enable_thinking=False,
        )
        calls = []
        for function in (call["function"] for call in record["expected_calls"]):
            arguments = json.loads(function["arguments"])
            calls.append((function["name"], {key: value_text(value) for key, value in arguments.items()}))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        prompts.append(ToolPrompt(record["vocabulary"], ids, calls))
    return prompts


def _round_up(n: int) -> int:
    return -(-n // CHUNK) * CHUNK


@torch.no_grad()
def score_exact_calls(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[ToolPrompt], device: str, batch: int = 50
) -> dict[str, float]:
    """Return the share of prompts answered exactly, and of answer tokens predicted, by greedy choice."""
    exact = right = total = 0
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = [tokenizer.encode(prompt.answer, add_special_tokens=False).ids for prompt in part]
        both = [prompt.prompt_ids + answer for prompt, answer in zip(part, answers, strict=True)]
        ids = torch.zeros(len(part), _round_up(max(map(len, both))), dtype=torch.long)
        for row, sequence in zip(ids, both, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        greedy = model(ids.to(device)).argmax(-1).cpu()
        for row, choice, prompt, answer in zip(ids, greedy, part, answers, strict=True):
            first = len(prompt.prompt_ids)
            same = choice[first - 1 : first - 1 + len(answer)] == row[first : first + len(answer)]
            exact, right, total = exact + bool(same.all()), right + int(same.sum()), total + len(answer)
    return {"exact": exact / max(len(prompts), 1), "token_accuracy": right / max(total, 1)}


@torch.no_grad()
def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], device: str, new_tokens: int, stop_id: int
) -> list[list[int]]:
    """Return greedy continuations of up to `new_tokens` tokens, each ended by the stop token if it came."""
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), _round_up(max(lengths) + new_tokens), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids, ends = ids.to(device), torch.tensor(lengths, device=device)
    running, rows = (
        torch.ones(len(prompts), dtype=torch.bool, device=device),
        torch.arange(len(prompts), device=device),
    )
    for _ in range(new_tokens):
        prefix = ids[:, : _round_up(int(ends.max()))]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model.lm_head(model.hidden(prefix)[0][rows, ends - 1])
        following = logits.float().argmax(-1)
        ids[rows[running], ends[running]] = following[running]
        ends = ends + running.long()
        running = running & (following != stop_id)
        if not running.any():
            break
    return [row[length:end].tolist() for row, length, end in zip(ids, lengths, ends.tolist(), strict=True)]


_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.S)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.S)
_FUNCTION = re.compile(rf"<function=([^>\n]+)>\n((?:{_PARAMETER.pattern})*)</function>", re.S)


def parse_calls(text: str) -> list[Call] | None:
    """Return the calls in an answer, or None if there is none or one is malformed."""
    calls = []
    for block in _CALL.findall(text):
        match = _FUNCTION.fullmatch(block)
        if not match:
            return None
        calls.append((match[1], dict(_PARAMETER.findall(match[2]))))
    return calls or None


def score_generated_calls(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[ToolPrompt],
    device: str,
    new_tokens: int = 160,
) -> dict[str, Any]:
    """Generate answers; return the shares that are well formed, call the right functions, and are right."""
    stop_id = tokenizer.token_to_id("<|im_end|>")
    answers = generate(model, [prompt.prompt_ids for prompt in prompts], device, new_tokens, stop_id)
    well_formed = right_function = correct = 0
    wrong = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=False)
        calls = parse_calls(text)
        well_formed += calls is not None
        right_function += [name for name, _ in calls or []] == [name for name, _ in prompt.calls]
        correct += calls == prompt.calls
        if calls != prompt.calls:
            wrong.append({"expected": prompt.calls, "answer": text})
    n = len(prompts)
    shares = {"well_formed": well_formed / n, "right_functions": right_function / n, "correct": correct / n}
    return {"n": n, **shares, "wrong": wrong[:6]}


# --- MTP and routing ---


@torch.no_grad()
def score_mtp(model: LanguageModel, rows: Tensor, device: str) -> dict[str, float]:
    """Return the accuracy of the next token, that of the MTP layer for the same, and their agreement."""
    ids, counted = token_ids(rows), trained_mask(rows[:, 2:])
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        hidden, _ = model.hidden(ids)
        main = model.lm_head(hidden).argmax(-1)[:, 1:-1]  # both predict tokens 2 to T-1
        mtp = model.lm_head(model.mtp_hidden(hidden, ids)[0]).argmax(-1)[:, :-2]
    target = ids[:, 2:]
    pairs = {"next": main == target, "mtp": mtp == target, "agree": mtp == main}
    return {name: same[counted].float().mean().item() for name, same in pairs.items()}


def lru_hit_rate(choices: Iterable[Sequence[int]], capacity: int) -> float:
    """Return the share of single experts found in a least-recently-used cache of `capacity` experts."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for experts in choices:
        for expert in experts:
            total += 1
            if expert in cache:
                hits += 1
                cache.move_to_end(expert)
            else:
                cache[expert] = None
                if len(cache) > capacity:
                    cache.popitem(last=False)
    return hits / total


@torch.no_grad()
def routing_statistics(model: LanguageModel, rows: Tensor) -> list[dict[str, float]]:
    """Return per layer how the router spreads its choices and how well they would cache."""
    seen: list[list[Routing]] = [[] for _ in model.layers]
    for layer, passes in zip(model.layers, seen, strict=True):
        layer.mlp.recorder = passes.append
    for row in token_ids(rows):
        model(row[None])
    for layer in model.layers:
        layer.mlp.recorder = None
    return [_layer_statistics(passes, model.config.num_experts) for passes in seen]


def _layer_statistics(passes: list[Routing], num_experts: int) -> dict[str, float]:
    """Statistics of one layer; each pass is one sequence, in the order of its tokens."""
    sequences = [routing.ids.cpu().numpy() for routing in passes]  # [T, K] each
    choices = np.concatenate(sequences)
    load = np.bincount(choices.ravel(), minlength=num_experts) / choices.size
    used, by_load = load[load > 0], np.sort(load)[::-1]
    kept = [
        len(set(now) & set(before)) / choices.shape[1]
        for sequence in sequences
        for before, now in zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True)
    ]
    quarter, half = num_experts // 4, num_experts // 2
    top = torch.cat([routing.weights.float().max(-1).values.cpu() for routing in passes])
    return {
        "entropy": float(-(used * np.log(used)).sum() / math.log(num_experts)),
        "reuse": float(np.mean(kept)),
        "lru25": lru_hit_rate(choices.tolist(), quarter),
        "lru50": lru_hit_rate(choices.tolist(), half),
        "pin25": float(by_load[:quarter].sum()),
        "pin50": float(by_load[:half].sum()),
        "top1": float(top.mean()),
        "max_load": float(load.max() * num_experts),
        "unused": int((load == 0).sum()),
    }

"""lm-evaluation-harness drives a pack: its model type `moepack`.

Needs the extra `lm-eval`. Tokens, windows and stop strings are handled as the harness does for transformers, so that at
16 bits its scores are transformers' own, but for the order of float32's sums. Requests are answered one after another:
the harness's batch size changes nothing. Choices of one token behind the same context share its computation.

    moe-run lm-eval run --model moepack --model_args pretrained=PACK,memory=8GiB --tasks arc_easy
    lm_eval.simple_evaluate(model=PackLM("PACK", memory="8GiB"), tasks=["arc_easy"])      # the same from Python
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from moepack.layout.errors import UsageError
from moepack.runtime.chat import TEMPLATE_NAME, Message
from moepack.runtime.engine import Engine, describe_changes, hash_manifest
from moepack.runtime.evaluate import check_scores
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.tokenizer import read_json_object, token_text

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    missing = (error.name or "lm_eval").partition(".")[0]
    raise UsageError(f"{missing} is not installed: pip install 'moepack[lm-eval]'") from None

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")  # of a task's generation_kwargs
ARGUMENTS = (  # of --model_args
    "pretrained",
    "memory",
    "threads",
    "exact",
    "experts_per_token",
    "max_length",
    "max_gen_toks",
    "enable_thinking",
)
REPORT_SECONDS = 30
HARNESS_DEVICE = "cuda:0"  # what its command line passes where the user says nothing
LOG = logging.getLogger("lm_eval.moepack")  # below the harness's own, which shows it
Pair = tuple[Any, list[int], list[int]]  # what the request was, tokens of its context, tokens to score
T = TypeVar("T")


def run(arguments: Sequence[str]) -> None:
    """The harness's own command line, with packs as a model type."""
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


@register_model("moepack")
class PackLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A pack as the harness sees a model.

    pretrained        directory of the pack
    max_length        tokens of the longest context; default: the model's, at most 16384
    max_gen_toks      longest answer where a task does not say
    enable_thinking   for the chat template; default: the template's choice
    device            auto, cpu, metal or cuda; the harness's own default, cuda:0, is auto
    batch_size, max_batch_size   the harness passes them: not used
    others            those of Engine.open

    Raises UsageError, for arguments of other names and kinds as well, and what Engine.open raises.
    """

    def __init__(
        self,
        pretrained: str = "",
        memory: str | int | None = None,
        device: str = "auto",
        exact: bool = False,
        threads: int | None = None,
        experts_per_token: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        numbers = {"threads": threads, "experts_per_token": experts_per_token, "max_length": max_length}
        _check_arguments(pretrained, memory, {**numbers, "max_gen_toks": max_gen_toks}, unknown)
        self.engine = Engine.open(
            pretrained,
            memory=memory,
            device="auto" if device == HARNESS_DEVICE else device,
            exact=exact,
            threads=threads,
            experts_per_token=experts_per_token,
            max_context=max_length,
        )
        if changes := describe_changes(self.engine.pack, self.engine.architecture.num_experts_per_tok):
            LOG.warning(changes)
        self.max_length, self.max_gen_toks = self.engine.max_context, max_gen_toks
        self._template = self.engine.chat_template()
        self._thinking: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._end, self._prefix = self._read_special_tokens(Path(pretrained))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that begins with nothing: the beginning token, or the end token without one."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps rendered prompts under: other packs may have other tokenizers."""
        return f"{self.engine.pack.directory.resolve().name}-{hash_manifest(self.engine.pack)[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the pack's template, which goes into the harness's report."""
        path = self.engine.pack.directory / TEMPLATE_NAME
        return path.read_text(encoding="utf-8") if chat_template and path.exists() else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without a generation prompt it ends with the last message's own text.

        Raises UsageError if the pack has no template.
        """
        if self._template is None:
            raise UsageError(f"{self.engine.pack.directory}: has no chat template: leave --apply_chat_template out")
        text = self._template.render(chat_history, add_generation_prompt=add_generation_prompt, **self._thinking)
        if add_generation_prompt:
            return text
        last = str(chat_history[-1]["content"]).rstrip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Models of this family put nothing before a text."""
        return self.engine.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context of which each token is in one."""
        results = []
        for (text,) in _report([request.args for request in requests], "rolling log-likelihoods"):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs, is_reported=False))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, is_reported: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether greedy decoding says it. What is too long loses its
        beginning, as with the harness's own models."""
        together: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            count = len(context) + len(continuation)
            if count > self.max_length + 1:
                LOG.warning(f"{count} tokens, the context holds {self.max_length}: the first are cut off")
            token_ids = (*context, *continuation)[-(self.max_length + 1) :][:-1]
            together.setdefault((token_ids, min(len(continuation), len(token_ids))), []).append(place)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        items = together.items()
        for (token_ids, count), places in _report(items, "log-likelihoods") if is_reported else items:
            targets = torch.tensor([requests[place][2][-count:] for place in places])
            for place, result in zip(places, self._score(token_ids, targets)):
                results[place] = result
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], result)
        return results

    def _score(self, token_ids: Sequence[int], targets: torch.Tensor) -> list[tuple[float, bool]]:
        """Of each of several continuations [R, n] that differ in their last token alone: the sum of its
        log-probabilities, and whether each of its tokens is the likeliest. token_ids: all but the last token.

        Raises MoepackError for scores that are not finite.
        """
        totals, is_greedy = torch.zeros(len(targets), dtype=torch.float64), torch.ones(len(targets), dtype=torch.bool)
        done, count = 0, targets.shape[1]
        for piece in self.engine.iter_logits(token_ids, first=len(token_ids) - count):
            scores = piece.cpu()
            check_scores(scores, self.engine)
            wanted = targets[:, done : done + len(scores)].T  # [t, R]
            done += len(scores)
            totals += scores.log_softmax(-1).gather(1, wanted).double().sum(0)
            is_greedy &= (scores.argmax(-1, keepdim=True) == wanted).all(0)
        return list(zip(totals.tolist(), is_greedy.tolist()))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of a task's stop strings, an end token, or the longest length.

        Raises UsageError for a way to generate that there is none of here.
        """
        results = []
        for request in _report(requests, "answers"):
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            stops = handle_stop_sequences(options.pop("until", None), eos=None)
            most = options.pop("max_gen_toks")
            text = self._generate(context, stops, most, self._read_sampling(options, most))
            self.cache_hook.add_partial("generate_until", request.args, text)
            results.append(text)
        return results

    def _generate(self, context: str, stops: list[str], most: int, sampling: SamplingParams) -> str:
        token_ids, room = self.tok_encode(context), self.max_length - most
        if room < 1:
            raise UsageError(f"answers of {most} tokens: the context holds {self.max_length}: give less max_gen_toks")
        if len(token_ids) > room:
            LOG.warning(f"a prompt of {len(token_ids)} tokens, there is room for {room}: the first are cut off")
        stream, text = self.engine.tokenizer.decoder(), ""
        for token_id in self.engine.generate(token_ids[-room:], sampling):
            text += stream.push(token_id)
            if any(stop and stop in text for stop in stops):
                break
        else:
            text += stream.finish()
        return str(postprocess_generated_text(text, stops, None))

    def _read_sampling(self, options: dict[str, Any], most: int) -> SamplingParams:
        is_sampled = options.pop("do_sample", False)
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise UsageError(
                f"generation_kwargs: {unknown[0]}: expected one of {', '.join(SAMPLING)}, until, do_sample"
            )
        if is_sampled:
            options = {"temperature": 1.0, **options}
        else:  # greedy: of the others only the penalty changes the answer
            options = {"temperature": 0.0, "repetition_penalty": options.get("repetition_penalty", 1.0)}
        return SamplingParams(**options, max_tokens=most)

    def _read_special_tokens(self, directory: Path) -> tuple[int, int]:
        """End and prefix token, as tokenizer_config.json names them. Raises UsageError if it names no end token."""
        config = read_json_object(directory / "tokenizer_config.json") or {}
        names = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token")}
        ids = {key: None if name is None else self.engine.tokenizer.find(name) for key, name in names.items()}
        end = ids["eos_token"]
        if end is None:
            raise UsageError(f"{directory / 'tokenizer_config.json'}: names no eos_token: copy it from the checkpoint")
        return end, end if ids["bos_token"] is None else ids["bos_token"]


def _check_arguments(
    pretrained: str, memory: str | int | None, numbers: dict[str, int | None], unknown: dict[str, Any]
) -> None:
    """Raise UsageError for what --model_args cannot have: the harness makes numbers of what looks like one."""
    if unknown:
        known = ", ".join(ARGUMENTS)
        raise UsageError(f"--model_args {next(iter(unknown))}: expected one of {known}")
    if not pretrained:
        raise UsageError("--model_args: names no pack: give pretrained=PACK")
    if not isinstance(memory, (str, int, type(None))):
        raise UsageError(f"--model_args memory={memory}: expected a size, as in 8GiB")
    for name, value in numbers.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"--model_args {name}={value}: expected a number from 1 on")


def _report(items: Iterable[T], title: str) -> Iterator[T]:
    """The items, with a line on how many are done now and then."""
    listed = list(items)
    reported = time.monotonic()
    for done, item in enumerate(listed):
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            LOG.info(f"{title}: {done:,} of {len(listed):,}")
        yield item

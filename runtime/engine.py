"""An opened pack, ready to compute: the model with its weights, the expert store, the tokenizer.

One thread at a time; several sequences may take turns, or steps together, each with a state of its own. The arithmetic
does not depend on the memory budget, so a small budget gives the same logits bit for bit as everything in memory.

    engine = Engine.open("model.moepack", memory="8GiB")
    for token_id in engine.generate(engine.tokenizer.encode("Hello"), SamplingParams(temperature=0, max_tokens=20)):
        ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from moepack.kernels.backend import choose_backend, describe_arithmetic, describe_backend
from moepack.kernels.reference import DELTA_CHUNK
from moepack.layout.architecture import Architecture
from moepack.layout.errors import DamagedPack, MemoryBudgetError, UsageError
from moepack.layout.eviction import POLICIES, LeastRecentlyUsed
from moepack.layout.machine import ReadSettings, load_settings, settings_path
from moepack.layout.reader import Pack
from moepack.layout.sizes import parse_size
from moepack.layout.spec import MANIFEST_NAME
from moepack.runtime.chat import ChatTemplate
from moepack.runtime.expert_io import ReadOptions
from moepack.runtime.expert_store import ExpertStore
from moepack.runtime.generate import Constraint, Generation
from moepack.runtime.memory import MemoryPlan, default_budget_bytes, is_rounded, logit_rows, plan_memory, taken_bytes
from moepack.runtime.qwen35 import Qwen35, part_sizes
from moepack.runtime.resident import ResidentWeights
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.snapshots import Snapshots
from moepack.runtime.state import FLOAT_BYTES, SequenceState
from moepack.runtime.tokenizer import Tokenizer

DEFAULT_CONTEXT = 16384  # positions planned for where the caller does not say, if the model has as many
DEFAULT_SETTINGS = "default (moe-inspect plan finds those of this machine)"
MOST_THREADS = 256  # far above any gain; thousands exhaust the system
GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(eq=False, repr=False)
class Engine:
    """A model ready to run. Make one with Engine.open.

    memory_plan   how the budget was split
    max_context   positions (prompt and answer) that fit the plan
    read_settings where the way of reading comes from
    settings_note why the settings beside the pack are not used; None if they are, or there are none
    snapshots     states of prompts already read
    """

    pack: Pack
    architecture: Architecture
    model: Qwen35
    store: ExpertStore
    tokenizer: Tokenizer
    memory_plan: MemoryPlan
    max_context: int
    device: str
    weights_locked: bool
    snapshots: Snapshots
    read_settings: str
    settings_note: str | None

    @classmethod
    def open(
        cls,
        pack: str | Path,
        *,
        memory: str | int | None = None,
        device: str = "auto",
        exact: bool = False,
        threads: int | None = None,
        experts_per_token: int | None = None,
        max_context: int | None = None,
        process_bytes: int | None = None,
        tokenizer: Tokenizer | None = None,
        verify_reads: bool = False,
        prefetch: bool | None = None,
        policy: str = LeastRecentlyUsed.name,
        sequences: int = 1,
        snapshot_bytes: int | None = 0,
        snapshot_directory: Path | None = None,
    ) -> Engine:
        """Open a pack and load its resident weights.

        memory              budget of the whole process, as "8GiB" or bytes; default: what the machine can give. With
                            a GPU that has memory of its own the budget is of that
        device              auto or one of kernels/backend.py; reference (plain torch) is slow, its scratch unplanned
        exact               float32 arithmetic; otherwise activations meet quantized weights as int8
        threads             threads of the arithmetic, for the whole process; default: one per core
        experts_per_token   run that many of the experts a token is routed to, instead of the model's number
        max_context         positions to plan memory for; default: the model's, at most 16384
        process_bytes       memory that the process takes beside this engine; measured if not given
        tokenizer           the pack's tokenizer, if the caller has loaded it already
        verify_reads        compare every block that is read with its checksum
        prefetch            read the experts that the next layer's router would pick now, while the disk is idle;
                            default: what `moe-inspect plan` found, else yes, where not all experts fit in memory;
                            with a prompt that needs all of them, wherever they are not there yet
        policy              which expert makes room for another: a name of layout/eviction.py
        sequences           answers that are generated at the same time, each with a state of max_context
        snapshot_bytes      of the budget, for states of prompts already read: see snapshots.py; None: a tenth of it
        snapshot_directory  where such states outlive the process; None keeps none on disk

        Raises DamagedPack, UnsupportedVersion, UsageError, or MemoryBudgetError with the numbers.
        """
        ops, device = choose_backend(device, exact, choose_threads(threads))
        with contextlib.ExitStack() as undo:
            opened = undo.enter_context(Pack.open(pack))
            architecture = read_architecture(opened, experts_per_token)
            tokenizer = tokenizer or Tokenizer.load(opened.directory)
            context = _choose_context(architecture, max_context)
            budget = parse_size(memory) if isinstance(memory, str) else memory
            budget = default_budget_bytes(device) if budget is None else budget
            process_bytes = taken_bytes(device) if process_bytes is None else process_bytes
            cache_dtype = _choose_cache_dtype(opened, ops)
            kept = (snapshot_bytes, sequences, cache_dtype)
            plan = plan_memory(opened, architecture, budget, context, process_bytes, *kept, ops.batch)
            if plan.batch != ops.batch:  # of a GPU, where memory is short
                ops.batch = plan.batch
            settings, settings_note = load_settings(opened.directory)
            store = _open_store(opened, plan.num_slots, settings, policy, verify_reads, ops)
            undo.callback(store.close)
            weights = ResidentWeights.load(opened, architecture, ops)
            if ops.settles and store.holds_everything:
                store.load_all()
            reads_ahead = prefetch if prefetch is not None else settings is None or settings.prefetch
            guesses = bool(prefetch) or (reads_ahead and not store.holds_everything)
            model = Qwen35(architecture, weights, store, ops, guesses, reads_ahead, sequences)
            arithmetic = f"{describe_arithmetic(ops)} {cache_dtype}"
            identity = f"{hash_manifest(opened)} {arithmetic} {architecture.num_experts_per_tok}".encode()
            snapshots = Snapshots(plan.snapshot_bytes, identity, tokenizer.stop_token_ids, snapshot_directory)
            undo.pop_all()
            return cls(
                pack=opened,
                architecture=architecture,
                model=model,
                store=store,
                tokenizer=tokenizer,
                memory_plan=plan,
                max_context=context,
                device=device,
                weights_locked=weights.is_locked,
                snapshots=snapshots,
                read_settings=f"of {settings_path(opened.directory)}" if settings else DEFAULT_SETTINGS,
                settings_note=settings_note,
            )

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Scores after every position: float32 [T, vocab_size], unmasked (rows beyond the tokenizer too).

        Raises UsageError for a bad prompt and MemoryBudgetError if the result itself does not fit the budget.
        """
        self.check_prompt(token_ids)
        plan, result_bytes = self.memory_plan, FLOAT_BYTES * len(token_ids) * self.architecture.vocab_size
        if plan.total_bytes + result_bytes > plan.budget_bytes:
            raise MemoryBudgetError(
                f"logits of {len(token_ids)} positions take {result_bytes:,} bytes beside the {plan.total_bytes:,} "
                f"planned: more than the budget of {plan.budget_bytes:,}; use fewer tokens, or iter_logits"
            )
        result = torch.empty(len(token_ids), self.architecture.vocab_size)
        done = 0
        for piece in self.iter_logits(token_ids):
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result

    @torch.inference_mode()  # as a decorator it holds while a piece is computed, not in between
    def iter_logits(self, token_ids: Sequence[int], first: int = 0) -> Iterator[torch.Tensor]:
        """The same scores in pieces of a few positions, so that they fit any budget; from position `first` on."""
        self.check_prompt(token_ids)
        state, done = self.new_state(len(token_ids)), 0
        for hidden in self.prefill(token_ids, state):
            wanted = hidden[max(0, first - done) :]
            done += len(hidden)
            for rows in wanted.split(logit_rows(self.architecture)) if len(wanted) else ():
                yield self.model.logits(rows)

    def prefill(
        self,
        token_ids: Sequence[int],
        state: SequenceState,
        on_progress: Callable[[float], object] = lambda tokens: None,
        cuts: Sequence[int] = (),
    ) -> Iterator[torch.Tensor]:
        """Run a prompt chunk by chunk; yields the hidden states [T, D] of each chunk.

        on_progress   called after every layer with the prompt tokens done since the last call, in parts of one
        cuts          positions, multiples of DeltaNet's chunk, at which a chunk ends in any case

        Where the chunks are cut does not change what a token computes: they end at multiples of DeltaNet's own chunk.
        """
        sizes = part_sizes(len(token_ids), self.memory_plan.prefill_chunk, cuts)
        for chunk in torch.tensor(token_ids, dtype=torch.int64).split(sizes):
            part = len(chunk) / self.architecture.num_hidden_layers
            yield self.model(chunk, state, functools.partial(on_progress, part))

    @torch.inference_mode()
    def read_ahead(self, token_ids: Sequence[int], on_progress: Callable[[float], object] = lambda tokens: None) -> int:
        """Read what a prompt to come is expected to begin with, so that it goes on from there: snapshots.py.

        Returns how many of the tokens that spares it. on_progress is prefill's; what it raises ends the reading.
        """
        end = 0 if self.snapshots.is_off else len(token_ids) // DELTA_CHUNK * DELTA_CHUNK
        if not end:
            return 0
        self.check_prompt(token_ids)
        state = self.new_state(end)
        done = self.snapshots.restore(token_ids, state)
        if done < end:
            for _ in self.prefill(token_ids[done:end], state, on_progress):
                pass
            self.snapshots.keep(token_ids[:end], state)
            self.snapshots.flush()
        return end

    def new_state(self, max_positions: int) -> SequenceState:
        """State of a new sequence of at most max_positions tokens; within the plan up to max_context."""
        ops = self.model.ops
        return SequenceState(self.architecture, max_positions, ops.zeros, _choose_cache_dtype(self.pack, ops))

    def generate(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        on_prefill: Callable[[float], object] = lambda tokens: None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Continue a prompt: an iterator of token ids, the end token included.

        sampling     default: the model's own generation_config
        on_prefill   called with the prompt tokens done since the last call, several times before the first token;
                     what it raises ends the generation
        constraint   says before each token which ones may come

        Raises UsageError for a bad prompt, at once; DamagedPack while iterating if an expert cannot be read.
        """
        self.check_prompt(token_ids)
        return Generation(self, token_ids, sampling or self.default_sampling(), on_prefill, constraint)

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        """The sampling that the model's makers suggest, with the given values in place of theirs."""
        return read_sampling(self.pack, **overrides)

    def chat_template(self) -> ChatTemplate | None:
        """The pack's chat template, None if it has none."""
        return ChatTemplate.load(self.pack.directory)

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Raise UsageError if a prompt is empty, too long, or holds what this model does not have."""
        check_prompt(token_ids, self.architecture, self.tokenizer, self.max_context)

    def describe(self) -> dict[str, str]:
        """What was chosen for this machine, for people: how it computes and how it reads."""
        experts = self.store.describe()
        size = "huge" if experts["huge_pages"] else "plain"
        told = ", the system told of the next" if experts["advises"] else ""
        return {
            "arithmetic": describe_backend(self.model.ops),
            "expert reads": f"{experts['method']}, {experts['queue_depth']} at a time{told}, into {size} pages",
            "read settings": self.read_settings,
            "expert eviction": str(experts["policy"]),
            "resident weights": "locked in memory" if self.weights_locked else "not locked in memory (ulimit -l)",
        }

    def close(self) -> None:
        """End the reading threads and close the pack's files."""
        self.store.close()
        self.pack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_prompt(token_ids: Sequence[int], architecture: Architecture, tokenizer: Tokenizer, max_context: int) -> None:
    """Raise UsageError if a prompt is empty, does not fit, or holds ids that the model does not have."""
    if not len(token_ids):
        raise UsageError("the prompt is empty: expected at least one token")
    limit = architecture.max_position_embeddings
    if len(token_ids) > limit:
        raise UsageError(f"the prompt has {len(token_ids)} tokens, the model's context holds {limit}: shorten it")
    if len(token_ids) > max_context:
        raise UsageError(
            f"the prompt has {len(token_ids)} tokens, memory was planned for {max_context}: shorten it, or plan for "
            "more (--context, or max_context in Python)"
        )
    of_vision = tokenizer.vision_token_ids
    for token_id in token_ids:
        # Nearly every id is a plain int, which is seen at once; to ask an abstract class takes ten times as long.
        if type(token_id) is not int and (not isinstance(token_id, Integral) or isinstance(token_id, bool)):
            raise UsageError(f"token id {token_id!r}: expected an integer")
        if not 0 <= token_id < architecture.vocab_size:
            raise UsageError(f"token id {token_id} is outside the vocabulary of {architecture.vocab_size}")
        if token_id in of_vision:
            raise UsageError(f"token id {token_id} stands for an image or a video: this pack holds the text model only")


def read_architecture(pack: Pack, experts_per_token: int | None = None) -> Architecture:
    """The model's sizes from a pack, with another number of experts per token if one is given. Raises UsageError."""
    config = pack.manifest.model["text_config"]
    try:
        architecture = Architecture.from_config(config)
    except ValueError as error:
        raise DamagedPack(pack.directory / MANIFEST_NAME, f"{error}: convert again") from None
    if "num_experts_per_tok" not in config:
        raise DamagedPack(pack.directory / MANIFEST_NAME, "text_config lacks num_experts_per_tok: convert again")
    if experts_per_token is None:
        return architecture
    if not 1 <= experts_per_token <= architecture.num_experts:
        raise UsageError(f"--experts-per-token {experts_per_token}: expected 1 to {architecture.num_experts}")
    return dataclasses.replace(architecture, num_experts_per_tok=experts_per_token)


def read_sampling(pack: Pack, **overrides: Any) -> SamplingParams:
    """The sampling that a model's makers suggest, with the given values in place of theirs.

    Raises UsageError for these, DamagedPack for the makers'.
    """
    raw, path = pack.read_file(GENERATION_CONFIG), pack.directory / GENERATION_CONFIG
    try:
        suggested = json.loads(raw) if raw else {}
        if not isinstance(suggested, dict):
            raise ValueError("expected an object")
        SamplingParams.from_generation_config(suggested)
    except (ValueError, TypeError, UsageError) as error:
        raise DamagedPack(path, f"{error}: mend the checkpoint's, and convert again") from None
    return SamplingParams.from_generation_config(suggested, **overrides)


def describe_changes(pack: Pack, experts_per_token: int) -> str:
    """What makes the answers others than the model's, for people; empty if nothing does."""
    trained = pack.manifest.model["text_config"].get("num_experts_per_tok", experts_per_token)
    if experts_per_token == trained:
        return ""
    return f"{experts_per_token} experts per token, the model was trained with {trained}: its answers change"


def hash_manifest(pack: Pack) -> str:
    """The sha256 of a pack's manifest, which holds those of all its files: it stands for every byte of the pack."""
    return hashlib.sha256((pack.directory / MANIFEST_NAME).read_bytes()).hexdigest()


def choose_threads(threads: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= max(MOST_THREADS, cores):
        raise UsageError(f"--threads {threads}: expected 1 to {max(MOST_THREADS, cores)}")
    return threads or cores


def _open_store(
    pack: Pack, num_slots: int, settings: ReadSettings | None, policy: str, verify_reads: bool, ops: Any
) -> ExpertStore:
    if policy not in POLICIES:
        raise UsageError(f"eviction policy {policy!r}: expected one of {', '.join(POLICIES)}")
    return ExpertStore(
        pack,
        num_slots,
        io=ReadOptions(settings.direct, settings.queue_depth, advise=settings.advise) if settings else ReadOptions(),
        policy=POLICIES[policy](),
        verify_reads=verify_reads,
        new_slots=ops.new_slots,
    )


def _choose_cache_dtype(pack: Pack, ops: Any) -> torch.dtype:
    """The backend's for keys and values, but float32 where no weight is rounded: such a pack is run exactly."""
    return ops.cache_dtype if is_rounded(pack) else torch.float32


def _choose_context(architecture: Architecture, max_context: int | None) -> int:
    limit = architecture.max_position_embeddings
    if max_context is not None and max_context < 1:
        raise UsageError(f"max_context {max_context}: expected at least 1")
    return min(limit, max_context or DEFAULT_CONTEXT)

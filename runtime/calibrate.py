"""What each expert of a pack reads, over a text: the statistics that moe-convert quantizes by.

The text runs through the model layer by layer, all of it through one layer before the next, so that every expert is
read from the disk once, however long the text. In memory are the hidden states of all tokens (4 bytes x hidden_size
each) and one layer's statistics, which `process_bytes` counts for the budget. After each layer these go to a folder
beside the output: stopped at any time, the same command goes on from there. At the end the file is put together from
that folder, an array at a time.

    calibrate(engine, windows, Path("demo.calibration"), full=True)
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.lib import format as npy

from moepack.kernels.batch import BatchSizes
from moepack.kernels.matrix import Expert
from moepack.layout.architecture import Architecture
from moepack.layout.calibration import describe_model, statistics_arrays, write_calibration
from moepack.layout.errors import UsageError
from moepack.layout.reader import Pack
from moepack.layout.spec import UNQUANTIZED_BITS
from moepack.layout.writer import atomic_file
from moepack.runtime.chat import ChatTemplate
from moepack.runtime.engine import Engine, hash_manifest
from moepack.runtime.evaluate import MAX_ANSWER_TOKENS, ToolPrompt, answer_prompt, render_prompt
from moepack.runtime.memory import chunk_bytes, taken_bytes
from moepack.runtime.qwen35 import DecoderLayer
from moepack.runtime.sampling import SamplingParams
from moepack.runtime.state import FLOAT_BYTES
from moepack.runtime.tokenizer import Tokenizer

DEFAULT_TEXT = Path(__file__).with_name("calibration_text.txt.xz")
END_OF_TEXT = "<|endoftext|>"  # what the family's texts are told apart by
SAMPLED_SUFFIX = ".sampled.json"  # beside a pack: what it wrote itself
ANSWERED_SUFFIX = ".answered.json"  # and what it answered
KEEP_SECONDS = 10  # after which windows are kept: the file of all of them is written anew each time
FIRST_SEED = 100_000  # of text sampled here: the bundled one's is sampled with small ones
LEAST_BITS = 8  # of the experts of a pack that statistics are taken from
TOKENS_AT_ONCE = 16384  # given to a layer's experts together
LARGEST_MOMENTS = 4 * 2**30  # bytes of one layer's full statistics of one kind, beyond which the experts share them
UNFINISHED = ".unfinished"  # what the folder of a run is called until it is done
PROGRESS = "progress.json"  # in it: what the run is of, and how many layers are done
WINDOW_TOKEN_BYTES = 64  # of a token's id in its window: Python's integer, the place of it, and both once more
COPY_BYTES = 16 * 2**20  # of an array that numpy writes at a time


def read_default_text() -> str:
    """The bundled text: prose sampled from the demo model, code of this project, chats and tool calls."""
    return lzma.decompress(DEFAULT_TEXT.read_bytes()).decode()


def sample_windows(
    engine: Engine, tokens: int, size: int, on_tokens: Callable[[int], object] = lambda count: None
) -> list[list[int]]:
    """Text that the model writes itself, from nothing and at temperature 1: at least `tokens`, in windows of `size`.

    The window at place i is drawn with seed FIRST_SEED + i. What is drawn is kept beside the pack, for later calls.

    Raises UsageError if the vocabulary lacks the token that a text begins after.
    """
    first = engine.tokenizer.find(END_OF_TEXT)
    if first is None:
        raise UsageError(f"{engine.pack.directory}: has no token {END_OF_TEXT} to begin a text with: give --text FILE")

    def write(place: int) -> list[int]:
        sampling = SamplingParams(temperature=1, seed=FIRST_SEED + place, max_tokens=size - 1, ignore_eos=True)
        return [first, *engine.generate([first], sampling)]

    keys = [f"{size} tokens, {place}" for place in range(-(-tokens // size))]
    return _keep_beside(engine, SAMPLED_SUFFIX, keys, write, lambda count: on_tokens(size * count))


def answer_windows(
    engine: Engine, prompts: Sequence[ToolPrompt], on_prompt: Callable[[int], object] = lambda count: None
) -> list[list[int]]:
    """Tool prompts in the pack's chat template, each a window with the model's own greedy answer behind it.

    What is answered is kept beside the pack, for later calls with some of these prompts. Raises UsageError if the pack
    has no chat template or a prompt does not fit the context.
    """

    def answer(place: int) -> list[int]:
        return [*render_prompt(engine, prompts[place]), *answer_prompt(engine, prompts[place])]

    keys = [hashlib.sha256(json.dumps([prompt.messages, prompt.tools]).encode()).hexdigest() for prompt in prompts]
    return _keep_beside(engine, ANSWERED_SUFFIX, keys, answer, on_prompt)


def _keep_beside(
    engine: Engine,
    suffix: str,
    keys: Sequence[str],
    make: Callable[[int], list[int]],
    on_windows: Callable[[int], object],
) -> list[list[int]]:
    """The windows of these keys: those of a file beside the pack, and for others what `make` makes of their places.

    on_windows   called with how many are there, those of the file at once

    The file has what was made for other calls too. One of another pack is begun anew.
    """
    directory = engine.pack.directory.resolve()  # "." has no name of its own
    path, manifest = directory.with_name(directory.name + suffix), hash_manifest(engine.pack)
    kept = json.loads(path.read_text()) if path.exists() else {}
    is_fit = kept.get("manifest") == manifest and isinstance(kept["windows"], dict)  # versions before had a list
    windows = kept["windows"] if is_fit else {}
    missing = [place for place, key in enumerate(keys) if key not in windows]
    on_windows(len(keys) - len(missing))
    kept_at, is_kept = time.monotonic(), True
    try:
        for place in missing:
            if keys[place] not in windows:  # as it is when the same was asked for before in this call
                windows[keys[place]] = make(place)
                is_kept = False
            on_windows(1)
            if not is_kept and time.monotonic() - kept_at >= KEEP_SECONDS:
                write_json(path, {"manifest": manifest, "windows": windows})
                kept_at, is_kept = time.monotonic(), True
    finally:
        if not is_kept:
            write_json(path, {"manifest": manifest, "windows": windows})
    return [windows[key] for key in keys]


def calibrate(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    out: Path,
    full: bool = False,
    on_layer: Callable[[int], object] = lambda count: None,
) -> None:
    """Run windows of token ids through the engine's model and write the statistics of every layer's experts.

    full       whole second moments, for error feedback, and not their diagonals alone
    on_layer   called with 1 after each layer, those of an earlier run included

    Raises UsageError if the pack's experts have fewer than 8 bits; NotEnoughSpace or WriteError. However it ends, also
    by a kill, the same call goes on from the last layer that was done.
    """
    check_source(engine)
    folder = out.with_name(out.name + UNFINISHED)
    facts = {
        "model": model_of(engine),
        "tokens": sum(map(len, windows)),
        "text_sha256": digest_windows(windows),
        "full": full,
    }
    _run_layers(engine, windows, folder, {**facts, "pack": hash_manifest(engine.pack)}, full, on_layer)
    files = {layer: _layer_file(folder, layer) for layer in range(engine.architecture.num_hidden_layers)}
    arrays = [entry for layer, path in files.items() for entry in statistics_arrays(layer, _read_shapes(path))]

    def read(name: str) -> np.ndarray:
        _, layer, kind = name.split(".")
        with np.load(files[int(layer)]) as kept:  # reads no array but the one that is asked for
            return kept[kind]

    write_calibration(out, facts, arrays, read)
    shutil.rmtree(folder)


def count_tokens(
    pack: Pack, tokenizer: Tokenizer, passage_tokens: int, sample: int, prompts: Sequence[ToolPrompt], size: int
) -> int:
    """Tokens, at most, of a text, of `sample_windows` and of `answer_windows`, known before an engine is opened.

    Raises UsageError for a prompt that the pack's chat template refuses.
    """
    tokens = passage_tokens + -(-sample // size) * size
    template = ChatTemplate.load(pack.directory) if prompts else None
    if template is not None:  # without one answer_windows refuses
        for prompt in prompts:
            text = template.render(prompt.messages, tools=prompt.tools, enable_thinking=False)
            tokens += len(tokenizer.encode(text)) + MAX_ANSWER_TOKENS
    return tokens


def process_bytes(a: Architecture, tokens: int, longest: int, full: bool, device: str) -> int:
    """What the process takes of a budget beside an engine that is opened now: it as it is, and what calibrate holds.

    longest   tokens of the longest window
    """
    return taken_bytes(device, host_bytes=held_bytes(a, tokens, full)) + passing_bytes(a, tokens, longest)


def held_bytes(a: Architecture, tokens: int, full: bool) -> int:
    """What calibrate holds of the machine's memory: hidden states of all tokens, statistics of a layer."""
    widths = (a.hidden_size, a.moe_intermediate_size)
    sums = sum(math.prod(_sums_shape(a.num_experts, width, full)) for width in widths)
    one = max(widths) ** 2 if full else 0  # one expert's, before they are added to its sums
    return FLOAT_BYTES * (sums + one) + tokens * (FLOAT_BYTES * a.hidden_size + WINDOW_TOKEN_BYTES) + COPY_BYTES


def passing_bytes(a: Architecture, tokens: int, longest: int) -> int:
    """Upper bound of what a layer's operations hold at once: in the mixer a window, in the experts TOKENS_AT_ONCE."""
    window = min(tokens, longest)
    mixer = chunk_bytes(a, window, BatchSizes(window, window)) + window * FLOAT_BYTES * 2 * a.hidden_size
    # Eight rows of a token are its inputs, normed, outputs and their sum; and of an expert that all tokens chose what
    # is observed: inputs, weighted, squared, and in the expert's own width five more.
    wide = 8 * a.hidden_size + 5 * a.moe_intermediate_size + 2 * a.num_experts + 8 * a.num_experts_per_tok
    return max(mixer, FLOAT_BYTES * min(tokens, TOKENS_AT_ONCE) * wide)


def check_source(engine: Engine) -> None:
    """Raise UsageError unless every expert of the pack has at least 8 bits."""
    least = min(
        scheme.bits for file in engine.pack.manifest.expert_files for tier in file.tiers for scheme in tier.values()
    )
    if least < LEAST_BITS:
        raise UsageError(
            f"{engine.pack.directory}: has experts of {least} bits, whose activations are not the model's: calibrate "
            f"on a pack of {LEAST_BITS} or {UNQUANTIZED_BITS} bits"
        )


def model_of(engine: Engine) -> dict[str, Any]:
    """The model as a calibration file names it. Raises UsageError if the pack does not say what it was made from."""
    manifest = engine.pack.manifest
    source = manifest.provenance.get("settings", {}).get("source")
    if not isinstance(source, dict):
        raise UsageError(f"{engine.pack.directory}: does not name its source files: convert the checkpoint again")
    return describe_model(manifest.shape, source)


class LayerStatistics:
    """Sums over the tokens of each expert of a layer: see layout/calibration.py for their meaning."""

    def __init__(self, experts: int, hidden: int, inner: int, full: bool):
        self.full = full
        self.tokens, self.weights = torch.zeros(experts, dtype=torch.int64), torch.zeros(experts)
        self.inputs, self.inner = (torch.zeros(_sums_shape(experts, width, full)) for width in (hidden, inner))

    def observer(self, ops: Any) -> Callable[[int, Expert, torch.Tensor, torch.Tensor], None]:
        """What a layer's experts are to show their inputs to."""

        def observe(expert_id: int, expert: Expert, inputs: torch.Tensor, weights: torch.Tensor) -> None:
            gate, up = ops.linears(inputs, [expert.gate_proj, expert.up_proj])
            self.tokens[expert_id] += len(inputs)
            self.weights[expert_id] += weights.square().sum().cpu()
            for sums, x in ((self.inputs, inputs), (self.inner, ops.silu_mul(gate, up))):
                weighted = x * weights[:, None]
                place = sums[expert_id if len(sums) > 1 else 0]
                place += (weighted.T @ weighted if self.full else weighted.square().sum(0)).cpu()

        return observe

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums by name, as a calibration file holds them."""
        tokens = self.tokens.numpy().astype(np.uint32)
        return {"tokens": tokens, **{name: getattr(self, name).numpy() for name in ("weights", "inputs", "inner")}}


def embed_windows(engine: Engine, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The hidden states before the first layer, all windows end to end: [N, D]."""
    ids = torch.tensor([token_id for window in windows for token_id in window])
    hidden = torch.empty(len(ids), engine.architecture.hidden_size)
    for rows, part in zip(hidden.split(TOKENS_AT_ONCE), ids.split(TOKENS_AT_ONCE)):
        rows.copy_(engine.model.ops.embed(engine.model.embedding, part))
    return hidden


@torch.inference_mode()
def run_layer(engine: Engine, layer: int, hidden: torch.Tensor, lengths: Sequence[int], observe: Any = None) -> None:
    """One layer over all windows [N, D], in place: the states of a long text are in memory once.

    The mixer sees each window by itself, the experts all tokens. A GPU has some of them at a time.
    """
    block: DecoderLayer = engine.model.layers[layer]
    upload = engine.model.ops.upload
    for window in hidden.split(list(lengths)):
        window.copy_(mix(engine, block, layer, upload(window)))
    block.experts.observe = observe
    try:
        for part in hidden.split(TOKENS_AT_ONCE):
            part.copy_(block.experts(upload(part)))
    finally:
        block.experts.observe = None


def mix(engine: Engine, block: DecoderLayer, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The mixer's half of a layer over one window [T, D], from a new state."""
    state = engine.new_state(len(x)).layers[layer]
    normed = block.ops.rms_norm(x, block.norm, engine.architecture.rms_norm_eps)
    return x + block.mixer(normed, state)


def _sums_shape(experts: int, width: int, full: bool) -> tuple[int, ...]:
    if not full:
        return experts, width
    own = FLOAT_BYTES * experts * width * width <= LARGEST_MOMENTS
    return experts if own else 1, width, width


def digest_windows(windows: Sequence[Sequence[int]]) -> str:
    """The sha256 of windows of token ids."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([len(window), *window], dtype="<u4").tobytes())
    return digest.hexdigest()


def _run_layers(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    folder: Path,
    identity: dict[str, Any],
    full: bool,
    on_layer: Callable[[int], object],
) -> None:
    """Leave every layer's statistics in the folder, those of an earlier run with the same identity as they are."""
    lengths = [len(window) for window in windows]
    hidden, first = _resume(folder, identity, engine, windows)
    if first:
        on_layer(first)
    for layer in range(first, engine.architecture.num_hidden_layers):
        _save(folder, identity, layer, _observe_layer(engine, layer, hidden, lengths, full), hidden)
        on_layer(1)


def _observe_layer(
    engine: Engine, layer: int, hidden: torch.Tensor, lengths: Sequence[int], full: bool
) -> dict[str, np.ndarray]:
    """Take the hidden states through a layer, in place; its statistics."""
    a = engine.architecture
    statistics = LayerStatistics(a.num_experts, a.hidden_size, a.moe_intermediate_size, full)
    run_layer(engine, layer, hidden, lengths, statistics.observer(engine.model.ops))
    squares = sum(float(part.double().square().sum()) for part in hidden.split(TOKENS_AT_ONCE))
    return {**statistics.arrays(), "stream": np.array([squares / hidden.numel()], dtype=np.float32)}


def _resume(
    folder: Path, identity: dict[str, Any], engine: Engine, windows: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, int]:
    """Hidden states and the layer to go on with: those of an earlier run with the same identity, or the start."""
    progress = folder / PROGRESS
    if progress.exists():
        state = json.loads(progress.read_text())
        if state["facts"] == identity and _is_whole(folder, state["layers"]):
            return torch.from_numpy(np.load(_hidden_file(folder, state["layers"]))), state["layers"]
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hidden = embed_windows(engine, windows)
    _save_hidden(folder, 0, hidden)
    write_json(progress, {"facts": identity, "layers": 0})
    return hidden, 0


def _is_whole(folder: Path, layers: int) -> bool:
    """Whether all is there that so many layers leave: not so where a run was killed while it removed the folder."""
    return all(
        path.exists() for path in (_hidden_file(folder, layers), *(_layer_file(folder, n) for n in range(layers)))
    )


def _save(
    folder: Path, identity: dict[str, Any], layer: int, arrays: dict[str, np.ndarray], hidden: torch.Tensor
) -> None:
    """Keep a layer's results. It counts as done when the progress file says so, which is written last."""
    with atomic_file(_layer_file(folder, layer)) as file:
        np.savez(cast("IO[bytes]", file), **arrays)  # type: ignore[arg-type]
    _save_hidden(folder, layer + 1, hidden)
    write_json(folder / PROGRESS, {"facts": identity, "layers": layer + 1})
    _hidden_file(folder, layer).unlink(missing_ok=True)


def _save_hidden(folder: Path, layers: int, hidden: torch.Tensor) -> None:
    array = hidden.numpy()
    with atomic_file(_hidden_file(folder, layers)) as file:
        # np.save hands an array to the system past the file object, and on a full disk does not say that it is one.
        header = npy.header_data_from_array_1_0(array)  # type: ignore[no-untyped-call]
        npy.write_array_header_1_0(cast("IO[bytes]", file), header)  # type: ignore[no-untyped-call]
        file.write(array.reshape(-1).data)


def _hidden_file(folder: Path, layers: int) -> Path:
    """The hidden states after so many layers."""
    return folder / f"hidden_{layers}.npy"


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}.npz"


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of an .npz by name, in the file's order: of each the header is read alone."""
    shapes = {}
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            with file.open(name) as array:
                npy.read_magic(array)  # type: ignore[no-untyped-call]
                header = npy.read_array_header_1_0(array)  # type: ignore[no-untyped-call]
                shapes[name.removesuffix(".npy")] = header[0]
    return shapes


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all. Raises NotEnoughSpace or WriteError."""
    with atomic_file(path) as file:
        file.write(json.dumps(value).encode())

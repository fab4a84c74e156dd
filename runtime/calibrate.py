"""What each expert of a pack reads, over a text: the statistics that moe-convert quantizes by.

The text runs through the model layer by layer, all of it through one layer before the next, so that every expert is
read from the disk once, however long the text. In memory are the hidden states of all tokens (4 bytes x hidden_size
each) and one layer's statistics. After each layer these go to a folder beside the output: stopped at any time, the same
command goes on from there.

    calibrate(engine, windows, Path("demo.calibration"), full=True)
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepack.kernels.matrix import Expert
from moepack.layout.calibration import describe_model, statistics_arrays, write_calibration
from moepack.layout.errors import UsageError
from moepack.layout.spec import UNQUANTIZED_BITS
from moepack.runtime.engine import Engine, hash_manifest
from moepack.runtime.evaluate import ToolPrompt, answer_prompt, render_prompt
from moepack.runtime.qwen35 import DecoderLayer
from moepack.runtime.sampling import SamplingParams

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

    Raises UsageError if the pack's experts have fewer than 8 bits; NotEnoughSpace.
    """
    check_source(engine)
    a = engine.architecture
    folder = out.with_name(out.name + UNFINISHED)
    facts = {
        "model": model_of(engine),
        "tokens": sum(map(len, windows)),
        "text_sha256": digest_windows(windows),
        "full": full,
    }
    hidden, first = _resume(folder, {**facts, "pack": hash_manifest(engine.pack)}, engine, windows)
    if first:
        on_layer(first)
    for layer in range(first, a.num_hidden_layers):
        statistics = LayerStatistics(a.num_experts, a.hidden_size, a.moe_intermediate_size, full)
        hidden = run_layer(
            engine, layer, hidden, [len(window) for window in windows], statistics.observer(engine.model.ops)
        )
        stream = hidden.double().square().mean().float().reshape(1)
        _save(folder, layer, {**statistics.arrays(), "stream": stream.numpy()}, hidden)
        on_layer(1)
    layers = {layer: dict(np.load(folder / f"layer_{layer}.npz")) for layer in range(a.num_hidden_layers)}
    arrays = [entry for layer, values in layers.items() for entry in statistics_arrays(layer, values)]
    write_calibration(out, facts, arrays, lambda name: layers[int(name.split(".")[1])][name.split(".")[2]])
    shutil.rmtree(folder)


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
        self.inputs, self.inner = (_sums(experts, width, full) for width in (hidden, inner))

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
    return torch.cat([engine.model.ops.embed(engine.model.embedding, part).cpu() for part in ids.split(TOKENS_AT_ONCE)])


@torch.inference_mode()
def run_layer(
    engine: Engine, layer: int, hidden: torch.Tensor, lengths: Sequence[int], observe: Any = None
) -> torch.Tensor:
    """One layer over all windows: [N, D] -> [N, D]. The mixer sees each window by itself, the experts all tokens.

    A GPU has some of them at a time.
    """
    block: DecoderLayer = engine.model.layers[layer]
    upload = engine.model.ops.upload
    mixed = torch.cat([mix(engine, block, layer, upload(window)).cpu() for window in hidden.split(list(lengths))])
    block.experts.observe = observe
    try:
        return torch.cat([block.experts(upload(part)).cpu() for part in mixed.split(TOKENS_AT_ONCE)])
    finally:
        block.experts.observe = None


def mix(engine: Engine, block: DecoderLayer, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The mixer's half of a layer over one window [T, D], from a new state."""
    state = engine.new_state(len(x)).layers[layer]
    normed = block.ops.rms_norm(x, block.norm, engine.architecture.rms_norm_eps)
    return x + block.mixer(normed, state)


def _sums(experts: int, width: int, full: bool) -> torch.Tensor:
    if not full:
        return torch.zeros(experts, width)
    own = 4 * experts * width * width <= LARGEST_MOMENTS
    return torch.zeros(experts if own else 1, width, width)


def digest_windows(windows: Sequence[Sequence[int]]) -> str:
    """The sha256 of windows of token ids."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([len(window), *window], dtype="<u4").tobytes())
    return digest.hexdigest()


def _resume(
    folder: Path, facts: dict[str, Any], engine: Engine, windows: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, int]:
    """Hidden states and the layer to go on with: those of an earlier run with the same pack and facts, or the
    start."""
    progress = folder / "progress.json"
    if progress.exists():
        state = json.loads(progress.read_text())
        if state["facts"] == facts:
            return torch.from_numpy(np.load(folder / f"hidden_{state['layers']}.npy")), state["layers"]
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(progress, {"facts": facts, "layers": 0})
    hidden = embed_windows(engine, windows)
    np.save(folder / "hidden_0.npy", hidden.numpy())
    return hidden, 0


def _save(folder: Path, layer: int, arrays: dict[str, np.ndarray], hidden: torch.Tensor) -> None:
    """Keep a layer's results; it counts as done when the progress file says so."""
    np.savez(folder / f"layer_{layer}.npz", **arrays)  # type: ignore[arg-type]
    np.save(folder / f"hidden_{layer + 1}.npy", hidden.numpy())
    facts = json.loads((folder / "progress.json").read_text())["facts"]
    write_json(folder / "progress.json", {"facts": facts, "layers": layer + 1})
    (folder / f"hidden_{layer}.npy").unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".new")
    try:
        partial.write_text(json.dumps(value))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise

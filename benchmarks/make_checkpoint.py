"""A random checkpoint of a release's true widths with few layers: what speed is measured on.

The speed of a token depends on the shapes and on which experts the router picks, not on what the weights know. Eight
layers and 49,664 vocabulary rows are one fifth of 35B-A3B in every cost of a token; four layers, 16,640 rows and 32
experts a layer about a fifteenth of 397B-A17B. Weights are scaled so that activations stay near 1 and logits near the
standard normal; the MTP head and the vision tower are left out, because no engine here runs them. Random weights say
nothing about quality.

Values come from one pool of normal noise: each piece of a tensor is a window of it at an offset of its own, so that
writing costs no arithmetic and at most a few pools are in memory.

Without skew the experts are nearly equally likely. With --routing-skew few are popular: a constant direction is added
to every embedding, and each router row leans along it by its expert's rank. Measured with 256 experts over 192 random
tokens, by layer: without skew a tenth of the experts gets 18 to 22 % of the choices, with 0.8 it gets 51 to 68 %.

    python benchmarks/make_checkpoint.py build/speed/checkpoint
    python benchmarks/make_checkpoint.py build/speed/skewed --routing-skew 0.8
    python benchmarks/make_checkpoint.py build/speed/397B/checkpoint --model 397B
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.tensor_file import layout_tensors

TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
INDEX_NAME = "model.safetensors.index.json"  # written last: a checkpoint without it is not finished

POOL_VALUES = 2**24
PIECE_VALUES = 2**21  # of one window: the gate and up projections of a 35B expert
FLOAT32_TENSORS = ("A_log", "linear_attn.norm.weight")  # as released

# The skew's direction: its size beside embeddings of deviation 1, and an estimate of what is left of it in the normed
# stream, where the layers' outputs join it: 0.7 in the first layer, falling.
DIRECTION_SIZE = 1.0
DIRECTION_SHARE = 0.55

Shape = tuple[int, ...]

MODELS = {  # what the releases differ in
    "35B": {
        "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8, "num_attention_heads": 16, "linear_num_value_heads": 32,
    },
    "397B": {
        "hidden_size": 4096, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
        "num_experts_per_tok": 10, "num_attention_heads": 32, "linear_num_value_heads": 64,
    },
}  # fmt: skip
PARTS = {"35B": (8, 49664, 256), "397B": (4, 16640, 32)}  # layers, embedding rows, experts: unless said otherwise


def main() -> None:
    """Parse the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--model", choices=MODELS, default="35B", help="whose widths: 35B-A3B's or 397B-A17B's")
    parser.add_argument("--layers", type=int, help="8 of 35B, 4 of 397B unless said otherwise")
    parser.add_argument("--vocab", type=int, help="embedding rows, 49664 or 16640; the tokenizer's 4096 are the first")
    parser.add_argument("--experts", type=int, help="of a layer: 256 or 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--routing-skew", type=float, default=0.0, help="how fast popularity falls with rank, 0 is even"
    )
    arguments = parser.parse_args()
    if arguments.routing_skew < 0:
        parser.error(f"--routing-skew {arguments.routing_skew}: expected 0 or more")
    sizes = (arguments.layers, arguments.vocab, arguments.experts)
    part = [usual if size is None else size for size, usual in zip(sizes, PARTS[arguments.model])]
    config = config_of(arguments.model, *part)
    write_checkpoint(arguments.out, config, arguments.seed, arguments.routing_skew)


def config_of(model: str, layers: int, vocab: int, experts: int) -> dict[str, Any]:
    """config.json of one of Qwen3.5's MODELS with another number of layers, embedding rows and experts."""
    rope = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    text = MODELS[model] | {
        "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "hidden_act": "silu",
        "num_hidden_layers": layers, "full_attention_interval": 4, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "layer_types": ["linear_attention" if (n + 1) % 4 else "full_attention" for n in range(layers)],
        "num_experts": experts, "mlp_only_layers": [],
        "num_key_value_heads": 2, "head_dim": 256, "attn_output_gate": True,
        "attention_bias": False, "rope_parameters": rope, "max_position_embeddings": 262144,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
    }


def write_checkpoint(out: Path, config: dict[str, Any], seed: int = 0, routing_skew: float = 0.0) -> None:
    """Write a checkpoint directory: a shard per layer and one for the rest, configs, tokenizer, and last the index.

    The same arguments give the same bytes. Raises FileExistsError if there is a finished checkpoint already, and
    ValueError if the config is none of this architecture.
    """
    if (out / INDEX_NAME).exists():
        raise FileExistsError(f"{out}: holds a checkpoint already: delete it or choose another directory")
    architecture = Architecture.from_config(config)
    weights = RandomWeights(architecture, seed, routing_skew)
    shards = _split_into_shards(architecture)
    out.mkdir(parents=True, exist_ok=True)
    total_bytes = 0
    weight_map: dict[str, str] = {}
    with tqdm(desc=str(out), unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for number, shapes in enumerate(shards, start=1):
            name = f"model.safetensors-{number:05d}-of-{len(shards):05d}.safetensors"
            total_bytes += _write_shard(out / name, shapes, weights, progress)
            weight_map |= dict.fromkeys(shapes, name)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, out / name)
    _write_json(out / "config.json", config)
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


class RandomWeights:
    """The values of every tensor, in pieces, by the tensor's name: the order of asking does not matter."""

    def __init__(self, architecture: Architecture, seed: int, routing_skew: float):
        self.architecture, self.seed, self.routing_skew = architecture, seed, routing_skew
        rng = np.random.default_rng(seed)
        self._noise = rng.standard_normal(POOL_VALUES, dtype=np.float32)
        self._scaled: dict[float, np.ndarray] = {}  # standard deviation -> pool, bf16 bit patterns
        self._direction = rng.choice(np.array([-1, 1], np.float32), architecture.hidden_size)

    def pieces(self, name: str, shape: Shape) -> Iterator[np.ndarray]:
        """Consecutive pieces of a tensor as it is stored: bf16 bit patterns, or float32 for FLOAT32_TENSORS."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if name.endswith(FLOAT32_TENSORS) or name.endswith("dt_bias"):
            values = _state_values(name, shape, rng)
            yield values if name.endswith(FLOAT32_TENSORS) else to_bf16(values)
        elif "norm" in name:
            yield to_bf16(0.1 * rng.standard_normal(shape, dtype=np.float32))  # stored as the distance from 1
        elif name.endswith("mlp.gate.weight"):
            yield to_bf16(self._router(shape, rng))
        elif name.endswith("embed_tokens.weight"):
            rows = PIECE_VALUES // shape[1]
            for first in range(0, shape[0], rows):
                yield to_bf16(self._embedding((min(rows, shape[0] - first), shape[1]), rng))
        else:
            fan_in = shape[-1]  # for the convolution its taps: every output has about the size of the inputs
            yield from self._windows(math.prod(shape), fan_in**-0.5, rng)

    def _windows(self, count: int, std: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
        pool = self._scaled.get(std)
        if pool is None:
            pool = self._scaled[std] = to_bf16(self._noise * np.float32(std))
        sizes = [min(PIECE_VALUES, count - first) for first in range(0, count, PIECE_VALUES)]
        offsets = rng.choice(POOL_VALUES - PIECE_VALUES, len(sizes), replace=False)  # no two windows are the same
        for offset, size in zip(offsets, sizes):
            yield pool[offset : offset + size]

    def _embedding(self, shape: Shape, rng: np.random.Generator) -> np.ndarray:
        rows = rng.standard_normal(shape, dtype=np.float32)
        return rows + DIRECTION_SIZE * self._direction if self.routing_skew else rows

    def _router(self, shape: Shape, rng: np.random.Generator) -> np.ndarray:
        """Rows that give scores of deviation 1, and with skew a constant lead that falls with the expert's rank.

        The best of E normal scores spread about like Gumbel noise of scale 1 / sqrt(2 ln E), under which a lead of
        -scale * S * ln(rank) would make the first choice a Zipf law of exponent S. It comes out flatter at the head
        (0.5 to 0.7 over the first 32 ranks at S = 0.8) and thinner in the tail.
        """
        experts, hidden = shape
        rows = rng.standard_normal(shape, dtype=np.float32) / np.float32(hidden**0.5)
        if not self.routing_skew:
            return rows
        rank = 1 + rng.permutation(experts)
        lead = -self.routing_skew * np.log(rank) / math.sqrt(2 * math.log(experts))
        return rows + np.outer(lead / (hidden * DIRECTION_SHARE), self._direction).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bf16, ties to even: uint16 bit patterns of the same shape."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _state_values(name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Float32 values with which DeltaNet states neither vanish nor grow."""
    if name.endswith("norm.weight"):  # a plain factor, unlike the other norms
        return np.ones(shape, np.float32)
    low, high = (-1.5, 2.0) if name.endswith("A_log") else (-4.0, -1.0)
    return rng.uniform(low, high, shape).astype(np.float32)


def _split_into_shards(architecture: Architecture) -> list[dict[str, Shape]]:
    """Name in the checkpoint -> shape, for each layer and then for the rest."""
    shards: list[dict[str, Shape]] = [{} for _ in range(architecture.num_hidden_layers + 1)]
    for name, shape in resident_shapes(architecture, mtp_layers=0).items():
        stem, _, rest = name.partition("model.layers.")
        shard = -1 if stem or not rest else int(rest.split(".")[0])
        shards[shard][name.replace("model.", "model.language_model.", 1)] = shape
    experts, hidden, inner = architecture.num_experts, architecture.hidden_size, architecture.moe_intermediate_size
    for layer, shapes in enumerate(shards[:-1]):
        stem = f"model.language_model.layers.{layer}.mlp.experts"
        shapes[f"{stem}.gate_up_proj"] = (experts, 2 * inner, hidden)
        shapes[f"{stem}.down_proj"] = (experts, hidden, inner)
    return shards


def _write_shard(path: Path, shapes: dict[str, Shape], weights: RandomWeights, progress: tqdm) -> int:
    """Write one safetensors file piece by piece; returns the bytes of its tensors."""
    arrays = [(name, "F32" if name.endswith(FLOAT32_TENSORS) else "BF16", shape) for name, shape in shapes.items()]
    header, specs = layout_tensors(arrays)
    with open(path, "wb") as file:
        file.write(header)
        for spec in specs:
            for piece in weights.pieces(spec.name, spec.shape):
                progress.update(file.write(piece.data))
        file.flush()
        os.fsync(file.fileno())  # or the next measurement shares the disk with this file
    return sum(spec.size_bytes for spec in specs)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Logits and greedy tokens against transformers in float32: tiny checkpoints of every layout, and the demo model.

Packs are at 16 bits throughout, so that the weights are the checkpoint's own and only the arithmetic is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DEMO, make_pack
from moepack.runtime import Engine, SamplingParams
from tiny_checkpoint import TinyModel, write_checkpoint

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity installs it")
pytestmark = pytest.mark.parity

LOGIT_TOLERANCE = 1e-3  # of the range of the logits: float32 sums in another order, over all layers
PROMPT = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()  # beyond one DeltaNet chunk
NEW_TOKENS = 64

LAYOUTS: dict[str, dict[str, Any]] = {
    "qwen3.5": {},
    "qwen3.6": {"mtp_experts": "fused", "float32_state": False},
    "per expert": {"experts": "per_expert"},
    "flat text model": {"config": "flat", "prefix": "model."},
    "nested, short prefix": {"prefix": "model."},
    "one file": {"single_file": True},
}
MODELS = {
    "default": TinyModel(),
    "odd sizes": TinyModel(layers=6, full_attention_interval=3, hidden=160, experts=7, experts_per_tok=3,
                           moe_intermediate=96, shared_intermediate=64, heads=6, kv_heads=3, head_dim=64,
                           linear_key_heads=2, linear_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=24),
    "one expert": TinyModel(experts=5, experts_per_tok=1, mtp=False, vision=False, tie=True),
}  # fmt: skip


def assert_same_as_transformers(source: Path, engine: Engine, prompt: list[int]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        expected = model(ids).logits[0]
        model.generation_config.eos_token_id = None  # go on past end tokens
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    logits = engine.logits(prompt)
    difference = (logits - expected).abs()
    scale = (expected.max() - expected.min()).item()
    assert difference.max() <= LOGIT_TOLERANCE * scale, (
        f"max {difference.max():.2e} mean {difference.mean():.2e} of range {scale:.2f}, first bad position "
        f"{(difference > LOGIT_TOLERANCE * scale).nonzero()[:1].tolist()}"
    )
    tokens = list(engine.generate(prompt, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)))
    assert tokens == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_transformers_computes(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", **LAYOUTS[layout])
    pack = make_pack(source, tmp_path / "pack", bits=16, resident_bits=16)
    assert_same_as_transformers(source, Engine.open(pack, exact=True), PROMPT)


@pytest.mark.parametrize("name", MODELS)
def test_other_sizes_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", MODELS[name])
    pack = make_pack(source, tmp_path / "pack", bits=16, resident_bits=16)
    assert_same_as_transformers(source, Engine.open(pack, exact=True), PROMPT)


def test_the_demo_model_computes_what_transformers_computes(demo_pack: Callable[[int], Path]) -> None:
    engine = Engine.open(demo_pack(16), exact=True)
    text = "It was a fine morning, and the two friends walked down to the river. " * 12
    assert_same_as_transformers(DEMO, engine, engine.tokenizer.encode(text)[:200])


def test_a_quantized_pack_computes_what_transformers_computes_with_its_weights(tmp_path: Path) -> None:
    """Quantized matrices mean what the format says: transformers with the dequantized weights gives the same logits."""
    from moepack.layout.quantized import dequantize
    from moepack.layout.reader import Pack

    source = write_checkpoint(tmp_path / "source")
    pack = make_pack(source, tmp_path / "pack", bits=3, resident_bits=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = model.state_dict()
    with Pack.open(pack) as opened:
        for name in opened.manifest.resident.quantized:
            if not name.startswith("mtp."):
                weights[f"{name}.weight"].copy_(torch.from_numpy(opened.read_resident_matrix(name)))
        for layer in range(opened.manifest.shape.num_hidden_layers):
            for expert in range(opened.manifest.shape.num_experts):
                geometry = opened.geometry(layer).block(expert)
                block = bytearray(geometry.block_stride)
                opened.read_block(layer, expert, memoryview(block))
                matrices = {}
                sections = {section.name: section for section in geometry.sections}
                for projection, matrix in geometry.matrices:
                    arrays = [_array(block, sections[f"{projection}.{part}"]) for part in ("w_q", "scales", "biases")]
                    scheme = matrix.scheme
                    matrices[projection] = dequantize(*arrays, bits=scheme.bits, group_size=scheme.group_size or 0)
                stem = f"model.layers.{layer}.mlp.experts"
                gate_up = [torch.from_numpy(matrices[name]) for name in ("gate_proj", "up_proj")]
                weights[f"{stem}.gate_up_proj"][expert].copy_(torch.cat(gate_up))
                weights[f"{stem}.down_proj"][expert].copy_(torch.from_numpy(matrices["down_proj"]))
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    difference = (Engine.open(pack, exact=True).logits(PROMPT) - expected).abs().max()
    assert difference <= LOGIT_TOLERANCE * (expected.max() - expected.min()), f"max difference {difference}"


def _array(block: bytearray, section: Any) -> Any:
    import numpy as np

    dtype = "<u4" if section.dtype == "U32" else "<u2"
    return np.frombuffer(block, dtype, section.shape[0] * section.shape[1], section.offset_bytes).reshape(section.shape)

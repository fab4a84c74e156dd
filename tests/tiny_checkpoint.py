"""Tiny random Qwen3.5-MoE checkpoints, written in every layout that the BF16 releases use.

All that matters of the real ones (linear and full attention, shared expert, MTP layer, vision to be skipped,
padded vocabulary, tokenizer, chat template), at a size that converts in a blink. A tensor's values come from
the seed and its own name, never from the layout: fused and per-expert checkpoints of one TinyModel hold the
same numbers. Repeats are equal to the byte. Random weights cannot tell anything about quality.

    write_checkpoint(tmp_path / "source", TinyModel(experts=8), experts="per_expert", shards=2)
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
PLAIN_ADDED_TOKENS = [  # added but not special: text that survives a decode which skips special tokens
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
# In the byte alphabet of BPE, Ġ is a space, Ã© is é, and âĢĶ is a dash of three bytes.
MERGES = ["t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "e r", "o f", "Ġ of", "Ã ©", "â Ģ", "âĢ Ķ"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKEN_IDS = {t: 256 + len(MERGES) + n for n, t in enumerate(SPECIAL_TOKENS + PLAIN_ADDED_TOKENS)}
TOKENIZER_SIZE = 256 + len(MERGES) + len(TOKEN_IDS)

CHAT_TEMPLATE = r"""{%- set ns = namespace(query=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor -%}
{%- if ns.query < 0 %}{{ raise_exception('a conversation needs a user message') }}{% endif -%}
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{%- if tools %}{{ '<|im_start|>system\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor -%}
    {{- '\n</tools>\n\nTo call one:\n\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>' -}}
    {{- '\n</function>\n</tool_call>' + ('\n\n' + own if own else '') + '<|im_end|>\n' -}}
{%- elif own %}{{ '<|im_start|>system\n' + own + '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
    {%- set text = (m.content or '') | trim -%}
    {%- if m.role == 'user' %}{{ '<|im_start|>user\n' + text + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' -%}
        {%- set thought = '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' -%}
        {{- '<|im_start|>assistant\n' + (thought if loop.index0 > ns.query else '') + text -}}
        {%- for call in m.tool_calls or [] -%}
            {{- '\n' if not loop.first else '\n\n' if text else '' -}}
            {{- '<tool_call>\n<function=' + call.function.name + '>' -}}
            {%- for key, value in call.function.arguments | items -%}
                {{- '\n<parameter=' + key + '>\n' -}}
                {{- value | tojson if value is iterable and value is not string else value | string -}}
                {{- '\n</parameter>' }}{% endfor -%}
            {{- '\n</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
    {%- elif m.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
        {{- '\n<tool_response>\n' + text + '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- elif m.role != 'system' or loop.index0 %}{{ raise_exception('misplaced ' + m.role) }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}
    {{- '\n</think>\n\n' if enable_thinking is false else '' }}{% endif -%}
"""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyModel:
    """Dimensions. By default groups of 32 divide every row, and an expert is no whole number of pages."""

    layers: int = 4
    hidden: int = 96
    experts: int = 6
    experts_per_tok: int = 2
    moe_intermediate: int = 64
    shared_intermediate: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32  # a multiple of 8: a quarter of it is rotated, in pairs
    linear_key_heads: int = 2
    linear_value_heads: int = 4
    linear_key_head_dim: int = 16
    linear_value_head_dim: int = 16
    conv_kernel: int = 4
    full_attention_interval: int = 4
    vocab: int = 320  # more than the tokenizer has: the last rows are padding
    max_positions: int = 1024
    mtp: bool = True
    vision: bool = True
    tie: bool = False
    seed: int = 0

    @property
    def layer_types(self) -> list[str]:
        interval = self.full_attention_interval
        return ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(self.layers)]


def write_checkpoint(
    directory: Path,
    model: TinyModel = TinyModel(),
    *,
    experts: Literal["fused", "per_expert"] = "fused",
    mtp_experts: Literal["fused", "per_expert"] = "per_expert",
    prefix: Literal["model.language_model.", "model."] = "model.language_model.",
    config: Literal["nested", "flat"] = "nested",
    dtype: Literal["BF16", "F16", "F32"] = "BF16",
    float32_state: bool = True,
    shards: int = 3,
    single_file: bool = False,
) -> Path:
    """Write a checkpoint directory (made if absent) and return it. The defaults are Qwen3.5's BF16 layout.

    Qwen3.6: mtp_experts="fused", float32_state=False (which is about A_log and linear_attn.norm). A text-only
    release: prefix="model.", config="flat". single_file writes no index; there are fewer files than `shards`
    only if a tensor outweighs a file's share. Raises ValueError if vocab or head_dim cannot work.
    """
    if model.vocab < TOKENIZER_SIZE or model.head_dim % 8:
        raise ValueError(f"need vocab >= {TOKENIZER_SIZE} and head_dim a multiple of 8, got {model}")
    directory.mkdir(parents=True, exist_ok=True)
    _write_configs(directory, model, config, str(DTYPES[dtype]).removeprefix("torch."))
    _write_tokenizer(directory, model)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(model, with_vision=model.vision and config == "nested").items():
        is_state = name.endswith(("A_log", "linear_attn.norm.weight"))
        stored_dtype = DTYPES["F32" if is_state and float32_state else dtype]
        stored_name = name if name.startswith(("mtp.", "lm_head.", "model.visual.")) else prefix + name
        form = mtp_experts if name.startswith("mtp.") else experts
        values = _values(name, shape, model.seed)
        parts = _split_experts(stored_name, values) if form == "per_expert" else [(stored_name, values)]
        tensors |= {part: torch.tensor(array, dtype=stored_dtype) for part, array in parts}
    tensors = dict(sorted(tensors.items()))
    if single_file:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(directory, tensors, shards)
    return directory


def _write_configs(directory: Path, model: TinyModel, form: str, dtype: str) -> None:
    pairs = model.head_dim // 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3], "mrope_interleaved": True}
    end, pad = TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]
    config: dict[str, Any] = {
        "model_type": "qwen3_5_moe_text", "dtype": dtype, "hidden_size": model.hidden, "hidden_act": "silu",
        "layer_types": model.layer_types, "full_attention_interval": model.full_attention_interval,
        "num_hidden_layers": model.layers, "moe_intermediate_size": model.moe_intermediate,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "attn_output_gate": True,
        "head_dim": model.head_dim, "rope_parameters": rope, "max_position_embeddings": model.max_positions,
        "linear_num_key_heads": model.linear_key_heads, "linear_num_value_heads": model.linear_value_heads,
        "linear_key_head_dim": model.linear_key_head_dim, "mamba_ssm_dtype": "float32",
        "linear_value_head_dim": model.linear_value_head_dim, "linear_conv_kernel_dim": model.conv_kernel,
        "num_experts": model.experts, "num_experts_per_tok": model.experts_per_tok, "mlp_only_layers": [],
        "shared_expert_intermediate_size": model.shared_intermediate, "tie_word_embeddings": model.tie,
        "rms_norm_eps": 1e-6, "mtp_num_hidden_layers": int(model.mtp), "vocab_size": model.vocab,
        "eos_token_id": pad,  # no <|im_end|> here, as released
    }  # fmt: skip
    if form == "flat":
        config = {"architectures": ["Qwen3_5MoeForCausalLM"], **config}
    else:
        ids = {f"{name}_token_id": TOKEN_IDS[f"<|{name}_pad|>"] for name in ("image", "video")}
        ids |= {f"{name}_token_id": TOKEN_IDS[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
        config = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", **ids,
            "tie_word_embeddings": model.tie, "text_config": config,
            "vision_config": {"model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 32, "patch_size": 4},
        }  # fmt: skip
    _write_json(directory / "config.json", config)
    tokens = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95}
    _write_json(directory / "generation_config.json", tokens | sampling)


def _write_tokenizer(directory: Path, model: TinyModel) -> None:
    """A byte-level BPE that knows every byte, a few merges and the real added tokens."""
    merges = [(left, right) for left, right in map(str.split, MERGES)]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in SPECIAL_TOKENS) for t in TOKEN_IDS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": model.max_positions}
    settings |= {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _shapes(model: TinyModel, *, with_vision: bool) -> Shapes:
    """Every tensor by its name without the text model's prefix, experts fused."""
    hidden = model.hidden
    shapes: Shapes = {"embed_tokens.weight": (model.vocab, hidden), "norm.weight": (hidden,)}
    if not model.tie:
        shapes["lm_head.weight"] = (model.vocab, hidden)
    layers = {f"layers.{n}.": kind for n, kind in enumerate(model.layer_types)}
    if model.mtp:
        layers["mtp.layers.0."] = "full_attention"
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"mtp.{norm}.weight"] = (hidden,)
    for layer, kind in layers.items():
        shapes |= {layer + name: shape for name, shape in _layer_shapes(model, kind).items()}
    if with_vision:  # one tensor stands for the tower, which is to be left out
        shapes["model.visual.pos_embed.weight"] = (16, 32)
    return shapes


def _layer_shapes(model: TinyModel, kind: str) -> Shapes:
    hidden, experts, shared = model.hidden, model.experts, model.shared_intermediate
    shapes: Shapes = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * model.moe_intermediate, hidden),
        "mlp.experts.down_proj": (experts, hidden, model.moe_intermediate),
        "mlp.shared_expert.gate_proj": (shared, hidden), "mlp.shared_expert.up_proj": (shared, hidden),
        "mlp.shared_expert.down_proj": (hidden, shared), "mlp.shared_expert_gate": (1, hidden),
    }  # fmt: skip
    if kind == "full_attention":
        dim, q_width, kv_width = model.head_dim, model.heads * model.head_dim, model.kv_heads * model.head_dim
        shapes |= {  # the rows of q_proj are, head by head, query and then gate
            "self_attn.q_proj": (2 * q_width, hidden), "self_attn.k_proj": (kv_width, hidden),
            "self_attn.v_proj": (kv_width, hidden), "self_attn.o_proj": (hidden, q_width),
            "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
        }  # fmt: skip
    else:
        heads, v_width = model.linear_value_heads, model.linear_value_heads * model.linear_value_head_dim
        qkv_width = 2 * model.linear_key_heads * model.linear_key_head_dim + v_width
        shapes |= {
            "linear_attn.in_proj_qkv": (qkv_width, hidden), "linear_attn.in_proj_z": (v_width, hidden),
            "linear_attn.in_proj_b": (heads, hidden), "linear_attn.in_proj_a": (heads, hidden),
            "linear_attn.out_proj": (hidden, v_width), "linear_attn.norm": (model.linear_value_head_dim,),
            "linear_attn.conv1d": (qkv_width, 1, model.conv_kernel), "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
        }  # fmt: skip
    bare = ("experts.gate_up_proj", "experts.down_proj", "A_log", "dt_bias")  # parameters, not modules
    return {name if name.endswith(bare) else f"{name}.weight": shape for name, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], seed: int) -> FloatArray:
    """Values with which no part idles: states decay, experts differ, the router decides."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(("A_log", "dt_bias")):
        low, high = (-1.5, 2.0) if name.endswith("A_log") else (-4.0, -1.0)
        return rng.uniform(low, high, shape).astype(np.float32)
    scales = {"embed_tokens.weight": 1.0, "conv1d.weight": 0.4, "mlp.gate.weight": 0.2}
    usual = 0.1 if "norm" in name else shape[-1] ** -0.5
    scale = next((scales[end] for end in scales if name.endswith(end)), usual)
    centre = name.endswith("linear_attn.norm.weight")  # a plain factor; other norms store the distance from 1
    return (rng.standard_normal(shape) * scale + centre).astype(np.float32)


def _split_experts(name: str, values: FloatArray) -> list[tuple[str, FloatArray]]:
    """The per-expert tensors of a fused one; any other tensor as it is."""
    stem, _, kind = name.rpartition(".")
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if names is None:
        return [(name, values)]
    pairs = [(expert, zip(names, np.split(matrix, len(names)))) for expert, matrix in enumerate(values)]
    return [(f"{stem}.{expert}.{part}.weight", rows) for expert, parts in pairs for part, rows in parts]


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Files of about equal size in the order of names, and their index. An expert may well lie in two of them."""
    ends = list(accumulate(tensor.nbytes for tensor in tensors.values()))
    shard_of = {name: (end - 1) * shards // ends[-1] for name, end in zip(tensors, ends)}
    files = [list(names) for _, names in groupby(tensors, key=shard_of.__getitem__)]
    weight_map: dict[str, str] = {}
    for n, names in enumerate(files, start=1):
        file = f"model.safetensors-{n:05d}-of-{len(files):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = directory / "model.safetensors.index.json"
    _write_json(index, {"metadata": {"total_size": ends[-1]}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""What a Qwen3.5-MoE config says: the model's sizes and constants, with the family's defaults, validated once.

Read by moe-convert (which tensors must be there, in which shape) and by moe-run (how to compute). Anything in a config
that would change the answer and is not computed here is refused, never ignored.

    architecture = Architecture.from_config(json.loads(Path("config.json").read_text()))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepack.layout.spec import MAX_DIMENSION, MAX_EXPERTS, MAX_LAYERS

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
LINEAR, FULL = "linear_attention", "full_attention"

# The family's fixed choices: a config may leave them out; any other value is another model.
FIXED = {
    "attention_bias": False,
    "attn_output_gate": True,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mtp_use_dedicated_embeddings": False,
}


MAX_CONV_TAPS = 8  # what the kernels hold; every model of the family has 4


@dataclass(frozen=True)
class Architecture:
    """The text model. Names are the config's own; sizes in elements."""

    hidden_size: int
    vocab_size: int
    layer_types: tuple[str, ...]  # LINEAR or FULL for each layer
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # the first dimensions of a head that rope turns
    rope_theta: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    mtp_num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def linear_key_dim(self) -> int:
        """Width of all DeltaNet queries, and of all keys, of a token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Width of all DeltaNet values of a token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the DeltaNet convolution: queries, keys, values."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    @classmethod
    def from_config(cls, root: Mapping[str, Any]) -> Architecture:
        """Read a config.json, nested (text_config) or flat. Defaults are those of the 35B release.

        Raises ValueError naming the key, what was expected and what was found.
        """
        config = root.get("text_config", root)
        for holder in (root, config):
            if not isinstance(holder, Mapping):
                raise ValueError("text_config: expected an object")
            if holder.get("model_type") not in (None, *MODEL_TYPES):
                raise ValueError(
                    f"model_type: expected one of {', '.join(MODEL_TYPES)}, found {holder['model_type']!r}: "
                    "another architecture, which moepack does not run"
                )
        if root.get("model_type") is None and config.get("model_type") is None:
            raise ValueError("model_type: expected qwen3_5_moe, found nothing: is this the model's config.json?")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key}: expected {value!r}, found {config[key]!r}: not computed here")
        number = _Numbers(config)
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters: expected an object, found {str(rope)[:40]}")
        for key, settings in (("rope_parameters", rope), ("rope_scaling", config.get("rope_scaling") or {})):
            if not isinstance(settings, Mapping):
                raise ValueError(f"{key}: expected an object, found {str(settings)[:40]}")
            for name in ("rope_type", "type"):  # the second is the older name, which transformers still reads
                if settings.get(name) not in (None, "default"):
                    kind = str(settings[name])[:40]
                    raise ValueError(f"{key}.{name}: expected default, found {kind!r}: not computed")
        head_dim = number.integer("head_dim", 256)
        rope_number = _Numbers({**config, **{key: value for key, value in rope.items() if value is not None}})
        partial = rope_number.real("partial_rotary_factor", 0.25, high=1)
        rotary_dim = int(head_dim * partial)
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(f"partial_rotary_factor: {partial} of head_dim {head_dim} is no even rotary dimension")
        result = cls(
            hidden_size=number.integer("hidden_size"),
            vocab_size=number.integer("vocab_size"),
            layer_types=_layer_types(config, number.integer("num_hidden_layers", high=MAX_LAYERS)),
            num_attention_heads=number.integer("num_attention_heads", 16),
            num_key_value_heads=number.integer("num_key_value_heads", 2),
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=rope_number.real("rope_theta", 1e7, high=1e30),
            linear_num_key_heads=number.integer("linear_num_key_heads", 16),
            linear_num_value_heads=number.integer("linear_num_value_heads", 32),
            linear_key_head_dim=number.integer("linear_key_head_dim", 128),
            linear_value_head_dim=number.integer("linear_value_head_dim", 128),
            linear_conv_kernel_dim=number.integer("linear_conv_kernel_dim", 4, low=2, high=MAX_CONV_TAPS),
            num_experts=number.integer("num_experts", 256, high=MAX_EXPERTS),
            num_experts_per_tok=number.integer("num_experts_per_tok", 8),
            moe_intermediate_size=number.integer("moe_intermediate_size", 512),
            shared_expert_intermediate_size=number.integer("shared_expert_intermediate_size", 512),
            mtp_num_hidden_layers=number.integer("mtp_num_hidden_layers", 0, low=0, high=MAX_LAYERS),
            max_position_embeddings=number.integer("max_position_embeddings", 262144),
            rms_norm_eps=number.real("rms_norm_eps", 1e-6, high=1),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", root.get("tie_word_embeddings", False))),
        )
        result._check_relations()
        return result

    def _check_relations(self) -> None:
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}: {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok: {self.num_experts_per_tok} of {self.num_experts} experts")


class _Numbers:
    """A config whose numbers are taken out checked; null means the default."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_DIMENSION) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{key}: expected an integer from {low} to {high}, found {str(value)[:40]}")
        return value

    def real(self, key: str, default: float, high: float) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value <= high:
            raise ValueError(f"{key}: expected a number above 0, at most {high:g}, found {str(value)[:40]}")
        return float(value)


def _layer_types(config: Mapping[str, Any], num_hidden_layers: int) -> tuple[str, ...]:
    interval = config.get("full_attention_interval", 4)
    listed = config.get("layer_types")
    if listed is None:
        if type(interval) is not int or interval < 1:
            raise ValueError(f"full_attention_interval: expected a positive integer, found {interval!r}")
        listed = [LINEAR if (layer + 1) % interval else FULL for layer in range(num_hidden_layers)]
    known = isinstance(listed, list) and all(kind in (LINEAR, FULL) for kind in listed)
    if not known or len(listed) != num_hidden_layers:
        raise ValueError(f"layer_types: expected {num_hidden_layers} entries, each {LINEAR} or {FULL}")
    return tuple(listed)


def resident_shapes(a: Architecture, mtp_layers: int) -> dict[str, tuple[int, ...]]:
    """Name in a pack and shape of every weight that is not a routed expert; the MTP head's for that many layers."""
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
    }
    if not a.tie_word_embeddings:
        expected["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    for layer, kind in enumerate(a.layer_types):
        expected |= _layer_shapes(f"model.layers.{layer}", kind, a)
    if mtp_layers:
        expected["mtp.fc.weight"] = (a.hidden_size, 2 * a.hidden_size)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            expected[f"mtp.{name}.weight"] = (a.hidden_size,)
    for layer in range(mtp_layers):
        expected |= _layer_shapes(f"mtp.layers.{layer}", FULL, a)
    return expected


def _layer_shapes(stem: str, kind: str, a: Architecture) -> dict[str, tuple[int, ...]]:
    shared, hidden = a.shared_expert_intermediate_size, a.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (a.num_experts, hidden),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }
    if kind == LINEAR:
        heads, values = a.linear_num_value_heads, a.linear_value_dim
        shapes |= {
            "linear_attn.in_proj_qkv.weight": (a.conv_dim, hidden),
            "linear_attn.in_proj_z.weight": (values, hidden),
            "linear_attn.in_proj_b.weight": (heads, hidden),
            "linear_attn.in_proj_a.weight": (heads, hidden),
            "linear_attn.conv1d.weight": (a.conv_dim, 1, a.linear_conv_kernel_dim),
            "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.norm.weight": (a.linear_value_head_dim,),
            "linear_attn.out_proj.weight": (hidden, values),
        }
    else:
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        shapes |= {
            "self_attn.q_proj.weight": (2 * queries, hidden),  # per head: query, then output gate
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (a.head_dim,),
            "self_attn.k_norm.weight": (a.head_dim,),
        }
    return {f"{stem}.{name}": shape for name, shape in shapes.items()}

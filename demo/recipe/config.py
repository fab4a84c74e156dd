"""The sizes of the demo model, under the names of its config.json, and that file's content.

One frozen value object, no choices to make: change a number here and model.py, train.py and export.py follow.
A config must keep head sizes even and `hidden_size` above the rotary part; nothing here checks it.

    Config().hub_config({"<|endoftext|>": 4070, ...})
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT_TOKENS = 2048

# A token row stores a token id and, in the highest bit of its 16, whether the token is trained on.
ID_MASK, TRAINED_BIT = 0x7FFF, 0x8000


@dataclass(frozen=True)
class Config:
    """A Qwen3.5-MoE text model of 27 million parameters; field names as in the published configs."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 8
    full_attention_interval: int = 4  # every 4th layer attends to all positions, the others are DeltaNet
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 10000.0
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    num_experts: int = 48
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 128
    rms_norm_eps: float = 1e-6

    def layer_type(self, layer: int) -> str:
        """Return `full_attention` or `linear_attention` for a layer counted from 0."""
        return "full_attention" if (layer + 1) % self.full_attention_interval == 0 else "linear_attention"

    def hub_config(self, token_ids: Mapping[str, int]) -> dict[str, Any]:
        """Return the content of config.json; `token_ids` maps special tokens to their ids."""
        return {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": token_ids["<|image_pad|>"],
            "video_token_id": token_ids["<|video_pad|>"],
            "vision_start_token_id": token_ids["<|vision_start|>"],
            "vision_end_token_id": token_ids["<|vision_end|>"],
            "tie_word_embeddings": False,
            "text_config": self._text_config(token_ids["<|endoftext|>"]),
        }

    def _text_config(self, eos_token_id: int) -> dict[str, Any]:
        return {
            "model_type": "qwen3_5_moe_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": eos_token_id,
            "full_attention_interval": self.full_attention_interval,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "layer_types": [self.layer_type(layer) for layer in range(self.num_hidden_layers)],
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_value_head_dim": self.linear_value_head_dim,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": CONTEXT_TOKENS,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.moe_intermediate_size,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": self.num_attention_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],  # text alone has one position, so the sections do not matter
            },
            "router_aux_loss_coef": 0.01,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

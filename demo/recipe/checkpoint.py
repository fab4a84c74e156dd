"""Write the trained model as a published checkpoint, and read one back.

The names follow the Qwen3.5-MoE releases: language model under `model.language_model.`, MTP layer with its
experts stored one by one, everything bfloat16 but two small float32 tensors per DeltaNet layer. `save_model`
writes weights and index only; export.py adds the files around them. `load_model` reads exactly what
`save_model` wrote.

    save_model(model, Path("ckpt")); model = load_model(Path("ckpt"), "cpu")
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import Config
from model import LanguageModel

PREFIX = "model.language_model."
SHARD_BYTES = 15 * 2**20  # small enough that the demo has several shards, as large checkpoints do
_FLOAT32 = ("A_log", "linear_attn.norm.weight")
_MTP_EXPERTS = "mtp.layers.0.mlp.experts."


def hub_state(model: LanguageModel) -> dict[str, Tensor]:
    """Return the model's tensors on the CPU under their published names, in their published types."""
    inner = model.config.moe_intermediate_size
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        tensor = parameter.detach().cpu()
        if not name.endswith(_FLOAT32):
            tensor = tensor.to(torch.bfloat16)
        if name == _MTP_EXPERTS + "gate_up_proj":
            for e, matrix in enumerate(tensor):
                state[f"{_MTP_EXPERTS}{e}.gate_proj.weight"] = matrix[:inner]
                state[f"{_MTP_EXPERTS}{e}.up_proj.weight"] = matrix[inner:]
        elif name == _MTP_EXPERTS + "down_proj":
            for e, matrix in enumerate(tensor):
                state[f"{_MTP_EXPERTS}{e}.down_proj.weight"] = matrix
        else:
            state[name if name.startswith(("mtp.", "lm_head")) else PREFIX + name] = tensor
    return state


def save_model(model: LanguageModel, folder: Path) -> int:
    """Write the shards and their index to `folder`; return the number of shards."""
    state = hub_state(model)
    shards: list[dict[str, Tensor]] = [{}]
    filled_bytes = 0
    for name, tensor in state.items():
        if filled_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = tensor.contiguous().clone()  # views of one matrix must not share memory in a file
        filled_bytes += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model.safetensors-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(shards)


def load_model(folder: Path, device: str) -> LanguageModel:
    """Return the model of a checkpoint folder, in float32. A missing or extra tensor raises RuntimeError."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(path))
    config = Config()

    def take_mtp_expert(expert: int, projection: str) -> Tensor:
        return state.pop(f"{_MTP_EXPERTS}{expert}.{projection}_proj.weight")

    gate_up, down = [], []
    for e in range(config.num_experts):
        gate_up.append(torch.cat([take_mtp_expert(e, "gate"), take_mtp_expert(e, "up")]))
        down.append(take_mtp_expert(e, "down"))
    state[_MTP_EXPERTS + "gate_up_proj"] = torch.stack(gate_up)
    state[_MTP_EXPERTS + "down_proj"] = torch.stack(down)
    model = LanguageModel(config)
    model.load_state_dict({name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()})
    return model.to(device).eval()

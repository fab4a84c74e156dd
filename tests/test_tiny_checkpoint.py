"""The maker of the tests' checkpoints: one model in every layout, as safetensors and transformers read it."""

import json

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tiny_checkpoint import PLAIN_ADDED_TOKENS, TOKEN_IDS, TOKENIZER_SIZE, TinyModel, write_checkpoint

SAME_NUMBERS = {
    "qwen3.5": {}, "flat": {"prefix": "model.", "config": "flat"}, "nested_short": {"prefix": "model."},
    "flat_long": {"config": "flat", "experts": "per_expert"}, "one_file": {"single_file": True},
    "per_expert": {"experts": "per_expert", "shards": 5},
}  # fmt: skip
LAYOUTS = SAME_NUMBERS | {
    "qwen3.6": {"mtp_experts": "fused", "float32_state": False}, "tied": {"model": TinyModel(tie=True)},
    "f16": {"dtype": "F16", "float32_state": False}, "f32": {"dtype": "F32", "model": TinyModel(head_dim=64)},
}  # fmt: skip


def read(directory):
    """Every tensor by name, and the file that it lies in."""
    files = {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
    tensors = {name: tensor for content in files.values() for name, tensor in content.items()}
    return tensors, {name: file for file, content in files.items() for name in content}


def test_repeats_to_the_byte_and_follows_the_seed(tmp_path):
    models = {"first": TinyModel(), "again": TinyModel(), "other": TinyModel(seed=1)}
    made = [write_checkpoint(tmp_path / name, model) for name, model in models.items()]
    first, again, other = ({path.name: path.read_bytes() for path in d.iterdir()} for d in made)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == set(read(made[0])[1].values())


def test_names_shapes_and_types(tmp_path):
    tensors, _ = read(write_checkpoint(tmp_path))
    layers = "model.language_model.layers."
    counts = {f"{layers}0.": 18, f"{layers}3.": 15, "mtp.": 4 + 13 + 6 * 3, "model.visual.": 1, "": 108}
    assert {start: sum(name.startswith(start) for name in tensors) for start in counts} == counts
    assert all(t.shape[-1] % 32 == 0 for name, t in tensors.items() if "layers" in name and "_proj" in name)
    float32 = {name.rpartition("linear_attn.")[2] for name, t in tensors.items() if t.dtype == torch.float32}
    assert float32 == {"A_log", "norm.weight"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_index_agree(tmp_path, layout):
    tensors, file_of = read(write_checkpoint(tmp_path, **LAYOUTS[layout]))
    if layout == "one_file":
        assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    else:
        assert len(set(file_of.values())) == LAYOUTS[layout].get("shards", 3)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert index["weight_map"] == file_of


def test_per_expert_tensors_are_slices_of_the_fused_ones(tmp_path):
    fused, _ = read(write_checkpoint(tmp_path / "fused", mtp_experts="fused"))
    split, _ = read(write_checkpoint(tmp_path / "split", experts="per_expert"))
    for stem in {name.rpartition(".")[0] for name in fused if name.endswith("experts.down_proj")}:
        for expert in range(6):
            gate, up, down = (split.pop(f"{stem}.{expert}.{k}_proj.weight") for k in ("gate", "up", "down"))
            assert torch.equal(torch.cat([gate, up]), fused[f"{stem}.gate_up_proj"][expert])
            assert torch.equal(down, fused[f"{stem}.down_proj"][expert])
    assert all(torch.equal(tensor, fused[name]) for name, tensor in split.items())


def test_tokenizer_and_template(tmp_path):
    write_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>user\nThe end of the 12th café — 🙂<|im_end|>\n<think>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE < TinyModel().vocab
    assert tokenizer.decode(list(TOKEN_IDS.values())) == "".join(PLAIN_ADDED_TOKENS)
    call = {"function": {"name": "f", "arguments": {"a": True, "b": [1]}}}
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    template = Environment().from_string((tmp_path / "chat_template.jinja").read_text())
    assert template.render(messages=messages, add_generation_prompt=True, enable_thinking=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>\n<function=f>\n"
        "<parameter=a>\nTrue\n</parameter>\n<parameter=b>\n[1]\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parity
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_it(tmp_path, layout):
    transformers = pytest.importorskip("transformers", reason="needs the extra: moepack[parity]")
    load = transformers.AutoModelForCausalLM.from_pretrained

    def logits(directory):
        model, info = load(directory, dtype=torch.float32, output_loading_info=True)
        assert not [*info["missing_keys"], *info["mismatched_keys"]]
        assert all(key.startswith(("mtp.", "model.visual.")) for key in info["unexpected_keys"])
        return model(torch.arange(1, 40)[None]).logits

    found = logits(write_checkpoint(tmp_path / "layout", **LAYOUTS[layout]))
    assert found.isfinite().all()
    if layout in SAME_NUMBERS:
        assert torch.equal(found, logits(write_checkpoint(tmp_path / "default")))

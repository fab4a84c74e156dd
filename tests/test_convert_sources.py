"""Which sources moe-convert refuses, and how: before any work, in one line that says what is wrong, leaving nothing.

What cannot be seen without reading every weight (a NaN) ends the work when it is met, and leaves no pack.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_command import SMALL, Result, problems_of, run_convert
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe
from moepack.layout.architecture import Architecture
from moepack.layout.errors import MoepackError
from tiny_checkpoint import write_checkpoint

Edit = Callable[[Path], object]
PREFIX = "model.language_model."
NORM = f"{PREFIX}norm.weight"
DOWN = f"{PREFIX}layers.1.mlp.experts.down_proj"
INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model.safetensors-00001-of-00002.safetensors"
PLACEHOLDER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5000000000\n"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sharded") / "source", SMALL, shards=2)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("one_file") / "source", SMALL, single_file=True)


def convert_copy(source: Path, folder: Path, edit: Edit, *options: object) -> Result:
    """Convert an edited copy of a checkpoint to `folder`/pack."""
    copy = Path(shutil.copytree(source, folder / "source"))
    edit(copy)
    return run_convert(copy, folder / "pack", "--group-size", 32, *options)


def assert_refused(result: Result, folder: Path, *parts: str, code: int = 1) -> None:
    """One line that names the source and holds all parts; nothing on stdout, nothing written."""
    assert (result.code, result.out) == (code, "")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == [], line
    assert not (folder / "pack").exists()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """An edit of the tensors of a checkpoint in one file."""

    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return edit


def json_file(name: str, change: Callable[[dict], object]) -> Edit:
    """An edit of a JSON file."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return edit


def text_config(**values: object) -> Edit:
    return json_file("config.json", lambda config: config["text_config"].update(values))


def remove(name: str) -> Edit:
    return lambda directory: (directory / name).unlink()


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


WRONG_TENSORS = {
    "missing": (lambda t: t.pop(NORM), "1 missing: model.norm.weight"),
    "missing expert": (
        lambda t: t.pop("mtp.layers.0.mlp.experts.2.up_proj.weight"),
        "1 missing: mtp.layers.0.mlp.experts.2.up_proj.weight",
    ),
    "missing fused": (lambda t: t.pop(DOWN), "1 missing: model.layers.1.mlp.experts.down_proj"),
    "many missing": (lambda t: [t.pop(name) for name in list(t) if "layers.0." in name and "mtp" not in name], "more"),
    "no experts": (lambda t: [t.pop(name) for name in list(t) if "0.mlp.experts" in name], "experts.0.gate_proj"),
    "misshapen": (
        lambda t: t.update({DOWN: t[DOWN].transpose(1, 2).contiguous()}),
        f"1 misshapen: {DOWN} is [3, 64, 96], expected [3, 96, 64]",
    ),
    "vector": (lambda t: t.update({NORM: torch.zeros(95)}), f"{NORM} is [95], expected [96]"),
    "scalar": (lambda t: t.update({NORM: torch.zeros(())}), f"{NORM} is [], expected [96]"),
    "one expert too many": (lambda t: t.update({DOWN: torch.zeros(4, 96, 64)}), "is [4, 96, 64], expected [3, 96, 64]"),
    "unexpected": (
        lambda t: t.update({f"{PREFIX}layers.0.mlp.gate.bias": torch.zeros(3)}),
        f"1 unexpected: {PREFIX}layers.0.mlp.gate.bias",
    ),
    "a layer too many": (lambda t: t.update({f"{PREFIX}layers.2.norm.weight": torch.zeros(96)}), "1 unexpected"),
    "fused and single": (
        lambda t: t.update({f"{PREFIX}layers.0.mlp.experts.0.up_proj.weight": torch.zeros(64, 96)}),
        "1 unexpected",
    ),
    "twice": (lambda t: t.update({"model.norm.weight": t[NORM].clone()}), "are the same tensor: keep one of them"),
    "half an MTP head": (lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.layers")], "missing: mtp."),
    "fp8": (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), f"{DOWN} is F8_E4M3, expected"),
    "integers": (lambda t: t.update({NORM: torch.zeros(96, dtype=torch.int32)}), f"{NORM} is I32, expected"),
    "float64": (lambda t: t.update({NORM: torch.zeros(96, dtype=torch.float64)}), f"{NORM} is F64"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_fit_the_config(one_file, tmp_path, case):
    change, expected = WRONG_TENSORS[case]
    result = convert_copy(one_file, tmp_path, tensors(change))
    assert_refused(result, tmp_path, str(tmp_path / "source"), expected)


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:size]


WRONG_FILES = {
    "no index": (remove(INDEX), (f"2 safetensors files but no {INDEX}", "download")),
    "no shard": (remove(FIRST_SHARD), (FIRST_SHARD, "No such file")),
    "no weights": (lambda d: [path.unlink() for path in d.glob("model*")], ("no safetensors file",)),
    "promise": (
        json_file(INDEX, lambda index: index["weight_map"].update({f"{PREFIX}extra": FIRST_SHARD})),
        (FIRST_SHARD, f"lacks {PREFIX}extra, which {INDEX} promises"),
    ),
    "unlisted": (
        json_file(INDEX, lambda index: index["weight_map"].pop(NORM)),
        (f"holds {NORM}, which {INDEX} places in no file",),
    ),
    "misplaced": (
        json_file(INDEX, lambda index: index["weight_map"].update({NORM: FIRST_SHARD})),
        (FIRST_SHARD, f"lacks {NORM}"),
    ),
    "escaping": (
        json_file(INDEX, lambda index: index["weight_map"].update({NORM: "../other.safetensors"})),
        (INDEX, "does not name plain files"),
    ),
    "index without map": (json_file(INDEX, lambda index: index.pop("weight_map")), (INDEX, "weight_map is missing")),
    "index no JSON": (rewrite(INDEX, cut(100)), (INDEX, "is no valid JSON")),
    "one byte short": (rewrite(FIRST_SHARD, cut(-1)), (FIRST_SHARD, "the file is truncated")),
    "one byte more": (rewrite(FIRST_SHARD, lambda content: content + b"\0"), (FIRST_SHARD, "bytes follow")),
    "half a header": (rewrite(FIRST_SHARD, cut(50)), (FIRST_SHARD, "header length")),
    "empty shard": (rewrite(FIRST_SHARD, cut(0)), (FIRST_SHARD, "is 0 bytes long")),
    "web page": (rewrite(FIRST_SHARD, lambda _: b"<!doctype html>" * 99), (FIRST_SHARD, "download it again")),
    "LFS shard": (rewrite(FIRST_SHARD, lambda _: PLACEHOLDER.encode()), (FIRST_SHARD, "Git LFS", "git lfs pull")),
    "LFS index": (rewrite(INDEX, lambda _: PLACEHOLDER.encode()), (INDEX, "Git LFS", "git lfs pull")),
    "LFS tokenizer": (rewrite("tokenizer.json", lambda _: PLACEHOLDER.encode()), ("tokenizer.json", "Git LFS")),
    "half a tokenizer": (rewrite("tokenizer.json", cut(500)), ("tokenizer.json", "is no valid JSON")),
    "no config": (remove("config.json"), ("config.json", "cannot be read (No such file or directory)")),
    "config no JSON": (rewrite("config.json", cut(-10)), ("config.json", "is no valid JSON")),
    "config a list": (rewrite("config.json", lambda _: b"[]"), ("config.json", "expected a JSON object")),
    "no tokenizer": (remove("tokenizer.json"), ("lacks tokenizer.json",)),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_are_missing_or_damaged(sharded, tmp_path, case):
    edit, expected = WRONG_FILES[case]
    result = convert_copy(sharded, tmp_path, edit)
    assert_refused(result, tmp_path, str(tmp_path / "source"), *expected)


def test_no_such_source(tmp_path):
    result = run_convert(tmp_path / "nowhere", tmp_path / "pack")
    assert_refused(result, tmp_path, str(tmp_path / "nowhere"), "no such directory")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    result = run_convert(tmp_path / "weights.safetensors", tmp_path / "pack")
    assert_refused(result, tmp_path, "weights.safetensors", "directory")


def root_config(**values: object) -> Edit:
    return json_file("config.json", lambda config: config.update(values))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WRONG_CONFIGS = {
    "model_type": (text_config(model_type="qwen3_moe"), ("model_type", "'qwen3_moe'")),
    "root model_type": (root_config(model_type="llama"), ("model_type", "'llama'")),
    "attention_bias": (text_config(attention_bias=True), ("attention_bias", "False", "True")),
    "yarn": (text_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ("rope_type", "'yarn'")),
    "older yarn": (text_config(rope_parameters={"type": "yarn", "factor": 4.0}), ("rope_parameters.type", "'yarn'")),
    "rope_scaling": (text_config(rope_scaling={"type": "linear", "factor": 2.0}), ("rope_scaling.type", "linear")),
    "rope_scaling as text": (text_config(rope_scaling="linear"), ("rope_scaling", "expected an object")),
    "hidden_act": (text_config(hidden_act="gelu"), ("hidden_act", "'silu'", "'gelu'")),
    "no gate": (text_config(attn_output_gate=False), ("attn_output_gate", "True", "False")),
    "dense layers": (text_config(mlp_only_layers=[1]), ("mlp_only_layers", "[1]")),
    "layer_types": (text_config(layer_types=["linear_attention"]), ("layer_types", "2 entries")),
    "other layers": (text_config(layer_types=["linear_attention", "sliding_attention"]), ("layer_types", "2 entries")),
    "number as text": (text_config(num_experts="3"), ("num_experts", "expected an integer")),
    "no hidden_size": (json_file("config.json", lambda c: c["text_config"].pop("hidden_size")), ("hidden_size",)),
    "other vocab_size": (text_config(vocab_size=321), ("misshapen", "is [320, 96], expected [321, 96]")),
    "fp8": (root_config(quantization_config=FP8), ("config.json says fp8", "weight_scale_inv", "different releases")),
    "gptq": (root_config(quantization_config=GPTQ), ("config.json says gptq", "qweight")),
    "mlx": (root_config(quantization={"group_size": 64, "bits": 4}), ("config.json says mlx", "scales")),
    "fp8 within": (text_config(quantization_config=FP8), ("config.json says fp8",)),
    "fp8 without blocks": (root_config(quantization_config={"quant_method": "fp8"}), ("weight_block_size", "None")),
    "gptq of 3 bits": (root_config(quantization_config={**GPTQ, "bits": 3}), ("bits", "2, 4, 8", "'3'")),
    "gptq without groups": (root_config(quantization_config={**GPTQ, "group_size": 0}), ("group_size", "'0'")),
    "mxfp4": (root_config(quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"}), ("mode", "affine", "'mxfp4'")),
    "awq": (root_config(quantization_config={"quant_method": "awq", "bits": 4}), ("'awq' is not read", "BF16, FP8")),
    "quantization as text": (root_config(quantization_config="fp8"), ("quantization", "expected an object", "'fp8'")),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configs_that_moepack_does_not_compute(sharded, tmp_path, case):
    edit, expected = WRONG_CONFIGS[case]
    result = convert_copy(sharded, tmp_path, edit)
    assert_refused(result, tmp_path, str(tmp_path / "source"), *expected)


def crash(source: Path, config: dict) -> str | None:
    """What a config does to the plan other than being refused in one line; None if that is all, or if it plans."""
    (source / "config.json").write_text(json.dumps(config))
    try:
        Architecture.from_config(config)
    except ValueError as refusal:  # as the plan refuses it too, at many times the cost
        return str(refusal) if "\n" in str(refusal) else None
    try:
        plan_conversion(source, source.parent / "pack", Recipe(4, 32, 8, "minmax"))
    except MoepackError as refusal:
        return str(refusal) if "\n" in str(refusal) else None
    except Exception as error:
        return repr(error)
    return None


def test_a_value_of_the_wrong_kind_is_refused_in_one_line(one_file, tmp_path):
    """Or plans: what nobody reads may be anything."""
    source = Path(shutil.copytree(one_file, tmp_path / "source"))
    original = (source / "config.json").read_text()
    config = json.loads(original)
    places = [("text_config", key) for key in config["text_config"]]
    places += [("text_config", "rope_parameters", key) for key in config["text_config"]["rope_parameters"]]
    places += [(key,) for key in (*config, "quantization", "quantization_config")]
    crashes = {}
    for place in places:
        for value in (None, True, -1, 2**70, "x", [{}, {}], {"a": 1}):
            changed = json.loads(original)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            if said := crash(source, changed):
                crashes[".".join(place), str(value)] = said
    assert crashes == {}


@pytest.mark.parametrize(("options", "expected"), [
    (("--group-size", 64), ("gate_proj", "group size 64 does not divide the row length 96", "--group-size")),
    (("--group-size", 128), ("group size 128 does not divide the row length 96", "--group-size")),
    (("--group-size", 64, "--bits", 16), ("group size 64", "row length 96", "weight", "--resident-bits 16")),
])  # fmt: skip
def test_a_group_size_that_does_not_divide_a_row(sharded, tmp_path, options, expected):
    assert_refused(run_convert(sharded, tmp_path / "pack", *options), tmp_path, *expected, code=2)


def nan_in(name: str, *place: int, value: float = float("nan")) -> Edit:
    def change(content: dict[str, torch.Tensor]) -> None:
        content[name][place] = value

    return tensors(change)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("edit", "expected"), [
    (nan_in(DOWN, 2, 95, 63), (DOWN, "expert 2", "NaN")),
    (nan_in(f"{PREFIX}layers.0.mlp.experts.gate_up_proj", 1, 64, 0, value=float("-inf")), ("gate_up_proj", "expert 1")),
    (nan_in("mtp.layers.0.mlp.experts.2.up_proj.weight", 0, 0), ("mtp.layers.0.mlp.experts.2.up_proj.weight", "NaN")),
    (nan_in("lm_head.weight", 319, 95), ("lm_head.weight", "NaN")),
    (nan_in(f"{PREFIX}layers.0.linear_attn.A_log", 3), ("layers.0.linear_attn.A_log", "NaN")),
])  # fmt: skip
def test_a_weight_that_is_not_finite_is_named(one_file, tmp_path, edit, expected, bits):
    result = convert_copy(one_file, tmp_path, edit, "--bits", bits)
    assert (result.code, result.out, len(result.errors)) == (1, "", 1)
    assert [part for part in (str(tmp_path / "source"), *expected) if part not in result.errors[0]] == []
    assert not (tmp_path / "pack" / "manifest.json").exists()
    assert not list((tmp_path / "pack").rglob("*.partial"))


def without_mtp(directory: Path) -> None:
    tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])(directory)


def template_in_tokenizer_config(directory: Path) -> None:
    template = (directory / "chat_template.jinja").read_text()
    json_file("tokenizer_config.json", lambda config: config.update(chat_template=template))(directory)
    remove("chat_template.jinja")(directory)


VISION_NOTE = "skipped 1 tensors (vision tower"
CONVERTS_WITH_NOTES = {
    "vision": (lambda directory: None, ()),
    "mtp dropped": (without_mtp, ("the config names an MTP head, the checkpoint has none",)),
    "mtp unnamed": (text_config(mtp_num_hidden_layers=0), ("skipped 26 tensors (MTP head",)),
    "no generation_config": (remove("generation_config.json"), ("generation_config.json is missing",)),
    "no template": (remove("chat_template.jinja"), ("no chat template",)),
    "no tokenizer_config": (remove("tokenizer_config.json"), ("tokenizer_config.json is missing",)),
    "template elsewhere": (template_in_tokenizer_config, ()),
    "unquantized config": (root_config(quantization_config=None), ()),
}


@pytest.mark.parametrize("case", CONVERTS_WITH_NOTES)
def test_what_a_pack_will_lack_is_said(one_file, tmp_path, case):
    edit, expected = CONVERTS_WITH_NOTES[case]
    result = convert_copy(one_file, tmp_path, edit)
    assert (result.code, result.errors) == (0, [])
    notes = sorted(result.notes)
    for note, start in zip(notes, sorted((VISION_NOTE, *expected)), strict=True):
        assert note.startswith(start)
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert sorted(manifest["provenance"]["notes"]) == notes
    assert problems_of(tmp_path / "pack") == []


def test_rounding_at_16_bits_is_said(tmp_path):
    source = write_checkpoint(tmp_path / "source", SMALL, dtype="F32")
    result = run_convert(source, tmp_path / "pack", "--bits", 16, "--resident-bits", 16)
    assert result.code == 0
    assert any("F32" in note and "bf16" in note for note in result.notes)

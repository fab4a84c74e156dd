"""The Metal kernels as text: what Apple's compiler would see, as far as another can tell; what hosts rely on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moepack.kernels import launches, msl, prompt_launches, reference, token_launches
from moepack.kernels.forms import PLAIN_STORAGES
from moepack.kernels.msl import KernelTextError, Source, parse

ROOT = Path(__file__).resolve().parents[1]
FILES = msl.list_files()
MAX_LINES = 250
CLANG = shutil.which("clang++")
ELSEWHERE = ("KeyValueCache.append", "torch.argmax")  # what a kernel is compared with, beside reference.py
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "[[kernel, max_total_threads_per_threadgroup(64)]] void"

needs_clang = pytest.mark.skipif(CLANG is None, reason="needs clang++ (Debian's package clang)")


def check_with_clang(source: Source, folder: Path) -> str:
    """What clang's OpenCL C++ front end has against a file: "" if nothing."""
    file = folder / f"{source.name}.clcpp"
    file.write_text(msl.opencl_text(source))
    options = ["-x", "clcpp", "-cl-std=clc++", "-target", "spir64", "-fsyntax-only", "-Wno-unknown-attributes"]
    options += ["-Xclang", "-finclude-default-header", "-I", str(msl.SHIM / "opencl")]
    return subprocess.run([str(CLANG), *options, str(file)], capture_output=True, text=True).stderr


@needs_clang
@pytest.mark.parametrize("name", FILES)
def test_clang_accepts_the_address_spaces(name: str, tmp_path: Path) -> None:
    assert check_with_clang(msl.load(name), tmp_path) == ""


@needs_clang
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("threadgroup float shared[4]; take(shared);", "no matching function"),
        ("thread float* p = x; p[0] = 1.0f;", "cannot initialize"),
        ("x[0] = undeclared;", "undeclared"),
        ("uint3 g = 1.0f +;", "expected"),
    ],
)
def test_clang_refuses_what_apples_compiler_would(body: str, complaint: str, tmp_path: Path) -> None:
    """The check above can fail: a pointer that changes its address space, a missing name, a syntax error."""
    taker = "inline void take(device float* p) { p[0] = 1.0f; }\n"
    kernel = f"{KERNEL} broken(device float* x [[buffer(0)]]) {{ {body} }}\n"
    assert complaint in check_with_clang(parse("broken", HEAD + taker + kernel), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name: str) -> None:
    """Its header names the reference and the test, and both exist; it is short."""
    text = (msl.METAL / f"{name}.metal").read_text()
    assert text.count("\n") <= MAX_LINES
    comment = " ".join(line.lstrip("/ ") for line in text.splitlines() if line.startswith("//"))
    references = re.search(r"Reference: ([\w, .]+?)\. Test: ", comment)
    test = re.search(r"Test: (test_\w+\.py)", comment)
    assert "Threads" in comment
    assert "ound by" in comment
    assert references, "no Reference: in the header"
    assert test, "no Test: in the header"
    for operation in references[1].split(", "):
        assert operation in ELSEWHERE or hasattr(reference, operation), operation
    for kernel in msl.load(name).kernels:
        assert f"launches.{kernel}(" in (ROOT / "tests" / test[1]).read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_kernel_has_its_launch(name: str) -> None:
    for kernel in msl.load(name).kernels:
        assert hasattr(launches, kernel), kernel


@pytest.mark.parametrize("name", FILES)
def test_the_restricted_style(name: str) -> None:
    """What torch.mps.compile_shader or the translations would not take."""
    text = re.sub(r"//[^\n]*", "", msl.load(name).text)
    assert not re.search(r"\b(auto|function_constant|goto|printf|atomic_\w+|static|virtual|new|double)\b", text)
    assert text.count("#include") == 1, "all but <metal_stdlib> is filled in"
    assert "constant constexpr" not in re.sub(r"^constant constexpr [^\n]*$", "", text, flags=re.M)


def constants_of_all() -> dict[tuple[str, str], int]:
    """By file and name."""
    files = [*FILES, *(path.stem for path in msl.CUDA.glob("*.cu"))]
    return {(name, constant): int(value) for name in files for constant, value in constants_of(name).items()}


def test_geometry_is_that_of_the_text() -> None:
    """The modules of launches repeat some constants of the files."""
    values = constants_of_all()
    assert values["linears", "UNIT"] == launches.UNIT
    assert values["linears", "LINEAR_ROWS"] == launches.LINEAR_ROWS
    assert values["linears", "LINEAR_SIMDGROUPS"] == launches.LINEAR_SIMDGROUPS
    assert values["linears", "STAGED"] * 4 == 16 * (values["linears", "STAGED_QUADS"] - 8)
    assert values["linears", "STAGED_UNITS"] * 8 == values["linears", "STAGED_QUADS"]
    lanes = values["linears", "LINEAR_SIMDGROUPS"] * launches.LANES
    assert values["linears", "STAGED"] == values["linears", "STAGED_EACH"] * 4 * lanes
    assert values["experts", "GATE_UP_ROWS"] == launches.GATE_UP_ROWS
    assert values["experts", "DOWN_ROWS"] == launches.DOWN_ROWS
    assert values["linears", "SIMDGROUPS"] == launches.SIMDGROUPS
    assert values["experts", "MAX_PLACES"] == launches.MAX_PLACES
    assert values["experts", "MAX_CHUNKS"] == launches.MAX_CHUNKS
    assert values["experts", "MAX_ROWS"] == launches.MAX_ROWS
    assert values["causal_conv", "MAX_TAPS"] == launches.MAX_TAPS
    assert values["delta_step", "ROWS"] == launches.DELTA_ROWS
    assert values["delta_step", "SIMDGROUPS"] * launches.LANES == launches.DELTA_THREADS
    assert values["delta_step", "MAX_WIDTH"] == values["rope_cache", "MAX_WIDTH"] == launches.MAX_WIDTH
    assert values["attention_step", "EACH"] * 32 == launches.MAX_WIDTH
    assert values["attention_step", "SPLIT_POSITIONS"] == launches.SPLIT_POSITIONS
    assert values["attention_step", "MAX_SPLITS"] == launches.MAX_SPLITS
    assert values["attention_step", "SIMDGROUPS"] == launches.SPLIT_SIMDGROUPS
    assert values["attention_step", "COMBINE_SIMDGROUPS"] == launches.COMBINE_SIMDGROUPS
    assert values["choose_experts", "MAX_EACH"] * 32 == launches.MAX_EXPERTS
    assert launches.MAX_CHOSEN + 1 == launches.LANES == launches.MAX_PLACES
    assert values["argmax", "PART"] == launches.ARGMAX_PART == values["argmax", "EACH"] * launches.ARGMAX_THREADS
    assert values["argmax", "SIMDGROUPS"] * launches.LANES == launches.ARGMAX_THREADS
    assert values["matmul", "TILE"] == launches.TILE
    assert values["matmul", "TILE_THREADS"] == launches.TILE_THREADS
    assert values["matmul", "STRIDE"] * values["matmul", "TILE"] == values["matmul", "TILE_FLOATS"]
    assert values["delta_scan", "COLUMNS"] == launches.SCAN_COLUMNS
    assert values["attention_tiles", "QUERIES"] == values["attention_step", "QUERIES"] == launches.QUERIES
    assert values["delta_scan", "SIMDGROUPS"] == launches.SCAN_SIMDGROUPS
    assert values["delta_scan", "MAX_ROWS"] * 8 == launches.MAX_WIDTH
    assert values["causal_conv", "TOKENS"] == launches.CONV_TOKENS
    assert values["attention_tiles", "SIMDGROUPS"] == launches.TILES_SIMDGROUPS
    storages = {values["linears", name] for name in ("BF16", "F16", "F32")}
    assert storages == set(PLAIN_STORAGES.values())


def test_geometry_of_a_token_is_that_of_the_text() -> None:
    """The same of token_launches.py."""
    values = constants_of_all()
    assert values["linears_bytes", "TILE_ROWS"] == token_launches.TILE_ROWS
    assert values["linears_bytes", "STRIP"] == token_launches.STRIP
    assert values["linears_bytes", "MAX_STRIPS"] == token_launches.MAX_STRIPS
    assert values["linears_bytes", "MAX_SIMDGROUPS"] == token_launches.MAX_SIMDGROUPS
    strips = values["linears_bytes", "MAX_STRIPS"] * values["linears_bytes", "STRIP_QUADS"]
    assert values["linears_bytes", "DIGIT_QUADS"] == strips + values["linears_bytes", "ZERO_QUADS"]
    lines = 2 * values["linears_bytes", "MAX_SIMDGROUPS"] * values["linears_bytes", "LINE_QUADS"]
    assert values["linears_bytes", "ALL_LINE_QUADS"] == lines
    assert values["linears_plain", "PLAIN_SIMDGROUPS"] == token_launches.PLAIN_SIMDGROUPS
    assert values["linears_plain", "KEEPERS"] == token_launches.KEEPERS
    plain = {name: value for (file, name), value in values.items() if file == "linears_plain"}
    assert plain["ROW_STRIPS"] * plain["ROW_STRIP"] == token_launches.PLAIN_COLUMNS
    threads = plain["PLAIN_SIMDGROUPS"] * launches.LANES
    assert plain["KEPT"] * plain["KEEPERS"] * threads * 4 == token_launches.PLAIN_COLUMNS
    assert values["experts_vector", "TILE_ROWS"] == token_launches.TILE_ROWS
    assert values["experts_vector", "STRIP_UNITS"] == token_launches.STRIP_UNITS
    vector = {name: value for (file, name), value in values.items() if file == "experts_vector"}
    assert vector["UNIT_QUADS"] * 4 + vector["KNOWN_QUADS"] * 4 // 2 == token_launches.DIGITS_WORDS
    assert vector["GATE_UP_THREADS"] == token_launches.GATE_UP_THREADS
    assert vector["X_UNITS"] * launches.UNIT == token_launches.MAX_COLUMNS
    assert vector["X_QUADS"] == vector["X_UNITS"] * vector["UNIT_QUADS"] + vector["ZERO_QUADS"]
    assert vector["X_KNOWN"] == vector["X_UNITS"] // 2
    assert vector["GATE_UP_LINES"] == 4 * 16 * vector["LINE_QUADS"]
    units = token_launches.MAX_WIDTH // launches.UNIT
    assert vector["HIDDEN_QUADS"] == units * vector["UNIT_QUADS"]
    assert vector["HIDDEN_KNOWN"] == units // 2
    assert vector["HIDDEN_LINES"] == units // vector["SPAN_UNITS"] * vector["LINE_QUADS"]
    assert vector["DOWN_SIMDGROUPS"] == token_launches.DOWN_SIMDGROUPS
    assert vector["FEW_PLACES"] == token_launches.FEW_PLACES
    for prefix, simdgroups in (("DOWN", token_launches.DOWN_SIMDGROUPS), ("FEW", token_launches.FEW_PLACES)):
        assert vector[f"{prefix}_QUADS"] == simdgroups * vector["HIDDEN_QUADS"] + vector["ZERO_QUADS"]
        assert vector[f"{prefix}_KNOWN"] == simdgroups * vector["HIDDEN_KNOWN"]
        assert vector[f"{prefix}_LINES"] == simdgroups * vector["HIDDEN_LINES"]


def test_geometry_of_a_prompt_is_that_of_the_text() -> None:
    """The same of prompt_launches.py."""
    values = constants_of_all()
    for name in ("split_rows", "matmul_halves", "experts_halves"):
        assert values[name, "SUMMED"] == prompt_launches.SUMMED
        assert values[name, "SUMS"] == prompt_launches.SUMS
    for name in ("matmul_halves", "experts_halves"):
        assert values[name, "TILE_TOKENS"] == prompt_launches.TILE_TOKENS == values[name, "TOKEN_EIGHTS"] * 8
        assert values[name, "TILE_ROWS"] == prompt_launches.TILE_ROWS
        assert values[name, "SIMD_ROWS"] == values[name, "ROW_TILES"] * 16
        assert values[name, "HALVES_THREADS"] == prompt_launches.THREADS
        quads = sum(values[name, of_all] for of_all in ("INPUT_QUADS", "WEIGHT_QUADS", "LINE_QUADS"))
        assert values[name, "HALVES_QUADS"] == 2 * quads + 3 * values[name, "TILE_TOKENS"] // 4
    assert values["experts_halves", "PAIR_ROWS"] == prompt_launches.PAIR_ROWS
    assert values["order_pairs", "TILE_TOKENS"] == prompt_launches.TILE_TOKENS
    assert values["order_pairs", "PAIR_THREADS"] == prompt_launches.PAIR_THREADS
    assert values["order_pairs", "PAIR_SIMDGROUPS"] * launches.LANES == prompt_launches.PAIR_THREADS


def constants_of(name: str) -> dict[str, str]:
    return dict(re.findall(r"constant constexpr uint (\w+) = (\d+);", msl.load(name).text))


def test_structs_are_packed_as_c_lays_them_out() -> None:
    structs = msl.load("experts").structs
    assert structs["Place"].pack(offset=2**40 + 1, form=2, rank=3).hex() == "0100000000010000" + "02000000" + "03000000"
    assert structs["Place"].pack_rows([(2**40 + 1, 2, 3)]) == structs["Place"].pack(offset=2**40 + 1, form=2, rank=3)
    assert structs["MatrixForm"].size_bytes == 48
    assert structs["ExpertForm"].size_bytes == 3 * 48 + 8
    mixed = parse("mixed", "struct A { uint x; ulong y; float z[3]; };")
    assert mixed.structs["A"].pack(x=1, y=2, z=[0.5, 1, 2])[8:16] == (2).to_bytes(8, "little")
    assert mixed.structs["A"].size_bytes == 32
    assert mixed.structs["A"].pack_rows([(1, 2, 0.5, 1, 2)]) == mixed.structs["A"].pack(x=1, y=2, z=[0.5, 1, 2])
    with pytest.raises(KernelTextError, match="fields"):
        structs["Place"].pack(offset=1, form=2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"{KERNEL} k(device float* x [[buffer(1)]]) {{ }}", "not 0, 1, 2"),
        (f"{KERNEL} k(device float* x) {{ }}", "without an attribute"),
        (f"{KERNEL} k(float x [[buffer(0)]]) {{ }}", "a buffer is"),
        (f"{KERNEL} k(device float& x [[buffer(0)]]) {{ }}", "a buffer is"),
        (f"{KERNEL} k(uint x [[thread_position_in_grid]]) {{ }}", "not among those"),
        ("kernel void k(device float* x [[buffer(0)]]) { }", "restricted style"),
        ("[[kernel, max_total_threads_per_threadgroup(2048)]] void k(device float* x [[buffer(0)]]) { }", "at most"),
        ("struct S { half x; };", "cannot read"),
    ],
)
def test_a_text_outside_the_style_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(KernelTextError, match=complaint):
        parse("bad", text)


def test_arguments_are_checked_against_the_signature() -> None:
    """Count, types, contiguity, struct sizes, threads: what a binding would silently take and a kernel misread."""
    x, weight, out = torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 8)
    launch = launches.rms_norm(x, weight, out, 1e-6)
    signature = msl.load("norms").kernels["rms_norm"]
    signature.check(launch.arguments, launch.group)
    shape = launch.arguments[3]
    assert isinstance(shape, bytes)
    assert [parameter.is_written for parameter in signature.buffers] == [False, False, True, False]
    for arguments, complaint in [
        ((x, weight, out), "takes 4 buffers, got 3"),
        ((x.double(), weight, out, shape), "float64"),
        ((x, weight.half(), out, shape), "float16"),
        ((x.T, weight, out, shape), "not contiguous"),
        ((x, shape, out, shape), "bytes"),
        ((x, weight, out, shape[:-4]), "12 bytes"),
        ((x, weight, out, torch.zeros(20, dtype=torch.uint8)), "20 bytes"),
    ]:
        with pytest.raises(KernelTextError, match=complaint):
            signature.check(arguments, launch.group)
    for group in [(1056, 1, 1), (48, 1, 1), (32, 2, 1), (0, 1, 1)]:
        with pytest.raises(KernelTextError, match="threadgroups of up to"):
            signature.check(launch.arguments, group)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    table = torch.zeros(16, dtype=torch.uint8)
    chosen = launches.choose_experts(torch.zeros(1, 9), ids, torch.zeros(1, 3), table, table)
    with pytest.raises(KernelTextError, match="int64"):
        msl.load("choose_experts").kernels["choose_experts"].check(chosen.arguments, chosen.group)


def test_launches_refuse_what_a_kernel_cannot_hold() -> None:
    def head(width: int) -> torch.Tensor:
        return torch.zeros(1, 1, width)

    with pytest.raises(ValueError, match="at most 8 taps"):
        launches.causal_conv(torch.zeros(1, 4), torch.zeros(4, 9), torch.zeros(8, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="heads of up to"):
        launches.delta_step(*[torch.zeros(4)] * 5, torch.zeros(1, 160, 256), torch.zeros(4), 1, 0, 0, 0, 1e-6)
    with pytest.raises(ValueError, match="at most 256 dimensions"):
        launches.attention_split(head(264)[0], head(264), head(264), torch.zeros(1), head(264), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="at most 1024 experts"):
        launches.choose_experts(torch.zeros(1, 1026), *[torch.zeros(1, 2)] * 4)
    with pytest.raises(ValueError, match="at most 31 experts"):
        launches.choose_experts(torch.zeros(1, 65), torch.zeros(1, 32), *[torch.zeros(1, 2)] * 3)
    with pytest.raises(ValueError, match="at most 32 heads share"):
        launches.attention_split(
            head(8)[0].expand(33, 8), head(8), head(8), torch.zeros(1), *[torch.zeros(33, 1, 8)] * 2
        )
    with pytest.raises(ValueError, match="at most 256 parts"):
        launches.attention_combine(torch.zeros(1, 257, 8), torch.zeros(1, 257, 2), head(8), *[torch.zeros(8)] * 3)
    with pytest.raises(ValueError, match="at most 32 experts"):
        launches.experts_down(
            [torch.zeros(1)] * 3, torch.zeros(1), torch.zeros(33 * 4), head(32)[0], torch.zeros(33), head(32)[0]
        )


@pytest.mark.parametrize("name", FILES)
def test_cuda_translations_have_no_metal_left(name: str) -> None:
    text = msl.translate(msl.load(name), "cuda")
    assert not re.search(r"\[\[|\b(device|constant|threadgroup|thread) |metal_stdlib", text)
    for kernel in msl.load(name).kernels.values():
        assert re.search(rf"__launch_bounds__\({kernel.max_threads}, \d\) {kernel.name}\(", text)


def test_the_choice_of_experts_waits_before_the_next_kernel_may_begin() -> None:
    """experts_gate_up of cuda/ counts on it, which shows on a GPU alone, and rarely; the others do it the other way."""
    orders = {"choose_experts": "wait_for_last.*launch_next", "causal_conv": "launch_next.*wait_for_last"}
    for name, order in orders.items():
        assert re.search(rf"{order}.* metal_text::{name}\(", msl.translate(msl.load(name), "cuda"))


def test_experts_gate_up_waits_before_experts_down_may_begin() -> None:
    """experts_down of cuda/ reads places and x before it waits: a copy, or two kernels before, has written them."""
    whole = msl.load("experts_vector").text
    assert whole.count("launch_next();") == 2  # the other is down's
    text = whole.split("void multiply_experts(")[1].split("[[kernel")[0]
    waits = text.index("wait_for_last();")
    assert waits < min(text.index("launch_next();"), text.index("places[group.y]"))

"""Rules of layout/FORMAT.md, by number: the text itself, what is in a manifest, where blocks lie.

Other rules are held by test_tensor_file, test_quantized, test_writer, test_verify, test_damage and test_golden; a test
here sees to it that none is forgotten.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_packs import GOLDEN, copy_pack, edit_manifest, read_everything, read_manifest, to_bytes
from moepack.layout import spec
from moepack.layout.errors import DamagedPack, MoepackError, UnsupportedVersion
from moepack.layout.geometry import BlockGeometry, LayerGeometry, Scheme
from moepack.layout.manifest import Manifest, ModelShape
from moepack.layout.reader import Pack
from moepack.layout.writer import write_resident_file

FORMAT = (Path(spec.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
REFUSAL_BYTES = 2**20  # a refused golden pack must not have cost more memory than this
ADVICE = "; the manifest is damaged: restore it or convert again"


def refuse(change: Callable[[dict[str, Any]], object], name: str = "mixed") -> str:
    """What is said about a golden pack's manifest after a change, signature renewed."""
    manifest = read_manifest(GOLDEN / name)
    change(manifest)
    with pytest.raises(DamagedPack) as caught:
        Manifest.from_bytes(to_bytes(manifest))
    text = str(caught.value)
    assert text.isprintable(), "one line"
    assert text.startswith("manifest.json: ")
    assert text.endswith(ADVICE)
    return text.removeprefix("manifest.json: ").removesuffix(ADVICE)


def accept(change: Callable[[dict[str, Any]], object], name: str = "mixed") -> Manifest:
    manifest = read_manifest(GOLDEN / name)
    change(manifest)
    return Manifest.from_bytes(to_bytes(manifest))


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a JSON tree with the way to it, containers before what they hold."""
    yield path, value
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(inner, (*path, key))


def holder_of(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def means_nothing_here(path: tuple[Any, ...]) -> bool:
    """What a manifest may say freely: where it comes from, and what of the model the geometry does not need."""
    return path[0] == "provenance" or path[-1] in ("architecture", "num_experts_per_tok")


# The text itself


def test_every_rule_has_a_test() -> None:
    rules = {int(number) for number in re.findall(r"^- \*\*F(\d+)\*\*", FORMAT, re.MULTILINE)}
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    tested = {int(number) for source in sources for number in re.findall(r"^def test_f(\d+)_", source, re.MULTILINE)}
    assert rules == set(range(1, 35))
    assert rules <= tested, f"without a test: {sorted(rules - tested)}"


def test_constants_of_the_text_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", FORMAT, re.MULTILINE))
    assert len(rows) == 16
    assert rows.pop("MAGIC") == f"`{spec.MAGIC}`"
    for name, text in rows.items():
        value = getattr(spec, name)
        assert text == (", ".join(map(str, value)) if isinstance(value, tuple) else str(value)), name
    sizes = dict(re.findall(r"^\| ([1248]) \| ([A-Z][A-Z0-9_ ]+) \|", FORMAT, re.MULTILINE))
    assert {dtype: int(size) for size, names in sizes.items() for dtype in names.split()} == spec.DTYPE_BYTES


def test_f14_worked_example_lists_the_sections() -> None:
    with Pack.open(GOLDEN / "minimal") as pack:
        block = pack.geometry(0).block(0)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (U32|BF16) \[(\d+), (\d+)\] \| `(\w+\.\w+)` \|", FORMAT, re.MULTILINE)
    listed = [
        (name, int(at), int(size), dtype, (int(rows_), int(columns))) for at, size, dtype, rows_, columns, name in rows
    ]
    assert listed == [(s.name, s.offset_bytes, s.size_bytes, s.dtype, s.shape) for s in block.sections]


def test_worked_example_dumps_the_golden_bytes() -> None:
    dumps = FORMAT.split("The start of `tests/golden")[1].split("All of `tests/golden")
    for dump, name in zip(dumps, ("experts/layer_00.bin", "resident.safetensors")):
        raw = (GOLDEN / "minimal" / name).read_bytes()
        lines = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} +)+)\|", dump, re.MULTILINE)
        assert len(lines) > 6
        for offset, digits in lines:
            found = bytes.fromhex(digits)
            assert raw[int(offset, 16) :].startswith(found), f"{name} at {offset}"


# The manifest


def test_f3_weights_by_hand() -> None:
    """The example's weights from its bytes with struct and integers alone, by the text and not by the code."""
    raw = (GOLDEN / "minimal" / "experts" / "layer_00.bin").read_bytes()
    widen = lambda pattern: struct.unpack("<f", struct.pack("<I", pattern << 16))[0]  # noqa: E731

    def matrix(bits: int, w_q: int, scales: int, biases: int) -> list[float]:
        weights = []
        for row in range(5):
            stream = int.from_bytes(raw[w_q + row * 4 * bits : w_q + (row + 1) * 4 * bits], "little")
            (scale,), (bias,) = (struct.unpack_from("<H", raw, start + 2 * row) for start in (scales, biases))
            weights += [(stream >> j * bits) % 2**bits * widen(scale) + widen(bias) for j in range(32)]
        return weights

    down = [widen(pattern) for pattern in struct.unpack_from("<160H", raw, 448)]
    expected = json.loads((GOLDEN / "expected.json").read_text())["minimal"]
    for projection, weights in (
        ("gate_proj", matrix(3, 0, 64, 128)),
        ("up_proj", matrix(4, 192, 320, 384)),
        ("down_proj", down),
    ):
        # Products are exact and the sums here fit float64, so float32's one rounding is all that can differ.
        rounded = [struct.unpack("<f", struct.pack("<f", weight))[0] for weight in weights]
        by_place = math.fsum(weight * (index % 97 + 1) for index, weight in enumerate(rounded))
        assert [math.fsum(rounded), by_place] == expected[f"experts/layer_00.bin expert 0 {projection}"]


def test_f4_refuses_what_is_no_strict_json_object() -> None:
    for raw, reason in (
        (b"", "line 1 column 1"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"magic": "moepack", "magic": "moepack"}', "key 'magic' stands twice"),
        (b'{"magic": NaN}', "NaN is not a JSON number"),
        (b'{"magic": 1e999}', "1e999 is not a JSON number"),
        (b'{"magic": "\\ud800"}', "holds half of a surrogate pair, which is no text"),
        (b'{"magic": "\xe9"}', "not UTF-8 text"),
        (b'{"magic": ' + b"[" * 100_000, "nested deeper than 64 levels"),
    ):
        with pytest.raises(DamagedPack, match=re.escape(reason)):
            Manifest.from_bytes(raw)


def test_f4_refuses_a_manifest_above_the_limit(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**33)  # sparse: takes no space, and must not be read to its end
    with pytest.raises(DamagedPack, match="is longer than the 33554432 bytes a manifest may have"):
        Manifest.read(tmp_path)


def test_f5_magic_comes_before_everything() -> None:
    with pytest.raises(DamagedPack, match="magic: expected 'moepack', found 'gguf'"):
        Manifest.from_bytes(b'{"format_version": 7, "magic": "gguf"}')
    with pytest.raises(DamagedPack, match="magic: expected str, found nothing"):
        Manifest.from_bytes(b"{}")


@pytest.mark.parametrize("version", [2, 3, 2**31])
def test_f6_refuses_an_unknown_version_with_both_numbers(version: int) -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        Manifest.from_bytes(b'{"magic": "moepack", "format_version": %d, "all else": "different"}' % version)
    assert str(caught.value) == (
        f"manifest.json: format version {version}, but this moepack reads version 1: "
        "install a newer moepack or convert the model again"
    )
    assert (caught.value.exit_code, caught.value.found, caught.value.supported) == (4, version, 1)


def test_f6_no_version_is_damage() -> None:
    for version, found in ((0, "found 0"), (-1, "found -1"), (2**31 + 1, "found 2147483649"), ("1", "expected int")):
        assert found in refuse(lambda manifest, version=version: manifest.update(format_version=version))


def test_f7_every_byte_counts() -> None:
    for name in ("minimal", "mixed"):
        raw = bytearray((GOLDEN / name / "manifest.json").read_bytes())
        for position in range(0, len(raw), 1 if name == "minimal" else 4):
            raw[position] ^= 1 + position % 255
            with pytest.raises((DamagedPack, UnsupportedVersion)):
                Manifest.from_bytes(bytes(raw))
            raw[position] ^= 1 + position % 255
        for longer in (raw + b" ", raw + b"\0", b" " + raw, raw[:-1]):
            with pytest.raises(DamagedPack):
                Manifest.from_bytes(bytes(longer))


def test_f7_digest_stands_once_and_as_it_is() -> None:
    raw = (GOLDEN / "minimal" / "manifest.json").read_bytes()
    digest = read_manifest(GOLDEN / "minimal")["manifest_sha256"]
    doubled = raw.replace(b'"provenance": {', b'"provenance": {"again": "%s",' % digest.encode())
    escaped = raw.replace(digest.encode(), b"%c\\u%04x" % (ord(digest[0]), ord(digest[1])) + digest[2:].encode())
    for changed, times in ((doubled, 2), (escaped, 0)):
        with pytest.raises(DamagedPack, match=f"manifest_sha256: expected once in the file, found {times} times"):
            Manifest.from_bytes(changed)
    with pytest.raises(DamagedPack, match=r"sha256 of the manifest is [0-9a-f]{12}…, it says [0-9a-f]{12}…"):
        Manifest.from_bytes(raw.replace(b"fixed", b"Fixed"))


HOSTILE = (-1, 0, 2**31 + 1, 2**63, 10**30, 1.0, 1e3, True, "1", None, [], {})


@pytest.mark.parametrize(("name", "hostile"), [("minimal", HOSTILE), ("mixed", HOSTILE[::4])])
def test_f8_every_number_is_checked(name: str, hostile: tuple[Any, ...], tmp_path: Path) -> None:
    """Each integer of a signed manifest, replaced by each of these: opening the pack refuses it in one line."""
    pack = copy_pack(name, tmp_path)
    manifest = read_manifest(pack)
    numbers = [path for path, value in walk(manifest) if type(value) is int and not means_nothing_here(path)]
    assert len(numbers) > 15
    for path in numbers:
        holder = holder_of(manifest, path)
        right = holder[path[-1]]
        for wrong in hostile:
            if type(wrong) is type(right) and wrong == right:
                continue
            holder[path[-1]] = wrong
            (pack / "manifest.json").write_bytes(to_bytes(manifest))
            with pytest.raises(MoepackError) as caught:
                Pack.open(pack)
            assert caught.value.exit_code == 3, (path, wrong)
            assert str(caught.value).startswith(str(pack)), (path, wrong)
            assert str(caught.value).isprintable(), (path, wrong)
        holder[path[-1]] = right
    (pack / "manifest.json").write_bytes(to_bytes(manifest))
    read_everything(pack)


def test_f8_every_key_must_be_there() -> None:
    manifest = read_manifest(GOLDEN / "mixed")
    ways = [path for path, _ in walk(manifest) if path and isinstance(path[-1], str) and not means_nothing_here(path)]
    required = [path for path in ways if path[:-1] not in (("resident", "tensors"), ("resident", "quantized"))]
    for path in required:
        value = holder_of(manifest, path)[path[-1]]
        if path[-1] == "group_size" and value is None:
            continue
        message = refuse(lambda changed, path=path: holder_of(changed, path).pop(path[-1]))
        assert path[-1] in message or "group size" in message, path
    assert len(required) > 80


def test_f8_a_missing_group_size_means_null() -> None:
    def drop(manifest: dict[str, Any]) -> None:
        del manifest["expert_files"][1]["tiers"][0]["gate_proj"]["group_size"]

    assert accept(drop).expert_files[1].tiers[0]["gate_proj"] == Scheme(16, None)


def test_f8_digests_are_64_lower_case_digits() -> None:
    for wrong in ("", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"):
        assert "is not of the form" in refuse(lambda manifest, wrong=wrong: manifest["resident"].update(sha256=wrong))
        assert "expert_files.0.block_sha256: expected 64 lower-case hexadecimal digits each" in refuse(
            lambda manifest, wrong=wrong: manifest["expert_files"][0]["block_sha256"].__setitem__(1, wrong)
        )


def test_f9_unknown_keys_are_ignored_everywhere() -> None:
    manifest = read_manifest(GOLDEN / "mixed")
    for path, value in list(walk(manifest)):
        if isinstance(value, dict) and path not in (("resident", "tensors"), ("resident", "quantized")):
            value["a key of tomorrow"] = {"and": ["what", "it", "holds"]}
    changed = Manifest.from_bytes(to_bytes(manifest))
    known = Manifest.read(GOLDEN / "mixed")
    assert (changed.expert_files, changed.resident) == (known.expert_files, known.resident)
    assert (changed.copied_files, changed.shape) == (known.copied_files, known.shape)


def test_f10_four_numbers_of_the_text_config_decide() -> None:
    assert Manifest.read(GOLDEN / "mixed").shape == ModelShape(96, 64, 2, 2)
    for key in vars(ModelShape(1, 1, 1, 1)):
        message = refuse(lambda manifest, key=key: manifest["model"]["text_config"].update({key: 0}))
        assert message.startswith(f"model.text_config.{key}: expected 1 to ")


# Expert files and blocks


def test_f11_one_file_per_layer_in_order() -> None:
    assert spec.expert_file_name(7, 8) == "experts/layer_07.bin"
    assert spec.expert_file_name(8, 8) == "experts/mtp_00.bin"
    assert spec.expert_file_name(100, 128) == "experts/layer_100.bin"
    assert refuse(lambda m: m["expert_files"].pop(0)) == "expert_files: layer 0 expected, found 1"
    assert "expert_files.1.file: expected 'experts/mtp_00.bin'" in refuse(
        lambda m: m["model"]["text_config"].update(num_hidden_layers=1)
    )
    assert "expert_files: 1 layers of 2" in refuse(lambda m: m["expert_files"].__delitem__(slice(1, None)))
    for file in ("experts/layer_01.bin", "../experts/layer_00.bin", "/etc/passwd", "experts/layer_0.bin", ""):
        message = refuse(lambda m, file=file: m["expert_files"][0].update(file=file))
        assert message == f"expert_files.0.file: expected 'experts/layer_00.bin', found {file!r}"
    assert len(accept(lambda m: m["expert_files"].pop()).expert_files) == 2  # without the MTP layer


schemes = st.sampled_from(
    [Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128)] + [Scheme(16, None)]
)
projections = st.fixed_dictionaries(dict.fromkeys(spec.PROJECTIONS, schemes))


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, LayerGeometry]:
    """Any layer: sizes down to 1 where all is bf16, up to some pages, blocks of several kinds."""
    tiers = draw(st.lists(projections, min_size=1, max_size=3))
    step = {name: max([tier[name].group_size or 1 for tier in tiers]) for name in spec.PROJECTIONS}
    hidden = max(step["gate_proj"], step["up_proj"]) * draw(st.integers(1, 3))
    intermediate = step["down_proj"] * draw(st.integers(1, 3))
    blocks = [BlockGeometry.of(hidden, intermediate, tier) for tier in tiers]
    chosen = draw(st.lists(st.integers(0, len(tiers) - 1), min_size=1, max_size=6))
    return hidden, intermediate, LayerGeometry(blocks, chosen)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers())
def test_f12_blocks_are_aligned_cover_the_file_and_do_not_overlap(layer: tuple[int, int, LayerGeometry]) -> None:
    geometry = layer[2]
    end = 0
    for expert in range(geometry.num_experts):
        assert geometry.offsets[expert] == end
        assert end % 16384 == 0
        end += geometry.block(expert).block_stride
    assert geometry.size_bytes == end


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers())
def test_f14_sections_follow_each_other_by_the_table(layer: tuple[int, int, LayerGeometry]) -> None:
    """Offsets and sizes by the table of the text, and F15: every byte is in a section or in the padding."""
    hidden, intermediate, geometry = layer
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    for block in geometry.tiers:
        expected, end, payload = [], 0, 0
        for name, matrix in block.matrices:
            (n, k), b, g = shapes[name], matrix.scheme.bits, matrix.scheme.group_size
            sizes = [("weight", n * k * 2)]
            if g is not None:
                sizes = [("w_q", n * k * b // 8), ("scales", n * (k // g) * 2), ("biases", n * (k // g) * 2)]
            for part, size in sizes:
                start = (end + 63) // 64 * 64
                expected.append((f"{name}.{part}", start, size))
                end, payload = start + size, payload + size
        assert [(s.name, s.offset_bytes, s.size_bytes) for s in block.sections] == expected
        assert (block.block_bytes, block.payload_bytes) == (end, payload)
        assert 0 <= block.block_stride - end < 16384
        runs = sorted([(start, start + size) for _, start, size in expected] + list(block.padding))
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == block.block_stride


def test_f12_real_models_fill_their_pages() -> None:
    for bits, stride in ((4, 7077888), (3, 5505024), (2, 3932160)):
        block = BlockGeometry.of(4096, 1024, {name: Scheme(bits, 64) for name in spec.PROJECTIONS})
        assert (block.block_stride, block.padding) == (stride, ())


def test_f12_size_is_the_sum_of_the_blocks() -> None:
    for change in (-16384, -1, 1, 16384):
        message = refuse(lambda m, change=change: m["expert_files"][0].update(size_bytes=49152 + change))
        assert message == f"expert_files.0.size_bytes: the blocks need 49152, found {49152 + change}"


def test_f13_tiers() -> None:
    def first(manifest: dict[str, Any]) -> dict[str, Any]:
        return manifest["expert_files"][0]

    spare = accept(lambda m: first(m)["tiers"].append(first(m)["tiers"][0]))
    assert len(spare.expert_files[0].tiers) == 3
    assert refuse(lambda m: first(m).update(tiers=[])) == "expert_files.0.tiers: expected at least one, found none"
    for tiers in ([0, 2], [-1, 0]):
        message = refuse(lambda m, tiers=tiers: first(m).update(expert_tiers=tiers))
        assert message == "expert_files.0.expert_tiers: expected integers from 0 to 1"
    for tiers in ([], [1], [1, 0, 0]):
        message = refuse(lambda m, tiers=tiers: first(m).update(expert_tiers=tiers))
        assert f"expected 2 experts, found {len(tiers)} expert_tiers and 2 block_sha256" in message
    assert "expected 2 experts, found 2 expert_tiers and 1 block_sha256" in refuse(
        lambda m: first(m)["block_sha256"].pop()
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "reason"),
    [
        (5, 32, "bits must be one of (2, 3, 4, 8, 16), got 5"),
        (32, None, "bits must be one of (2, 3, 4, 8, 16), got 32"),
        (0, 32, "expected 1 to 64, found 0"),
        (4, 16, "group size must be one of (32, 64, 128), got 16"),
        (4, 96, "group size must be one of (32, 64, 128), got 96"),
        (4, None, "group size must be one of (32, 64, 128), got None"),
        (16, 32, "16 bits means bf16 as it is, without groups, got group size 32"),
        (4, 64, "gate_proj: group size 64 does not divide the row length 96"),
        (4, 128, "gate_proj: group size 128 does not divide the row length 96"),
    ],
)
def test_f17_schemes(bits: int, group_size: int | None, reason: str) -> None:
    scheme = {"bits": bits, "group_size": group_size}
    assert reason in refuse(lambda m: m["expert_files"][0]["tiers"][0].update(gate_proj=scheme))


# Resident and copied files


def test_f24_quantized_matrices_have_arrays_that_agree() -> None:
    def embed(manifest: dict[str, Any]) -> dict[str, Any]:
        return manifest["resident"]["quantized"]["model.embed_tokens"]

    where = "resident.quantized.model.embed_tokens: its arrays do not make a matrix at"
    for change in ({"bits": 4}, {"group_size": 64}, {"bits": 3}, {"bits": 16, "group_size": None}):
        assert where in refuse(lambda m, change=change: embed(m).update(change))
    for name in ("model.norm", "nothing", "model.embed_tokens.weight", "a\nb"):
        assert "its arrays do not make a matrix" in refuse(
            lambda m, name=name: m["resident"]["quantized"].update({name: {"bits": 8, "group_size": 32}})
        )
    plain = accept(lambda m: m["resident"]["quantized"].clear())  # then they are U32 and BF16 arrays as any other
    assert not plain.resident.quantized


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "-option", "a/b", "..", "a b", "ä.json", "x" * 129, "resident.safetensors", "MANIFEST.json",
     "experts", "merges.txt", "MERGES.TXT", "new\nline", "nul\0", None, 5],
)  # fmt: skip
def test_f26_names_of_copied_files(name: Any) -> None:
    message = refuse(lambda m: m["copied_files"][0].update(file=name))
    assert message.startswith("copied_files")


def test_f26_good_names_are_accepted() -> None:
    for name in ("a", "_x", "README.md", "x" * 128, "0-1_2.json"):
        assert accept(lambda m, name=name: m["copied_files"][0].update(file=name)).copied_files[0].file == name


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("size_bytes", 2**50, "model.norm.weight: BF16 [3] is not 1125899906842624 bytes"),
        ("offset_bytes", 2**49, "resident.size_bytes: the tensors end at 562949953421318, found 134"),
        ("offset_bytes", 127, "resident.size_bytes: the tensors end at 133, found 134"),
        ("shape", [2**24] * 9, "is not 6 bytes"),
        ("shape", [1] * 8 + [3], "is not 6 bytes"),
        ("shape", [2**24] * 8, "is not 6 bytes"),
        ("shape", [3, 0], "BF16 [3, 0] is not 6 bytes"),
        ("dtype", "F32", "F32 [3] is not 6 bytes"),
        ("dtype", "F31", "is not of the form"),
    ],
)
def test_f27_arrays_are_checked_against_the_file_before_allocation(
    key: str, value: Any, reason: str, tmp_path: Path
) -> None:
    pack = copy_pack("minimal", tmp_path)
    edit_manifest(pack, lambda m: m["resident"]["tensors"]["model.norm.weight"].update({key: value}))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedPack, match=re.escape(reason)):
            read_everything(pack)
        assert tracemalloc.get_traced_memory()[1] < REFUSAL_BYTES
    finally:
        tracemalloc.stop()


def test_f27_arrays_fill_the_file() -> None:
    tensors = list(read_manifest(GOLDEN / "mixed")["resident"]["tensors"])
    for name in tensors[1:]:
        assert refuse(lambda m, name=name: m["resident"]["tensors"].pop(name))
    assert "at byte" in refuse(
        lambda m: m["resident"]["tensors"].update({"twice": m["resident"]["tensors"][tensors[3]]})
    )
    for name in ("", "a\nb", "\x1b[2J", "x" * 513):
        extra = {"dtype": "U8", "shape": [0], "offset_bytes": 3400, "size_bytes": 0, "sha256": "0" * 64}
        message = refuse(lambda m, name=name, extra=extra: m["resident"]["tensors"].update({name: extra}))
        assert "is not 1 to 512 printable characters" in message


def test_f27_every_dtype_can_be_read(tmp_path: Path) -> None:
    """Whatever the manifest allows, read_resident gives: F8 and BF16 as bit patterns."""
    arrays = [(f"t.{dtype}", dtype, (2, 3)) for dtype in spec.DTYPE_BYTES]
    resident = write_resident_file(tmp_path, arrays, {}, lambda spec: [bytes(range(spec.size_bytes))])
    pack = Pack(tmp_path, Manifest(read_manifest(GOLDEN / "minimal")["model"], (), resident, (), {}))
    for name, dtype, shape in arrays:
        values = pack.read_resident(name)
        assert (values.shape, values.dtype.itemsize) == (shape, spec.DTYPE_BYTES[dtype])
        assert values.tobytes() == bytes(range(values.nbytes))
    pack.close()

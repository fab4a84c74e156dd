"""The command moe-convert: options, what it prints where, --dry-run, --json, and what it does with what is at OUT."""

import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace

import pytest

from convert_command import PROGRAM, SMALL, files_of, finish, problems_of, run_convert, start_convert
from moepack.convert import pipeline
from moepack.convert.journal import JOURNAL_NAME
from moepack.convert.plan import plan_conversion
from moepack.convert.recipe import Recipe
from moepack.layout.reader import Pack
from moepack.layout.summary import summarize
from tiny_checkpoint import TinyModel, write_checkpoint

GROUP = ("--group-size", 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SMALL)


@pytest.fixture(scope="module")
def other_source(tmp_path_factory):
    """A fine-tune of the same model: the same names, shapes and file sizes."""
    return write_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", replace(SMALL, seed=1))


@pytest.fixture(scope="module")
def four_bits(source, tmp_path_factory):
    """A finished pack of `source`. Not to be changed."""
    out = tmp_path_factory.mktemp("pack") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return out


@pytest.fixture
def pack(four_bits, tmp_path):
    """A finished pack of the test's own."""
    return shutil.copytree(four_bits, tmp_path / "pack")


def begin(source, out, **settings):
    """Leave an unfinished conversion at `out`: one layer written."""
    recipe = Recipe(**{"bits": 4, "group_size": 32, "resident_bits": 8, "quantizer": "mse", **settings})
    plan, seen = plan_conversion(source, out, recipe), []

    def stop(size_bytes):
        seen.append(size_bytes)
        if len(seen) == SMALL.experts + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.convert(plan, 1, stop)
    assert [path.name for path in (out / "experts").glob("*.bin")] == ["layer_00.bin"]


def assert_usage(result, *parts):
    """Exit code 2 and one line that holds all parts."""
    assert (result.code, result.out, len(result.errors)) == (2, "", 1)
    assert [part for part in map(str, parts) if part not in result.errors[0]] == [], result.errors


def test_it_is_installed_as_a_program(source, tmp_path):
    scripts = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["moe-convert"] == "moepack.convert.cli:main"
    assert PROGRAM, "moe-convert is not beside the Python that runs the tests"
    result = finish(start_convert(source, tmp_path / "pack", *GROUP))
    assert (result.code, result.errors) == (0, [])
    assert result.out.startswith(f"{tmp_path / 'pack'}: ")
    assert problems_of(tmp_path / "pack") == []


def test_version_and_help():
    version = importlib.metadata.version("moepack")
    assert run_convert("--version") == (0, f"moepack {version}\n", "")
    shown = run_convert("--help")
    assert (shown.code, shown.err) == (0, "")
    for part in ("SRC", "OUT", "--bits", "--group-size", "--resident-bits", "--workers", "--overwrite", "--dry-run"):
        assert part in shown.out
    text = " ".join(shown.out.split())
    assert "Exit codes: 0 well, 1 failed, 2 usage, 3 damaged pack, 4 unsupported format version" in text


@pytest.mark.parametrize(("options", "expected"), [
    (("--bits", 5), ("--bits 5", "2, 3, 4, 8, 16")), (("--bits", 0), ("--bits 0",)), (("--bits", -4), ("--bits -4",)),
    (("--group-size", 48), ("--group-size 48", "32, 64, 128")), (("--group-size", 0), ("--group-size 0",)),
    (("--resident-bits", 2), ("--resident-bits 2", "4, 8, 16")),
    (("--quantizer", "best"), ("--quantizer best", "auto, minmax, mse, gptq")),
])  # fmt: skip
def test_values_that_no_option_takes(source, tmp_path, options, expected):
    assert_usage(run_convert(source, tmp_path / "pack", *options), *expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [("--bpw", 3), ("--target-size", "1GB")])
def test_mixed_bits_are_named_as_the_cure(source, tmp_path, option):
    result = run_convert(source, tmp_path / "pack", *option)
    assert_usage(result, option[0], "give --bits mixed")
    assert "--bits 4" not in result.errors[0]
    assert_usage(run_convert(source, tmp_path / "pack", *option, "--bits", 4), "--bits 4", "give --bits mixed")


@pytest.mark.parametrize("options", [(), ("--bits", 3), ("--redo", "0:1"), ("--dry-run",)])
def test_a_pack_as_the_source(pack, tmp_path, options):
    assert_usage(
        run_convert(pack, tmp_path / "out", *options), pack, "is a pack", "checkpoint", "--to mlx, hf or archive"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("--bits", "four"), ("--workers", 0), ("--no-such-option",), ("third",), ("--bits",)]
)
def test_arguments_that_cannot_be_parsed(source, tmp_path, arguments):
    result = run_convert(source, tmp_path / "pack", *arguments)
    assert (result.code, result.out, len(result.errors)) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_results_on_stdout_progress_and_notes_on_stderr(source, tmp_path):
    result = run_convert(source, tmp_path / "pack", *GROUP)
    line, heading, *rows = result.out.splitlines()
    assert line.startswith(f"{tmp_path / 'pack'}: ")
    assert "bits per weight" in line
    assert heading.split() == ["rounding", "relative", "error", "largest", "error"]
    assert [row.split()[0] for row in rows] == ["gate_proj", "up_proj", "down_proj", "resident"]
    assert "slowest stage: " in result.err
    assert "convert: 100%" in result.err
    assert any("vision" in note for note in result.notes)


@pytest.mark.parametrize("options", [
    ("--bits", 2, "--resident-bits", 4), ("--bits", 3), ("--bits", 4, "--resident-bits", 16), ("--bits", 8),
    ("--bits", 16, "--resident-bits", 16),
])  # fmt: skip
def test_dry_run_tells_the_sizes_to_the_byte(source, tmp_path, options):
    out = tmp_path / "pack"
    forecast = run_convert(source, out, *GROUP, *options, "--dry-run", "--json")
    assert not out.exists()
    told = json.loads(forecast.out)
    done = run_convert(source, out, *GROUP, *options, "--json")
    facts = json.loads(done.out)
    assert (forecast.code, done.code) == (0, 0)
    experts = [path.stat().st_size for path in (out / "experts").iterdir()]
    resident_bytes = (out / "resident.safetensors").stat().st_size
    assert set(experts) == {told["expert_file_bytes"]}
    assert (len(experts), resident_bytes) == (told["expert_files"], told["resident_bytes"])
    assert told["total_bytes"] == sum(experts) + resident_bytes
    assert told["free_bytes"] > told["needed_bytes"] >= told["total_bytes"]
    assert told["expected_seconds"] >= 0
    with Pack.open(out) as opened:
        summary = summarize(opened)
    parts = [summary["experts"], summary["mtp_experts"], summary["resident"]]
    weights = sum(part["weights"] for part in parts)
    assert told["weights"] == weights
    bits = sum(part["weights"] * part["bits_per_weight"] for part in parts)
    assert told["bits_per_weight"] == pytest.approx(bits / weights)
    assert facts["seconds"] > 0
    assert facts["already_converted"] is False
    same = told.keys() & facts.keys()
    assert {"bits", "group_size", "resident_bits", "quantizer", "source", "pack", "notes"} <= same
    assert {key: told[key] for key in same} == {key: facts[key] for key in same}


def test_dry_run_prints_a_table(source, tmp_path):
    result = run_convert(source, tmp_path / "pack", *GROUP, "--dry-run")
    assert (result.code, result.errors) == (0, [])
    rows = [line.rsplit("  ", 1)[0].strip() for line in result.out.splitlines()]
    assert rows[1:] == ["experts", "resident", "in all", "bits per weight", "expected time", "free on the disk"]
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("state", ["nothing", "empty", "unfinished", "all but the manifest's rename", "finished"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_dry_run_changes_nothing_at_all(source, four_bits, tmp_path, state, options):
    out = tmp_path / "pack"
    if state == "empty":
        out.mkdir()
    elif state == "unfinished":
        begin(source, out)
    elif state != "nothing":
        shutil.copytree(four_bits, out)
    if state.startswith("all but"):
        (out / "manifest.json").rename(out / "manifest.json.partial")
        (out / JOURNAL_NAME).mkdir()
    before = files_of(tmp_path)
    result = run_convert(source, out, *GROUP, "--dry-run", "--json", *options)
    assert (result.code, result.errors) == (0, [])
    assert json.loads(result.out)["needed_bytes"] > 0
    assert files_of(tmp_path) == before


def test_a_finished_pack_is_left_alone(source, pack):
    before = {path: path.stat().st_mtime_ns for path in pack.rglob("*")}
    result = run_convert(source, pack, *GROUP)
    assert (result.code, result.out) == (0, "")
    assert "nothing to do" in result.err
    assert json.loads(run_convert(source, pack, *GROUP, "--json").out)["already_converted"] is True
    assert {path: path.stat().st_mtime_ns for path in pack.rglob("*")} == before


@pytest.mark.parametrize("option", [("--bits", 2), ("--resident-bits", 4), ("--group-size", 64)])
def test_a_pack_of_other_settings_is_kept(tmp_path, option):
    model = TinyModel(layers=1, hidden=64, experts=2, shared_intermediate=64, mtp=False)  # 64 divides every row
    source, out = write_checkpoint(tmp_path / "source", model), tmp_path / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    before = files_of(out)
    result = run_convert(source, out, *GROUP, *option)
    assert_usage(result, out, "other settings", "--overwrite")
    assert files_of(out) == before


def test_a_pack_of_another_source_is_kept(other_source, pack):
    """The other source differs in its weights alone: headers, sizes and config are the same."""
    before = files_of(pack)
    assert_usage(run_convert(other_source, pack, *GROUP), pack, "another source", "--overwrite")
    assert files_of(pack) == before


def test_a_source_that_got_another_template_is_another_source(source, pack, tmp_path):
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    assert_usage(run_convert(changed, pack, *GROUP), pack, "another source", "--overwrite")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_pack_that_lost_a_file_is_not_called_done(source, pack, damage):
    victim = pack / "experts" / "layer_01.bin"
    victim.unlink() if damage == "missing" else victim.write_bytes(b"short")
    assert_usage(run_convert(source, pack, *GROUP), victim, "--overwrite")
    assert run_convert(source, pack, *GROUP, "--overwrite").code == 0
    assert problems_of(pack) == []


def test_an_unfinished_conversion_with_other_settings_is_kept(source, other_source, tmp_path):
    out = tmp_path / "pack"
    begin(source, out, bits=2)
    before = files_of(out / "experts")
    assert_usage(run_convert(source, out, *GROUP), out, "unfinished conversion with other arguments", "--overwrite")
    assert_usage(run_convert(other_source, out, *GROUP, "--bits", 2), out, "another source", "--overwrite")
    assert files_of(out / "experts") == before


def test_what_an_unfinished_conversion_lost_is_written_again(source, four_bits, tmp_path):
    for damage in ("missing", "truncated", "unreadable record"):
        out = tmp_path / damage
        begin(source, out)
        done = out / "experts" / "layer_00.bin"
        if damage == "unreadable record":
            (out / JOURNAL_NAME / "layer_00.json").write_bytes(b"")
        elif damage == "truncated":
            done.write_bytes(done.read_bytes()[:-1])
        else:
            done.unlink()
        assert run_convert(source, out, *GROUP, "--resume").code == 0
        assert files_of(out) == files_of(four_bits)


def test_steps_of_unreadable_settings_are_not_trusted(source, tmp_path):
    begin(source, tmp_path / "pack")
    settings = tmp_path / "pack" / JOURNAL_NAME / "settings.json"
    settings.write_text('{"arguments": 5, "source": [1]}')
    assert_usage(run_convert(source, tmp_path / "pack", *GROUP), "unfinished conversion with other arguments")
    settings.write_bytes(b"")
    options = (*GROUP, "--quantizer", "minmax")  # blocks of the same sizes, other bytes
    assert run_convert(source, tmp_path / "pack", *options).code == 0
    assert run_convert(source, tmp_path / "whole", *options).code == 0
    assert files_of(tmp_path / "pack") == files_of(tmp_path / "whole")


def test_a_file_at_out(source, tmp_path):
    out = tmp_path / "pack"
    out.write_text("Mine.")
    for options in ((), ("--overwrite",), ("--dry-run",)):
        assert_usage(run_convert(source, out, *GROUP, *options), out, "is a file, expected a directory")
    for options in ((), ("--dry-run",), ("--to", "archive")):
        assert_usage(
            run_convert(source, out / "below", *GROUP, *options), out, "is a file: give a place in a directory"
        )
    assert out.read_text() == "Mine."


@pytest.mark.parametrize("arguments", [("", "out"), ("somewhere", "")])
def test_nothing_is_no_place(arguments):
    assert_usage(run_convert(*arguments), "SRC or OUT is empty")


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_a_link_that_leads_nowhere_at_out(source, tmp_path, target):
    out = tmp_path / "out"
    out.symlink_to(target)
    for options in ((), ("--overwrite",), ("--dry-run",)):
        assert_usage(run_convert(source, out, *GROUP, *options), out, "is a link that leads nowhere")
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_is_written_into_a_pack(source, pack):
    before = files_of(pack)
    for arguments in ((source, pack / "below", *GROUP), (pack, pack / "a.tar", "--to", "archive")):
        assert_usage(run_convert(*arguments), pack, "lies in the pack")
    assert_usage(run_convert(pack, pack / "experts" / "below", "--to", "mlx"), pack, "lies in the pack")
    assert files_of(pack) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--dry-run",)])
@pytest.mark.parametrize("names", [
    ["thesis.txt"], ["README.md", "LICENSE"], ["experts/people.txt"],
    ["manifest.json", "README.md"],  # as in the folder of a browser extension or a web page
    [".convert"],
])  # fmt: skip
def test_a_folder_that_is_no_pack_is_never_touched(source, tmp_path, names, options):
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"name": "mine"}')
    before = files_of(tmp_path)
    assert_usage(run_convert(source, tmp_path / "folder", *GROUP, *options), tmp_path / "folder")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("foreign", ["notes.txt", "experts/notes.txt", "other/notes.txt"])
@pytest.mark.parametrize("unfinished", [False, True])
def test_overwrite_refuses_files_that_are_not_its_own(source, pack, tmp_path, foreign, unfinished):
    if unfinished:
        shutil.rmtree(pack)
        begin(source, pack)
    (pack / foreign).parent.mkdir(exist_ok=True)
    (pack / foreign).write_text("Mine.")
    before = files_of(pack)
    assert_usage(run_convert(source, pack, *GROUP, "--overwrite"), pack, foreign.split("/")[0], "--overwrite")
    assert files_of(pack) == before


def test_overwrite_replaces_a_pack(source, four_bits, pack, tmp_path):
    assert run_convert(source, pack, *GROUP, "--overwrite", "--bits", 2).code == 0
    assert run_convert(source, tmp_path / "fresh", *GROUP, "--bits", 2).code == 0
    assert files_of(pack) == files_of(tmp_path / "fresh")
    assert run_convert(source, pack, *GROUP, "--overwrite").code == 0
    assert files_of(pack) == files_of(four_bits)


@pytest.mark.parametrize(("options", "code", "expected"), [
    (("--memory", "10MB"), 1, "--memory"), (("--engine", "ray"), 2, "needs the package ray"),
    (("--engine", "spark"), 2, "--engine spark"), (("--bits", 2, "--memory", "much"), 2, "much"),
])  # fmt: skip
def test_overwrite_deletes_nothing_for_what_is_refused(source, pack, monkeypatch, options, code, expected):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = files_of(pack)
    result = run_convert(source, pack, *GROUP, "--overwrite", *options)
    assert (result.code, result.out, len(result.errors)) == (code, "", 1), result.err
    assert expected in result.errors[0]
    assert files_of(pack) == before


def test_overwrite_replaces_damaged_and_unfinished_packs(source, four_bits, pack, tmp_path):
    manifest = (pack / "manifest.json").read_bytes()
    (pack / "manifest.json").write_bytes(manifest.replace(b'"layer": 1', b'"layer": 7'))
    assert_usage(run_convert(source, pack, *GROUP), pack, "--overwrite")
    begin(source, tmp_path / "unfinished", bits=8)
    for out in (pack, tmp_path / "unfinished", tmp_path / "nothing"):
        assert run_convert(source, out, *GROUP, "--overwrite").code == 0
        assert files_of(out) == files_of(four_bits)


def test_too_little_space_is_refused_before_any_work(source, pack, tmp_path, monkeypatch):
    """Nothing is begun, and nothing deleted: what --overwrite frees counts as free."""
    needed = json.loads(run_convert(source, tmp_path / "other", *GROUP, "--dry-run", "--json").out)["needed_bytes"]
    replaced = json.loads(run_convert(source, pack, *GROUP, "--dry-run", "--json", "--overwrite").out)["needed_bytes"]
    before = files_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)

    def claim_free(free_bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free_bytes))

    claim_free(needed - 1)
    for options in ((), ("--dry-run",), ("--dry-run", "--json")):
        result = run_convert(source, tmp_path / "other", *GROUP, *options)
        assert (result.code, len(result.errors)) == (1, 1)
        for part in (str(tmp_path / "other"), f"{needed:,} bytes", f"{needed - 1:,} are free"):
            assert part in result.errors[0]
        assert bool(result.out) == (options == ("--dry-run",))
        assert files_of(tmp_path) == before
    claim_free(replaced - 1)
    assert run_convert(source, pack, *GROUP, "--overwrite").code == 1
    assert files_of(tmp_path) == before
    claim_free(needed)
    assert run_convert(source, tmp_path / "other", *GROUP).code == 0

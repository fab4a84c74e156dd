"""A pack at a URL of fsspec: the same bytes as in a directory, through kills, on a real S3 server of this machine."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from convert_command import files_of, problems_of, run_convert
from moepack.convert.journal import JOURNAL_NAME
from moepack.convert.pipeline import convert
from moepack.convert.plan import plan_conversion
from moepack.convert.ray_engine import split_layer
from moepack.convert.recipe import Recipe
from moepack.convert.url_output import UrlOutput
from moepack.layout.errors import CheckpointError, UsageError, WriteError
from test_ray_engine import GROUP, cluster  # noqa: F401 (a fixture)
from tiny_checkpoint import TinyModel, write_checkpoint

fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'moepack[ray]'")
MODEL = TinyModel(layers=2, experts=12, hidden=160, moe_intermediate=96)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", MODEL)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of a conversion into a directory."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return files_of(out)


@pytest.fixture
def url(request):
    """A place in this process's memory, empty."""
    place = f"memory://{request.node.name}/pack"
    yield place
    fs, root = fsspec.core.url_to_fs(place)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def output_at(url: str, source: Path, staging: Path, bits: int = 4) -> UrlOutput:
    staging.mkdir(exist_ok=True)
    return UrlOutput(plan_conversion(source, staging, Recipe(bits, 32, 8, "minmax")), url)


def write_layers(output: UrlOutput, journal: UrlOutput, layers) -> None:
    """What Ray does with the tasks, some of them twice."""
    for layer in layers:
        parts = split_layer(output.plan)
        output.write_range(layer, *parts[0])
        ranges = [output.write_range(layer, *part) for part in parts]
        record = output.join_layer(layer, *ranges)
        assert output.join_layer(layer, *ranges) == record
        journal.put("mtp_00" if layer == 2 else f"layer_{layer:02d}", record)
        output.noted(layer)


def download(url: str, folder: Path, **options: object) -> Path:
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    for name in fs.find(root):
        path = folder / name.removeprefix(root).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fs.cat_file(name))
    return folder


def test_the_same_pack_as_in_a_directory_from_several_runs(source, whole, tmp_path, url):
    output = output_at(url, source, tmp_path / "first")
    with output.open() as journal:
        write_layers(output, journal, [1])
    output = output_at(url, source, tmp_path / "second")  # of another process, elsewhere
    with output.open() as journal:
        assert [output.is_finished(journal, layer) for layer in range(3)] == [False, True, False]
        write_layers(output, journal, [0, 2])
    assert output.find_finished() is None
    output.finish(convert(output.stage(), 2, lambda size_bytes: None))
    pack = download(url, tmp_path / "pack")
    assert files_of(pack) == whole
    assert problems_of(pack) == []
    assert output.find_finished() is not None


def test_what_is_there_is_kept_and_only_packs_are_replaced(source, tmp_path, url):
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/thesis.txt", b"mine")
    output = output_at(url, source, tmp_path / "staging")
    with pytest.raises(UsageError, match="is not empty and no conversion of ours"), output.open():
        pass
    with pytest.raises(UsageError, match=r"holds thesis.txt: --overwrite deletes packs only"):
        output.remove()
    fs.rm_file(f"{root}/thesis.txt")
    with output.open() as journal:
        write_layers(output, journal, range(3))
    other = output_at(url, source, tmp_path / "other", bits=2)
    with (
        pytest.raises(UsageError, match="unfinished conversion with other arguments \\(bits 4, now 2\\)"),
        other.open(),
    ):
        pass
    output.finish(convert(output.stage(), 2, lambda size_bytes: None))
    with pytest.raises(UsageError, match="holds a pack of another source or with other settings"):
        other.find_finished()
    fs.pipe_file(f"{root}/{JOURNAL_NAME}/settings.json", b"{}")  # as if killed right after the manifest
    output.tidy()
    assert not [name for name in fs.find(root) if JOURNAL_NAME in name]
    other.remove()
    assert fs.find(root) == []


def test_a_manifest_is_there_whole_or_not_at_all(source, tmp_path, url, monkeypatch):
    output = output_at(url, source, tmp_path / "staging")
    with output.open() as journal:
        write_layers(output, journal, range(3))
    manifest = convert(output.stage(), 2, lambda size_bytes: None)
    fs, _ = fsspec.core.url_to_fs(url)
    with monkeypatch.context() as broken:
        broken.setattr(type(fs), "pipe_file", Mock(side_effect=ConnectionError("reset by peer")))
        with pytest.raises(WriteError, match=r"manifest\.json"):
            output.finish(manifest)
    assert output.find_finished() is None
    output.finish(manifest)
    assert output.find_finished() is not None


def test_a_range_that_did_not_arrive_is_named(source, tmp_path, url):
    output = output_at(url, source, tmp_path / "staging")
    parts = split_layer(output.plan)
    ranges = [output.write_range(0, *part) for part in parts]
    fs, root = fsspec.core.url_to_fs(url)
    names = sorted(fs.find(f"{root}/{JOURNAL_NAME}"))
    raw = fs.cat_file(names[1])
    fs.pipe_file(names[1], raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{url}/experts/layer_00.bin: the block of expert"):
        output.join_layer(0, *ranges)
    fs.rm_file(names[1])
    with pytest.raises(WriteError, match="FileNotFoundError"):
        output.join_layer(0, *ranges)


def test_a_url_takes_ray_and_a_known_protocol(source, tmp_path):
    for options in ((), ("--engine", "ray", "--redo", "0:0"), ("--to", "archive")):
        result = run_convert(source, "memory://place/pack", *options)
        assert (result.code, len(result.errors)) == (2, 1)
        assert "memory://place/pack: only a conversion with --engine ray writes to a URL" in result.errors[0]
    result = run_convert(source, "carrier-pigeon://place/pack", *GROUP, "--engine", "ray", "--dry-run")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "carrier-pigeon" in result.errors[0]


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on an S3 server; its URL, and what the server needs to be told."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'moepack[slow]'")
    server = pytest.importorskip("moto.server", reason="needs moto: pip install 'moepack[slow]'")
    import boto3

    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/tiny.moepack"
    running.stop()


@pytest.mark.slow
def test_the_command_writes_to_a_bucket_with_ray(source, whole, tmp_path, bucket, cluster, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    dry = run_convert(source, bucket, *GROUP, "--engine", "ray", "--dry-run", "--json")
    assert (dry.code, json.loads(dry.out)["pack"]) == (0, bucket)
    result = run_convert(source, bucket, *GROUP, "--engine", "ray", "--json")
    assert (result.code, result.errors) == (0, [])
    assert json.loads(result.out)["pack"] == bucket
    pack = download(bucket, tmp_path / "pack")
    assert files_of(pack) == whole
    again = run_convert(source, bucket, *GROUP, "--engine", "ray")
    assert (again.code, f"{bucket}: converted already" in again.err) == (0, True)
    assert run_convert(source, bucket, *GROUP, "--bits", 2, "--engine", "ray").code == 2
    replaced = run_convert(source, bucket, *GROUP, "--bits", 2, "--engine", "ray", "--overwrite")
    assert (replaced.code, replaced.errors) == (0, [])
    shutil.rmtree(pack)
    assert problems_of(download(bucket, pack)) == []

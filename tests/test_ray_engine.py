"""--engine ray on a real cluster of several nodes of this machine: the same pack, and a node killed in the middle."""

import json
import os

import pytest

from convert_command import files_of, problems_of, run_convert
from moepack.convert import ray_engine
from moepack.convert.journal import JOURNAL_NAME
from moepack.convert.pipeline import convert
from moepack.convert.plan import plan_conversion
from moepack.convert.ray_engine import SharedDirectory, convert_layers, split_layer
from moepack.convert.recipe import Recipe
from moepack.layout.errors import CheckpointError
from served import wait_until
from tiny_checkpoint import TinyModel, write_checkpoint

GROUP = ("--group-size", 32, "--quantizer", "minmax")
MODEL = TinyModel(layers=4, experts=24, hidden=160, moe_intermediate=96)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", MODEL)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of a conversion on one machine."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    assert run_convert(source, out, *GROUP).code == 0
    return files_of(out)


def make_plan(source, out):
    return plan_conversion(source, out, Recipe(4, 32, 8, "minmax"))


def test_ranges_cover_every_expert_once(source, tmp_path):
    plan = make_plan(source, tmp_path / "pack")
    experts = [expert for first, count in split_layer(plan) for expert in range(first, first + count)]
    assert experts == list(range(MODEL.experts))


def test_tasks_in_any_order_and_again_write_the_same_file(source, whole, tmp_path):
    """What Ray may do with them when machines come and go, without Ray."""
    plan = make_plan(source, tmp_path / "pack")
    plan.out.mkdir()
    parts, output = split_layer(plan), SharedDirectory(plan)
    for part in parts[::-1]:
        output.write_range(1, *part)
    ranges = [output.write_range(1, *part) for part in parts]
    records = [output.join_layer(1, *ranges) for _ in range(2)]
    assert records[0] == records[1]
    assert files_of(plan.out)["experts/layer_01.bin"] == whole["experts/layer_01.bin"]
    assert records[0]["entry"]["sha256"] == whole["experts/layer_01.bin"]


def test_a_block_that_did_not_arrive_is_named(source, tmp_path):
    """As where the output is not the same directory on every machine."""
    plan = make_plan(source, tmp_path / "pack")
    plan.out.mkdir()
    output = SharedDirectory(plan)
    ranges = [output.write_range(0, *part) for part in split_layer(plan)]
    with open(ray_engine.partial_path(plan, 0), "r+b") as file:
        file.seek(plan.schemes[0].geometry(plan.shape).offsets[5] + 100)
        file.write(b"\x00" * 64)
    with pytest.raises(CheckpointError, match="block of expert 5 is not what was written"):
        output.join_layer(0, *ranges)
    assert not (plan.out / "experts" / "layer_00.bin").exists()


def test_without_ray_it_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    result = run_convert(source, tmp_path / "pack", *GROUP, "--engine", "ray")
    assert (result.code, len(result.errors)) == (2, 1)
    assert "pip install 'moepack[ray]'" in result.errors[0]
    assert run_convert(source, tmp_path / "pack", *GROUP, "--engine", "spark").code == 2


@pytest.fixture
def cluster():
    """A head that runs no tasks, and two nodes of one processor each: real raylets, as on three machines."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray", reason="needs ray: pip install 'moepack[ray]'")
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    started.workers = [started.add_node(num_cpus=1, **store) for _ in range(2)]
    started.wait_for_nodes()
    yield started
    import ray

    ray.shutdown()
    started.shutdown()


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_changes_nothing(source, whole, tmp_path, cluster):
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    plan, dealt_with = make_plan(source, tmp_path / "pack"), []

    def kill_a_node(size_bytes):
        dealt_with.append(size_bytes)
        if len(dealt_with) == 3:
            cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
            assert not list((plan.out / JOURNAL_NAME).glob("mtp*")), "it was over already"

    counted = convert_layers(SharedDirectory(plan), 2, kill_a_node)
    wait_until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 2)  # the head and one of two nodes
    assert counted == sum(dealt_with) == sum(plan.layer_source_bytes)
    convert(plan, 1, lambda size_bytes: None)
    assert files_of(plan.out) == whole
    assert problems_of(plan.out) == []


@pytest.mark.slow
def test_the_command_goes_on_where_one_machine_was_stopped(source, whole, tmp_path, cluster, monkeypatch):
    """A layer from a stopped local run stays as it is; the cluster does the others."""
    out, seen = tmp_path / "pack", []

    def stop(size_bytes):
        seen.append(size_bytes)
        if len(seen) == MODEL.experts + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(make_plan(source, out), 1, stop)
    kept = (out / "experts" / "layer_00.bin").stat().st_mtime_ns
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    result = run_convert(source, out, *GROUP, "--engine", "ray", "--json")
    assert (result.code, result.errors) == (0, [])
    assert (out / "experts" / "layer_00.bin").stat().st_mtime_ns == kept
    assert files_of(out) == whole
    assert {"gate_proj", "up_proj", "down_proj", "resident"} == json.loads(result.out)["rounding"].keys()

"""The benchmark's parts at tiny sizes: the checkpoint converts and runs, skew shows, caps hold, tables add up.

No speed is measured here; benchmarks/README.md says how that is done.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, make_pack
from moepack.layout.architecture import Architecture
from moepack.runtime import Engine

TINY = {
    "hidden_size": 128, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by name, as the scripts import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def checkpoints(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a tiny checkpoint with the given skew."""
    script = benchmark("make_checkpoint")
    monkeypatch.setattr(script, "POOL_VALUES", 2**17)
    monkeypatch.setattr(script, "PIECE_VALUES", 2**14)

    def write(name: str, skew: float = 0.0, seed: int = 0) -> Path:
        config = script.config_of("35B", layers=4, vocab=4352, experts=16)
        config["text_config"] |= TINY
        script.write_checkpoint(tmp_path / name, config, seed, skew)
        return tmp_path / name

    return write


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


def first_choices(checkpoint: Path) -> np.ndarray:
    """How often each expert of the first layer is the router's first choice, over the whole vocabulary.

    From the embeddings alone: the mixer's part of the stream is left out.
    """
    tensors = tensors_of(checkpoint)
    stream = tensors["model.language_model.embed_tokens.weight"].float()
    router = tensors["model.language_model.layers.0.mlp.gate.weight"].float()
    normed = stream / stream.square().mean(1, keepdim=True).sqrt()
    return np.bincount((normed @ router.T).argmax(1).numpy(), minlength=len(router))


@pytest.mark.parametrize(
    ("model", "layers", "experts", "mtp", "released", "active"),
    [("35B", 40, 256, 0.84, 35.95, 3.46), ("397B", 60, 512, 6.60, 403.4, 17.35)],
)
def test_checkpoint_has_the_widths_of_a_release(
    benchmark: Any, model: str, layers: int, experts: int, mtp: float, released: float, active: float
) -> None:
    """With all layers, experts and rows it has the parameters that hubs list, but for the MTP head and vision (0.45).

    All numbers are billions. Those that a token uses are A3B's and A17B's.
    """
    script = benchmark("make_checkpoint")
    architecture = Architecture.from_config(script.config_of(model, layers, 248320, experts))
    sizes = {
        name: math.prod(shape) / 1e9
        for shard in script._split_into_shards(architecture)
        for name, shape in shard.items()
    }
    total, routed = sum(sizes.values()), sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    assert total == pytest.approx(released - mtp - 0.45, abs=0.02)
    assert total - routed * (1 - architecture.num_experts_per_tok / experts) == pytest.approx(active, abs=0.01)


def test_checkpoint_converts_and_runs(checkpoints: Any, tmp_path: Path) -> None:
    engine = Engine.open(make_pack(checkpoints("plain"), tmp_path / "pack", group_size=32, resident_bits=4))
    logits = engine.logits([1, 2, 3, 4, 5, 6, 7, 8])
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(1).tolist())) > 4  # no two positions alike, nor one answer to everything


def test_checkpoint_is_reproducible_and_its_experts_differ(checkpoints: Any) -> None:
    one, same, other = (tensors_of(checkpoints(name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    for name, tensor in one.items():
        if "mlp.experts" in name:
            assert len({expert.view(torch.int16).numpy().tobytes() for expert in tensor}) == len(tensor)


def test_checkpoint_is_not_written_over(checkpoints: Any) -> None:
    checkpoints("once")
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        checkpoints("once")


def test_routing_skew_makes_few_experts_popular(checkpoints: Any) -> None:
    even, skewed = first_choices(checkpoints("even")), first_choices(checkpoints("skewed", skew=1.5))
    assert even.max() < 2.5 * even.mean()
    assert skewed.max() > 4 * skewed.mean()


def test_memory_cap_holds_a_command(benchmark: Any) -> None:
    memory_cap = benchmark("memory_cap")
    hold = [sys.executable, "-c", "import sys; print(len(bytearray(int(sys.argv[1]))))"]
    try:
        with memory_cap.MemoryCap(64 * 2**20) as cap:
            fits = subprocess.run(cap.command([*hold, str(16 * 2**20)]), capture_output=True, check=False)
            exceeds = subprocess.run(cap.command([*hold, str(128 * 2**20)]), capture_output=True, check=False)
            peak = cap.peak_bytes()
    except memory_cap.CannotCap as refusal:
        pytest.skip(f"needs control groups: {refusal}")
    assert fits.returncode == 0
    assert exceeds.returncode != 0
    assert 16 * 2**20 < peak <= 64 * 2**20


def test_samples_are_the_last_half_and_the_cold_first_eighth(benchmark: Any) -> None:
    steps = [
        {"seconds": 1.0 if n < 2 else 0.5, "cpu_s": 0.75, "read_bytes": 10 * n, "others_s": 0.1} for n in range(16)
    ]
    output = {"steps": steps, "load": {"seconds": 3.0}, "peak_rss_bytes": 7}
    sample = benchmark("contenders").summarize(output)
    assert sample["tok_s"] == 2
    assert sample["cold_tok_s"] == 1
    assert sample["read_bytes_per_token"] == 115
    assert sample["cores"] == 1.5
    assert sample["others_cores"] == pytest.approx(0.2)


def sample_of(tok_s: float, others: float = 0.0) -> dict[str, Any]:
    return {"tok_s": tok_s, "read_bytes_per_token": 1e8, "cores": 1.0, "peak_rss_bytes": 2**30, "others_cores": others}


def table_rows(benchmark: Any, samples: dict[str, Any], limits_others: float = 0.0) -> list[str]:
    """The table's lines below its head, for one capped phase."""
    limits = {"memory_read_gb_s": 30.0, "disk_read_gb_s_1": 2.0, "disk_read_gb_s_2": 1.0, "others_cores": limits_others}
    machine = {"processor": "P", "cores": 2, "memory_bytes": 2**34, "system": "S", "readahead_kib": 128, "threads": 2}
    results = {
        "machine": machine,
        "plan": {"fixed_bytes": 2**28, "all_experts_bytes": 2**30, "touched_bytes_per_token": 3e8},
        "phases": {"decode-60": {"cap_bytes": 2**30, "limits": [limits], "samples": samples}},
    }
    return benchmark("speed_report").format_table(json.loads(json.dumps(results))).splitlines()[2:]


def test_table_has_medians_ratios_and_failures(benchmark: Any) -> None:
    killed = {"failed": "exit code -9 under the cap"}
    ours = [sample_of(9), sample_of(10), sample_of(50)]
    rows = table_rows(benchmark, {"moepack 4 bit": ours, "small": [sample_of(2)], "large": [killed]})
    assert "| 10.0 (9.0 to 50.0) | 3 of 3 |" in rows[0]
    assert "disk 50%" in rows[0]
    assert "| 5.00x |" in rows[1]
    assert killed["failed"] in rows[2]


def test_disturbed_runs_and_limits_make_no_claims(benchmark: Any) -> None:
    ours = [sample_of(10), sample_of(3, others=0.9), sample_of(4, others=0.8)]
    rows = table_rows(benchmark, {"moepack 4 bit": ours, "peer": [sample_of(2, others=0.5)]}, limits_others=1.0)
    assert "| 10.0 (10.0 to 10.0) | 1 of 3 |" in rows[0]
    assert "disk" not in rows[0]
    assert "none quiet" in rows[1]
    assert not any(cell.endswith("x") for cell in rows[1].split())


def test_a_disturbed_measurement_is_repeated_whatever_its_result(benchmark: Any) -> None:
    speed = benchmark("speed")
    planned = [sample_of(99, others=0.5), sample_of(1), sample_of(50)]
    assert speed.until_quiet(iter(planned).__next__) == planned[:2]
    assert len(speed.until_quiet(lambda: sample_of(9, others=1.0))) == speed.ATTEMPTS


def test_a_lap_tells_own_work_from_that_of_others(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = benchmark("laps")
    own = [SimpleNamespace(user=user) for user in (1.0, 1.5)]
    monkeypatch.setattr(laps, "_all_users_s", iter([10.0, 12.0]).__next__)
    monkeypatch.setattr(laps, "os", SimpleNamespace(times=iter(own).__next__))
    assert laps.Meter().lap()["others_s"] == 1.5


def test_quality_pairs_tool_calls_with_bf16_and_draws_both(benchmark: Any, tmp_path: Path) -> None:
    quality = benchmark("quality")
    text = {"perplexity": 23.0, "kl_mean": 0.1, "kl_p99": 0.5, "top1_agreement": 0.8}
    measured = []
    for bits, right in ((16, [True, True, True, False]), (2, [True, True, False, False])):
        row = quality.Row(f"experts{bits}", f"{bits} bits", "mse", (), tmp_path)
        tools = {"n": 4, "well_formed": 1.0, "right_function": 0.75, "correct": sum(right) / 4, "is_correct": right}
        recall = {kind: {"correct": 0.5, "correct_of_reference": 0.9, "intervals": {"correct_of_reference": [0.8, 1]}}
                  for kind in ("needle", "copy")}  # fmt: skip
        measured.append(quality.Measured(row, bits + 0.5, text, tools, recall))
    line = quality.format_row(measured[1], measured[0])
    assert line.startswith("| 2 bits | 2.50 | 23.000 | 0.1000 | 0.5000 | 0.8000 | 1.000 | 0.750 | 0.500 | 0.667 | ")
    assert line.endswith(" | 0.500 | 0.900 (0.800 to 1.000) | 0.500 | 0.900 (0.800 to 1.000) |")
    assert " | 1.000 | 1.000 to 1.000 | " in quality.format_row(measured[0], measured[0])
    quality.draw(measured, tmp_path / "quality.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.png", "quality_tools.png"]

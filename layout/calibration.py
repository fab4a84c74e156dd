"""A calibration file: what moe-run learned of a model's experts for moe-convert, checked against both.

A safetensors file (tensor_file.py) with two tensors of its own: `facts`, a JSON object as bytes, and `facts_sha256`.
The facts name the format's version, the model (sizes, and the fingerprints of the source's shards that every pack and
every conversion of the same checkpoint carries), the text, and the sha256 of every other tensor. Those are, for each
layer L of the trunk with E experts of inputs D and inner width I:

    layers.L.tokens    U32 [E]        tokens that chose the expert
    layers.L.weights   F32 [E]        the sum of their squared router weights
    layers.L.inputs    F32            of gate_proj and up_proj, each token times its squared weight: sums of squared
                                      inputs [E, D], or second moments [E, D, D], or [1, D, D] of the whole layer
    layers.L.stream    F32 [1]        mean square of the hidden states after the layer
    layers.L.inner     F32            of down_proj, likewise: [E, I], [E, I, I]

A sum divided by the sum of weights is a mean; an expert that few tokens chose leans on its layer's (`moments`).

    calibration = Calibration.open(Path("demo.calibration"))
    calibration.moments(layer=3, expert=17, projection="down_proj")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moepack.layout.errors import CalibrationError, UnsupportedVersion
from moepack.layout.manifest import ModelShape
from moepack.layout.reader import NUMPY_DTYPES
from moepack.layout.tensor_file import TensorSpec, layout_tensors, parse_json_object, read_tensor_header
from moepack.layout.writer import atomic_file

CALIBRATION_MAGIC = "moepack-calibration"
CALIBRATION_VERSION = 1
FACTS, FACTS_DIGEST = "facts", "facts_sha256"
PRIOR_TOKENS = 128.0  # tokens of the layer's own mean that an expert's statistics are mixed with
Arrays = Mapping[str, np.ndarray]


class Calibration:
    """An opened file. Tensors are read, and checked, when they are asked for; safe from several threads.

    facts   model, tokens, text, and `full`: whether the moments are whole
    """

    def __init__(self, path: Path, facts: dict[str, Any], tensors: dict[str, TensorSpec]):
        self.path, self.facts, self._tensors = path, facts, tensors
        self._layer: tuple[int, dict[str, np.ndarray]] = (-1, {})

    @classmethod
    def open(cls, path: Path) -> Calibration:
        """Read and check a file's facts. Raises CalibrationError, or UnsupportedVersion for a later format."""
        try:
            tensors = read_tensor_header(path).tensors
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise CalibrationError(f"{path}: {error}: make it again with moe-run calibrate") from None
        if not {FACTS, FACTS_DIGEST} <= set(tensors):
            raise CalibrationError(f"{path}: is no calibration file: make one with moe-run calibrate")
        raw = _read(path, tensors[FACTS]).tobytes()
        if hashlib.sha256(raw).digest() != _read(path, tensors[FACTS_DIGEST]).tobytes():
            raise CalibrationError(f"{path}: its facts do not fit their checksum: make it again with moe-run calibrate")
        try:
            facts = parse_json_object(raw)
        except ValueError as error:
            raise CalibrationError(f"{path}: facts: {error}: make it again with moe-run calibrate") from None
        if facts.get("magic") != CALIBRATION_MAGIC or not isinstance(facts.get("version"), int):
            raise CalibrationError(f"{path}: is no calibration file: make one with moe-run calibrate")
        if facts["version"] != CALIBRATION_VERSION:
            raise UnsupportedVersion(path, facts["version"], CALIBRATION_VERSION)
        listed = {name for name in tensors if name not in (FACTS, FACTS_DIGEST)}
        digests, model = facts.get("sha256"), facts.get("model")
        if not isinstance(model, dict) or not isinstance(digests, dict) or set(digests) != listed:
            raise CalibrationError(f"{path}: its tensors or its model are not those that it lists: make it again")
        return cls(path, facts, tensors)

    @property
    def has_full_moments(self) -> bool:
        """Whether error feedback is possible: second moments of whole inputs, not their diagonals alone."""
        return bool(self.facts.get("full"))

    def check_model(self, shape: ModelShape, source: Mapping[str, Any]) -> None:
        """Raise CalibrationError unless the file was made from this model's own checkpoint."""
        expected = describe_model(shape, source)
        if self.facts.get("model") != expected:
            own = self.facts["model"]
            differing = next((key for key in expected if own.get(key) != expected[key]), "model")
            raise CalibrationError(
                f"{self.path}: belongs to another model: {differing} is {str(own.get(differing))[:80]}, expected "
                f"{str(expected[differing])[:80]}: make one from a pack of this checkpoint with moe-run calibrate"
            )

    def read(self, name: str) -> np.ndarray | None:
        """A tensor by name, compared with its checksum; None if the file has none of that name."""
        if name not in self._tensors:
            return None
        array = _read(self.path, self._tensors[name])
        if hashlib.sha256(array.tobytes()).hexdigest() != self.facts["sha256"][name]:
            raise CalibrationError(f"{self.path}: {name} does not fit its checksum: make the file again")
        return array

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """The statistics of one layer; empty if it has none (an MTP layer). The last one asked for is kept."""
        kept, values = self._layer
        if kept != layer:
            names = ("tokens", "weights", "stream", "inputs", "inner")
            found = {name: self.read(f"layers.{layer}.{name}") for name in names}
            values = {name: array for name, array in found.items() if array is not None}
            self._layer = (layer, values)
        return values

    def stream(self, layer: int) -> float:
        """Mean square of the hidden states after a layer. Raises CalibrationError for a file of an earlier moepack."""
        found = self.layer(layer).get("stream")
        if found is None or not found[0] > 0:
            raise CalibrationError(f"{self.path}: does not say how large the hidden states are: make it again")
        return float(found[0])

    def moments(self, layer: int, expert: int, projection: str) -> np.ndarray | None:
        """Mean squares [K] or second moments [K, K] of a projection's inputs, float32; None where nothing is known.

        An expert's own sums are mixed with PRIOR_TOKENS of its layer's mean, so that one that calibration hardly met
        is quantized for the layer's inputs.
        """
        values = self.layer(layer)
        sums = values.get("inner" if projection == "down_proj" else "inputs")
        if sums is None or not values["weights"].sum() > 0:
            return None
        weights, tokens = values["weights"], values["tokens"]
        mean = sums.sum(0, dtype=np.float64) / weights.sum(dtype=np.float64)
        if len(sums) == 1:
            return mean.astype(np.float32)
        prior = PRIOR_TOKENS * weights.sum(dtype=np.float64) / max(1, int(tokens.sum()))
        return ((sums[expert] + prior * mean) / (weights[expert] + prior)).astype(np.float32)


def describe_model(shape: ModelShape, source: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a model from others: its sizes and one digest over the fingerprints of its shards.

    source   file name -> fingerprint, as in a manifest's provenance and in the settings of a conversion
    """
    shards = {name: source[name] for name in sorted(source) if name.endswith(".safetensors")}
    return {**vars(shape), "shards": hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()}


def write_calibration(
    path: Path,
    facts: Mapping[str, Any],
    arrays: Iterable[tuple[str, str, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write a file whole or not at all. `read` gives each named array, twice: once for its checksum.

    Raises NotEnoughSpace.
    """
    listed = list(arrays)
    digests = {name: hashlib.sha256(read(name).tobytes()).hexdigest() for name, _, _ in listed}
    complete = {"magic": CALIBRATION_MAGIC, "version": CALIBRATION_VERSION, **facts, "sha256": digests}
    raw = json.dumps(complete, sort_keys=True).encode()
    own = {FACTS: raw, FACTS_DIGEST: hashlib.sha256(raw).digest()}
    header, specs = layout_tensors([*listed, *((name, "U8", (len(data),)) for name, data in own.items())])
    with atomic_file(path) as file:
        file.write(header)
        for spec in specs:
            file.write(own[spec.name] if spec.name in own else read(spec.name).tobytes())


def statistics_arrays(layer: int, values: Arrays) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a layer's statistics."""
    return [(f"layers.{layer}.{name}", "U32" if name == "tokens" else "F32", v.shape) for name, v in values.items()]


def _read(path: Path, spec: TensorSpec) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(spec.offset_bytes)
        raw = file.read(spec.size_bytes)
    if len(raw) != spec.size_bytes:
        raise CalibrationError(f"{path}: {spec.name} ends early: make the file again with moe-run calibrate")
    return np.frombuffer(raw, dtype=NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)

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

A tuned file (moe-run calibrate --tune) has none of these but finished matrices instead, as a pack stores them, and in
its facts what they are: `tuned` with the arguments of the conversion that they started from, the schemes of every
layer, those of an MTP layer included, and how they were tuned. For each layer L of the trunk, expert E, projection P:

    tuned.L.E.P.w_q, .scales, .biases    U32, BF16, BF16

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
from moepack.layout.geometry import MatrixGeometry, Scheme
from moepack.layout.manifest import BlockSchemes, ModelShape, block_geometry
from moepack.layout.quantized import bf16_to_float32
from moepack.layout.reader import NUMPY_DTYPES
from moepack.layout.spec import PROJECTIONS
from moepack.layout.tensor_file import TensorSpec, layout_tensors, parse_json_object, read_tensor_header
from moepack.layout.writer import atomic_file

CALIBRATION_MAGIC = "moepack-calibration"
CALIBRATION_VERSION = 2  # 1 is the same without tuned matrices
FACTS, FACTS_DIGEST = "facts", "facts_sha256"
PRIOR_TOKENS = 128.0  # tokens of the layer's own mean that an expert's statistics are mixed with


class Calibration:
    """An opened file. Tensors are read, and checked, when they are asked for; safe from several threads.

    facts   model, tokens, text, `full`: whether the moments are whole, and `tuned` of a tuned file
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
        if not 1 <= facts["version"] <= CALIBRATION_VERSION:
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

    @property
    def tuned(self) -> dict[str, Any] | None:
        """How the file's matrices were tuned; None of a file of statistics."""
        return self.facts.get("tuned")

    @property
    def identity(self) -> Any:
        """What tells the file from others, for a conversion's settings."""
        if self.tuned is None:
            return self.facts["sha256"]
        return {key: value for key, value in self.facts.items() if key not in ("model", "sha256")} | {
            "digests": hashlib.sha256(json.dumps(self.facts["sha256"], sort_keys=True).encode()).hexdigest()
        }

    def check_model(self, shape: ModelShape, source: Mapping[str, Any]) -> None:
        """Raise CalibrationError unless the file was made from this model's own checkpoint and is whole."""
        expected = describe_model(shape, source)
        if self.facts.get("model") != expected:
            own = self.facts["model"]
            differing = next((key for key in expected if own.get(key) != expected[key]), "model")
            raise CalibrationError(
                f"{self.path}: belongs to another model: {differing} is {str(own.get(differing))[:80]}, expected "
                f"{str(expected[differing])[:80]}: make one from a pack of this checkpoint with moe-run calibrate"
            )
        if self.tuned is not None:
            self._check_matrices(shape)

    def _check_matrices(self, shape: ModelShape) -> None:
        """Raise CalibrationError unless every expert of the trunk has its tuned matrices, in their sizes."""
        schemes = self.tuned_schemes()
        if not all(len(expert_tiers) == shape.num_experts for _, expert_tiers in schemes):
            raise CalibrationError(f"{self.path}: does not say what every expert is tuned as: make it again")
        for layer, (tiers, expert_tiers) in enumerate(schemes[: shape.num_hidden_layers]):
            matrices = [block_geometry(shape, tier).matrices for tier in tiers]
            for expert, tier in enumerate(expert_tiers):
                for projection, matrix in matrices[tier]:
                    for name, *expected in tuned_arrays(layer, expert, projection, matrix):
                        spec = self._tensors.get(name)
                        found = spec and [spec.dtype, spec.shape]
                        if found != expected:
                            raise CalibrationError(
                                f"{self.path}: {name}: expected {expected}, found {found}: make it again"
                            )

    def tuned_schemes(self) -> list[tuple[tuple[BlockSchemes, ...], tuple[int, ...]]]:
        """Of every layer the kinds of block and the one of each expert, as in a manifest. Raises CalibrationError."""
        assert self.tuned is not None
        try:
            return [
                (
                    tuple({name: Scheme(**tier[name]) for name in PROJECTIONS} for tier in layer["tiers"]),
                    tuple(range(len(layer["tiers"]))[tier] for tier in layer["expert_tiers"]),
                )
                for layer in self.tuned["schemes"]
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CalibrationError(f"{self.path}: schemes of the tuned matrices: {error!r}: make it again") from None

    def tuned_matrix(self, layer: int, expert: int, projection: str) -> dict[str, np.ndarray] | None:
        """The arrays of a tuned matrix by the names that blocks use, None if the file has none (an MTP layer).

        Raises CalibrationError if a scale or a bias is not finite.
        """
        stem = f"tuned.{layer}.{expert}.{projection}"
        arrays = {name: self.read(f"{stem}.{name}") for name in ("w_q", "scales", "biases")}
        found = {name: array for name, array in arrays.items() if array is not None}
        if not found:
            return None
        if not all(np.isfinite(bf16_to_float32(found[name])).all() for name in ("scales", "biases")):
            raise CalibrationError(f"{self.path}: {stem}: holds NaN or infinity: make it again")
        return found

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

    In memory is one array at a time, so far as `read` leaves it at that. Raises NotEnoughSpace.
    """
    listed = list(arrays)
    digests = {name: hashlib.sha256(_bytes_of(read(name))).hexdigest() for name, _, _ in listed}
    complete = {"magic": CALIBRATION_MAGIC, "version": CALIBRATION_VERSION, **facts, "sha256": digests}
    raw = json.dumps(complete, sort_keys=True).encode()
    own = {FACTS: raw, FACTS_DIGEST: hashlib.sha256(raw).digest()}
    header, specs = layout_tensors([*listed, *((name, "U8", (len(data),)) for name, data in own.items())])
    with atomic_file(path) as file:
        file.write(header)
        for spec in specs:
            file.write(own[spec.name] if spec.name in own else _bytes_of(read(spec.name)))


def tuned_arrays(
    layer: int, expert: int, projection: str, matrix: MatrixGeometry
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a tuned matrix's arrays."""
    return [(f"tuned.{layer}.{expert}.{projection}.{name}", dtype, shape) for name, dtype, shape in matrix.arrays]


def statistics_arrays(layer: int, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a layer's statistics, from their shapes by name."""
    return [(f"layers.{layer}.{name}", "U32" if name == "tokens" else "F32", shape) for name, shape in shapes.items()]


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array where they lie: second moments of a layer are gigabytes, too many for a copy."""
    return np.ascontiguousarray(array).reshape(-1).data


def _read(path: Path, spec: TensorSpec) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(spec.offset_bytes)
        raw = file.read(spec.size_bytes)
    if len(raw) != spec.size_bytes:
        raise CalibrationError(f"{path}: {spec.name} ends early: make the file again with moe-run calibrate")
    return np.frombuffer(raw, dtype=NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)

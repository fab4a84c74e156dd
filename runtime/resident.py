"""The weights that stay in memory: all that is not a routed expert, as they lie in the pack.

The MTP head is left on the disk: nothing here drafts with it.

    weights = ResidentWeights.load(pack)
    weights.matrix("model.layers.0.mlp.gate")
"""

from __future__ import annotations

import torch

from moepack.kernels.matrix import Expert, Matrix
from moepack.layout.architecture import Architecture, resident_shapes
from moepack.layout.errors import DamagedPack
from moepack.layout.geometry import MatrixGeometry
from moepack.layout.reader import Pack
from moepack.layout.spec import PROJECTIONS, RESIDENT_NAME

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
UNUSED_PREFIX = "mtp."


class ResidentWeights:
    """Matrices and vectors by their name in the pack."""

    def __init__(self, tensors: dict[str, torch.Tensor], pack: Pack):
        self._tensors = tensors
        self._quantized = pack.manifest.resident.quantized

    @classmethod
    def load(cls, pack: Pack, architecture: Architecture) -> ResidentWeights:
        """Read every tensor that the model needs. Raises DamagedPack if one is missing, misshapen or unreadable."""
        for name, shape in resident_shapes(architecture, mtp_layers=0).items():
            found = pack.manifest.resident.shape_of(name)
            if found != shape:
                text = f"{name} is {found or 'missing'}, the config needs {shape}: convert again"
                raise DamagedPack(pack.directory / RESIDENT_NAME, text)
        tensors = {}
        for name, entry in pack.manifest.resident.tensors.items():
            if not name.startswith(UNUSED_PREFIX):
                raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
                pack.read_resident(name, into=raw.numpy().data)
                plain = entry.dtype in TORCH_DTYPES
                tensors[name] = raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape) if plain else raw
        return cls(tensors, pack)

    @staticmethod
    def size_bytes(pack: Pack) -> int:
        """Memory that the weights take."""
        tensors = pack.manifest.resident.tensors
        return sum(entry.size_bytes for name, entry in tensors.items() if not name.startswith(UNUSED_PREFIX))

    def matrix(self, name: str) -> Matrix:
        """A matrix by its name without ".weight", as it is stored."""
        weight = self._tensors[f"{name}.weight"]
        scheme = self._quantized.get(name)
        if scheme is None or scheme.group_size is None:
            return Matrix.from_floats(weight)
        scales, biases = (self._tensors[f"{name}.{part}"] for part in ("scales", "biases"))
        geometry = MatrixGeometry(scales.shape[0], scales.shape[1] * scheme.group_size, scheme)
        return Matrix.from_arrays(geometry, [weight, scales.flatten(), biases.flatten()])

    def vector(self, name: str) -> torch.Tensor:
        """A small tensor by its full name, in float32."""
        return self._tensors[name].float()

    def expert(self, stem: str) -> Expert:
        """A shared expert."""
        return Expert(*(self.matrix(f"{stem}.{name}") for name in PROJECTIONS))

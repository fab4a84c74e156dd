"""Memory for kernels under test: weights in one run, as a pack's bytes lie in it, structs, results not written yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moepack.kernels.matrix import Matrix

ALIGNMENT = 64


class Host:
    """The processor as a device for tensors to be written: what is read unwritten shows."""

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)


def bytes_tensor(data: bytes) -> torch.Tensor:
    """Packed structs as a buffer."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def spread(rows: torch.Tensor) -> torch.Tensor:
    """Rows [R, K] as kernels read inputs: the first four columns of every unit of 32, then the next four."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32), value=torch.nan)
    return padded.view(len(rows), -1, 8, 4).transpose(1, 2).reshape(padded.shape).contiguous()


def gather(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """The columns of spread rows in their order: [R, columns]."""
    return rows.view(len(rows), 8, -1, 4).transpose(1, 2).reshape(rows.shape)[:, :columns]


def lay_out(matrices: Sequence[Matrix], spare_bytes: int = 0) -> tuple[torch.Tensor, list[Matrix]]:
    """Copies of matrices in one tensor of bytes, which ends where the last array does (plus spare_bytes)."""
    parts = [part for matrix in matrices for part in (matrix.data, matrix.scales, matrix.biases) if part is not None]
    starts, end = [], 0
    for part in parts:
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + part.numel() * part.element_size()
    base = torch.zeros(end + spare_bytes, dtype=torch.uint8)
    views = iter([_place(base, start, part) for start, part in zip(starts, parts)])
    copies = []
    for matrix in matrices:
        data, scales, biases = (
            part if part is None else next(views) for part in (matrix.data, matrix.scales, matrix.biases)
        )
        assert data is not None
        copies.append(Matrix(matrix.out_features, matrix.in_features, matrix.bits, data, scales, biases))
    return base, copies


def _place(base: torch.Tensor, start: int, part: torch.Tensor) -> torch.Tensor:
    raw = part.reshape(-1).view(torch.uint8)
    place = base[start : start + len(raw)]
    place.copy_(raw)
    return place.view(part.dtype).view(part.shape)

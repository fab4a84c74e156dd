"""The memory budget of a conversion: how many pieces of work may be in flight.

The process as it is (interpreter, numpy, headers of the shards) is measured; each piece then needs the source bytes of
an expert, which are read ahead, what its quantizer works in, and its finished block until that is written. The size of
the model is not in it.

    threads = fit_threads(plan, workers=8, budget_bytes=4 * 2**30)
"""

from __future__ import annotations

import math

from moepack.convert.plan import ConversionPlan
from moepack.layout.errors import MemoryBudgetError
from moepack.layout.manifest import block_geometry
from moepack.layout.pages import Pages
from moepack.layout.process import resident_set_bytes
from moepack.layout.sequential import BUFFER_BYTES
from moepack.layout.sizes import format_size

DEFAULT_MEMORY = "4GiB"
PIECE_BYTES = 8 * 2**20  # source bytes of a resident matrix dealt with at a time
READS_AHEAD = 2  # pieces beyond those that the workers compute: they are read meanwhile
ALLOCATOR_BYTES = 48 * 2**20  # arenas, thread stacks, the manifest as it grows
# Per weight of the matrix at hand; the others, and the error of tuned weights, work in several copies of float32.
WORKING_BYTES = {"minmax": 4, "mse": 4}
WORKING_BYTES_ELSE = 48


def fit_threads(plan: ConversionPlan, workers: int, budget_bytes: int) -> int:
    """Threads for so many workers, fewer if the budget says so. Raises MemoryBudgetError if not even one fits."""
    fixed = resident_set_bytes() + BUFFER_BYTES + ALLOCATOR_BYTES
    each = thread_bytes(plan)
    if fixed + each > budget_bytes:
        raise MemoryBudgetError(
            f"--memory {format_size(budget_bytes)} is too small: the process takes {format_size(fixed)} and an expert "
            f"in work {format_size(each)}: give at least {format_size(fixed + each)}"
        )
    return min(workers + READS_AHEAD, (budget_bytes - fixed) // each)


def thread_bytes(plan: ConversionPlan) -> int:
    """The most memory that one piece of work needs from its first read until its result is written."""
    tiers = {id(tier): tier for layer in plan.schemes for tier in layer.tiers}.values()
    block = max((block_geometry(plan.shape, tier) for tier in tiers), key=lambda block: block.block_stride)
    sizes = [matrix.num_weights for _, matrix in block.matrices]
    stored = [place.weight for layer in plan.source.experts for place in layer[0].values()]
    each = max(weight.source_bytes / math.prod(weight.shape) + weight.working_bytes for weight in stored)
    source = max(sum(Pages.round_up(int(size * each)) for size in sizes), Pages.round_up(PIECE_BYTES))
    is_tuned = plan.calibration is not None and plan.calibration.tuned is not None
    per_weight = WORKING_BYTES_ELSE if is_tuned else WORKING_BYTES.get(plan.recipe.quantizer, WORKING_BYTES_ELSE)
    working = max(*sizes, PIECE_BYTES // 2) * per_weight
    # The arrays of the block, the block itself, and one that waits for its turn to be written.
    return source + working + 3 * block.block_stride

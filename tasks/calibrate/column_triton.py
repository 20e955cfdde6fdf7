"""The loop over one step of columns in one kernel, for CUDA: with torch operations it is a dozen launches a column.

A program has a few rows of the weight. What the columns before have left is kept in registers, [step, rows], and a column is
read with all of it taken off at once.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

ROWS = 8  # of a program, which is one warp


# Triton resolves annotations on the device's side, where there is no `Any`.
@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(  # type: ignore[no-untyped-def,unused-ignore]  # noqa: ANN202
    # a kernel takes each tensor and each size by itself
    rest,  # noqa: ANN001
    scale,  # noqa: ANN001
    ranks,  # noqa: ANN001
    kept,  # noqa: ANN001
    matrix,  # noqa: ANN001
    values,  # noqa: ANN001
    levels,  # noqa: ANN001
    bounds,  # noqa: ANN001
    rows,  # noqa: ANN001
    count,  # noqa: ANN001
    stride,  # noqa: ANN001
    codes: tl.constexpr,
    descend: tl.constexpr,
    step: tl.constexpr,
    tile: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = row < rows
    lanes = tl.arange(0, step)
    held = tl.zeros([step, tile], tl.float32)
    for j in range(count):
        above = tl.load(matrix + j * stride + lanes, mask=lanes < j, other=0.0)
        diagonal = tl.load(matrix + j * stride + j)
        taken = tl.sum(above[:, None] * held, 0)
        at = j * rows + row
        value = tl.load(rest + at, mask=inside, other=0.0)
        s = tl.load(scale + at, mask=inside, other=0.0)
        if descend:
            old = tl.load(values + at, mask=inside, other=0.0)
            wanted = old - (value + taken) / diagonal
        else:
            wanted = value - taken
        x = tl.where(s != 0, wanted / s, 0.0)
        rank = tl.zeros([tile], tl.int32)
        for k in tl.static_range(codes - 1):
            rank += (x > tl.load(bounds + k)).to(tl.int32)
        new = tl.load(levels + rank) * s
        if descend:
            keep = new - old
        else:
            keep = (wanted - new) / diagonal
        held = tl.where(lanes[:, None] == j, keep[None, :], held)
        tl.store(ranks + at, rank, mask=inside)
        tl.store(kept + at, keep, mask=inside)


def round_columns(
    rest: "torch.Tensor",
    scale: "torch.Tensor",
    ranks: "torch.Tensor",
    kept: "torch.Tensor",
    matrix: "torch.Tensor",
    values: "torch.Tensor | None",
    grid: "tuple[torch.Tensor, torch.Tensor]",
) -> None:
    """Round the columns of one step, in place.

    Args:
        rest: F32 [columns, rows]: what to round, or with `values` the slope of the loss.
        scale: F32 [columns, rows].
        ranks: Int32 [columns, rows], written.
        kept: F32 [columns, rows], written: the errors over the diagonal, or with `values` the changes.
        matrix: F32 [columns, columns]: row j is what the columns before it put on column j, and its diagonal.
        values: F32 [columns, rows]: the weights as they are, for coordinate descent.
        grid: The levels and the bounds between them.
    """
    count, rows = rest.shape
    step = max(16, 1 << (count - 1).bit_length())
    levels, bounds = grid
    _kernel[(-(-rows // ROWS),)](
        rest, scale, ranks, kept, matrix, rest if values is None else values, levels, bounds, rows, count, matrix.stride(0),
        codes=len(levels), descend=values is not None, step=step, tile=ROWS, num_warps=1,
    )  # fmt: skip

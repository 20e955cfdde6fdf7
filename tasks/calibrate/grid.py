"""The values that a code can stand for, and blocks of weights that share a scale. It knows no format's name.

A weight w in a block with scale s is stored as the code of the level nearest to w / s, and read as level * s. Blocks are
`block` weights that follow each other in the row-major weight; where a row is no multiple of it, they cross rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

CELLS = 4096  # of equal width, which `roughly` divides [-1, 1] into


def _same(scales: torch.Tensor) -> torch.Tensor:
    return scales


@dataclass(frozen=True)
class Grid:
    """The levels of a format, F32 [codes], each at the place of its code; and how many weights share a scale."""

    levels: torch.Tensor
    block: int
    as_stored: Callable[[torch.Tensor], torch.Tensor] = _same
    """From all scales of a weight, F32 [blocks], to what they are when they are read again: rounded, if they are quantized."""
    signed: bool = False
    """Whether a scale may be negative."""
    order: torch.Tensor = field(init=False)
    """The code of each level, U8, smallest level first."""
    sorted: torch.Tensor = field(init=False)
    bounds: torch.Tensor = field(init=False)
    """Halfway between neighbouring levels, F32 [codes - 1]."""
    table: torch.Tensor = field(init=False)
    mirrored: bool = field(init=False)
    """Whether the negative of each level is a level: then a negative scale would give nothing new."""

    def __post_init__(self) -> None:
        order = torch.argsort(self.levels, stable=True)
        levels = self.levels[order]
        bounds = (levels[1:] + levels[:-1]) / 2
        cells = torch.linspace(-1, 1, CELLS + 1, device=levels.device)
        object.__setattr__(self, "order", order.to(torch.uint8))
        object.__setattr__(self, "sorted", levels)
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "mirrored", torch.equal(levels, -levels.flip(0)))
        object.__setattr__(self, "table", levels[torch.bucketize(cells, bounds)])

    def to(self, device: torch.device) -> "Grid":
        """The same on another device."""
        return Grid(self.levels.to(device), self.block, self.as_stored, self.signed)

    def ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The rank of the level nearest to each of `values`, which are weights divided by their scales. Int32."""
        return torch.bucketize(values, self.bounds, out_int32=True)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The level nearest to each of `values`."""
        return self.sorted[self.ranks(values)]

    def roughly(self, values: torch.Tensor) -> torch.Tensor:
        """The same, by a table: where a value lies within 1/4096 of a bound it may be the other neighbour. Much quicker."""
        cells = torch.add(CELLS / 2 + 0.5, values, alpha=CELLS / 2).clamp_(0, CELLS).to(torch.int32)
        return self.table.index_select(0, cells.view(-1)).view(values.shape)

    def scales(self, shape: tuple[int, int]) -> int:
        """How many scales a weight [rows, columns] has."""
        return -(-shape[0] * shape[1] // self.block)

    def spread(self, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Each weight's scale, [rows, columns], from `scales` [blocks]."""
        rows, columns = shape
        return scales.repeat_interleave(self.block)[: rows * columns].view(rows, columns)

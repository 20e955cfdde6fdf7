"""From the Hessian of a layer's inputs to its codes and scales."""

from dataclasses import dataclass

import torch

from tasks.calibrate import scales, solve
from tasks.calibrate.grid import Grid

ROWS = {"cpu": 1 << 10, "cuda": 1 << 13}  # of weights, worked on at once


@dataclass(frozen=True)
class Effort:
    """How codes and scales are chosen; the numbers are those that did best on texts that were not calibrated on (RESULTS)."""

    damping: float = 0.1
    """Of the mean of the Hessian's diagonal."""
    shrink: float = 0.1
    """By how much the Hessian's entries off its diagonal are lessened: how inputs go together differs between texts."""
    share: float = 0.75
    """How much of the error of the blocks before is made up for: GPTAQ's alpha."""
    factors: tuple[float, ...] = tuple(0.8 + 0.05 * step for step in range(7))
    """What a block's largest magnitude is multiplied with to find its scale; with both signs, where levels are no mirror of
    each other."""
    rounds: int = 3
    """How often scales are then fitted to the codes, by least squares with the whole Hessian, and the codes to the scales."""
    tunings: int = 0
    """How often all of the text is then gone through to tune the scales of a block together."""
    rate: float = 1e-3
    """Of that tuning."""


@dataclass(frozen=True)
class Codes:
    """A quantized weight: its codes, U8 [rows, columns], and its scales, F32 [blocks], before they are themselves rounded."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self, grid: Grid) -> torch.Tensor:
        """The weight that they stand for, F32 [rows, columns]."""
        shape = (self.codes.shape[0], self.codes.shape[1])
        return grid.levels[self.codes.int()] * grid.spread(grid.as_stored(self.scales), shape)


def nearest(weight: torch.Tensor, found: torch.Tensor, grid: Grid) -> Codes:
    """The nearest codes with given scales."""
    spread = grid.spread(grid.as_stored(found), (weight.shape[0], weight.shape[1]))
    return Codes(grid.order[grid.ranks(torch.where(spread != 0, weight / spread, 0))], found)


def searched(weight: torch.Tensor, hessian: torch.Tensor, name: str, grid: Grid, effort: Effort) -> Codes:
    """Codes that are chosen together within each run of columns, with scales that are searched for.

    `hessian` has the runs' parts of the Hessian on its diagonal, F32 [runs, columns of a run, the same], not damped.
    """
    rows = len(weight)
    hessian = hessian.clone()  # other layers are given the same
    solve.shrink(hessian, effort.shrink)
    made = solve.local_form(hessian, effort.damping, name)
    importance = hessian.diagonal(dim1=1, dim2=2).reshape(-1)
    found = scales.search(weight, importance, grid, effort.factors)
    spread = grid.spread(grid.as_stored(found), (rows, weight.shape[1]))
    several = ROWS[weight.device.type]
    pieces = [slice(start, start + several) for start in range(0, rows, several)]
    ranks = torch.cat([solve.local_loop(weight[piece], spread[piece], made, grid) for piece in pieces])
    if hessian.shape[1] % grid.block == 0:
        found = solve.local_refit(weight, found, ranks, made, grid)
    return Codes(grid.order[ranks], found)


def solved(
    weight: torch.Tensor,
    importance: torch.Tensor,
    shift: torch.Tensor | None,
    made: solve.Form,
    grid: Grid,
    effort: Effort,
) -> Codes:
    """Codes chosen together, and scales for them.

    Args:
        weight: F32 [rows, columns].
        importance: The Hessian's diagonal, not damped.
        shift: W (C - H), F32 [rows, columns], by which the blocks before move the target; None where they do not.
        made: The Hessian.
        grid: The format's levels.
        effort: How.
    """
    rows, columns = weight.shape
    whole = columns % grid.block == 0
    several = ROWS[weight.device.type] if whole else rows
    pieces = [slice(start, min(start + several, rows)) for start in range(0, rows, several)]
    goal = weight
    if shift is not None:
        goal = torch.cat([solve.target(weight[piece], shift[piece], made, effort.share) for piece in pieces])
    found = scales.search(goal, importance, grid, effort.factors)
    stored = grid.as_stored(found)
    ranks = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)

    def piece_of(piece: slice) -> torch.Tensor:
        """The scales of some rows, [blocks]."""
        return stored if not whole else stored.view(rows, -1)[piece].reshape(-1)

    for piece in pieces:
        ranks[piece] = solve.column_loop(goal[piece], grid.spread(piece_of(piece), goal[piece].shape), made, grid)
    for _ in range(effort.rounds):
        if whole:
            fits = [solve.refit(goal[piece], piece_of(piece), ranks[piece].int(), made, grid) for piece in pieces]
            found = torch.cat(fits)
            stored = grid.as_stored(found)
        for piece in pieces:
            spread = grid.spread(piece_of(piece), goal[piece].shape)
            ranks[piece] = solve.descend(goal[piece], spread, ranks[piece].int(), made, grid)
    return Codes(grid.order[ranks.int()], found)

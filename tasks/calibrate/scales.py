"""The scale of each block of weights, searched for the least error of what the layer puts out."""

import torch

from tasks.calibrate.grid import Grid

PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}  # weights worked on at once


def largest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Each block's largest magnitude, F32 [blocks]: the scale that is taken without a search."""
    return _blocks(weight, grid.block).abs().amax(1)


def search(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, factors: tuple[float, ...]) -> torch.Tensor:
    """Scales with the least squared error of the weights, each weighted by its column's importance.

    Args:
        weight: F32 [rows, columns].
        importance: F32 [columns], the mean square of what each column is multiplied with: the Hessian's diagonal.
        grid: The format's levels.
        factors: What each block's largest magnitude is multiplied with.

    Returns:
        F32 [blocks].
    """
    blocks = _blocks(weight, grid.block)
    weights = _blocks(importance.expand(weight.shape), grid.block)
    best = torch.empty(len(blocks), device=weight.device)
    several = max(1, PIECE[weight.device.type] // grid.block)
    for start in range(0, len(blocks), several):
        part, mass = blocks[start : start + several], weights[start : start + several]
        best[start : start + several] = _search(part, mass, grid, factors)
    return best


def _search(part: torch.Tensor, mass: torch.Tensor, grid: Grid, factors: tuple[float, ...]) -> torch.Tensor:
    top = part.abs().amax(1)
    best, least = top.clone(), torch.full_like(top, torch.inf)
    if grid.signed and not grid.mirrored:
        factors = (*factors, *(-factor for factor in factors))
    for factor in factors:
        scale = top * factor
        error = _error(part, mass, scale, grid)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _error(part: torch.Tensor, mass: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Each block's weighted squared error with these scales."""
    inverse = torch.where(scale != 0, 1 / scale, 0)
    levels = grid.roughly(part * inverse[:, None])
    lost = torch.addcmul(part, levels, scale[:, None], value=-1)
    return lost.square_().mul_(mass).sum(1)


def _blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """[rows, columns] as [blocks, block], filled up with zeros."""
    flat = values.reshape(-1)
    if short := -flat.numel() % block:
        flat = torch.cat([flat, flat.new_zeros(short)])
    return flat.view(-1, block)

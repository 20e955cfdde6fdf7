"""The codes of a layer's weights, chosen together, so that the layer puts out what the original does.

A linear layer with weights W [rows, columns] is read from a text as a quadratic form: with X the inputs of the quantized
model, one token a row, and H = X^T X, weights Q instead of a target T cost tr((T - Q) H (T - Q)^T).

- `target`: Frantar et al. 2022 (GPTQ, arXiv 2210.17323) take T = W. Where the blocks before are quantized, X is not what the
  original would see; with X' the original's inputs and C = X'^T X, the T that puts out W X' is W + W (C - H) H^-1
  (Li et al. 2025, GPTAQ, arXiv 2504.02692), of which a part is taken.
- `column_loop`: GPTQ's: column after column is rounded, and what was lost is put on the columns to come, by the rows of the
  Cholesky factor of H^-1. Columns go by falling diagonal; scales are static.
- `local_loop`: the same within each block of columns that share scales, all blocks at once, by the blocks of H on its diagonal.
- `descend`: every column again, given all others: coordinate descent (Behdin et al. 2023, QuantEase, arXiv 2309.01885).
- `refit`: the scales again, given the codes: least squares, block by block.
"""

import logging
from dataclasses import dataclass

import torch

from tasks.calibrate.grid import Grid

log = logging.getLogger("tame.calibrate")

RAISED = "the Hessian of %s cannot be inverted; its damping is raised to %g of the mean diagonal"
STEP = 128  # columns between two products with all that come after


@dataclass
class Form:
    """A damped Hessian, F32 [columns, columns], and its factor in the order in which columns are rounded.

    `factor` is the upper triangular U with H^-1 = U^T U, where H's rows and columns are taken by `order`.
    """

    order: torch.Tensor
    hessian: torch.Tensor
    factor: torch.Tensor
    damping: float


def form(hessian: torch.Tensor, damping: float, name: str) -> Form:
    """Damp a Hessian H, F32 [columns, columns], in place, and return the upper triangular U with U^T U = H^-1 that GPTQ needs.

    `damping` is a fraction of the mean of H's diagonal, which is added to the diagonal. While the Cholesky factorization still
    fails, it is raised tenfold, and a warning names the layer, `name`. U is the inverse of the Cholesky factor of H with its
    rows and columns in reverse order, reversed again.
    """
    diagonal = hessian.diagonal().clone()
    order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    mean = float(diagonal.mean())
    while True:
        hessian.diagonal().copy_(diagonal).add_(damping * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(hessian[reverse[:, None], reverse])
        if not failed:
            break
        damping *= 10
        log.warning(RAISED, name, damping)
    factor = torch.eye(len(hessian), device=hessian.device)
    torch.linalg.solve_triangular(lower, factor, upper=False, out=factor)  # in place: such a matrix can have 0.6 GB
    del lower
    return Form(order, hessian, factor.flip(0, 1), damping)


def shrink(hessian: torch.Tensor, share: float) -> None:
    """Lessen the entries off the diagonal of a Hessian, or of several, F32 [..., columns, columns], by `share`, in place.

    The Hessian is an estimate from one text. Its diagonal holds for other texts too, and what is off it less so (Ledoit and
    Wolf 2004 shrink covariances likewise).
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()
    hessian.mul_(1 - share).diagonal(dim1=-2, dim2=-1).copy_(diagonal)


def target(weight: torch.Tensor, shift: torch.Tensor, made: Form, share: float) -> torch.Tensor:
    """T = W + share * shift H^-1, F32 [rows, columns]; `shift` is W (C - H), [rows, columns]."""
    moved = shift[:, made.order] @ made.factor.T @ made.factor
    out = weight.clone()
    out[:, made.order] += share * moved
    return out


def column_loop(goal: torch.Tensor, scales: torch.Tensor, made: Form, grid: Grid) -> torch.Tensor:
    """Round `goal`, F32 [rows, columns], column by column. Returns ranks of levels, Int32 [rows, columns].

    `scales` are each weight's, F32 [rows, columns].
    """
    rest, scale = goal.T[made.order], scales.T[made.order]  # a column is contiguous
    ranks = torch.empty(rest.shape, dtype=torch.int32, device=rest.device)
    factor = made.factor
    for start in range(0, len(rest), STEP):
        end = min(start + STEP, len(rest))
        within = factor[start:end, start:end].T.contiguous()
        errors = _round(rest[start:end], scale[start:end], ranks[start:end], within, None, grid)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    out = torch.empty_like(ranks)
    out[made.order] = ranks
    return out.T.contiguous()


@dataclass
class LocalForm:
    """The blocks of a Hessian on its diagonal, damped, F32 [blocks, columns, columns], and their factors, as in `Form`.

    `order` is that of the columns within each block, Int64 [blocks, columns].
    """

    order: torch.Tensor
    hessian: torch.Tensor
    factor: torch.Tensor


def local_form(hessian: torch.Tensor, damping: float, name: str) -> LocalForm:
    """Damp and factor the blocks, F32 [blocks, columns, columns], as `form` does with a whole Hessian."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    reverse = order.flip(1)
    mean = float(diagonal.mean())
    identity = torch.eye(hessian.shape[1], device=hessian.device)
    while True:
        damped = hessian + (damping * mean if mean > 0 else 1.0) * identity
        turned = damped.gather(1, reverse[:, :, None].expand_as(damped))
        lower, failed = torch.linalg.cholesky_ex(turned.gather(2, reverse[:, None, :].expand_as(damped)))
        if not bool(failed.any()):
            break
        damping *= 10
        log.warning(RAISED, name, damping)
    factor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return LocalForm(order, damped, factor.flip(1, 2))


def local_loop(goal: torch.Tensor, scales: torch.Tensor, made: LocalForm, grid: Grid) -> torch.Tensor:
    """As `column_loop`, with what was lost put on the later columns of the same block alone."""
    rows = len(goal)
    blocks, width = made.order.shape
    columns = made.order[:, :, None].expand(blocks, width, rows)

    def turned(values: torch.Tensor) -> torch.Tensor:
        """[rows, columns] as [blocks, columns of a block in their order, rows]."""
        return values.T.view(blocks, width, rows).gather(1, columns)

    rest, scale = turned(goal), turned(scales)
    kept, ranks = torch.empty_like(rest), torch.empty(rest.shape, dtype=torch.int32, device=goal.device)
    for j in range(width):
        wanted, own = rest[:, j], scale[:, j]
        if j:
            wanted = wanted - (made.factor[:, None, :j, j] @ kept[:, :j])[:, 0]
        ranks[:, j] = grid.ranks(torch.where(own != 0, wanted / own, 0))
        kept[:, j] = (wanted - grid.sorted[ranks[:, j]] * own) / made.factor[:, j, j, None]
    out = torch.empty_like(ranks).scatter_(1, columns, ranks)
    return out.view(-1, rows).T.contiguous()


def local_refit(
    goal: torch.Tensor, scales: torch.Tensor, ranks: torch.Tensor, made: LocalForm, grid: Grid
) -> torch.Tensor:
    """As `refit`, with each block by itself."""
    runs, columns = made.order.shape
    width, several = grid.block, columns // grid.block
    blocks = runs * several
    within = made.hessian.view(runs, several, width, several, width).diagonal(dim1=1, dim2=3)
    levels = grid.sorted[ranks].view(len(goal), blocks, width).transpose(0, 1)
    weighted = levels @ within.permute(0, 3, 1, 2).reshape(blocks, width, width)
    over = (weighted * levels).sum(2)
    least = (weighted * goal.view(len(goal), blocks, width).transpose(0, 1)).sum(2) / over
    return torch.where(over > 0, least, scales.view(len(goal), blocks).T).T.reshape(-1)


def descend(goal: torch.Tensor, scales: torch.Tensor, ranks: torch.Tensor, made: Form, grid: Grid) -> torch.Tensor:
    """One sweep of coordinate descent over all columns; arguments and result as `column_loop`'s."""
    scale, out = scales.T.contiguous(), ranks.T.contiguous()
    values = grid.sorted[out] * scale
    error = values - goal.T
    hessian = made.hessian
    for start in range(0, len(error), STEP):
        end = min(start + STEP, len(error))
        slope = hessian[start:end] @ error
        within = hessian[start:end, start:end].contiguous()
        error[start:end] += _round(slope, scale[start:end], out[start:end], within, values[start:end], grid)
    return out.T.contiguous()


def _round(
    rest: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
    matrix: torch.Tensor,
    values: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """The columns of one step, as `column_triton.round_columns`, which see. Returns what that calls `kept`."""
    kept = torch.empty_like(rest)
    if rest.is_cuda:
        from tasks.calibrate.column_triton import round_columns

        round_columns(rest, scale, ranks, kept, matrix, values, (grid.sorted, grid.bounds))
        return kept
    inverse = torch.where(scale != 0, 1 / scale, 0)
    diagonal = matrix.diagonal().tolist()
    for j in range(len(rest)):
        taken = matrix[j, :j] @ kept[:j]
        wanted = rest[j] - taken if values is None else values[j] - (rest[j] + taken) / diagonal[j]
        torch.bucketize(wanted * inverse[j], grid.bounds, out_int32=True, out=ranks[j])
        new = grid.sorted[ranks[j]] * scale[j]
        kept[j] = (wanted - new) / diagonal[j] if values is None else new - values[j]
    return kept


def refit(goal: torch.Tensor, scales: torch.Tensor, ranks: torch.Tensor, made: Form, grid: Grid) -> torch.Tensor:
    """Scales [blocks] anew for given codes: one sweep over blocks, each at its least squares given the others.

    Blocks must not cross rows.
    """
    rows, columns = goal.shape
    hessian = made.hessian
    levels = grid.sorted[ranks]
    scale = scales.view(rows, columns // grid.block).clone()
    error = levels * scale.repeat_interleave(grid.block, 1) - goal
    for b in range(columns // grid.block):
        part = slice(b * grid.block, (b + 1) * grid.block)
        q = levels[:, part]
        up = ((error @ hessian[:, part]) * q).sum(1)
        down = ((q @ hessian[part, part]) * q).sum(1)
        step = torch.where(down > 0, up / down, 0)
        scale[:, b] -= step
        error[:, part] -= step[:, None] * q
    return scale.view(-1)

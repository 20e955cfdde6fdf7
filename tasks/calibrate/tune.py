"""Scales tuned together, so that a whole block puts out what the original one does; its codes stay as they are.

The error of a block's output is lowered by gradient descent (Adam) on a factor for each scale, as OmniQuant (Shao et al. 2023,
arXiv 2308.13137) and SignRound (Cheng et al. 2023, arXiv 2309.05516) do with other parameters; a token's error counts in
relation to the token's own length.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from tasks.calibrate.block_model import Arguments
from tasks.calibrate.grid import Grid
from tasks.calibrate.layers import Codes, Effort

Batch = tuple[torch.Tensor, torch.Tensor, Arguments]
"""What goes into a block, what the original puts out, and the block's other arguments."""


def tuned(
    module: nn.Module,
    chosen: dict[str, Codes],
    grids: dict[str, Grid],
    batches: Callable[[], Iterator[Batch]],
    effort: Effort,
) -> dict[str, Codes]:
    """The same codes with tuned scales. `batches` gives all of the text, once a call."""
    moved = {name: torch.zeros_like(codes.scales, requires_grad=True) for name, codes in chosen.items()}
    levels = {name: grids[name].levels[codes.codes.int()] for name, codes in chosen.items()}
    adam = torch.optim.Adam(moved.values(), lr=effort.rate, betas=(0.9, 0.95))
    total = effort.tunings * sum(1 for _ in batches())
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / total)
    for _ in range(effort.tunings):
        for given, wanted, (args, kwargs) in batches():
            weights = {}
            with torch.enable_grad():
                for name, codes in chosen.items():
                    weight = levels[name] * grids[name].spread(codes.scales * (1 + moved[name]), levels[name].shape)
                    plain = isinstance(module.get_submodule(name), nn.Linear)
                    weights[f"{name}.weight"] = (weight if plain else weight.T).to(given.dtype)
                out: Any = functional_call(module, weights, (given, *args), kwargs)
                out = (out[0] if isinstance(out, tuple) else out).float()
                lost = (out - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1).clamp(min=1e-12)
                adam.zero_grad()
                lost.mean().backward()
            adam.step()
            schedule.step()
    return {name: Codes(codes.codes, codes.scales * (1 + moved[name].detach())) for name, codes in chosen.items()}

"""The experts of a block as layers of their own, each with its own linear layers, so that each can be looked at by itself.

transformers keeps the weights of all experts of a block in two tensors, [experts, out, in]. Here the same memory is the weights
of ordinary linear layers, and an expert is run on the tokens that the router sends to it, and on no others.
"""

from typing import Any

import torch
from torch import nn

from tasks.transformers_adapter import reverted

PARTS = ("gate_proj", "up_proj", "down_proj")


def splits(module: Any) -> bool:
    """Whether these are experts with a gate, without biases, laid out as most models have them."""
    unlike = ("has_bias", "is_transposed", "has_post_expert_norm")
    return (
        bool(getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False))
        and not any(getattr(module, key, False) for key in unlike)
        and hasattr(module, "gate_up_proj")
    )


def names_of(model: Any) -> dict[str, str]:
    """What the experts' weights are called here, by what a checkpoint calls them. Experts that do not split are not there.

    A small tensor with a number for each expert and part is taken apart in place of the weights, as transformers saves them.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not splits(module):
            continue
        count = len(module.gate_up_proj)
        marked = {
            "gate_up_proj": torch.arange(2 * count).view(count, 2, 1),
            "down_proj": torch.arange(2 * count, 3 * count).view(count, 1, 1),
        }
        for part, numbers in marked.items():
            for stored, tensor in reverted(model, {f"{name}.{part}": numbers}).items():
                if tensor.numel() == 1:
                    number = int(tensor)
                    kind, index = (2, number - 2 * count) if number >= 2 * count else (number % 2, number // 2)
                    found[stored] = f"{name}.{index}.{PARTS[kind]}.weight"
    return found


class SplitExperts(nn.Module):
    """Experts that are loaded, as a module for each."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._gate = experts._apply_gate
        up, down = experts.gate_up_proj.data, experts.down_proj.data
        for index in range(len(up)):
            gate, other = up[index].chunk(2)
            parts = dict(zip(PARTS, (gate, other, down[index]), strict=True))
            self.add_module(str(index), nn.ModuleDict({part: _linear(weight) for part, weight in parts.items()}))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """What the experts make of tokens [tokens, width], that go to the experts `index` [tokens, k], by `share` [tokens, k]."""
        out = torch.zeros_like(hidden)
        for number, expert in self.named_children():
            token, slot = torch.where(index == int(number))
            if not len(token):
                continue
            given = hidden[token]
            layers: Any = expert
            inner = self._gate(torch.cat([layers["gate_proj"](given), layers["up_proj"](given)], -1))
            made = layers["down_proj"](inner) * share[token, slot, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer

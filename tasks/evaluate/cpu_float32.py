"""16-bit matrix products on a CPU that has no instructions for them, where torch takes five times as long as for float32.

Such a product adds up in float32 and is rounded to 16 bits once. Widening its factors, which is exact, and rounding the
float32 product is the same arithmetic, but for the order of the sum.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.evaluate.memory import free_memory

if TYPE_CHECKING:
    import torch


def widen(model: Any) -> None:
    """Have the model's 16-bit linear layers multiply in float32 where this CPU is quicker at it.

    Where memory allows, a layer's weight is widened when it is first used, and kept; else anew for every batch.
    """
    import torch

    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and slow(layer.weight)]
    once = sum(layer.weight.numel() for layer in layers) * 4 < 0.3 * free_memory("cpu")
    for layer in layers:
        widened = functools.cache(layer.weight.float) if once else layer.weight.float
        layer.forward = functools.partial(_forward, layer, widened)  # type: ignore[method-assign]


def slow(weight: "torch.Tensor") -> bool:
    """Whether products with this weight are quicker, and no other, in float32."""
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return weight.device.type == "cpu" and weight.dtype in names and not _native(names[weight.dtype])


def _forward(layer: "torch.nn.Linear", widened: "Callable[[], torch.Tensor]", values: "torch.Tensor") -> "torch.Tensor":
    import torch

    bias = None if layer.bias is None else layer.bias.float()
    return torch.nn.functional.linear(values.float(), widened(), bias).to(layer.weight.dtype)


@functools.cache
def _native(name: str) -> bool:
    """Whether the CPU multiplies `bf16` or `fp16` itself: AVX-512, AMX, or Arm's extensions."""
    import torch

    instructions: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # newer than the oldest torch that tame runs with
    return any(supported is True and name in instruction for instruction, supported in instructions.items())

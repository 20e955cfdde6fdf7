"""What transformers' FineGrainedFP8 stores for a weight [out, in]: E4M3 codes, and 32-bit scales of blocks of 128 × 128.

A layer whose weight is no multiple of that stays as it is, as transformers' own quantizing leaves it. The numbers are those of
transformers' `Fp8Quantize`, which is called on 128 rows at a time.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from configs.schema import Variant
from tasks import transformers_adapter
from tasks.quantize.methods.compressed_tensors_selection import as_selection, choose, ignored
from tasks.quantize.methods.fused_modules import computed_with
from tasks.transformers_adapter import Selection, loading_quantizer, prepare

BLOCK = 128
FAMILY = "fp8"
MOST = torch.finfo(torch.float8_e4m3fn).max
FACTORS = tuple(1 - step / 40 for step in range(16))
"""What a block's largest magnitude is multiplied with where its scale is searched."""


def select(model: Any, variant: Variant, skip: list[str] | None, dtype: torch.dtype) -> Selection:
    """The linear layers of the language model, and its experts, whose weights are whole blocks."""
    chosen = choose(model, skip, dtype, loading_quantizer(_config([])))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name in list(chosen.columns):
        if shapes[name][-1] % BLOCK or shapes[name][-2] % BLOCK:
            chosen.leave(
                name, f"a weight {list(shapes[name][-2:])}, no multiple of the {BLOCK} × {BLOCK} that share a scale"
            )
    for name in list(chosen.columns):
        beside = [other for other in computed_with(name.removesuffix(".weight")) if f"{other}.weight" in chosen.reasons]
        if beside:
            chosen.leave(name, f"vLLM computes it as one with {beside[0].rpartition('.')[2]}, which is not quantized")
    return as_selection(chosen, _config(ignored(model, chosen, by_module=True)), ("modules_to_not_convert",))


def reselect(model: Any, quantization_config: Any, dtype: torch.dtype) -> Selection:
    """The layers that transformers would load as quantized, on a machine that has kernels for them."""
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

    quantizer = loading_quantizer(quantization_config)
    quantizer.quantization_config.dequantize = False
    prepare(quantizer, model, dtype)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, FP8Experts)}
    names |= {
        f"{name}.{part}"
        for name, module in experts.items()
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not part.endswith(("_inv", "_bias"))
    }
    return Selection(quantization_config, names.__contains__)


def _config(skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": FAMILY,
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": skipped,
    }


def outputs(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored for a weight of `shape` [out, in], by name below its module, as meta tensors."""
    with torch.device("meta"):
        scales = torch.empty(shape[0] // BLOCK, shape[1] // BLOCK)
        return {"weight": torch.empty(shape, dtype=torch.float8_e4m3fn), "weight_scale_inv": scales}


def grows(name: str, variant: Variant) -> bool:
    """All lengths follow from the shape."""
    return False


def row_multiple(columns: int, variant: Variant) -> int:
    """The rows of a block."""
    return BLOCK


def scale_count(shape: tuple[int, int], variant: Variant) -> int:
    """One for each block."""
    return shape[0] * shape[1] // BLOCK**2


def quantize_rows(block: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize whole rows, a multiple of 128: their codes, E4M3 of the block's shape, and their scales, F32 and 1-D."""
    done = [_quantize(rows, variant) for rows in torch.split(block, BLOCK)]
    return torch.cat([codes for codes, _ in done]), torch.cat([scales for _, scales in done])


def _quantize(rows: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    if variant.scale == "search":
        return _searched(rows)
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    asked = SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt="float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=asked)).convert({"weight": rows})
    return made["weight"], made["weight_scale_inv"].view(-1)


def _searched(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the scales of parts of each block's range, those with the least squared error: the larger where two are equal."""
    blocks = rows.float().view(BLOCK, -1, BLOCK)
    top = blocks.abs().amax((0, 2))
    best, least = torch.ones_like(top), torch.full_like(top, torch.inf)
    for factor in FACTORS:
        scale = torch.where(top > 0, top * factor / MOST, 1)
        lost = (_codes(blocks, scale).float() * scale[:, None] - blocks).square_().sum((0, 2))
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return _codes(blocks, best).view(rows.shape), best


def _codes(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (blocks / scale[:, None]).clamp_(-MOST, MOST).to(torch.float8_e4m3fn)


def plausible(scales: torch.Tensor) -> bool:
    """Whether all scales are finite; NaN and infinite weights make theirs not."""
    return math.isfinite(float(scales.sum()))


def fault(block: torch.Tensor, scales: torch.Tensor) -> tuple[int, str] | None:
    """Nothing finite is too large or too small for a scale in 32 bits."""
    return None


def pack(scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored besides the codes."""
    return {"weight_scale_inv": scales.view(shape[0] // BLOCK, shape[1] // BLOCK)}


def has_kernels(device: str) -> bool:
    """Whether transformers can multiply in this format on a device: for GPUs it fetches kernels with the package `kernels`."""
    if not device.startswith("cuda"):
        return False
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    try:
        load_finegrained_fp8_kernel()
    except Exception:  # the package is not there, nor the Hub, or has no build for this torch
        return False
    return True


def dequantized(model: Any) -> bool:
    """Whether transformers has dequantized a model on loading, as it does without a GPU that has 8-bit floats."""
    return getattr(model, "hf_quantizer", None) is None  # it forgets that there was one


def round_activations(model: Any) -> None:
    """Let the layers of a dequantized model round what they are given, 128 numbers of a token to a scale, as kernels do."""
    config = json.loads((Path(model.name_or_path) / "config.json").read_bytes())["quantization_config"]
    skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or []
    usual = transformers_adapter.skipped_by_default(model)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not transformers_adapter.is_skipped(name, [*usual, *skipped]):
            model.set_submodule(name, RoundedActivations(module))


class RoundedActivations(torch.nn.Module):
    """A layer whose activations are quantized and dequantized first, each 128 of a token with a scale of their own."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Emulate in float32; `hidden` is [..., tokens, in]."""
        groups = hidden.float().view(*hidden.shape[:-1], -1, BLOCK)
        scale = (groups.abs().amax(-1, keepdim=True) / MOST).clamp_(min=1e-12)
        rounded = (groups / scale).to(torch.float8_e4m3fn).float() * scale
        out: torch.Tensor = self.layer(rounded.flatten(-2).to(hidden.dtype))
        return out

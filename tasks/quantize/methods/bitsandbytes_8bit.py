"""bitsandbytes' int8 format: a scale for each row (output feature), after a cast to float16."""

import functools
import logging
import math
import threading
from typing import Any

import torch

from configs.schema import Variant
from tasks.quantize.methods.bitsandbytes_skips import with_fused
from tasks.transformers_adapter import Selection, select_as_transformers

log = logging.getLogger("tame.quantize")

PIECE = 1 << 18  # weights worked on at once on the CPU, so that they stay in its cache

_local = threading.local()


def select(model: Any, variant: Variant, skip: list[str] | None, dtype: torch.dtype) -> Selection:
    """The layers that transformers quantizes."""
    from transformers import BitsAndBytesConfig

    return select_as_transformers(
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=with_fused(skip)), model, dtype
    )


def reselect(model: Any, quantization_config: Any, dtype: torch.dtype) -> Selection:
    """The layers that transformers would load as quantized."""
    return select_as_transformers(quantization_config, model, dtype, pre_quantized=True)


def outputs(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored for a weight of `shape` [out, in], by name below its module, as meta tensors."""
    with torch.device("meta"):
        return {
            "weight": torch.empty(shape, dtype=torch.int8),
            "SCB": torch.empty(shape[0]),
            "weight_format": torch.empty((), dtype=torch.uint8),
        }


def grows(name: str, variant: Variant) -> bool:
    """All lengths follow from the shape."""
    return False


def row_multiple(columns: int, variant: Variant) -> int:
    """Rows are independent of each other."""
    return 1


def scale_count(shape: tuple[int, int], variant: Variant) -> int:
    """One for each row."""
    return shape[0]


def quantize_rows(block: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize whole rows: I8 of the block's shape, and F32 [rows] scales; on the block's device.

    A weight w becomes round(w * 127 / scale), the scale being the row's largest magnitude in float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    if block.device.type == "cpu" and _agrees(block.dtype):
        return _in_place(block)
    codes, scales, _ = int8_vectorwise_quant(block.to(torch.float16))
    return codes, scales


def plausible(scales: torch.Tensor) -> bool:
    """Whether every scale is finite and above zero. A row of zeros has none, and is no fault."""
    least, most = (float(end) for end in torch.aminmax(scales))  # NaN, if one is
    return math.isfinite(most) and least != 0


def fault(block: torch.Tensor, scales: torch.Tensor) -> tuple[int, str] | None:
    """The first row that float16 makes infinite, or zero where it is not."""
    lost = (~torch.isfinite(scales) | ((scales == 0) & (block != 0).any(1))).nonzero()
    if not len(lost):
        return None
    row = int(lost[0])
    return row, (
        f"has weights up to {block[row].abs().max().item():.3g}, which float16, that int8 goes through, cannot hold; "
        "use nf4 or fp4, or name the module in skip_modules"
    )


def pack(scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored besides the codes; format 0 means row-major."""
    return {"SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}


def _in_place(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The arithmetic of bitsandbytes' CPU kernel, a few rows at a time, in memory that is allocated once."""
    height, width = block.shape
    several = max(1, PIECE // width)
    codes = torch.empty(height, width, dtype=torch.int8)
    scales = torch.empty(height)
    for start in range(0, height, several):
        part = block[start : start + several]
        half, magnitude, exact = (buffer[: part.numel()].view(part.shape) for buffer in _scratch(part.numel()))
        scale = scales[start : start + several]
        half.copy_(exact.copy_(part))  # by way of float32: from bfloat16 to float16 torch has no fast way
        scale.copy_(torch.amax(torch.abs(half, out=magnitude), 1))
        exact.copy_(half).mul_((127.0 / scale).unsqueeze(1))
        codes[start : start + several] = exact.round_()
    return codes, scales


def _scratch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This thread's buffers for `size` weights or more. Fresh memory costs more than the arithmetic on it."""
    if not hasattr(_local, "buffers") or len(_local.buffers[0]) < size:
        half = torch.empty(2, max(size, PIECE), dtype=torch.float16)
        _local.buffers = (half[0], half[1], torch.empty(max(size, PIECE)))
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _local.buffers
    return buffers


@functools.cache
def _agrees(dtype: torch.dtype) -> bool:
    """Whether this gives bitsandbytes' own bytes here, tried on rows of many magnitudes and one of zeros."""
    from bitsandbytes.functional import int8_vectorwise_quant

    sample = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 4, 64)[:, None]
    sample[0] = 0
    codes, scales, _ = int8_vectorwise_quant(sample.to(dtype).to(torch.float16))
    mine = _in_place(sample.to(dtype))
    if torch.equal(codes, mine[0]) and torch.equal(scales, mine[1]):
        return True
    log.warning("this bitsandbytes rounds int8 differently than tame's CPU kernel; using its own, which is slower")
    return False

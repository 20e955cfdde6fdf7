"""bitsandbytes' int8 format: a scale for each row (output feature), after a cast to float16."""

import torch

from configs.schema import Variant

PIECE = 1 << 17  # weights worked on at once on the CPU, so that they stay in its cache


def outputs(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored for a weight of `shape` [out, in], by suffix to its name, as meta tensors."""
    with torch.device("meta"):
        return {
            "": torch.empty(shape, dtype=torch.int8),
            "SCB": torch.empty(shape[0]),
            "weight_format": torch.empty((), dtype=torch.uint8),
        }


def step(columns: int) -> int:
    """Rows are independent of each other."""
    return 1


def rows(block: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize whole rows: I8 of the block's shape, and F32 [rows] scales; on the block's device.

    A weight w becomes round(w * 127 / scale), the scale being the row's largest magnitude in float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    if block.device.type == "cuda":
        codes, scales, _ = int8_vectorwise_quant(block.to(torch.float16))
        return codes, scales
    several = max(1, PIECE // block.shape[1])
    parts = [int8_vectorwise_quant(part.to(torch.float16)) for part in block.split(several)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def finish(
    scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant
) -> dict[str, torch.Tensor]:
    """What is stored besides the codes, by suffix; format 0 means row-major."""
    return {"SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}

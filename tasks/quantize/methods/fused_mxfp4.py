"""MXFP4 as gpt-oss is shipped, which is read and not written: fused experts, 32 4-bit floats to a power of two.

transformers' own dequantizing is the authority on the numbers, and is called for one expert at a time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.quantize.protocols import Dense, Restored

if TYPE_CHECKING:
    import torch

FAMILY = "mxfp4"


@dataclass(frozen=True)
class FusedMxfp4:
    """Reads the experts of such a source; it is pickled to reach the process that works."""

    libraries = ()

    def reads(self, quantization_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `quantization_config` has such experts."""
        return quantization_config.get("quant_method") == FAMILY

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights [in, out] of one expert that its parts stand for: U8 blocks [out, in/32, 16] and scales [out, in/32]."""
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = (parts[part].to(device)[None] for part in ("blocks", "scales"))
        weights = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0].view(-1)
        return Restored(lambda start, count: weights[start : start + count].float(), multiple=1)

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """What transformers has done on loading, where it has no kernels for these experts: nothing is left to be replaced."""
        if getattr(model, "hf_quantizer", None) is not None:
            return None
        dtype = str(model.dtype).removeprefix("torch.")
        return Dense(f"MXFP4 experts as shipped, dequantized once to {dtype} by transformers", "")

    def altered(self, model: Any) -> bool:
        """Never."""
        return False

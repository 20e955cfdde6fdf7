"""FP8 in blocks of 128 × 128, as DeepSeek and Qwen ship their models; transformers, vLLM and SGLang read it.

transformers' FineGrainedFP8 is the authority on names, rounding and config.json. What is stored is in the file beside this.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.schema import Variant
from tasks.quantize.protocols import CardText, Dense, Home, Request, Restored, TensorFormat, Written
from tasks.quantize.run import quantize_tensors
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

BLOCK = 128
FAMILY = "fp8"


@dataclass(frozen=True)
class BlockFloat:
    """8-bit floats, of which 128 rows by 128 columns share a scale."""

    family = "FineGrainedFP8"
    libraries = ()

    def bits(self, variant: Variant) -> int:
        """Eight."""
        return 8

    def card(self, variant: Variant) -> CardText:
        """What the model card says of the format."""
        return CardText(
            quantized_to="8-bit floats (E4M3), 128 × 128 weights to a scale, activations to 8-bit floats while it runs, in the "
            "format of transformers' FineGrainedFP8",
            install=(),
            tags=("8-bit", "fp8", "vllm"),
            limits=(
                "Without a GPU that has 8-bit floats, transformers dequantizes the weights.",
                "Activations are rounded to 8-bit floats, 128 to a scale. Where tame measured on the CPU, that was emulated in "
                "all layers but experts; kernels add up in another order.",
            ),
            homes=(
                Home("vllm", "vLLM", "vllm serve {repo}"),
                Home("sglang", "SGLang", "python -m sglang.launch_server --model-path {repo}"),
            ),
        )

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant of a checkpoint in blocks of 128 × 128 whose scales are in 32 bits, those of activations made as it runs."""
        if quantization_config.get("quant_method") != FAMILY or quantization_config.get("expert_dtype", "fp8") != "fp8":
            return None
        if list(quantization_config.get("weight_block_size") or []) != [BLOCK, BLOCK]:
            return None
        if quantization_config.get("scale_fmt", "float") not in ("float", None):
            return None
        if quantization_config.get("activation_scheme", "dynamic") != "dynamic":
            return None
        skipped = quantization_config.get("modules_to_not_convert") or quantization_config.get("ignored_layers") or []
        return Variant(method="fp8-block", skip_modules=list(skipped))

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        """Quantize a checkpoint, tensor by tensor."""
        return quantize_tensors(self, request, progress)

    def tensor_format(self) -> TensorFormat:
        """What is stored for a weight."""
        from tasks.quantize.methods import finegrained_fp8_format

        return finegrained_fp8_format

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights that the stored parts stand for: codes times the scales of their blocks. Blocks at the ends may be cut."""
        codes, width = parts["weight"], shape[1]
        scales = parts["weight_scale_inv"].to(device).float()

        def piece(start: int, count: int) -> "torch.Tensor":
            first, last = start // width, (start + count) // width
            rows = scales[first // BLOCK : -(-last // BLOCK)].repeat_interleave(BLOCK, 0)[first % BLOCK :][
                : last - first
            ]
            spread = rows.repeat_interleave(BLOCK, 1)[:, :width]
            return codes[first:last].to(device).float().mul_(spread).view(-1)

        return Restored(piece, multiple=width)

    def choices(self, variant: Variant) -> list[Variant]:
        """8 bits alone."""
        return [variant]

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Round activations as the kernels do, where transformers has dequantized the weights: on machines without such kernels."""
        from tasks.quantize.methods.finegrained_fp8_format import dequantized, round_activations

        if not dequantized(model):
            return None
        round_activations(model)
        return Dense(
            f"8-bit weights dequantized once to {str(model.dtype).removeprefix('torch.')}, activations rounded to 8-bit "
            "floats, 128 to a scale, but those of experts",
            "",
        )

    def altered(self, model: Any) -> bool:
        """Never."""
        return False


def opened_on(device: str, quantization_config: Any) -> Any:
    """What transformers is to open a checkpoint with: dequantized where there are no kernels for this format, whatever its blocks.

    With a GPU in the machine, transformers itself would find that out in the first forward pass.
    """
    if not isinstance(quantization_config, dict) or quantization_config.get("quant_method") != FAMILY:
        return quantization_config
    from tasks.quantize.methods.finegrained_fp8_format import has_kernels

    return quantization_config if has_kernels(device) else {**quantization_config, "dequantize": True}

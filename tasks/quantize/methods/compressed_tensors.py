"""The formats of compressed-tensors, as the rest of tame sees them: what vLLM serves. What is stored is in the file beside this.

https://github.com/vllm-project/compressed-tensors is the authority on names, packing, dtypes and config.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.schema import Variant
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES, Scheme
from tasks.quantize.protocols import CardText, Dense, Request, Restored, TensorFormat, Written
from tasks.quantize.run import quantize_tensors
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

FAMILY = "compressed-tensors"
LIBRARY = "compressed_tensors"
READERS = (
    "The files are in the format of compressed-tensors, whose home is vLLM (`vllm serve` with this repo's name). tame opened "
    "them with transformers, and not with vLLM."
)


@dataclass(frozen=True)
class CompressedTensors:
    """One scheme: integers or floats that a group of weights, or a row of them, share a scale of."""

    name: str
    family = FAMILY
    libraries = (LIBRARY,)

    @property
    def scheme(self) -> Scheme:
        """What compressed-tensors calls it."""
        return SCHEMES[self.name]

    def bits(self, variant: Variant) -> int:
        """Four or eight."""
        return self.scheme.bits

    def card(self, variant: Variant) -> CardText:
        """What the model card says of the format."""
        numbers = self.scheme.numbers
        if variant.group_size:
            numbers += f", {'a row' if variant.group_size < 0 else variant.group_size} to a scale"
        limits = [READERS]
        if self.scheme.activations:
            numbers += f", activations to {self.scheme.activations} while it runs"
            limits.append(
                f"Activations are rounded to {self.scheme.activations}, each token by itself. tame measured that as "
                "compressed-tensors emulates it in transformers; kernels add up in another order. Experts, where there are "
                "any, were measured with their activations unrounded."
            )
        return CardText(
            quantized_to=f"{numbers}, in the format of compressed-tensors",
            install=(FAMILY,),
            tags=(FAMILY, "vllm", *self.scheme.tags),
            limits=tuple(limits),
        )

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant of a checkpoint whose only scheme is this one."""
        groups = quantization_config.get("config_groups")
        if quantization_config.get("quant_method") != FAMILY or not isinstance(groups, dict) or len(groups) != 1:
            return None
        if quantization_config.get("format") != self.scheme.stored:
            return None
        (group,) = groups.values()
        weights = group.get("weights") or {}
        if weights.get("num_bits") != self.scheme.bits or not weights.get("symmetric", True):
            return None
        if bool(group.get("input_activations")) != bool(self.scheme.activations):
            return None
        chosen: dict[str, Any] = {}
        if self.scheme.stored == "pack-quantized":
            chosen["group_size"] = weights.get("group_size") or -1
        ignored = [name for name in quantization_config.get("ignore") or [] if not name.startswith("re:")]
        return Variant(method=self.name, skip_modules=ignored, **chosen)

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        """Quantize a checkpoint, tensor by tensor."""
        return quantize_tensors(self, request, progress)

    def tensor_format(self) -> TensorFormat:
        """What is stored for a weight."""
        chosen: TensorFormat = _format()
        if self.name == "nvfp4":
            from tasks.quantize.methods.compressed_tensors_nvfp4 import Nvfp4

            return Nvfp4()
        return chosen

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights that the stored parts stand for, which compressed-tensors computes in the dtype of the scales."""
        restored: Restored = _format().restored(parts, shape, device, self.name)
        return restored

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Always: it is what compressed-tensors does itself in the first forward, whatever the memory."""
        _format().decompress(model)
        weights = f"{self.scheme.bits}-bit weights dequantized once to {str(model.dtype).removeprefix('torch.')}"
        if self.scheme.activations:
            weights += f", activations rounded to {self.scheme.activations} as compressed-tensors emulates it"
        return Dense(weights, "")

    def altered(self, model: Any) -> bool:
        """Whether a forward has dequantized the weights, as compressed-tensors does it: with layers that it has wrapped."""
        return not hasattr(model, "ct_decompress_hook")


def _format() -> Any:
    """The file beside this, with a compressed-tensors that says nothing a user can do nothing about."""
    import os

    os.environ["COMPRESSED_TENSORS_LOG_DISABLED"] = "true"
    from tasks.quantize.methods import compressed_tensors_format

    compressed_tensors_format.hide_bars()
    return compressed_tensors_format

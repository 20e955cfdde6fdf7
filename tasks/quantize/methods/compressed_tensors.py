"""The formats of compressed-tensors, as the rest of tame sees them: what vLLM serves. What is stored is in the file beside this.

https://github.com/vllm-project/compressed-tensors is the authority on names, packing, dtypes and config.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.schema import Variant
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES, Scheme
from tasks.quantize.protocols import CardText, Dense, Home, Request, Restored, TensorFormat, Written
from tasks.quantize.run import quantize_tensors
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

FAMILY = "compressed-tensors"
LIBRARY = "compressed_tensors"
MORE_BITS = {"w4a16": "w8a16"}
"""The scheme that single modules of a checkpoint can have beside the checkpoint's own."""
VLLM = Home("vllm", "vLLM", "vllm serve {repo}")


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
        if variant.eight_bit_modules:
            numbers += f" ({len(variant.eight_bit_modules)} modules in 8 bits)"
        if variant.group_size:
            numbers += f", {'a row' if variant.group_size < 0 else variant.group_size} to a scale"
        limits = []
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
            homes=(VLLM,),
        )

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant of a checkpoint whose only scheme is this one, or this one and `MORE_BITS`' of it."""
        groups = quantization_config.get("config_groups")
        if quantization_config.get("quant_method") != FAMILY or not isinstance(groups, dict):
            return None
        if quantization_config.get("format") != self.scheme.stored:
            return None
        mine = [group for group in groups.values() if _is(group, self.scheme)]
        others = [group for group in groups.values() if group not in mine]
        if len(mine) != 1 or len(others) > 1:
            return None
        weights = mine[0]["weights"]
        chosen: dict[str, Any] = {}
        if self.scheme.stored == "pack-quantized":
            chosen["group_size"] = weights.get("group_size") or -1
        if others:
            more = MORE_BITS.get(self.name)
            size = (others[0].get("weights") or {}).get("group_size")
            if more is None or not _is(others[0], SCHEMES[more]) or size != weights.get("group_size"):
                return None
            chosen["eight_bit_modules"] = list(others[0].get("targets") or [])
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

    def choices(self, variant: Variant) -> list[Variant]:
        """Of 4-bit integers also 8-bit ones; the group size is the same."""
        more = MORE_BITS.get(self.name)
        if more is None:
            return [variant]
        return [variant, Variant(method=more, group_size=variant.group_size, skip_modules=variant.skip_modules)]

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Always: it is what compressed-tensors does itself in the first forward, whatever the memory."""
        bits = " and ".join(f"{bits}-bit" for bits in _format().decompress(model)) or f"{self.scheme.bits}-bit"
        weights = f"{bits} weights dequantized once to {str(model.dtype).removeprefix('torch.')}"
        if self.scheme.activations:
            weights += f", activations rounded to {self.scheme.activations} as compressed-tensors emulates it"
        return Dense(weights, "")

    def altered(self, model: Any) -> bool:
        """Whether a forward has dequantized the weights, as compressed-tensors does it: with layers that it has wrapped."""
        return not hasattr(model, "ct_decompress_hook")


def _is(group: dict[str, Any], scheme: Scheme) -> bool:
    """Whether a group of config.json has this scheme, and none of what tame neither writes nor reads.

    That is: a zero point, a scale for a whole tensor or a block, activations with a scale that was chosen beforehand, and columns
    in another order than the weight's.
    """
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    if (weights.get("num_bits"), weights.get("type")) != (scheme.bits, scheme.kind) or not weights.get(
        "symmetric", True
    ):
        return False
    if weights.get("strategy") not in scheme.strategies or weights.get("actorder") in ("group", "dynamic", True):
        return False
    if group.get("output_activations") or bool(activations) != bool(scheme.activations):
        return False
    return not activations or (activations.get("dynamic"), activations.get("strategy")) == (True, "token")


def _format() -> Any:
    """The file beside this, with a compressed-tensors that says nothing a user can do nothing about."""
    import os

    os.environ["COMPRESSED_TENSORS_LOG_DISABLED"] = "true"
    from tasks.quantize.methods import compressed_tensors_format

    compressed_tensors_format.hide_bars()
    return compressed_tensors_format

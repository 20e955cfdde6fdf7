"""bitsandbytes' 4-bit and 8-bit formats, as the rest of tame sees them. What is stored for a weight is in the files beside this."""

import importlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import SMALL_GROUP, Variant
from tasks.quantize.lean_imports import unchanged
from tasks.quantize.methods.bitsandbytes_skips import without_fused
from tasks.quantize.protocols import CardText, Dense, Home, Request, Restored, TensorFormat, Written
from tasks.quantize.run import quantize_tensors
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

FAMILY = "bitsandbytes"
READERS = (
    "The files are in bitsandbytes' format: transformers with bitsandbytes reads them, most other programs do not."
)
SMALL_GROUPS = "32 weights share a scale, for which GPUs need bitsandbytes 0.49.2 or newer."
HOMES = (
    Home(  # its layers for experts are 4-bit ones, whatever the list of skipped modules says (0.26 and 0.32)
        "vllm",
        "vLLM from 0.28 on, with `pip install vllm-bnb-plugin`",
        "vllm serve {repo}",
        plain_experts=False,
    ),
    Home(
        "peft",
        "PEFT, to train a LoRA adapter on it (QLoRA)",
        "get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules='all-linear'))",
    ),
)


@dataclass(frozen=True)
class EightBit:
    """LLM.int8(): a scale for each row of a weight; activations are quantized too, while the model runs."""

    family = FAMILY
    libraries = (FAMILY,)

    def bits(self, variant: Variant) -> int:
        """Eight."""
        return 8

    def card(self, variant: Variant) -> CardText:
        """What the model card says of the format."""
        return CardText(
            quantized_to="8-bit integers (LLM.int8()) with bitsandbytes",
            install=(FAMILY,),
            tags=(FAMILY, "8-bit", "int8"),
            limits=(
                READERS,
                "8-bit layers quantize activations too, so that answers can depend on what else is in a batch.",
            ),
            homes=HOMES,
        )

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant of a checkpoint that says `load_in_8bit`."""
        if not quantization_config.get("load_in_8bit"):
            return None
        return Variant(method="int8", skip_modules=_skipped(quantization_config))

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        """Quantize a checkpoint, tensor by tensor."""
        return quantize_tensors(self, request, progress)

    def tensor_format(self) -> TensorFormat:
        """What is stored for a weight."""
        _import()
        from tasks.quantize.methods import bitsandbytes_8bit

        return bitsandbytes_8bit

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights that the stored parts stand for: a code is a 127th of its row's scale."""
        codes, width = parts["weight"].reshape(-1), shape[1]
        scales = (parts["SCB"].to(device) / 127).view(-1, 1)

        def piece(start: int, count: int) -> "torch.Tensor":
            rows = codes[start : start + count].to(device).float().view(-1, width)
            return rows.mul_(scales[start // width : (start + count) // width]).view(-1)

        return Restored(piece, multiple=width)

    def choices(self, variant: Variant) -> list[Variant]:
        """8 bits alone."""
        return [variant]

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Never: these layers quantize activations, which plain ones would not."""
        return None

    def altered(self, model: Any) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class FourBit:
    """nf4 or fp4: 64 weights share a scale, or what the variant says; with double quantization, 256 scales share one."""

    name: Literal["nf4", "fp4"]
    family = FAMILY
    libraries = (FAMILY,)

    def bits(self, variant: Variant) -> int:
        """Four."""
        return 4

    def card(self, variant: Variant) -> CardText:
        """What the model card says of the format."""
        numbers = {"nf4": "4-bit NormalFloat (NF4)", "fp4": "4-bit floats (FP4)"}[self.name]
        doubly = " with double quantization" if variant.double_quant else ""
        groups = f", {variant.group_size} weights to a scale," if variant.group_size else ""
        if variant.small_group_modules:
            groups = f", {len(variant.small_group_modules)} modules with {SMALL_GROUP} weights to a scale,"
        small = (SMALL_GROUPS,) if variant.group_size == SMALL_GROUP or variant.small_group_modules else ()
        return CardText(
            quantized_to=f"{numbers}{groups}{doubly} with bitsandbytes",
            install=(FAMILY,),
            tags=(FAMILY, "4-bit", self.name),
            limits=(READERS, *small),
            homes=HOMES,
        )

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        """The variant of a checkpoint that says `load_in_4bit`, of these numbers."""
        kind = quantization_config.get("bnb_4bit_quant_type", "fp4")
        if not quantization_config.get("load_in_4bit") or kind != self.name:
            return None
        double_quant = bool(quantization_config.get("bnb_4bit_use_double_quant"))
        return Variant(method=self.name, double_quant=double_quant, skip_modules=_skipped(quantization_config))

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        """Quantize a checkpoint, tensor by tensor."""
        return quantize_tensors(self, request, progress)

    def tensor_format(self) -> TensorFormat:
        """What is stored for a weight."""
        _import()
        from tasks.quantize.methods import bitsandbytes_4bit

        return bitsandbytes_4bit

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        """The weights that the stored parts stand for, which bitsandbytes computes in float32."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        stored = {name.removeprefix("weight"): part for name, part in parts.items() if name != "weight"}
        state = QuantState.from_dict(stored, torch.device(device))
        scales, block = state.absmax, state.blocksize
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        codes = parts["weight"].reshape(-1)

        def piece(start: int, count: int) -> "torch.Tensor":
            part = QuantState(
                scales[start // block : -(-(start + count) // block)],
                shape=torch.Size((count // block, block) if count % block == 0 else (count,)),
                blocksize=block,
                quant_type=state.quant_type,
                dtype=torch.float32,
            )
            packed = codes[start // 2 : (start + count + 1) // 2].to(device)
            weights: torch.Tensor = dequantize_4bit(packed.view(-1, 1), part)
            return weights.reshape(-1)

        return Restored(piece, multiple=block)

    def choices(self, variant: Variant) -> list[Variant]:
        """4 bits as they are asked for, and in small groups: bitsandbytes reads the size of a group from each weight."""
        if variant.group_size == SMALL_GROUP:
            return [variant]
        return [variant, variant.in_small_groups]

    def densify(self, model: Any, free: int) -> Dense | str | None:
        """Dequantize once what a 4-bit layer dequantizes in every forward pass, to multiply it in its compute dtype."""
        import bitsandbytes as bnb
        import torch

        dtype = model.dtype
        layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        if not layers:
            return None
        if sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize > free:
            return "the 4-bit layers were measured as stored: there was no memory to dequantize them once"
        computes = {layer.compute_dtype or dtype for layer in layers.values()}
        if not computes <= {dtype, torch.float32}:
            return None
        for name, layer in layers.items():
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
            del layer.weight
        short = str(dtype).removeprefix("torch.")
        difference = (
            f" and multiplied in it (stored, they are multiplied in float32, or on CPUs with AVX512-BF16 in {short} with "
            "rounded scales)"
        )
        return Dense(f"4-bit weights dequantized once to {short}", "" if computes == {dtype} else difference)

    def altered(self, model: Any) -> bool:
        """Whether bitsandbytes has packed the weights anew, as it does on CPUs with AVX512-BF16."""
        states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
        return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def _import() -> None:
    """Import the library, which says nothing then, and has none of its functions prepared for `torch.compile`.

    Those are optimizers, and plain versions of kernels for devices that have none. Preparing them imports the compiler: 2.5 s.
    """
    import torch

    logging.getLogger(FAMILY).setLevel(logging.ERROR)
    compiling = torch.compile
    torch.compile = unchanged  # type: ignore[assignment]
    try:
        importlib.import_module(FAMILY)
    finally:
        torch.compile = compiling


def _skipped(quantization_config: dict[str, Any]) -> list[str]:
    return without_fused(list(quantization_config.get("llm_int8_skip_modules") or []))

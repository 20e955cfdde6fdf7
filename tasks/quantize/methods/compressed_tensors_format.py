"""What compressed-tensors stores for a weight [out, in], made a few rows at a time.

A scale belongs to `group_size` weights of a row, or to a whole row. How scales and codes are found is in the file beside this.

The package is imported here, and so before any model is made without weights: the tables that it makes would have none either.
"""

import math
from importlib import import_module
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, decompress_module
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.version import __version__
from tqdm import tqdm

from configs.errors import BadInputError
from configs.schema import Variant
from tasks import transformers_adapter
from tasks.quantize.methods.compressed_tensors_codes import (
    INTEGERS,
    ROW,
    groups_in,
    in_pieces,
    levels_of,
    packed,
    quantize_some,
    scheme_for,
    scheme_of,
)
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES
from tasks.quantize.methods.compressed_tensors_selection import (
    Chosen,
    as_selection,
    choose,
    ignored,
    output_heads,
    quantized_by_transformers,
)
from tasks.quantize.methods.module_lists import named
from tasks.quantize.protocols import Restored
from tasks.transformers_adapter import Selection, loading_quantizer, prepare

WITHOUT_EXPERTS = ("int-quantized", "nvfp4-pack-quantized")
"""Formats of which transformers' loader cannot make fused experts."""
LEAST = 8  # the magnitude of the least of 4-bit integers
GROUPS = (128, 64, 32)  # weights to a scale that kernels are made for, the smallest checkpoint first


def select(model: Any, variant: Variant, skip: list[str] | None, dtype: torch.dtype) -> Selection:
    """The linear layers of the language model, and its experts, where transformers can load them in this scheme.

    Raises:
        BadInputError: `group_size` does not divide the rows of a layer; a mixture of experts as w8a8 or nvfp4; a model that
            transformers cannot load in a packed format.
    """
    heads = [name for name in output_heads(model) if name in variant.eight_bit_modules]
    if tied := [name for name in heads if f"{name}.weight" in transformers_adapter.tied(model)]:
        raise BadInputError(
            f"eight_bit_modules: {tied[0]} is the embedding under another name in this model, which nothing opens in 8 bits; "
            "leave it out"
        )
    chosen = choose(model, skip, dtype, loading_quantizer(_config(variant, [])), heads)
    if SCHEMES[variant.method].stored in WITHOUT_EXPERTS and chosen.experts:
        raise BadInputError(
            f"{variant.method}: transformers loads no mixture of experts in this format, whether {min(chosen.experts)} is "
            "quantized or not; use fp8, w8a16 or w4a16"
        )
    if "pack" in SCHEMES[variant.method].stored and (cls := transformers_adapter.needs_weights(model, chosen.columns)):
        raise BadInputError(
            f"{variant.method}: transformers cannot load {type(model).__name__} in this format: its {cls} wants weights that are "
            "not packed; use nf4, int8, fp8 or w8a8"
        )
    variant = _decided(variant, chosen)
    width = scheme_for(variant).weights.group_size
    for name in [name for name, columns in chosen.columns.items() if width and columns % width]:
        chosen.leave(name, f"rows of {chosen.columns[name]}, no multiple of the {width} weights that share a scale")
    more = wider(variant, chosen)
    config = _config(variant, ignored(model, chosen), list(chosen.columns) if more else None, more)
    return as_selection(chosen, config, variant=variant, variants=more)


def wider(variant: Variant, chosen: Chosen) -> dict[str, Variant]:
    """The weights of `eight_bit_modules`, by their names in the model, with what they are quantized as.

    Raises:
        BadInputError: a module that is not quantized, or a mixture of experts.
    """
    if not variant.eight_bit_modules:
        return {}
    if chosen.experts:
        raise BadInputError(
            f"{variant.label}: eight_bit_modules, and fit, are for models without experts, which transformers opens in one "
            "scheme alone; leave them out"
        )
    as_8_bits = Variant(method="w8a16", group_size=variant.group_size)
    return dict.fromkeys(named(variant.eight_bit_modules, chosen.columns, "eight_bit_modules"), as_8_bits)


def _decided(variant: Variant, chosen: Chosen) -> Variant:
    """The variant with a group size, if it takes one: the largest of `GROUPS` that divides all rows, or else whole rows."""
    if SCHEMES[variant.method].stored != INTEGERS or variant.group_size == ROW:
        return variant
    if variant.group_size is None:
        fits = (size for size in GROUPS if all(columns % size == 0 for columns in chosen.columns.values()))
        return variant.model_copy(update={"group_size": next(fits, ROW), "name": variant.label})
    for name, columns in chosen.columns.items():
        if columns % variant.group_size:
            fitting = [size for size in GROUPS if columns % size == 0]
            raise BadInputError(
                f"group_size {variant.group_size}: {name} has rows of {columns} weights, which it does not divide; "
                f"use {' or '.join(map(str, [*fitting, ROW]))}, or name the module in skip_modules"
            )
    return variant


def reselect(model: Any, quantization_config: Any, dtype: torch.dtype) -> Selection:
    """The layers that transformers would load as quantized."""
    quantizer = loading_quantizer(quantization_config)
    prepare(quantizer, model, dtype)
    return Selection(quantization_config, quantized_by_transformers(model, quantizer).__contains__)


def _config(
    variant: Variant, ignore: list[str], weights: list[str] | None = None, more: dict[str, Variant] | None = None
) -> dict[str, Any]:
    """What config.json says of a checkpoint, as the package writes it; of its quantized `weights`, some are what `more` says.

    If any are, every group names its modules: readers differ in whether `Linear`, or the name of a module, is tried first.
    """
    groups = {"group_0": scheme_for(variant)}
    if more and weights:
        plain = [name for name in weights if name not in more]
        sets = [(variant, plain), (next(iter(more.values())), list(more))]
        named = [(one, [name.removesuffix(".weight") for name in names]) for one, names in sets if names]
        schemes = [scheme_for(one).model_copy(update={"targets": names}) for one, names in named]
        groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    config = QuantizationConfig(
        config_groups=groups,
        format=SCHEMES[variant.method].stored,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return {**config.model_dump(mode="json"), "version": __version__}


def outputs(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored for a weight of `shape` [out, in], by name below its module, as meta tensors."""
    rows, columns = shape
    bits, groups = SCHEMES[variant.method].bits, groups_in(columns, variant)
    with torch.device("meta"):
        scale = torch.empty(rows, groups, dtype=dtype)
        if variant.method == "mxfp4":
            codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
            return {"weight_packed": codes, "weight_scale": torch.empty(rows, groups, dtype=torch.uint8)}
        if SCHEMES[variant.method].stored != INTEGERS:
            kind = torch.float8_e4m3fn if variant.method == "fp8" else torch.int8
            return {"weight": torch.empty(shape, dtype=kind), "weight_scale": scale}
        parts = {"weight_packed": torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32), "weight_scale": scale}
        return {**parts, "weight_shape": torch.empty(2, dtype=torch.int64)}


def grows(name: str, variant: Variant) -> bool:
    """All lengths follow from the shape."""
    return False


def row_multiple(columns: int, variant: Variant) -> int:
    """Rows are independent of each other."""
    return 1


def scale_count(shape: tuple[int, int], variant: Variant) -> int:
    """One for each group."""
    return shape[0] * groups_in(shape[1], variant)


def quantize_rows(block: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize whole rows: their codes as they are stored, and their scales, F32 [rows × groups]; on the block's device."""
    return in_pieces(block, lambda rows: quantize_some(rows, variant))


def plausible(scales: torch.Tensor) -> bool:
    """Whether all scales are finite; NaN and infinite weights make theirs not."""
    return math.isfinite(float(scales.sum()))


def fault(block: torch.Tensor, scales: torch.Tensor) -> tuple[int, str] | None:
    """Nothing finite is too large or too small for a scale of its own dtype."""
    return None


def pack(scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored besides the codes: `weight_scale` [out, groups], and `weight_shape`, which packed integers need."""
    scale = scales.view(shape[0], groups_in(shape[1], variant)).to(dtype)
    if variant.method == "mxfp4":
        scale = compress_mx_scale(scale, torch.uint8)
    return {"weight_scale": scale, "weight_shape": torch.tensor(shape)}


def levels(variant: Variant) -> torch.Tensor:
    """The 16 values of w4a16, F32, as parts of the least: -1 to 0.875."""
    return levels_of(variant.method) / LEAST


def block_size(variant: Variant) -> int:
    """The group, which never crosses rows."""
    if variant.group_size in (None, ROW):
        raise BadInputError(
            "calibrate: the rows of this model have no group size in common that divides them all, or group_size is -1; give "
            "group_size 32, 64 or 128, and name what it does not divide in skip_modules"
        )
    return int(variant.group_size or 0)


def signed_scales(variant: Variant) -> bool:
    """Never, as all other programs write it: kernels may count on it."""
    return False


def scales_to_pack(scales: torch.Tensor, variant: Variant) -> torch.Tensor:
    """What a step of 1 stands for, from what `levels` are multiplied with."""
    return scales / LEAST


def scales_as_read(scales: torch.Tensor, variant: Variant, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to the dtype of the weight, in which they are stored."""
    return (scales / LEAST).to(dtype).float() * LEAST


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes, U8 [rows, columns], as they are stored: eight in an integer."""
    return packed(codes, Variant(method="w4a16"))


def restored(parts: dict[str, torch.Tensor], shape: tuple[int, int], device: str, method: str) -> Restored:
    """The weights that stored parts stand for, as the package decompresses them: in the dtype of the scales."""
    width, scale, known = shape[1], parts["weight_scale"], SCHEMES[method]
    grouped = scale.shape[1] > 1 and known.stored == INTEGERS
    if known.stored == INTEGERS:  # single modules of w4a16 can be in 8 bits
        method = "w4a16" if parts["weight_packed"].shape[1] <= -(-width // 8) else "w8a16"
    scheme = scheme_of(method, width // scale.shape[1] if grouped else ROW)
    compressor = BaseCompressor.get_value_from_registry(known.stored)
    codes = next(name for name in ("weight_packed", "weight") if name in parts)

    def piece(start: int, count: int) -> torch.Tensor:
        first, last = start // width, (start + count) // width
        state = {codes: parts[codes][first:last].to(device), "weight_scale": scale[first:last].to(device)}
        if (whole := parts.get("weight_global_scale")) is not None:
            state["weight_global_scale"] = whole.to(device)
        if known.stored == INTEGERS:
            state["weight_shape"] = torch.tensor([last - first, width])
        weights: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        return weights.reshape(-1).float()

    return Restored(piece, multiple=width)


def hide_bars() -> None:
    """Let the package draw no progress bars: it draws several for every model that is loaded."""
    names = ("compressors.model_compressors.model_compressor", "quantization.lifecycle.apply", "offload.dispatch")
    for name in names:
        module: Any = import_module(f"compressed_tensors.{name}")
        module.tqdm = _no_bar


def _no_bar(*given: Any, **options: Any) -> Any:
    return tqdm(*given, **{**options, "disable": True})


def decompress(model: Any) -> list[int]:
    """Make plain layers of a loaded model's quantized ones; where activations are quantized, rounding comes before them.

    Returns how many bits their weights had.
    """
    bits = set()
    for name, module in list(model.named_modules()):
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        bits.add(int(scheme.weights.num_bits))
        decompress_module(module, leave_decompressed=False)
        module.weight.data = module.weight.data.to(model.dtype)
        if scheme.input_activations is not None:
            model.set_submodule(name, RoundedActivations(module, scheme.input_activations))
    model.hf_quantizer.compressor.remove_decompression_hook(model)
    return sorted(bits)


class RoundedActivations(torch.nn.Module):
    """A layer whose activations are quantized and dequantized first, with a scale for each token, as kernels have it."""

    def __init__(self, layer: torch.nn.Module, args: Any) -> None:
        super().__init__()
        self.layer, self.args = layer, args

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Emulate in the dtype of `hidden` [..., tokens, in]."""
        tokens = hidden.reshape(1, -1, hidden.shape[-1])  # the package takes all of a 2-D tensor for one token
        scale, zero = compute_dynamic_scales_and_zp(tokens, self.args, self)
        rounded: torch.Tensor = self.layer(fake_quantize(tokens, scale, zero, self.args).view(hidden.shape))
        return rounded

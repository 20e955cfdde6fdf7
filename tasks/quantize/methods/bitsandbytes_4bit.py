"""bitsandbytes' 4-bit formats, nf4 and fp4: 64 weights share a scale, or as many as was asked for; with double quantization, 256
scales share one.

The format is bitsandbytes' own (`functional.quantize_4bit`, `QuantState.as_dict`); what it writes is what comes out here,
bit for bit. On CUDA its kernel is used. On the CPU its kernel is plain torch and searches bounds for every weight; here a
weight's code is looked up instead, fifteen times faster, and compared with bitsandbytes' on a sample first.
"""

import dataclasses
import functools
import logging
import math
import threading
from typing import Any

import torch

from configs.schema import Variant
from tasks.quantize.methods.bitsandbytes_skips import with_fused
from tasks.quantize.methods.module_lists import named
from tasks.transformers_adapter import Selection, select_as_transformers

log = logging.getLogger("tame.quantize")

BLOCK = 64  # weights that share a scale, where nothing else is asked for
CELLS = 32768  # of equal width, which the lookup table divides [-1, 1] into
PIECE = 1 << 17  # weights worked on at once on the CPU, so that they stay in its cache
UNSURE = 16  # marks cells that hold a bound between two codes

_local = threading.local()


def select(model: Any, variant: Variant, skip: list[str] | None, dtype: torch.dtype) -> Selection:
    """The layers that transformers quantizes.

    Raises:
        BadInputError: one of `small_group_modules` is no module that is quantized.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=variant.method,
        bnb_4bit_use_double_quant=variant.double_quant,
        # transformers' own default is float32, which is what such a checkpoint then computes in, at a fraction of the speed.
        bnb_4bit_compute_dtype=variant.compute_dtype or dtype,
        llm_int8_skip_modules=with_fused(skip),
    )
    selection = select_as_transformers(config, model, dtype)
    return dataclasses.replace(selection, variants=_small_groups(model, variant, selection))


def _small_groups(model: Any, variant: Variant, selection: Selection) -> dict[str, Variant]:
    """The weights of `small_group_modules`, by their names in the model, with what they are quantized as."""
    if not variant.small_group_modules:
        return {}
    quantized = filter(selection.includes, model.state_dict())
    return dict.fromkeys(named(variant.small_group_modules, quantized, "small_group_modules"), variant.in_small_groups)


def reselect(model: Any, quantization_config: Any, dtype: torch.dtype) -> Selection:
    """The layers that transformers would load as quantized."""
    return select_as_transformers(quantization_config, model, dtype, pre_quantized=True)


def outputs(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored for a weight of `shape` [out, in], by name below its module, as meta tensors.

    `weight` has the codes, U8 [ceil(n / 2), 1], two in a byte; the others are what `pack` makes. With double quantization
    the length of `weight.quant_state.…` depends on the weights' values.
    """
    with torch.device("meta"):
        codes = torch.empty((shape[0] * shape[1] + 1) // 2, 1, dtype=torch.uint8)
        state = _state(torch.empty(scale_count(shape, variant)), shape, dtype, variant)
    return {"weight": codes, **state}


def grows(name: str, variant: Variant) -> bool:
    """The JSON text that says how to dequantize has, with double quantization, the mean of the scales in it."""
    return variant.double_quant and name.startswith("weight.quant_state.")


def row_multiple(columns: int, variant: Variant) -> int:
    """So many rows that no block of weights that share a scale crosses from one call of `quantize_rows` to the next."""
    return block_size(variant) // math.gcd(block_size(variant), columns)


def scale_count(shape: tuple[int, int], variant: Variant) -> int:
    """One for each block, the last of which may be shorter."""
    return -(-shape[0] * shape[1] // block_size(variant))


def quantize_rows(block: torch.Tensor, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize whole rows: their codes, U8 [ceil(n / 2), 1], and scales, F32 [ceil(n / group)]; on the block's device."""
    size = block_size(variant)
    if block.device.type == "cpu" and block.numel() % size == 0 and _agrees(variant.method, block.dtype, size):
        return _look_up(block, variant.method, size)
    return _bitsandbytes(block, variant.method, size)


def levels(variant: Variant) -> torch.Tensor:
    """The 16 values, F32 [16]."""
    from bitsandbytes.functional import get_4bit_type

    found: torch.Tensor = get_4bit_type(variant.method, device="cpu")
    return found


def block_size(variant: Variant) -> int:
    """What the variant says, or 64."""
    return variant.group_size or BLOCK


def signed_scales(variant: Variant) -> bool:
    """Always: a scale is a number that a code's value is multiplied with, whatever its sign. Double quantization, which keeps
    differences from the mean in 8 bits, rounds it a little more coarsely then, to 1 % or so.
    """
    return True


def scales_to_pack(scales: torch.Tensor, variant: Variant) -> torch.Tensor:
    """The same."""
    return scales


def scales_as_read(scales: torch.Tensor, variant: Variant, dtype: torch.dtype) -> torch.Tensor:
    """The scales themselves, or, with double quantization, what is left of them."""
    if not variant.double_quant:
        return scales
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = scales.mean()
    codes, state = quantize_blockwise(scales - offset, blocksize=256)
    read: torch.Tensor = dequantize_blockwise(codes, state) + offset
    return read


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """U8 [ceil(n / 2), 1]: two in a byte, the first in the high half."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[::2] << 4 | flat[1::2]).view(-1, 1)


def plausible(scales: torch.Tensor) -> bool:
    """Whether all scales are finite; NaN and infinite weights make theirs so."""
    return math.isfinite(float(scales.max()))


def fault(block: torch.Tensor, scales: torch.Tensor) -> tuple[int, str] | None:
    """Nothing finite is too large or too small for 4 bits and a scale in float32."""
    return None


def _bitsandbytes(block: torch.Tensor, method: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel that `bitsandbytes.functional.quantize_4bit` calls, without the copy of the 16 codes that it also makes."""
    import bitsandbytes  # noqa: F401  it registers the operator

    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(block, size, method, torch.uint8)
    return codes, scales


def pack(scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
    """What is stored besides the codes: `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`, ….

    `scales` are those of the whole weight, F32 [ceil(n / group)].
    """
    if variant.double_quant:
        return _state(scales, shape, dtype, variant)
    return {
        **_without_scales(shape, dtype, variant.method, block_size(variant), scales.device),
        "weight.absmax": scales,
    }


@functools.lru_cache
def _without_scales(
    shape: tuple[int, int], dtype: torch.dtype, method: Any, size: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """What is the same for all weights of one shape, on the host. On a fast GPU, making it takes longer than the weight."""
    variant = Variant(method=method, group_size=size)
    state = _state(torch.zeros(1, device=device), shape, dtype, variant)
    return {name: tensor.cpu() for name, tensor in state.items() if name != "weight.absmax"}


def _state(
    scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant
) -> dict[str, torch.Tensor]:
    """`QuantState.as_dict` for these scales; for meta scales, the same with meta tensors."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    meta = scales.device.type == "meta"
    nested: dict[str, Any] = {}
    if variant.double_quant and meta:
        blocks = -(-scales.numel() // 256)
        state2 = QuantState(torch.empty(blocks), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        nested = {"offset": torch.zeros((), device="cpu"), "state2": state2}
        scales = torch.empty_like(scales, dtype=torch.uint8)
    elif variant.double_quant:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=256)
        nested = {"offset": offset, "state2": state2}
    code = torch.empty(16, device="meta") if meta else get_4bit_type(variant.method, device=scales.device)
    state = QuantState(
        scales,
        shape=torch.Size(shape),
        code=code,
        blocksize=block_size(variant),
        quant_type=variant.method,
        dtype=dtype,
        **nested,
    )
    with torch.device("cpu"):
        return {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def _look_up(block: torch.Tensor, method: str, share: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The arithmetic of bitsandbytes' CPU kernel up to each weight's fraction of its scale; then a table gives the code.

    Rounding to a cell keeps order, so a cell without a bound in it has one code. Weights in the few cells with one are
    searched as bitsandbytes does. `share` weights share a scale.
    """
    table, bounds, order = _table(method)
    flat = block.reshape(-1)
    n = flat.numel()
    codes = torch.empty(n // 2, 1, dtype=torch.uint8)
    scales = torch.empty(n // share)
    for start in range(0, n, PIECE):
        size = min(PIECE, n - start)
        weights, work, cells, found, unsure, packed, shifted = _scratch(size, share)
        absmax = scales[start // share : (start + size) // share]
        weights.copy_(flat[start : start + size].view(-1, share))
        torch.amax(torch.abs(weights, out=work), 1, out=absmax)
        weights.mul_((1.0 / absmax.clamp(min=1e-38)).view(-1, 1))
        cells.copy_(torch.add(torch.tensor(float(CELLS // 2)), weights, alpha=CELLS // 2, out=work).view(-1))
        torch.index_select(table, 0, cells.clamp_(0, CELLS + 1), out=found)
        eights = torch.bitwise_and(found.view(torch.int64), UNSURE * 0x0101010101010101, out=unsure).nonzero().view(-1)
        if eights.numel():
            found.view(-1, 8)[eights] = order[torch.bucketize(weights.view(-1, 8)[eights], bounds, out_int32=True)]
        pairs = found.view(torch.int16)  # little-endian: the first weight in the low byte
        torch.bitwise_left_shift(pairs, 4, out=packed).bitwise_or_(torch.bitwise_right_shift(pairs, 8, out=shifted))
        codes[start // 2 : (start + size) // 2, 0] = packed
    return codes, scales


def _scratch(size: int, share: int) -> list[torch.Tensor]:
    """This thread's buffers for `size` weights. Allocated once: fresh memory costs more than the arithmetic on it."""
    if not hasattr(_local, "buffers"):
        floats = torch.empty(2, PIECE)
        shorts = torch.empty(2, PIECE // 2, dtype=torch.int16)
        _local.buffers = (
            *floats,
            torch.empty(PIECE, dtype=torch.int32),
            torch.empty(PIECE, dtype=torch.uint8),
            torch.empty(PIECE // 8, dtype=torch.int64),
            *shorts,
        )
    per_weight = (1, 1, 1, 1, 8, 2, 2)
    weights, work, *others = [
        buffer[: size // several] for buffer, several in zip(_local.buffers, per_weight, strict=True)
    ]
    return [weights.view(-1, share), work.view(-1, share), *others]


@functools.cache
def _table(method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes by cell (U8), the 15 bounds between codes (F32), and the code above each number of bounds (U8)."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type(method, device="cpu")
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    middle = torch.tensor(float(CELLS // 2))
    edges = torch.add(middle, bounds, alpha=CELLS // 2).to(torch.int32)
    table = order[torch.bucketize(torch.arange(CELLS + 2, dtype=torch.int32), edges)].to(torch.uint8)
    table[edges] = UNSURE
    return table, bounds, order.to(torch.uint8)


@functools.cache
def _agrees(method: str, dtype: torch.dtype, share: int) -> bool:
    """Whether the lookup gives bitsandbytes' own bytes here, tried on random weights and on ones at the bounds."""
    _, bounds, _ = _table(method)
    near = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))])
    blocks = torch.randn(256, share, generator=torch.Generator().manual_seed(0))
    several = share - 1
    near = near.repeat(-(-64 * several // len(near)))[: 64 * several].view(64, several)
    blocks[:64, 0] = torch.linspace(0.5, 2.0, 64)
    blocks[:64, 1:] = near * blocks[:64, :1]
    blocks[64] = 0
    sample = blocks.to(dtype)
    codes, scales = _bitsandbytes(sample, method, share)
    mine = _look_up(sample, method, share)
    if torch.equal(codes, mine[0]) and torch.equal(scales, mine[1]):
        return True
    log.warning(
        "this bitsandbytes rounds %s differently than tame's CPU kernel; using its own, which is slower", method
    )
    return False

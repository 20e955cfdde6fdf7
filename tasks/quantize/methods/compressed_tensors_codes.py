"""Scales and codes of a few rows of weights, as compressed-tensors makes them.

Scales are the package's own; so are codes, through tables: a 16-bit weight divided by its scale has 16 bits again, and the
package says of each of the 65,536 quotients what its code is. A scale can also be searched: of the scales that belong to
smaller and smaller parts of a group's range, the one with the least squared error of the weights is taken.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

from configs.schema import Variant
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES

PIECE = 1 << 17  # weights worked on at once on the CPU, so that they stay in its cache
ROW = -1  # group size: a scale for a whole row
INTEGERS = "pack-quantized"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FACTORS = tuple(1 - step / 40 for step in range(16))
"""What a group's range is multiplied with where its scale is searched, the whole range first."""

Codes = tuple[torch.Tensor, torch.Tensor]
"""Codes as they are stored, and scales, F32 and 1-D."""


def scheme_for(variant: Variant) -> Any:
    """The package's QuantizationScheme for a variant."""
    return scheme_of(variant.method, variant.group_size)


@functools.cache
def scheme_of(method: str, group_size: int | None) -> Any:
    """The package's QuantizationScheme of a method, with so many weights to a scale where that can be chosen."""
    scheme = preset_name_to_scheme(SCHEMES[method].preset, ["Linear"])
    if SCHEMES[method].stored == INTEGERS:
        chosen = (
            {"strategy": "channel"} if group_size == ROW else {"strategy": "group", "group_size": group_size or 128}
        )
        scheme.weights = QuantizationArgs(num_bits=scheme.weights.num_bits, type="int", dynamic=False, **chosen)
    scheme.format = SCHEMES[method].stored
    return scheme


def groups_in(columns: int, variant: Variant) -> int:
    """Scales in a row."""
    size = scheme_for(variant).weights.group_size
    return columns // size if size else 1


@functools.cache
def levels_of(method: str) -> torch.Tensor:
    """What each code stands for, before it is multiplied with its scale: F32, by the code."""
    known = SCHEMES[method]
    if known.numbers.startswith("4-bit floats"):
        return torch.tensor([*FP4, *(-level for level in FP4)])
    codes = torch.arange(1 << known.bits, dtype=torch.int32)
    if known.stored == INTEGERS:
        return (codes - (1 << known.bits - 1)).float()
    return codes.to(torch.uint8).view(torch.float8_e4m3fn if method == "fp8" else torch.int8).float()


def in_pieces(block: torch.Tensor, do: Callable[[torch.Tensor], Codes]) -> Codes:
    """Rows quantized by `do`: on the CPU a few at a time."""
    if block.device.type != "cpu":
        return do(block)
    done = [do(rows) for rows in torch.split(block, max(1, PIECE // block.shape[1]))]
    return torch.cat([codes for codes, _ in done]), torch.cat([scales for _, scales in done])


def quantize_some(rows: torch.Tensor, variant: Variant) -> Codes:
    """Quantize whole rows."""
    weights = scheme_for(variant).weights
    grouped = rows.view(rows.shape[0], groups_in(rows.shape[1], variant), -1)
    least, most = torch.aminmax(grouped, dim=-1)
    scale = _scales(least, most, weights)
    if variant.scale == "search":
        scale = _searched(grouped, (least, most), scale, variant)
    return packed(_codes(rows, grouped, scale, variant), variant), scale.float().view(-1)


def _searched(
    grouped: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], scale: torch.Tensor, variant: Variant
) -> torch.Tensor:
    """Of the scales of parts of each group's range, those with the least squared error: the larger where two are equal."""
    levels = levels_of(variant.method).to(grouped.device)
    rows = grouped.view(len(grouped), -1)
    weights, exact = scheme_for(variant).weights, grouped.float()

    def error(scale: torch.Tensor) -> torch.Tensor:
        read = levels[_codes(rows, grouped, scale, variant).int()].view(grouped.shape)
        return torch.addcmul(exact, read, scale.float().unsqueeze(-1), value=-1).square_().sum(-1)

    best, least = scale, error(scale)
    for factor in FACTORS[1:]:
        tried = _scales(ends[0] * factor, ends[1] * factor, weights)
        lost = error(tried)
        best, least = torch.where(lost < least, tried, best), torch.minimum(lost, least)
    return best


def _scales(least: torch.Tensor, most: torch.Tensor, weights: Any) -> torch.Tensor:
    """The package's scales [rows, groups] of groups of weights, from the least and the largest of each."""
    scale: torch.Tensor = calculate_qparams(least, most, weights)[0]
    return scale


def _codes(rows: torch.Tensor, grouped: torch.Tensor, scale: torch.Tensor, variant: Variant) -> torch.Tensor:
    """The code of each weight, U8 of the rows' shape: integers from 0, or the bits of what is stored."""
    if rows.device.type != "cpu" or rows.dtype.itemsize != 2:
        return _by_the_package(rows, scale, variant)
    quotient = grouped / scale.unsqueeze(-1)
    index = quotient.view(torch.int16).to(torch.int32).add_(1 << 15)
    return torch.index_select(_table(variant.method, rows.dtype), 0, index.view(-1)).view(rows.shape)


def _by_the_package(rows: torch.Tensor, scale: torch.Tensor, variant: Variant) -> torch.Tensor:
    known, weights = SCHEMES[variant.method], scheme_for(variant).weights
    if variant.method == "mxfp4":
        pairs = quantize_and_pack_fp4(rows, scale, group_size=rows.shape[1] // scale.shape[1])
        return unpaired(pairs)
    kind = torch.float8_e4m3fn if variant.method == "fp8" else torch.int8
    codes: torch.Tensor = quantize(rows, scale, None, weights, dtype=kind)
    if known.stored == INTEGERS:
        return (codes.to(torch.int16) + (1 << known.bits - 1)).to(torch.uint8)
    return codes.view(torch.uint8)


@functools.cache
def _table(method: str, dtype: torch.dtype) -> torch.Tensor:
    """The code of every number of a 16-bit dtype, U8 [65536], by its bits, of which the highest is inverted."""
    variant = Variant(method=method, group_size=-1 if SCHEMES[method].stored == INTEGERS else None)
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    ones = torch.ones(1, groups_in(numbers.shape[1], variant), dtype=dtype)
    return _by_the_package(numbers, ones, variant).view(-1)


def unpaired(pairs: torch.Tensor) -> torch.Tensor:
    """Codes that lie two in a byte, the first in the low half, each in a byte of its own: twice as many columns."""
    return torch.stack([pairs & 15, pairs >> 4], -1).view(len(pairs), -1)


def packed(codes: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Codes, U8 [rows, columns], as they are stored: several in a number, the first in its lowest bits."""
    known = SCHEMES[variant.method]
    if known.stored == INTEGERS and (short := -codes.shape[1] % (32 // known.bits)):
        codes = torch.nn.functional.pad(codes, (0, short))
    if known.bits == 4:
        pairs = codes.contiguous().view(torch.int16)  # little-endian: the first code in the low byte
        codes = torch.bitwise_or(pairs, pairs >> 4).to(torch.uint8)
    if known.stored == INTEGERS:
        return codes.view(torch.int32)
    return codes if known.bits == 4 else codes.view(torch.float8_e4m3fn if variant.method == "fp8" else torch.int8)

"""The methods that there are: one file a family of methods, and the one table that names them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.schema import Variant
from tasks.download.checkpoint import quantization_of
from tasks.quantize.methods import finegrained_fp8
from tasks.quantize.methods.bitsandbytes import EightBit, FourBit
from tasks.quantize.methods.compressed_tensors import CompressedTensors
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES
from tasks.quantize.methods.finegrained_fp8 import BlockFloat
from tasks.quantize.methods.fused_mxfp4 import FusedMxfp4
from tasks.quantize.protocols import Method, SourceReader

METHODS: dict[str, Method] = {
    "int8": EightBit(),
    "nf4": FourBit("nf4"),
    "fp4": FourBit("fp4"),
    **{name: CompressedTensors(name) for name in SCHEMES},
    "fp8-block": BlockFloat(),
}
"""By the names of configs/method_names.py."""
READERS = (FusedMxfp4(),)
"""Formats that sources come in, and that tame does not write."""


def method_of(variant: Variant) -> Method:
    """The method of a variant."""
    return METHODS[variant.method]


def described_by(quantization_config: Any) -> tuple[Method, Variant] | None:
    """Whose a checkpoint is, and of which variant, by the `quantization_config` of its config.json; None if nobody's."""
    if not isinstance(quantization_config, dict):
        return None
    for method in METHODS.values():
        with suppress(ValidationError):  # of values that no recipe could ask for
            if variant := method.describes(quantization_config):
                return method, variant
    return None


def reader_of(quantization_config: Any) -> SourceReader | None:
    """What reads a checkpoint with this `quantization_config`: a method, or one of those that only read; None if nothing does."""
    if described := described_by(quantization_config):
        return described[0]
    known = quantization_config if isinstance(quantization_config, dict) else {}
    return next((reader for reader in READERS if reader.reads(known)), None)


def of_family(quantization_config: Any) -> Method | None:
    """A method whose libraries a checkpoint needs: its own, or, of a scheme that none has, another one of its family."""
    if described := described_by(quantization_config):
        return described[0]
    family = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    return next((method for method in METHODS.values() if method.family == family), None)


def method_of_source(folder: Path) -> SourceReader | None:
    """What reads a source which is quantized already; None for a plain one, and for what none of them reads."""
    return reader_of(quantization_of(folder))


def opened_on(device: str, quantization_config: Any) -> Any:
    """The `quantization_config` that transformers is to open a checkpoint with on a device; most often the checkpoint's own."""
    return finegrained_fp8.opened_on(device, quantization_config)


def libraries() -> list[str]:
    """The libraries of all methods, each once."""
    return list(dict.fromkeys(name for method in METHODS.values() for name in method.libraries))

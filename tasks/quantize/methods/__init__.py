"""The methods that there are: one file a family of methods, and the one table that names them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.schema import Variant
from tasks.download.checkpoint import quantization_of
from tasks.quantize.methods.bitsandbytes import EightBit, FourBit
from tasks.quantize.methods.compressed_tensors import CompressedTensors
from tasks.quantize.methods.compressed_tensors_schemes import SCHEMES
from tasks.quantize.methods.finegrained_fp8 import BlockFloat
from tasks.quantize.protocols import Method

METHODS: dict[str, Method] = {
    "int8": EightBit(),
    "nf4": FourBit("nf4"),
    "fp4": FourBit("fp4"),
    **{name: CompressedTensors(name) for name in SCHEMES},
    "fp8-block": BlockFloat(),
}
"""By the names of configs/method_names.py."""


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


def method_of_source(folder: Path) -> Method | None:
    """The method that reads a source which is quantized already; None for a plain one, and for what none of them reads."""
    described = described_by(quantization_of(folder))
    return described[0] if described else None


def libraries() -> list[str]:
    """The libraries of all methods, each once."""
    return list(dict.fromkeys(name for method in METHODS.values() for name in method.libraries))

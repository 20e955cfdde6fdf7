"""Computes for `tame plan` what quantizing would give, from config.json and from the headers of the weights if they are on disk."""

import math
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.download.checkpoint import INDEX, WEIGHTS, quantization_of, read_tensors
from tasks.quantize.methods import method_of, method_of_source
from tasks.runtime.quiet import quieten


def parameters_of(folder: Path) -> int:
    """How many parameters a checkpoint has; one that is quantized, as what its weights stand for. Imports torch for that alone."""
    tensors = read_tensors(folder)
    if quantization_of(folder):
        from tasks.quantize.packed import unpacked

        tensors, _ = unpacked(folder, tensors, method_of_source(folder))
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def preview(folder: Path, variants: list[Variant], trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """For each variant: {parameters, quantized, weight_bytes, left, notes}, as in `Written`.

    `weight_bytes` is exact but for headers and a few bytes of double quantization. `folder` needs a config.json alone; the
    weights are then taken to be all that the model has. Takes a few seconds: call it through `isolated`.

    Raises:
        BadInputError, TameError: as `lay_out`.
    """
    quieten()
    from tasks.quantize.layout import lay_out
    from tasks.quantize.packed import unpacked

    facts = (
        unpacked(folder, read_tensors(folder), method_of_source(folder))[0]
        if any((folder / name).is_file() for name in (WEIGHTS, INDEX))
        else None
    )
    found = []
    for variant in variants:
        layout = lay_out(folder, method_of(variant), variant, facts, trust_remote_code)
        found.append(
            {
                "parameters": layout.parameters,
                "quantized": layout.quantized_parameters,
                "weight_bytes": sum(tensor.nbytes for tensor in layout.outputs.values()),
                "left": [entry.model_dump() for entry in layout.left],
                "notes": layout.notes,
            }
        )
    return found

"""Computes for `tame plan` what quantizing would give, from config.json and from the headers of the weights if they are on disk."""

import json
import math
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.download.checkpoint import INDEX, WEIGHTS, quantization_of, read_tensors
from tasks.quantize.methods import method_of, method_of_source
from tasks.quantize.run import versions_for
from tasks.runtime.child_process import isolated
from tasks.runtime.quiet import quieten
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Snapshot

STAGE = 1  # raise it when something else can be made


def parameters_of(folder: Path) -> int:
    """How many parameters a checkpoint has; one that is quantized, as what its weights stand for. Imports torch for that alone."""
    tensors = read_tensors(folder)
    if quantization_of(folder):
        from tasks.quantize.packed import unpacked

        tensors, _ = unpacked(folder, tensors, method_of_source(folder))
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def check(snapshot: Snapshot, variants: list[Variant]) -> None:
    """Check that every variant can be made of a model that is here, before anything is measured: no weight is read.

    Raises:
        BadInputError, TameError: as `lay_out`.
    """
    asked = [variant.unfitted for variant in variants if variant.checkpoint is None]
    inputs = {
        "snapshot": snapshot.digest,
        "variants": [[variant.identity, versions_for(method_of(variant))] for variant in asked],
        "trust_remote_code": snapshot.trust_remote_code,
        "stage": STAGE,
    }

    def make(folder: Path) -> on_disk.Made:
        found = isolated(f"look at {snapshot.name}", preview, Path(snapshot.path), asked, snapshot.trust_remote_code)
        (folder / "preview.json").write_text(json.dumps(found))
        return on_disk.Made()

    if asked:
        store.build("preview", inputs, make, shared=False)


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

"""One folder in, one folder out: everything that happens in the process that quantizes."""

import dataclasses
import functools
import gc
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.download.checkpoint import Stored, carried_files, read_config, read_tensors
from tasks.quantize.calibrated import FOLDER, calibrated, taking
from tasks.quantize.check import check_written
from tasks.quantize.protocols import Method, Request, TensorFormat, Written
from tasks.runtime.progress import Progress, silent
from tasks.runtime.quiet import quieten

if TYPE_CHECKING:
    from tasks.quantize.layout import Layout
    from tasks.quantize.shards import Shard

LIBRARIES = ("torch", "transformers", "safetensors")
"""What decides the bytes of a checkpoint, besides its method's own libraries."""


def versions_for(method: Method) -> dict[str, str]:
    """The versions of the libraries that decide the bytes of a checkpoint."""
    return {name: version(name) for name in (*LIBRARIES, *method.libraries)}


def quantize_tensors(method: Method, request: Request, progress: Progress = silent) -> Written:
    """Quantize a checkpoint tensor by tensor, in the format that `method` has for that.

    Raises:
        BadInputError, TameError: as `check_source`, `lay_out` and `Engine.run`. OSError: no space left.
    """
    config = read_config(request.source)
    if not request.trust_remote_code:  # the code that it names is not taken along
        config.pop("auto_map", None)
    from tasks.quantize.packed import unpacked

    tensors, packed = unpacked(request.source, read_tensors(request.source), request.source_method)
    tensor_format, layout = _lay_out(method, request, tensors)
    request = dataclasses.replace(request, variant=layout.variant)
    from tasks.quantize.engine import Engine
    from tasks.quantize.journal import Journal
    from tasks.quantize.shards import shards

    files = shards(request.out, layout.outputs, request.max_shard_size, layout.growing, layout.weight_of)
    identity = _identity(method, request, tensors, layout, files)
    journal = Journal(request.out, identity)
    expected = {journal.path, request.out / FOLDER, *(shard.path for shard in files)}
    for path in set(request.out.iterdir()) - expected:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    jobs, notes = layout.jobs, layout.notes
    if request.codes is not None:
        jobs = taking(request.codes, layout)
    if any(job.quantized and not job.taken and (job.variant or request.variant).calibrate for job in jobs):
        jobs, said = calibrated(request, tensor_format, jobs, layout.config, identity, progress)
        notes = [*notes, *said]
    engine = Engine(request, tensor_format, jobs, files, journal, progress, packed)
    digests = engine.run(functools.partial(_complete, request, config, tensor_format, layout, files))
    journal.remove()
    shutil.rmtree(request.out / FOLDER, ignore_errors=True)
    return Written(
        digests=digests,
        parameters=layout.parameters,
        quantized=layout.quantized_parameters,
        weight_bytes=sum(shard.path.stat().st_size for shard in files),
        left=layout.left,
        notes=notes,
    )


def _lay_out(method: Method, request: Request, tensors: dict[str, Stored]) -> "tuple[TensorFormat, Layout]":
    """Import what is needed, and decide what the checkpoint will be."""
    gc.disable()  # imports make objects by the hundred thousand, and no garbage: searching them takes a seventh of the time
    try:
        quieten()
        from tasks.quantize.layout import lay_out

        tensor_format = method.tensor_format()
        assert tensor_format is not None
        gc.freeze()  # what is there already need not be searched below
        layout = lay_out(request.source, method, request.variant, tensors, request.trust_remote_code)
    finally:
        gc.enable()
    gc.collect()  # the model without weights is full of cycles
    gc.unfreeze()
    return tensor_format, layout


def _identity(
    method: Method, request: Request, tensors: dict[str, Stored], layout: "Layout", files: "list[Shard]"
) -> list[Any]:
    """What a killed run must have had in common with this one for its output to be taken up."""
    stats = {name: (request.source / name).stat() for name in {tensor.file for tensor in tensors.values()}}
    return [
        {
            name: (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            for name, stat in stats.items()
        },
        versions_for(method),
        [(shard.path.name, shard.data, shard.at) for shard in files],
        [(job.source, str(job.dtype), job.outputs) for job in layout.jobs],
        request.variant.identity,
        request.device.partition(":")[0],
        request.calibration.digest if request.calibration else None,
        *([str(request.codes)] if request.codes else []),
    ]


def _complete(
    request: Request, config: dict[str, Any], tensor_format: TensorFormat, layout: "Layout", files: "list[Shard]"
) -> None:
    """Write all that is not weights, and check the whole, once the weights are written."""
    from tasks.quantize.shards import write_index

    out = request.out
    write_index(out, files, layout.parameters)
    _write_json(out / "config.json", {**config, **layout.config})
    if layout.generation_config is not None:
        _write_json(out / "generation_config.json", layout.generation_config)
    for name in carried_files(request.source, request.names, request.trust_remote_code):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(request.source / name, out / name)
    check_written(out, layout, tensor_format, request.trust_remote_code)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""One folder in, one folder out: everything that happens in the process that quantizes."""

import gc
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.download.checkpoint import Stored, carried_files, read_config, read_tensors
from tasks.quantize.check import check_written
from tasks.quantize.protocols import Method, Request, TensorFormat, Written
from tasks.quantize.quiet import quieten
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from tasks.quantize.layout import Layout
    from tasks.quantize.shards import Shard

PER_GPU = 4  # threads: with more, they wait for each other
LIBRARIES = ("torch", "transformers", "safetensors")
"""What decides the bytes of a checkpoint, besides its method's own libraries."""


def versions_for(method: Method) -> dict[str, str]:
    """The versions of the libraries that decide the bytes of a checkpoint."""
    return {name: version(name) for name in (*LIBRARIES, *method.libraries)}


def quantize_tensors(method: Method, request: Request, progress: Progress = silent) -> Written:
    """Quantize a checkpoint tensor by tensor, in the format that `method` has for that.

    Raises:
        BadInputError, TameError: as `check_source`, `lay_out` and `stream`. OSError: no space left.
    """
    source, out, variant = request.source, request.out, request.variant
    config = read_config(source)
    if not request.trust_remote_code:  # the code that it names is not taken along
        config.pop("auto_map", None)
    tensors = read_tensors(source)
    tensor_format, layout = _lay_out(method, request, tensors)
    from tasks.quantize.engine import stream
    from tasks.quantize.journal import Journal
    from tasks.quantize.shards import shards

    files = shards(out, layout.outputs, request.max_shard_size, layout.growing)
    journal = Journal(out, _identity(method, request, tensors, layout, files))
    expected = {journal.path, *(shard.path for shard in files)}
    for path in set(out.iterdir()) - expected:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    devices = _devices(request.device)
    workers = request.workers or (cores() if devices == ["cpu"] else min(cores(), PER_GPU * len(devices)))
    rest = _rest(request, config, tensor_format, layout, files)
    digests = stream(source, layout.jobs, files, tensor_format, variant, devices, workers, journal, rest, progress)
    journal.remove()
    return Written(
        digests=digests,
        parameters=layout.parameters,
        quantized=layout.quantized_parameters,
        weight_bytes=sum(shard.path.stat().st_size for shard in files),
        left=layout.left,
        notes=layout.notes,
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
        request.variant.model_dump(mode="json", exclude={"name"}),
        request.device.partition(":")[0],
    ]


def _rest(
    request: Request, config: dict[str, Any], tensor_format: TensorFormat, layout: "Layout", files: "list[Shard]"
) -> Callable[[], None]:
    """A function that writes all that is not weights, and checks the whole; for when the weights are written."""
    from tasks.quantize.shards import write_index

    out = request.out

    def rest() -> None:
        write_index(out, files, layout.parameters)
        _write_json(out / "config.json", {**config, **layout.config})
        if layout.generation_config is not None:
            _write_json(out / "generation_config.json", layout.generation_config)
        for name in carried_files(request.source, request.names, request.trust_remote_code):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(request.source / name, out / name)
        check_written(out, layout, tensor_format, request.trust_remote_code)

    return rest


def _devices(device: str) -> list[str]:
    """`cuda` means all GPUs that this process sees."""
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

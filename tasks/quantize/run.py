"""One folder in, one folder out: everything that happens in the process that quantizes."""

import gc
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.download.checkpoint import carried_files, read_config, read_tensors
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress, silent

PER_GPU = 4  # threads: with more, they wait for each other


def work(
    source: Path,
    out: Path,
    variant: Variant,
    *,
    device: str,
    workers: int | None = None,
    max_shard_size: int | None = None,
    names: list[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize the checkpoint in `source` into the folder `out`, which is empty or holds what a killed run left.

    Returns {digests, parameters, quantized, weight_bytes, left, notes}; `digests` are sha256 of the weight files.

    Raises:
        BadInputError, TameError: as `check_source`, `lay_out` and `stream`. OSError: no space left.
    """
    config = read_config(source)
    tensors = read_tensors(source)
    gc.disable()  # imports make objects by the hundred thousand, and no garbage: searching them takes a seventh of the time
    try:
        from tasks.quantize.quiet import import_libraries

        import_libraries()
        from tasks.quantize.check import check_written
        from tasks.quantize.engine import stream
        from tasks.quantize.journal import Journal
        from tasks.quantize.layout import lay_out
        from tasks.quantize.shards import shards, write_index

        gc.freeze()  # what is there already need not be searched below
        layout = lay_out(source, variant, tensors, trust_remote_code)
    finally:
        gc.enable()
    gc.collect()  # the model without weights is full of cycles
    gc.unfreeze()
    growing = {name for name in layout.outputs if variant.double_quant and ".quant_state." in name}
    files = shards(out, layout.outputs, max_shard_size, growing)
    stats = {name: (source / name).stat() for name in {tensor.file for tensor in tensors.values()}}
    identity = [
        {
            name: (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            for name, stat in stats.items()
        },
        {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")},
        [(shard.path.name, shard.data, shard.at) for shard in files],
        [(job.source, str(job.dtype), job.parts) for job in layout.jobs],
        variant.model_dump(mode="json", exclude={"name"}),
        device.partition(":")[0],
    ]
    journal = Journal(out, identity)
    expected = {journal.path, *(shard.path for shard in files)}
    for path in set(out.iterdir()) - expected:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def rest() -> None:
        write_index(out, files, layout.parameters)
        _write_json(out / "config.json", {**config, **layout.config})
        if layout.generation_config is not None:
            _write_json(out / "generation_config.json", layout.generation_config)
        for name in carried_files(source, names, trust_remote_code):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
        check_written(out, layout.outputs, layout.quantized, trust_remote_code)

    devices = _devices(device)
    workers = workers or (cores() if device == "cpu" else min(cores(), PER_GPU * len(devices)))
    digests = stream(source, layout.jobs, files, variant, devices, workers, journal, rest, progress)
    journal.remove()
    return {
        "digests": digests,
        "parameters": layout.parameters,
        "quantized": layout.quantized_parameters,
        "weight_bytes": sum(shard.path.stat().st_size for shard in files),
        "left": layout.left,
        "notes": layout.notes,
    }


def _devices(device: str) -> list[str]:
    """`cuda` means all GPUs that this process sees."""
    if device != "cuda":
        return [device]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

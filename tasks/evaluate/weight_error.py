"""What quantizing did to each weight: the relative error |W − Ŵ| / |W| (Frobenius norms), Ŵ being what its codes stand for.

From the two checkpoints' files, tensor by tensor: no model is loaded, and memory is that of a few pieces of weights.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import TameError
from tasks.download.checkpoint import quantization_of, read_tensors, written_tensors
from tasks.quantize.methods import described_by
from tasks.quantize.protocols import Restored
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from tasks.quantize.layout import Job

STAGE = 1  # raise it when the numbers, or what is kept of them, change
RESULT = "result.json"
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}  # weights compared at once; on a CPU they stay in its cache


def comparable(source: Path, quantized: Path) -> bool:
    """Whether the one says that it was quantized by a method of tame's, and the other that it was not. Imports no torch."""
    return described_by(quantization_of(quantized)) is not None and not quantization_of(source)


def layer_errors(
    source: Path,
    quantized: Path,
    device: str,
    folder: Path,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Compare every quantized weight of `quantized` with what it was made from in `source`.

    Writes result.json: layers, {module, error, parameters} each in the model's order, and notes. There are no layers where
    the method does not write tensor by tensor, and where the two do not fit together, which a note says.
    """
    try:
        found: dict[str, Any] = {
            "layers": _compare(source, quantized, device, trust_remote_code, progress),
            "notes": [],
        }
    except TameError as error:
        found = {"layers": [], "notes": [f"the error of each layer could not be computed: {error}"]}
    (folder / RESULT).write_text(json.dumps(found, indent=1))


def _compare(
    source: Path, quantized: Path, device: str, trust_remote_code: bool, progress: Progress
) -> list[dict[str, Any]]:
    import torch
    from safetensors import safe_open

    from tasks.quantize.layout import lay_out

    described = described_by(quantization_of(quantized))
    assert described is not None
    method, variant = described
    if method.tensor_format() is None:
        return []
    layout = lay_out(source, method, variant, read_tensors(source), trust_remote_code)
    jobs = [job for job in layout.jobs if job.quantized]
    written = written_tensors(quantized)
    for name in (name for job in jobs for name in job.outputs):
        if name not in written or (
            written[name].shape != tuple(layout.outputs[name].shape) and name not in layout.growing
        ):
            raise TameError(f"{quantized}: {name} is not as in a checkpoint made from {source}")
    with ExitStack() as stack:
        paths = {source / job.source.file for job in jobs} | {quantized / found.file for found in written.values()}
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}

        def error_of(job: "Job") -> float:
            weight = opened[source / job.source.file].get_tensor(job.source.name)
            parts = {part: opened[quantized / written[name].file].get_tensor(name) for part, name in job.parts.items()}
            restored = method.restore(parts, (job.shape[0], job.shape[1]), device)
            return _error(weight.T if job.transposed else weight, restored, device)

        # A weight each: on a CPU, torch's own threads would wait for each other after every piece.
        workers = cores() if device == "cpu" else 1
        errors = []
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for error in pool.map(error_of, jobs):
                errors.append(error)
                progress("layers", len(errors), len(jobs))
    return [
        {
            "module": job.output.removesuffix(f".{next(iter(job.parts))}"),
            "error": error,
            "parameters": math.prod(job.shape),
        }
        for job, error in zip(jobs, errors, strict=True)
    ]


def _error(weight: "torch.Tensor", restored: Restored, device: str) -> float:
    """|W − Ŵ| / |W| of a weight [out, in], in float32, summed over pieces."""
    import torch

    size = max(PIECE[device.partition(":")[0]] // restored.multiple, 1) * restored.multiple
    flat = weight.reshape(-1)
    lost = kept = 0.0
    for start in range(0, flat.numel(), size):
        original = flat[start : start + size].to(device).float()
        difference = restored.piece(start, original.numel()).sub_(original)
        lost += float(torch.dot(difference, difference))
        kept += float(torch.dot(original, original))
    return math.sqrt(lost / kept) if kept else 0.0

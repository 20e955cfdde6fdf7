"""What quantizing did to each weight: the relative error |W − Ŵ| / |W| (Frobenius norms), Ŵ being what its codes stand for.

From the two checkpoints' files, tensor by tensor: no model is loaded, and memory is that of a few pieces of weights.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import TameError
from configs.schema import Variant
from tasks.download.checkpoint import read_header, read_tensors, weight_files
from tasks.runtime.device import cores
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from tasks.quantize.layout import Job

STAGE = 1  # raise it when the numbers, or what is kept of them, change
RESULT = "result.json"
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}  # weights compared at once; on a CPU they stay in its cache


def comparable(source: Path, quantized: Path) -> bool:
    """Whether the one says that bitsandbytes quantized it, and the other that nothing did."""
    return _quantization(quantized).get("quant_method") == "bitsandbytes" and not _quantization(source)


def layer_errors(
    source: Path,
    quantized: Path,
    device: str,
    folder: Path,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Compare every quantized weight of `quantized` with what it was made from in `source`.

    Writes result.json: layers, {module, error, parameters} each in the model's order, and notes, where the two do not fit
    together and there are none.
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

    layout = lay_out(source, _variant(quantized), read_tensors(source), trust_remote_code)
    jobs = [job for job in layout.jobs if job.quantized]
    there = {
        name: found for file in weight_files(quantized) for name, found in read_header(quantized / file, file).items()
    }
    for name in (name for job in jobs for name in job.parts.values()):
        if name not in there or (
            there[name].shape != tuple(layout.outputs[name].shape) and ".quant_state." not in name
        ):
            raise TameError(f"{quantized}: {name} is not as in a checkpoint made from {source}")
    with ExitStack() as stack:
        paths = {source / job.source.file for job in jobs} | {quantized / found.file for found in there.values()}
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}

        def error_of(job: "Job") -> float:
            weight = opened[source / job.source.file].get_tensor(job.source.name)
            parts = {key: opened[quantized / there[name].file].get_tensor(name) for key, name in job.parts.items()}
            return _error(weight.T if job.transposed else weight, parts, device)

        # A weight each: on a CPU, torch's own threads would wait for each other after every piece.
        workers = cores() if device == "cpu" else 1
        errors = []
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for error in pool.map(error_of, jobs):
                errors.append(error)
                progress("layers", len(errors), len(jobs))
    return [
        {"module": job.parts[""].removesuffix(".weight"), "error": error, "parameters": math.prod(job.shape)}
        for job, error in zip(jobs, errors, strict=True)
    ]


def _error(weight: "torch.Tensor", parts: "dict[str, torch.Tensor]", device: str) -> float:
    """|W − Ŵ| / |W| of a weight [out, in], in float32, summed over pieces of whole rows or of whole blocks of a scale."""
    import torch

    width = weight.shape[1]
    restored = _eight_bits(parts, width, device) if "SCB" in parts else _four_bits(parts, device)
    size = PIECE[device.partition(":")[0]]
    size = max(size // width, 1) * width if "SCB" in parts else size
    flat = weight.reshape(-1)
    lost = kept = 0.0
    for start in range(0, flat.numel(), size):
        original = flat[start : start + size].to(device).float()
        difference = restored(start, original.numel()).sub_(original)
        lost += float(torch.dot(difference, difference))
        kept += float(torch.dot(original, original))
    return math.sqrt(lost / kept) if kept else 0.0


def _four_bits(parts: "dict[str, torch.Tensor]", device: str) -> "Callable[[int, int], torch.Tensor]":
    """A function from (start, count) to that many of the weights that nf4 or fp4 codes stand for, float32 [count]."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = QuantState.from_dict({suffix: part for suffix, part in parts.items() if suffix}, torch.device(device))
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = parts[""].reshape(-1)

    def restored(start: int, count: int) -> "torch.Tensor":
        block = state.blocksize
        shape = (count // block, block) if count % block == 0 else (count,)
        piece = QuantState(
            scales[start // block : -(-(start + count) // block)],
            shape=torch.Size(shape),
            blocksize=block,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        packed = codes[start // 2 : (start + count + 1) // 2].to(device)
        weights: torch.Tensor = dequantize_4bit(packed.view(-1, 1), piece)
        return weights.reshape(-1)

    return restored


def _eight_bits(parts: "dict[str, torch.Tensor]", width: int, device: str) -> "Callable[[int, int], torch.Tensor]":
    """The same for int8, in whole rows of `width`: a code is a 127th of its row's scale."""
    codes = parts[""].reshape(-1)
    scales = (parts["SCB"].to(device) / 127).view(-1, 1)

    def restored(start: int, count: int) -> "torch.Tensor":
        rows = codes[start : start + count].to(device).float().view(-1, width)
        return rows.mul_(scales[start // width : (start + count) // width]).view(-1)

    return restored


def _variant(folder: Path) -> Variant:
    """The variant that a checkpoint's config.json describes."""
    config = _quantization(folder)
    skip = list(config.get("llm_int8_skip_modules") or [])
    if config.get("load_in_8bit"):
        return Variant(method="int8", skip_modules=skip)
    return Variant(
        method=config.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(config.get("bnb_4bit_use_double_quant")),
        skip_modules=skip,
    )


def _quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}

"""Which queue of the work pool a release is sent to: by the memory that it needs on a device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import BadInputError
from configs.schema import Evaluate
from tasks.runtime.device import Gpu

if TYPE_CHECKING:
    from tasks.values import Found

POOL = "tame"
SIZES = (8, 16, 24, 40, 48, 80, 141)
"""GB of the GPUs that people have; each size has a queue."""
DEFAULT, CONTROL, CPU = "default", "control", "cpu"
"""Any worker; flows that only wait; workers without a GPU."""
QUEUES = (DEFAULT, CONTROL, CPU, *(f"gpu-{size}gb" for size in SIZES))
UNSERVED = "Paused until a worker serves it."
"""The description of a queue that no worker of this server has served yet: Prefect would show it as a fault."""
USABLE = 0.9
"""Of the GB in a GPU's name, what every such GPU has for a release: drivers and error correction take up to 8 %."""

CONTEXT_BYTES = 0.6e9  # what CUDA and its libraries take before the first tensor
LOGITS_BYTES = 1.3e9  # in float32, as tasks/evaluate/scoring.py bounds them


def queues_of(gpu_memory: int | None) -> list[str]:
    """The queues that a worker serves whose GPU has `gpu_memory` bytes, or, with None, that has no GPU."""
    if gpu_memory is None:
        return [DEFAULT, CPU]
    return [DEFAULT, *(f"gpu-{size}gb" for size in SIZES if gpu_memory >= USABLE * size * 1e9)]


def smallest(memory: int) -> str | None:
    """The queue of the smallest GPUs that have `memory` bytes, if there is one."""
    return next((f"gpu-{size}gb" for size in SIZES if memory <= USABLE * size * 1e9), None)


def queue_for(memory: int) -> str:
    """The queue of the smallest GPUs that have `memory` bytes.

    Raises:
        BadInputError: no queue's GPUs have that much memory.
    """
    queue = smallest(memory)
    if queue is None:
        raise BadInputError(
            f"it needs about {memory / 1e9:.0f} GB on one GPU, and the largest queue is gpu-{SIZES[-1]}gb; `tame run` on a "
            "machine with several GPUs spreads a model over all of them"
        )
    return queue


def check_fits(found: "Found", spec: Evaluate | None, gpus: Sequence[Gpu]) -> None:
    """Check that a release fits on the GPUs that there are, if there are any, with the smallest batch.

    Raises:
        BadInputError: the release does not fit; the message names the queue where it would.
    """
    available, needed = sum(gpu.memory_bytes for gpu in gpus), memory_needed(found, spec, batch_size=1)
    if gpus and needed > available:
        queue = smallest(needed)
        where = f"send it to the queue {queue}" if queue else "no queue has GPUs that large"
        raise BadInputError(
            f"source.model {found.name}: it needs about {needed / 1e9:.1f} GB, and {gpus[0].name} has {available / 1e9:.1f} GB; "
            f"{where}, or hide the GPU (CUDA_VISIBLE_DEVICES=) to work on the CPU"
        )


def memory_needed(found: "Found", spec: Evaluate | None, batch_size: int | None = None) -> int:
    """Bytes on a device that releasing `found` takes at `batch_size`, by default the recipe's.

    The most is taken while the baseline, or a variant dequantized to its dtype, is evaluated: all its weights, the
    activations of a batch of windows at the widest place of a layer, and the logits of two models for some positions.
    For Qwen3-1.7B at 8 windows of 2,048 that is 6.2 GB, where 4.9 GB of tensors were seen on an H100
    (benchmarks/RESULTS.md). Where nothing is measured (`spec` is None), it is a few tensors, of which one is quantized at a time.
    """
    config: dict[str, Any] = found.config.get("text_config") or found.config
    weights = sum(size for name, size in found.files.items() if name.endswith(".safetensors"))
    weights += sum(5 * size for name, size in found.files.items() if name.endswith(".gguf"))  # dequantized to 16 bits
    item = 4 if "32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
    width = _number(config, "hidden_size", "n_embd", "d_model")
    if spec is None:
        return int(CONTEXT_BYTES + 4 * item * width * max(_number(config, "vocab_size"), 4 * width))
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * width
    rows = min(spec.window, LOGITS_BYTES / 4 / max(1, _number(config, "vocab_size")))
    logits = 2 * item * rows * _number(config, "vocab_size")
    activations = (batch_size or spec.batch_size) * spec.window * (4 * width + 3 * inner) * item
    return int(weights + activations + logits + CONTEXT_BYTES)


def _number(config: dict[str, Any], *names: str) -> int:
    """The first of `names` that is a number: architectures call the same thing differently."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)

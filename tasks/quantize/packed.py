"""A source that is quantized already, read as what its weights stand for: tensor by tensor, in bfloat16.

Its tensors are those of a method of tame's, so the method's own `restore` says what they are. To the engine each weight looks like
a tensor in bfloat16 that lies in the file of its codes; what is read of it is made when it is read.
"""

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import BadInputError
from tasks.download.checkpoint import Stored, quantization_of
from tasks.quantize.protocols import Method, Restored

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip
SCALES = ("weight_scale", "weight_scale_inv")
PARTS = ("weight", "weight_packed", "weight_shape", "weight_global_scale", *SCALES)


@dataclass(frozen=True)
class Packed:
    """One weight of such a source."""

    method: Method
    parts: dict[str, Stored]
    shape: tuple[int, int]

    def restored(self, folder: Path) -> Restored:
        """The weight, with its parts in memory."""
        return self.method.restore(
            {part: _read(folder, stored) for part, stored in self.parts.items()}, self.shape, "cpu"
        )


def unpacked(
    folder: Path, tensors: dict[str, Stored], method: Method | None
) -> tuple[dict[str, Stored], dict[str, Packed]]:
    """The tensors as they are in bfloat16, read by `method`; and what is packed of them, by the same names.

    A plain source stays as it is.

    Raises:
        BadInputError: a scheme that is none of tame's.
    """
    quantization = quantization_of(folder)
    if not quantization:
        return tensors, {}
    if method is None:
        raise BadInputError(
            f"{folder / 'config.json'}: quantization_config is a scheme of {quantization.get('quant_method')} that tame does not "
            "read (asymmetric, mixed, or of other blocks); give the original, in 16 or 32 bits"
        )
    plain, packed = dict(tensors), dict[str, Packed]()
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part not in SCALES:
            continue
        parts = {key: plain.pop(f"{module}.{key}") for key in PARTS if f"{module}.{key}" in plain}
        codes = parts.get("weight_packed") or parts.get("weight")
        if codes is None or f"{module}.weight_zero_point" in tensors:
            raise BadInputError(f"{folder}: {module} has {part} and no codes that tame reads; give the original")
        shape = _shape(folder, parts)
        packed[f"{module}.weight"] = Packed(method, parts, shape)
        plain[f"{module}.weight"] = Stored(f"{module}.weight", "BF16", shape, codes.file, 0, 2 * math.prod(shape))
    return {name: stored for name, stored in plain.items() if not name.endswith(".activation_scale")}, packed


def _shape(folder: Path, parts: dict[str, Stored]) -> tuple[int, int]:
    if (stored := parts.get("weight_shape")) is not None:
        rows, columns = (int(number) for number in _read(folder, stored))
        return rows, columns
    codes = parts.get("weight_packed") or parts["weight"]
    return codes.shape[0], codes.shape[1] * (2 if "weight_packed" in parts else 1)


def _read(folder: Path, stored: Stored) -> torch.Tensor:
    data = bytearray(stored.end - stored.start)
    with (folder / stored.file).open("rb") as file:
        os.preadv(file.fileno(), [data], stored.start)
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)


class Reader:
    """Reads bytes of packed weights as if they were stored in bfloat16; a thread keeps the one that it read last."""

    def __init__(self, folder: Path, packed: dict[str, Packed]) -> None:
        self.folder, self.packed, self.local = folder, packed, threading.local()

    def read(self, name: str, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a weight in bfloat16."""
        if getattr(self.local, "name", None) != name:
            self.local.name, self.local.restored = name, self.packed[name].restored(self.folder)
        restored: Restored = self.local.restored
        first, count, multiple = start // 2, len(data) // 2, restored.multiple
        before = first // multiple * multiple
        after = min(-(-(first + count) // multiple) * multiple, math.prod(self.packed[name].shape))
        weights = restored.piece(before, after - before)[first - before :][:count].to(torch.bfloat16)
        data[:] = weights.contiguous().view(torch.uint8).numpy().data

"""A source that is quantized already, read as what its weights stand for: tensor by tensor, in bfloat16.

Its tensors are those of a method of tame's, so the method's own `restore` says what they are. To the engine each weight looks like
a tensor in bfloat16 that lies in the file of its codes; what is read of it is made when it is read.
"""

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import BadInputError, TameError
from tasks.download.checkpoint import Stored, quantization_of, unread
from tasks.quantize.protocols import Restored, SourceReader

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip
SCALES = ("weight_scale", "weight_scale_inv")
PARTS = ("weight", "weight_packed", "weight_shape", "weight_global_scale", *SCALES)
BLOCKS, FUSED_SCALES = "_blocks", "_scales"
"""How the names of the parts of fused experts end: U8 [experts, out, in/32, 16] and [experts, out, in/32]."""
Fill = Callable[[str, int, memoryview], None]
"""Fills the memory with bytes of a file, from that byte on."""


@dataclass(frozen=True)
class Packed:
    """One weight of such a source, or the experts that are fused into one."""

    method: SourceReader
    parts: dict[str, Stored]
    shape: tuple[int, ...]
    """[out, in]; [experts, in, out] where experts are fused."""

    def restored(self, fill: Fill) -> Restored:
        """The weight, with its parts in memory; of fused experts, with those of one."""
        if len(self.shape) == 3:
            return self._fused(fill)
        parts = {part: _read(fill, stored) for part, stored in self.parts.items()}
        return self.method.restore(parts, (self.shape[0], self.shape[1]), "cpu")

    def _fused(self, fill: Fill) -> Restored:
        """Expert by expert: the last one is kept, as pieces of it are asked for one after the other."""
        experts, size = self.shape[0], self.shape[1] * self.shape[2]
        kept: dict[int, Restored] = {}

        def piece(start: int, count: int) -> torch.Tensor:
            number = start // size
            if number not in kept:
                kept.clear()
                parts = {part: _read(fill, _of_expert(stored, number, experts)) for part, stored in self.parts.items()}
                kept[number] = self.method.restore(parts, (self.shape[1], self.shape[2]), "cpu")
            inside = min(count, (number + 1) * size - start)
            found = kept[number].piece(start - number * size, inside)
            return found if inside == count else torch.cat([found, piece(start + inside, count - inside)])

        return Restored(piece, multiple=1)


def _of_expert(stored: Stored, number: int, experts: int) -> Stored:
    size = (stored.end - stored.start) // experts
    return stored._replace(
        shape=stored.shape[1:], start=stored.start + number * size, end=stored.start + (number + 1) * size
    )


def unpacked(
    folder: Path, tensors: dict[str, Stored], method: SourceReader | None, fill: Fill | None = None
) -> tuple[dict[str, Stored], dict[str, Packed]]:
    """The tensors as they are in bfloat16, read by `method`; and what is packed of them, by the same names.

    A plain source stays as it is. `folder` needs a config.json alone, if `fill` gives the bytes of its files.

    Raises:
        BadInputError: a scheme that is none of tame's.
    """
    quantization = quantization_of(folder)
    if not quantization:
        return tensors, {}
    if method is None:
        raise unread(quantization, folder / "config.json")
    fill = fill or from_folder(folder)
    plain, packed = dict(tensors), dict[str, Packed]()
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        fused = name.removesuffix(BLOCKS)
        if stored.dtype == "U8" and part.endswith(BLOCKS) and f"{fused}{FUSED_SCALES}" in tensors:
            weight, codes = fused, plain.pop(name)
            parts = {"blocks": codes, "scales": plain.pop(f"{fused}{FUSED_SCALES}")}
            shape = _fused_shape(folder, fused, parts)
        elif part in SCALES:
            parts = {key: plain.pop(f"{module}.{key}") for key in PARTS if f"{module}.{key}" in plain}
            found = parts.get("weight_packed") or parts.get("weight")
            if found is None or f"{module}.weight_zero_point" in tensors:
                raise BadInputError(f"{folder}: {module} has {part} and no codes that tame reads; give the original")
            weight, codes, shape = f"{module}.weight", found, _shape(fill, parts)
        else:
            continue
        packed[weight] = Packed(method, parts, shape)
        plain[weight] = Stored(weight, "BF16", shape, codes.file, 0, 2 * math.prod(shape))
    return {name: stored for name, stored in plain.items() if not name.endswith(".activation_scale")}, packed


def _shape(fill: Fill, parts: dict[str, Stored]) -> tuple[int, ...]:
    if (stored := parts.get("weight_shape")) is not None:
        rows, columns = (int(number) for number in _read(fill, stored))
        return rows, columns
    codes = parts.get("weight_packed") or parts["weight"]
    return codes.shape[0], codes.shape[1] * (2 if "weight_packed" in parts else 1)


def _fused_shape(folder: Path, name: str, parts: dict[str, Stored]) -> tuple[int, ...]:
    blocks, scales = parts["blocks"].shape, parts["scales"].shape
    if len(blocks) != 4 or blocks[:-1] != scales:
        raise BadInputError(
            f"{folder}: {name} has blocks {list(blocks)} and scales {list(scales)}; expected [experts, out, blocks, bytes] and a "
            "scale for each block; download the model again"
        )
    return blocks[0], 2 * blocks[2] * blocks[3], blocks[1]


def from_folder(folder: Path) -> Fill:
    """Reads the files of a folder."""

    def fill(name: str, start: int, data: memoryview) -> None:
        with (folder / name).open("rb") as file:
            count = os.preadv(file.fileno(), [data], start)
        if count != len(data):
            raise TameError(f"{folder / name}: ends at byte {start + count}; it changed while it was read, run again")

    return fill


def _read(fill: Fill, stored: Stored) -> torch.Tensor:
    data = bytearray(stored.end - stored.start)
    fill(stored.file, stored.start, memoryview(data))
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)


class Reader:
    """Reads bytes of packed weights as if they were stored in bfloat16; a thread keeps the one that it read last."""

    def __init__(self, fill: Fill, packed: dict[str, Packed]) -> None:
        self.fill, self.packed, self.local = fill, packed, threading.local()

    def read(self, name: str, start: int, data: memoryview) -> None:
        """Fill `data` from byte `start` of a weight in bfloat16."""
        if getattr(self.local, "name", None) != name:
            self.local.name, self.local.restored = name, self.packed[name].restored(self.fill)
        restored: Restored = self.local.restored
        first, count, multiple = start // 2, len(data) // 2, restored.multiple
        before = first // multiple * multiple
        after = min(-(-(first + count) // multiple) * multiple, math.prod(self.packed[name].shape))
        weights = restored.piece(before, after - before)[first - before :][:count].to(torch.bfloat16)
        data[:] = weights.contiguous().view(torch.uint8).numpy().data

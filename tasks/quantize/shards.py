"""Writes safetensors files. The place of every tensor is fixed before the first byte, so that they can be written in any order.

Laid out as the `safetensors` library does: tensors by dtype, widest alignment first, then by name; the header is compact
JSON, padded with spaces to a multiple of 8 bytes.
"""

import json
import os
from pathlib import Path

import torch

from tasks.download.checkpoint import INDEX, WEIGHTS

NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ORDER = list(NAMES)  # safetensors' enum of dtypes, backwards
SLACK = 32  # bytes of header for a tensor whose length is not known yet
SMALL, MANY = 256 * 10**6, 32  # a file is hashed, uploaded, and kept after a kill, as a whole: several are quicker


class Shard:
    """One output file, open for writing. Tensors named in `growing` are of unknown length: they come last, written whole.

    `tensors` are meta tensors by name.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor], growing: set[str]) -> None:
        self.path = path
        names = sorted(tensors, key=lambda name: (name in growing, ORDER.index(tensors[name].dtype), name.encode()))
        self.tensors = {name: tensors[name] for name in names}
        self.late: dict[str, bytes | None] = {name: None for name in names if name in growing}
        self.data = len(self._header()) + -(-SLACK * len(self.late) // 8) * 8
        self.at: dict[str, int] = {}
        self.end = self.data
        for name, tensor in self.tensors.items():
            if name not in self.late:
                self.at[name] = self.end
                self.end += tensor.nbytes
        self.file = -1

    def open(self) -> None:
        """Create the file, or take the one that a killed run left, and claim its space.

        Raises:
            OSError: no space left.
        """
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file, 0, self.end)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor, `start` bytes from its beginning."""
        if name in self.late:
            self.late[name] = bytes(data)
            return
        at = self.at[name] + start
        while data:
            written = os.pwrite(self.file, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Write the header and what had to wait for it. The file is complete after this."""
        tail = self.tail()
        os.pwrite(self.file, self.header(), 0)
        os.pwrite(self.file, tail, self.end)
        os.ftruncate(self.file, self.end + len(tail))
        self.abandon()

    def header(self) -> bytes:
        """The file's first bytes, up to `data`; final once all `late` tensors are known."""
        return (self.data - 8).to_bytes(8, "little") + self._header()[8:].ljust(self.data - 8)

    def tail(self) -> bytes:
        """The file's last bytes, from `end`: tensors that had to wait until their length was known."""
        return b"".join(late or b"" for late in self.late.values())

    def abandon(self) -> None:
        """Let go of the file if it is still open."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self.tensors.items():
            late = self.late.get(name)
            size, shape = (tensor.nbytes, list(tensor.shape)) if late is None else (len(late), [len(late)])
            entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def shards(
    folder: Path, tensors: dict[str, torch.Tensor], limit: int | None, growing: set[str], weight_of: dict[str, str]
) -> list[Shard]:
    """Split the tensors over files of at most `limit` bytes, in the order they have, as `save_pretrained` does.

    Unlike there, the parts of one weight, which `weight_of` names, always share a file, even if it is larger for that: a
    loader that reads file after file cannot make the weight of some of its parts (transformers 4.53 to 4.55 give up).

    Without a limit: files of 256 MB, or larger ones where that would be more than 32.
    """
    if limit is None:
        limit = max(SMALL, sum(tensor.nbytes for tensor in tensors.values()) // MANY)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        weights.setdefault(weight_of.get(name, name), {})[name] = tensor
    groups: list[dict[str, torch.Tensor]] = []
    current: dict[str, torch.Tensor] = {}
    size = 0
    for parts in weights.values():
        more = sum(tensor.nbytes for tensor in parts.values())
        if more > limit:
            groups.append(parts)
            continue
        if size + more > limit:
            groups.append(current)
            current, size = {}, 0
        current |= parts
        size += more
    if current:
        groups.append(current)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [WEIGHTS]
    return [Shard(folder / name, group, growing & group.keys()) for name, group in zip(names, groups, strict=True)]


def write_index(folder: Path, files: list[Shard], parameters: int) -> None:
    """model.safetensors.index.json, for more than one file."""
    if len(files) == 1:
        return
    total = sum(len(late or b"") for shard in files for late in shard.late.values())
    total += sum(shard.end - shard.data for shard in files)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": {name: shard.path.name for shard in files for name in shard.tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""A .gguf as a source: its header, read without numpy or torch, and what is refused from that alone.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): `GGUF`, a version, the counts of tensors and of
metadata; the metadata, each a key, a type and a value; for each tensor a name, dimensions, a type and an offset; then, aligned,
the tensors' data. What makes a checkpoint of it is in gguf_convert.py.
"""

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import BadInputError, TameError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counted in 32 bits and is of some weeks of 2023
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


class GgufTensor(NamedTuple):
    """A tensor of a .gguf: bytes `start` to `end` of `file`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    """As torch and numpy have it, the last dimension contiguous; the file has it the other way round."""
    kind: int
    """ggml's number of its type."""
    start: int
    end: int


class GgufHeader(NamedTuple):
    """What a .gguf says before its data. Arrays of strings, which are vocabularies, are kept as their length."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    entries: dict[str, tuple[int, int]]
    """Where each entry of the metadata, its key included, begins and ends."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it: llama, qwen2, …"""
        return str(self.metadata["general.architecture"])

    def setting(self, name: str) -> Any:
        """The metadata `name` of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{name}")


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of the .gguf at `path`, and check that its tensors lie in the file, apart from each other.

    Raises:
        BadInputError: not a .gguf, or of a version or byte order that is not read.
        TameError: the file is damaged; the message says where.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        magic = file.read(4)
        if magic != MAGIC:
            raise BadInputError(f"source.model {path}: starts with {magic!r}, not {MAGIC!r}; download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Parser(path, data, size).header()
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, ValueError) as error:
                raise TameError(f"{path}: its header is damaged ({error}); download it again") from None


def check_gguf(header: GgufHeader) -> None:
    """Check what the header alone can tell: that it is a whole language model, with a tokenizer.

    Raises:
        BadInputError: an adapter or another part of a model, or an architecture that transformers does not read.
        TameError: tensors that every model has are missing.
    """
    where = f"source.model {header.path}"
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isprintable():
        raise TameError(f"{where}: it has no general.architecture, so it is no model or damaged; download it again")
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise BadInputError(f"{where}: its general.type is {kind!r}; give the .gguf of a whole model")
    for key in ("pooling_type", "attention.causal"):
        if (value := header.setting(key)) is not None and value != {"attention.causal": True}.get(key, 0):
            raise BadInputError(
                f"{where}: {header.architecture}.{key} is {value!r}, so it makes embeddings, not text; give a language model"
            )
    if not header.metadata.get("tokenizer.ggml.tokens"):
        raise BadInputError(f"{where}: it has no tokenizer (tokenizer.ggml.tokens); give one that has")
    names = header.tensors.keys()
    if "token_embd.weight" not in names:
        raise TameError(f"{where}: it has no token_embd.weight, which every language model has; download it again")
    blocks = header.setting("block_count")
    if not isinstance(blocks, int) or blocks < 1:
        raise TameError(f"{where}: its {header.architecture}.block_count is {blocks!r}; download it again")
    have = {match[1] for name in names if (match := re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.", name))}
    if lacking := [number for number in map(str, range(min(blocks, len(names) + 1))) if number not in have]:
        raise TameError(
            f"{where}: it has no tensor of block {lacking[0]} of {blocks} ({header.architecture}.block_count); download it again"
        )


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4

    def header(self) -> GgufHeader:
        version = self.number("<I")
        if version not in VERSIONS:
            order = ", in big-endian order" if version >= 1 << 16 else ""
            raise BadInputError(
                f"source.model {self.path}: GGUF version {version}{order}; expected {VERSIONS[0]} or {VERSIONS[1]}"
            )
        tensor_count, entry_count = self.count(24), self.count(13)
        metadata: dict[str, Any] = {}
        entries = {}
        for _ in range(entry_count):
            start, key = self.at, self.name()
            if key in metadata:
                raise ValueError(f"the key {key!r} comes twice")
            metadata[key] = self.value(self.number("<I"))
            entries[key] = (start, self.at)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment {alignment!r}")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self.name()
            if name in found:
                raise ValueError(f"the tensor {name!r} comes twice")
            if (dimensions := self.number("<I")) > MAX_DIMENSIONS:
                raise ValueError(f"{name!r} has {dimensions} dimensions")
            shape = tuple(self.number("<Q") for _ in range(dimensions))
            found[name] = (shape[::-1], self.number("<I"), self.number("<Q"))
        begin = -(-self.at // alignment) * alignment
        return GgufHeader(self.path, metadata, self.tensors(found, begin, alignment), entries)

    def tensors(
        self, found: dict[str, tuple[tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            if kind not in sizes:
                raise ValueError(f"{name!r} has the type {kind}, which ggml does not know")
            block, nbytes = sizes[kind]
            if (shape[-1] if shape else 1) % block or 0 in shape:
                raise ValueError(f"{name!r} has the shape {list(shape)}, and its type blocks of {block}")
            if offset % alignment:
                raise ValueError(f"{name!r} begins at {offset}, no multiple of {alignment}")
            start = begin + offset
            tensors[name] = GgufTensor(self.path, name, shape, kind, start, start + math.prod(shape) // block * nbytes)
        before = begin
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < before:
                raise ValueError(f"{tensor.name!r} overlaps the tensor before it")
            before = tensor.end
        if before > self.size:
            raise ValueError(f"its tensors need {before} bytes, the file has {self.size}; truncated?")
        return tensors

    def number(self, kind: str) -> Any:
        value = struct.unpack_from(kind, self.data, self.at)[0]
        self.at += struct.calcsize(kind)
        return value

    def count(self, least: int) -> int:
        """A count of things that take `least` bytes each, so that a damaged one asks for no memory."""
        value = int(self.number("<Q"))
        if value * least > self.size - self.at:
            raise ValueError(f"{value} entries at byte {self.at - 8}, but the file has {self.size} bytes")
        return value

    def string(self) -> str:
        length = self.count(1)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def name(self) -> str:
        name = self.string()
        if not name.isprintable():
            raise ValueError(f"the name {name!r}")
        return name

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        of = self.number("<I")
        if of == STRING:
            length = self.count(8)
            for _ in range(length):
                size = self.count(1)
                self.at += size
            return length
        if of not in SCALARS:
            raise ValueError(f"an array of type {of} at byte {self.at}")
        width = struct.calcsize(SCALARS[of])
        length = self.count(width)
        values = list(struct.unpack_from(f"<{length}{SCALARS[of][1]}", self.data, self.at))
        self.at += length * width
        return values

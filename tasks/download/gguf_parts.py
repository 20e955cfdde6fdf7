"""A model in several .gguf files, as llama.cpp's `llama-gguf-split` writes them: NAME-00001-of-00003.gguf and so on.

The first has all metadata, each has some of the tensors. transformers reads one file and would make up what lies in the others,
so they are joined before it reads.
"""

import re
import struct
from pathlib import Path
from typing import IO

from configs.errors import TameError
from tasks.download.gguf import MAGIC, VERSIONS, GgufHeader, GgufTensor, read_gguf

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
ALIGNMENT = 32  # of what is written here
PIECE = 1 << 24  # bytes copied at a time


def part_paths(path: Path) -> list[Path]:
    """The files of the model that `path` belongs to, in their order: itself alone, unless its name says that it is a part."""
    if (match := PART.fullmatch(path.name)) is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def model_name(path: Path) -> str:
    """What a .gguf is called, without the number of its part."""
    match = PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


def read_parts(path: Path) -> list[GgufHeader]:
    """The headers of all files of the model that `path` belongs to.

    Raises:
        BadInputError, TameError: as `read_gguf`; a part is missing, or belongs to something else.
    """
    header = read_gguf(path)
    count = header.metadata.get("split.count", 0)
    paths = part_paths(path)
    if count != len(paths) and (count or len(paths)) > 1:
        raise TameError(
            f"{path}: its split.count says {count} parts, its name {len(paths)}; give all of them under the names that "
            "llama-gguf-split gave them (NAME-00001-of-00003.gguf)"
        )
    if absent := [part for part in paths if not part.is_file()]:
        raise TameError(f"{path}: {absent[0].name} is missing, one of its {len(paths)} parts; put it beside the others")
    if len(paths) < 2:
        return [header]
    parts = [read_gguf(part) for part in paths]
    names: set[str] = set()
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise TameError(f"{part.path}: it does not say that it is part {number + 1} of {count}; download it again")
        if twice := names & part.tensors.keys():
            raise TameError(f"{part.path}: {min(twice)} is in a part before it, too; download the model again")
        names |= part.tensors.keys()
    if (total := parts[0].metadata.get("split.tensors.count")) != len(names):
        raise TameError(
            f"{path}: its parts hold {len(names)} tensors, split.tensors.count says {total}; download it again"
        )
    return parts


def as_one(parts: list[GgufHeader]) -> GgufHeader:
    """The first header, with the tensors of all."""
    return parts[0]._replace(tensors={name: tensor for part in parts for name, tensor in part.tensors.items()})


def join(parts: list[GgufHeader], path: Path) -> None:
    """Write the model in `parts` as one .gguf to `path`, byte for byte but for the numbers of the parts."""
    entries = [span for key, span in parts[0].entries.items() if not key.startswith(("split.", "general.alignment"))]
    tensors = list(as_one(parts).tensors.values())
    with path.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries)))
        with parts[0].path.open("rb") as first:
            for start, end in entries:
                first.seek(start)
                out.write(first.read(end - start))
        offset = 0
        for tensor in tensors:
            name = tensor.name.encode()
            out.write(struct.pack("<Q", len(name)) + name)
            out.write(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1]))
            out.write(struct.pack("<IQ", tensor.kind, offset))
            offset += _aligned(tensor.end - tensor.start)
        begin = _aligned(out.tell())
        for tensor in tensors:
            out.write(bytes(_aligned(out.tell()) - out.tell()))
            _copy(tensor, out)
        out.write(bytes(begin + offset - out.tell()))


def _copy(tensor: GgufTensor, out: IO[bytes]) -> None:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for at in range(tensor.start, tensor.end, PIECE):
            out.write(file.read(min(PIECE, tensor.end - at)))


def _aligned(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT

"""A .gguf as a source: looked at by its header, dequantized to bf16 safetensors once, in the artifact store."""

import logging
import math
from pathlib import Path
from typing import Any

from configs.schema import Source
from tasks.download.gguf import GgufHeader, check_gguf
from tasks.download.gguf_convert import dequantize
from tasks.download.gguf_parts import as_one, model_name, part_paths, read_parts
from tasks.runtime.child_process import isolated
from tasks.runtime.device import versions
from tasks.runtime.progress import Progress
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_file
from tasks.values import Found, Snapshot

log = logging.getLogger("tame.download")


def inspect_gguf(path: Path) -> Found:
    """What a .gguf, or all parts of one, hold.

    Raises:
        BadInputError, TameError: as `tasks.download.inspection.inspect_source`.
    """
    header = as_one(read_parts(path))
    check_gguf(header)
    return Found(
        kind="gguf",
        name=model_name(path),
        path=str(path),
        commit=None,
        files={part.name: part.stat().st_size for part in part_paths(path)},
        config={},
        counted=_counted(header),
    )


def _counted(header: GgufHeader) -> tuple[int, int, int]:
    """Parameters in all, in linear layers of blocks, and in experts, which are one tensor of three dimensions each."""
    sizes = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    blocks = {name for name in sizes if name.startswith("blk.") and name.endswith(".weight")}
    experts = {name for name in blocks if name.endswith("_exps.weight")}
    linear = {name for name in blocks - experts if len(header.tensors[name].shape) == 2 and "ffn_gate_inp" not in name}
    return sum(sizes.values()), sum(sizes[name] for name in linear), sum(sizes[name] for name in experts)


def dequantized(source: Source, gguf: Path, progress: Progress) -> Snapshot:
    """A .gguf as a checkpoint that transformers loads: from the store, or made now.

    Raises:
        BadInputError, TameError: as `tasks.download.gguf_convert.dequantize`; no space.
    """

    def make(folder: Path) -> on_disk.Made:
        parts = part_paths(gguf)
        copies = 5 if len(parts) == 1 else 6  # four bits become 16; and parts are joined
        on_disk.need_space(folder, copies * sum(part.stat().st_size for part in parts), f"dequantize {gguf.name}")
        notes = isolated(f"dequantize {gguf.name}", dequantize, gguf, folder, progress=progress)
        return on_disk.Made(meta={"gguf": gguf.name, "notes": notes})

    artifact, cached = store.build("dequantized", _inputs(gguf), make)
    for note in artifact.meta.get("notes", []):
        log.warning("%s", note)
    return Snapshot(
        path=artifact.path,
        model=source.model,
        name=model_name(gguf),
        revision=None,
        commit=None,
        files=artifact.files,
        digest=artifact.digest,
        cached=cached,
    )


def dequantized_before(gguf: Path) -> Path | None:
    """The folder that `dequantized` made of it before, if it did."""
    artifact = store.find("dequantized", _inputs(gguf))
    return Path(artifact.path) if artifact else None


def _inputs(gguf: Path) -> dict[str, Any]:
    library_versions = versions()
    return {
        "gguf": [sha256_file(part) for part in part_paths(gguf)],
        "stage": 2,  # what the file lacks is refused, and what transformers does not read of it is set or refused
        "versions": {
            name: library_versions.get(name) for name in ("torch", "transformers", "safetensors", "tokenizers")
        },
    }

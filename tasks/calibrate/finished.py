"""What a killed run has finished: the codes of each block, and now and then the hidden states behind one."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tasks.calibrate.layers import Codes

EVERY = 15.0  # seconds between two copies of the hidden states


class Finished:
    """A folder with a file for each block; it is emptied if it was made from something else than `identity`."""

    def __init__(self, folder: Path, identity: Any) -> None:
        self.folder = folder
        mark = folder / "identity"
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        with contextlib.suppress(OSError):
            if mark.read_text() != digest:
                shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        mark.write_text(digest)
        self.copied = time.monotonic()

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._block(index).is_file()

    def save(self, index: int, chosen: dict[str, Codes], plain: list[str]) -> None:
        """Keep the codes of a block, by the names of the weights; `plain` names those that were rounded plainly."""
        tensors, shapes = {}, {}
        for name, codes in chosen.items():
            tensors[f"{name}:codes"], tensors[f"{name}:scales"] = _packed(codes.codes.cpu()), codes.scales.cpu()
            shapes[name] = list(codes.codes.shape)
        with _replacing(self._block(index)) as path:
            save_file(tensors, path, metadata={"shapes": json.dumps(shapes), "plain": json.dumps(plain)})

    def load(self, index: int, device: torch.device) -> dict[str, Codes]:
        """The codes of a finished block."""
        with safe_open(self._block(index), framework="pt", device=str(device)) as file:
            return {name: _read(file, name, shape) for name, shape in _shapes(file).items()}

    def where(self) -> tuple[dict[str, Path], list[str]]:
        """The file in which the codes of each weight are, by the weight's name; and the weights that were rounded plainly."""
        found: dict[str, Path] = {}
        plain: list[str] = []
        for path in sorted(self.folder.glob("block-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(_shapes(file), path)
                plain += json.loads(file.metadata()["plain"])
        return found, plain

    def copy_streams(self, index: int, streams: dict[str, torch.Tensor]) -> None:
        """Keep the hidden states behind a block, if the last copy is old enough for it to be worth the time."""
        if time.monotonic() - self.copied < EVERY:
            return
        with _replacing(self.folder / "streams.safetensors") as path:
            save_file({name: states.cpu() for name, states in streams.items()}, path, metadata={"block": str(index)})
        self.copied = time.monotonic()

    def streams(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The newest copy, and behind which block it was made."""
        path = self.folder / "streams.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            index = int(file.metadata()["block"])
        return index, load_file(path)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def read_codes(path: Path, name: str) -> Codes:
    """The codes of one weight, on the host."""
    with safe_open(path, framework="pt") as file:
        return _read(file, name, _shapes(file)[name])


def _shapes(file: Any) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads(file.metadata()["shapes"])
    return shapes


def _read(file: Any, name: str, shape: list[int]) -> Codes:
    codes = _unpacked(file.get_tensor(f"{name}:codes"), shape[0] * shape[1])
    return Codes(codes.view(shape), file.get_tensor(f"{name}:scales"))


def _packed(codes: torch.Tensor) -> torch.Tensor:
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] << 4 | flat[1::2]


def _unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written."""
    new = path.with_name(f".{path.name}")
    yield new
    os.replace(new, path)  # noqa: PTH105

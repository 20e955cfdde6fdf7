"""The hidden states between two blocks, of the original model and of the one that is quantized so far."""

import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from tasks.calibrate.block_model import Arguments, BlockModel

ON_DEVICE = 5 * 10**9  # bytes of hidden states that may lie on a GPU
NAMES = ("original", "rounded")


class Streams:
    """Hidden states in bf16, [sequences, tokens, width] for each stream: on the GPU, on the host, or in a file, by their size.

    `ids` are tokens, Int64 [sequences, tokens], of which `at_once` sequences go through a block together. `folder` is where
    a file would lie.
    """

    def __init__(self, model: BlockModel, ids: torch.Tensor, at_once: int, folder: Path) -> None:
        self.pieces = [slice(start, start + at_once) for start in range(0, len(ids), at_once)]
        self.tokens = ids.numel()
        self.length = ids.shape[1]
        self.sequences = len(ids)
        self._arguments: list[list[Arguments]] = []
        self.states: dict[str, torch.Tensor] = {}
        for piece in range(len(self.pieces)):
            hidden, arguments = model.start(ids[self.pieces[piece]])
            for name in NAMES:
                if name not in self.states:
                    self.states[name] = _room((len(ids), *hidden.shape[1:]), model.device, folder)
                self.put(name, piece, hidden)
            same = piece and hidden.shape[0] == at_once and _equal(arguments, self._arguments[0])
            self._arguments.append(self._arguments[0] if same else arguments)

    def get(self, name: str, piece: int) -> torch.Tensor:
        """The hidden states of one piece of the sequences."""
        return self.states[name][self.pieces[piece]]

    def put(self, name: str, piece: int, states: torch.Tensor) -> None:
        """Replace them."""
        self.states[name][self.pieces[piece]] = states.to(self.states[name].device, torch.bfloat16)

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Replace all of them."""
        for name in NAMES:
            self.states[name].copy_(states[name])

    def arguments(self, piece: int, index: int) -> Arguments:
        """What a block is called with besides."""
        return self._arguments[piece][index]

    def tokens_of(self, piece: int) -> int:
        """How many tokens one piece has."""
        part = self.pieces[piece]
        return (min(part.stop, self.sequences) - part.start) * self.length


def _room(shape: tuple[int, ...], device: torch.device, folder: Path) -> torch.Tensor:
    """Room for the hidden states of one stream."""
    count = int(torch.Size(shape).numel())
    if device.type == "cuda" and 2 * count * len(NAMES) <= ON_DEVICE:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    if 2 * count * len(NAMES) <= psutil.virtual_memory().available / 2:
        return torch.empty(shape, dtype=torch.bfloat16)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".states-") as file:  # it has no name as soon as it is mapped
        return torch.from_file(file.name, shared=True, size=count, dtype=torch.bfloat16).view(shape)


def _equal(one: Any, other: Any) -> bool:
    """Whether two trees of arguments are the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    try:
        return bool(one == other)
    except Exception:  # whatever a model passes along
        return False

"""From a model and calibration sequences to codes and scales for its weights, block by block."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configs.errors import BadInputError
from tasks.calibrate.block_model import BlockModel
from tasks.calibrate.finished import Finished
from tasks.calibrate.grid import Grid
from tasks.calibrate.layers import Effort
from tasks.calibrate.streams import Streams
from tasks.calibrate.walk import Walk
from tasks.runtime.progress import Progress

log = logging.getLogger("tame.calibrate")

Level = Literal["fast", "true", "best"]
EFFORTS: dict[Level, Effort] = {
    "fast": Effort(damping=0.01, shrink=0.5, factors=tuple(0.6 + 0.05 * step for step in range(11))),
    "true": Effort(),
    "best": Effort(damping=0.01, shrink=0, rounds=8, tunings=4),
}
FAST_TOKENS = 8192  # the products of 64 columns need no more
AT_ONCE = 4096  # tokens that go through a block together
FAST_AT_ONCE = 1024  # the first of them go through it once more, to see which layers share an input


@dataclass(frozen=True)
class Asked:
    """What is to be calibrated, and on what."""

    source: Path
    """The folder of the model."""
    ids: torch.Tensor
    """Tokens, Int64 [sequences, tokens]."""
    grids: dict[str, Grid]
    """The weights that are quantized, as the model calls them, with the levels and groups that each has."""
    level: Level
    device: str
    work: Path
    """A folder for finished blocks: they stay until somebody removes it, and are taken up by the next run."""
    identity: Any
    """What a killed run must have had in common with this one for its blocks to be taken up."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Chosen:
    """Where codes and scales lie, for `finished.read_codes`, by the weights' names; and what to say of the whole."""

    where: dict[str, tuple[Path, str]]
    """The file, and the name in it."""
    notes: list[str]


def choose(asked: Asked, label: str, progress: Progress) -> Chosen:
    """Choose codes and scales for all weights that lie in the model's blocks.

    Raises:
        BadInputError: a model that is not run block by block, or none of whose weights lie in its blocks.
        TameError: NaN or infinite numbers, in the weights or in what layers are given; no memory.
    """
    model = BlockModel(
        asked.source, asked.device, torch.float32 if asked.device == "cpu" else None, asked.trust_remote_code
    )
    called = {name: model.experts.get(name, name) for name in asked.grids}
    outside = [name for name in asked.grids if not _within(model, called[name])]
    if len(outside) == len(asked.grids):
        raise BadInputError(
            f"{asked.source}: no quantized layer of {model.kind}, such as {outside[0]}, lies in its blocks {model.blocks_name}; "
            "leave calibrate out"
        )
    finished = Finished(asked.work, asked.identity)
    fast = asked.level == "fast"
    ids = _spread(asked.ids, FAST_TOKENS) if fast else asked.ids
    at_once = max(1, (FAST_AT_ONCE if fast else AT_ONCE) // ids.shape[1])
    streams = Streams(model, ids, at_once, asked.work)
    model.unload_rest()
    apart = set(outside)
    wanted = {called[name]: grid for name, grid in asked.grids.items() if name not in apart}
    walk = Walk(model, streams, wanted, EFFORTS[asked.level])
    behind, states = finished.streams() or (-1, None)
    if states is not None:
        streams.restore(states)
    count = len(model.blocks)
    for index in range(count):
        progress(f"calibrate {label}", index, count)
        if index <= behind and finished.has(index):
            continue
        with model.loaded(index) as module:
            if finished.has(index):
                walk.replay_original(index) if fast else walk.replay(index, module, finished.load(index, model.device))
                continue
            chosen = walk.search(index, module) if fast else walk.block(index, module)
            finished.save(index, chosen, walk.plain)
        finished.copy_streams(index, streams.states)
    progress(f"calibrate {label}", count, count)
    where, plain = finished.where()
    found = {name: (where[group], group) for name, group in called.items() if group in where}
    return Chosen(found, _notes(outside, plain, len(asked.grids)))


def _notes(outside: list[str], plain: list[str], count: int) -> list[str]:
    """A sentence on weights that could not be calibrated."""
    if not outside and not plain:
        return []
    lost = [*outside, *plain]
    why = (
        "lie outside the model's blocks"
        if outside
        else "were given no token by the calibration text (experts: fewer than a row has weights), or run more than once"
    )
    return [
        f"{len(lost)} of {count} quantized weights, such as {lost[0]}, {why}: they are rounded plainly, not calibrated."
    ]


def _within(model: BlockModel, name: str) -> bool:
    """Whether a weight is that of a linear layer in a block."""
    return name.startswith(f"{model.blocks_name}.") and name.removesuffix(".weight") in model.linear


def _spread(ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """So many of the sequences that they have `tokens` tokens, from all over the text."""
    count = max(1, tokens // ids.shape[1])
    return ids if count >= len(ids) else ids[torch.arange(count) * len(ids) // count]

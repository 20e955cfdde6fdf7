"""Many mixes of quantized and original weights, taken through a model together, block by block, and compared with the original.

Each mix is a stream of hidden states. One that is the original up to a block begins there, so that only what lies behind it
is computed; and each block is loaded once for all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tasks.calibrate.block_model import Arguments, BlockModel
from tasks.calibrate.groups import find_groups
from tasks.runtime.progress import Progress

AT_ONCE = 2048  # tokens that go through a block together
LIKELY = 4096  # tokens of the vocabulary that single groups are compared on
FAR = 10.0  # what logits may differ by for their exponentials to be precise in float32

Mix = dict[str, int]
"""The weights that are quantized, by the model's names, and at which of the levels. All others are the original's."""
Level = Callable[[str], torch.Tensor]
"""A way of quantizing: from a weight's name to what it becomes, F32 [out, in] on the device."""


@dataclass(frozen=True)
class Group:
    """Weights that runtimes compute as one, or that are of one block's experts: they are quantized together or not at all."""

    block: int
    weights: tuple[str, ...]


@dataclass
class Divergence:
    """How a mix differs from the original on each window of the text: means over its tokens, F64 [windows]."""

    kl: torch.Tensor
    """KL divergence, nats a token."""
    loss: torch.Tensor
    """How much larger the loss of the next token is, nats."""
    agreement: torch.Tensor
    """Share of the tokens for which the most likely next token is the same."""


@dataclass
class _Stream:
    """A mix on its way: its hidden states, F32 [windows, tokens, width], one tensor for each piece of the text."""

    mix: Mix
    states: list[torch.Tensor] = field(default_factory=list)
    """Empty as long as it is the original."""

    def without(self, group: Group) -> "_Stream":
        """One that parts from this one before the group's block, and has the original's weights there."""
        mix = {name: level for name, level in self.mix.items() if name not in group.weights}
        return _Stream(mix, list(self.states))


class Walk:
    """`ids` are the text's tokens, Int64 [windows, tokens]; `quantized` names the weights that may be."""

    def __init__(
        self,
        folder: Path,
        ids: torch.Tensor,
        quantized: set[str],
        levels: Sequence[Level],
        device: str,
        trust: bool = False,
    ) -> None:
        """Raises BadInputError: as `BlockModel`."""
        self.model = BlockModel(folder, device, torch.float32, trust, head=True)
        self.levels, self.ids = levels, ids
        several = max(1, AT_ONCE // ids.shape[1])
        self.pieces = list(torch.split(ids, several))
        # What the model calls a weight, by what the checkpoint does, where experts are taken apart.
        self.called = {self.model.experts.get(name, name): name for name in quantized}
        self.final: list[torch.Tensor] = []
        """The original's states behind the last block, once they are known."""

    def each_alone(self, progress: Progress, what: str) -> list[tuple[Group, int, Divergence]]:
        """The divergence of every group quantized alone, at each level."""
        return self._run([], True, progress, what)

    def without(self, progress: Progress, what: str) -> list[tuple[Group, int, Divergence]]:
        """The divergence of everything quantized, at the first level; and of that with each group's original weights."""
        return self._run([dict.fromkeys(self.called.values(), 0)], True, progress, what)

    def measure(self, mixes: list[Mix], progress: Progress, what: str) -> list[Divergence]:
        """The divergence of each mix."""
        return [found for _, _, found in self._run(mixes, False, progress, what)]

    def _run(self, mixes: list[Mix], alone: bool, progress: Progress, what: str) -> list[tuple[Group, int, Divergence]]:
        streams = [_Stream(mix) for mix in mixes]
        of = [(Group(-1, ()), -1)] * len(streams)
        original, arguments = self._start()
        known = bool(self.final)
        for stream in streams if known else []:
            stream.states = list(original)
        count = len(self.model.blocks)
        for index in range(count):
            progress(what, index * index if alone else index, count * count + count if alone else count + 1)
            with self.model.loaded(index) as module:
                weights = self._weights(index, module)
                if alone:
                    for group in self._groups(index, module, list(weights), original[0], arguments[0][index]):
                        for level in range(1 if mixes else len(self.levels)):
                            streams.append(
                                streams[0].without(group) if mixes else _Stream(dict.fromkeys(group.weights, level))
                            )
                            of.append((group, level))
                self._through(index, module, weights, streams, original, arguments)
                if not known:
                    original = [self._block(index, given, arguments[i][index]) for i, given in enumerate(original)]
        self.final = self.final or original
        found = self._compare(self.final, streams, whole=not alone)
        progress(what, 1, 1)
        return [(group, level, one) for (group, level), one in zip(of, found, strict=True)]

    def _start(self) -> tuple[list[torch.Tensor], list[list[Arguments]]]:
        started = [self.model.start(piece) for piece in self.pieces]
        return [hidden for hidden, _ in started], [arguments for _, arguments in started]

    def _block(self, index: int, given: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        with torch.no_grad():
            return self.model.run(index, given, arguments)

    def _weights(self, index: int, module: nn.Module) -> dict[str, torch.Tensor]:
        """The block's original weights that may be quantized, by their layers' names in the block."""
        prefix = f"{self.model.block_name(index)}."
        inside = [name.removeprefix(prefix).removesuffix(".weight") for name in self.called if name.startswith(prefix)]
        there = set(inside)
        return {
            name: module.get_parameter(f"{name}.weight").data for name, _ in module.named_modules() if name in there
        }

    def _name(self, index: int, layer: str) -> str:
        return self.called[f"{self.model.block_name(index)}.{layer}.weight"]

    def _groups(
        self, index: int, module: nn.Module, layers: list[str], given: torch.Tensor, arguments: Arguments
    ) -> list[Group]:
        """The block's groups: layers that are given the same input; all experts together."""
        prefix = self.model.block_name(index)
        experts = [name for name in layers if f"{prefix}.{name}" in self.model.of_experts]
        others = [name for name in layers if name not in set(experts)]
        found, several = find_groups(module, others, lambda: self._block(index, given, arguments))
        sets = [group.layers for group in found if not set(group.layers) & set(several)]
        sets += [(name,) for name in several]
        sets += [tuple(experts)] if experts else []
        return [Group(index, tuple(self._name(index, layer) for layer in layers)) for layers in sets]

    def _through(
        self,
        index: int,
        module: nn.Module,
        weights: dict[str, torch.Tensor],
        streams: list[_Stream],
        original: list[torch.Tensor],
        arguments: list[list[Arguments]],
    ) -> None:
        """Take all streams that differ from the original through a block, those with the same weights in it together."""
        names = {self._name(index, layer): layer for layer in weights}
        sharing: dict[tuple[tuple[str, int], ...], list[_Stream]] = {}
        for stream in streams:
            here = tuple((name, stream.mix[name]) for name in names if name in stream.mix)
            if here or stream.states:
                sharing.setdefault(here, []).append(stream)
        for here, several in sharing.items():
            for name, level in here:
                self._put(module, names[name], self.levels[level](name))
            for stream in several:
                given = stream.states or original
                stream.states = [self._block(index, one, arguments[i][index]) for i, one in enumerate(given)]
            for name, _ in here:
                module.get_parameter(f"{names[name]}.weight").data = weights[names[name]]

    def _put(self, module: nn.Module, layer: str, weight: torch.Tensor) -> None:
        transposed = not isinstance(module.get_submodule(layer), nn.Linear)  # GPT-2's Conv1D
        module.get_parameter(f"{layer}.weight").data = weight.T.contiguous() if transposed else weight

    def _compare(self, original: list[torch.Tensor], streams: list[_Stream], whole: bool) -> list[Divergence]:
        """Compare the logits of every stream with the original's, a window at a time.

        All of them where the mix is a `whole` one. Of single groups, those of the window's LIKELY tokens, as if there were no
        others: the output head costs as much as half of the blocks, and the groups' order is the same.
        """
        windows = len(self.ids)
        found = [Divergence(*(torch.zeros(windows, dtype=torch.float64) for _ in range(3))) for _ in streams]
        at = 0
        for number, piece in enumerate(self.pieces):
            for row in range(len(piece)):
                ids = piece[row : row + 1]
                base = self._logits(ids, original[number][row : row + 1])
                shares, targets = base.softmax(-1), ids[0, 1:, None].to(base.device)
                rows = None if whole else _likely(shares)
                with self.model.narrow_head(rows) if rows is not None else nullcontext(False) as narrow:
                    if narrow:
                        base = base[:, rows]
                        shares = base.softmax(-1)
                    for stream, one in zip(streams, found, strict=True):
                        if not stream.states:
                            one.agreement[at] = 1.0
                            continue
                        logits = self._logits(ids, stream.states[number][row : row + 1])
                        if whole:
                            one.agreement[at] = float((logits.argmax(-1) == base.argmax(-1)).double().mean())
                        # KL = log E_p[exp(d)] - E_p[d], d being the difference of the logits: precise where that is small.
                        difference = logits.sub_(base)
                        grown = growth(base, shares, difference)
                        one.kl[at] = float((grown - torch.linalg.vecdot(shares, difference)).double().mean())
                        if whole:
                            one.loss[at] = float((grown - difference.gather(1, targets)[:, 0]).double().mean())
                at += 1
        return found

    def _logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """F32 [tokens - 1, vocabulary], of a window whose states behind the last block are `hidden`."""
        return self.model.finish(ids, hidden)[0, :-1].float()


def growth(base: torch.Tensor, shares: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """log E_p[exp(d)] for every token, F32 [tokens]: p are `shares`, the softmax of `base`, and d is `difference`, from there.

    All three are F32 [tokens, vocabulary]. E_p[exp(d) - 1] is precise where little differs. Where a logit differs by more than
    `FAR`, exp(d) could overflow, or meet a share that is rounded to 0: there it is a difference of two log-sum-exps.
    """
    grown: torch.Tensor = torch.linalg.vecdot(shares, torch.expm1(difference)).log1p_()
    far = difference.abs().amax(-1) > FAR
    if bool(far.any()):
        there = base[far].double()
        grown[far] = ((there + difference[far]).logsumexp(-1) - there.logsumexp(-1)).float()
    return grown


def _likely(shares: torch.Tensor) -> torch.Tensor | None:
    """The LIKELY tokens of the vocabulary that have most of a window's probability, in their order; None where it has no more."""
    if shares.shape[1] <= LIKELY:
        return None
    return shares.sum(0).topk(LIKELY).indices.sort().values

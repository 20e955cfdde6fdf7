"""The walk through a model, block by block: what each layer is given, its codes, and what comes out behind the block.

Two streams of hidden states go through: one through the original model, one through the model as it is quantized so far. A
layer's Hessian is made of what the second gives it, with the layers before it in its block quantized too ("true sequential"),
and its target is moved towards what it would put out in the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from configs.errors import TameError
from tasks.calibrate import scales, solve
from tasks.calibrate.block_model import BlockModel
from tasks.calibrate.grid import Grid
from tasks.calibrate.groups import Group, Run, find_groups, input_of, looking, run_once
from tasks.calibrate.layers import Codes, Effort, nearest, searched, solved
from tasks.calibrate.streams import Streams
from tasks.calibrate.tune import Batch, tuned

STRIP = 512  # columns of a Hessian made at once: of a symmetric matrix, half need not be computed
TOGETHER = 256  # columns whose codes `fast` chooses together, at most
KEPT = 2 << 30  # bytes of a block's activations that may be kept on the host rather than computed again

Known = list[dict[str, torch.Tensor] | None]
"""For each piece of the text, outputs of layers that need not run again; None where they do."""


@dataclass
class Block:
    """A loaded block, and its layers' weights in both streams."""

    index: int
    name: str
    module: nn.Module
    layers: list[str]
    grids: dict[str, Grid]
    original: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor]
    groups: list[Group] = field(default_factory=list)
    passed: bool = False
    """Whether the original stream is behind this block already."""

    def use(self, weights: dict[str, torch.Tensor]) -> None:
        """Put these weights into the layers."""
        for name, weight in weights.items():
            self.module.get_parameter(f"{name}.weight").data = weight

    def transposed(self, name: str) -> bool:
        """Whether a layer's weight is [in, out]: GPT-2's Conv1D."""
        return not isinstance(self.module.get_submodule(name), nn.Linear)

    def weight(self, name: str) -> torch.Tensor:
        """A layer's original weight, F32 [out, in]."""
        weight = self.original[name].T if self.transposed(name) else self.original[name]
        if not bool(torch.isfinite(weight).all()):
            raise TameError(
                f"{self.name}.{name}.weight has NaN or infinite numbers; the checkpoint is broken, get it again"
            )
        return weight.float().contiguous()

    def round(self, chosen: dict[str, Codes]) -> None:
        """Let the weights of the second stream be those that these codes stand for."""
        for name, codes in chosen.items():
            weight = codes.values(self.grids[name]).to(self.original[name].dtype)
            self.rounded[name] = weight.T.contiguous() if self.transposed(name) else weight


class Walk:
    """`wanted` has the weights that get codes, as the model calls them, and the levels and groups of each."""

    def __init__(self, model: BlockModel, streams: Streams, wanted: dict[str, Grid], effort: Effort) -> None:
        self.model, self.streams, self.effort = model, streams, effort
        here = {id(grid): grid.to(model.device) for grid in wanted.values()}
        self.wanted = {name: here[id(grid)] for name, grid in wanted.items()}
        self.plain: list[str] = []
        """Weights of the last block that were rounded plainly: no token came to them, or their layer ran more than once."""

    def layers(self, index: int) -> list[str]:
        """The names, within a block, of the layers that get codes."""
        prefix = f"{self.model.block_name(index)}."
        inside = [name.removeprefix(prefix).removesuffix(".weight") for name in self.wanted if name.startswith(prefix)]
        return [name for name, _ in self.model.blocks[index].named_modules() if name in set(inside)]

    def block(self, index: int, module: nn.Module) -> dict[str, Codes]:
        """Choose the codes of a loaded block, and take both streams through it. The codes are by the weights' names."""
        block = self._read_block(index, module)
        inputs = self._original_inputs(block)
        computed: Known = [{} if inputs else None for _ in self.streams.pieces]
        chosen: dict[str, Codes] = {}
        for number, group in enumerate(block.groups):
            hessian, other = self._products(block, group, [found[number] for found in inputs], computed)
            found = self._solve(block, group, hessian, other)
            block.round(found)
            chosen |= found
        if self.effort.tunings and chosen:
            chosen, computed = self._tuned(block, chosen), [None for _ in self.streams.pieces]
        chosen |= self._rest(block, chosen)
        self._through(block, computed)
        return {f"{block.name}.{name}.weight": codes for name, codes in chosen.items()}

    def replay(self, index: int, module: nn.Module, chosen: dict[str, Codes]) -> None:
        """Take both streams through a block whose codes are known."""
        block = self._read_block(index, module)
        by_layer = {name: chosen[f"{block.name}.{name}.weight"] for name in self.layers(index)}
        block.round(by_layer)
        self._through(block, [None for _ in self.streams.pieces])

    def replay_original(self, index: int) -> None:
        """Take the original stream alone through a block."""
        for piece in range(len(self.streams.pieces)):
            self.streams.put("original", piece, self.run(index, "original", piece))

    def search(self, index: int, module: nn.Module) -> dict[str, Codes]:
        """Codes chosen within each block of columns, by what the original block gives its layers: one pass through it."""
        block = self._read_block(index, module)
        groups = {group.layers[0]: group for group in block.groups}
        products: dict[str, torch.Tensor] = {}
        tokens: dict[str, int] = {}

        def observe(name: str, given: torch.Tensor, run: Run) -> torch.Tensor:
            if name in groups:
                flat = given.reshape(-1, given.shape[-1]).float()
                widest = max(block.grids[layer].block for layer in groups[name].layers)
                products[name] = products.get(name, 0) + _local_products(flat, widest)
                tokens[name] = tokens.get(name, 0) + len(flat)
            return run(given)

        with looking(module, block.layers, observe):
            for piece in range(len(self.streams.pieces)):
                self.streams.put("original", piece, self.run(index, "original", piece))
        chosen = {}
        for first, total in products.items():
            if tokens[first]:
                self._check(block, first, total.diagonal(dim1=1, dim2=2))
                total /= tokens[first]
                for name in groups[first].layers:
                    weight, grid = block.weight(name), block.grids[name]
                    chosen[name] = searched(weight, total, f"{block.name}.{first}", grid, self.effort)
        chosen |= self._rest(block, chosen)
        return {f"{block.name}.{name}.weight": codes for name, codes in chosen.items()}

    def run(self, index: int, stream: str, piece: int) -> torch.Tensor:
        """A block's output for one piece of the sequences."""
        hidden = self.streams.get(stream, piece).to(self.model.device, self.model.model.dtype)
        with torch.no_grad():
            return self.model.run(index, hidden, self.streams.arguments(piece, index))

    def _read_block(self, index: int, module: nn.Module) -> Block:
        layers = self.layers(index)
        original = {name: module.get_parameter(f"{name}.weight").data for name in layers}
        prefix = self.model.block_name(index)
        grids = {name: self.wanted[f"{prefix}.{name}.weight"] for name in layers}
        block = Block(index, prefix, module, layers, grids, original, dict(original))
        block.groups, several = find_groups(module, layers, lambda: self.run(index, "original", 0))
        block.layers = [name for name in layers if name not in several]
        return block

    def _original_inputs(self, block: Block) -> list[list[torch.Tensor | None]]:
        """Take the original stream through the block: what each group is given on the way, for each piece. Empty if that is
        too much to keep."""
        sizes = sum(sum(block.original[name].shape) for name in block.layers)
        if self.model.device.type != "cpu" or 4 * sizes * self.streams.tokens > KEPT:
            return []
        first = {group.layers[0]: number for number, group in enumerate(block.groups)}
        inputs = []
        for piece in range(len(self.streams.pieces)):
            found: list[torch.Tensor | None] = [None] * len(block.groups)

            def observe(
                name: str, given: torch.Tensor, run: Run, found: list[torch.Tensor | None] = found
            ) -> torch.Tensor:
                if name in first:
                    found[first[name]] = given.reshape(-1, given.shape[-1])
                return run(given)

            with looking(block.module, block.layers, observe):
                self.streams.put("original", piece, self.run(block.index, "original", piece))
            inputs.append(found)
        block.passed = True
        return inputs

    def _products(
        self, block: Block, group: Group, inputs: list[torch.Tensor | None], computed: Known
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """H = X^T X and C = X'^T X of a group, F32 [columns, columns], the mean over all tokens; of no token: zeros."""
        first = group.layers[0]
        columns = block.original[first].shape[0 if block.transposed(first) else 1]
        hessian = torch.zeros(columns, columns, device=self.model.device)
        other = torch.zeros_like(hessian)
        tokens = 0
        for piece in range(len(self.streams.pieces)):
            theirs = inputs[piece] if inputs else self._input(block, group, "original", piece, None)
            ours = self._input(block, group, "rounded", piece, computed[piece])
            if ours is None or not len(ours):
                continue
            tokens += len(ours)
            _add_product(hessian, ours, ours)
            # An expert may be given other tokens in the two streams.
            same = theirs is not None and len(theirs) == len(ours) == self.streams.tokens_of(piece)
            _add_product(other, theirs if same and theirs is not None else ours, ours)
        if tokens < columns and f"{block.name}.{first}" in self.model.of_experts:
            hessian.zero_()  # an expert that few tokens came to: they say nothing of most directions
        self._check(block, first, hessian.diagonal())
        for start in range(0, columns, STRIP):  # the other half
            end = start + STRIP
            hessian[end:, start:end] = hessian[start:end, end:].T
        return hessian.div_(max(tokens, 1)), other.div_(max(tokens, 1))

    def _input(
        self, block: Block, group: Group, stream: str, piece: int, computed: dict[str, torch.Tensor] | None
    ) -> torch.Tensor | None:
        block.use(block.original if stream == "original" else block.rounded)
        return input_of(block.module, group, block.layers, lambda: self.run(block.index, stream, piece), computed)

    def _check(self, block: Block, name: str, squares: torch.Tensor) -> None:
        if not bool(torch.isfinite(squares).all()):
            raise TameError(
                f"{self.model.folder}: the calibration text gives {block.name}.{name} NaN or infinite numbers; does the model "
                "itself work? Leave calibrate out, or calibrate on another text"
            )

    def _solve(self, block: Block, group: Group, hessian: torch.Tensor, other: torch.Tensor) -> dict[str, Codes]:
        importance = hessian.diagonal().clone()
        if not bool(importance.any()):
            return {}
        other.sub_(hessian)
        shifts = {name: block.weight(name) @ other for name in group.layers}
        other.resize_(0)  # a Hessian of 12,288 columns has 0.6 GB
        solve.shrink(hessian, self.effort.shrink)
        made = solve.form(hessian, self.effort.damping, f"{block.name}.{group.layers[0]}")
        return {
            name: solved(block.weight(name), importance, shifts[name], made, block.grids[name], self.effort)
            for name in group.layers
        }

    def _tuned(self, block: Block, chosen: dict[str, Codes]) -> dict[str, Codes]:
        block.use(block.original)
        pieces = range(len(self.streams.pieces))
        if block.passed:
            wanted = [self.streams.get("original", piece) for piece in pieces]
        else:
            wanted = [self.run(block.index, "original", piece).to(torch.bfloat16) for piece in pieces]

        def batches() -> Iterator[Batch]:
            for piece in pieces:
                given = self.streams.get("rounded", piece).to(self.model.device, self.model.model.dtype)
                yield given, wanted[piece].to(self.model.device), self.streams.arguments(piece, block.index)

        found = tuned(block.module, chosen, block.grids, batches, self.effort)
        block.round(found)
        return found

    def _rest(self, block: Block, chosen: dict[str, Codes]) -> dict[str, Codes]:
        """Plain codes for what has none."""
        found, self.plain = {}, []
        for name in self.layers(block.index):
            if name not in chosen:
                weight, grid = block.weight(name), block.grids[name]
                found[name] = nearest(weight, scales.largest(weight, grid), grid)
                self.plain.append(f"{block.name}.{name}.weight")
        block.round(found)
        return found

    def _through(self, block: Block, computed: Known) -> None:
        """Take the streams through the block: the original one, unless that is done, and the one of rounded weights."""
        last = block.index == len(self.model.blocks) - 1
        for piece in range(0 if last else len(self.streams.pieces)):
            if not block.passed:
                block.use(block.original)
                self.streams.put("original", piece, self.run(block.index, "original", piece))
            block.use(block.rounded)

            def observe(name: str, given: torch.Tensor, run: Run, piece: int = piece) -> torch.Tensor:
                return run_once(name, given, run, computed[piece])

            with looking(block.module, block.layers, observe):
                self.streams.put("rounded", piece, self.run(block.index, "rounded", piece))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right, of [tokens, columns] each, in float32; of a product with itself only the upper triangle is right."""
    for start in range(0, len(total), STRIP):
        end = start + STRIP
        before = start if left is right else 0
        if left.is_cuda and left.dtype != torch.float32:
            total[start:end, before:] += torch.mm(left[:, start:end].T, right[:, before:], out_dtype=torch.float32)
        else:
            total[start:end, before:].addmm_(left[:, start:end].float().T, right[:, before:].float())


def _local_products(given: torch.Tensor, block: int) -> torch.Tensor:
    """X^T X of X, F32 [tokens, columns], for each run of columns by itself: F32 [runs, columns of a run, the same].

    A run has whole blocks and `TOGETHER` columns at most; where blocks cross rows, one column.
    """
    tokens, columns = given.shape
    widths = range(max(block, TOGETHER // block * block), 0, -block)
    width = next((width for width in widths if columns % width == 0), 1)
    parts = given.view(tokens, columns // width, width).transpose(0, 1)
    return parts.transpose(1, 2) @ parts

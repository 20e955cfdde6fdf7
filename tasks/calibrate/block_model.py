"""A causal language model of which one block at a time is in memory.

The model stands on the meta device. What lies before its first block is loaded and run by the model itself, which makes the
arguments of every block: masks, positions, rotary angles. A block is loaded when its turn comes, by transformers' own
loading, so that whatever an architecture renames, splits or fuses on the way in is done here too.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.errors import BadInputError, ReachedError, TameError, line
from tasks.calibrate.experts import SplitExperts, names_of, splits
from tasks.download.checkpoint import Stored, read_tensors
from tasks.transformers_adapter import (
    building,
    dtype_of,
    load_some,
    make_buffers,
    match,
    model_class,
    read_model_config,
    set_dtype,
    tie,
    transposed_modules,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides the hidden states."""


class BlockModel:
    """The model in `folder`, as blocks that lie in a ModuleList.

    `dtype` is what is computed in; the weights' own where it is None.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        head: bool = False,
    ) -> None:
        """With `head`, what lies behind the blocks is loaded too, for `finish`.

        Raises BadInputError for what is no causal language model of blocks; it names the architecture.
        """
        self.folder, self.device = folder, torch.device(device)
        tensors = read_tensors(folder)
        self.model = _on_meta(folder, tensors, dtype, trust_remote_code)
        self.model.eval().requires_grad_(False)
        self.kind = type(self.model).__name__
        self.blocks_name, self.blocks = _blocks(self.model, folder)
        self.linear = {name for name, one in self.model.named_modules() if type(one) is nn.Linear}
        self.linear |= transposed_modules(self.model)
        self.tensors, _ = match(self.model, None, tensors)
        self.experts = names_of(self.model)
        """What is called otherwise here than in the checkpoint: weights of single experts."""
        self.of_experts = {name.removesuffix(".weight") for name in self.experts.values()}
        self.linear |= self.of_experts
        self.tuples = False
        make_buffers(self.model, self.device)
        output = None if head else self.model.get_output_embeddings()
        after = {name for name, module in self.model.named_modules() if module is output}
        self._load(
            lambda name: not name.startswith(f"{self.blocks_name}.") and name.rpartition(".")[0] not in after,
        )
        if head:
            tie(self.model, set(self.model.state_dict()) - self.tensors.keys())

    def unload_rest(self) -> None:
        """Let go of what lies outside the blocks; nothing can be started after that."""
        _unload(self.model)

    def block_name(self, index: int) -> str:
        """The name of a block among the model's modules."""
        return f"{self.blocks_name}.{index}"

    @contextmanager
    def loaded(self, index: int) -> "Iterator[nn.Module]":
        """A block with its weights on the device, in evaluation mode, its experts split; they are let go of at the end.

        Raises:
            TameError: a tensor that the block needs is not in the checkpoint.
        """
        prefix = f"{self.block_name(index)}."
        self._load(lambda name: name.startswith(prefix))
        block = self.blocks[index]
        lost = [name for name, tensor in (*block.named_parameters(), *block.named_buffers()) if tensor.is_meta]
        if lost:
            raise TameError(f"{self.folder}: no tensor for {prefix}{lost[0]}; download the model again")
        whole = {name: module for name, module in block.named_modules() if splits(module)}
        for name, module in whole.items():
            block.set_submodule(name, SplitExperts(module))
        try:
            yield block
        finally:
            for name, module in whole.items():
                block.set_submodule(name, module)
            _unload(block)

    def start(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model on token ids [batch, tokens] up to its first block.

        Returns the hidden states [batch, tokens, width] that enter the first block, and each block's other arguments.

        Raises:
            BadInputError: blocks that need what other blocks made besides the hidden states.
        """
        seen: list[tuple[torch.Tensor, Arguments]] = []
        originals = [block.forward for block in self.blocks]

        def recorder(index: int) -> Callable[..., Any]:
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                seen.append((hidden, (args, kwargs)))
                if index == len(originals) - 1:
                    raise ReachedError("the last block was reached")
                return (hidden,) if self.tuples else hidden

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = recorder(index)
        try:
            with torch.no_grad():
                self.model(input_ids=ids.to(self.device), use_cache=False)
        except ReachedError:
            pass
        except Exception as error:  # whatever the code of hundreds of models can throw
            if not self.tuples and len(seen) >= 1:  # the model takes the first of what a block returns
                self.tuples = True
                return self.start(ids)
            raise BadInputError(
                f"{self.folder}: {self.kind} cannot be run block by block ({line(error)}); leave calibrate and fit out"
            ) from error
        finally:
            for block in self.blocks:
                del block.forward
        first = seen[0][0]
        if len(seen) != len(originals) or any(hidden.shape != first.shape for hidden, _ in seen):
            if not self.tuples:
                self.tuples = True
                return self.start(ids)
            raise BadInputError(
                f"{self.folder}: {self.kind} does not run its blocks in their order; leave calibrate and fit out"
            )
        return first, [arguments for _, arguments in seen]

    def run(self, index: int, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The hidden states behind a loaded block, [batch, tokens, width]."""
        args, kwargs = arguments
        out = self.blocks[index](hidden, *args, **kwargs)
        states: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return states

    @contextmanager
    def narrow_head(self, rows: torch.Tensor) -> Iterator[bool]:
        """Let `finish` give the logits of these tokens alone, where the output head is a plain layer; says whether it is."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            yield False
            return
        weight, bias = head.weight.data, None if head.bias is None else head.bias.data
        tied = head.weight
        try:
            head.weight = nn.Parameter(weight[rows], requires_grad=False)
            if bias is not None:
                head.bias.data = bias[rows]
            yield True
        finally:
            head.weight = tied
            if bias is not None:
                head.bias.data = bias

    def finish(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [batch, tokens, vocabulary], of token ids [batch, tokens] whose states behind the last block are `hidden`.

        The model runs what lies behind the blocks itself, so that whatever it does to its logits is done here too.
        """
        for block in self.blocks:
            block.forward = lambda *_args, **_kwargs: (hidden,) if self.tuples else hidden
        try:
            with torch.no_grad():
                logits: torch.Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward
        return logits

    def _load(self, wanted: Callable[[str], bool]) -> None:
        """Load the parameters and buffers whose names are `wanted`, by transformers' own conversions."""
        from safetensors import safe_open

        chosen = [tensor for name, several in self.tensors.items() if wanted(name) for tensor in several]
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(self.folder / file, framework="pt"))
                for file in sorted({tensor.file for tensor in chosen})
            }
            state = {tensor.name: files[tensor.file].get_slice(tensor.name) for tensor in chosen}
            load_some(self.model, state, self.device)
        self.model.eval().requires_grad_(False)


def _on_meta(folder: Path, tensors: dict[str, Stored], dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The model without weights, as `from_pretrained` makes it."""
    config = read_model_config(folder, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise BadInputError(
            f"{folder}: {config.model_type} is an encoder-decoder; tame calibrates decoder-only language models, leave "
            "calibrate and fit out"
        )
    cls = model_class(config, folder, trust_remote_code)
    chosen = dtype or dtype_of(config, folder, tensors)
    set_dtype(config, chosen)
    with building(cls, chosen):
        return cls(config)


def _blocks(model: Any, folder: Path) -> tuple[str, nn.ModuleList]:
    """The ModuleList of the decoder's blocks: of those that lie in no other, the one with most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    fitting = {name: one for name, one in outer.items() if len(one) == count} or outer
    decoder = getattr(model, "get_decoder", lambda: None)()
    within = {name: one for name, one in fitting.items() if decoder is not None and one in decoder.modules()}
    found = within or fitting
    if not found:
        raise BadInputError(f"{folder}: {type(model).__name__} has no list of blocks; leave calibrate and fit out")
    name = max(found, key=lambda key: sum(parameter.numel() for parameter in found[key].parameters()))
    return name, found[name]


def _unload(part: nn.Module) -> None:
    """Let go of the weights of a part of the model; buffers that no checkpoint holds stay."""
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")

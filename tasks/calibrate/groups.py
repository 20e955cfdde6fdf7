"""The linear layers of a block, which of them are given the same input, and what they are given: by looking while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from configs.errors import ReachedError

Run = Callable[[torch.Tensor], torch.Tensor]
Look = Callable[[str, torch.Tensor, Run], torch.Tensor]
"""Called in place of a layer, with its name in the block, its input, and what runs it. It returns the output."""


@dataclass(frozen=True)
class Group:
    """Layers, by their names in the block, that are given the same input; they share a Hessian."""

    layers: tuple[str, ...]


@contextmanager
def looking(block: nn.Module, layers: list[str], observe: Look) -> Iterator[None]:
    """While this lasts, `observe` is called in place of each of `layers`."""

    def watched(name: str, run: Run) -> Run:
        return lambda given: observe(name, given, run)

    modules = {name: block.get_submodule(name) for name in layers}
    for name, module in modules.items():
        module.forward = watched(name, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def find_groups(block: nn.Module, layers: list[str], run: Callable[[], object]) -> tuple[list[Group], list[str]]:
    """Groups in the order in which they are run, by one call of `run`; and layers that it runs more than once.

    A layer that this call does not reach, such as an expert that no token goes to, is a group of its own at the end.
    """
    inputs: dict[str, list[torch.Tensor]] = {}

    def observe(name: str, given: torch.Tensor, run: Run) -> torch.Tensor:
        inputs.setdefault(name, []).append(given)  # kept, so that no other tensor gets its address
        return run(given)

    with looking(block, layers, observe):
        run()
    shared: dict[tuple[object, ...], list[str]] = {}
    for name, (given, *more) in inputs.items():
        if not more:
            shared.setdefault((given.data_ptr(), given.shape, given.stride()), []).append(name)
    groups = [Group(tuple(names)) for names in shared.values()]
    groups += [Group((name,)) for name in layers if name not in inputs]
    return groups, [name for name, given in inputs.items() if len(given) > 1]


def input_of(
    block: nn.Module,
    group: Group,
    layers: list[str],
    run: Callable[[], object],
    computed: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """What the layers of a group are given, [tokens, columns], by running the block up to them; None if they are not reached.

    `layers` are all that may be looked at. `computed` has outputs of such that need not run again, and takes up those of others.
    """
    found: list[torch.Tensor] = []

    def observe(name: str, given: torch.Tensor, run: Run) -> torch.Tensor:
        if name in group.layers:
            found.append(given)
            raise ReachedError("the layer whose input was wanted is reached")
        return run_once(name, given, run, computed)

    with looking(block, layers, observe), suppress(ReachedError):
        run()
    return found[0].reshape(-1, found[0].shape[-1]) if found else None


def run_once(name: str, given: torch.Tensor, run: Run, computed: dict[str, torch.Tensor] | None) -> torch.Tensor:
    """A layer's output: from `computed`, or made, and then kept there; without `computed`, made."""
    if computed is None:
        return run(given)
    if name not in computed:
        computed[name] = run(given)
    return computed[name]

"""The lists of modules by which a variant quantizes some otherwise than the rest."""

from collections.abc import Iterable

from configs.errors import BadInputError
from tasks.transformers_adapter import is_skipped


def named(modules: Iterable[str], weights: Iterable[str], option: str) -> list[str]:
    """The weights of the modules that a variant's `option` lists.

    Raises:
        BadInputError: a module of the list has none.
    """
    weights, found = list(weights), []
    for module in modules:
        here = [name for name in weights if is_skipped(name.removesuffix(".weight"), [module])]
        if not here:
            raise BadInputError(f"{option}: {module!r} matches no module that is quantized; correct it")
        found += here
    return found

"""The list of modules that a checkpoint says are not quantized, so that transformers and vLLM both read it.

vLLM computes some modules as one, and compares the list with the names of those: where all parts of one stay unquantized, its
name is on the list, too. transformers has no such modules, and passes over the names.
"""

from tasks.quantize.methods.fused_modules import FUSED


def with_fused(skip: list[str] | None) -> list[str] | None:
    """The list, and after it the names of fused modules all of whose parts are on it."""
    if skip is None:
        return None
    names, parents = set(skip), dict.fromkeys(name.rpartition(".")[0] for name in skip if "." in name)
    fused = [
        f"{parent}.{name}"
        for parent in parents
        for name, parts in FUSED.items()
        if names.issuperset(f"{parent}.{part}" for part in parts)
    ]
    return [*skip, *(name for name in fused if name not in names)]


def without_fused(skip: list[str]) -> list[str]:
    """The list as it was before `with_fused`."""
    names = set(skip)
    return [
        name
        for name in skip
        if not (
            (parts := FUSED.get(name.rpartition(".")[2]))
            and names.issuperset(f"{name.rpartition('.')[0]}.{part}" for part in parts)
        )
    ]

"""transformers without what only running a model needs, for the one process of `tame quantize`, which makes models without weights.

Its imports are nearly all of the time that a small model takes. A quarter of them is a compiler (torch._dynamo), tensors that
are spread over several devices (torch.distributed.tensor), and losses of object detection (scipy).
"""

import sys
from types import ModuleType
from typing import Any

COMPILER = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")


def only_make_models() -> None:
    """From here on, this process can make models of transformers, and can neither run nor compile them.

    Nothing happens where transformers is imported already.
    """
    if "transformers" in sys.modules:
        return
    import torch
    import torch.distributed

    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]  # Python's own way to say that there is none
    torch.distributed.is_available = lambda: False
    torch.compile = torch.compiler.disable = unchanged  # type: ignore[assignment]
    for name in COMPILER:
        sys.modules.setdefault(name, _Absent(name))


class _Absent(ModuleType):
    """Stands for a module whose names are imported, and used as decorators at most."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return unchanged


def unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """In the place of a decorator that compiles, with or without options: the function itself."""
    return function or (lambda plain: plain)

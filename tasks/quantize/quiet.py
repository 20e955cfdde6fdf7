"""Import what quantizing needs, without noise and without what it does not use."""

import logging
import os
import warnings
from typing import Any


def quieten() -> None:
    """Silence what a user can do nothing about. Imports transformers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def import_libraries() -> None:
    """Import torch, bitsandbytes and transformers.

    bitsandbytes decorates functions that quantizing never calls with `torch.compile`, which imports the whole compiler:
    2 to 3 s, of which the rest of its import is 0.04 s. Only for a process that does nothing but quantize.
    """
    import torch

    def not_compiled(function: Any = None, **_: Any) -> Any:
        return function if function is not None else not_compiled

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    compiled = torch.compile
    setattr(torch, "compile", not_compiled)  # noqa: B010
    try:
        import bitsandbytes  # noqa: F401
    finally:
        setattr(torch, "compile", compiled)  # noqa: B010
    quieten()

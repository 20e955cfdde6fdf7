"""Import bitsandbytes and transformers without their noise, and without what quantizing does not use."""

import logging
import os
import warnings


def import_libraries() -> None:
    """Import torch, bitsandbytes and transformers, quietly.

    bitsandbytes decorates kernels that quantizing never calls with `torch.compile`, which imports the whole compiler: 2 to
    3 s, and the rest of the import 0.04 s. Only use this in a process that does nothing but quantize.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    import torch

    compiled, torch.compile = torch.compile, lambda model=None, **_: model if model is not None else lambda f: f
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiled
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

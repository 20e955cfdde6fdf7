"""A .gguf as a normal checkpoint. Runs in a process of its own; see tasks/download/task.py."""

from pathlib import Path

from configs.errors import TameError
from tasks.runtime.progress import Progress


def dequantize(gguf: Path, folder: Path, *, progress: Progress) -> None:
    """Write the model and tokenizer in `gguf` to `folder` as bf16 safetensors that transformers loads.

    Raises:
        TameError: transformers cannot read it: an architecture it does not know, or a damaged file.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    progress(f"dequantize {gguf.name}", 0, 3)
    try:
        # dequantize=True: without it, transformers keeps the weights packed and cannot save them (FACTS).
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        progress(f"dequantize {gguf.name}", 2, 3)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise TameError(
            f"{gguf}: transformers cannot read it ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress(f"dequantize {gguf.name}", 3, 3)

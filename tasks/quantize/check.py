"""Is what was written what transformers will load? Checked before the checkpoint counts."""

from pathlib import Path
from typing import Any

from configs.errors import TameError


def check_written(folder: Path, expected: dict[str, Any], quantized: set[str], trust_remote_code: bool = False) -> None:
    """Read the headers back, and have transformers build the model that it would load them into.

    `expected` has a meta tensor for each name that must be there (a text's length may differ); `quantized` the model's
    names of the weights that must be loaded as quantized ones.

    Raises:
        TameError: a tensor is missing, too many, or of another dtype or shape; a loader would see other layers quantized.
    """
    from tasks.download.checkpoint import Stored, read_header
    from tasks.quantize.shards import NAMES
    from tasks.quantize.skeleton import reloaded

    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_header(path, path.name)
    wrong = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        tensor = expected[name]
        same_shape = found[name].shape == tuple(tensor.shape) or (
            ".quant_state." in name and len(found[name].shape) == 1
        )
        if found[name].dtype != NAMES[tensor.dtype] or not same_shape:
            wrong.append(name)
    if wrong:
        raise TameError(
            f"{folder}: {wrong[0]} is not what was to be written; this is a fault of tame, please report it"
        )
    differ = sorted(reloaded(folder, trust_remote_code) ^ quantized)
    if differ:
        raise TameError(
            f"{folder}: transformers would load {differ[0]} {'un' if differ[0] in quantized else ''}quantized, other than it "
            "was written; this is a fault of tame, please report it"
        )


def runs(folder: Path, device: str, trust_remote_code: bool = False) -> tuple[bool | None, str]:
    """Load the checkpoint and run it on eight tokens: whether the output is finite, or None and why it was not tried.

    Takes the model's memory and the seconds of a load, and may crash where a kernel does: call it through `isolated`.
    """
    import psutil

    from tasks.quantize.quiet import quieten

    quieten()
    import torch
    from transformers import AutoConfig

    from tasks.quantize.skeleton import model_class

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(torch.device(device))[0]
    if size * 1.5 > free:
        return None, f"{size / 1e9:.1f} GB do not fit in {free / 1e9:.1f} GB of free memory"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    cls = model_class(config, folder, trust_remote_code)
    try:
        model = cls.from_pretrained(folder, device_map={"": device}, local_files_only=True)
        if model.main_input_name != "input_ids":
            return None, f"{cls.__name__} does not take text alone"
        tokens = torch.arange(8, device=device)[None] % model.get_input_embeddings().num_embeddings
        inputs = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        with torch.inference_mode():
            logits = model(input_ids=tokens, **inputs)[0]
    except torch.OutOfMemoryError:
        return None, f"{device} is out of memory"
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return None, f"{cls.__name__} does not run on {device}: {' '.join(str(error).split())[:200]}"
    return bool(torch.isfinite(logits).all()), "a forward pass on eight tokens"

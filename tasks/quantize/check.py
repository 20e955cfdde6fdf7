"""Is what was written what transformers will load? Checked before the checkpoint counts."""

from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import TameError, line
from tasks.download.checkpoint import Stored, read_header
from tasks.quantize.protocols import TensorFormat

if TYPE_CHECKING:
    from tasks.quantize.layout import Layout


def check_written(folder: Path, layout: "Layout", tensor_format: TensorFormat, trust_remote_code: bool = False) -> None:
    """Read the headers back, and have transformers build the model that it would load them into.

    Raises:
        TameError: a tensor is missing, too many, or of another dtype or shape; a loader would see other layers quantized.
    """
    from tasks.quantize.shards import NAMES
    from tasks.quantize.skeleton import reloaded

    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_header(path, path.name)
    wrong = sorted(found.keys() ^ layout.outputs.keys())
    for name in found.keys() & layout.outputs.keys():
        tensor = layout.outputs[name]
        same_shape = found[name].shape == tuple(tensor.shape) or (
            name in layout.growing and len(found[name].shape) == 1
        )
        if found[name].dtype != NAMES[tensor.dtype] or not same_shape:
            wrong.append(name)
    if wrong:
        raise TameError(
            f"{folder}: {wrong[0]} is not what was to be written; this is a fault of tame, please report it"
        )
    differ = sorted(reloaded(folder, tensor_format, trust_remote_code) ^ layout.quantized)
    if differ:
        how = "unquantized" if differ[0] in layout.quantized else "quantized"
        raise TameError(
            f"{folder}: transformers would load {differ[0]} {how}, other than it was written; this is a fault of tame, please "
            "report it"
        )


def runs(folder: Path, device: str, trust_remote_code: bool = False) -> tuple[bool | None, str]:
    """Load the checkpoint and run it on eight tokens: whether the output is finite, or None and why it was not tried.

    Takes the model's memory and the seconds of a load, and may crash where a kernel does: call it through `isolated`.
    """
    import psutil

    from tasks.runtime.quiet import quieten

    quieten()
    import torch

    from tasks.transformers_adapter import model_class, read_model_config

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(torch.device(device))[0]
    if size * 1.5 > free:
        return None, f"{size / 1e9:.1f} GB do not fit in {free / 1e9:.1f} GB of free memory"
    config = read_model_config(folder, trust_remote_code)
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
    except Exception as error:  # of a kernel, or of what this model wants besides tokens: the weights are not to blame
        return None, f"{cls.__name__} does not run on {device}: {line(error, limit=200)}"
    return bool(torch.isfinite(logits).all()), "a forward pass on eight tokens"

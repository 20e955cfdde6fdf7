"""Devices without bfloat16, such as the T4: a model that is stored in it is measured in float16 there, and says so."""

from typing import Any

from tasks.runtime.device import instead_of_bfloat16


def dtype_on(device: str, config: Any, notes: list[str]) -> Any:
    """The dtype to load a model in: its own, unless that is bfloat16 and the device has none. `notes` gets what is said of it."""
    import torch

    other = instead_of_bfloat16(device)
    own = {getattr(part, "dtype", None) for part in (config, config.get_text_config())}
    if other is None or not own & {torch.bfloat16, "bfloat16"}:
        return "auto"
    notes.append(f"the device has no bfloat16, so that this model was measured in {other}")
    return getattr(torch, other)


def follow(model: Any, dtype: Any) -> None:
    """Have layers that compute in bfloat16 by themselves, as those of 4 bits may, compute in the `dtype` of `dtype_on`."""
    import torch

    for module in model.modules() if dtype != "auto" else ():
        if getattr(module, "compute_dtype", None) is torch.bfloat16:
            module.compute_dtype = dtype

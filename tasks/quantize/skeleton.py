"""A model without weights, as it would be quantized; and what is left unquantized of it, and why."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInputError, TameError, line
from configs.schema import Variant
from tasks import transformers_adapter
from tasks.download.checkpoint import Stored
from tasks.quantize.protocols import TensorFormat
from tasks.transformers_adapter import Selection
from tasks.values import Unquantized


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and what is quantized of it."""

    model: Any
    selection: Selection
    dtype: torch.dtype
    transposed: set[str]
    """Modules whose weights are stored as [in, out]."""


def skeleton(
    folder: Path,
    tensor_format: TensorFormat,
    variant: Variant,
    tensors: dict[str, Stored],
    trust_remote_code: bool = False,
) -> Skeleton:
    """The model of the checkpoint in `folder`, which has `tensors`.

    Raises:
        BadInputError: transformers does not know the architecture, or a skipped module does not exist.
    """
    try:
        config = transformers_adapter.read_model_config(folder, trust_remote_code)
        cls = transformers_adapter.model_class(config, folder, trust_remote_code)
        dtype = transformers_adapter.dtype_of(config, folder, tensors)
        transformers_adapter.set_dtype(config, dtype)
        with transformers_adapter.building(cls, dtype):
            model = cls(config)
            transposed = transformers_adapter.transposed_modules(model)
            skip = None
            if variant.skip_modules:
                # transformers forgets what it would skip by itself as soon as a list is given, so both are given.
                skip = sorted({*transformers_adapter.skipped_by_default(model), *variant.skip_modules})
                _check_skips(model, variant, folder)
            selection = tensor_format.select(model, variant, skip, dtype)
    except TameError:
        raise
    except Exception as error:  # whatever a config.json can break in the constructors of hundreds of models
        raise BadInputError(
            f"{folder / 'config.json'}: transformers cannot make a model of it: {line(error)}"
        ) from error
    return Skeleton(model, selection, dtype, transposed)


def reloaded(folder: Path, tensor_format: TensorFormat, trust_remote_code: bool = False) -> set[str]:
    """The names of the weights that would be loaded from a quantized checkpoint as quantized ones."""
    config = transformers_adapter.read_model_config(folder, trust_remote_code)
    cls = transformers_adapter.model_class(config, folder, trust_remote_code)
    with transformers_adapter.building(cls, config.dtype):
        model = cls(config)
        tied = transformers_adapter.tied(model)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied]
        selection = tensor_format.reselect(model, config.quantization_config, config.dtype)
    return {name for name in names if selection.includes(name)}


def left_out(
    whole: Skeleton, saved: dict[str, torch.Tensor], wanted: set[str], variant: Variant, family: str
) -> tuple[list[Unquantized], list[str]]:
    """What is not quantized, by kind of module, largest first; and sentences on what of it a user should know.

    `saved` is all that is saved, `wanted` what is quantized; `family` is what the format is called.
    """
    output = whole.model.get_output_embeddings()
    reason_of = _Reasons(output, variant, family)
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in saved.items():
        if name in wanted:
            continue
        module = whole.model.get_submodule(name.rpartition(".")[0])
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        reason = whole.selection.reasons.get(name) or reason_of(module, name, tensor)
        groups.setdefault((pattern, reason), []).append(tensor.numel())
    left = [
        Unquantized(module=pattern, tensors=len(sizes), parameters=sum(sizes), reason=reason)
        for (pattern, reason), sizes in groups.items()
    ]
    left.sort(key=lambda entry: -entry.parameters)
    total = sum(tensor.numel() for tensor in saved.values())
    notes = []
    for entry in left:
        if (
            entry.reason in {reason_of.fused, OWN_CLASS, *whole.selection.reasons.values()}
            and entry.parameters > 0.01 * total
        ):
            share = entry.parameters / total
            notes.append(f"{entry.module} ({share:.0%} of the parameters) stays unquantized: {entry.reason}.")
    return left, notes


OWN_CLASS = "a linear layer of the model's own class, which transformers does not quantize"


@dataclass(frozen=True)
class _Reasons:
    """Says why a tensor is not quantized."""

    output: Any
    variant: Variant
    family: str

    @property
    def fused(self) -> str:
        return f"fused expert weights, which transformers does not quantize with {self.family}"

    def __call__(self, module: Any, name: str, tensor: torch.Tensor) -> str:
        from torch import nn

        if module is self.output:
            return "output head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if name.endswith("bias"):
            return "bias"
        if tensor.ndim <= 1:
            return "norm or other vector"
        if transformers_adapter.is_skipped(name.rpartition(".")[0], self.variant.skip_modules):
            return "skip_modules of the recipe"
        if tensor.ndim == 3 and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return self.fused
        if type(module) is nn.Linear:
            return "tied, last, or kept in float32 by transformers"
        if isinstance(module, nn.Linear):
            return OWN_CLASS
        return "not a linear layer"


def _check_skips(model: Any, variant: Variant, folder: Path) -> None:
    names = [name for name, _ in model.named_modules()]
    for skip in variant.skip_modules:
        if not any(transformers_adapter.is_skipped(name, [skip]) for name in names):
            raise BadInputError(
                f"skip_modules: {skip!r} matches no module of {folder}, such as {names[-1]}; correct it"
            )

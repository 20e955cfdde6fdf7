"""Which weights of a model a scheme of compressed-tensors quantizes: the linear layers of its language model, experts included.

Routers, embeddings, output heads, norms, and the towers of other senses stay, as vLLM expects of such a checkpoint. Experts are
quantized where transformers can load what is written, one expert a name; where it cannot, they stay too, and are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tasks import transformers_adapter
from tasks.transformers_adapter import Selection

ROUTER = "router"
EXPERTS = r"re:.*\.experts\..*"
"""All experts of a model, as `ignore` names them; shared experts are none of them."""


@dataclass
class Chosen:
    """What is quantized of a model, and what of its layers is not."""

    columns: dict[str, int] = field(default_factory=dict)
    """The length of a row of each weight that is quantized, by the weight's name in the model."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a weight is not, by its name."""

    @property
    def experts(self) -> list[str]:
        """Those that transformers makes of several quantized weights."""
        return [name for name in self.columns if not name.endswith(".weight")]

    def leave(self, name: str, reason: str) -> None:
        """Do not quantize a weight that was chosen."""
        del self.columns[name]
        self.reasons[name] = reason


def choose(model: Any, skip: list[str] | None, dtype: torch.dtype, quantizer: Any, heads: Sequence[str] = ()) -> Chosen:
    """Choose among a model's weights; `quantizer` is the one that will load them, `skip` names modules that stay.

    Output heads stay, but for those that are named in `heads`.
    """
    chosen = Chosen()
    tower = _language_model(model)
    usual = transformers_adapter.skipped_by_default(model)
    kept = transformers_adapter.kept_dtypes(model, dtype)
    in_parts = transformers_adapter.loaded_in_parts(model, quantizer)
    for module_name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{part}"
            linear = isinstance(module, torch.nn.Linear) and part == "weight"
            if not linear and not in_parts(name):
                continue
            if module_name in heads:
                chosen.columns[name] = parameter.shape[-1]
                continue
            if transformers_adapter.is_skipped(module_name, usual):
                continue  # output heads and what is tied to them have reasons of their own
            chosen.columns[name] = parameter.shape[-1]
            if transformers_adapter.is_skipped(module_name, skip or []):
                chosen.leave(name, "skip_modules of the recipe")
            elif not module_name.startswith(tower):
                chosen.leave(name, "not part of the language model")
            elif linear and _is_router(model, module_name, module):
                chosen.leave(name, ROUTER)
            elif kept(name) not in (None, dtype):
                chosen.leave(name, "kept in float32 by transformers")
    return chosen


def ignored(model: Any, chosen: Chosen, by_module: bool = False) -> list[str]:
    """The modules that `ignore` has to name: all that have a matrix of weights that is not quantized, but embeddings.

    Experts are one pattern for all of compressed-tensors, or, where the list has to be `by_module`, a name in each layer.
    """
    names = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        if name in chosen.columns or isinstance(model.get_submodule(module), torch.nn.Embedding):
            continue
        if parameter.ndim == 3 and "expert" in name:
            names.add(module if by_module else EXPERTS)
        elif parameter.ndim == 2 and name.endswith(".weight"):
            names.add(module)
    names |= {name for name in output_heads(model) if f"{name}.weight" not in chosen.columns}
    return transformers_adapter.natural_order(names)


def output_heads(model: Any) -> list[str]:
    """The module that makes logits of hidden states, where there is one, by its name."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def quantized_by_transformers(model: Any, quantizer: Any) -> set[str]:
    """The weights of a model that transformers has made ready to load as quantized."""
    names = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    in_parts = transformers_adapter.loaded_in_parts(model, quantizer)
    ignores = quantizer.quantization_config.quantization_config.ignore or []
    if EXPERTS not in ignores:
        names |= {name for name, _ in model.named_parameters() if in_parts(name)}
    return names


def _language_model(model: Any) -> str:
    """The prefix of what works on text: empty for a model that takes nothing else."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config or getattr(model.config, "is_encoder_decoder", False):
        return ""
    for name, module in model.named_modules():
        if name and getattr(module, "config", None) is text:
            return f"{name}."
    return ""


def _is_router(model: Any, name: str, module: Any) -> bool:
    """Whether a linear layer decides how experts are mixed: it lies beside them, and is no expert itself."""
    parent, _, own = name.rpartition(".")
    if not own.endswith(("gate", "router")):
        return False
    return any("expert" in other for other, _ in model.get_submodule(parent).named_children() if other != own)


def as_selection(
    chosen: Chosen, config: dict[str, Any], lists: tuple[str, ...] = ("ignore", "targets"), **rest: Any
) -> Selection:
    """The choice as tame's engine takes it; `lists` are the keys of the config's lists of modules."""
    return Selection(config, chosen.columns.__contains__, reasons=chosen.reasons, lists=lists, **rest)

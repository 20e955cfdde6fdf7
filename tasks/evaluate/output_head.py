"""The model in two parts: the backbone, which makes final hidden states, and the output head, which makes logits of them.

Measuring needs them apart: the logits of a whole text are far too large to keep, its hidden states are not.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import TameError
from tasks.evaluate.cpu_float32 import slow
from tasks.evaluate.memory import free_memory

if TYPE_CHECKING:
    import torch

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
"""Names in config.json for a number that logits are multiplied with or divided by, depending on the architecture."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names in config.json for the bound that a softcap keeps logits under."""


@dataclass
class Head:
    """From final hidden states to logits, as the model does it."""

    weight: "torch.Tensor"
    """[vocabulary, width], the dtype of the model."""
    bias: "torch.Tensor | None"
    scale: float
    softcap: float | None

    def __call__(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits [rows, vocabulary] of `hidden` [rows, width], in the dtype of the model."""
        import torch

        weight, bias = self.factors
        logits = torch.nn.functional.linear(hidden.to(weight.device, weight.dtype), weight, bias).to(self.weight.dtype)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @functools.cached_property
    def factors(self) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Weight and bias as they are multiplied: in float32 where that is the same arithmetic, and quicker."""
        if slow(self.weight) and self.weight.numel() * 4 < 0.3 * free_memory("cpu"):
            return self.weight.float(), None if self.bias is None else self.bias.float()
        return self.weight, self.bias

    def to(self, device: str) -> "Head":
        """The same head with its tensors on `device`."""
        bias = None if self.bias is None else self.bias.detach().to(device)
        return Head(self.weight.detach().to(device), bias, self.scale, self.softcap)


def find_head(model: Any, device: str) -> Head:
    """The model's output head, verified: from hidden states it made the model's own logits for a few tokens.

    What an architecture does to logits after its last linear layer is read from the names in its config; of the
    possibilities, the first that makes the model's own logits is taken.

    Raises:
        TameError: no layer makes these logits, or the head is not a plain linear layer.
    """
    import torch

    heads = list(_candidates(model))
    if heads:
        ids = torch.arange(min(16, heads[0].weight.shape[0]), device=device)[None]
        with torch.inference_mode():
            own = model(input_ids=ids, use_cache=False).logits[0].float()
            with backbone_of(model) as backbone:
                hidden = backbone(ids)[0]
            tolerance = 1e-4 if heads[0].weight.dtype == torch.float32 else 0.02
            for head in heads:
                again = head(hidden).float().to(own.device)
                if not own.isfinite().all() or torch.allclose(
                    own, again, rtol=tolerance, atol=tolerance * float(own.abs().max())
                ):
                    return head
    raise TameError(
        f"{model.config.model_type}: its output head is not one that tame can repeat from hidden states; tame cannot "
        "measure this architecture"
    )


def _candidates(model: Any) -> Iterator[Head]:
    """The heads that the model may have. A softcap comes before none: what it does to small logits cannot be seen."""
    import torch

    layer = model.get_output_embeddings()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if not isinstance(layer, torch.nn.Linear) or layer.weight.dtype not in dtypes:
        return
    config = model.config.get_text_config()
    named = [float(value) for name in SCALES if (value := _number(config, name))]
    softcaps = [float(value) for name in SOFTCAPS if (value := _number(config, name))]
    for scale in dict.fromkeys([*named, *(1 / value for value in named), 1.0]):
        for softcap in (*softcaps, None):
            yield Head(layer.weight, layer.bias, scale, softcap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) else None


@contextmanager
def backbone_of(model: Any) -> "Iterator[Callable[[torch.Tensor], torch.Tensor]]":
    """A function from token ids [batch, tokens] to the final hidden states [batch, tokens, width] that the head gets.

    It runs the model itself with another module in the head's place, so that whatever an architecture does between its
    last block and its head is done.
    """
    import torch

    head = model.get_output_embeddings()

    class Keep(torch.nn.Module):
        """Keeps what the head would get. For all else, such as `lm_head.weight.dtype`, it answers as the head does."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.hidden = hidden
            return hidden[..., :1]

        def __getattr__(self, name: str) -> Any:
            return getattr(head, name)

    keep = Keep()
    name = next(name for name, module in model.named_modules() if module is head)

    def backbone(ids: torch.Tensor) -> torch.Tensor:
        model(input_ids=ids, use_cache=False)
        hidden: torch.Tensor = keep.__dict__.pop("hidden")
        return hidden

    model.set_submodule(name, keep)
    try:
        yield backbone
    finally:
        model.set_submodule(name, head)

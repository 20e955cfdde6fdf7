"""What a variant's `fit` asks for, held against what a mix was measured to do: at the pessimistic end of each interval."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import BadInputError
from configs.method_names import WITH_EXPERTS
from configs.schema import Gate, Variant

if TYPE_CHECKING:
    import torch

    from tasks.fit.walk import Divergence


@dataclass(frozen=True)
class Limits:
    """The limits of damage, by the gate's names, or of size; what is not given is no limit."""

    max_bytes: int | None = None
    max_mean_kl: float | None = None
    max_perplexity_increase: float | None = None
    min_top1_agreement: float | None = None

    def __str__(self) -> str:
        told = [f"weights ≤ {self.max_bytes / 1e6:,.6g} MB"] if self.max_bytes is not None else []
        told += [f"KL ≤ {self.max_mean_kl:g}"] if self.max_mean_kl is not None else []
        if self.max_perplexity_increase is not None:
            told.append(f"perplexity increase ≤ {100 * self.max_perplexity_increase:g} %")
        if self.min_top1_agreement is not None:
            told.append(f"top-1 agreement ≥ {100 * self.min_top1_agreement:g} %")
        return ", ".join(told)


@dataclass(frozen=True)
class Measure:
    """A mix on the fit text: values, and 95 % intervals over its windows."""

    kl: tuple[float, float, float]
    """Mean KL divergence, nats a token: value, low, high."""
    loss: tuple[float, float, float]
    """How much larger the loss of the next token is, nats."""
    agreement: tuple[float, float, float]
    """Share of tokens with the same most likely next token."""

    def damage(self, limits: Limits) -> float:
        """The pessimistic end of what is limited, as a multiple of its limit; the largest, where there are several."""
        found = [self.kl[2] / max(limits.max_mean_kl, 1e-9)] if limits.max_mean_kl is not None else []
        if limits.max_perplexity_increase is not None:
            found.append(max(math.expm1(self.loss[2]), 0.0) / max(limits.max_perplexity_increase, 1e-9))
        if limits.min_top1_agreement is not None:
            found.append((1 - self.agreement[1]) / max(1 - limits.min_top1_agreement, 1e-9))
        return max(found)


def limits_of(variant: Variant, gate: Gate) -> Limits:
    """The limits that a variant is to be fitted to; `gate` is the recipe's.

    Raises:
        BadInputError: the variant is fitted to a gate without limits.
    """
    assert variant.fit is not None
    if variant.fit != "gate":
        return Limits(max_bytes=variant.fit.bytes, max_mean_kl=variant.fit.max_mean_kl)
    if not gate.fitted:
        raise BadInputError(f"{variant.label}: fit is gate, and the gate has no limit that can be fitted")
    return Limits(
        max_mean_kl=gate.max_mean_kl,
        max_perplexity_increase=gate.max_perplexity_increase,
        min_top1_agreement=gate.min_top1_agreement,
    )


def check_no_experts(variant: Variant, where: object) -> None:
    """Refuse to fit a mixture of experts in a format whose experts are opened all in one scheme, or not at all.

    Raises:
        BadInputError: the variant's is such a format.
    """
    if variant.method in WITH_EXPERTS:
        raise BadInputError(
            f"{where}: {variant.label} cannot be fitted, as transformers opens the experts of all layers in one scheme alone; "
            "leave fit out, or name layers in skip_modules"
        )


def measure_of(found: "Divergence") -> Measure:
    """What a walk found on each window, as values with intervals."""
    from tasks.evaluate.statistics import interval

    def told(values: "torch.Tensor") -> tuple[float, float, float]:
        point = float(values.mean())
        low, high = interval(values.numpy(), point, seed=0) or (point, point)
        return point, low, high

    return Measure(kl=told(found.kl), loss=told(found.loss), agreement=told(found.agreement))

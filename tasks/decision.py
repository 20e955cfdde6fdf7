"""Which of a release's variants to use: one rule, on numbers alone.

Of the variants that passed the gate:

1. The smallest is the one to use. tame looks for the smallest model that is still good enough, and the gate has said which are.
   Sizes within NEAR of the smallest count as equal: of these it is one that is less damaged than the smaller ones, by more than
   the measurement leaves open. Nobody gives up four fifths of the damage for 4 % of the size.
2. A larger one is worth naming where it is less damaged than every smaller one that is named, by more than the measurement
   leaves open: the pessimistic end of its damage lies below the optimistic end of theirs. The last of them is for those whose
   answers must be closest to the original's, the others are in between.

Of equal sizes, the less damaged comes first, and then the recipe's order. Damage is the mean KL divergence; the perplexity ratio
where that was not measured for all; without either, only the smallest is named.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from configs.schema import Gate
from tasks.metrics import Metric, pessimistic, read
from tasks.result import Measured, Result, ResultVariant

Purpose = Literal["use", "between", "closest"]
DAMAGES = ("kl_mean", "perplexity_ratio")
"""What tells how far a variant is from the original, the better one first; of both, less is better."""


NEAR = 0.05
"""By which share of the smallest size another may be larger, and count as equally small."""


class Choice(NamedTuple):
    """A variant, and what it is for."""

    name: str
    purpose: Purpose
    size: float
    """Of its weight files, in bytes."""
    smaller: float | None
    """By which share of the original it is smaller; None where that was not measured."""
    damage: Metric | None
    limit: float | None
    """The largest damage that the gate lets through, in the metric of `damage`."""


class Decision(NamedTuple):
    """What to use of a release, the first before all."""

    choices: list[Choice]
    judged: bool
    """Whether the gate has a limit at all: without one, to have passed says nothing."""


def decide(result: Result) -> Decision:
    """Apply the rule to a result."""
    passed = [v for v in result.variants if v.status in ("passed", "published") and "size_bytes" in v.metrics]
    gate = result.recipe.gate
    metric = next((name for name in DAMAGES if all(_damage(variant, name) for variant in passed)), None)
    named = _worth_naming(passed, metric)
    whole = result.baseline.metrics.get("size_bytes") if result.baseline else None
    choices = [
        Choice(
            name=variant.name,
            purpose="use" if rank == 0 else "closest" if rank == len(named) - 1 else "between",
            size=variant.metrics["size_bytes"],
            smaller=1 - variant.metrics["size_bytes"] / whole if whole else None,
            damage=_damage(variant, metric),
            limit=_limit(gate, metric),
        )
        for rank, variant in enumerate(named)
    ]
    return Decision(choices, judged=any(limit is not None for limit in gate.model_dump().values()))


def _worth_naming(passed: Sequence[ResultVariant], metric: str | None) -> list[ResultVariant]:
    smallest = min((variant.metrics["size_bytes"] for variant in passed), default=0.0)

    def order(variant: ResultVariant) -> tuple[float, float]:
        damage = _damage(variant, metric)
        return variant.metrics["size_bytes"], damage.value if damage else 0.0

    named: list[ResultVariant] = []
    best = math.inf
    for variant in sorted(passed, key=order):
        damage = _damage(variant, metric)
        if named and (damage is None or pessimistic(damage) >= best):
            continue
        if len(named) == 1 and variant.metrics["size_bytes"] <= (1 + NEAR) * smallest:
            named.clear()
        named.append(variant)
        best = min(best, math.inf if damage is None else damage.value if damage.low is None else damage.low)
    return named


def _damage(variant: Measured, name: str | None) -> Metric | None:
    found = read(variant.metrics).get(name) if name else None
    return found if found and math.isfinite(found.value) else None


def _limit(gate: Gate, metric: str | None) -> float | None:
    if metric == "kl_mean":
        return gate.max_mean_kl
    if metric == "perplexity_ratio" and gate.max_perplexity_increase is not None:
        return 1 + gate.max_perplexity_increase
    return None

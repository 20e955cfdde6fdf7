"""Decides whether a variant is good enough to publish, from its metrics and the limits alone."""

import math
from typing import NamedTuple

from configs.schema import Gate
from tasks.metrics import Metric, Unit, nats, parse, pessimistic, read
from tasks.values import Verdict


def judge(metrics: dict[str, float], gate: Gate) -> Verdict:
    """Compare `metrics` (contract names) with the limits, on the pessimistic end of each confidence interval.

    A metric without an interval is judged by its value. A limit on a number that was not measured, or is not finite, is not kept.
    """
    numbers = read(metrics)
    checks: list[_Check] = []
    if gate.max_perplexity_increase is not None:
        ratio = numbers.get("perplexity_ratio")
        checks.append(_Check("perplexity increase", ratio, gate.max_perplexity_increase, less=1.0))
    if gate.max_mean_kl is not None:
        checks.append(_Check("KL", numbers.get("kl_mean"), gate.max_mean_kl))
    if gate.min_top1_agreement is not None:
        checks.append(_Check("top-1 agreement", numbers.get("top1_agreement"), gate.min_top1_agreement, at_least=True))
    if gate.max_task_drop is not None:
        checks += _drops(numbers, gate.max_task_drop)
    return Verdict(
        passed=all(check.kept for check in checks),
        reasons=[str(check) for check in checks if not check.kept],
        checked=[str(check) for check in checks if check.kept],
    )


def _drops(numbers: dict[str, Metric], limit: float) -> list["_Check"]:
    """What each task lost, and each task of which nobody knows."""
    drops = {name: metric for name, metric in numbers.items() if parse(name).task and parse(name).role == "difference"}
    checks = [
        _Check(f"{parse(name).task} {parse(name).quantity} drop", metric, limit, sign=-1)
        for name, metric in drops.items()
    ]
    tasks, compared = ({parse(name).task for name in names} - {None} for names in (numbers, drops))
    checks += [_Check(f"{task} drop", None, limit) for task in sorted(str(task) for task in tasks - compared)]
    return checks if tasks else [_Check("task drop", None, limit)]


class _Check(NamedTuple):
    """A limit, and the metric that is held against it."""

    what: str
    metric: Metric | None
    limit: float
    at_least: bool = False
    less: float = 0.0
    """What the metric is when nothing was lost, such as a ratio of 1: the limit counts from there."""
    sign: int = 1

    @property
    def value(self) -> float | None:
        """The pessimistic end of the metric, counted as the limit is."""
        return None if self.metric is None else self.sign * (pessimistic(self.metric) - self.less)

    @property
    def kept(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        unit = {"share": " %", "ratio": " %", "share difference": " points"}.get(
            self.metric.unit if self.metric else "", ""
        )
        scale = 100 if unit else 1
        kept, broken = ("≥", "<") if self.at_least else ("≤", ">")
        if self.metric is None or self.value is None or not math.isfinite(self.value):
            return f"{self.what} was not measured (limit {self.limit:g})"
        number = number_beside(self.value, self.limit, scale, self.metric.unit)
        end = "" if self.metric.low is None or number.startswith("<") else " down to" if self.at_least else " up to"
        return f"{self.what}{end} {number}{unit} {kept if self.kept else broken} limit {scale * self.limit:g}{unit}"


def number_beside(value: float, limit: float, scale: int, unit: Unit) -> str:
    """`value` as every place rounds it, or with as many digits as it takes to show on which side of the limit it is."""
    number = nats(value) if unit == "nats" else f"{scale * value:.2f}" if scale == 100 else f"{scale * value:.4g}"
    if number.startswith("<") or _tells(number, value, limit, scale):
        return number if unit == "nats" else number.replace("-", "−")
    longer = (f"{scale * value:.{digits}g}" for digits in range(4, 17))
    return next((text for text in longer if _tells(text, value, limit, scale)), f"{scale * value:.17g}")


def _tells(number: str, value: float, limit: float, scale: int) -> bool:
    """Whether the rounded `number` lies on the side of the limit that `value` is on."""
    shown = float(number.replace(",", ""))
    return (shown > scale * limit) == (value > limit) and (shown < scale * limit) == (value < limit)

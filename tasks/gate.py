"""Is a variant good enough to publish? Pure: numbers and limits in, a verdict out."""

import math
from typing import NamedTuple

from prefect import task

from configs.schema import Gate
from tasks.metrics import Metric, nats, parse, read
from tasks.values import Verdict


def judge(metrics: dict[str, float], gate: Gate) -> Verdict:
    """Compare `metrics` (contract names) with the limits, on the pessimistic end of each confidence interval.

    The pessimistic end of what should be small is `<name>_high`, of what should be large `<name>_low`; a metric without
    an interval is judged by its value. A limit on a number that was not measured, or is not finite, is not kept.
    """
    numbers = read(metrics)
    checks: list[_Check] = []
    if gate.max_perplexity_increase is not None:
        ratio = _high(numbers.get("perplexity_ratio"))
        checks.append(_Check("perplexity increase", None if ratio is None else ratio - 1, gate.max_perplexity_increase))
    if gate.max_mean_kl is not None:
        checks.append(_Check("kl_mean", _high(numbers.get("kl_mean")), gate.max_mean_kl))
    if gate.min_top1_agreement is not None:
        checks.append(_Check("top1_agreement", _low(numbers.get("top1_agreement")), gate.min_top1_agreement, True))
    if gate.max_task_drop is not None:
        drops = {
            name: metric for name, metric in numbers.items() if parse(name).task and parse(name).role == "difference"
        }
        for name, metric in drops.items():
            low = _low(metric)
            what = f"task/{parse(name).task}/{parse(name).quantity} drop"
            checks.append(_Check(what, None if low is None else -low, gate.max_task_drop))
        tasks, compared = ({parse(name).task for name in names} - {None} for names in (numbers, drops))
        for task in sorted(str(task) for task in tasks - compared):
            checks.append(_Check(f"task/{task} drop", None, gate.max_task_drop))
        if not tasks:
            checks.append(_Check("task drop", None, gate.max_task_drop))
    return Verdict(
        passed=all(check.kept for check in checks),
        reasons=[str(check) for check in checks if not check.kept],
        checked=[str(check) for check in checks if check.kept],
    )


class _Check(NamedTuple):
    """A limit, and the number that is held against it."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        kept, broken = ("≥", "<") if self.at_least else ("≤", ">")
        if self.value is None or not math.isfinite(self.value):
            return f"{self.name} was not measured (limit {kept} {self.limit:g})"
        value = nats(self.value) if self.name == "kl_mean" and abs(self.value) < 1e-6 else f"{self.value:.4g}"
        return f"{self.name} {value} {kept if self.kept else broken} {self.limit:g}"


def _low(metric: Metric | None) -> float | None:
    return None if metric is None else metric.value if metric.low is None else metric.low


def _high(metric: Metric | None) -> float | None:
    return None if metric is None else metric.value if metric.high is None else metric.high


@task(name="gate", task_run_name="gate {variant}")
def gate_task(variant: str, metrics: dict[str, float], gate: Gate) -> Verdict:
    """`judge` in the flow."""
    return judge(metrics, gate)

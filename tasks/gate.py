"""Is a variant good enough to publish? Pure: numbers and limits in, a verdict out."""

import math

from prefect import task

from configs.schema import Gate
from tasks.values import Verdict


def judge(metrics: dict[str, float], gate: Gate) -> Verdict:
    """Compare `metrics` (contract names) with the limits, on the pessimistic end of each confidence interval.

    The pessimistic end of what should be small is `<name>_high`, of what should be large `<name>_low`; a metric without
    an interval is judged by its value. A limit on a number that was not measured, or is not finite, is not kept.
    """
    checks: list[tuple[str, float | None, float, bool]] = []
    if gate.max_perplexity_increase is not None:
        ratio = _end(metrics, "perplexity_ratio", "high")
        checks.append(
            ("perplexity increase", None if ratio is None else ratio - 1, gate.max_perplexity_increase, False)
        )
    if gate.max_mean_kl is not None:
        checks.append(("kl_mean", _end(metrics, "kl_mean", "high"), gate.max_mean_kl, False))
    if gate.min_top1_agreement is not None:
        checks.append(("top1_agreement", _end(metrics, "top1_agreement", "low"), gate.min_top1_agreement, True))
    if gate.max_task_drop is not None:
        differences = [name for name in metrics if name.startswith("task/") and name.endswith("_difference")]
        for name in differences:
            low = _end(metrics, name, "low")
            checks.append(
                (name.removesuffix("_difference") + " drop", None if low is None else -low, gate.max_task_drop, False)
            )
        tasks = {name.split("/")[1] for name in metrics if name.startswith("task/")}
        paired = {name.split("/")[1] for name in differences}
        for task in sorted(tasks - paired) if tasks else [None]:
            checks.append((f"task/{task} drop" if task else "task drop", None, gate.max_task_drop, False))
    reasons, kept = [], []
    for name, value, limit, at_least in checks:
        sign, broken = ("≥", "<") if at_least else ("≤", ">")
        if value is None or not math.isfinite(value):
            reasons.append(f"{name} was not measured (limit {sign} {limit:g})")
        elif (value >= limit) if at_least else (value <= limit):
            kept.append(f"{name} {value:.4g} {sign} {limit:g}")
        else:
            reasons.append(f"{name} {value:.4g} {broken} {limit:g}")
    return Verdict(passed=not reasons, reasons=reasons, checked=kept)


def _end(metrics: dict[str, float], name: str, end: str) -> float | None:
    return metrics.get(f"{name}_{end}", metrics.get(name))


@task(name="gate", task_run_name="gate {variant}")
def gate_task(variant: str, metrics: dict[str, float], gate: Gate) -> Verdict:
    """`judge` in the flow."""
    return judge(metrics, gate)

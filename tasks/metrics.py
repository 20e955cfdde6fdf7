"""The numbers of a result: what they are called, their intervals, their units. Names are taken apart here, and nowhere else.

In files (result.json, tame.json, MLflow) numbers are flat, by the names of the contract: `kl_mean` with `kl_mean_low` and
`kl_mean_high`, `task/piqa/acc` with `task/piqa/acc_difference` (to the baseline) and `task/piqa/acc_p` (McNemar's),
`floor_kl_mean`. `read` makes each of them, with its interval, a `Metric`.
"""

from typing import Literal, NamedTuple

Unit = Literal[
    "bytes", "seconds", "tokens/s", "bits", "nats", "share", "share difference", "difference", "ratio", "count",
    "probability", "number",
]  # fmt: skip
Role = Literal["value", "difference", "recovery", "p", "floor"]

SHARES = ("acc", "exact_match", "em", "f1", "pass", "prompt_level", "inst_level")
"""How the names of those of lm-eval's metrics begin that are between 0 and 1."""


class Metric(NamedTuple):
    """A number with its 95 % interval, where it has one."""

    name: str
    value: float
    low: float | None
    high: float | None
    unit: Unit
    measured: bool
    """Whether it is a time, a speed or memory, of which another run of the same gives another."""


class Name(NamedTuple):
    """The name of a metric in its parts; `task/piqa/acc_difference` is the difference of `acc` of the task piqa."""

    task: str | None
    quantity: str
    role: Role


def parse(name: str) -> Name:
    """The parts of `name`, which is not an end of an interval."""
    task, quantity = None, name
    if name.startswith("task/"):
        task, _, quantity = name.removeprefix("task/").rpartition("/")
    if quantity.startswith("floor_"):
        return Name(task, quantity.removeprefix("floor_"), "floor")
    if quantity.endswith("_difference"):
        return Name(task, quantity.removesuffix("_difference"), "difference")
    if task is not None and quantity.endswith("_recovery"):
        return Name(task, quantity.removesuffix("_recovery"), "recovery")
    if task is not None and quantity.endswith("_p"):
        return Name(task, quantity.removesuffix("_p"), "p")
    return Name(task, quantity, "value")


def unit_of(name: str) -> Unit:
    """What the number `name` counts; an end of an interval counts what its metric does."""
    task, quantity, role = parse(name.removesuffix("_low").removesuffix("_high"))
    if role == "p":
        return "probability"
    if role == "recovery":
        return "share"
    unit = _unit(task, quantity, role)
    if role == "difference":
        return "share difference" if unit == "share" else "difference"
    return unit


def _unit(task: str | None, quantity: str, role: Role) -> Unit:
    if quantity.endswith("_bytes"):
        return "bytes"
    if quantity.endswith("_seconds"):
        return "seconds"
    if quantity.endswith("_per_second"):
        return "tokens/s"
    if quantity == "bits_per_weight":
        return "bits"
    if quantity == "perplexity_ratio":
        return "ratio"
    if task is not None and quantity in ("flips", "items") and role != "floor":
        return "count"
    if quantity.startswith("kl_"):
        return "nats"
    if quantity.startswith("weight_error") or quantity in ("quantized_share", "top1_agreement", "flips"):
        return "share"
    return "share" if task is not None and quantity.startswith(SHARES) else "number"


def read(flat: dict[str, float]) -> dict[str, Metric]:
    """The metrics in `flat` by their names, in its order; ends of intervals are part of their metric."""
    ends = {f"{name}{end}" for name in flat for end in ("_low", "_high")} & flat.keys()
    return {
        name: Metric(
            name=name,
            value=value,
            low=flat.get(f"{name}_low"),
            high=flat.get(f"{name}_high"),
            unit=unit_of(name),
            measured=measured(name),
        )
        for name, value in flat.items()
        if name not in ends
    }


def interval(flat: dict[str, float], name: str) -> tuple[float, float] | None:
    """The ends of the interval of the metric `name`, where there is one."""
    low, high = flat.get(f"{name}_low"), flat.get(f"{name}_high")
    return None if low is None or high is None else (low, high)


def measured(name: str) -> bool:
    """Whether `name` is a time, a speed or memory while running, or an end of its interval."""
    return unit_of(name) in ("seconds", "tokens/s") or name.removesuffix("_low").removesuffix("_high").endswith(
        "memory_bytes"
    )


def difference(name: str) -> str:
    """What the difference of the metric `name` to the baseline is called; of the perplexity, it is the ratio."""
    return "perplexity_ratio" if name == "perplexity" else f"{name}_difference"


def is_score(name: str) -> bool:
    """Whether `name` is the score of a task, between 0 and 1."""
    task, _, role = parse(name)
    return task is not None and role == "value" and unit_of(name) == "share"


def pessimistic(metric: Metric) -> float:
    """The end of its interval that limits are held against: the high one of what should be small, the low one of what should
    be large; of what has no interval, the value."""
    large = metric.unit == "share difference" or metric.name == "top1_agreement" or is_score(metric.name)
    large = large or parse(metric.name).role == "recovery"
    end = metric.low if large else metric.high
    return metric.value if end is None else end


def nats(value: float) -> str:
    """A KL divergence as people read it. Below 1e-6 it is nothing but rounding, and so is a little below zero, where none can be.

    What is further below zero is no rounding, and is shown.
    """
    if value and ROUNDING < value < 1e-6:
        return "< 1e-6"
    return f"{value:.2g}" if value and abs(value) < 1e-3 else f"{value:,.4f}"


ROUNDING = -1e-4
"""Nats. Summing probabilities over a vocabulary in float32 is off by less."""

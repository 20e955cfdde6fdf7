"""Numbers as people see them: figures, labels, intervals, verdicts, a table.

Every place that shows a number to a person (the terminal, Prefect, the report, the model card) rounds it with
`figure`, so that all say the same. Files for programs (result.json, MLflow) keep the number unrounded.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from configs.errors import line
from tasks.metrics import Unit, interval, nats, parse, read, unit_of
from tasks.result import Measured, Result, ResultVariant
from tasks.values import Protocol

# The contract's metrics in reading order: what it costs in quality, then in size, then in time.
LABELS = {
    "size_bytes": "Size",
    "bits_per_weight": "Bits per weight",
    "quantized_share": "Parameters quantized",
    "perplexity": "Perplexity",
    "perplexity_ratio": "Perplexity ratio",
    "kl_mean": "KL divergence, mean (nats)",
    "kl_median": "KL divergence, median (nats)",
    "kl_p99": "KL divergence, 99th percentile (nats)",
    "kl_max": "KL divergence, maximum (nats)",
    "floor_kl_mean": "Noise floor of the KL divergence (nats)",
    "top1_agreement": "Top-1 agreement",
    "floor_top1_agreement": "Noise floor of the agreement",
    "weight_error_mean": "Error of the weights, mean over layers",
    "weight_error_max": "Error of the weights, worst layer",
    "load_seconds": "Load time",
    "peak_memory_bytes": "Peak memory",
    "peak_host_memory_bytes": "Peak host memory",
    "time_to_first_token_seconds": "Time to first token",
    "prefill_tokens_per_second": "Prefill (tokens/s)",
    "decode_tokens_per_second": "Decode (tokens/s)",
}
KINDS = {
    ("flips", "value"): "answers that changed",
    ("flips", "floor"): "noise floor of the changes",
    ("items", "value"): "questions",
}
ROLES = {"difference": " difference", "recovery": ", recovered", "p": ", McNemar's p"}


def figure(name: str, value: float | None) -> str:
    """`value` of the metric `name` (contract names, intervals included) as people read it; "–" for None.

    Sizes in decimal units, shares and accuracies in percent, accuracy differences in percentage points, speeds to three
    significant digits. The unit is in the figure, or, for nats and tokens/s, in `label(name)`.
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return FIGURES[unit_of(name)](value)


def label(name: str) -> str:
    """What people call the metric `name`: "KL divergence, mean (nats)"; task metrics as "piqa: acc"."""
    task, quantity, role = parse(name)
    if task is not None:
        return f"{task}: {KINDS.get((quantity, role), quantity)}{ROLES.get(role, '')}"
    return LABELS.get(name, name.replace("_", " "))


def span(name: str, metrics: dict[str, float]) -> str:
    """The 95 % interval of `name` as people read it, "0.0180 to 0.0201", or "" where there is none."""
    ends = interval(metrics, name)
    return f"{figure(name, ends[0])} to {figure(name, ends[1])}" if ends else ""


def points(metrics: list[dict[str, float]]) -> list[str]:
    """The names of all metrics in `metrics` that are not ends of an interval, in reading order."""
    found = read({name: value for values in metrics for name, value in values.items()})
    order = {name: rank for rank, name in enumerate(LABELS)}
    return sorted(found, key=lambda name: (order.get(name, len(order)), name))


NOT_MEASURED = "not measured"
"""What every place says of a model that the recipe has not let be measured (`evaluate: null`)."""
VERDICTS = ("failed", "rejected", "passed", NOT_MEASURED, "published", f"published, {NOT_MEASURED}", "measured")
"""From the worst on."""


def table(result: Result) -> list[dict[str, str]]:
    """A row for the baseline and each variant: name, verdict, and every metric as `figure` and `span` give it."""
    measured = rows(result)
    names = points([row.metrics for row in measured])
    return [
        {"variant": row.name, "verdict": verdict(row), **{label(name): cell(name, row.metrics) for name in names}}
        for row in measured
    ]


def short_name(model: str) -> str:
    """What people call a model: the last part of a repo id or a path, without `.gguf`."""
    return PurePath(model).name.removesuffix(".gguf")


def rows(result: Result) -> list[Measured]:
    """The baseline, if it was measured, and the variants."""
    return [*([result.baseline] if result.baseline else []), *result.variants]


def verdict(measured: Measured) -> str:
    """The status of a variant, and whether it was measured; `baseline` for the baseline."""
    if not isinstance(measured, ResultVariant):
        return "baseline"
    if measured.measured:
        return measured.status
    return {"passed": NOT_MEASURED, "published": f"published, {NOT_MEASURED}"}.get(measured.status, measured.status)


def cell(name: str, metrics: dict[str, float]) -> str:
    """A metric with its interval: `0.0189 (0.0171 to 0.0209)`."""
    between = span(name, metrics)
    return figure(name, metrics.get(name)) + (f" ({between})" if between else "")


def settings(protocol: Protocol) -> dict[str, str]:
    """A protocol as people read it: flat, its noise floor as figures."""
    fields = protocol.model_dump()
    floor = fields.get("floor") or {}
    values = {
        f"floor.{name}": figure(f"floor_{name}", value)
        for name, value in floor.items()
        if name in ("kl_mean", "top1_agreement")
    }
    return flat("", fields) | values


def flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested mappings as dotted keys; lists as JSON; what is None or empty is left out."""
    if isinstance(value, dict):
        items: dict[str, str] = {}
        for key, inner in value.items():
            items |= flat(f"{prefix}.{key}" if prefix else str(key), inner)
        return items
    if value is None or value in ([], ""):
        return {}
    return {re.sub(r"[^\w./ :-]", "-", prefix): value if isinstance(value, str) else json.dumps(value)}


def plain(text: str) -> str:
    """Text that Markdown shows as it is: models' names, errors and notes may hold anything."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line(text, limit=None))


def _size(value: float) -> str:
    for unit, scale, decimals in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if abs(value) >= scale:
            return f"{value / scale:.{decimals}f} {unit}"
    return f"{value:.0f} bytes"


def _decimals(value: float, decimals: int) -> str:
    """Fixed decimals; what they would leave less than two digits of keeps two."""
    if value and abs(value) < 10 ** (1 - decimals):
        return f"{value:.2g}"
    return f"{value:,.{decimals}f}"


def _digits(value: float, digits: int) -> str:
    """Significant digits without an exponent: 1809.6 is 1,810, 4.7512 is 4.75."""
    if not value:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _signed(text: str) -> str:
    return text.replace("-", "−")


FIGURES: dict[Unit, Callable[[float], str]] = {
    "bytes": _size,
    "seconds": _seconds,
    "tokens/s": lambda value: _digits(value, 3),
    "bits": lambda value: f"{value:.2f}",
    "nats": nats,
    "share": lambda value: f"{100 * value:.2f} %",
    "share difference": lambda value: _signed(f"{100 * value:+.2f} points"),
    "difference": lambda value: _signed(f"{value:+.4g}"),
    "ratio": lambda value: f"{value:.4f}",
    "count": lambda value: f"{value:,.0f}",
    "probability": lambda value: f"{value:.3f}" if value >= 0.001 else "<0.001",
    "number": lambda value: _decimals(value, 3),
}

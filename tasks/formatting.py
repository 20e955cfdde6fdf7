"""Numbers and results as people see them: figures, labels, intervals, the decision, the headline, a table, a page of Markdown.

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
from tasks.decision import Choice, decide
from tasks.metrics import Unit, interval, nats, parse, pessimistic, read, unit_of
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


def outcome(result: Result) -> str:
    """The release in a word, the worst of its variants': Failed, Rejected, Passed or Published."""
    verdicts = {verdict(variant) for variant in result.variants}
    return next(word.capitalize() for word in VERDICTS if word in verdicts)


def ending(statuses: set[str]) -> str:
    """The name of the state that a run ends in which has not failed, by the statuses of its variants.

    Rejected only where nothing passed: beside four variants that were published, one that was rejected is no reason to stop.
    """
    if "rejected" not in statuses:
        return "Completed"
    return "Partly rejected" if statuses - {"rejected", "measured", "baseline"} else "Rejected"


def tally(result: Result) -> str:
    """How its variants fared, the best first: `4 published, 1 rejected`; in a word where all fared alike: `passed`.

    What was published has passed, if it was measured, so that a release of published variants alone is `passed`, too.
    """
    verdicts = [verdict(variant) for variant in result.variants]
    if len(set(verdicts)) == 1:
        return {"published": "passed"}.get(verdicts[0], verdicts[0])
    return ", ".join(f"{verdicts.count(word)} {word}" for word in reversed(VERDICTS) if word in verdicts)


def short(result: Result) -> str:
    """The release as a name says it: `use nf4-cal (57 % smaller than the original, KL up to 0.05) – 4 published, 1 rejected`."""
    if result.error:
        return "failed"
    choices = decide(result).choices
    if not choices:
        return f"use none – {tally(result)}"
    first = choices[0]
    worth = [] if first.smaller is None else [f"{_smaller(first.smaller)} than {_original(result)}"]
    worth += [_cost(first)] if first.damage else []
    return (
        f"use {first.name} ({', '.join(worth)}) – {tally(result)}" if worth else f"use {first.name} – {tally(result)}"
    )


def headline(result: Result) -> str:
    """The release in a line, the worst first: `Rejected: KL up to 0.131 > limit 0.1 for nf4. Published: int8`."""
    parts = [f"Failed: {line(result.error, limit=None)}"] if result.error else []
    judged = [variant for variant in result.variants if not result.error or variant.error != result.error]
    for said in VERDICTS:
        variants = [variant for variant in judged if verdict(variant) == said]
        if variants:
            parts.append(f"{said.capitalize()}: {'; '.join(map(_why, variants))}")
    return ". ".join(parts)


def advice(result: Result) -> str:
    """What to use of a release and why, in a sentence: `tasks.decision`'s rule in words. Empty where there are no variants."""
    decision = decide(result)
    if not decision.choices:
        return "" if result.error else "Use none of these: no variant passed."
    first, *others = decision.choices
    parts = [f"{first.name}: {_worth(first, f' than {_original(result)}')}"]
    if decision.judged:
        parts[0] = f"Use {parts[0]}"
    elif result.recipe.evaluate is None:
        parts[0] = f"Nobody knows what is good enough: it was {NOT_MEASURED}. The smallest is {parts[0]}"
    else:
        parts[0] = f"No limit was set, so that nobody knows what is good enough. The smallest is {parts[0]}"
    return "; ".join(parts + [f"{one.name} {PURPOSES[one.purpose]}: {_worth(one)}" for one in others]) + "."


PURPOSES = {"use": "", "between": "for something in between", "closest": "if answers must be closest to the original's"}


def meaning(result: Result) -> str:
    """What the KL divergence is, for whoever meets it here first; empty where none was measured."""
    return KL if any("kl_mean" in variant.metrics for variant in result.variants) else ""


KL = (
    "KL (KL divergence) is how far a variant's probabilities for the next token are from the original's: 0 means the same. "
    "“Up to” is the upper end of its 95 % interval. A limit is held against that end."
)


def _worth(choice: Choice, than: str = "") -> str:
    """What a variant saves, and what it costs at the pessimistic end: `111.9 MB, 57 % smaller, KL up to 0.02 (limit 0.1)`."""
    size = figure("size_bytes", choice.size)
    if choice.smaller is not None:
        size = f"{size}, {_smaller(choice.smaller)}{than}"
    if choice.damage is None:
        return size
    return f"{size}, {_cost(choice)}" + ("" if choice.limit is None else f" (limit {choice.limit:g})")


def _original(result: Result) -> str:
    """What sizes are compared with. Of a GGUF file it is not the file, but what was read from it."""
    bits = result.baseline.metrics.get("bits_per_weight") if result.baseline else None
    unpacked = bits is not None and result.source.model.lower().endswith(".gguf")
    return f"the original in {bits:.0f} bits" if unpacked else "the original"


def _smaller(share: float) -> str:
    return f"{100 * abs(share):.0f} % {'smaller' if share >= 0 else 'larger'}"


def _cost(choice: Choice) -> str:
    """The pessimistic end of a choice's damage, which was measured: `KL up to 0.02`."""
    assert choice.damage is not None
    up_to = " up to" if choice.damage.high is not None else ""
    return f"{DAMAGE[choice.damage.name]}{up_to} {figure(choice.damage.name, pessimistic(choice.damage))}"


DAMAGE = {"kl_mean": "KL", "perplexity_ratio": "perplexity ratio"}


def _why(variant: ResultVariant) -> str:
    if variant.status == "failed":
        return f"{variant.name} ({line(variant.error or 'no reason given', limit=None)})"
    if variant.status == "rejected" and variant.gate:
        return f"{', '.join(variant.gate.reasons)} for {variant.name}"
    return variant.name


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


def markdown(result: Result) -> str:
    """The release on one screen of Markdown: decision, headline, a table of what matters most, what to know, where things are."""
    measured = rows(result)
    main = ("size_bytes", "perplexity", "kl_mean", "top1_agreement", "peak_memory_bytes", "decode_tokens_per_second")
    names = [name for name in main if any(name in row.metrics for row in measured)]
    lines = [f"**{plain(sentence)}**\n" for sentence in (advice(result), headline(result)) if sentence]
    lines += [f"{meaning(result)}\n"] if meaning(result) else []
    lines += [f"{plain(result.source.model)} at `{_commit(result)}`", ""]
    lines += ["| " + " | ".join(["variant", "verdict", *map(label, names)]) + " |"]
    lines += ["|" + " --- |" * (len(names) + 2)]
    for row in measured:
        cells = [row.name, verdict(row), *(cell(name, row.metrics) for name in names)]
        lines.append("| " + " | ".join(map(plain, cells)) + " |")
    notes = dict.fromkeys(note for row in measured for note in row.notes)
    lines += ["", *(f"- {plain(note)}" for note in notes)]
    lines += [
        f"- {plain(variant.name)}: {_address(variant.published)}" for variant in result.variants if variant.published
    ]
    return "\n".join(lines).rstrip() + "\n"


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


def _commit(result: Result) -> str:
    return result.source.commit or f"sha256 {result.source.digest[:12]}"


def _address(address: str) -> str:
    return f"<{address}>" if re.fullmatch(r"https?://[^\s<>]+", address) else f"`{address.replace('`', '')}`"


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

"""Plots as inline SVG: their colours follow the page (light, dark, print), their bytes only the numbers.

Every function returns the SVG and a sentence that says the same to somebody who cannot see it, or None where there is
nothing to draw.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any, TypeVar

from tasks.evaluate import evidence
from tasks.formatting import cell, figure, label, rows
from tasks.metrics import read
from tasks.result import Measured, Result, ResultVariant

Row = TypeVar("Row", bound=Measured)
Plot = tuple[str, str]
"""SVG markup, and its text alternative."""

# Stand-ins that matplotlib draws with, and what the page puts in their place.
INKS = {
    "#010101": "currentColor",
    "#020202": "var(--line)",
    "#030303": "var(--muted)",
    "#040404": "var(--pass)",
    "#050505": "var(--reject)",
    "#060606": "var(--fail)",
    "#110101": "var(--first)",
    "#110202": "var(--second)",
    "#110303": "var(--third)",
    "#110404": "var(--fourth)",
}
TEXT, LINE, MUTED, PASS, REJECT, FAIL, *SERIES = INKS
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 5.2
"""Inches: at 72 points an inch the text stays readable on a phone's 350 pixels."""
LONGEST = 18
LINES = 8
"""Kinds of layers in a plot: a colour and a dash each, twice the colours."""


def judged(result: Result, name: str, limit: float | None) -> Plot | None:
    """The metric `name` of each variant, with the interval that is judged, and the gate's limit. Each variant has a row.

    The row of the smallest checkpoint comes first. Names, sizes and figures stand beside the rows, so that no two labels overlap,
    however equal the values are.
    """
    shown = sorted(_drawable(result.variants, name), key=lambda row: row.metrics.get("size_bytes", math.inf))
    if not shown:
        return None
    canvas, axes = _axes(0.85 + 0.46 * len(shown))
    ends = [_ends(row, name) for row in shown]
    for i, (row, (low, high)) in enumerate(zip(shown, ends, strict=True)):
        value = row.metrics[name]
        around = [[value - low], [high - value]]
        axes.errorbar(value, i, xerr=around, fmt=_marker(row), color=_ink(row), markersize=7, capsize=4, elinewidth=1.6)
        _beside(axes, i, figure(name, value))
    size = [f"{_short(row.name)}\n{figure('size_bytes', row.metrics.get('size_bytes'))}" for row in shown]
    _rows(axes, size)
    reach = [end for pair in ends for end in pair] + ([] if limit is None else [limit])
    whole = WHOLE[name]
    left, right = min([*reach, whole]), max([*reach, whole])
    room = 0.06 * (right - left) or 0.06 * abs(right) or 1.0
    axes.set_xlim(left - room * (left < whole), right + room * (right > whole))
    axes.axvline(whole, color=MUTED, linewidth=1.4)
    if limit is not None:
        axes.axvline(limit, color=REJECT, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"limit {100 * limit:g} %" if name == "top1_agreement" else f"limit {limit:g}",
            (limit, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=11,
        )
    axes.xaxis.get_major_locator().set_params(nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if name == "top1_agreement" else f"{value:g}")
    axes.set_xlabel(label(name), fontsize=12)
    said = "; ".join(
        f"{row.name} {figure('size_bytes', row.metrics.get('size_bytes'))}, {cell(name, row.metrics)}" for row in shown
    )
    kept = "" if limit is None else f" The limit is {figure(name, limit)}."
    return _svg(canvas, f"judged-{name}"), f"{label(name)}, the smallest first: {said}.{kept}"


WHOLE = {"kl_mean": 0.0, "perplexity_ratio": 1.0, "top1_agreement": 1.0}
"""What the metrics that are judged are where nothing was lost."""


def _ends(row: Measured, name: str) -> tuple[float, float]:
    """The ends of the interval of `name`, or its value twice; around the value in any case."""
    metric = read(row.metrics)[name]
    low, high = (end if end is not None and isfinite(end) else metric.value for end in (metric.low, metric.high))
    return min(low, metric.value), max(high, metric.value)


def bars(result: Result, name: str) -> Plot | None:
    """The metric `name` of the baseline and each variant as bars, with the range of the repeats where it is known."""
    shown = _drawable(rows(result), name)
    if not shown:
        return None
    canvas, axes = _axes(0.4 + 0.36 * len(shown))
    axes.barh(range(len(shown)), [row.metrics[name] for row in shown], color=[_ink(row) for row in shown], height=0.62)
    for i, row in enumerate(shown):
        low, high = _ends(row, name)
        if low < high:
            axes.plot([low, high], [i, i], color=TEXT, linewidth=1.4, marker="|", markersize=9)
        _beside(axes, i, figure(name, row.metrics[name]))
    _rows(axes, [_short(row.name) for row in shown])
    axes.set_xticks([])
    axes.set_xlim(left=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    said = ", ".join(f"{row.name} {cell(name, row.metrics)}" for row in shown)
    return _svg(canvas, f"bars-{name}"), f"{label(name)}: {said}."


def windows(result: Result) -> Plot | None:
    """The KL divergence of each window of the text, as a box a variant: is the damage even, or in some places?"""
    variants = sorted(result.variants, key=lambda row: row.metrics.get("size_bytes", math.inf))
    found = [(row, values) for row in variants if (values := evidence.windows(row.evidence).get("kl", []))]
    if not found:
        return None
    canvas, axes = _axes(0.75 + 0.5 * len(found))
    for i, (row, values) in enumerate(found):
        style = {"color": _ink(row), "linewidth": 1.4}
        axes.boxplot(
            values,
            orientation="horizontal",
            positions=[i],
            widths=0.5,
            whis=(5, 95),
            manage_ticks=False,
            boxprops=style,
            whiskerprops=style,
            capprops=style,
            medianprops={"color": TEXT, "linewidth": 2},
            flierprops={"marker": ".", "markersize": 4, "markeredgecolor": _ink(row)},
        )
    _rows(axes, [_short(row.name) for row, _ in found])
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set_xlabel("KL divergence of a window (nats)", fontsize=12)
    said = "; ".join(
        f"{row.name}: median {figure('kl_mean', sorted(values)[len(values) // 2])}, "
        f"{figure('kl_mean', min(values))} to {figure('kl_mean', max(values))}"
        for row, values in found
    )
    return _svg(canvas, "windows"), f"KL divergence by window of the text, {len(found[0][1])} windows. {said}."


def positions(result: Result) -> Plot | None:
    """The mean KL divergence by position in the window, a line a variant: does it grow with the context?"""
    found = [(row, parts) for row in result.variants if len(parts := evidence.positions(row.evidence)) > 1]
    if not found:
        return None
    canvas, axes = _axes(3.2)
    for i, (row, parts) in enumerate(found):
        ends, values = [part["to"] for part in parts], [part["kl_mean"] for part in parts]
        axes.plot(ends, values, marker="osD^v"[i % 5], color=_ink(row), label=_short(row.name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL divergence (nats) up to this position in the window", fontsize=12)
    axes.legend(frameon=False, fontsize=11, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    said = "; ".join(
        f"{row.name}: {figure('kl_mean', parts[0]['kl_mean'])} up to {parts[0]['to']}, "
        f"{figure('kl_mean', parts[-1]['kl_mean'])} from {parts[-1]['from']} on"
        for row, parts in found
    )
    return _svg(canvas, "positions"), f"KL divergence by position in the window. {said}."


def layers(row: ResultVariant) -> Plot | None:
    """The relative error of a variant's weights over depth, a line a kind of layer; experts of a depth as their mean."""
    found = evidence.layers(row.evidence)
    sizes: Counter[str] = Counter()
    kinds: dict[str, dict[int, list[float]]] = {}
    for layer in found:
        sizes[layer.kind] += layer.parameters
        kinds.setdefault(layer.kind, {}).setdefault(layer.depth, []).append(layer.error)
    shown = [kind for kind in kinds if kind in dict(sizes.most_common(LINES))]
    if not shown:
        return None
    canvas, axes = _axes(2.9 + 0.22 * (len(shown) // 4))
    said = []
    for i, (kind, name) in enumerate(zip(shown, _distinct(shown), strict=True)):
        points = sorted((depth, sum(errors) / len(errors)) for depth, errors in kinds[kind].items())
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[i % len(MARKERS)],
            markevery=max(1, len(points) // 6),
            color=SERIES[i % len(SERIES)],
            linestyle="-" if i < len(SERIES) else "--",
            linewidth=1.3,
            markersize=5,
            label=_short(name),
        )
        low, high = (figure("weight_error", f(error for _, error in points)) for f in (min, max))
        worst = max(points, key=lambda point: point[1])[0]
        said.append(f"{name} {low} to {high}, most at depth {worst}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel("Depth", fontsize=12)
    axes.legend(frameon=False, fontsize=11, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    rest = f" The {len(shown)} largest of {len(kinds)} kinds." if len(kinds) > len(shown) else ""
    file = re.sub(r"[^\w.-]", "-", row.name)
    return _svg(canvas, f"layers-{file}"), f"Error of the weights of {row.name} by depth: {'; '.join(said)}.{rest}"


def over_time(series: dict[str, list[tuple[int, float]]], ticks: list[str], name: str) -> Plot | None:
    """The metric `name` by release, a line a variant; points are (index of the release in `ticks`, value)."""
    series = {variant: points for variant, points in series.items() if points}
    if not series:
        return None
    canvas, axes = _axes(2.7)
    for i, (variant, points) in enumerate(sorted(series.items())):
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[i % len(MARKERS)],
            color=SERIES[i % len(SERIES)],
            linewidth=1.4,
            markersize=5,
            label=_short(variant),
        )
    every = -(-len(ticks) // 6)
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    axes.yaxis.set_major_formatter(lambda value, _: figure(name, value))
    axes.margins(x=0.08, y=0.15)
    if not name.endswith("_ratio"):
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=11, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    said = "; ".join(
        f"{variant} {', '.join(figure(name, value) for _, value in series[variant])}" for variant in sorted(series)
    )
    return _svg(canvas, f"history-{name}"), f"{label(name)} by release, oldest first: {said}."


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = canvas.add_subplot()
    canvas.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(colors=TEXT, labelsize=12, color=MUTED)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    return canvas, axes


def _rows(axes: Any, names: list[str]) -> None:
    """A row for each of `names`, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _beside(axes: Any, row: int, text: str) -> None:
    """Write `text` to the right of a row."""
    axes.annotate(
        text,
        (1.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=12,
    )


def _svg(canvas: Any, name: str) -> str:
    """A figure as inline SVG without ids that could meet another figure's, dates or fixed colours."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "font.family": "sans-serif",
        "text.usetex": False,
        "text.parse_math": False,
    }
    for text in canvas.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
        if text.get_color() == "black":
            text.set_color(TEXT)
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", "".join(re.findall(r'url\(#[^)]*\)|href="#[^"]*"', svg))))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ?', r"<svg \1", svg)
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ?', r"<svg \1", svg)
    for stand_in, ink in INKS.items():
        svg = svg.replace(stand_in, ink)
    named = f'<svg data-name="{name}" aria-hidden="true" focusable="false" '
    return re.sub(r"\n\s*", "\n", svg).replace("<svg ", named, 1)


def _drawable(measured: Sequence[Row], name: str) -> list[Row]:
    return [row for row in measured if isfinite(row.metrics.get(name, math.nan))]


def _distinct(names: list[str]) -> list[str]:
    """The last parts of dotted names, as few as tell them apart."""
    for count in range(1, 20):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return names


def _short(name: str) -> str:
    """A variant's name, as much as a plot has room for."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _ink(row: Measured) -> str:
    status = row.status if isinstance(row, ResultVariant) else ""
    return {"published": PASS, "passed": PASS, "rejected": REJECT, "failed": FAIL}.get(status, MUTED)


def _marker(row: Measured) -> str:
    status = row.status if isinstance(row, ResultVariant) else ""
    return {"published": "o", "passed": "o", "rejected": "X", "failed": "v"}.get(status, "D")

"""Plots as inline SVG: their colours follow the page (light, dark, print), their bytes only the numbers.

Every function returns the SVG and a sentence that says the same to somebody who cannot see it, or None where there is
nothing to draw.
"""

import io
import math
import re
from collections import Counter
from math import isfinite
from typing import Any

from tasks.evaluate import evidence
from tasks.formatting import figure, label, rows
from tasks.metrics import read
from tasks.result import Measured, Result, ResultVariant

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


def size_against(result: Result, name: str, limit: float | None) -> Plot | None:
    """The metric `name` over size, with intervals and the gate's limit: down and to the left is better."""
    shown = [
        row for row in _drawable(rows(result), "size_bytes") if name not in row.metrics or isfinite(row.metrics[name])
    ]
    shown = [row for row in shown if name in row.metrics or (name == "kl_mean" and _is_baseline(row))]
    if sum(not _is_baseline(row) for row in shown) == 0:
        return None
    unit, scale = ("GB", 1e9) if max(row.metrics["size_bytes"] for row in shown) >= 1e9 else ("MB", 1e6)
    canvas, axes = _axes(3.1)
    for row in shown:
        x, y = row.metrics["size_bytes"] / scale, row.metrics.get(name, 0.0)  # the baseline's divergence is zero
        metric = read(row.metrics).get(name)
        low, high = (metric.low, metric.high) if metric else (None, None)
        below = y - low if low is not None and isfinite(low) else 0.0
        above = high - y if high is not None and isfinite(high) else 0.0
        error = [[max(below, 0.0)], [max(above, 0.0)]]
        axes.errorbar(x, y, yerr=error, fmt=_marker(row), color=_ink(row), markersize=7, capsize=3, elinewidth=1.2)
        left = x > 0.6 * max(other.metrics["size_bytes"] for other in shown) / scale  # where there is room for the name
        side: dict[str, Any] = {"xytext": (-8, 6), "ha": "right"} if left else {"xytext": (8, 6)}
        axes.annotate(_short(row.name), (x, y), textcoords="offset points", fontsize=12, **side)
    best = _frontier([(row.metrics["size_bytes"] / scale, row.metrics.get(name, 0.0)) for row in shown])
    axes.plot(*zip(*best, strict=True), color=MUTED, linewidth=1, linestyle=":", zorder=1)
    if limit is not None:
        axes.axhline(limit, color=REJECT, linewidth=1, linestyle="--")
        axes.annotate(
            f"limit {figure(name, limit)}",
            (1, limit),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=11,
        )
    axes.set_xlabel(f"Size ({unit})", fontsize=12)
    axes.set_ylabel(label(name), fontsize=12)
    axes.margins(x=0.18, y=0.15)
    axes.set_xlim(left=0)
    if name == "kl_mean":
        axes.set_ylim(bottom=0)
    said = "; ".join(
        f"{row.name} {figure('size_bytes', row.metrics['size_bytes'])}, {figure(name, row.metrics.get(name, 0.0))}"
        for row in shown
    )
    return _svg(canvas, f"size-{name}"), f"Size against {label(name)}: {said}."


def bars(result: Result, name: str) -> Plot | None:
    """The metric `name` of the baseline and each variant as labelled bars."""
    shown = _drawable(rows(result), name)
    if not shown:
        return None
    canvas, axes = _axes(0.55 + 0.36 * len(shown))
    values = [row.metrics[name] for row in shown]
    axes.barh(range(len(shown)), values, color=[_ink(row) for row in shown], height=0.62)
    for i, value in enumerate(values):
        axes.annotate(
            figure(name, value), (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=12
        )
    axes.set_yticks(range(len(shown)), [_short(row.name) for row in shown])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    said = ", ".join(f"{row.name} {figure(name, value)}" for row, value in zip(shown, values, strict=True))
    return _svg(canvas, f"bars-{name}"), f"{label(name)}: {said}."


def windows(result: Result) -> Plot | None:
    """The KL divergence of each window of the text, as a box a variant: is the damage even, or in some places?"""
    found = [(row, values) for row in result.variants if (values := evidence.windows(row.evidence).get("kl", []))]
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
    axes.set_yticks(range(len(found)), [_short(row.name) for row, _ in found])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("KL divergence of a window (nats)", fontsize=12)
    said = "; ".join(
        f"{row.name}: median {figure('kl_mean', sorted(values)[len(values) // 2])}, "
        f"{figure('kl_mean', min(values))} to {figure('kl_mean', max(values))}"
        for row, values in found
    )
    return _svg(canvas, "windows"), f"KL divergence by window of the text, {len(found[0][1])} windows. {said}."


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


def _drawable(measured: list[Measured], name: str) -> list[Measured]:
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


def _is_baseline(row: Measured) -> bool:
    return not isinstance(row, ResultVariant)


def _ink(row: Measured) -> str:
    status = row.status if isinstance(row, ResultVariant) else ""
    return {"published": PASS, "passed": PASS, "rejected": REJECT, "failed": FAIL}.get(status, MUTED)


def _marker(row: Measured) -> str:
    status = row.status if isinstance(row, ResultVariant) else ""
    return {"published": "o", "passed": "o", "rejected": "X", "failed": "v"}.get(status, "D")


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in both coordinates, smallest first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best

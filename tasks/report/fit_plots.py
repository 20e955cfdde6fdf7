"""The plots of a fitted variant: size against damage, and what each group of modules does, depth by kind."""

import re

from configs.schema import SMALL_GROUP
from tasks.fitted import FitPoint
from tasks.formatting import figure
from tasks.report.plots import MUTED, PASS, REJECT, TEXT, Plot, _axes, _svg
from tasks.result import ResultVariant

SHADES = 6
"""Steps of the heat map, each twice as much as the one below it."""
RINGS = {True: "8", False: f"groups of {SMALL_GROUP}"}
"""What the heat map's rings stand for, by whether there are modules in 8 bits."""


def frontier(row: ResultVariant) -> Plot | None:
    """Size against the KL divergence on the fit text: what was predicted as a line, what was measured as points."""
    fit = row.fit
    if fit is None:
        return None
    canvas, axes = _axes(3.4)
    curve = [(point.bytes / 1e6, point.predicted or 0.0) for point in fit.curve]
    axes.plot(*zip(*curve, strict=True), color=MUTED, linewidth=1.6, label="predicted")
    for point in fit.measured:
        taken = point.name == fit.taken.name
        value, low, high = point.kl_mean or 0.0, point.kl_mean_low or 0.0, point.kl_mean_high or 0.0
        axes.errorbar(
            point.bytes / 1e6,
            value,
            yerr=[[max(value - low, 0)], [max(high - value, 0)]],
            fmt="D" if taken else "o",
            color=PASS if taken else TEXT,
            markersize=9 if taken else 6,
            capsize=4,
            label="taken" if taken else None,
        )
    spec = row.spec.fit
    if spec is not None and spec != "gate":
        if spec.max_mean_kl is not None:
            axes.axhline(spec.max_mean_kl, color=REJECT, linewidth=1.2, linestyle="--", label="limit")
        elif spec.bytes is not None:
            axes.axvline(spec.bytes / 1e6, color=REJECT, linewidth=1.2, linestyle="--", label="limit")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Weights (MB)", fontsize=12)
    axes.set_ylabel("Mean KL (nats a token)", fontsize=12)
    axes.legend(frameon=False, fontsize=11, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    said = "; ".join(
        f"{point.name} {figure('size_bytes', point.bytes)}, {figure('kl_mean', point.kl_mean or 0.0)}"
        for point in fit.measured
    )
    return _svg(canvas, f"frontier-{_file(row)}"), f"Size against KL of {row.name}: {said}. Taken: {fit.taken.name}."


def heat(row: ResultVariant) -> Plot | None:
    """The KL divergence that each group causes, a column a block, a row a kind; a dot where it stays
    in 16 bits, a ring where it has more than the least."""
    fit = row.fit
    if fit is None or not fit.groups:
        return None
    kinds = list(dict.fromkeys(group.kind for group in fit.groups))
    most = max(group.kl[0] for group in fit.groups)
    canvas, axes = _axes(1.1 + 0.4 * len(kinds))
    kept, between = set(fit.modules), set(fit.finer)
    for group in fit.groups:
        at = group.block, kinds.index(group.kind)
        axes.bar(
            at[0], 0.92, bottom=at[1] - 0.46, width=0.92, color=REJECT, alpha=_shade(group.kl[0], most), linewidth=0
        )
        if kept.issuperset(group.modules):
            axes.plot(*at, marker="o", markersize=4, color=TEXT)
        elif between.issuperset(group.modules):
            axes.plot(*at, marker="o", markersize=5, color=TEXT, fillstyle="none")
    axes.set_yticks(range(len(kinds)), [_label(kind) for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(-0.6, max(group.block for group in fit.groups) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False)
    axes.set_xlabel(
        "Block; a dot stays in 16 bits" + (f", a ring is in {RINGS[bool(fit.in_8_bits)]}" if between else ""),
        fontsize=12,
    )
    worst = sorted(fit.groups, key=lambda group: -group.kl[0])[:3]
    said = "; ".join(f"{group.kind} of block {group.block} {figure('kl_mean', group.kl[0])}" for group in worst)
    return _svg(
        canvas, f"heat-{_file(row)}"
    ), f"KL of {row.name} by group of modules: what quantizing it does. Most: {said}."


def told(point: FitPoint) -> list[str]:
    """A measured mix as cells of a table."""
    interval = f"{figure('kl_mean', point.kl_mean_low or 0.0)} to {figure('kl_mean', point.kl_mean_high or 0.0)}"
    return [
        point.name,
        figure("size_bytes", point.bytes),
        str(point.kept) + _between(point),
        "" if point.predicted is None else figure("kl_mean", point.predicted),
        figure("kl_mean", point.kl_mean or 0.0),
        interval,
        "yes" if point.holds else "no",
    ]


def _between(point: FitPoint) -> str:
    if point.in_small_groups:
        return f", and {point.in_small_groups} in groups of {SMALL_GROUP}"
    return f", and {point.in_8_bits} in 8" if point.in_8_bits else ""


def _shade(value: float, most: float) -> float:
    """How opaque a cell is: a step less for every halving of the value."""
    step = 0
    while value > 0 and value * 2 <= most and step < SHADES:
        value, step = value * 2, step + 1
    return 0.05 if value <= 0 else max(0.05, 1 - step / SHADES)


def _label(kind: str) -> str:
    """A kind of group as short as people know it: `q+k+v`, `gate+up`."""
    parts = [re.sub(r"_proj$", "", part) for part in kind.split("+")]
    return "+".join(parts)[:18]


def _file(row: ResultVariant) -> str:
    return re.sub(r"[^\w.-]", "-", row.name)

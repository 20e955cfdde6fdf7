"""The charts, as the SVG that people see: no two labels meet, and what is drawn is what is judged."""

import re
from functools import cache
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from configs.schema import Gate
from tasks.gate import judge
from tasks.report import html, plots
from tasks.result import Result
from tests.results import make

LIMITS = {"max_mean_kl": 0.1, "max_perplexity_increase": 0.05, "min_top1_agreement": 0.9}
SPREADS = {
    "equal": lambda i: 1.0,
    "nearly equal": lambda i: 1.0 + 1e-4 * i,
    "even": lambda i: 0.2 + 0.4 * i,
    "far apart": lambda i: 10.0 ** (i - 5),
}

Box = tuple[str, float, float, float, float]
"""A text, and the left, top, right and bottom of it."""


def release(count: int, spread: str, name: str = "a-variant-{}-cal-fit") -> Result:
    result = make()
    base = result.variants[0]
    gate = Gate(**LIMITS)
    variants = []
    for i in range(count):
        scale = SPREADS[spread](i)
        numbers = {
            "kl_mean": 0.05 * scale,
            "perplexity_ratio": 1 + 0.03 * scale,
            "top1_agreement": 1 - 0.05 * min(scale, 15),
        }
        metrics = base.metrics | {"size_bytes": 1e8 * (1 if spread == "equal" else 1 + i)}
        for metric, value in numbers.items():
            damage = abs(value - plots.WHOLE[metric])
            metrics |= {metric: value, f"{metric}_low": value - damage / 5, f"{metric}_high": value + damage / 5}
        metrics |= {"decode_tokens_per_second_low": 9.1, "decode_tokens_per_second_high": 10.4}
        verdict = judge(metrics, gate)
        status = "passed" if verdict.passed else "rejected"
        variants.append(
            base.model_copy(update={"name": name.format(i), "metrics": metrics, "gate": verdict, "status": status})
        )
    recipe = result.recipe.model_copy(update={"gate": gate})
    return result.model_copy(update={"variants": variants, "recipe": recipe})


def drawn(result: Result, *wanted: str) -> dict[str, str]:
    """The plots of what is wanted; of everything, if nothing is named."""
    gate = result.recipe.gate
    assert gate.max_perplexity_increase is not None
    limits = {
        "kl_mean": gate.max_mean_kl,
        "perplexity_ratio": 1 + gate.max_perplexity_increase,
        "top1_agreement": gate.min_top1_agreement,
    }
    found = {name: plots.judged(result, name, limit) for name, limit in limits.items() if name in (wanted or limits)}
    found |= {name: plots.bars(result, name) for name in html.COST if name in (wanted or html.COST)}
    return {name: plot[0] for name, plot in found.items() if plot}


@cache
def extents(words: str, size: float) -> Any:
    """What a text takes: most are in several plots, and to find it takes longer than to draw them."""
    return TextPath((0, 0), words, size=size, prop=FontProperties(family="DejaVu Sans")).get_extents()


def boxes(svg: str) -> list[Box]:
    """Where each text of an SVG stands, in the font that matplotlib lays out with, which is a wide one."""
    found: list[Box] = []
    for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        words, style = text.text or "", text.get("style") or ""
        size = float(re.search(r"font-size: ([\d.]+)px|font: ([\d.]+)px", style).group(1))  # type: ignore[union-attr]
        place = re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", text.get("transform") or "")
        x, y = (float(place[1]), float(place[2])) if place else (float(text.get("x") or 0), float(text.get("y") or 0))
        shape = extents(words, size)
        anchor = re.search(r"text-anchor: (\w+)", style)
        left = x - {"middle": 0.5, "end": 1.0}.get(anchor[1] if anchor else "", 0.0) * shape.width
        found.append((words, left, y - shape.y1, left + shape.width, y - shape.y0))
    return found


@pytest.mark.parametrize(
    ("count", "spread"),
    [
        (1, "equal"),
        (2, "far apart"),
        (3, "nearly equal"),
        (5, "equal"),
        (5, "far apart"),
        *((8, spread) for spread in SPREADS),
    ],
)
def test_no_two_labels_meet_and_all_are_inside(count: int, spread: str) -> None:
    for name, svg in drawn(release(count, spread)).items():
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
        placed = boxes(svg)
        assert len(placed) >= 2 * count
        for text, left, top, right, bottom in placed:
            assert left >= -1, (name, text)
            assert right <= width + 1, (name, text)
            assert top >= -1, (name, text)
            assert bottom <= height + 1, (name, text)
        for (a, left, top, right, bottom), (b, *other) in combinations(placed, 2):
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, f"{name}: {a!r} and {b!r} meet"


def horizontal(svg: str, style: str) -> list[tuple[float, float, float]]:
    """(y, left, right) of the straight horizontal lines drawn in a style."""
    pattern = r'<path d="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+) \s*"[^>]*style="([^"]*)"'
    lines = [(float(a), float(b), float(c), float(d)) for a, b, c, d, s in re.findall(pattern, svg) if style in s]
    return [(b, min(a, c), max(a, c)) for a, b, c, d in lines if b == d]


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("kl_mean", "max_mean_kl"),
        ("perplexity_ratio", "max_perplexity_increase"),
        ("top1_agreement", "min_top1_agreement"),
    ],
)
def test_a_bar_passes_the_limit_where_the_gate_says_no(metric: str, limit: str) -> None:
    result = release(8, "even")
    svg = drawn(result, metric)[metric]
    (at,) = {float(x) for x in re.findall(r'<path d="M ([\d.]+) [^"]*"[^>]*style="[^"]*stroke-dasharray', svg)}
    bars = sorted(horizontal(svg, "stroke-width: 1.6"))
    assert len(bars) == 8
    said: list[Any] = [judge(v.metrics, Gate(**{limit: LIMITS[limit]})).passed for v in result.variants]
    assert True in said
    assert False in said
    kept = [left >= at if metric == "top1_agreement" else right <= at for _, left, right in bars]
    assert kept == said


def test_rows_stand_smallest_first_with_their_figures() -> None:
    result = release(3, "even", name="v{}")
    shuffled = result.model_copy(update={"variants": [result.variants[i] for i in (2, 0, 1)]})
    texts = boxes(drawn(shuffled, "kl_mean")["kl_mean"])
    names = sorted((top, text) for text, _, top, *_ in texts if re.fullmatch(r"v\d", text))
    assert [text for _, text in names] == ["v0", "v1", "v2"]
    assert {"0.0100", "0.0300", "0.0500", "limit 0.1", "100.0 MB", "200.0 MB", "300.0 MB"} <= {
        text for text, *_ in texts
    }


def test_speed_is_drawn_with_the_range_of_its_repeats() -> None:
    bars = horizontal(
        drawn(release(2, "even"), "decode_tokens_per_second")["decode_tokens_per_second"], "stroke-width: 1.4"
    )
    assert len(bars) == 2  # the baseline's range is not known
    assert bars[0][2] - bars[0][1] > 5

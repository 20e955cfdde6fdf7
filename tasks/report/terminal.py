"""What a run says at its end: one table, and where everything is."""

import io
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.formatting import cell, figure, label, points, settings, verdict
from tasks.result import Measured, Result, ResultVariant
from tasks.sentences import advice, headline

COLUMNS_AS = {
    "size_bytes": "size",
    "smaller": "smaller",
    "kl_mean": "KL, nats",
    "top1_agreement": "same token",
    "decode_tokens_per_second": "tokens/s",
}
COLUMNS = tuple(COLUMNS_AS)
WIDE = 76
"""Columns of a terminal that has room for all of them."""
STYLES = {"published": "green", "passed": "green", "rejected": "yellow", "measured": "dim", "failed": "red"}


def closing(result: Result, out: Path, width: int, colour: bool) -> str:
    """The table of baseline and variants, the reasons of those that did not pass, the decision, and the paths of what was made.

    The table has what matters and fits 80 columns; a narrower terminal gets fewer columns, not cut-off numbers.
    """
    plain = not colour or os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
    console = Console(file=io.StringIO(), width=min(max(width, 60), 100), force_terminal=not plain, highlight=False)
    shown = COLUMNS if width >= WIDE else COLUMNS[:3]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for column in shown:
        table.add_column(_header(column, result), justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if result.baseline:
        table.add_row(*_cells(result.baseline, shown, result), Text("original", style="dim"))
    for variant in result.variants:
        table.add_row(*_cells(variant, shown, result), Text(verdict(variant), style=_style(variant)))
    console.print(table)
    for variant in result.variants:
        if why := variant.error or "; ".join(variant.gate.reasons if variant.gate and not variant.gate.passed else []):
            console.print(Text(f"{variant.name} {variant.status}: {why}", style=STYLES[variant.status]))
    console.print()
    if decision := advice(result):
        console.print(Text(decision, style="bold"))
    console.print(Text(headline(result)))
    for what, where in _made(result, out):
        console.print(Text(f"{what:<10} {where}"), soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def numbers(measured: Measured) -> str:
    """Every metric of one model with its interval, then its protocol and notes."""
    lines = [f"{label(name):<40} {cell(name, measured.metrics)}" for name in points([measured.metrics])]
    lines += [
        f"{key.replace('_', ' ').replace('.', ': '):<40} {value}" for key, value in settings(measured.protocol).items()
    ]
    return "\n".join(lines + [f"note: {note}" for note in measured.notes])


def _style(variant: ResultVariant) -> str:
    return STYLES[variant.status] if variant.measured else "yellow"


def _header(column: str, result: Result) -> str:
    limit = result.recipe.gate.max_mean_kl
    return f"KL ≤ {limit:g}" if column == "kl_mean" and limit is not None else COLUMNS_AS[column]


def _cells(measured: Measured, shown: tuple[str, ...], result: Result) -> list[str]:
    whole = result.baseline.metrics.get("size_bytes") if result.baseline else None
    size = measured.metrics.get("size_bytes")
    cells = {name: figure(name, measured.metrics.get(name)) for name in shown if name != "smaller"}
    cells["smaller"] = (
        "" if measured is result.baseline or not whole or not size else f"{100 * (1 - size / whole):.0f} %"
    )
    if measured is result.baseline:
        cells |= {name: "" for name in ("kl_mean", "top1_agreement") if name not in measured.metrics}
    return [measured.name, *(cells[name] for name in shown)]


def _made(result: Result, out: Path) -> list[tuple[str, str]]:
    measured = [("baseline", m) for m in [result.baseline] if m] + [(v.name, v) for v in result.variants]
    cached = [f"{name} ({', '.join(m.cached)})" for name, m in measured if m.cached]
    lines = [("cache", f"{', '.join(cached)} came from the cache")] if cached else []
    lines += [("published", f"{variant.published}") for variant in result.variants if variant.published]
    lines += [("result", str(out / "result.json")), ("report", str(out / "report.html"))]
    if result.mlflow_run:
        from tasks.track.connection import public_address

        lines.append(("mlflow", f"run {result.mlflow_run} in {public_address()}"))
    return lines

"""What a run says at its end: one table, and where everything is."""

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.formatting import advice, cell, figure, headline, label, points, settings, span
from tasks.result import Measured, Result

STYLES = {"published": "green", "passed": "green", "rejected": "yellow", "failed": "red"}


def closing(result: Result, out: Path, width: int, colour: bool) -> str:
    """The table of baseline and variants, the reasons of those that did not pass, the decision, and the paths of what was made."""
    # Cut-off numbers help nobody: where the table does not fit, it is wider than the screen.
    console = Console(file=io.StringIO(), width=max(width, 110), force_terminal=colour, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("size", "perplexity", "ratio (95 %)", "KL, nats", "top-1", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    if result.baseline:
        table.add_row(*_cells(result.baseline), Text("baseline", style="dim"))
    for variant in result.variants:
        table.add_row(*_cells(variant), Text(variant.status, style=STYLES[variant.status]))
    console.print(table)
    for variant in result.variants:
        if why := variant.error or "; ".join(variant.gate.reasons if variant.gate and not variant.gate.passed else []):
            console.print(Text(f"{variant.name} {variant.status}: {why}", style=STYLES[variant.status]), soft_wrap=True)
    console.print()
    if decision := advice(result):
        console.print(Text(decision, style="bold"), soft_wrap=True)
    console.print(Text(headline(result)), soft_wrap=True)
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


def _cells(measured: Measured) -> list[str]:
    numbers = measured.metrics
    ratio = figure("perplexity_ratio", numbers.get("perplexity_ratio"))
    if interval := span("perplexity_ratio", numbers):
        ratio += f" ({interval.replace(' to ', '–')})"
    return [
        measured.name,
        figure("size_bytes", numbers.get("size_bytes")),
        figure("perplexity", numbers.get("perplexity")),
        ratio,
        figure("kl_mean", numbers.get("kl_mean")),
        figure("top1_agreement", numbers.get("top1_agreement")),
        figure("decode_tokens_per_second", numbers.get("decode_tokens_per_second")),
    ]


def _made(result: Result, out: Path) -> list[tuple[str, str]]:
    measured = [("baseline", m) for m in [result.baseline] if m] + [(v.name, v) for v in result.variants]
    cached = [f"{name} ({', '.join(m.cached)})" for name, m in measured if m.cached]
    lines = [("cache", f"{', '.join(cached)} came from the cache")] if cached else []
    lines += [("published", f"{variant.published}") for variant in result.variants if variant.published]
    lines += [("result", str(out / "result.json")), ("report", str(out / "report.html"))]
    if result.mlflow_run:
        from tasks.track.connection import place

        lines.append(("mlflow", f"run {result.mlflow_run} in {place()}"))
    return lines

"""The report: one self-contained HTML page that says what a release made, what it cost, and how that is known.

Pure: the same result and evidence give the same bytes. Everything in a result (names, errors, what models answered) is
untrusted text; Jinja escapes it, and only http(s) addresses become links.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError
from configs.write import as_yaml
from tasks import formatting, sentences
from tasks.decision import decide
from tasks.evaluate import evidence
from tasks.report import fit_plots, plots
from tasks.result import Measured, Result, ResultVariant
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.track.mlflow_runs import COLUMNS
from tasks.values import Unquantized

ANSWER = 2000
"""Characters of an answer that are shown; more of it says little and could fill the page."""

WORST = 10
"""Layers that the table of the most damaged ones has for each variant."""
EXAMPLES = 5
"""Answers that changed that are shown for each variant and task, in words."""
QUALITY = (
    "Divergence from the original",
    "Perplexity, as a ratio to the original's",
    "How often the most likely token is the original's",
    "Divergence by window of the text",
    "Divergence by position in the window",
)
COST = ("decode_tokens_per_second", "prefill_tokens_per_second", "peak_memory_bytes", "load_seconds")


def render(result: Result) -> str:
    """The report of one release, as HTML."""
    measured = formatting.rows(result)
    quality, cost, layers, fits = _drawn(result)
    return _page(
        "report.html",
        result=result,
        name=formatting.short_name(result.source.model),
        measured=measured,
        order=_order(result),
        metrics=formatting.points([row.metrics for row in measured]),
        quality=list(zip(QUALITY, quality, strict=True)),
        machine=_machine(result),
        cost=[(formatting.label(name), plot) for name, plot in zip(COST, cost, strict=True)],
        layers=[(row.name, plot) for row, plot in zip(result.variants, layers, strict=True)],
        fits=list(zip([row for row in result.variants if row.fit], *[iter(fits)] * 2, strict=True)),
        told=fit_plots.told,
        worst=_worst(result),
        answers=_answers(result),
        flips=_flips(result),
        examples=_examples(result),
        left=_left(result),
        served=[(variant.name, each) for variant in result.variants for each in variant.served],
        protocol=_protocol(measured),
        notes=dict.fromkeys(note for row in measured for note in [*_calibrated(row), *row.notes]),
        recipe=_yaml(result),
        seconds=f"{result.seconds / 60:.1f} minutes" if result.seconds >= 120 else f"{result.seconds:.0f} s",
        started=datetime.fromisoformat(result.started).strftime("%-d %B %Y, %H:%M UTC"),
    )


@dataclass(frozen=True)
class _Answers:
    """A prompt, the baseline's answer and thought, and each variant's: its name, three parts, as the baseline, first difference,
    rest, and its thought."""

    prompt: str
    baseline: str
    thought: str
    answers: list[tuple[str, str, str, str, str]] = field(default_factory=list)


@dataclass
class _Reason:
    """The unquantized modules that have one reason in common, counted."""

    modules: list[str] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class _LeftAlike:
    """Variants in which the same modules stayed unquantized, and those modules by reason."""

    variants: list[str] = field(default_factory=list)
    reasons: dict[str, _Reason] = field(default_factory=dict)


@dataclass(frozen=True)
class _History:
    """One model's releases: plots with their titles, the runs, newest first, and the metrics that are shown of each."""

    name: str
    plots: list[tuple[str, plots.Plot | None]]
    runs: list[Any]
    metrics: tuple[str, ...]


def _calibrated(row: Measured) -> list[str]:
    """What a variant's codes were chosen on."""
    return [f"{row.name}: {row.calibration.sentence}"] if isinstance(row, ResultVariant) and row.calibration else []


def _drawn(
    result: Result,
) -> tuple[list[plots.Plot | None], list[plots.Plot | None], list[plots.Plot | None], list[plots.Plot | None]]:
    """The plots of quality, of cost, of each variant's layers, and the two of each fitted variant.

    They are drawn once for equal numbers: drawing takes longer than all else of a cached run.
    """

    def draw() -> list[plots.Plot | None]:
        gate = result.recipe.gate
        ratio = None if gate.max_perplexity_increase is None else 1 + gate.max_perplexity_increase
        quality = [plots.judged(result, "kl_mean", gate.max_mean_kl), plots.judged(result, "perplexity_ratio", ratio)]
        quality.append(plots.judged(result, "top1_agreement", gate.min_top1_agreement))
        cost = [plots.bars(result, name) for name in COST]
        layers = [None if row.fit else plots.layers(row) for row in result.variants]  # the heat map says more
        fits = [draw(row) for row in result.variants if row.fit for draw in (fit_plots.frontier, fit_plots.heat)]
        return [*quality, plots.windows(result), plots.positions(result), *cost, *layers, *fits]

    def make(folder: Path) -> on_disk.Made:
        (folder / "plots.json").write_text(json.dumps(draw()))
        return on_disk.Made()

    shown = [
        (row.name, formatting.verdict(row), sorted(row.metrics.items()), row.evidence, getattr(row, "fit", None))
        for row in formatting.rows(result)
    ]
    inputs = {
        "stage": 5,
        "matplotlib": version("matplotlib"),
        "gate": repr(result.recipe.gate.model_dump(mode="json")),
        "shown": repr(shown),
    }
    try:
        artifact, _ = store.build("plots", inputs, make, shared=False)
        drawn = json.loads((Path(artifact.path) / "plots.json").read_bytes())
    except TameError:  # a store that is full is no reason to show nothing
        drawn = draw()
    first, then = len(QUALITY), len(QUALITY) + len(COST)
    last = then + len(result.variants)
    return drawn[:first], drawn[first:then], drawn[then:last], drawn[last:]


def history(model: str | None = None) -> str:
    """What all releases of `model` (an MLflow experiment of tame's; None: all of them) have looked like, as HTML.

    Raises:
        BadInputError: there is no such experiment, or no release in it.
        TameError: MLflow cannot be reached.
    """
    import mlflow

    from tasks.track import connection

    try:
        client = connection.connect()
        experiments = {found.name: found for found in client.search_experiments(filter_string="tags.tame = 'true'")}
    except Exception as error:  # whatever MLflow throws
        raise TameError(f"{connection.away(error)}; start it, or see MLFLOW_TRACKING_URI") from error
    if model is not None and model not in experiments:
        names = ", ".join(sorted(experiments)[:10]) or "none yet"
        raise BadInputError(
            f"--model {model}: no release of it is logged in {connection.public_address()}; there are: {names}"
        )
    chosen = sorted(experiments) if model is None else [model]
    sections = []
    for name in chosen:
        found = mlflow.search_runs([experiments[name].experiment_id], "tags.kind = 'variant'", output_format="list")
        if found:
            sections.append(_history_of(name, found))
    if not sections:
        raise BadInputError(
            f"{connection.public_address()} has no release {f'of {model} ' if model else ''}yet; tame run makes one"
        )
    return _page("history.html", sections=sections)


def _history_of(name: str, runs: list[Any]) -> _History:
    """One model's releases, oldest first: plots of what matters, and a row a variant of each release."""
    runs = sorted(runs, key=lambda run: str(run.data.tags["variant"]))
    releases = sorted({run.data.tags.get("started", "") for run in runs})
    index = {started: i for i, started in enumerate(releases)}
    ticks = [started[5:10] for started in releases]
    drawn = []
    for metric in ("kl_mean", "perplexity_ratio", "size_bytes", "decode_tokens_per_second"):
        series: dict[str, list[tuple[int, float]]] = {}
        for run in runs:
            if metric in run.data.metrics:
                point = (index[run.data.tags.get("started", "")], run.data.metrics[metric])
                series.setdefault(run.data.tags["variant"], []).append(point)
        series = {variant: sorted(points) for variant, points in series.items()}
        drawn.append((formatting.label(metric), plots.over_time(series, ticks, metric)))
    newest_first = sorted(runs, key=lambda run: str(run.data.tags.get("started", "")), reverse=True)
    return _History(name, drawn, newest_first, COLUMNS)


def _order(result: Result) -> list[tuple[ResultVariant, str]]:
    """The variants in order of use, each with what it is for: the decision's first, then the others as the recipe has them."""
    decision = decide(result)
    purposes = {choice.name: sentences.PURPOSES[choice.purpose] for choice in decision.choices}
    if decision.choices and decision.judged:
        purposes[decision.choices[0].name] = "use this one"
    first = [result.variant(choice.name) for choice in decision.choices]
    rest = [variant for variant in result.variants if variant.name not in purposes]
    return [(variant, purposes.get(variant.name, "")) for variant in [*first, *rest]]


def _machine(result: Result) -> str:
    """What speed was measured on: the evaluations' device, which need not be the one of the machine that reports."""
    devices = dict.fromkeys(row.protocol.device for row in formatting.rows(result) if row.protocol.device)
    here = f"{result.hardware.get('cpu', 'a CPU')}, {result.hardware.get('cores', '?')} cores"
    return " and ".join(here if device == "cpu" else device for device in devices) or here


def _answers(result: Result) -> list[_Answers]:
    """The answers of the baseline and of all variants, by prompt."""
    prompts: dict[str, _Answers] = {}
    for variant in result.variants:
        for sample in variant.samples:
            first = _Answers(sample.prompt, _cut(sample.baseline), _cut(sample.baseline_thought or ""))
            shown = prompts.setdefault(sample.prompt, first)
            parts = _parts(_cut(sample.answer), sample.diverges_at)
            shown.answers.append((variant.name, *parts, _cut(sample.thought or "")))
    return list(prompts.values())


def _parts(answer: str, at: int | None) -> tuple[str, str, str]:
    if at is None or at > len(answer):
        return answer, "", ""
    end = at + 1
    while end < len(answer) and not answer[end].isspace():
        end += 1
    return answer[:at], answer[at:end] or "∅", answer[end:]


def _cut(text: str) -> str:
    return text if len(text) <= ANSWER else f"{text[:ANSWER]} …"


def _flips(result: Result) -> list[tuple[str, evidence.Flips]]:
    """The questions whose answer changed between right and wrong, by variant and task."""
    baseline = result.baseline.evidence if result.baseline else None
    return [
        (variant.name, flips) for variant in result.variants for flips in evidence.flips(baseline, variant.evidence)
    ]


def _examples(result: Result) -> list[tuple[str, str, list[evidence.Example]]]:
    """Some of those answers in words, by variant and task: as many that became wrong as became right, where there are."""
    return [
        (variant.name, task, shown)
        for variant in result.variants
        for task, found in evidence.examples(variant.evidence).items()
        if (shown := _some(found))
    ]


def _some(found: list[evidence.Example]) -> list[evidence.Example]:
    lost, won = ([item for item in found if item.lost is which] for which in (True, False))
    half = max(EXAMPLES - len(won), EXAMPLES // 2 + 1)
    return [*lost[:half], *won[: EXAMPLES - len(lost[:half])]]


def _worst(result: Result) -> list[tuple[str, list[evidence.Layer]]]:
    """The layers that quantizing changed most, worst first, for each variant that was compared with its source."""
    return [
        (variant.name, sorted(found, key=lambda layer: -layer.error)[:WORST])
        for variant in result.variants
        if (found := evidence.layers(variant.evidence))
    ]


def _left(result: Result) -> list[_LeftAlike]:
    """What stayed unquantized, by reason, once for all variants that left the same."""
    groups: dict[tuple[Unquantized, ...], _LeftAlike] = {}
    for variant in result.variants:
        if not variant.left:
            continue
        group = groups.setdefault(tuple(variant.left), _LeftAlike())
        group.variants.append(variant.name)
        if len(group.variants) == 1:
            for entry in variant.left:
                reason = group.reasons.setdefault(entry.reason, _Reason())
                reason.modules.append(entry.module)
                reason.tensors += entry.tensors
                reason.parameters += entry.parameters
    return list(groups.values())


def _protocol(measured: list[Measured]) -> list[tuple[str, list[str]]]:
    """How the numbers were measured: a row a setting, a column for the baseline and each variant that has a protocol."""
    flat = [formatting.settings(row.protocol) for row in measured if row.protocol]
    return [(key, [each.get(key, "–") for each in flat]) for key in dict.fromkeys(key for each in flat for key in each)]


def _yaml(result: Result) -> str:
    """The recipe with its source pinned to the commit that was used."""
    recipe = result.recipe
    if result.source.commit:
        recipe = recipe.model_copy(
            update={"source": recipe.source.model_copy(update={"revision": result.source.commit})}
        )
    return as_yaml(recipe)


def _page(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # only ever given what plots.py drew
    figures, said = ("figure", "span", "label", "verdict"), ("advice", "headline", "meaning")
    environment.globals |= {name: getattr(formatting, name) for name in figures}
    environment.globals |= {name: getattr(sentences, name) for name in said}
    environment.globals["is_variant"] = lambda row: isinstance(row, ResultVariant)
    return environment.get_template(template).render(**values).strip() + "\n"

"""Every model in every variant as a release run of its own: planned together before anything starts, and compared at the end."""

import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError, line
from configs.schema import Recipe, Source, Sweep, Track
from tasks import formatting
from tasks.download.inspection import inspect_source, local_path
from tasks.fleet import flow_runs

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

AT_ONCE = 8  # requests to the Hub
FAILED = {"failed", "crashed", "cancelled"}
COLUMNS = ("size_bytes", "perplexity", "perplexity_ratio", "kl_mean", "top1_agreement", "decode_tokens_per_second")


class Pair(BaseModel):
    """A model and a variant of it, the key of their run, and what starts it, unless it was started before."""

    model_config = ConfigDict(frozen=True)

    model: str
    variant: str
    key: str
    recipe: Recipe | None = None
    queue: str | None = None


class Row(BaseModel):
    """A line of the leaderboard."""

    model_config = ConfigDict(frozen=True)

    model: str
    variant: str
    status: str
    """published, passed, rejected, failed, crashed, cancelled, or not measured; baseline for a baseline."""
    why: str = ""
    metrics: dict[str, float] = {}
    link: str = ""


def plan(spec: Sweep, sweep_id: UUID) -> list[Pair]:
    """Look at every model before anything is started. What an earlier start of this sweep has started is taken over.

    Raises:
        TameError: a model cannot be seen or released, fits on no GPU, or two would be published to one place; all are named.
            Or there is no deployment of releases.
    """
    from prefect.client.orchestration import get_client

    models = {model: str(path.absolute()) if (path := _local(model)) else model for model in spec.models}
    template = spec.recipe
    if template.track.experiment is None:
        template = template.model_copy(update={"track": Track(experiment=spec.name)})
    with ThreadPoolExecutor(AT_ONCE) as pool, get_client(sync_client=True) as client:
        started, fleet = flow_runs.children(client, sweep_id, []), flow_runs.fleet(client)
        pairs = {
            model: [
                Pair(model=model, variant=v.label, key=f"sweep {sweep_id} {model} {v.label}") for v in template.variants
            ]
            for model in models.values()
        }

        def complete(model: str) -> list[Pair] | Exception:
            if all(pair.key in started for pair in pairs[model]):
                return pairs[model]
            try:
                source = Source(model=model, revision=template.revision, trust_remote_code=template.trust_remote_code)
                found = inspect_source(source)
                queue = flow_runs.queue(fleet, found, template.recipe(model), spec.device)
            except (TameError, ValueError) as error:
                return error
            recipes = {v.label: template.recipe(model, found.commit, v) for v in template.variants}
            return [pair.model_copy(update={"recipe": recipes[pair.variant], "queue": queue}) for pair in pairs[model]]

        planned = dict(zip(pairs, pool.map(complete, pairs), strict=True))
    failed = {model: error for model, error in planned.items() if isinstance(error, Exception)}
    if wrong := {**failed, **flow_runs.destinations(list(pairs), template)[1]}:
        reasons = "; ".join(f"{model}: {line(str(why), limit=None)}" for model, why in wrong.items())
        raise TameError(f"nothing {'more ' if started else ''}was started, as this cannot be done: {reasons}")
    # One variant of every model first: workers that start on the same model wait for each other's baseline.
    return [
        pair
        for rows in zip(*(rows for rows in planned.values() if isinstance(rows, list)), strict=True)
        for pair in rows
    ]


def prefetch(pairs: list[Pair], sweep_id: UUID) -> None:
    """Start a download of every model that is still to be released; a release that comes first does it itself.

    Raises:
        TameError: the server has no deployment that downloads.
    """
    from prefect.client.orchestration import get_client

    sources = {pair.model: pair.recipe.source for pair in pairs if pair.recipe}
    with get_client(sync_client=True) as client:
        for model, source in sources.items():
            flow_runs.prefetch(client, source, f"sweep {sweep_id} prefetch {model}", sweep_id)


def leaderboard(spec: Sweep, pairs: list[Pair], runs: Mapping[str, "FlowRun"]) -> tuple[list[Row], list[str]]:
    """A row for the baseline and each variant of every model, the least damaged first, and what a reader should know."""
    notes = []
    try:
        numbers = _numbers(spec, {str(run.id) for run in runs.values()})
    except Exception as error:  # whatever MLflow throws: how the runs ended is worth telling without it
        from tasks.track.connection import away

        numbers, notes = {}, [f"{away(error)}, so there are no numbers here."]
    rows: dict[str, list[Row]] = {}
    for pair in pairs:
        run = runs[pair.key]
        tags, metrics = numbers.get((str(run.id), pair.variant), ({}, {}))
        status, why = tags.get("status", str(run.state_name).lower()), ""
        if tags.get("verdict") == formatting.NOT_MEASURED:
            status = f"published, {formatting.NOT_MEASURED}" if status == "published" else formatting.NOT_MEASURED
        if run.state and not run.state.is_completed():
            status, why = run.state.type.value.lower(), line(run.state.message or "", limit=None)
        link = tags.get("published") or flow_runs.page(run)
        row = Row(model=pair.model, variant=pair.variant, status=status, why=why, metrics=metrics, link=link)
        of_model = rows.setdefault(pair.model, [])
        baseline = numbers.get((str(run.id), "baseline"))
        if baseline and not any(row.status == "baseline" for row in of_model):
            of_model.append(Row(model=pair.model, variant="baseline", status="baseline", metrics=baseline[1]))
        of_model.append(row)
    for group in rows.values():
        group.sort(key=lambda row: (row.status != "baseline", row.metrics.get("kl_mean", math.inf)))
    return [row for group in rows.values() for row in group], notes


def headline(spec: Sweep, rows: list[Row]) -> str:
    """How many ended how, and what failed, by name."""
    released = [row for row in rows if row.status != "baseline"]
    counts = Counter(row.status for row in released)
    failed = [
        f"{row.model} {row.variant} {row.status}" + (f" ({row.why})" if row.why else "")
        for row in released
        if row.status in FAILED
    ]
    counted = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "; ".join([f"{len(released)} runs of {spec.name}: {counted}", *failed])


def table(rows: list[Row]) -> list[dict[str, str]]:
    """The rows as people read them, every number as the model card rounds it."""
    names = [name for name in COLUMNS if any(name in row.metrics for row in rows)]
    return [
        {
            "model": row.model,
            "variant": row.variant,
            "status": row.status,
            **{formatting.label(name): formatting.cell(name, row.metrics) for name in names},
            "link": row.link,
        }
        for row in rows
    ]


def grid(rows: list[Row]) -> str:
    """`table` in Markdown."""
    cells = table(rows)
    lines = [" | ".join(["", *cells[0], ""]).strip(), "|" + " --- |" * len(cells[0])]
    for row in cells:
        link = f"[open]({row['link']})" if row["link"].startswith("http") else formatting.plain(row["link"])
        texts = [formatting.plain(text) for name, text in row.items() if name != "link"]
        lines.append(" | ".join(["", *texts, link, ""]).strip())
    return "\n".join(lines)


def _numbers(spec: Sweep, runs: set[str]) -> dict[tuple[str, str], tuple[dict[str, str], dict[str, float]]]:
    """Tags and metrics that MLflow has of `runs`, by (Prefect run, variant): all of the experiment in a few requests."""
    from tasks.track import connection

    client = connection.connect()
    experiment = client.get_experiment_by_name(spec.recipe.track.experiment or spec.name)
    found: dict[tuple[str, str], tuple[dict[str, str], dict[str, float]]] = {}
    token = None
    while experiment is not None:
        page = client.search_runs(
            [experiment.experiment_id], "tags.variant LIKE '%'", max_results=1000, page_token=token
        )
        for run in page:
            tags = run.data.tags
            if tags.get("prefect_run") in runs:
                found[tags["prefect_run"], tags["variant"]] = (tags, run.data.metrics)
        if not (token := page.token):
            break
    return found


def _local(model: str) -> Path | None:
    try:
        return local_path(model)
    except BadInputError:  # the look says it
        return None

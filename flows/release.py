"""One recipe, from download to published: the flow that tame is."""

import contextlib
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Recipe
from flows.approve import Links, on_terminal, suspended
from flows.pipeline import go_on, make
from flows.stages import IN_PREFECT, track_task
from tasks import result as results
from tasks import sentences
from tasks.publish.approval import Shown, recall
from tasks.report.html import render
from tasks.report.prefect_artifacts import create_artifacts, show_card
from tasks.result import Result
from tasks.runtime import flow_run_ownership as ownership
from tasks.store import artifacts as store
from tasks.track import connection
from tasks.track import task as track
from tasks.values import Answer


def _run_name() -> str:
    recipe: Recipe = flow_run.parameters["recipe"]
    return f"{recipe.name}: {', '.join(variant.label for variant in recipe.variants)}"


@flow(name="release", flow_run_name=_run_name)
def release(recipe: Recipe, out: str | None = None) -> State[Result]:
    """Download a model, quantize it into each variant, measure and judge them, log it all, and publish what passes.

    Args:
        recipe: What to do.
        out: Folder for result.json and report.html; empty: TAME_HOME/runs/NAME.
    """
    attempt = ownership.begin()
    folder = results.folder_of(recipe, out)
    shown = recall(str(flow_run.get_id())) if recipe.publish.approve and attempt is not None and attempt > 1 else None
    run = track.begin(recipe, {"prefect_run": str(flow_run.get_id())})

    def check() -> None:
        ownership.check(attempt)

    def after(label: str, result: Result) -> None:
        nonlocal run
        if not result.variant(label).all_cached:  # or there is nothing new to see
            run = track_task(label, result, run, None, final=False)

    def approve(shown: Shown) -> Answer:
        result = shown.result.model_copy(update={"mlflow_run": run})
        if attempt is None:  # no worker would go on with it
            _write(result, folder)
            return on_terminal(shown, folder)
        return suspended(shown, lambda: _show(result, shown, folder))

    stages = IN_PREFECT._replace(approve=approve)
    if shown is None:
        result = make(recipe, folder, results.begin(recipe, flow_run.get_id()), stages, before=check, after=after)
    else:
        result = go_on(shown, stages, before=check)
    return _finish(result, folder, run, attempt)


def _write(result: Result, folder: Path) -> Path:
    """Write result.json, and report.html, whose path is returned."""
    results.write(result, folder)
    return results.write_file(folder / "report.html", render(result))


def _show(result: Result, shown: Shown, folder: Path) -> Links:
    """Show what is to be approved wherever people look, before this process ends, and tell where that is."""
    report = _write(result, folder)
    track_task("release", result, result.mlflow_run, report, final=True)
    page = connection.run_url(result.mlflow_run)
    create_artifacts(result, page, str(report))
    for label, files in shown.documents.items():
        show_card(result, label, files["README.md"].decode())
    kept = {f"{label}/{name}": text for label, files in shown.documents.items() for name, text in files.items()}
    if page is None or not track.attach(result.mlflow_run, "to-approve", kept):
        return Links(f"`{report}`", dict.fromkeys(shown.targets, "in the run's artifacts"))
    cards = {label: f"[README.md]({page}/artifacts/to-approve/{label}/README.md)" for label in shown.targets}
    return Links(f"[report.html]({page}/artifacts/report.html)", cards)


def _finish(result: Result, folder: Path, run: str | None, attempt: int | None) -> State[Result]:
    ownership.check(attempt)
    result = result.model_copy(update={"mlflow_run": run})
    try:
        report = _write(result, folder)
        track_task("release", result, run, report, final=True)
        create_artifacts(result, connection.run_url(run), str(report))
    except Exception as error:
        result = result.ended_by(error)
        with contextlib.suppress(TameError):
            results.write(result, folder)
    if result.exit_code != 1:  # what a failed stage has finished is taken up by the next run
        store.sweep()
    headline = sentences.headline(result)
    if result.exit_code in (1, 2):
        return Failed(message=headline, data=result if attempt is None else None)  # a worker would raise what it is
    ending = sentences.ending({variant.status for variant in result.variants})
    return Completed(name=ending, message=headline, data=result)

"""One recipe, from download to published: the flow that tame is."""

import contextlib
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Recipe
from flows.pipeline import make
from flows.stages import IN_PREFECT, track_task
from tasks import formatting
from tasks import result as results
from tasks.report.html import render
from tasks.report.prefect_artifacts import create_artifacts
from tasks.result import Result
from tasks.runtime import ownership as attempts
from tasks.store import artifacts as store
from tasks.track import connection
from tasks.track import task as track


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
    attempt = attempts.begin()
    folder = results.folder_of(recipe, out)
    result = results.begin(recipe, flow_run.get_id())
    run = track.begin(recipe, {"prefect_run": str(flow_run.get_id())})

    def after(label: str, result: Result) -> None:
        nonlocal run
        if result.variant(label).cached != ["quantize", "evaluate"]:  # or there is nothing new to see
            run = track_task(label, result, run, None, final=False)

    result = make(recipe, folder, result, IN_PREFECT, before=lambda: attempts.check(attempt), after=after)
    return _finish(result, folder, run, attempt)


def _finish(result: Result, folder: Path, run: str | None, attempt: int | None) -> State[Result]:
    attempts.check(attempt)
    result = result.model_copy(update={"mlflow_run": run})
    try:
        results.write(result, folder)
        report = results.write_file(folder / "report.html", render(result))
        track_task("release", result, run, report, final=True)
        create_artifacts(result, connection.run_url(run), str(report))
    except Exception as error:
        result = result.ended_by(error)
        with contextlib.suppress(TameError):
            results.write(result, folder)
    if result.exit_code != 1:  # what a failed stage has finished is taken up by the next run
        store.sweep()
    headline = formatting.headline(result)
    if result.exit_code in (1, 2):
        return Failed(message=headline, data=result if attempt is None else None)  # a worker would raise what it is
    return Completed(name="Rejected" if result.exit_code == 3 else "Completed", message=headline, data=result)

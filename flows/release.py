"""One recipe, from download to published: the flow that tame is."""

import contextlib
from pathlib import Path

from prefect import flow, task
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Recipe, Variant
from tasks import formatting
from tasks import result as results
from tasks.calibrate.task import calibrate_task
from tasks.download.task import download_task
from tasks.evaluate.task import baseline_task, evaluate_task
from tasks.gate import gate_task
from tasks.plan import Plan, preflight
from tasks.publish.card import release_files
from tasks.publish.task import publish_task
from tasks.quantize.task import quantize_task
from tasks.report.html import render
from tasks.report.prefect_artifacts import create_artifacts
from tasks.result import Result, ResultVariant
from tasks.runtime import ownership as attempts
from tasks.store import artifacts as store
from tasks.track import connection
from tasks.track import task as track
from tasks.values import Checkpoint, Evaluation, Snapshot


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
    try:
        plan = plan_task(recipe, folder)
        snapshot = download_task(recipe.source, plan.found).result()
        result = result.with_source(snapshot, plan.found.licence, plan.found.card)
        baseline = baseline_task(snapshot, recipe.evaluate, plan.text).result()
        result = result.with_baseline(baseline, snapshot)
    except Exception as error:
        return _finish(result.ended_by(error), folder, run, attempt)
    for variant in recipe.variants:
        attempts.check(attempt)
        result = result.with_variant(_measure(result.variant(variant.label), variant, snapshot, baseline, recipe))
        if result.variant(variant.label).cached != ["quantize", "evaluate"]:  # or there is nothing new to see
            run = track.track_task(variant.label, result, run, None, final=False)
    result = result.model_copy(update={"mlflow_run": run})
    for label, target in plan.targets.items():
        if result.variant(label).status == "passed":
            attempts.check(attempt)
            result = result.with_variant(_publish(result, label, target, plan, recipe))
    return _finish(result, folder, run, attempt)


@task(name="plan", task_run_name="plan {recipe.name}")
def plan_task(recipe: Recipe, out: Path) -> Plan:
    """`preflight` in the flow, for runs that did not come through the command line."""
    return preflight(recipe, out)


def _measure(
    known: ResultVariant, variant: Variant, snapshot: Snapshot, baseline: Evaluation, recipe: Recipe
) -> ResultVariant:
    try:
        calibration = calibrate_task(snapshot, recipe.calibration).result() if variant.calibrate else None
        quantized = quantize_task(snapshot, variant, calibration).result()
        known = results.quantized(known, quantized)
        checkpoint = Checkpoint(path=quantized.path, digest=quantized.digest, label=variant.label)
        evaluation = evaluate_task(checkpoint, baseline, snapshot, recipe.evaluate).result()
        verdict = gate_task(variant.label, {**known.metrics, **evaluation.metrics}, recipe.gate)
        return results.judged(known, evaluation, verdict)
    except Exception as error:
        return results.failed(known, error)


def _publish(result: Result, label: str, target: str, plan: Plan, recipe: Recipe) -> ResultVariant:
    variant = result.variant(label)
    assert variant.artifact is not None
    try:
        done = publish_task(
            label,
            Path(variant.artifact.path),
            variant.artifact.files,
            release_files(result, label, plan.targets, plan.benchmarks),
            target,
            recipe.publish,
        ).result()
        return results.published(variant, done)
    except Exception as error:
        return results.failed(variant, error)


def _finish(result: Result, folder: Path, run: str | None, attempt: int | None) -> State[Result]:
    attempts.check(attempt)
    result = result.model_copy(update={"mlflow_run": run})
    try:
        results.write(result, folder)
        report = results.write_file(folder / "report.html", render(result))
        track.track_task("release", result, run, report, final=True)
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

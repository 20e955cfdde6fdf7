"""Every stage as Prefect sees it: a task of a few lines around the plain function, which knows nothing of Prefect.

So a command that only looks, or finds all of it in the cache, need not import Prefect, which takes 2 to 5 s.
"""

import time
from pathlib import Path

from prefect import task
from prefect.states import Completed, State

from configs.errors import UnreachableError
from configs.schema import Calibrate, Evaluate, Gate, Publish, Recipe, Source, Variant
from flows.direct import Stages, nobody_to_ask
from tasks.calibrate.sequences import Part
from tasks.calibrate.task import calibrate
from tasks.download import hub
from tasks.download.task import download
from tasks.download.text import LoadedText
from tasks.evaluate.task import compare_weights, evaluate_baseline, evaluate_variant
from tasks.fit.task import fit
from tasks.fitted import Fitted
from tasks.gate import judge
from tasks.plan import Plan, preflight
from tasks.publish.client import seconds_to_wait
from tasks.publish.task import PAUSES, publish, tell_lineage
from tasks.quantize.task import quantize
from tasks.result import Result
from tasks.serve.task import serve
from tasks.track.task import log
from tasks.values import Calibration, Checkpoint, Evaluation, Found, Published, Quantized, Served, Snapshot, Verdict


@task(name="plan", task_run_name="plan {recipe.name}")
def plan_task(recipe: Recipe, out: Path) -> Plan:
    """`preflight` in the flow, for runs that did not come through the command line."""
    return preflight(recipe, out)


@task(name="download", task_run_name="download {source.model}", retries=3, retry_delay_seconds=[2, 10, 30],
      retry_condition_fn=hub.is_transient)  # fmt: skip
def download_task(source: Source, found: Found | None = None) -> State[Snapshot]:
    """`download` in the flow; retried when the network or the Hub may do better next time."""
    snapshot = download(source, found)
    return Completed(name="Cached" if snapshot.cached else "Completed", data=snapshot)


@task(name="calibrate", task_run_name="calibrate: sequences for {snapshot.name}")
def calibrate_task(snapshot: Snapshot, spec: Calibrate, part: Part) -> State[Calibration]:
    """`calibrate` in the flow."""
    made = calibrate(snapshot, spec, part)
    return Completed(name="Cached" if made.cached else "Completed", data=made)


@task(name="fit", task_run_name="fit {variant.label}")
def fit_task(
    snapshot: Snapshot, variant: Variant, gate: Gate, spec: Calibrate, calibration: Calibration | None = None
) -> State[Fitted]:
    """`fit` in the flow."""
    fitted = fit(snapshot, variant, gate, spec, calibration)
    return Completed(name="Cached" if fitted.cached else "Completed", data=fitted)


@task(name="quantize", task_run_name="quantize {variant.label}")
def quantize_task(
    snapshot: Snapshot, variant: Variant, calibration: Calibration | None = None, fitted: Fitted | None = None
) -> State[Quantized]:
    """`quantize` in the flow."""
    quantized = quantize(snapshot, variant, calibration, fitted)
    return Completed(name="Cached" if quantized.cached else "Completed", data=quantized)


@task(name="evaluate baseline", task_run_name="evaluate baseline", retries=0)
def baseline_task(snapshot: Snapshot, spec: Evaluate, text: LoadedText) -> State[Evaluation]:
    """`evaluate_baseline` in the flow, on the text that the plan has read."""
    value = evaluate_baseline(snapshot, spec, text=text)
    return Completed(name="Cached" if value.cached else "Completed", data=value)


@task(name="evaluate", task_run_name="evaluate {checkpoint.label}", retries=0)
def evaluate_task(
    checkpoint: Checkpoint, baseline: Evaluation, snapshot: Snapshot, spec: Evaluate
) -> State[Evaluation]:
    """`evaluate_variant` in the flow."""
    value = evaluate_variant(checkpoint, baseline, snapshot, spec)
    return Completed(name="Cached" if value.cached else "Completed", data=value)


@task(name="compare weights", task_run_name="compare weights of {checkpoint.label}", retries=0)
def weights_task(checkpoint: Checkpoint, snapshot: Snapshot) -> State[Evaluation | None]:
    """`compare_weights` in the flow, for a recipe that measures nothing."""
    value = compare_weights(checkpoint, snapshot)
    return Completed(name="Cached" if value is None or value.cached else "Completed", data=value)


@task(name="gate", task_run_name="gate {variant}")
def gate_task(variant: str, metrics: dict[str, float], gate: Gate) -> Verdict:
    """`judge` in the flow."""
    return judge(metrics, gate)


@task(name="serve", task_run_name="serve {checkpoint.label} with {runtime}")
def serve_task(checkpoint: Checkpoint, runtime: str, trust_remote_code: bool) -> State[Served]:
    """`serve` in the flow."""
    served = serve(checkpoint, runtime, trust_remote_code)
    return Completed(name="Cached" if served.cached else "Completed", data=served)


@task(
    name="publish",
    task_run_name="publish {label}",
    retries=len(PAUSES),
    retry_delay_seconds=list(PAUSES),
    retry_condition_fn=hub.is_transient,
)
def publish_task(
    label: str,
    folder: Path,
    files: dict[str, str],
    extra: dict[str, bytes],
    repo: str,
    spec: Publish,
) -> State[Published]:
    """`publish` in the flow: Prefect makes the further attempts, so that they can be seen."""
    try:
        done = publish(folder, files, extra, repo, spec, pauses=())
    except UnreachableError as error:
        time.sleep(seconds_to_wait(error, 0.0))  # what the Hub asked for, on top of Prefect's own delay
        raise
    if not done.already:
        tell_lineage(done, extra)
    return Completed(name="Cached" if done.already else "Completed", data=done)


@task(name="log to MLflow", task_run_name="log {what}")
def track_task(what: str, result: Result, run_id: str | None, report: Path | None, final: bool) -> str | None:
    """`log` in the flow; `what` names the state, such as a variant."""
    return log(result, run_id, report, final)


IN_PREFECT = Stages(
    plan=plan_task,
    download=lambda source, found: download_task(source, found).result(),
    baseline=lambda snapshot, spec, text: baseline_task(snapshot, spec, text).result(),
    calibrate=lambda snapshot, spec, part: calibrate_task(snapshot, spec, part).result(),
    fit=lambda *given: fit_task(*given).result(),
    quantize=lambda *given: quantize_task(*given).result(),
    evaluate=lambda *given: evaluate_task(*given).result(),
    weights=lambda *given: weights_task(*given).result(),
    gate=gate_task,
    serve=lambda *given: serve_task(*given).result(),
    approve=nobody_to_ask,  # the flow knows whom
    publish=lambda *given: publish_task(*given).result(),
)

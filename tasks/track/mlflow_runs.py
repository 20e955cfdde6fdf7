"""A result as MLflow shows it: a parent run a release, nested runs for the baseline and each variant.

Everything is found before it is made and carries the release's own time, so that writing a result again, or a later
one of the same release, adds what is new and duplicates nothing. Tags that searches use: `kind` (release, baseline,
variant; rerun for a release that found everything in the cache and in MLflow, and adds nothing), `variant`, `status`,
`verdict` (passed, rejected, failed; of a release how many passed), `source_commit`, `hub_commit`,
`prefect_run`.
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Any, NamedTuple

from configs.settings import home
from tasks import formatting, sentences
from tasks.decision import decide
from tasks.evaluate import evidence
from tasks.result import NOT_REACHED, Measured, Result, ResultVariant
from tasks.track import registry, reruns

MAX_STEPS = 500
"""Points of a stepped metric; of a longer curve every n-th is logged."""
COLUMNS = (
    *("size_bytes", "perplexity", "perplexity_ratio", "kl_mean", "top1_agreement"),
    *("decode_tokens_per_second", "peak_memory_bytes"),
)
"""What people compare variants by, in MLflow's table and over time."""
# No more, or the verdict, which MLflow puts behind all metrics, is beyond the edge of a screen. It cuts at 13 characters or so.
SEEN = ["metrics.`kl_mean`", "metrics.`size_bytes`", "tags.`verdict`", "tags.`KL up to`", "tags.`use`"]
TAGS = {
    "tame": "true",
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.sharedViewState.variants": json.dumps({"selectedColumns": SEEN}),
}
"""Of an experiment: that it is tame's, that its page shows runs rather than conversations, and, for the address with
?viewStateShareKey=variants, the columns to show."""


class Release(NamedTuple):
    """Which release it is, the MLflow run that it has, and the tags that tell whether its process lives."""

    name: str
    run_id: str | None
    life: dict[str, str]


def experiment(client: Any, name: str) -> str:
    """The id of the experiment `name`, made or restored where it has to be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = re.match(
            "(sqlite|postgresql|mysql|mssql)", client.tracking_uri
        )  # else a server, which has a place of its own
        folder = home() / "mlartifacts" / hashlib.sha256(name.encode()).hexdigest()[:12]
        try:
            made = client.create_experiment(name, folder.absolute().as_uri() if database else None, tags=TAGS)
            return str(made)
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    for key in TAGS.keys() - found.tags.keys():
        client.set_experiment_tag(found.experiment_id, key, TAGS[key])
    return str(found.experiment_id)


def open_release(client: Any, experiment_id: str, name: str, tags: dict[str, str], release: str) -> str:
    """The id of the release's run, RUNNING: the one that it had, or a new one."""
    found = client.search_runs([experiment_id], f"tags.release = '{release}'", max_results=1)
    tags = {"kind": "release", "release": release, "mlflow.source.name": "tame", **tags}
    if not found:
        return str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    run_id = found[0].info.run_id
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    client.update_run(run_id, status="RUNNING")
    return str(run_id)


def running(client: Any) -> list[Any]:
    """All releases' runs that say they are running."""
    ids = [found.experiment_id for found in client.search_experiments(filter_string="tags.tame = 'true'")]
    if not ids:
        return []
    return list(client.search_runs(ids, "attributes.status = 'RUNNING' and tags.kind = 'release'"))


def close(client: Any, run: Any, status: str) -> None:
    """Close a release's run, and those under it that are still open."""
    for child in _children(client, run.info.experiment_id, run.info.run_id).values():
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, status)
    client.set_terminated(run.info.run_id, status)


def write(client: Any, result: Result, release: Release, report: str | None, final: bool) -> str:
    """Make MLflow show `result` under the release's run, found or made where it is not known or gone; the run's id."""
    run_id = release.run_id
    experiment_id = experiment(client, registry.experiment_name(result.recipe))
    if run_id is None or not _exists(client, run_id):
        name = registry.run_name(result.recipe, datetime.fromisoformat(result.started))
        run_id = open_release(client, experiment_id, name, release.life, release.name)
    began = int(datetime.fromisoformat(result.started).timestamp() * 1000)
    ended = began + int(result.seconds * 1000)
    if final and (earlier := reruns.shown_already(client, experiment_id, run_id, result)):
        note = f"Everything came from the cache: it is as the run {earlier} shows it."
        tags = {"kind": "rerun", "rerun_of": earlier, "headline": note, "mlflow.note.content": note}
        _batch(client, run_id, _Content({"seconds": result.seconds}, {}, {**_release_of(result), **tags}), began)
        client.set_terminated(run_id, "FINISHED", ended)
        return run_id
    children, chosen = _children(client, experiment_id, run_id), _chosen(result)
    for order, measured in enumerate(formatting.rows(result)):
        if not final and getattr(measured, "error", None) == NOT_REACHED:
            continue
        run = children.get(measured.name)
        if run is None:
            tags = {"mlflow.parentRunId": run_id, "variant": measured.name}
            # MLflow's table shows the latest first: a millisecond apart, they stand in the recipe's order.
            run = client.create_run(experiment_id, start_time=began - order, tags=tags, run_name=measured.name)
        _write_measured(client, result, measured, run, (began, ended), measured is chosen)
    shown = _Content(_release_metrics(result, chosen), params(result), _release_tags(result, chosen))
    _batch(client, run_id, shown, began)
    if final:
        client.log_text(run_id, result.model_dump_json(indent=2), "result.json")
        if report:
            client.log_text(run_id, report, "report.html")
            for name, plot in plots_of(report).items():
                client.log_text(run_id, plot, f"plots/{name}")
        client.set_tag(run_id, reruns.CONTENT, reruns.content_of(result))
        failed = any(variant.status == "failed" for variant in result.variants)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED", ended)
    return run_id


def plots_of(report: str) -> dict[str, str]:
    """The plots of a report page (the text of report.html) as SVG files of their own, by name: in its colours, light and dark."""
    page = re.search(r"<style>(.*?)\* \{", report, re.DOTALL)
    style = f"<style>{page[1]}svg {{ background: var(--paper); color: var(--ink); }}</style>" if page else ""
    found = re.findall(r'(<svg data-name="([^"]*)" [^>]*>)(.*?</svg>)', report, re.DOTALL)
    return {f"{name}.svg": f"{opening}{style}{rest}\n" for opening, name, rest in found}


def params(result: Result, measured: Measured | None = None) -> dict[str, str]:
    """Everything that decided the numbers, flat: the variant's spec, `evaluate.*`, `source.*`, `version.*`, …"""
    source = result.source.model_dump(include={"model", "revision", "commit", "digest", "licence"})
    asked = result.recipe.evaluate
    flat: dict[str, str] = {
        **formatting.flat("evaluate", asked.model_dump(mode="json") if asked else formatting.NOT_MEASURED),
        **formatting.flat("gate", result.recipe.gate.model_dump(mode="json")),
        **formatting.flat("source", source),
        **formatting.flat("version", result.versions),
        **formatting.flat("hardware", result.hardware),
    }
    if measured is not None:
        flat |= formatting.flat("protocol", measured.protocol.model_dump(mode="json"))
    if isinstance(measured, ResultVariant):
        flat |= formatting.flat("", measured.spec.model_dump(mode="json")) | {"bits": registry.bits(measured)}
        if measured.calibration:
            flat |= formatting.flat("calibration", measured.calibration.model_dump(exclude={"path", "notes", "cached"}))
    return flat


def metric_key(name: str) -> str:
    """The metric's name in MLflow: the contract's, but for characters that MLflow refuses (the comma of some tasks)."""
    return re.sub(r"[^\w./ :-]", "-", name)


def _write_measured(
    client: Any, result: Result, measured: Measured, run: Any, times: tuple[int, int], chosen: bool
) -> None:
    """Make `run` show the baseline or a variant, unless it does. `times`: beginning and end, ms since 1970."""
    (began, ended), used = times, measured.name if chosen else ""
    content = hashlib.sha256(f"{measured.model_dump_json()}{result.versions}{used}".encode()).hexdigest()
    if run.data.tags.get("tame.content") == content:
        return
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    dataset = _dataset(measured)
    if dataset is not None:
        _log_dataset(client, run_id, dataset)
    model = (
        registry.model(client, result, measured, experiment_id, run_id) if isinstance(measured, ResultVariant) else None
    )
    shown = _Content(measured.metrics, params(result, measured), {**_tags(result, measured), "use": used})
    _batch(client, run_id, shown, began, model, dataset)
    _log_windows(client, run_id, measured, began)
    _log_layers(client, run_id, measured, began)
    if isinstance(measured, ResultVariant) and model is not None and registry.is_released(result, measured):
        registry.register(client, result, measured, model, run_id)
    status = "FAILED" if isinstance(measured, ResultVariant) and measured.status == "failed" else "FINISHED"
    client.set_terminated(run_id, status, ended)
    client.set_tag(run_id, "tame.content", content)


def _tags(result: Result, measured: Measured) -> dict[str, str]:
    tags: dict[str, str] = {"kind": "baseline", "mlflow.note.content": "\n\n".join(measured.notes)}
    if isinstance(measured, ResultVariant):
        reasons = "; ".join(measured.gate.reasons) if measured.gate else ""
        commit = re.search(r"/commit/([0-9a-f]{7,64})", measured.published or "")
        tags |= {
            "kind": "variant",
            "status": measured.status,
            "verdict": registry.verdict(measured),
            "KL up to": registry.kl_and_limit(result, measured),
            "reasons": reasons or measured.error or "",
            "published": measured.published or "",
            "hub_commit": commit.group(1) if commit else "",
            "artifact_digest": measured.artifact.digest if measured.artifact else "",
            "artifact_path": measured.artifact.path if measured.artifact else "",
            "cached": " ".join(measured.cached),
            **{f"served.{each.runtime}": each.sentence for each in measured.served},
        }
    return {**tags, **_release_of(result)}


def _release_tags(result: Result, chosen: ResultVariant | None) -> dict[str, str]:
    return {
        "headline": sentences.headline(result),
        "decision": sentences.advice(result),
        "use": chosen.name if chosen else "",
        "status": sentences.outcome(result).lower(),
        "verdict": registry.tally(result),
        "KL up to": registry.kl_and_limit(result, chosen),
        "approval": registry.approval(result),
        "mlflow.note.content": sentences.markdown(result),
        **_release_of(result),
    }


def _release_of(result: Result) -> dict[str, str]:
    return {
        "source_model": result.source.model,
        "source_commit": result.source.commit or "",
        "source_digest": result.source.digest,
        "prefect_run": result.prefect_run or "",
        "started": result.started,
        "mlflow.source.name": f"tame {result.versions.get('tame', '')}".strip(),
    }


def _release_metrics(result: Result, chosen: ResultVariant | None) -> dict[str, float]:
    counts = dict.fromkeys(("published", "passed", "rejected", "measured", "failed"), 0.0)
    for variant in result.variants:
        counts[variant.status] += 1
    shown = {name: chosen.metrics[name] for name in COLUMNS if name in chosen.metrics} if chosen else {}
    return {"seconds": result.seconds, **shown, **{f"variants_{status}": count for status, count in counts.items()}}


def _chosen(result: Result) -> ResultVariant | None:
    """The variant to use, by the rule of `tasks.decision`."""
    choices = decide(result).choices
    return result.variant(choices[0].name) if choices else None


class _Content(NamedTuple):
    """What a run shows."""

    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


def _batch(client: Any, run_id: str, content: _Content, timestamp: int, model: Any = None, dataset: Any = None) -> None:
    """Log `content`; its metrics at `timestamp`, ms since 1970, as those of `model` on `dataset`, where there are such."""
    from mlflow.entities import Metric, Param, RunTag

    linked: dict[str, Any] = {"run_id": run_id}
    if model is not None:
        linked["model_id"] = model.model_id
    if dataset is not None:
        linked |= {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    entries = [Metric(metric_key(name), value, timestamp, 0, **linked) for name, value in content.metrics.items()]
    logged = client.get_run(run_id).data.params
    fresh = [Param(key, value[:6000]) for key, value in content.params.items() if key not in logged]
    labels = [RunTag(key, value[:7900]) for key, value in content.tags.items()]
    for start in range(0, max(len(entries), len(fresh), len(labels)), 100):
        part = slice(start, start + 100)
        client.log_batch(run_id, entries[part], fresh[part], labels[part])


def _log_windows(client: Any, run_id: str, measured: Measured, timestamp: int) -> None:
    """The loss and the divergence of each window of the text, as curves: `window/loss`, `window/kl`."""
    from mlflow.entities import Metric

    entries = []
    for name, values in evidence.windows(measured.evidence).items():
        every = -(-len(values) // MAX_STEPS)
        entries += [Metric(f"window/{name}", values[i], timestamp, i) for i in range(0, len(values), every)]
    for start in range(0, len(entries), 1000):
        client.log_batch(run_id, entries[start : start + 1000])


def _log_layers(client: Any, run_id: str, measured: Measured, timestamp: int) -> None:
    """The error of the weights as a curve over depth for each kind of layer, `layer_error/self_attn.q_proj`; the damage of the
    mixes of a fitted variant as curves over their size, `fit/predicted_kl` and `fit/kl_mean`."""
    from mlflow.entities import Metric

    kinds: dict[tuple[str, int], list[float]] = {}
    for layer in evidence.layers(measured.evidence):
        kinds.setdefault((layer.kind, layer.depth), []).append(layer.error)
    entries = [
        Metric(metric_key(f"layer_error/{kind}"), sum(errors) / len(errors), timestamp, depth)
        for (kind, depth), errors in kinds.items()
    ]
    if isinstance(measured, ResultVariant) and measured.fit:  # steps are kilobytes of the weights
        entries += [
            Metric(f"fit/{name}", value, timestamp, point.bytes // 1000)
            for point in [*measured.fit.curve, *measured.fit.measured]
            for name, value in (("predicted_kl", point.predicted), ("kl_mean", point.kl_mean))
            if value is not None
        ]
    for start in range(0, len(entries), 1000):
        client.log_batch(run_id, entries[start : start + 1000])


def _dataset(measured: Measured) -> Any:
    """The evaluation text as MLflow's data set, by the digest of its content."""
    from mlflow.entities import Dataset

    text = measured.protocol.text
    if text is None or text.sha256 is None:
        return None
    return Dataset(text.name[:500], text.sha256[:36], "text", json.dumps(text.model_dump(mode="json")))


def _log_dataset(client: Any, run_id: str, dataset: Any) -> None:
    from mlflow.entities import DatasetInput, InputTag

    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def _children(client: Any, experiment_id: str, run_id: str) -> dict[str, Any]:
    found = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.data.tags["variant"]: run for run in found if "variant" in run.data.tags}


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise

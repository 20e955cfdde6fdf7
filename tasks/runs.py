"""A result as MLflow shows it: a parent run a release, nested runs for the baseline and each variant.

Everything is found before it is made and carries the release's own time, so that writing a result again, or a later
one of the same release, adds what is new and duplicates nothing. Tags that searches use: `kind` (release, baseline,
variant), `variant`, `status`, `verdict` (passed, rejected, failed), `source_commit`, `hub_commit`, `prefect_run`.
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Any

from tasks import evidence, summary
from tasks.result import NOT_REACHED, Measured, Result, ResultVariant

MAX_STEPS = 500
"""Points of a stepped metric; of a longer curve every n-th is logged."""


def experiment_name(recipe: dict[str, Any]) -> str:
    """The experiment of a recipe: `track.experiment`, else the recipe's name."""
    return str((recipe.get("track") or {}).get("experiment") or recipe["name"])


def model_name(recipe: dict[str, Any]) -> str:
    """The registered model of a recipe: its experiment's name, without what MLflow forbids in one."""
    return re.sub(r"[/:.%\"']", "-", experiment_name(recipe))


def experiment(client: Any, name: str) -> str:
    """The id of the experiment `name`, made or restored where it has to be."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import path_to_local_file_uri

    from tasks.store import home

    found = client.get_experiment_by_name(name)
    if found is None:
        embedded = client.tracking_uri == f"sqlite:///{home() / 'mlflow.db'}"
        folder = home() / "mlartifacts" / hashlib.sha256(name.encode()).hexdigest()[:12]
        try:
            made = client.create_experiment(
                name, path_to_local_file_uri(str(folder)) if embedded else None, tags={"tame": "true"}
            )
            return str(made)
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if "tame" not in found.tags:
        client.set_experiment_tag(found.experiment_id, "tame", "true")
    return str(found.experiment_id)


def open_release(client: Any, experiment_id: str, name: str, tags: dict[str, str], release: str) -> str:
    """The id of the release's run, RUNNING: the one that it had, or a new one."""
    found = client.search_runs([experiment_id], f"tags.kind = 'release' and tags.release = '{release}'", max_results=1)
    tags = {"kind": "release", "release": release, **tags}
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


def write(client: Any, result: Result, run_id: str | None, release: str, report: str | None, final: bool) -> str:
    """Make MLflow show `result` under the run `run_id` (found or made where None or gone), and return the run's id."""
    experiment_id = experiment(client, experiment_name(result.recipe))
    if run_id is None or not _exists(client, run_id):
        run_id = open_release(client, experiment_id, result.recipe["name"], {}, release)
    began = int(datetime.fromisoformat(result.started).timestamp() * 1000)
    ended = began + int(result.seconds * 1000)
    children = _children(client, experiment_id, run_id)
    for measured in summary.rows(result):
        if final or getattr(measured, "error", None) != NOT_REACHED:
            _write_measured(client, result, measured, experiment_id, run_id, children, began, ended)
    _batch(client, run_id, _release_metrics(result), params(result), _release_tags(result), began)
    if final:
        client.log_text(run_id, result.model_dump_json(indent=2), "result.json")
        if report:
            client.log_text(run_id, report, "report.html")
        failed = any(variant.status == "failed" for variant in result.variants)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED", ended)
    return run_id


def params(result: Result, measured: Measured | None = None) -> dict[str, str]:
    """Everything that decided the numbers, flat: the variant's spec, `evaluate.*`, `source.*`, `version.*`, …"""
    source = result.source.model_dump(include={"model", "revision", "commit", "digest", "licence"})
    flat: dict[str, str] = {
        **_flat("evaluate", result.recipe.get("evaluate") or {}),
        **_flat("gate", result.recipe.get("gate") or {}),
        **_flat("source", source),
        **_flat("version", result.versions),
        **_flat("hardware", result.hardware),
    }
    if measured is not None:
        flat |= _flat("protocol", measured.protocol)
    if isinstance(measured, ResultVariant):
        flat |= _flat("", measured.spec) | {"bits": bits(measured)}
    return flat


def bits(variant: ResultVariant) -> str:
    """4 or 8, by the method."""
    return "8" if variant.spec.get("method") == "int8" else "4"


def verdict(variant: ResultVariant) -> str:
    """Passed, rejected or failed; what was published passed."""
    return "passed" if variant.status == "published" else variant.status


def metric_key(name: str) -> str:
    """The metric's name in MLflow: the contract's, but for characters that MLflow refuses (the comma of some tasks)."""
    return re.sub(r"[^\w./ :-]", "-", name)


def _write_measured(
    client: Any,
    result: Result,
    measured: Measured,
    experiment_id: str,
    parent: str,
    children: dict[str, Any],
    began: int,
    ended: int,
) -> None:
    content = hashlib.sha256(f"{measured.model_dump_json()}{result.versions}".encode()).hexdigest()
    run = children.get(measured.name)
    if run is not None and run.data.tags.get("tame.content") == content:
        return
    if run is None:
        tags = {"mlflow.parentRunId": parent, "variant": measured.name}
        run = client.create_run(experiment_id, start_time=began, tags=tags, run_name=measured.name)
    run_id = run.info.run_id
    dataset = _dataset(measured)
    if dataset is not None:
        _log_dataset(client, run_id, dataset)
    model = _model(client, result, measured, experiment_id, run_id) if isinstance(measured, ResultVariant) else None
    _batch(client, run_id, measured.metrics, params(result, measured), _tags(result, measured), began, model, dataset)
    _log_windows(client, run_id, measured, began)
    if isinstance(measured, ResultVariant) and model is not None and verdict(measured) == "passed":
        _register(client, result, measured, model, run_id)
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
            "verdict": verdict(measured),
            "reasons": reasons or measured.error or "",
            "published": measured.published or "",
            "hub_commit": commit.group(1) if commit else "",
            "artifact_digest": measured.artifact.digest if measured.artifact else "",
            "artifact_path": measured.artifact.path if measured.artifact else "",
            "cached": " ".join(measured.cached),
        }
    return {**tags, **_release_of(result)}


def _release_tags(result: Result) -> dict[str, str]:
    return {
        "headline": summary.headline(result),
        "mlflow.note.content": summary.markdown(result),
        **_release_of(result),
    }


def _release_of(result: Result) -> dict[str, str]:
    return {
        "source_model": result.source.model,
        "source_commit": result.source.commit or "",
        "source_digest": result.source.digest,
        "prefect_run": result.prefect_run or "",
        "started": result.started,
    }


def _release_metrics(result: Result) -> dict[str, float]:
    counts = dict.fromkeys(("published", "passed", "rejected", "failed"), 0.0)
    for variant in result.variants:
        counts[variant.status] += 1
    return {"seconds": result.seconds, **{f"variants_{status}": count for status, count in counts.items()}}


def _batch(
    client: Any,
    run_id: str,
    metrics: dict[str, float],
    params: dict[str, str],
    tags: dict[str, str],
    timestamp: int,
    model: Any = None,
    dataset: Any = None,
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    linked: dict[str, Any] = {"run_id": run_id}
    if model is not None:
        linked["model_id"] = model.model_id
    if dataset is not None:
        linked |= {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    entries = [Metric(metric_key(name), value, timestamp, 0, **linked) for name, value in metrics.items()]
    known = client.get_run(run_id).data.params
    fresh = [Param(key, value[:6000]) for key, value in params.items() if key not in known]
    labels = [RunTag(key, value[:7900]) for key, value in tags.items()]
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


def _dataset(measured: Measured) -> Any:
    """The evaluation text as MLflow's data set, by the digest of its content."""
    from mlflow.entities import Dataset

    text = measured.protocol.get("text")
    if not text:
        return None
    name = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    digest = str(measured.protocol.get("text_sha256") or hashlib.sha256(name.encode()).hexdigest())[:36]
    return Dataset(name[:500], digest, "text", json.dumps({"text": text}))


def _log_dataset(client: Any, run_id: str, dataset: Any) -> None:
    from mlflow.entities import DatasetInput, InputTag

    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def _model(client: Any, result: Result, variant: ResultVariant, experiment_id: str, run_id: str) -> Any:
    """The variant as an MLflow model that lies elsewhere: found or made, never a copy of the weights."""
    import mlflow
    from mlflow.entities import LoggedModelOutput

    if variant.artifact is None:
        return None
    tags = {
        "artifact_digest": variant.artifact.digest,
        "artifact_path": variant.artifact.path,
        "published": variant.published or "",
        "verdict": verdict(variant),
    }
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", max_results=1)
    if found:
        client.set_logged_model_tags(found[0].model_id, tags)
        return found[0]
    model = mlflow.create_external_model(
        name=re.sub(r"[/:.%\"']", "-", f"{result.recipe['name']}-{variant.name}"),
        source_run_id=run_id,
        tags=tags,
        params={"base_model": result.source.model, **_flat("", variant.spec)},
        model_type="bitsandbytes",
        experiment_id=experiment_id,
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return model


def _register(client: Any, result: Result, variant: ResultVariant, model: Any, run_id: str) -> None:
    """Register a variant that passed, once for the same weights, and move the aliases.

    `newest` (MLflow reserves `latest`) is the least damaged variant of the newest release, `best` the least damaged of all releases that were
    measured as this one was (numbers of another text or window do not compare), `best-4bit` and `best-8bit` the same
    among their kind. Least damaged: the lowest mean KL divergence, then perplexity ratio, then size.
    """
    from mlflow.exceptions import MlflowException

    name = model_name(result.recipe)
    try:
        client.create_registered_model(name, tags={"base_model": result.source.model, "tame": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    assert variant.artifact is not None
    digest = variant.artifact.digest
    known = client.search_model_versions(f"name = '{name}' and tags.artifact_digest = '{digest}'", max_results=1)
    tags = {
        "artifact_digest": digest,
        "bits": bits(variant),
        "measured_as": _measured_as(result),
        "published": variant.published or "",
        "release": result.started,
        "variant": variant.name,
        **{key: repr(variant.metrics[key]) for key in ("kl_mean", "perplexity_ratio") if key in variant.metrics},
        "size_bytes": repr(variant.metrics.get("size_bytes", float(variant.artifact.bytes))),
    }
    if known:
        version = known[0].version
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    else:
        source = f"models:/{model.model_id}"
        version = client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id).version
    alike = client.search_model_versions(f"name = '{name}' and tags.measured_as = '{tags['measured_as']}'")
    newest = [other for other in alike if other.tags["release"] == max(each.tags["release"] for each in alike)]
    chosen = {"newest": newest, "best": alike}
    chosen |= {f"best-{kind}bit": [other for other in alike if other.tags["bits"] == kind] for kind in ("4", "8")}
    for alias, among in chosen.items():
        if among:
            client.set_registered_model_alias(name, alias, min(among, key=_damage).version)


def _damage(version: Any) -> tuple[float, float, float]:
    none = float("inf")
    kl, ratio, size = (float(version.tags.get(key, none)) for key in ("kl_mean", "perplexity_ratio", "size_bytes"))
    return kl, ratio, size


def _measured_as(result: Result) -> str:
    """A digest of what makes numbers comparable: the same base model's name and the same way of measuring."""
    protocol = result.baseline.protocol if result.baseline else {}
    content = json.dumps([result.source.model, result.recipe.get("evaluate"), protocol], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


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


def _flat(prefix: str, value: Any) -> dict[str, str]:
    """Nested mappings as dotted keys; lists as JSON; what is None or empty is left out."""
    if isinstance(value, dict):
        items: dict[str, str] = {}
        for key, inner in value.items():
            items |= _flat(f"{prefix}.{key}" if prefix else str(key), inner)
        return items
    if value is None or value in ([], ""):
        return {}
    return {re.sub(r"[^\w./ :-]", "-", prefix): value if isinstance(value, str) else json.dumps(value)}

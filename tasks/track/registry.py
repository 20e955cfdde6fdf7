"""Variants in MLflow's model registry: weights by reference and digest, and aliases that answer "which one?"."""

import hashlib
import json
import math
import re
from collections import Counter
from datetime import datetime
from typing import Any

from configs.schema import Recipe
from tasks import formatting
from tasks.gate import number_beside
from tasks.metrics import nats, pessimistic, read
from tasks.quantize.methods import method_of
from tasks.result import Measured, Result, ResultVariant
from tasks.track import mlflow_internals


def experiment_name(recipe: Recipe) -> str:
    """The experiment of a recipe: `track.experiment`, else the recipe's name."""
    return recipe.track.experiment or recipe.name


def run_name(recipe: Recipe, began: datetime) -> str:
    """What MLflow calls a release: the model, the variants, and when it began: `Qwen3-0.6B: int8, nf4 (2026-11-28 18:48)`."""
    variants = ", ".join(variant.label for variant in recipe.variants)
    return f"{formatting.short_name(recipe.source.model)}: {variants} ({began:%Y-%m-%d %H:%M})"


def model_name(recipe: Recipe) -> str:
    """The registered model of a recipe: its experiment's name, without what MLflow forbids in one."""
    return re.sub(r"[/:.%\"']", "-", experiment_name(recipe))


def bits(variant: ResultVariant) -> str:
    """Bits of a quantized weight, by the method; empty for somebody else's checkpoint."""
    if variant.spec.checkpoint is not None:
        return ""
    return str(method_of(variant.spec).bits(variant.spec))


def verdict(variant: ResultVariant) -> str:
    """Passed, rejected, measured, not measured or failed; what was published passed, if it was measured."""
    if not variant.measured and variant.status in ("passed", "published"):
        return formatting.NOT_MEASURED
    return "passed" if variant.status == "published" else variant.status


def tally(result: Result) -> str:
    """A release's verdict in a narrow column: `4/5 passed, 1 rejected`; in a word where all variants fared alike."""
    counts = Counter(map(verdict, result.variants))
    if len(counts) == 1:
        return next(iter(counts))
    others = (f", {count} {word}" for word, count in counts.most_common() if word != "passed")
    return f"{counts['passed']}/{counts.total()} passed{''.join(others)}"


def kl_and_limit(result: Result, measured: Measured | None) -> str:
    """The end of the KL divergence's interval that is judged, and its limit, in a narrow column: `0.0710 ≤ 0.35`."""
    found = read(measured.metrics).get("kl_mean") if measured else None
    if found is None or not math.isfinite(end := pessimistic(found)):
        return ""
    limit = result.recipe.gate.max_mean_kl
    if limit is None:
        return nats(end)
    return f"{number_beside(end, limit, 1, found.unit)} {'≤' if end <= limit else '>'} {limit:g}"


def approval(result: Result) -> str:
    """What a person said, in a line; empty where nobody was asked."""
    if (answer := result.approval) is None:
        return ""
    said = (
        f"approved {', '.join(answer.variants)}" if answer.variants else "refused" if answer.answered else "no answer"
    )
    return f"{said}: {answer.note}" if answer.note else said


def is_released(result: Result, variant: ResultVariant) -> bool:
    """Whether aliases may point to it: it kept the limits, and, where a person has to approve it, it was published."""
    return variant.status == "published" or (not result.recipe.publish.approve and variant.status == "passed")


def model(client: Any, result: Result, variant: ResultVariant, experiment_id: str, run_id: str) -> Any:
    """The variant as an MLflow model that lies elsewhere: found or made, never a copy of the weights."""
    from mlflow.entities import LoggedModelOutput

    if variant.artifact is None or variant.spec.checkpoint is not None:
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
    model = mlflow_internals.external_model(
        client,
        experiment_id,
        name=re.sub(r"[/:.%\"']", "-", f"{result.recipe.name}-{variant.name}"),
        source_run_id=run_id,
        tags=tags,
        params={"base_model": result.source.model, **formatting.flat("", variant.spec.model_dump(mode="json"))},
        model_type=method_of(variant.spec).family,
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return model


def register(client: Any, result: Result, variant: ResultVariant, model: Any, run_id: str) -> None:
    """Register a variant that passed, once for the same weights, and move the aliases.

    `newest` (MLflow reserves `latest`) is the least damaged variant of the newest release, `best` that of all releases
    measured as this one was (numbers of another text or window do not compare), `best-4bit` and `best-8bit` that among
    their kind. Least damaged: the lowest mean KL divergence, then perplexity ratio, then size.
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
    registered = client.search_model_versions(f"name = '{name}' and tags.artifact_digest = '{digest}'", max_results=1)
    tags: dict[str, str] = {
        "artifact_digest": digest,
        "bits": bits(variant),
        "measured_as": _measured_as(result),
        "published": variant.published or "",
        "release": result.started,
        "variant": variant.name,
        **{key: repr(variant.metrics[key]) for key in ("kl_mean", "perplexity_ratio") if key in variant.metrics},
        "size_bytes": repr(variant.metrics.get("size_bytes", float(variant.artifact.bytes))),
    }
    if registered:
        version = registered[0].version
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    else:
        source = f"models:/{model.model_id}"
        version = client.create_model_version(name, source, run_id, tags=tags, model_id=model.model_id).version
    alike = client.search_model_versions(f"name = '{name}' and tags.measured_as = '{tags['measured_as']}'")
    newest = [other for other in alike if other.tags["release"] == max(each.tags["release"] for each in alike)]
    chosen = {"newest": newest}
    if variant.measured:  # or nobody knows which is best
        chosen["best"] = alike
        chosen |= {f"best-{kind}bit": [other for other in alike if other.tags["bits"] == kind] for kind in ("4", "8")}
    aliases = client.get_registered_model(name).aliases
    for alias, among in chosen.items():
        best = min(among, key=_damage).version if among else None
        if best is not None and str(aliases.get(alias)) != str(best):  # MLflow tells webhooks of every one that is set
            client.set_registered_model_alias(name, alias, best)


def _damage(version: Any) -> tuple[float, float, float]:
    none = float("inf")
    kl, ratio, size = (float(version.tags.get(key, none)) for key in ("kl_mean", "perplexity_ratio", "size_bytes"))
    return kl, ratio, size


def _measured_as(result: Result) -> str:
    """A digest of what makes numbers comparable: the same base model's name and the same way of measuring."""
    protocol = result.baseline.protocol.model_dump(mode="json") if result.baseline else {}
    asked = result.recipe.evaluate.model_dump(mode="json") if result.recipe.evaluate else None
    content = json.dumps([result.source.model, asked, protocol], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]

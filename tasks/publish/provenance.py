"""tame.json: where a published model comes from, what it is made of, and what was measured. Its reader is a program.

    format       1
    source       model, revision, commit, licence, digest, and the sha256 of every file that was read
    variant      name and spec
    artifact     digest, bytes, and the sha256 of every file that was measured
    metrics, baseline, protocol, gate, notes, left      as in result.json, unrounded
    recipe       what was asked, without paths of the machine it ran on
    versions     of Python, tame and the libraries that decide the numbers
    documents    sha256 of the card and of the other files that were written for publishing
    run          what differs when the same thing is done again: hardware, speed, Prefect and MLflow run ids

Two of them that differ only in `run`, `documents` and measured times describe the same release: see `same_release`.
"""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any

from configs.schema import Recipe
from tasks.metrics import measured
from tasks.store.on_disk import digest_of

NAME = "tame.json"


def dump(content: dict[str, Any]) -> bytes:
    """The bytes of a tame.json: sorted, indented, one newline at the end."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def same_release(one: bytes, other: bytes) -> bool:
    """Whether two tame.json describe the same files, measured the same way with the same result."""
    try:
        first, second = json.loads(one), json.loads(other)
        return all(first[key] == second[key] for key in (first | second).keys() - {"run", "documents"})
    except (ValueError, TypeError, KeyError):
        return False


def identity(extra: dict[str, bytes]) -> str:
    """What `extra` says that a second run would say again."""
    content = json.loads(extra[NAME]) if NAME in extra else {}
    kept = {key: value for key, value in content.items() if key not in ("run", "documents")}
    return json.dumps(kept, sort_keys=True)


def tag(extra: dict[str, bytes], files: dict[str, str]) -> str:
    """A tag for a release: tame's version, variant and source commit, or the files' digest where no more is known."""
    content = json.loads(extra[NAME]) if NAME in extra else {}
    if "variant" not in content:
        return f"tame-{digest_of(files)[:12]}"
    source = content["source"]["commit"] or content["source"]["digest"]
    return f"tame-{content['versions'].get('tame', '0')}-{content['variant']['name']}-{source[:12]}"


def source_of(content: bytes) -> str | None:
    """The model that a tame.json says it was made from, if it says so."""
    try:
        return str(json.loads(content)["source"]["model"])
    except (ValueError, KeyError, TypeError):
        return None


def settled(present: dict[str, bytes], extra: dict[str, bytes]) -> dict[str, bytes]:
    """`extra`, or `present` if it tells of the same release and nobody has edited it: run ids and times that differ are no
    reason to publish again.
    """
    if NAME not in extra or present.keys() != extra.keys() or not same_release(present[NAME], extra[NAME]):
        return extra
    documents = {name: hashlib.sha256(content).hexdigest() for name, content in present.items() if name != NAME}
    return present if json.loads(present[NAME]).get("documents") == documents else extra


def base_name(model: str) -> str:
    """`model` as it can be shown to strangers: a path keeps its last part alone."""
    return PurePath(model).name if is_path(model) else model


def without_paths(given: Recipe) -> dict[str, Any]:
    """A recipe with the last part alone of every path that it names on the machine where it ran."""
    recipe = given.model_dump(mode="json")
    evaluate, publish = recipe["evaluate"], recipe["publish"]
    if evaluate and (files := evaluate["text"].get("files")):
        evaluate["text"] = {**evaluate["text"], "files": [PurePath(file).name for file in files]}
    calibration = recipe["calibration"]
    if files := calibration["text"].get("files"):
        calibration = {**calibration, "text": {**calibration["text"], "files": [PurePath(file).name for file in files]}}
    if evaluate and evaluate.get("task_path"):
        evaluate["task_path"] = PurePath(evaluate["task_path"]).name
    if publish["to"] == "folder":
        publish["repo"] = PurePath(publish["repo"]).name
    for variant in recipe["variants"]:
        if variant["checkpoint"]:
            variant["checkpoint"] = base_name(variant["checkpoint"])
    source = {**recipe["source"], "model": base_name(recipe["source"]["model"])}
    if source["adapter"]:
        source["adapter"] = base_name(source["adapter"])
    return {**recipe, "source": source, "calibration": calibration, "evaluate": evaluate, "publish": publish}


def as_asked(given: Recipe) -> dict[str, Any]:
    """`without_paths`, and without all that is left at its default."""
    asked: dict[str, Any] = _only(without_paths(given), given.model_dump(mode="json", exclude_defaults=True))
    return asked


def _only(values: Any, kept: Any) -> Any:
    """Of `values`, what `kept` has a place for."""
    if isinstance(values, dict) and isinstance(kept, dict):
        return {key: _only(value, kept[key]) for key, value in values.items() if key in kept}
    if isinstance(values, list) and isinstance(kept, list):
        return [_only(value, other) for value, other in zip(values, kept, strict=True)]
    return values


def is_path(model: str) -> bool:
    """Whether `model` names something on this machine, not a Hub repo."""
    return not model.startswith("package:") and (
        model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith(".gguf") or "\\" in model
    )


def lasting(metrics: dict[str, float]) -> dict[str, float]:
    """What a second measurement of the same files gives again."""
    return {name: value for name, value in metrics.items() if not measured(name)}


def of_this_run(metrics: dict[str, float]) -> dict[str, float]:
    """What it does not: times, speeds and memory, which vary from run to run."""
    return {name: value for name, value in metrics.items() if measured(name)}


def plain_document(folder: Path, files: dict[str, str], documents: dict[str, bytes]) -> bytes:
    """tame.json for a folder of which nothing more is known than its files."""
    size = sum((folder / name).stat().st_size for name in files)
    return dump(
        {
            "format": 1,
            "artifact": {"digest": digest_of(files), "bytes": size, "files": files},
            "documents": {name: hashlib.sha256(text).hexdigest() for name, text in sorted(documents.items())},
            "run": {},
        }
    )

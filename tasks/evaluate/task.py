"""Evaluate a baseline and its variants: what is cached, what runs in which process, and the numbers that come of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task
from prefect.states import Completed, State

from configs.schema import Evaluate
from tasks.download.text import LoadedText, load_text
from tasks.evaluate import comparison, lm_eval_run, weight_error
from tasks.evaluate.lm_eval_index import find_tasks, inputs_of, work_of
from tasks.evaluate.run import Work, measure
from tasks.quantize.methods import described_by, quantization_of
from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, name_of, pick, versions
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.values import Evaluation, Snapshot

STAGE = 4  # raise it when what a part measures, or how, changes
DECIDING = ("torch", "transformers", "tokenizers")
"""The libraries that decide the numbers of any model. Those that load or place its weights do not change them."""
Parts = dict[str, store.Artifact]


def evaluate_baseline(
    snapshot: Snapshot, spec: Evaluate, *, device: str = "auto", progress: Progress = show
) -> Evaluation:
    """Measure the model that variants are compared with, once for all of them and for all later runs.

    Raises:
        BadInputError: the text, the tasks or the model are not ones that can be measured.
        TameError: the checkpoint does not load, memory does not suffice, logits are not finite, a task's data is missing.
    """
    parts, cached = _baseline_parts(snapshot, spec, pick(device), progress)
    protocol = {"device": name_of(pick(device)), "text": _text_protocol(load_text(spec.text))}
    return _assembled("baseline", "baseline", parts, None, spec, protocol, cached)


def evaluate_variant(
    model_path: str,
    model_digest: str,
    label: str,
    baseline: Evaluation,
    snapshot: Snapshot,
    spec: Evaluate,
    *,
    device: str = "auto",
    progress: Progress = show,
) -> Evaluation:
    """Measure a checkpoint made from `snapshot` and compare it with `baseline`, position by position and item by item.

    Raises:
        BadInputError, TameError: as `evaluate_baseline`; also a baseline with another vocabulary.
    """
    device = pick(device)
    theirs, _ = _baseline_parts(snapshot, spec, device, progress)
    scores = theirs["scores"]
    inputs = {"baseline": scores.digest, "batch_size": spec.batch_size}
    work = Work(
        model=model_path,
        label=label,
        device=device,
        trust_remote_code=snapshot.trust_remote_code,
        spec=spec,
        text=None,
        baseline=scores.path,
        baseline_model=snapshot.path,
    )
    parts, cached = _parts(work, model_digest, inputs, progress, snapshot.digest)
    return _assembled("evaluation", label, parts, theirs, spec, baseline.protocol.model_dump(), cached)


def _baseline_parts(snapshot: Snapshot, spec: Evaluate, device: str, progress: Progress) -> tuple[Parts, bool]:
    text = load_text(spec.text)
    inputs = {"text": text.digest, **spec.model_dump(include={"window", "max_tokens", "batch_size"})}
    work = Work(
        model=snapshot.path,
        label="baseline",
        device=device,
        trust_remote_code=snapshot.trust_remote_code,
        spec=spec,
        text=text.text,
        baseline=None,
        baseline_model=None,
    )
    return _parts(work, snapshot.digest, inputs, progress)


def _parts(
    work: Work, digest: str, scores: dict[str, Any], progress: Progress, source: str | None = None
) -> tuple[Parts, bool]:
    """The parts that the spec asks for, each an artifact of its own, so that changing one measures no other again.

    `digest` is the model's; `source` that of the baseline's checkpoint, for a variant.
    """
    spec = work.spec
    common = {
        "model": digest,
        "trust_remote_code": work.trust_remote_code,
        "device": name_of(work.device),
        "stage": STAGE,
        "versions": _deciding_versions(Path(work.model)),
    }
    wanted: list[tuple[str, dict[str, Any]]] = [("scores", {**common, **scores})]
    if spec.tasks:
        found = find_tasks(spec.tasks, spec.task_path)
        floor = {"floor": work.baseline is None}
        wanted.append(("tasks", {**common, **inputs_of(spec, found), **floor, "rows": lm_eval_run.STAGE}))
        work = work.model_copy(update={"tasks": work_of(spec.tasks, found)})
    if spec.speed:
        wanted.append(("speed", {**common, **spec.speed.model_dump()}))
    if spec.samples and spec.samples.prompts:
        wanted.append(("samples", {**common, **spec.samples.model_dump()}))
    if source and work.baseline_model and weight_error.comparable(Path(work.baseline_model), Path(work.model)):
        wanted.append(("layers", {**common, "source": source, "layers": weight_error.STAGE}))

    def run(folders: dict[str, str]) -> None:
        with held():
            isolated(f"evaluate {work.label}", measure, work.model_copy(update={"folders": folders}), progress=progress)

    return _build_together(wanted, run)


def _deciding_versions(model: Path) -> dict[str, str]:
    """The versions of the libraries that decide what a model computes: a method's own only for models that it quantized."""
    described = described_by(quantization_of(model))
    own = described[0].libraries if described else ()
    return {name: found for name, found in versions(*own).items() if name in {*DECIDING, *own}}


def _build_together(
    wanted: list[tuple[str, dict[str, Any]]], run: Callable[[dict[str, str]], None]
) -> tuple[Parts, bool]:
    """Build what is missing of several artifacts by one call of `run`, which fills a folder for each of them.

    What was complete (its result.json is written last) before `run` failed is kept: a rerun repeats the rest alone.
    """
    parts: Parts = {}
    failures: list[Exception] = []
    cached = True

    def enter(rest: list[tuple[str, dict[str, Any]]], folders: dict[str, str]) -> None:
        nonlocal cached
        if not rest:
            if folders:
                cached = False
                try:
                    run(folders)
                except Exception as error:
                    failures.append(error)
            return
        kind, inputs = rest[0]

        def make(folder: Path) -> store.Made:
            enter(rest[1:], {**folders, kind: str(folder)})
            if not (folder / "result.json").exists():
                raise failures[0]
            return store.Made()

        try:
            parts[kind], there = store.build(kind, inputs, make)
        except Exception as error:
            if error not in failures:  # a store that is full or away: what else is complete is kept
                failures.append(error)
        else:
            if there:
                enter(rest[1:], folders)

    enter(wanted, {})
    if failures:
        raise failures[0]
    return parts, cached


def _assembled(
    kind: str, name: str, parts: Parts, baseline: Parts | None, spec: Evaluate, protocol: dict[str, Any], cached: bool
) -> Evaluation:
    prompts = spec.samples.prompts if spec.samples else []
    known = {key: protocol[key] for key in ("device", "text")}
    inputs = {
        "parts": {part: artifact.digest for part, artifact in parts.items()},
        "baseline": {part: artifact.digest for part, artifact in (baseline or {}).items()},
        "seed": spec.seed,
        "protocol": known,
        "prompts": prompts,
        "stage": comparison.STAGE,
    }

    def make(folder: Path) -> store.Made:
        paths = {part: Path(artifact.path) for part, artifact in parts.items()}
        theirs = {part: Path(artifact.path) for part, artifact in baseline.items()} if baseline else None
        comparison.assemble(paths, theirs, prompts, known, spec.seed, folder)
        return store.Made()

    artifact, there = store.build(kind, inputs, make)
    content = json.loads((Path(artifact.path) / comparison.RESULT).read_bytes())
    return Evaluation(name=name, path=artifact.path, digest=artifact.digest, cached=cached and there, **content)


def _text_protocol(text: LoadedText) -> dict[str, Any]:
    return {"name": text.name, "revision": text.revision, "sha256": text.digest}


@task(name="evaluate baseline", task_run_name="evaluate baseline", retries=0)
def baseline_task(snapshot: Snapshot, spec: Evaluate) -> State[Evaluation]:
    """`evaluate_baseline` in the flow."""
    value = evaluate_baseline(snapshot, spec)
    return Completed(name="Cached" if value.cached else "Completed", data=value)


@task(name="evaluate", task_run_name="evaluate {label}", retries=0)
def evaluate_task(
    model_path: str, model_digest: str, label: str, baseline: Evaluation, snapshot: Snapshot, spec: Evaluate
) -> State[Evaluation]:
    """`evaluate_variant` in the flow."""
    value = evaluate_variant(model_path, model_digest, label, baseline, snapshot, spec)
    return Completed(name="Cached" if value.cached else "Completed", data=value)

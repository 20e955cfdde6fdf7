"""Evaluate a baseline and its variants: what is cached, what runs in which process, and the numbers that come of it."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import KilledError
from configs.schema import Evaluate
from tasks.download.checkpoint import quantization_of
from tasks.download.text import LoadedText, load_text
from tasks.download.tokenizer_files import chat_template
from tasks.evaluate import comparison, lm_eval_run, samples, weight_error
from tasks.evaluate.lm_eval_index import find_tasks, inputs_of, work_of
from tasks.evaluate.run import FAILED, Role, Work, in_order, measure
from tasks.quantize.methods import libraries, reader_of
from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, instead_of_bfloat16, name_of, pick, versions
from tasks.runtime.progress import Progress, show
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Checkpoint, EvaluatedPart, Evaluation, Snapshot

log = logging.getLogger("tame.evaluate")

STAGE = 6  # raise it when what a part measures, or how, changes
COMPLETE = "result.json"
"""What a part writes last."""
ENDED = (COMPLETE, FAILED)
DECIDING = ("torch", "transformers", "tokenizers")
"""The libraries that decide the numbers of any model. Those that load or place its weights do not change them."""


def evaluate_baseline(
    snapshot: Snapshot,
    spec: Evaluate,
    *,
    text: LoadedText | None = None,
    compared: bool = True,
    device: str = "auto",
    progress: Progress = show,
) -> Evaluation:
    """Measure the model that variants are compared with, once for all of them and for all later runs.

    Args:
        snapshot: The model.
        spec: What to measure.
        text: The text that `spec.text` names. If it is None, it is read.
        compared: Whether variants will be compared with it: their comparison needs its hidden states and noise floors.
        device: Where to run.
        progress: Told what is done.

    Raises:
        BadInputError: the text, the tasks or the model are not ones that can be measured.
        TameError: the checkpoint does not load, memory does not suffice, or logits are not finite.
    """
    text, device = text or load_text(spec.text), pick(device)
    work = Work(
        model=snapshot.path,
        label="baseline" if compared else snapshot.name,
        device=device,
        trust_remote_code=snapshot.trust_remote_code,
        spec=spec,
        role="baseline" if compared else "alone",
        template=chat_template(Path(snapshot.path), spec.chat),
        text=text.text,
    )
    scores = {"text": text.digest, "role": work.role}
    scores |= spec.model_dump(include={"window", "max_tokens", "batch_size", "bos"})
    parts = _parts(work, _wanted(work, snapshot.digest, scores), progress)
    facts = {
        "device": name_of(device),
        "text": {"name": text.name, "revision": text.revision, "sha256": text.digest},
    }
    return _assembled(work, parts, None, facts)


def evaluate_variant(
    checkpoint: Checkpoint,
    baseline: Evaluation,
    snapshot: Snapshot,
    spec: Evaluate,
    *,
    device: str = "auto",
    progress: Progress = show,
) -> Evaluation:
    """Measure a checkpoint and compare it with `baseline`, position by position and item by item.

    Args:
        checkpoint: What to measure.
        baseline: What `evaluate_baseline` found of `snapshot`, by the same `spec`.
        snapshot: The baseline's model, which the checkpoint was made from.
        spec: What to measure.
        device: Where to run.
        progress: Told what is done.

    Raises:
        BadInputError, TameError: as `evaluate_baseline`; also a baseline with another vocabulary.
    """
    theirs = baseline.parts["scores"]
    work = Work(
        model=checkpoint.path,
        label=checkpoint.label,
        device=pick(device),
        trust_remote_code=snapshot.trust_remote_code,
        spec=spec,
        role="variant",
        template=chat_template(Path(snapshot.path), spec.chat),
        baseline=theirs.path,
        baseline_model=snapshot.path,
    )
    wanted = _wanted(work, checkpoint.digest, {"baseline": theirs.digest, "batch_size": spec.batch_size})
    wanted |= _layers(work, checkpoint, snapshot)
    facts = baseline.protocol.model_dump(include={"device", "text"})
    return _assembled(work, _parts(work, wanted, progress), baseline.parts, facts)


def compare_weights(
    checkpoint: Checkpoint, snapshot: Snapshot, *, device: str = "auto", progress: Progress = show
) -> Evaluation | None:
    """What the files of a checkpoint tell beside its source's, for one that nobody measures: the error of the weights.

    None where the format, or a source that is quantized itself, lets nobody compare them.

    Raises:
        TameError: the checkpoint cannot be read.
    """
    work = Work(
        model=checkpoint.path,
        label=checkpoint.label,
        device=pick(device),
        trust_remote_code=snapshot.trust_remote_code,
        spec=Evaluate(),
        role="variant",
        baseline_model=snapshot.path,
    )
    wanted = _layers(work, checkpoint, snapshot)
    return _assembled(work, _parts(work, wanted, progress), {}, {}) if wanted else None


def _layers(work: Work, checkpoint: Checkpoint, snapshot: Snapshot) -> dict[str, store.Wanted]:
    """The part that compares the weights of a checkpoint with its source's; nothing where nobody can."""
    if not weight_error.comparable(Path(snapshot.path), Path(checkpoint.path)):
        return {}
    inputs = {**_common(work, checkpoint.digest), "source": snapshot.digest, "layers": weight_error.STAGE}
    return {"layers": store.Wanted("layers", inputs)}


class _Parts(NamedTuple):
    """The parts that could be measured, why the others could not, and whether nothing had to be done."""

    made: dict[str, EvaluatedPart]
    failed: dict[str, str]
    cached: bool


def _common(work: Work, digest: str) -> dict[str, Any]:
    """What decides the numbers of every part: the model, by its digest, the device and the libraries."""
    other = instead_of_bfloat16(work.device)
    return {
        "model": digest,
        **({"instead_of_bfloat16": other} if other else {}),
        "trust_remote_code": work.trust_remote_code,
        "device": name_of(work.device),
        "stage": STAGE,
        "versions": _deciding_versions(Path(work.model)),
    }


def _wanted(work: Work, digest: str, scores: dict[str, Any]) -> dict[str, store.Wanted]:
    """The parts that the spec asks for, each an artifact of its own, so that changing one measures no other again."""
    spec, common = work.spec, _common(work, digest)
    wanted = {"scores": store.Wanted("scores", {**common, **scores})}
    floor = {"floor": work.role == "baseline", "rows": lm_eval_run.STAGE}
    chat = {"chat": hashlib.sha256(work.template.encode()).hexdigest()} if work.template else {}
    for name, inputs in inputs_of(spec, find_tasks(spec.tasks, spec.task_path)).items():
        wanted[f"{comparison.TASK}{name}"] = store.Wanted("tasks", {**common, **inputs, **floor, **chat})
    if spec.speed:
        wanted["speed"] = store.Wanted("speed", {**common, **spec.speed.model_dump()})
    if spec.samples and spec.samples.prompts != []:
        asked = {**spec.samples.model_dump(), **chat, "samples": samples.STAGE}
        wanted["samples"] = store.Wanted("samples", {**common, **asked})
    return wanted


def _parts(work: Work, wanted: dict[str, store.Wanted], progress: Progress) -> _Parts:
    failed: dict[str, str] = {}

    def run(folders: dict[str, Path]) -> None:
        """A part whose process is killed is left out, as one that fails is; without scores there is nothing."""
        found = find_tasks(work.spec.tasks, work.spec.task_path)
        asked = {name: work_of([name], found) for name in work.spec.tasks}
        remaining = in_order(folders)
        with held():
            while remaining:
                todo = work.model_copy(update={"folders": {part: folders[part] for part in remaining}, "tasks": asked})
                try:
                    isolated(f"evaluate {work.label}", measure, todo, progress=progress)
                    remaining = []
                except KilledError as error:
                    remaining = [
                        part for part in remaining if not any((folders[part] / name).is_file() for name in ENDED)
                    ]
                    if not remaining or remaining[0] == "scores":
                        raise
                    (folders[remaining[0]] / FAILED).write_text(str(error))
                    log.warning("%s: %s could not be measured: %s", work.label, remaining[0], error)
                    remaining = remaining[1:]
        failed.update(
            {part: (folder / FAILED).read_text() for part, folder in folders.items() if (folder / FAILED).is_file()}
        )

    made, cached = store.build_many(wanted, run, last=COMPLETE)
    parts = {name: EvaluatedPart(path=artifact.path, digest=artifact.digest) for name, artifact in made.items()}
    return _Parts(parts, failed, cached)


def _deciding_versions(model: Path) -> dict[str, str]:
    """The versions of the libraries that decide what a model computes: a method's own only for models that it quantized.

    Of somebody else's scheme nobody knows which that is, so that it may be any of them.
    """
    quantization = quantization_of(model)
    reader = reader_of(quantization)
    own = reader.libraries if reader else tuple(libraries()) if quantization else ()
    return {name: found for name, found in versions(*own).items() if name in {*DECIDING, *own}}


def _assembled(
    work: Work, parts: _Parts, baseline: dict[str, EvaluatedPart] | None, facts: dict[str, Any]
) -> Evaluation:
    """The numbers that come of the parts; of a comparison with `baseline`, if there is one."""
    kinds: dict[Role, str] = {"baseline": "baseline", "alone": "baseline", "variant": "evaluation"}
    inputs = {
        "parts": {name: part.digest for name, part in parts.made.items()},
        "baseline": {name: part.digest for name, part in (baseline or {}).items()},
        "failed": parts.failed,
        "seed": work.spec.seed,
        "protocol": facts,
        "stage": comparison.STAGE,
    }

    def make(folder: Path) -> on_disk.Made:
        ours, theirs = (
            None if evaluation is None else {name: Path(part.path) for name, part in evaluation.items()}
            for evaluation in (parts.made, baseline)
        )
        assert ours is not None
        comparison.assemble(ours, theirs, parts.failed, work.spec, facts, folder)
        return on_disk.Made()

    artifact, was_cached = store.build(kinds[work.role], inputs, make)
    content = json.loads((Path(artifact.path) / comparison.RESULT).read_bytes())
    return Evaluation(
        name=work.label,
        path=artifact.path,
        digest=artifact.digest,
        cached=parts.cached and was_cached,
        parts=parts.made,
        **content,
    )

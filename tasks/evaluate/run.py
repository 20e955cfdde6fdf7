"""Runs in a process of its own: loads one model once and measures everything that was asked for."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError, line
from configs.schema import Evaluate
from tasks.evaluate.comparison import TASK
from tasks.evaluate.lm_eval_index import TaskWork
from tasks.evaluate.model import Loaded
from tasks.runtime.progress import Progress, silent

log = logging.getLogger("tame.evaluate")

FAILED = "failed.txt"  # why a part could not be measured, in its folder

Role = Literal["baseline", "variant", "alone"]
"""What a model is measured for: to be compared with, to be compared, or neither."""


class Work(BaseModel):
    """A model, what to measure of it, and the folder that each part's result goes to."""

    model_config = ConfigDict(frozen=True)

    model: str
    """Folder of the checkpoint."""
    label: str
    device: str
    trust_remote_code: bool
    spec: Evaluate
    role: Role
    template: str | None = None
    """The chat template that samples and tasks go through, the baseline's for a variant; None: through none."""
    text: str | None = None
    """The text itself; a variant takes the baseline's tokens."""
    baseline: str | None = None
    """For a variant, the folder of the baseline's scores."""
    baseline_model: str | None = None
    """For a variant, the folder of the baseline's checkpoint."""
    tasks: dict[str, TaskWork] = {}
    """What each task needs, by its name."""
    folders: dict[str, Path] = {}
    """Of the parts that are wanted: scores, tasks/NAME, speed, samples, layers."""


def in_order(parts: Iterable[str]) -> list[str]:
    """Parts in the order in which `measure` does them."""
    order = ["speed", "samples", "scores", TASK, "layers"]
    return sorted(parts, key=lambda part: order.index(TASK if part.startswith(TASK) else part))


def measure(work: Work, *, progress: Progress = silent) -> None:
    """Measure one model. Each part writes its result.json when it is complete, whatever becomes of the next; one that cannot be
    measured writes why into FAILED, but for the scores.

    Speed and samples come first: they are of the weights as stored, and peak memory is that of a fresh process.

    Raises:
        BadInputError: a model, text or task that cannot be measured.
        TameError: the model does not load, or its scores cannot be measured, in one line.
    """

    def report(what: str, done: int, total: int) -> None:
        progress(f"{work.label}: {what}", done, total)

    def measure_part(part: str, run: Callable[[Path], None]) -> None:
        """Measure a part that takes down no other."""
        if part in work.folders:
            try:
                run(work.folders[part])
            except BadInputError:
                raise
            except Exception as error:
                log.debug("measuring %s of %s failed", part, work.label, exc_info=True)
                why = _reason(work, error)
                (work.folders[part] / FAILED).write_text(why)
                log.warning("%s: %s could not be measured: %s", work.label, part, why)

    try:
        if work.folders.keys() - {"layers"}:
            _measure_model(work, report, measure_part)
        measure_part("layers", lambda folder: _measure_layers(work, folder, report))
    except TameError as error:
        raise type(error)(f"{work.label}: {error}") from None
    except Exception as error:
        log.debug("evaluating %s failed", work.label, exc_info=True)
        raise TameError(f"{work.label}: {_reason(work, error)}") from None


def _reason(work: Work, error: Exception) -> str:
    from tasks.evaluate.memory import out_of_memory

    if isinstance(error, TameError):
        return str(error)
    if out_of_memory(error):
        return f"no memory on {work.device} ({line(error)}); free some, or use a larger device"
    return f"{type(error).__name__}: {line(error)}"


def _measure_layers(work: Work, folder: Path, report: Progress) -> None:
    from tasks.evaluate.weight_error import layer_errors
    from tasks.runtime.quiet import quieten

    quieten()
    source, made = Path(str(work.baseline_model)), Path(work.model)
    layer_errors(source, made, work.device, folder, work.trust_remote_code, report)


def _measure_model(work: Work, report: Progress, measure_part: Callable[[str, Callable[[Path], None]], None]) -> None:
    from tasks.evaluate.cpu_float32 import widen
    from tasks.evaluate.lm_eval_run import run_tasks
    from tasks.evaluate.memory import reuse_memory
    from tasks.evaluate.model import dequantize, load, repacked
    from tasks.evaluate.samples import answer_samples
    from tasks.evaluate.speed import measure_speed

    path, spec = Path(work.model), work.spec

    def loading() -> Loaded:
        loaded = load(path, work.device, work.trust_remote_code)
        loaded.tokenizer.chat_template = work.template
        return loaded

    loaded = loading()
    if (speed := spec.speed) is not None:
        measure_part("speed", lambda folder: measure_speed(loaded, speed, folder, report))
    if (samples := spec.samples) is not None:
        measure_part("samples", lambda folder: answer_samples(loaded, samples, folder, report))
    if not any(part == "scores" or part.startswith(TASK) for part in work.folders):
        return
    reuse_memory()
    if repacked(loaded):
        del loaded
        loaded = loading()
    dequantize(loaded)
    widen(loaded.model)
    if "scores" in work.folders:
        _measure_scores(work, loaded, work.folders["scores"], report)
    for name, needs in work.tasks.items():
        measure_part(
            f"{TASK}{name}",
            lambda folder, needs=needs: run_tasks(loaded, needs, spec, folder, report, floor=work.role == "baseline"),  # type: ignore[misc]
        )


def _measure_scores(work: Work, loaded: Loaded, folder: Path, report: Progress) -> None:
    from tasks.evaluate.perplexity import score_alone, score_baseline, score_variant

    spec = work.spec
    if work.role == "variant":
        baseline, source = Path(str(work.baseline)), Path(str(work.baseline_model))
        score_variant(loaded, baseline, source, spec.batch_size, folder, report, work.trust_remote_code)
        return
    assert work.text is not None
    score = score_baseline if work.role == "baseline" else score_alone
    score(loaded, work.text, spec, folder, report)

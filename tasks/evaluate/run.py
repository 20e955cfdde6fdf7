"""What runs in a process of its own: one model, loaded once, and everything that is asked of it."""

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from configs.errors import TameError, line
from configs.schema import Evaluate
from tasks.evaluate.lm_eval_index import TaskWork
from tasks.runtime.progress import Progress, silent

log = logging.getLogger("tame.evaluate")


class Work(BaseModel):
    """A model, what to measure of it, and the folder that each part's result goes to."""

    model_config = ConfigDict(frozen=True)

    model: str
    """Folder of the checkpoint."""
    label: str
    device: str
    trust_remote_code: bool
    spec: Evaluate
    text: str | None
    """For a baseline, the text itself; a variant takes the baseline's tokens."""
    baseline: str | None
    """For a variant, the folder of the baseline's scores."""
    baseline_model: str | None
    tasks: TaskWork | None = None
    folders: dict[str, str] = {}
    """Of the parts that are wanted: scores, tasks, speed, samples, layers."""


def measure(work: Work, *, progress: Progress = silent) -> None:
    """Measure one model. Each part writes its result.json when it is complete, whatever becomes of the next.

    Speed and samples come first: they are of the weights as stored, and peak memory is that of a fresh process.

    Raises:
        BadInputError: a model, text or task that cannot be measured.
        TameError: whatever else goes wrong, in one line.
    """
    from tasks.evaluate.memory import out_of_memory

    try:
        _measure(work, progress)
    except TameError as error:
        raise type(error)(f"{work.label}: {error}") from None
    except Exception as error:
        log.debug("evaluating %s failed", work.label, exc_info=True)
        if out_of_memory(error):
            raise TameError(
                f"{work.label}: no memory on {work.device} ({line(error)}); free some, or use a larger device"
            ) from None
        raise TameError(f"{work.label}: {type(error).__name__}: {line(error)}") from None


def _measure(work: Work, progress: Progress) -> None:
    def told(what: str, done: int, total: int) -> None:
        progress(f"{work.label}: {what}", done, total)

    folders = {name: Path(folder) for name, folder in work.folders.items()}
    if folders.keys() - {"layers"}:
        _measure_model(work, folders, told)
    if "layers" in folders:
        from tasks.evaluate.weight_error import layer_errors
        from tasks.quantize.quiet import quieten

        quieten()
        source, made = Path(str(work.baseline_model)), Path(work.model)
        layer_errors(source, made, work.device, folders["layers"], work.trust_remote_code, told)


def _measure_model(work: Work, folders: dict[str, Path], told: Progress) -> None:
    from tasks.evaluate.cpu_float32 import widen
    from tasks.evaluate.memory import reuse_memory
    from tasks.evaluate.model import dequantize, load, repacked
    from tasks.evaluate.perplexity import score_baseline, score_variant
    from tasks.evaluate.speed import answer_samples, measure_speed

    path, spec = Path(work.model), work.spec
    loaded = load(path, work.device, work.trust_remote_code)
    if "speed" in folders and spec.speed:
        measure_speed(loaded, spec.speed, folders["speed"], told)
    if "samples" in folders and spec.samples:
        answer_samples(loaded, spec.samples, folders["samples"], told)
    if not {"scores", "tasks"} & folders.keys():
        return
    reuse_memory()
    if repacked(loaded):
        del loaded
        loaded = load(path, work.device, work.trust_remote_code)
    dequantize(loaded)
    widen(loaded.model)
    if "scores" in folders:
        if work.baseline is None:
            assert work.text is not None
            score_baseline(loaded, work.text, spec.window, spec.max_tokens, spec.batch_size, folders["scores"], told)
        else:
            score_variant(
                loaded,
                Path(work.baseline),
                Path(str(work.baseline_model)),
                spec.batch_size,
                folders["scores"],
                told,
                work.trust_remote_code,
            )
    if "tasks" in folders and work.tasks:
        from tasks.evaluate.lm_eval_run import run_tasks

        run_tasks(loaded, work.tasks, spec, folders["tasks"], told, floor=work.baseline is None)

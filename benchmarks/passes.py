"""Seconds of each part of an evaluation, and of its forward passes: `python -m benchmarks.passes MODEL [--device cuda]`.

MODEL is one of `benchmarks.quantize` (random weights, made here) or a folder. It is quantized to nf4, and both are measured in
this process, by the functions of `tame evaluate`: perplexity and comparison, PIQA's items, samples, speed, errors of the weights.
A forward pass is timed from before the model is called until what it computes is there, by CUDA's events on a GPU.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.quantize import MODELS, make_model

SPENT: dict[str, dict[str, float]] = {}
PASSES: list[Callable[[], float]] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """Adds what is inside to the part `name`."""
    PASSES.clear()
    began = time.perf_counter()
    yield
    spent = SPENT.setdefault(name, {"seconds": 0.0, "passes": 0.0, "count": 0})
    spent["passes"] += sum(took() for took in PASSES)
    spent["count"] += len(PASSES)
    spent["seconds"] += time.perf_counter() - began


def timed(module: Any, function: str, name: str) -> None:
    """Puts `part(name)` around a function."""
    original = getattr(module, function)

    def inside(*args: Any, **options: Any) -> Any:
        with part(name):
            return original(*args, **options)

    setattr(module, function, inside)


def watched(model: Any) -> None:
    """Times every call of `model`."""
    import torch

    cuda, started = model.device.type == "cuda", list[Any]()

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: Any, end: Any) -> float:
        if not cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def before(*_: Any) -> None:
        started.append(now())

    def after(*_: Any) -> None:
        start, end = started.pop(), now()
        PASSES.append(lambda: seconds(start, end))

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


def patched() -> None:
    """Parts and passes are timed, and the work is done here, not in a process of its own."""
    from tasks.evaluate import lm_eval_run, model, run, samples, speed, task

    load = model.load

    def watching(*args: Any, **options: Any) -> Any:
        with part("loading"):
            loaded = load(*args, **options)
        watched(loaded.model)
        return loaded

    model.load = watching
    timed(model, "dequantize", "dequantizing")
    timed(speed, "measure_speed", "speed")
    timed(samples, "answer_samples", "samples")
    timed(run, "_measure_scores", "perplexity and comparison")
    timed(lm_eval_run, "run_tasks", "PIQA")
    timed(run, "_measure_layers", "errors of the weights")
    task.isolated = lambda _, function, *args, progress: function(*args)  # type: ignore[assignment]


def main() -> None:
    """Measure a model and its nf4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(MODELS)}, or a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", help="a folder whose tokenizer goes with a model that is made here")
    parser.add_argument("--text", required=True, help="a file")
    parser.add_argument("--piqa", help="PIQA's items, JSON a line: goal, sol1, sol2, label")
    parser.add_argument("--items", type=int, default=1838)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("TAME_HOME", temporary)
        measure(options, Path(temporary))
    print(
        "| of | part | seconds | forward passes | seconds of these | ratio |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for name, spent in SPENT.items():
        ratio = f"{spent['seconds'] / spent['passes']:.2f}" if spent["passes"] else ""
        print(f"| {name} | {spent['seconds']:.1f} | {spent['count']:.0f} | {spent['passes']:.1f} | {ratio} |")


def measure(options: argparse.Namespace, work: Path) -> None:
    """Both models, as a recipe has them measured."""
    from benchmarks.piqa import write_task
    from configs.schema import Evaluate, Samples, Source, Speed, TextSource, Variant
    from tasks.download.inspection import inspect_source
    from tasks.download.task import download
    from tasks.evaluate.task import evaluate_baseline, evaluate_variant
    from tasks.quantize.task import quantize
    from tasks.values import Checkpoint

    folder = make_model(work, options.model) if options.model in MODELS else Path(options.model)
    if options.tokenizer and options.model in MODELS:
        for path in Path(options.tokenizer).glob("*token*.json"):
            shutil.copy(path, folder)
        for path in Path(options.tokenizer).glob("chat_template.jinja"):
            shutil.copy(path, folder)
    more: dict[str, Any] = {} if options.batch is None else {"batch_size": options.batch}
    if options.piqa:
        (work / "tasks").mkdir()
        write_task(Path(options.piqa), options.items, work / "tasks")
        more |= {"tasks": ["piqa_own"], "task_path": str(work / "tasks")}
    spec = Evaluate(
        text=TextSource(files=[options.text]),
        window=options.window,
        max_tokens=options.tokens,
        samples=Samples(),
        speed=Speed(),
        **more,
    )
    source = Source(model=str(folder))
    snapshot = download(source, inspect_source(source))
    made = quantize(snapshot, Variant(method="nf4"), device=options.device)
    checkpoint = Checkpoint(path=made.path, digest=made.digest, label="nf4")
    patched()
    print(json.dumps(spec.model_dump(mode="json", exclude_defaults=True)), flush=True)
    baseline = evaluate_baseline(snapshot, spec, device=options.device)
    for name in list(SPENT):
        SPENT[f"baseline | {name}"] = SPENT.pop(name)
    evaluate_variant(checkpoint, baseline, snapshot, spec, device=options.device)
    for name in [name for name in SPENT if " | " not in name]:
        SPENT[f"nf4 | {name}"] = SPENT.pop(name)


if __name__ == "__main__":
    main()

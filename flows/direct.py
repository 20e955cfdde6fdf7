"""The stages of a release as plain functions, without Prefect: for what is cached, and for a terminal."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configs.errors import NotCachedError
from configs.schema import Calibrate, Evaluate, Gate, Publish, Recipe, Source, Variant
from tasks.calibrate.sequences import Part
from tasks.calibrate.task import calibrate
from tasks.download.task import download
from tasks.download.text import LoadedText
from tasks.evaluate.task import compare_weights, evaluate_baseline, evaluate_variant
from tasks.fit.task import fit
from tasks.fitted import Fitted
from tasks.gate import judge
from tasks.plan import Plan, preflight
from tasks.publish.approval import Shown
from tasks.publish.task import publish
from tasks.quantize.task import quantize
from tasks.serve.task import serve
from tasks.values import (
    Answer,
    Calibration,
    Checkpoint,
    Evaluation,
    Found,
    Published,
    Quantized,
    Served,
    Snapshot,
    Verdict,
)


class Stages(NamedTuple):
    """The stages of a release, as something that runs them offers them."""

    plan: Callable[[Recipe, Path], Plan]
    download: Callable[[Source, Found], Snapshot]
    baseline: Callable[[Snapshot, Evaluate, LoadedText], Evaluation]
    calibrate: Callable[[Snapshot, Calibrate, Part], Calibration]
    fit: Callable[[Snapshot, Variant, Gate, Calibrate, Calibration | None], Fitted]
    quantize: Callable[[Snapshot, Variant, Calibration | None, Fitted | None], Quantized]
    evaluate: Callable[[Checkpoint, Evaluation, Snapshot, Evaluate], Evaluation]
    weights: Callable[[Checkpoint, Snapshot], Evaluation | None]
    gate: Callable[[str, dict[str, float], Gate], Verdict]
    serve: Callable[[Checkpoint, str, bool], Served]
    approve: Callable[[Shown], Answer]
    publish: Callable[[str, Path, dict[str, str], dict[str, bytes], str, Publish], Published]


def nobody_to_ask(shown: Shown) -> Answer:
    """End a run that only looks into the cache: a person would have to approve what is published.

    Raises:
        NotCachedError: always.
    """
    raise NotCachedError(f"{', '.join(shown.targets)} would have to be approved")


DIRECT = Stages(
    plan=preflight,
    download=download,
    baseline=lambda snapshot, spec, text: evaluate_baseline(snapshot, spec, text=text),
    calibrate=calibrate,
    fit=fit,
    quantize=quantize,
    evaluate=evaluate_variant,
    weights=compare_weights,
    gate=lambda _variant, metrics, gate: judge(metrics, gate),
    serve=serve,
    approve=nobody_to_ask,
    publish=lambda _label, *given: publish(*given),
)
"""The plain functions."""

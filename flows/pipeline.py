"""What a release does, stage after stage, whoever runs the stages: Prefect's tasks, or, where all is cached, plain calls.

It says what each stage came to, a line each: on the screen of `tame run`, and in Prefect's log of a run.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configs.errors import NotCachedError, named_line
from configs.schema import Calibrate, Evaluate, Gate, Publish, Recipe, Source, Variant
from tasks import result as results
from tasks.calibrate.prepare import calibrate
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tasks.download.text import LoadedText
from tasks.evaluate.sanity import far_below
from tasks.evaluate.task import compare_weights, evaluate_baseline, evaluate_variant
from tasks.fit.task import fit
from tasks.fitted import Fitted
from tasks.formatting import NOT_MEASURED, figure
from tasks.gate import judge
from tasks.plan import Plan, preflight
from tasks.publish.approval import Shown
from tasks.publish.card import release_files
from tasks.publish.task import publish
from tasks.quantize.task import quantize
from tasks.result import Result, ResultVariant
from tasks.runtime import progress
from tasks.store import cache_only
from tasks.store.names import remember
from tasks.store.recall import recalled
from tasks.values import Answer, Calibration, Checkpoint, Evaluation, Found, Published, Quantized, Snapshot, Verdict

log = logging.getLogger("tame.release")


class Stages(NamedTuple):
    """The stages of a release, as something that runs them offers them."""

    plan: Callable[[Recipe, Path], Plan]
    download: Callable[[Source, Found], Snapshot]
    baseline: Callable[[Snapshot, Evaluate, LoadedText], Evaluation]
    calibrate: Callable[[Snapshot, Calibrate], Calibration]
    fit: Callable[[Snapshot, Variant, Gate, Calibrate, Calibration | None], Fitted]
    quantize: Callable[[Snapshot, Variant, Calibration | None, Fitted | None], Quantized]
    evaluate: Callable[[Checkpoint, Evaluation, Snapshot, Evaluate], Evaluation]
    weights: Callable[[Checkpoint, Snapshot], Evaluation | None]
    gate: Callable[[str, dict[str, float], Gate], Verdict]
    approve: Callable[[Shown], Answer]
    publish: Callable[[str, Path, dict[str, str], dict[str, bytes], str, Publish], Published]


def nobody_to_ask(shown: Shown) -> Answer:
    """For a run that makes nothing: it ends here, as something would have to be published.

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
    approve=nobody_to_ask,
    publish=lambda _label, *given: publish(*given),
)
"""The plain functions."""


def make(
    recipe: Recipe,
    folder: Path,
    result: Result,
    stages: Stages,
    before: Callable[[], None] = lambda: None,
    after: Callable[[str, Result], None] = lambda _label, _result: None,
    say: Callable[[str], None] = log.info,
) -> Result:
    """Everything that `recipe` asks for, and `result` with what came of it.

    Args:
        recipe: What to do.
        folder: Where the run's result goes; variants published to a relative folder go below it.
        result: What is known so far: nothing was reached.
        stages: What runs the stages.
        before: Called before each variant, and before each is published.
        after: Called with the label of a variant that was measured, or failed, and what is known then.
        say: Given what each stage came to, in a line.

    Raises:
        NotCachedError: something is missing within `tasks.store.cache_only.nothing_made`. Whatever `before` raises.
    """
    lines = StageLines(recipe, stages, say)
    try:
        plan = stages.plan(recipe, folder)
        lines.published = len(plan.targets)
        lines.begin("downloading" if plan.found.path is None else "reading the model")
        snapshot = stages.download(recipe.source, plan.found)
        lines.downloaded(snapshot)
        remember(snapshot.digest, snapshot.name)
        result = result.with_source(snapshot, plan.found.licence, plan.found.card)
        baseline = None
        if recipe.evaluate is not None:
            assert plan.text is not None
            baseline = _checked(stages.baseline(snapshot, recipe.evaluate, plan.text), plan)
            lines.baseline(baseline)
        result = result.with_baseline(baseline, snapshot)
    except NotCachedError:
        raise
    except Exception as error:
        lines.failed(error)
        return result.ended_by(error)
    for variant in recipe.variants:
        before()
        lines.begin(variant.label)
        made = _measure(lines, result.variant(variant.label), variant, snapshot, baseline, recipe)
        lines.measured(made)
        result = result.with_variant(made)
        after(variant.label, result)
    passed = {label: to for label, to in plan.targets.items() if result.variant(label).status == "passed"}
    lines.published = len(passed)
    if not recipe.publish.approve:
        for label, target in passed.items():
            before()
            documents = partial(release_files, result, label, plan.targets, plan.benchmarks)
            result = _publish(lines, result, label, target, documents)
        return result
    shown = _to_show(result, passed, plan)
    return _publish_shown(shown, lines, before) if shown.targets else shown.result


def go_on(
    shown: Shown, stages: Stages, before: Callable[[], None] = lambda: None, say: Callable[[str], None] = log.info
) -> Result:
    """Go on with a release that another process has measured and asked about; as `make`, from there."""
    lines = StageLines(shown.result.recipe, stages, say)
    lines.done = lines.stages
    return _publish_shown(shown, lines, before)


def _publish_shown(shown: Shown, lines: "StageLines", before: Callable[[], None]) -> Result:
    """Ask what of `shown` is to be published, publish that, and return the result with what came of it."""
    answer, result, began = lines.by.approve(shown), shown.result, time.monotonic()
    result = result.model_copy(update={"approval": answer})
    lines.published = len(answer.variants)
    for label, target in shown.targets.items():
        if label not in answer.variants:
            result = result.with_variant(results.refused(result.variant(label), answer))
            continue
        before()
        result = _publish(lines, result, label, target, partial(shown.documents.__getitem__, label))
    return result.model_copy(update={"seconds": round(shown.result.seconds + time.monotonic() - began, 3)})


def _to_show(result: Result, passed: dict[str, str], plan: Plan) -> Shown:
    """What somebody has to be asked about: all that passed but what is published already, just as it would be."""
    documents: dict[str, dict[str, bytes]] = {}
    for label, target in passed.items():
        try:
            made = release_files(result, label, plan.targets, plan.benchmarks)
            with cache_only.nothing_made():
                done = _published(result, label, target, made, partial(DIRECT.publish, label))
            result = result.with_variant(results.published(result.variant(label), done))
        except NotCachedError:
            documents[label] = made
        except Exception as error:
            result = result.with_variant(results.failed(result.variant(label), error))
    return Shown(result=result, targets={label: passed[label] for label in documents}, documents=documents)


def _checked(baseline: Evaluation, plan: Plan) -> Evaluation:
    """A baseline, flagged where it is far below what its authors published."""
    flags = far_below(baseline.metrics, plan.published)
    for flag in flags:
        log.warning("baseline: %s", flag)
    return baseline.model_copy(update={"notes": [*baseline.notes, *flags]})


def _measure(
    lines: "StageLines",
    known: ResultVariant,
    variant: Variant,
    snapshot: Snapshot,
    baseline: Evaluation | None,
    recipe: Recipe,
) -> ResultVariant:
    """A variant made, measured and judged; or only made, where there is no baseline to measure it against."""
    stages = lines.by
    try:
        if variant.checkpoint is not None and baseline is not None and recipe.evaluate is not None:
            theirs = stages.download(variant.source, inspect_source(variant.source, quantized=True))
            known = results.found(known, theirs)
            checkpoint = Checkpoint(path=theirs.path, digest=theirs.digest, label=variant.label)
            return results.judged(known, stages.evaluate(checkpoint, baseline, snapshot, recipe.evaluate), None)
        calibration = stages.calibrate(snapshot, recipe.calibration) if variant.calibrate else None
        fitted = None
        if variant.fit is not None:
            fitted = stages.fit(snapshot, variant, recipe.gate, recipe.calibration, calibration)
            lines.fitted(fitted)
        quantized = stages.quantize(snapshot, variant, calibration, fitted)
        known = results.quantized(known, quantized, fitted)
        lines.quantized()
        remember(quantized.digest, f"{snapshot.name} {variant.label}")
        checkpoint = Checkpoint(path=quantized.path, digest=quantized.digest, label=variant.label)
        if baseline is None or recipe.evaluate is None:
            return results.unmeasured(known, stages.weights(checkpoint, snapshot))
        evaluation = stages.evaluate(checkpoint, baseline, snapshot, recipe.evaluate)
        verdict = stages.gate(variant.label, {**known.metrics, **evaluation.metrics}, recipe.gate)
        return results.judged(known, evaluation, verdict)
    except NotCachedError:
        raise
    except Exception as error:
        return results.failed(known, error)


def _publish(
    lines: "StageLines", result: Result, label: str, target: str, documents: Callable[[], dict[str, bytes]]
) -> Result:
    """`result` with the variant `label` published, or failed."""
    lines.begin(f"publishing {label}")
    try:
        by = partial(lines.by.publish, label)
        done = results.published(result.variant(label), _published(result, label, target, documents(), by))
    except NotCachedError:
        raise
    except Exception as error:
        done = results.failed(result.variant(label), error)
    lines.publishing(done)
    return result.with_variant(done)


def _published(
    result: Result,
    label: str,
    target: str,
    documents: dict[str, bytes],
    by: Callable[[Path, dict[str, str], dict[str, bytes], str, Publish], Published],
) -> Published:
    artifact, spec, answer = result.variant(label).artifact, result.recipe.publish, result.approval
    assert artifact is not None
    if answer is None:
        return by(Path(artifact.path), artifact.files, documents, target, spec)
    spec = spec.model_copy(update={"private": answer.private})
    return by(recalled(artifact.path), artifact.files, documents, target, spec)


class StageLines:
    """Says what each stage came to: `✓ 3/6 nf4 quantized 1.2 s · measured 66 s · KL 0.1030 · passed`."""

    def __init__(self, recipe: Recipe, by: Stages, say: Callable[[str], None]) -> None:
        self.by, self.say, self.how, self.fit = by, say, list[str](), list[str]()
        self.done, self.stages, self.published = 0, 1 + (recipe.evaluate is not None) + len(recipe.variants), 0
        self.begin("looking at the model")

    def begin(self, what: str) -> None:
        """A stage begins."""
        self.what, self.started, self.how, self.fit = what, time.monotonic(), [], []
        progress.begin(f"{self.done + 1}/{self.stages + self.published} {what}")

    def downloaded(self, snapshot: Snapshot) -> None:
        """The source is here."""
        self._say("✓", snapshot.name, ["here already" if snapshot.cached else f"downloaded {self._seconds()}"])
        self.begin("baseline")

    def baseline(self, baseline: Evaluation) -> None:
        """The original was measured."""
        how = "measured before" if baseline.cached else f"measured {self._seconds()}"
        perplexity = baseline.metrics.get("perplexity")
        perplexities = [] if perplexity is None else [f"perplexity {figure('perplexity', perplexity)}"]
        self._say("✓", "baseline", [how, *perplexities])

    def fitted(self, fitted: Fitted) -> None:
        """The mix that keeps a variant's limit is known; it is written now."""
        kept = fitted.kept if fitted.modules or fitted.in_8_bits else "all is quantized"
        how = "fitted before" if fitted.cached else f"fitted {self._seconds()}"
        self.fit = [f"{how} to {fitted.limit}: {kept}"]
        self.started = time.monotonic()

    def quantized(self) -> None:
        """A variant was quantized; it is measured now."""
        self.how.append(self._seconds())
        self.started = time.monotonic()

    def measured(self, variant: ResultVariant) -> None:
        """A variant was quantized and measured, or has failed."""
        if variant.status == "failed":
            self._say("✗", variant.name, [f"failed after {self._seconds()}", str(variant.error)])
            return
        quantized = "before" if "quantize" in variant.cached else self.how[0]
        if not variant.measured:
            self._say("✓", variant.name, [f"quantized {quantized}", NOT_MEASURED])
            return
        measured = "before" if "evaluate" in variant.cached else self._seconds()
        how = [*self.fit, f"quantized {quantized}", f"measured {measured}"]
        damage = variant.metrics.get("kl_mean")
        divergence = [] if damage is None else [f"KL {figure('kl_mean', damage)}"]
        reasons = variant.gate.reasons if variant.gate else []
        mark = "✗" if variant.status == "rejected" else "✓"
        self._say(mark, variant.name, [*how, *divergence, *reasons, variant.status])

    def publishing(self, variant: ResultVariant) -> None:
        """A variant is where it was to go, or it has failed."""
        if variant.status == "failed":
            self._say("✗", variant.name, ["not published", str(variant.error)])
        else:
            self._say("✓", variant.name, [f"published {self._seconds()}", str(variant.published)])

    def failed(self, error: Exception) -> None:
        """A stage that all others need has failed."""
        self._say("✗", self.what, [f"failed after {self._seconds()}", named_line(error, limit=None)])

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.started:.1f} s"

    def _say(self, mark: str, what: str, how: list[str]) -> None:
        self.done += 1
        progress.begin("")
        self.say(f"{mark} {self.done}/{self.stages + self.published} {what} {' · '.join(how)}")

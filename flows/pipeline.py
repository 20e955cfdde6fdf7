"""What a release does, stage after stage, whoever runs the stages: Prefect's tasks, or, where all is cached, plain calls.

It says what each stage came to, a line each: on the screen of `tame run`, and in Prefect's log of a run.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from configs.errors import NotCachedError, named_line
from configs.schema import Publish, Recipe, Variant
from flows.direct import DIRECT, Stages
from flows.stage_lines import StageLines
from tasks import result as results
from tasks.download.inspection import inspect_source
from tasks.evaluate.sanity import far_below
from tasks.plan import Plan
from tasks.publish.approval import Shown
from tasks.publish.card import release_files
from tasks.quantize.preview import check
from tasks.result import Result, ResultVariant
from tasks.store import cache_only
from tasks.store.names import remember
from tasks.store.recall import recalled
from tasks.values import Checkpoint, Evaluation, Published, Snapshot

log = logging.getLogger("tame.release")


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
        check(snapshot, recipe.variants)
        baseline = _baseline(lines, recipe, snapshot, plan)
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
        made = _serve(lines, made, snapshot, recipe)
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


def _publish_shown(shown: Shown, lines: StageLines, before: Callable[[], None]) -> Result:
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


def _baseline(lines: StageLines, recipe: Recipe, snapshot: Snapshot, plan: Plan) -> Evaluation | None:
    """The baseline, flagged where it is far below what its authors published; None where nothing is measured."""
    if recipe.evaluate is None or plan.text is None:
        return None
    baseline = lines.by.baseline(snapshot, recipe.evaluate, plan.text)
    lines.baseline(baseline)
    flags = far_below(baseline.metrics, plan.published)
    for flag in flags:
        log.warning("baseline: %s", flag)
    return baseline.model_copy(update={"notes": [*baseline.notes, *flags]})


def _measure(
    lines: StageLines,
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
        calibration = None
        if variant.calibrate:
            calibration = stages.calibrate(snapshot, recipe.calibration, recipe.codes_part)
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


def _serve(lines: StageLines, made: ResultVariant, snapshot: Snapshot, recipe: Recipe) -> ResultVariant:
    """`made`, if it passed, with what the programs that the recipe names make of it: one that does not open it is no failure."""
    if made.status != "passed" or made.artifact is None:
        return made
    checkpoint = Checkpoint(path=made.artifact.path, digest=made.artifact.digest, label=made.name)
    for runtime in recipe.serve:
        try:
            found = lines.by.serve(checkpoint, runtime, snapshot.trust_remote_code)
            served, notes = [*made.served, found], [] if found.agrees else [f"{found.sentence}."]
        except NotCachedError:
            raise
        except Exception as error:
            served, notes = made.served, [f"{runtime} could not be asked to open it: {named_line(error)}."]
        made = made.model_copy(update={"served": served, "notes": [*made.notes, *notes]})
    return made


def _publish(
    lines: StageLines, result: Result, label: str, target: str, documents: Callable[[], dict[str, bytes]]
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

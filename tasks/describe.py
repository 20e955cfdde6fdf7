"""What a run of a recipe would do, for people: what is cached, what will be made, how long about, how much disk and memory.

Nothing is made for it, and neither Prefect nor torch nor transformers is imported.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple, TypeVar

from configs.errors import NotCachedError
from configs.method_names import INTEGER_METHODS, WITH_EXPERTS
from configs.schema import Evaluate, Recipe, Source, Variant
from configs.settings import home
from tasks.calibrate.task import calibrate
from tasks.download.adapter import base_of
from tasks.download.facts import Facts, facts_of
from tasks.download.inspection import inspect_source, tokenizer_folder
from tasks.download.task import download
from tasks.evaluate.task import evaluate_baseline, evaluate_variant
from tasks.fit.table import TRIES
from tasks.fit.task import fit
from tasks.fleet.work_queues import memory_needed, smallest
from tasks.formatting import NOT_MEASURED, figure
from tasks.plan import Plan, preflight
from tasks.quantize.methods import method_of
from tasks.quantize.preview import preview
from tasks.quantize.task import quantize_inputs
from tasks.runtime.child_process import isolated
from tasks.runtime.device import cores, gpus, hardware, multiplies_bfloat16, name_of, pick, pick_all
from tasks.runtime.files import existing_parent
from tasks.store import artifacts as store
from tasks.store import cache_only
from tasks.store.on_disk import Artifact
from tasks.values import Checkpoint, Evaluation, Found, Snapshot

T = TypeVar("T")
FLOPS_OF_A_CORE = {True: 1e11, False: 3e10}
"""What evaluating was seen to reach, in operations a second, on a CPU that multiplies bfloat16 and on one that does not."""
FLOPS_OF_A_GPU = 1e14
"""… on a GPU."""
FIT_TOKENS = (100_000, 1_000_000)
"""About the tokens that fitting takes through the whole model, on a CPU and on a GPU."""
TOKENS = 300_000
"""Of a text whose length nobody has limited."""


class Size(NamedTuple):
    """What a variant is, or about what it will be."""

    weight_bytes: int
    parameters: int
    quantized: int
    notes: list[str]
    exact: bool


class Outlook(NamedTuple):
    """A variant in the plan."""

    size: Size
    where: str | None
    """Where its checkpoint is, if it was made before."""
    measured: bool


def describe(recipe: Recipe, out: Path, exact: bool = False) -> list[tuple[str, str]]:
    """The plan as (what, how it stands) lines: source, device, each variant, evaluation, time, memory, disk, what to know first.

    Sizes are estimates from config.json, unless the variant is in the cache, or they are to be `exact`: that takes transformers
    and some seconds, and tells what stays in 16 bits, and why.

    Raises:
        As `preflight`.
    """
    plan = preflight(recipe, out)
    found, source = plan.found, recipe.source
    others = [variant for variant in recipe.variants if variant.checkpoint is not None]
    recipe = recipe.model_copy(update={"variants": [v for v in recipe.variants if v.checkpoint is None]})
    folder = tokenizer_folder(source, found)
    facts = facts_of(found, folder)
    sizes = [_estimate(facts, variant) for variant in recipe.variants]
    if exact and folder:
        what = f"look at {source.model}"
        previews = isolated(what, preview, folder, recipe.variants, source.trust_remote_code)
        sizes = [Size(one["weight_bytes"], one["parameters"], one["quantized"], one["notes"], True) for one in previews]
    here = found.adapter is None and (found.path or found.kind == "gguf")
    snapshot = download(source, found) if folder and here else None
    spec = recipe.evaluate
    baseline = cached(lambda: evaluate_baseline(snapshot, spec, text=plan.text)) if snapshot and spec else None
    outlooks = [
        _outlook(recipe, variant, expected, snapshot, baseline)
        for variant, expected in zip(recipe.variants, sizes, strict=True)
    ]
    pinned = f" at {found.commit[:12]}" if found.commit else ""
    location = f"{size(found.bytes)} on this disk" if found.path else f"{size(found.bytes)} to download"
    lines = [("source", f"{source.model}{pinned}: {facts.summary}, {location}"), ("device", name_of(pick()))]
    lines[1:1] = _adapter(source, found)
    for variant, outlook in zip(recipe.variants, outlooks, strict=True):
        lines += _of_variant(variant, outlook, plan, recipe.publish.approve)
    theirs = {variant.label: inspect_source(variant.source, quantized=True) for variant in others}
    lines += [_theirs(variant, theirs[variant.label]) for variant in others]
    lines.append(("evaluate", _evaluation(recipe.evaluate)))
    new = [one for one in others if not _known(one, theirs[one.label], baseline, snapshot, spec)]
    lines += [("time", _time(recipe, facts, outlooks, (baseline is None) + len(new)))]
    download_of = sum(one.bytes for one in theirs.values() if one.path is None)
    download_of += 0 if snapshot else found.bytes * (1 if found.adapter is None else 2)
    lines += [*_room(recipe, plan, outlooks, download_of)]
    return lines + [("note", warning) for warning in plan.warnings]


def columns(lines: list[tuple[str, str]], width: int) -> list[str]:
    """The lines of a plan, what beside how, broken where a terminal of `width` columns ends."""
    first = max(len(what) for what, _ in lines) + 2
    found = []
    for what, how in lines:
        rows = wrap(how, max(width, 60) - first, break_long_words=False, break_on_hyphens=False) or [""]
        found += [f"{label:<{first}}{row}" for label, row in zip([what, *[""] * len(rows)], rows, strict=False)]
    return found


def size(value: float) -> str:
    """Bytes as people read them."""
    return figure("size_bytes", value)


def cached(lookup: Callable[[], T]) -> T | None:
    """What a stage gives, if all of it is in the cache."""
    try:
        with cache_only.nothing_made():
            return lookup()
    except NotCachedError:
        return None


def _evaluation(spec: Evaluate | None) -> str:
    if spec is None:
        return f"{NOT_MEASURED}: the recipe says evaluate: null"
    name = spec.text.dataset or spec.text.builtin or ", ".join(spec.text.files or [])
    return f"{name} in windows of {spec.window}; {', '.join(spec.tasks) or 'no tasks'}"


def _adapter(source: Source, found: Found) -> list[tuple[str, str]]:
    """The line of the adapter, if there is one."""
    if (adapter := found.adapter) is None:
        return []
    weight, base = size(sum(adapter.files.values())), base_of(source, adapter).model
    return [("adapter", f"{adapter.model}, {weight}, merged into {base}")]


def _theirs(variant: Variant, found: Found) -> tuple[str, str]:
    """The line of somebody else's checkpoint."""
    where = "on this disk" if found.path else "to download"
    return variant.label, f"{variant.checkpoint}, {size(found.bytes)} {where}, is measured and not published"


def _known(
    variant: Variant, found: Found, baseline: Evaluation | None, snapshot: Snapshot | None, spec: Evaluate | None
) -> bool:
    """Whether somebody else's checkpoint is here, and was measured before."""
    if found.path is None or baseline is None or snapshot is None or spec is None:
        return False
    there = download(variant.source, found, quantized=True)
    checkpoint = Checkpoint(path=there.path, digest=there.digest, label=variant.label)
    return cached(lambda: evaluate_variant(checkpoint, baseline, snapshot, spec)) is not None


def _outlook(
    recipe: Recipe, variant: Variant, expected: Size, snapshot: Snapshot | None, baseline: Evaluation | None
) -> Outlook:
    if snapshot is None:
        return Outlook(expected, None, False)
    text, part = recipe.calibration, recipe.codes_part
    calibration = cached(lambda: calibrate(snapshot, text, part)) if variant.calibrate else None
    if variant.calibrate and calibration is None:
        return Outlook(expected, None, False)
    fitted = None
    if variant.fit is not None:
        fitted = cached(lambda: fit(snapshot, variant, recipe.gate, recipe.calibration, calibration))
        if fitted is None:
            return Outlook(expected, None, False)
    inputs = quantize_inputs(snapshot, variant, pick_all("auto"), calibration, fitted)
    kept = store.find("quantized", inputs)
    if kept is None:
        return Outlook(expected, store.where("quantized", inputs), False)
    checkpoint = Checkpoint(path=kept.path, digest=kept.digest, label=variant.label)
    if (spec := recipe.evaluate) is None:
        return Outlook(_written(kept), "the cache", False)
    measured = baseline and cached(lambda: evaluate_variant(checkpoint, baseline, snapshot, spec))
    return Outlook(_written(kept), "the cache", measured is not None)


def _of_variant(variant: Variant, outlook: Outlook, plan: Plan, approve: bool) -> list[tuple[str, str]]:
    expected, about = outlook.size, "" if outlook.size.exact else "about "
    details = [f"{about}{size(expected.weight_bytes)}"]
    if variant.fit is not None and not outlook.where:
        details[0] = f"from {about}{size(expected.weight_bytes)} up: the limit decides what stays in 16 bits"
    elif expected.parameters:
        details.append(f"{about}{expected.quantized / expected.parameters:.1%} of its parameters quantized")
    if outlook.where:
        details.append(f"{'quantized and measured' if outlook.measured else 'quantized'}: in {outlook.where}")
    asked = ", if a person approves it" if approve else ""
    details.append(f"goes to {plan.targets[variant.label]}{asked}" if plan.targets else "is published nowhere")
    return [
        (variant.label, ", ".join(details)),
        *(("note", f"{variant.label}: {note}") for note in expected.notes),
    ]


def _written(artifact: Artifact) -> Size:
    """What a variant that is there has become."""
    meta = artifact.meta
    weights, parameters = meta.get("weight_bytes", artifact.bytes), meta.get("parameters", 0)
    return Size(weights, parameters, meta.get("quantized", 0), [], True)


def _estimate(facts: Facts, variant: Variant) -> Size:
    """About what a variant will be, from the sizes of the model's parts."""
    bits = method_of(variant).bits(variant)
    integers = variant.method in INTEGER_METHODS
    group = variant.group_size or (128 if integers else 64)
    scales = 0.0 if bits > 4 or group < 0 else (8.1 if variant.double_quant else 16 if integers else 32) / group
    quantized = facts.linear + (facts.experts if variant.method in WITH_EXPERTS else 0)
    weights = quantized * (bits + scales) / 8 + 2 * (facts.parameters - quantized)
    return Size(int(weights), facts.parameters if facts.known else 0, quantized, [], False)


def _time(recipe: Recipe, facts: Facts, outlooks: list[Outlook], others: int) -> str:
    """About how long a run takes, from what machines were seen to do (benchmarks/RESULTS.md): right within a factor of three.

    `others` are models to measure besides the variants.
    """
    to_make = sum(outlook.where is None for outlook in outlooks)
    spec = recipe.evaluate
    to_measure = sum(not outlook.measured for outlook in outlooks) + others if spec else 0
    if not to_make + to_measure:
        return "a few seconds: all of it is in the cache"
    speed = FLOPS_OF_A_GPU * len(gpus()) if gpus() else FLOPS_OF_A_CORE[multiplies_bfloat16()] * cores()
    items = len(spec.tasks) * (spec.task_limit or 2000) * 200 if spec else 0
    tokens = to_measure * (((spec.max_tokens if spec else None) or TOKENS) + items)
    for variant, outlook in zip(recipe.variants, outlooks, strict=True):
        if (
            variant.calibrate and outlook.where is None
        ):  # each block runs a few times, and its columns one after another
            tokens += 8 * recipe.calibration.sequences * recipe.calibration.length
        if variant.fit is not None and outlook.where is None:
            tokens += FIT_TOKENS[bool(gpus())]
    seconds = 2 * facts.parameters * tokens / speed + 15 * to_measure + to_make * facts.parameters / 1e8 + 20
    minutes = max(1, round(seconds / 60))
    duration = f"{seconds / 3600:.0f} hours" if minutes > 90 else f"{minutes} minute{'s' * (minutes > 1)}"
    missing = [(count, what) for count, what in ((to_make, "quantize"), (to_measure, "measure")) if count]
    models = " and ".join(f"{count} model{'s' * (count > 1)} to {what}" for count, what in missing)
    return f"about {duration} for {models}, downloading aside"


def _tried(variant: Variant) -> int:
    """How many checkpoints a fit makes at most on its way: of all quantized, of choices with more bits, of mixes with own codes."""
    if variant.fit is None:
        return 0
    if not variant.compensates:
        return len(method_of(variant).choices(variant))
    return 2 if variant.fit != "gate" and variant.fit.bytes else 1 + TRIES


def _room(recipe: Recipe, plan: Plan, outlooks: list[Outlook], download: int) -> list[tuple[str, str]]:
    """Memory and disk, what there is and what it takes."""
    needed = download + sum(
        outlook.size.weight_bytes * (1 + _tried(variant))
        for variant, outlook in zip(recipe.variants, outlooks, strict=True)
        if outlook.where is None
    )
    if recipe.publish.to == "folder":
        needed += sum(
            outlook.size.weight_bytes
            for target, outlook in zip(plan.targets.values(), outlooks, strict=True)
            if not Path(target).exists()
        )
    memory = memory_needed(plan.found, recipe.evaluate)
    queue = smallest(memory) or "none is large enough"
    free = shutil.disk_usage(existing_parent(home())).free
    return [
        ("memory", f"{size(_memory())} in all, about {size(memory)} needed; of the GPU queues: {queue}"),
        ("disk", f"{size(free)} free, about {size(needed)} will be written"),
    ]


def _memory() -> int:
    device = pick()
    if device == "cpu":
        return int(hardware()["memory_bytes"])
    return gpus()[int(device.partition(":")[2])].memory_bytes

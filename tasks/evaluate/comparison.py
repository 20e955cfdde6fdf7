"""Turns the measured parts of a model into metrics with intervals, paired with the baseline's. Imports no torch."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import TameError
from configs.schema import Evaluate
from tasks.evaluate.evidence import WHICH
from tasks.evaluate.statistics import interval, mcnemar, recovery
from tasks.metrics import nats

STAGE = 6
RESULT = "evaluation.json"
TASK = "tasks/"
"""How the names of the parts that are tasks begin."""
FEW_WINDOWS = 10
TOO_GOOD = "{} {} than the baseline's beyond its interval, which quantizing does not do: look for what differs in the measurement"
LONG, LONG_PARTS = 2049, (0, 2048, 8192, 32_768)  # scored positions of a long window, and where its parts begin
EXAMPLES = 10  # of the answers of a task that changed, kept with their question in each direction
Metrics = dict[str, float]
Folders = dict[str, Path]
Rows = dict[str, dict[str, Any]]
"""Items of a task, by what tells them apart."""


@dataclass(frozen=True)
class Part:
    """A part of an evaluation: the folder that it was measured into, and the result.json in it."""

    folder: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A part of a model, and the same of its baseline: None where there is no baseline, or where it lacks the part."""

    ours: Part
    theirs: Part | None
    seed: int
    """Of the bootstrap."""
    evidence: Path
    """The folder of the evaluation, which gets what the numbers were made from."""


class Outcome(NamedTuple):
    """What a part adds to an evaluation."""

    metrics: Metrics
    notes: list[str]
    protocol: dict[str, Any]


class Changes(NamedTuple):
    """What became of a task's items: numbers, notes, and the keys of those that only the baseline, or only we, have right."""

    metrics: Metrics
    notes: list[str]
    lost: list[str]
    won: list[str]


def assemble(
    parts: Folders,
    baseline: Folders | None,
    failed: dict[str, str],
    spec: Evaluate,
    facts: dict[str, Any],
    folder: Path,
) -> None:
    """Turn the parts of an evaluation into one result with its evidence.

    Args:
        parts: Folder of each part: scores, tasks/NAME, speed, samples, layers.
        baseline: The same of the baseline; None if there is none.
        failed: The parts that could not be measured, and why.
        spec: What was asked for.
        known: What is known of the text and the device, for the protocol.
        folder: Gets windows.npz, windows.json, tasks/NAME.jsonl, flips.json (examples of answers that changed, by task:
            doc_id, lost, question, right, baseline, variant), layers.json ({module, error, parameters} each) and
            evaluation.json {metrics, protocol, notes, samples}.

    Raises:
        TameError: the baseline answered other items of a task.
    """
    pairs = {
        name: Pair(_read(path), _read(baseline[name]) if name in (baseline or {}) else None, spec.seed, folder)  # type: ignore[index]
        for name, path in parts.items()
    }
    all_notes = [note for pair in pairs.values() for note in pair.ours.result.get("notes", [])]
    found = [_scores(pairs["scores"])] if "scores" in pairs else []
    tasks = {name.removeprefix(TASK): pair for name, pair in pairs.items() if name.startswith(TASK)}
    if tasks:
        found.append(_tasks(tasks, baseline is not None, folder))
    if "speed" in pairs:
        found.append(
            Outcome(pairs["speed"].ours.result["metrics"], [], {"speed": pairs["speed"].ours.result["protocol"]})
        )
    if "layers" in pairs:
        found.append(_layers(pairs["layers"]))
    samples = _samples(pairs.get("samples"), baseline is not None)
    if samples:
        found.append(Outcome({}, [], {"samples": pairs["samples"].ours.result["protocol"]}))
    found.append(_missing(failed, spec))
    notes = dict.fromkeys([*all_notes, *(note for outcome in found for note in outcome.notes)])
    content = {
        "metrics": {name: value for outcome in found for name, value in outcome.metrics.items()},
        "protocol": facts | {name: value for outcome in found for name, value in outcome.protocol.items()},
        "notes": list(notes),
        "samples": samples,
    }
    (folder / RESULT).write_text(json.dumps(content, indent=1))


def _read(folder: Path) -> Part:
    return Part(folder, json.loads((folder / "result.json").read_bytes()))


def _scores(pair: Pair) -> Outcome:
    shutil.copy(pair.ours.folder / "windows.npz", pair.evidence)
    measured = np.load(pair.ours.folder / "windows.npz")
    rows = {"loss": measured["loss"].astype(np.float64).mean(axis=1)}
    metrics, notes = _with_interval("perplexity", rows["loss"], pair.seed, np.exp), []
    floor = (pair.theirs or pair.ours).result.get("floor")
    if pair.theirs is None:
        metrics |= {f"floor_{name}": floor[name] for name in ("kl_mean", "top1_agreement")} if floor else {}
    else:
        before = np.load(pair.theirs.folder / "windows.npz")["loss"].astype(np.float64).mean(axis=1)
        kl = measured["kl"].astype(np.float64)
        rows["kl"] = kl.mean(axis=1)
        metrics |= _with_interval("perplexity_ratio", rows["loss"] - before, pair.seed, np.exp)
        if metrics.get("perplexity_ratio_high", 1) < 1:
            notes.append(TOO_GOOD.format("perplexity is", "lower"))
        metrics |= _with_interval("kl_mean", rows["kl"], pair.seed)
        metrics |= {
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
        }
        metrics |= _with_interval("top1_agreement", measured["agree"].astype(np.float64).mean(axis=1), pair.seed)
        if floor and metrics["kl_mean"] <= floor["kl_mean"]:
            notes.append(
                f"kl_mean {nats(metrics['kl_mean'])} is not above the noise floor of {nats(floor['kl_mean'])}, what the "
                "baseline differs from itself in another batch shape: no difference was found"
            )
    if (count := len(rows["loss"])) < FEW_WINDOWS:
        notes.append(f"only {count} windows: the intervals are rough" if count > 1 else "one window: no intervals")
    curve = _curve(measured["loss"], measured["kl"] if pair.theirs is not None else None)
    (pair.evidence / "positions.json").write_text(json.dumps(curve))
    for part in (long for long in curve if measured["loss"].shape[1] >= LONG and long["from"] in LONG_PARTS):
        where = f"from_{part['from']}"
        metrics |= {f"{name}_{where}": part[name] for name in ("perplexity", "kl_mean") if name in part}
    (pair.evidence / "windows.json").write_text(
        json.dumps([dict(zip(rows, map(float, row), strict=True)) for row in zip(*rows.values(), strict=True)])
    )
    return Outcome(metrics, notes, {**pair.ours.result["protocol"], **({"floor": floor} if floor else {})})


def _curve(loss: Any, kl: Any) -> list[dict[str, float]]:
    """Perplexity, and mean KL divergence, by position in a window: quantizing hurts first where the context is long.

    Each part is twice as long as what is before it, from the first 128 positions on; of a window of 8,192 and more they are
    those up to 2,048, 8,192 and 32,768.
    """
    length = loss.shape[1]
    edges = [0, *(LONG_PARTS[1:] if length >= LONG else [128 << i for i in range(20)])]
    edges = [*(edge for edge in edges if edge < length), length]
    return [
        {
            "from": start,
            "to": end,
            "perplexity": float(np.exp(loss[:, start:end].astype(np.float64).mean())),
            **({} if kl is None else {"kl_mean": float(kl[:, start:end].astype(np.float64).mean())}),
        }
        for start, end in itertools.pairwise(edges)
    ]


def _with_interval(name: str, values: Any, seed: int, statistic: Callable[[Any], Any] = lambda means: means) -> Metrics:
    """`statistic(mean of values)` under `name`, with its interval where there is one."""
    point = float(statistic(np.mean(values, axis=0)))
    bounds = interval(values, point, seed, statistic)
    return {name: point} | (dict(zip((f"{name}_low", f"{name}_high"), bounds, strict=True)) if bounds else {})


def _tasks(asked: dict[str, Pair], compared: bool, folder: Path) -> Outcome:
    """All tasks together; each that was asked for may be a group of several."""
    (folder / "tasks").mkdir()
    metrics: Metrics = {}
    notes: list[str] = []
    examples: dict[str, list[dict[str, Any]]] = {}
    for asked_for, pair in asked.items():
        result = pair.ours.result
        for name, scores in [
            *result["groups"].items(),
            *((name, task["metrics"]) for name, task in result["tasks"].items()),
        ]:
            metrics |= {f"task/{name}/{metric}": value for metric, value in scores.items()}
        for name, task in result["tasks"].items():
            shutil.copy(pair.ours.folder / f"{name}.jsonl", folder / "tasks")
            metrics[f"task/{name}/items"] = float(task["items"])
            if pair.theirs is not None:
                changes = _changes(name, pair)
                metrics, notes = metrics | changes.metrics, notes + changes.notes
                examples[name] = _examples(name, pair, changes)
            elif floor := task.get("floor"):
                metrics[f"task/{name}/floor_flips"] = floor["flips"] / floor["items"]
        if compared and pair.theirs is None:
            notes.append(f"task {asked_for}: it could not be measured of the baseline, so that nothing is compared")
    (folder / "flips.json").write_text(json.dumps(examples))
    return Outcome(metrics, notes, {"tasks": _tasks_protocol([pair.ours.result for pair in asked.values()])})


def _tasks_protocol(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One protocol for all tasks. A batch size that did not fit in memory for one of them is told for each."""
    tasks = {name: task for result in results for name, task in result["tasks"].items()}
    sizes = {name: result["protocol"]["batch_size"] for result in results for name in result["tasks"]}
    return {
        **results[0]["protocol"],
        **({"batch_size": sizes} if len(set(sizes.values())) > 1 else {}),
        "versions": {name: task["version"] for name, task in tasks.items()},
        "fewshot": {name: task["fewshot"] for name, task in tasks.items()},
    }


def _changes(name: str, pair: Pair) -> Changes:
    """Item by item: flips, McNemar's p and the difference, of every metric that is right or wrong for an item.

    The items that changed are those of the first such metric.
    """
    assert pair.theirs is not None
    ours, theirs = (_items(part.folder / f"{name}.jsonl") for part in (pair.ours, pair.theirs))
    if ours.keys() != theirs.keys():
        raise TameError(
            f"task {name}: the baseline answered other items; its data changed in between, evaluate it again"
        )
    metrics: Metrics = {}
    notes: list[str] = []
    changed: tuple[list[str], list[str]] | None = None
    names = [metric for metric in next(iter(ours.values()), {}) if metric not in WHICH]
    # A task may judge each answer by several filters; lm-eval gives a sample for each, and they are not other items.
    filters = list(dict.fromkeys(row["filter"] for row in ours.values()))
    for metric, only in ((metric, only) for metric in names for only in filters):
        keys = [key for key in ours if ours[key]["filter"] == only]
        pairs = np.array([(ours[key].get(metric, np.nan), theirs[key].get(metric, np.nan)) for key in keys], np.float64)
        if not np.isin(pairs, (0, 1)).all():
            continue
        metric = metric if len(filters) == 1 else f"{metric},{only}"
        difference = pairs[:, 0] - pairs[:, 1]
        lost, won = ([keys[i] for i in np.flatnonzero(difference == sign)] for sign in (-1, 1))
        metrics |= _with_interval(f"task/{name}/{metric}_difference", difference, pair.seed)
        metrics[f"task/{name}/{metric}_p"] = mcnemar(len(lost), len(won))
        if pairs[:, 1].any():
            metrics |= _with_interval(f"task/{name}/{metric}_recovery", pairs, pair.seed, recovery)
        if metrics.get(f"task/{name}/{metric}_difference_low", 0) > 0:
            notes.append(TOO_GOOD.format(f"task {name}: {metric} is", "higher"))
        if changed is None:
            changed = lost, won
            flips, floor = len(lost) + len(won), pair.theirs.result["tasks"][name].get("floor")
            metrics[f"task/{name}/flips"] = float(flips)
            if floor and flips / len(pairs) <= floor["flips"] / floor["items"]:
                notes.append(
                    f"task {name}: {flips} of {len(pairs)} items flip, not more than when the baseline itself runs in "
                    f"another batch shape ({floor['flips']} of {floor['items']}): no difference was found"
                )
    return Changes(metrics, notes, *(changed or ([], [])))


def _examples(name: str, pair: Pair, changes: Changes) -> list[dict[str, Any]]:
    assert pair.theirs is not None
    ours, theirs = (_items(part.folder / f"{name}.jsonl") for part in (pair.ours, pair.theirs))
    questions = {row["doc_id"]: row for row in _rows(pair.theirs.folder / f"{name}.questions.jsonl")}
    return [
        _example(questions[ours[key]["doc_id"]], theirs[key]["answer"], ours[key]["answer"], was_right)
        for keys, was_right in ((changes.lost, True), (changes.won, False))
        for key in keys[:EXAMPLES]
    ]


def _example(question: dict[str, Any], before: int | str | None, after: int | str | None, lost: bool) -> dict[str, Any]:
    """An answer that changed, in words. Of several choices, the right one is the baseline's if it was `lost`, else ours."""
    choices = question.get("choices", [])
    given = {
        name: choices[answer] if isinstance(answer, int) else answer
        for name, answer in (("baseline", before), ("variant", after))
    }
    right = question.get("expected", given["baseline" if lost else "variant"])
    return {"doc_id": question["doc_id"], "lost": lost, "question": question["question"], "right": right, **given}


def _items(path: Path) -> Rows:
    return {f"{row['doc_id']}/{row['doc_hash']}/{row['filter']}": row for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _layers(pair: Pair) -> Outcome:
    layers = pair.ours.result.get("layers")
    if not layers:
        return Outcome({}, [], {})
    errors = [layer["error"] for layer in layers]
    (pair.evidence / "layers.json").write_text(json.dumps(layers))
    return Outcome({"weight_error_mean": float(np.mean(errors)), "weight_error_max": max(errors)}, [], {})


def _samples(pair: Pair | None, compared: bool) -> list[dict[str, Any]]:
    """Prompts and answers, side by side; none where the baseline's could not be had."""
    if pair is None or (compared and pair.theirs is None):
        return []
    ours, theirs = pair.ours.result, (pair.theirs or pair.ours).result
    return [
        {
            "prompt": prompt,
            "baseline": theirs["answers"][i],
            "answer": ours["answers"][i],
            "diverges_at": _diverges_at(theirs["answers"][i], ours["answers"][i]),
            "baseline_thought": theirs["thoughts"][i],
            "thought": ours["thoughts"][i],
        }
        for i, prompt in enumerate(ours["prompts"])
    ]


def _diverges_at(before: str, after: str) -> int | None:
    """Offset of the first character in which they differ, None if they are equal."""
    if before == after:
        return None
    pairs = zip(before, after, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))


def _missing(failed: dict[str, str], spec: Evaluate) -> Outcome:
    """What could not be measured is said. A task that could not has no items, which no limit on tasks lets pass."""
    notes = [f"{name.replace(TASK, 'task ')} was not measured: {reason}" for name, reason in failed.items()]
    return Outcome({f"task/{name}/items": 0.0 for name in spec.tasks if f"{TASK}{name}" in failed}, notes, {})

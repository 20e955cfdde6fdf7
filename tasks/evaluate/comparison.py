"""From what was measured to the numbers of the contract: paired with the baseline, with intervals. No torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import TameError
from tasks.evaluate.evidence import WHICH
from tasks.evaluate.statistics import interval, mcnemar

STAGE = 4
RESULT = "evaluation.json"
FEW_WINDOWS = 10
EXAMPLES = 10  # of the answers of a task that changed, kept with their question in each direction
Metrics = dict[str, float]
Folders = dict[str, Path]


def assemble(
    parts: Folders, baseline: Folders | None, prompts: list[str], protocol: dict[str, Any], seed: int, folder: Path
) -> None:
    """Turn the parts of an evaluation into one result with its evidence.

    Args:
        parts: Folder of each part: scores, tasks, speed, samples, layers.
        baseline: The same of the baseline; None if this is the baseline.
        prompts: Of the samples.
        protocol: What is known of the text and the device.
        seed: Of the bootstrap.
        folder: Gets windows.npz, windows.json, tasks/NAME.jsonl, flips.json (examples of answers that changed, by task:
            doc_id, lost, question, right, baseline, variant), layers.json ({module, error, parameters} each) and
            evaluation.json {metrics, protocol, notes, samples}.

    Raises:
        TameError: the baseline answered other items of a task.
    """
    results = {part: json.loads((path / "result.json").read_bytes()) for part, path in parts.items()}
    theirs = {part: json.loads((path / "result.json").read_bytes()) for part, path in (baseline or {}).items()}
    metrics: Metrics = {}
    notes: list[str] = list(dict.fromkeys(note for result in results.values() for note in result.get("notes", [])))
    shown = {**protocol, **results["scores"]["protocol"]}
    _scores(
        metrics,
        notes,
        shown,
        parts["scores"],
        results["scores"],
        baseline["scores"] if baseline else None,
        theirs.get("scores"),
        seed,
        folder,
    )
    if "tasks" in results:
        shown["tasks"] = _tasks(
            metrics,
            notes,
            parts["tasks"],
            results["tasks"],
            baseline["tasks"] if baseline else None,
            theirs.get("tasks"),
            seed,
            folder,
        )
    if "speed" in results:
        metrics |= results["speed"]["metrics"]
        shown["speed"] = results["speed"]["protocol"]
    if layers := results.get("layers", {}).get("layers"):
        errors = [layer["error"] for layer in layers]
        metrics |= {"weight_error_mean": float(np.mean(errors)), "weight_error_max": max(errors)}
        (folder / "layers.json").write_text(json.dumps(layers))
    samples = _samples(prompts, results, theirs)
    content = {"metrics": metrics, "protocol": shown, "notes": notes, "samples": samples}
    (folder / RESULT).write_text(json.dumps(content, indent=1))


def _scores(
    metrics: Metrics,
    notes: list[str],
    protocol: dict[str, Any],
    part: Path,
    result: dict[str, Any],
    baseline: Path | None,
    theirs: dict[str, Any] | None,
    seed: int,
    folder: Path,
) -> None:
    shutil.copy(part / "windows.npz", folder)
    measured = np.load(part / "windows.npz")
    loss = measured["loss"].astype(np.float64)
    rows: dict[str, Any] = {"loss": loss.mean(axis=1)}
    _put(metrics, "perplexity", rows["loss"], seed, np.exp)
    if baseline is None or theirs is None:
        metrics["floor_kl_mean"] = result["floor"]["kl_mean"]
        metrics["floor_top1_agreement"] = result["floor"]["top1_agreement"]
        protocol["floor"] = result["floor"]
    else:
        before = np.load(baseline / "windows.npz")["loss"].astype(np.float64).mean(axis=1)
        kl = measured["kl"].astype(np.float64)
        rows["kl"] = kl.mean(axis=1)
        _put(metrics, "perplexity_ratio", rows["loss"] - before, seed, np.exp)
        _put(metrics, "kl_mean", rows["kl"], seed)
        metrics |= {
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
        }
        _put(metrics, "top1_agreement", measured["agree"].astype(np.float64).mean(axis=1), seed)
        protocol["floor"] = theirs["floor"]
        if metrics["kl_mean"] <= theirs["floor"]["kl_mean"]:
            notes.append(
                f"kl_mean {metrics['kl_mean']:.2g} is not above the noise floor of {theirs['floor']['kl_mean']:.2g}, what the "
                "baseline differs from itself in another batch shape: no difference was found"
            )
    if len(loss) < FEW_WINDOWS:
        notes.append(
            f"only {len(loss)} windows: the intervals are rough" if len(loss) > 1 else "one window: no intervals"
        )
    names = list(rows)
    (folder / "windows.json").write_text(
        json.dumps([dict(zip(names, map(float, row), strict=True)) for row in zip(*rows.values(), strict=True)])
    )


def _put(metrics: Metrics, name: str, values: Any, seed: int, statistic: Any = lambda means: means) -> None:
    """`statistic(mean of values)`, and its interval, under `name`."""
    point = float(statistic(np.mean(values)))
    metrics[name] = point
    if bounds := interval(values, point, seed, statistic):
        metrics[f"{name}_low"], metrics[f"{name}_high"] = bounds


def _tasks(
    metrics: Metrics,
    notes: list[str],
    part: Path,
    result: dict[str, Any],
    baseline: Path | None,
    theirs: dict[str, Any] | None,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    (folder / "tasks").mkdir()
    examples = {}
    for name, task in [*result["tasks"].items(), *((name, {"metrics": m}) for name, m in result["groups"].items())]:
        metrics |= {f"task/{name}/{metric}": value for metric, value in task["metrics"].items()}
    for name, task in result["tasks"].items():
        shutil.copy(part / f"{name}.jsonl", folder / "tasks")
        ours = _items(part / f"{name}.jsonl")
        metrics[f"task/{name}/items"] = float(task["items"])
        if baseline is None or theirs is None:
            if floor := task.get("floor"):
                metrics[f"task/{name}/floor_flips"] = floor["flips"] / floor["items"]
            continue
        before = _items(baseline / f"{name}.jsonl")
        lost, won = _pair(metrics, notes, name, ours, before, theirs["tasks"][name].get("floor"), seed)
        questions = {row["doc_id"]: row for row in _rows(baseline / f"{name}.questions.jsonl")}
        examples[name] = [
            _example(questions[ours[key]["doc_id"]], before[key]["answer"], ours[key]["answer"], was_right)
            for keys, was_right in ((lost, True), (won, False))
            for key in keys[:EXAMPLES]
        ]
    (folder / "flips.json").write_text(json.dumps(examples))
    return {
        **result["protocol"],
        "versions": {name: task["version"] for name, task in result["tasks"].items()},
        "fewshot": {name: task["fewshot"] for name, task in result["tasks"].items()},
    }


def _pair(
    metrics: Metrics,
    notes: list[str],
    name: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    floor: dict[str, int] | None,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Item by item: flips, McNemar's p and the difference, of every metric that is right or wrong for an item.

    Returns the keys of the items that the first such metric has right of the baseline alone, and of the variant alone.
    """
    if ours.keys() != theirs.keys():
        raise TameError(
            f"task {name}: the baseline answered other items; its data changed in between, evaluate it again"
        )
    names = [metric for metric in next(iter(ours.values()), {}) if metric not in WHICH]
    changed: tuple[list[str], list[str]] | None = None
    # A task may judge each answer by several filters; lm-eval gives a sample for each, and they are not other items.
    filters = list(dict.fromkeys(row["filter"] for row in ours.values()))
    for metric, only in ((metric, only) for metric in names for only in filters):
        keys = [key for key in ours if ours[key]["filter"] == only]
        pairs = np.array([(ours[key].get(metric, np.nan), theirs[key].get(metric, np.nan)) for key in keys], np.float64)
        if not np.isin(pairs, (0, 1)).all():
            continue
        metric = metric if len(filters) == 1 else f"{metric},{only}"
        difference = pairs[:, 0] - pairs[:, 1]
        lost, won = int((difference < 0).sum()), int((difference > 0).sum())
        _put(metrics, f"task/{name}/{metric}_difference", difference, seed)
        metrics[f"task/{name}/{metric}_p"] = mcnemar(lost, won)
        if changed is None:
            changed = (
                [keys[i] for i in np.flatnonzero(difference < 0)],
                [keys[i] for i in np.flatnonzero(difference > 0)],
            )
            metrics[f"task/{name}/flips"] = float(lost + won)
            if floor and (lost + won) / len(pairs) <= floor["flips"] / floor["items"]:
                notes.append(
                    f"task {name}: {lost + won} of {len(pairs)} items flip, not more than when the baseline itself runs in "
                    f"another batch shape ({floor['flips']} of {floor['items']}): no difference was found"
                )
    return changed or ([], [])


def _example(question: dict[str, Any], before: int | str | None, after: int | str | None, lost: bool) -> dict[str, Any]:
    """An answer that changed, in words. Of several choices, the right one is the baseline's if it was `lost`, else ours."""
    choices = question.get("choices", [])
    given = {
        name: choices[answer] if isinstance(answer, int) else answer
        for name, answer in (("baseline", before), ("variant", after))
    }
    right = question.get("expected", given["baseline" if lost else "variant"])
    return {"doc_id": question["doc_id"], "lost": lost, "question": question["question"], "right": right, **given}


def _items(path: Path) -> dict[str, Any]:
    return {f"{row['doc_id']}/{row['doc_hash']}/{row['filter']}": row for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _samples(prompts: list[str], results: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    if "samples" not in results:
        return []
    answers = results["samples"]["answers"]
    befores = theirs["samples"]["answers"] if "samples" in theirs else answers
    return [
        {"prompt": prompt, "baseline": before, "answer": answer, "diverges_at": _diverges_at(before, answer)}
        for prompt, before, answer in zip(prompts, befores, answers, strict=True)
    ]


def _diverges_at(before: str, after: str) -> int | None:
    """Offset of the first character in which they differ, None if they are equal."""
    if before == after:
        return None
    pairs = zip(before, after, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))

"""Tasks through lm-evaluation-harness, over the model that is already loaded."""

import json
from numbers import Real
from pathlib import Path
from typing import Any

from configs.schema import Evaluate
from tasks.evaluate.lm_eval_adapter import evaluate_tasks, load_tasks
from tasks.evaluate.lm_eval_index import TaskWork
from tasks.evaluate.model import Loaded, quieten_measuring
from tasks.evaluate.scoring import backing_off
from tasks.runtime.progress import Progress, silent

STAGE = 2  # raise it when what is kept of an item changes
RESULT = "result.json"
QUESTION, CHOICE = 600, 160  # characters that are kept of an item
FLOOR_ITEMS = 200  # of each task, at most, run again in another batch shape
FLOOR_SHARE = 10  # and at most one in so many of its items, as it is work that nobody waits for


def run_tasks(
    loaded: Loaded, work: TaskWork, spec: Evaluate, folder: Path, progress: Progress = silent, floor: bool = False
) -> None:
    """Run every task, and keep each item's result.

    Writes NAME.jsonl for each task ({doc_id, doc_hash, filter, answer, metric: value, …} an item), for a baseline
    (`floor`) NAME.questions.jsonl ({doc_id, question, choices or expected} an item), and, last, result.json: for each task its
    metrics, their number of items, its version, and, with `floor`, how many of the first tenth of its items, 200 at most,
    flip when the same model runs them in another batch shape.

    Raises:
        BadInputError: a task that asks to run code, or needs more than text.
        TameError: a task whose data cannot be reached, or whose definition fails.
    """
    quieten_measuring()
    import datasets

    datasets.disable_progress_bars()
    loaded_tasks = load_tasks(work.names, work.include, spec.task_fewshot)
    asked = f"task {', '.join(work.names)}"
    progress(asked, 0, 1)
    results, batch = backing_off(
        lambda size: evaluate_tasks(loaded, loaded_tasks, size, spec), spec.batch_size, "item of a task"
    )
    summary: dict[str, dict[str, Any]] = {}
    for name, items in results["samples"].items():
        rows = [_row(item) for item in items]
        _write_lines(folder / f"{name}.jsonl", rows)
        if floor:
            questions = {item["doc_id"]: _question(item) for item in items}
            _write_lines(folder / f"{name}.questions.jsonl", list(questions.values()))
        metrics = {key.removesuffix(",none"): value for key, value in results["results"][name].items()}
        summary[name] = {
            "items": len({row["doc_id"] for row in rows}),
            "metrics": {
                key: value for key, value in metrics.items() if isinstance(value, float) and "stderr" not in key
            },
            "version": results["versions"].get(name),
            "fewshot": results["n-shot"].get(name),
        }
    groups = {
        name: {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if isinstance(value, float) and "stderr" not in key
        }
        for name, metrics in results["results"].items()
        if name not in results["samples"]
    }
    if floor:
        for name, flips in _floor(loaded, loaded_tasks, batch, spec, results["samples"]).items():
            summary[name]["floor"] = flips
    progress(asked, 1, 1)
    protocol = _protocol(loaded, spec, batch)
    (folder / RESULT).write_text(json.dumps({"tasks": summary, "groups": groups, "protocol": protocol}, indent=1))


def _protocol(loaded: Loaded, spec: Evaluate, batch: int) -> dict[str, Any]:
    """What makes the scores of tasks comparable."""
    return {
        "batch_size": batch,
        "limit": spec.task_limit,
        "chat_template": "the model's, examples as turns" if loaded.tokenizer.chat_template else "none",
        **({"new_tokens": spec.task_new_tokens} if spec.task_new_tokens else {}),
        "weights": loaded.weights,
        "dtype": loaded.dtype,
    }


def _row(item: dict[str, Any]) -> dict[str, Any]:
    """What of an item's result is kept: which it was, what was answered, and how that did."""
    scores = {name: float(item[name]) for name in item["metrics"] if isinstance(item.get(name), Real)}
    which = {name: item[name] for name in ("doc_id", "doc_hash", "filter")}
    return {**which, "answer": _answer(item), **scores}


def _answer(item: dict[str, Any]) -> int | str | None:
    """What was answered: the number of a choice, or a text; None for tasks of another kind."""
    if not _asks_to_choose(item):
        return item["filtered_resps"][0][:CHOICE] if isinstance(item["filtered_resps"][0], str) else None
    chances = [float(chance) for chance, _ in item["filtered_resps"]]
    if item["metrics"][0] == "acc_norm":
        chances = [chances[i] / max(1, len(text.removeprefix(" "))) for i, (_, text) in enumerate(item["arguments"])]
    return chances.index(max(chances))


def _asks_to_choose(item: dict[str, Any]) -> bool:
    """Whether an item is a multiple choice, judged by the likeliest of its answers."""
    pairs = all(isinstance(given, tuple) and len(given) == 2 for given in item["filtered_resps"])
    likeliest = item["metrics"][0] in ("acc", "acc_norm") and "acc_mutual_info" not in item["metrics"]
    return pairs and likeliest and len(item["filtered_resps"]) > 1


def _question(item: dict[str, Any]) -> dict[str, Any]:
    """An item as a person reads it: the end of its prompt, and its choices or the text that was expected.

    Where the choices are in the prompt (a gap to fill), each is the end of its prompt and what follows.
    """
    prompts = [str(arguments[0]).strip() for arguments in item["arguments"]]
    shown: dict[str, Any] = {"doc_id": item["doc_id"], "question": prompts[0][-QUESTION:]}
    if not _asks_to_choose(item):
        return {**shown, "expected": str(item["target"])[:CHOICE]}
    texts = [str(text) for _, text in item["arguments"]]
    if len(set(prompts)) > 1:
        shown["question"] = ""
        texts = [(prompt + text)[-CHOICE:] for prompt, text in zip(prompts, texts, strict=True)]
    return {**shown, "choices": [text.strip()[:CHOICE] for text in texts]}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _floor(
    loaded: Loaded, found: Any, batch: int, spec: Evaluate, samples: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """For each task: of how many items, and how many change between right and wrong in another batch shape."""
    other = 1 if batch > 1 else 2
    counts = {name: len({item["doc_id"] for item in items}) for name, items in samples.items()}
    few = {name: list(range(max(1, min(FLOOR_ITEMS, count // FLOOR_SHARE)))) for name, count in counts.items()}
    results, used = backing_off(lambda size: evaluate_tasks(loaded, found, size, spec, few), other, "item of a task")
    if used == batch:  # there is memory for one batch shape only
        return {}
    floors = {}
    for name, items in results["samples"].items():
        metric, only = items[0]["metrics"][0], items[0]["filter"]
        items = [item for item in items if item["filter"] == only]
        before = {(item["doc_id"], item["filter"]): item.get(metric) for item in samples[name]}
        flips = int(sum(before[item["doc_id"], item["filter"]] != item.get(metric) for item in items))
        floors[name] = {"items": len(items), "flips": flips}
    return floors

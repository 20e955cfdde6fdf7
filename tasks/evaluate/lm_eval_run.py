"""Tasks through lm-evaluation-harness, over the model that is already loaded."""

import json
import logging
from numbers import Real
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError, line
from configs.schema import Evaluate
from tasks.evaluate.lm_eval_index import TaskWork
from tasks.evaluate.model import Loaded, body_of, head_of, quiet
from tasks.evaluate.scoring import backing_off
from tasks.runtime.progress import Progress, silent

STAGE = 2  # raise it when what is kept of an item changes
RESULT = "result.json"
QUESTION, CHOICE = 600, 160  # characters that are kept of an item
FLOOR_ITEMS = 200  # of each task, run again in another batch shape


def run_tasks(
    loaded: Loaded, work: TaskWork, spec: Evaluate, folder: Path, progress: Progress = silent, floor: bool = False
) -> None:
    """Run every task, and keep each item's result.

    Writes NAME.jsonl for each task ({doc_id, doc_hash, filter, answer, metric: value, …} an item), for a baseline
    (`floor`) NAME.questions.jsonl ({doc_id, question, choices or expected} an item), and, last, result.json: for each task its
    metrics, their number of items, its version, and, with `floor`, how many of its first 200 items flip when the same
    model runs them in another batch shape.

    Raises:
        BadInputError: a task that asks to run code, or needs more than text.
        TameError: a task whose data cannot be reached, or whose definition fails.
    """
    quiet()
    import datasets

    datasets.disable_progress_bars()
    loaded_tasks = _load_tasks(work, spec)
    progress("tasks", 0, 1)
    results, batch = backing_off(
        lambda size: _evaluate(loaded, loaded_tasks, size, spec.task_limit), spec.batch_size, "item of a task"
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
        for name, flips in _floor(loaded, work, spec, batch, results["samples"]).items():
            summary[name]["floor"] = flips
    progress("tasks", 1, 1)
    protocol = {
        "batch_size": batch,
        "limit": spec.task_limit,
        "weights": loaded.weights,
        "dtype": loaded.dtype,
    }
    (folder / RESULT).write_text(json.dumps({"tasks": summary, "groups": groups, "protocol": protocol}, indent=1))


def _load_tasks(work: TaskWork, spec: Evaluate) -> Any:
    """As lm_eval.simple_evaluate does it, without the index of all its tasks."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    try:
        found = TaskManager(include_path=work.include, include_defaults=False).load(work.names)
    except Exception as error:
        raise TameError(
            f"evaluate.tasks {', '.join(work.names)}: {type(error).__name__}: {line(error)}; see that the data can be reached"
        ) from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise BadInputError(
                f"evaluate.tasks {name}: it runs code that the model writes, and tame does not; leave it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise BadInputError(
                f"evaluate.tasks {name}: it needs images or sound, and tame measures text; leave it out"
            )
        default = task.get_config("num_fewshot")
        if spec.task_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=spec.task_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-evaluation-harness's own default: its published scores use it
    return found


def _evaluate(loaded: Loaded, found: Any, batch_size: int, limit: int | None) -> Any:
    import random

    import numpy as np
    import torch
    from lm_eval import evaluate

    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in found["tasks"].values():
        task._instances = None  # of a run that had no memory for its batches
    with torch.inference_mode():
        return evaluate(_adapter(loaded, batch_size), task_dict=found, limit=limit, bootstrap_iters=0, log_samples=True)


def _adapter(loaded: Loaded, batch_size: int) -> Any:
    """lm-evaluation-harness's own model class, but logits are computed for the tokens that are scored, and for no others.

    It would compute and normalize those of the question and of the padding too, which it then throws away.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    head = head_of(loaded.model)

    class Adapter(HFLM):  # type: ignore[misc,unused-ignore]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            if head is None:
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
            inputs = [tuple((context + answer)[-(self.max_length + 1) :][:-1]) for _, context, answer in requests]
            order = sorted(set(inputs), key=lambda tokens: (-len(tokens), tokens))  # answers may share their input
            asked: dict[tuple[int, ...], list[int]] = {tokens: [] for tokens in order}
            for index, tokens in enumerate(inputs):
                asked[tokens].append(index)
            results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            size = override_bs or self.batch_size
            with torch.inference_mode(), body_of(loaded.model) as body:
                for start in range(0, len(order), size):
                    rows = order[start : start + size]
                    padded = [[*tokens, *[0] * (len(rows[0]) - len(tokens))] for tokens in rows]
                    states = body(torch.tensor(padded, device=loaded.device))
                    for row, tokens in enumerate(rows):
                        for index in asked[tokens]:
                            answer = torch.tensor(requests[index][2])
                            logits = head(states[row, len(tokens) - len(answer) : len(tokens)])
                            chances = logits.log_softmax(-1, dtype=self.softmax_dtype).cpu()
                            chance = chances.gather(-1, answer[:, None]).sum()
                            results[index] = (float(chance), bool((chances.argmax(-1) == answer).all()))
            return results

    return Adapter(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, device=loaded.device)


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


def _floor(loaded: Loaded, work: TaskWork, spec: Evaluate, batch: int, samples: Any) -> dict[str, dict[str, int]]:
    """For each task: of how many items, and how many change between right and wrong in another batch shape."""
    limit = min(FLOOR_ITEMS, spec.task_limit or FLOOR_ITEMS)
    found = _load_tasks(work, spec)
    other = 1 if batch > 1 else 2
    results, used = backing_off(lambda size: _evaluate(loaded, found, size, limit), other, "item of a task")
    if used == batch:  # there is memory for one batch shape only
        return {}
    again = results["samples"]
    floors = {}
    for name, items in again.items():
        metric, only = items[0]["metrics"][0], items[0]["filter"]
        items = [item for item in items if item["filter"] == only]
        before = {(item["doc_id"], item["filter"]): item.get(metric) for item in samples[name]}
        flips = int(sum(before[item["doc_id"], item["filter"]] != item.get(metric) for item in items))
        floors[name] = {"items": len(items), "flips": flips}
    return floors

"""Benchmarks that the Hub keeps leaderboards of, and what lm-evaluation-harness calls them.

A score is put on a leaderboard by a file in .eval_results that names the benchmark's data set and a task of it. Which tasks a
data set has, its own eval.yaml says (https://huggingface.co/docs/hub/eval-results): its ids are read there.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from configs.errors import TameError
from tasks.download.hub_client import endpoint, explained

# The lm-eval task and its metric; the data set, and the configuration of it that the task asks.
KNOWN = {
    ("gsm8k", "exact_match"): ("openai/gsm8k", "main"),
    ("mmlu_pro", "exact_match"): ("TIGER-Lab/MMLU-Pro", "default"),
    ("gpqa_diamond_zeroshot", "acc"): ("Idavidrein/gpqa", "gpqa_diamond"),
}


class Benchmark(BaseModel):
    """A task of a benchmark's data set, as its eval.yaml names it."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    task_id: str


class Benchmarks(NamedTuple):
    """Benchmarks by the metric that is their score (`task/gsm8k/exact_match`), and why others cannot be told of."""

    found: dict[str, Benchmark]
    notes: list[str]


def find(tasks: Iterable[str]) -> Benchmarks:
    """The benchmarks among lm-eval's `tasks`. A data set that cannot be read costs its file in .eval_results, no more."""
    found, notes = {}, []
    for (task, metric), (dataset, config) in KNOWN.items():
        if task not in tasks:
            continue
        try:
            found[f"task/{task}/{metric}"] = Benchmark(dataset=dataset, task_id=_task_id(dataset, config))
        except TameError as error:
            notes.append(f"the score of {task} is on the card, but not in .eval_results: {error}")
    return Benchmarks(found, notes)


def _task_id(dataset: str, config: str) -> str:
    """The id of the task in the eval.yaml of `dataset` that asks its configuration `config`, or of its only task.

    Raises:
        TameError: the eval.yaml cannot be read, or has no such task.
    """
    from huggingface_hub import hf_hub_download

    with explained(dataset, "main"):
        path = Path(hf_hub_download(dataset, "eval.yaml", repo_type="dataset", endpoint=endpoint()))
    try:
        tasks: list[dict[str, Any]] = yaml.safe_load(path.read_bytes())["tasks"]
        ids = {str(task["id"]): task.get("config") for task in tasks}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise TameError(f"the eval.yaml of {dataset} has no list of tasks with ids") from None
    fitting = [name for name, of in ids.items() if of == config] or (list(ids) if len(ids) == 1 else [])
    if len(fitting) != 1:
        raise TameError(
            f"the eval.yaml of {dataset} has no one task for its configuration {config}, but {', '.join(ids)}"
        )
    return fitting[0]

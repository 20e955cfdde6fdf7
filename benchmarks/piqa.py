"""PIQA's items as a task of lm-eval's, from a file of items instead of the Hub's data set."""

from collections.abc import Sequence
from pathlib import Path

TASK = """task: piqa_own
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/piqa.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{metrics}]
metadata: {{version: 1}}
"""


def write_task(items: Path, most: int, folder: Path, metrics: Sequence[str] = ("acc",)) -> None:
    """Write the task `piqa_own`, of the first `most` lines of `items` (JSON: goal, sol1, sol2, label), into `folder`."""
    lines = items.read_text(encoding="utf-8").splitlines()[:most]
    (folder / "piqa.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = ", ".join(f"{{metric: {name}}}" for name in metrics)
    (folder / "piqa.yaml").write_text(TASK.format(folder=folder, metrics=asked), encoding="utf-8")

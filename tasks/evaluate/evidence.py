"""Reads what an evaluation kept besides its numbers: values per window, layer and task item, for plots, MLflow and the report.

Every function returns something empty where the evaluation kept nothing.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

ITEM = ("doc_id", "doc_hash", "filter")
"""What tells the items of a task apart."""
WHICH = (*ITEM, "answer")
"""An item's other keys are its scores."""


class Flips(NamedTuple):
    """The items of a task, by their number in it, that a variant has wrong where the baseline is right, and the reverse."""

    task: str
    lost: list[int]
    won: list[int]


class Layer(NamedTuple):
    """A weight that was quantized: where it is, and its relative error."""

    module: str
    depth: int
    """The first number in its name; 0 where there is none."""
    kind: str
    """Its name without what all names begin with, such as self_attn.q_proj; numbers, such as experts', are `*`."""
    error: float
    parameters: int


class Example(NamedTuple):
    """An answer to a task's item that changed between right and wrong, in words."""

    doc_id: int
    lost: bool
    """Whether the baseline was right; if not, the variant is."""
    question: str
    right: str | None
    baseline: str | None
    variant: str | None


def windows(folder: str | None) -> dict[str, list[float]]:
    """The mean loss and, for a variant, KL divergence of each window of the text, nats a token: {"loss": […], "kl": […]}."""
    path = Path(folder) / "windows.json" if folder else None
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_bytes())
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def positions(folder: str | None) -> list[dict[str, Any]]:
    """Perplexity and mean KL divergence of a variant by position in a window: {from, to, perplexity, kl_mean} a part."""
    path = Path(folder) / "positions.json" if folder else None
    found = json.loads(path.read_bytes()) if path and path.is_file() else []
    return [part for part in found if "kl_mean" in part]


def flips(baseline: str | None, variant: str | None) -> list[Flips]:
    """What changed between right and wrong, a task each, by its first score that is 0 or 1 for every item."""
    if not baseline or not variant:
        return []
    changed = []
    for path in sorted(Path(variant).glob("tasks/*.jsonl")):
        ours, theirs = _items(path), _items(Path(baseline) / "tasks" / path.name)
        pairs = [(item, theirs[key]) for key, item in ours.items() if key in theirs]
        scores = [name for name in next(iter(ours.values()), {}) if name not in WHICH]
        score = next((name for name in scores if all({a.get(name), b.get(name)} <= {0, 1} for a, b in pairs)), None)
        if score:
            lost = sorted(a["doc_id"] for a, b in pairs if a[score] < b[score])
            won = sorted(a["doc_id"] for a, b in pairs if a[score] > b[score])
            changed.append(Flips(path.stem, lost, won))
    return changed


def examples(folder: str | None) -> dict[str, list[Example]]:
    """Some answers that changed between right and wrong, by task."""
    path = Path(folder) / "flips.json" if folder else None
    written = json.loads(path.read_bytes()) if path and path.is_file() else {}
    return {task: [Example(**item) for item in items] for task, items in written.items()}


def layers(folder: str | None) -> list[Layer]:
    """The relative error of each weight that a variant has quantized, in the model's order."""
    path = Path(folder) / "layers.json" if folder else None
    found = json.loads(path.read_bytes()) if path and path.is_file() else []
    names = [["*" if part.isdigit() else part for part in row["module"].split(".")] for row in found]
    shared = next((i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1), 0)
    return [
        Layer(row["module"], _depth(row["module"]), ".".join(name[shared:]), row["error"], row["parameters"])
        for row, name in zip(found, names, strict=True)
    ]


def _depth(module: str) -> int:
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)


def _items(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {" ".join(str(row[key]) for key in ITEM): row for row in rows}

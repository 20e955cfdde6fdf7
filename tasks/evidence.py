"""What the evaluation kept besides its numbers, as curves for plots and MLflow. Absent evidence is an empty answer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

WHICH = ("doc_id", "doc_hash", "filter")
"""What tells the items of a task apart; an item's other keys are its scores."""


class Flips(NamedTuple):
    """The items of a task, by their number in it, that a variant has wrong where the baseline is right, and the reverse."""

    task: str
    lost: list[int]
    won: list[int]


def windows(folder: str | None) -> dict[str, list[float]]:
    """The mean loss and, for a variant, KL divergence of each window of the text, nats a token: {"loss": […], "kl": […]}."""
    path = Path(folder) / "windows.json" if folder else None
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_bytes())
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


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


def _items(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {" ".join(str(row[key]) for key in WHICH): row for row in rows}

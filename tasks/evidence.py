"""What the evaluation kept besides its numbers, as curves for plots and MLflow. Absent evidence is an empty answer."""

import json
from pathlib import Path


def windows(folder: str | None) -> dict[str, list[float]]:
    """The mean loss and, for a variant, KL divergence of each window of the text, nats a token: {"loss": […], "kl": […]}."""
    path = Path(folder) / "windows.json" if folder else None
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_bytes())
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}

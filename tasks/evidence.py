"""What the evaluation kept besides its numbers, as curves for plots and MLflow. Absent evidence is an empty answer."""

import json
from pathlib import Path


def windows(folder: str | None) -> dict[str, list[float]]:
    """The loss and, for a variant, the KL divergence of each window, nats a token: {"loss": […], "kl": […]}."""
    path = Path(folder) / "windows.json" if folder else None
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_text())
    return {name: [float(row[name]) for row in rows] for name in ("loss", "kl") if rows and name in rows[0]}

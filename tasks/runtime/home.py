"""Where tame keeps what it makes on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """TAME_HOME, by default ~/.cache/tame."""
    return Path(os.environ.get("TAME_HOME") or "~/.cache/tame").expanduser().absolute()

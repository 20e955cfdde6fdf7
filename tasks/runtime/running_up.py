"""What `tame up` tells other commands of this machine: whether it runs, and where its servers are.

TAME_HOME/up.lock   held as long as it, or what it started, runs; what it says is for people
TAME_HOME/up.json   the addresses of its servers, written when all are healthy
"""

import fcntl
import json
from pathlib import Path
from typing import NamedTuple

from configs.settings import home


class Servers(NamedTuple):
    """Of a `tame up` that runs."""

    prefect: str
    """For PREFECT_API_URL."""
    mlflow: str
    """For MLFLOW_TRACKING_URI."""


def lock_file() -> Path:
    """The file that `tame up` holds locked."""
    return home() / "up.lock"


def addresses_file() -> Path:
    """The file with its addresses."""
    return home() / "up.json"


def servers() -> Servers | None:
    """Where the servers of the `tame up` that runs are; None if none runs."""
    try:
        with lock_file().open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None  # nobody holds it
    except BlockingIOError:
        pass
    except OSError:
        return None
    try:
        return Servers(**json.loads(addresses_file().read_bytes()))
    except (OSError, ValueError, TypeError):
        return None  # it is starting, or stopping

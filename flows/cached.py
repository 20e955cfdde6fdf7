"""A run that has nothing to do: all of it is in the cache, and what came of it is logged already.

It goes the way of every release (flows/pipeline.py) without Prefect and MLflow, which take longer to import than it takes.
"""

import logging
import os
from pathlib import Path

from pydantic import ValidationError

from configs.errors import NotCachedError
from configs.schema import Recipe
from configs.settings import home
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import result as results
from tasks.report.html import render
from tasks.result import Result
from tasks.store import cache_only
from tasks.track.reruns import content_of

log = logging.getLogger("tame.release")


def from_cache(recipe: Recipe, out: Path) -> Result | None:
    """The result of `recipe`, if the run before that wrote to `out` came to the same, and nothing has to be made for it.

    Published variants are compared with what is there, and published again where it is gone. None also where
    PREFECT_API_URL or MLFLOW_TRACKING_URI name a server: people look for the run there.
    """
    before = _before(out)
    if before is None or before.recipe != recipe or before.mlflow_run is None:
        return None
    if any(os.environ.get(name) for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")):
        return None
    if not (home() / "mlflow.db").exists() or any((home() / "spool").glob("*.json")):
        return None
    said: list[str] = []
    try:
        with cache_only.nothing_made():
            result = make(recipe, out, results.begin(recipe, before.prefect_run), DIRECT, say=said.append)
            result = result.model_copy(update={"mlflow_run": before.mlflow_run})
            if result.exit_code in (1, 2) or content_of(result) != content_of(before):
                return None
            page = render(result)
    except NotCachedError:
        return None
    results.write(result, out)
    results.write_file(out / "report.html", page)
    for line in said:
        log.info("%s", line)
    return result


def _before(out: Path) -> Result | None:
    try:
        return Result.model_validate_json((out / "result.json").read_bytes())
    except (OSError, ValidationError):
        return None

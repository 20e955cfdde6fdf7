"""Logging to MLflow so that no release is lost: begun, logged as often as wanted, spooled when the server is away.

    TAME_HOME/spool/RELEASE.json a result that MLflow does not have yet; written before each attempt, removed after it

A release's result is the whole truth, and MLflow a projection of it (tasks/track/mlflow_runs.py): projecting twice changes nothing.
"""

import hashlib
import json
import logging
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from configs.errors import TameError, named_line
from configs.schema import Recipe
from configs.settings import home
from tasks.result import Result
from tasks.runtime.files import write_text
from tasks.track import connection, liveness, mlflow_runs, registry

logger = logging.getLogger("tame.track")


def begin(recipe: Recipe, tags: dict[str, str]) -> str | None:
    """Open this release's run, RUNNING, and return its id; None, said in one line, when MLflow cannot be reached.

    What earlier runs left is put right first: results in the spool are logged, runs of dead processes are closed as
    KILLED. `tags` go on the run; with `prefect_run` among them, a retried flow run finds its run again.
    """
    try:
        client = connection.connect()
        _replay(client)
        experiment = mlflow_runs.experiment(client, registry.experiment_name(recipe))
        liveness.close_stale(client)
        name = _release(tags.get("prefect_run"))
        shown = registry.run_name(recipe, datetime.now(UTC))
        run_id = mlflow_runs.open_release(client, experiment, shown, {**tags, **liveness.heartbeat()}, name)
        liveness.keep_alive(client, run_id)
    except Exception as error:  # whatever MLflow throws: a release is worth more than its log
        logger.warning("%s; the release goes on and is logged later", connection.away(error))
        return None
    return run_id


def log(result: Result, run_id: str | None, report: Path | None, final: bool) -> str | None:
    """Make MLflow show `result`, and return the id of its run; the last call for a release is `final`.

    The result is spooled before and taken out of the spool after, so that neither a server that is away nor a SIGKILL
    loses it. None when there is no run yet because MLflow cannot be reached.
    """
    release = _release(result.prefect_run, result)
    folder = home() / "spool"
    spooled = folder / f"{release}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(spooled.with_suffix(".lock")):
            _spool(spooled, result, run_id, report, final)
            try:
                run_id = _write(connection.connect(), spooled)
            except Exception as error:  # whatever MLflow throws: it is all in the spool
                kept = "the result is kept in %s and logged by the next run or tame track --replay"
                logger.warning(f"%s; {kept}", connection.away(error), spooled)
    except OSError as error:  # no space: result.json, which lies elsewhere, may still be written
        logger.warning("%s: %s; this result is not logged to MLflow", spooled, error.strerror or error)
    if final and run_id:
        liveness.stop_heartbeat(run_id)
    return run_id


def attach(run_id: str | None, folder: str, files: dict[str, bytes]) -> bool:
    """Put `files` (contents by name) below `folder` among the artifacts of a run, and say whether MLflow has them now."""
    if run_id is None:
        return False
    try:
        client = connection.connect()
        for name, content in files.items():
            client.log_text(run_id, content.decode(), f"{folder}/{name}")
    except Exception as error:  # whatever MLflow throws: Prefect shows them, too
        logger.warning("%s; %s is not shown there", connection.away(error), ", ".join(files))
        return False
    return True


def replay() -> int:
    """Log every spooled result, and return how many were logged; one line for each that could not be.

    Raises:
        TameError: MLflow cannot be reached.
    """
    try:
        return _replay(connection.connect())
    except Exception as error:  # whatever MLflow throws
        raise TameError(f"{connection.away(error)}; start it, or see MLFLOW_TRACKING_URI") from error


def _spool(spooled: Path, result: Result, run_id: str | None, report: Path | None, final: bool) -> None:
    page = report.read_text(encoding="utf-8") if report and report.exists() else None
    content = {
        "server": connection.public_address(),
        "run_id": run_id,
        "final": final,
        "life": liveness.heartbeat(),
        "result": result.model_dump(mode="json"),
        "report": page,
    }
    write_text(spooled, json.dumps(content))


def _write(client: Any, spooled: Path) -> str:
    """Project one spooled result into MLflow and take it out of the spool. The caller holds its lock."""
    content = json.loads(spooled.read_text())
    result = Result.model_validate(content["result"])
    release = mlflow_runs.Release(spooled.stem, content["run_id"], content["life"])
    run_id = mlflow_runs.write(client, result, release, content["report"], content["final"])
    spooled.unlink()
    return run_id


def _replay(client: Any) -> int:
    waiting = sorted((home() / "spool").glob("*.json"))
    if waiting:
        client.search_experiments(max_results=1)  # away is away for all of them
    logged = 0
    for spooled in waiting:
        try:
            with FileLock(spooled.with_suffix(".lock"), timeout=0):
                if not spooled.exists() or json.loads(spooled.read_bytes())["server"] != connection.public_address():
                    continue
                _write(client, spooled)
                logged += 1
                logger.info("logged the result that was kept in %s", spooled)
        except Timeout:
            continue  # its own process is logging it
        except Exception as error:  # one that cannot be logged keeps no other from it
            logger.warning(
                "%s cannot be logged (%s); remove it, or try tame track --replay again", spooled, named_line(error)
            )
    return logged


def _release(prefect_run: str | None, result: Result | None = None) -> str:
    """What tells this release from all others, also as a file name: its Prefect run, else a hash of when and what."""
    if prefect_run:
        return re.sub(r"[^\w-]", "-", prefect_run)
    if result is None:
        return uuid4().hex
    asked = json.dumps(result.recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(f"{result.started} {asked}".encode()).hexdigest()[:32]

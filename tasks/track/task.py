"""Logging to MLflow so that no release is lost: begun, logged as often as wanted, spooled when the server is away.

    TAME_HOME/mlflow.db          the embedded database, unless MLFLOW_TRACKING_URI names a server
    TAME_HOME/mlartifacts/       reports and plots of the embedded database's runs
    TAME_HOME/spool/RELEASE.json a result that MLflow does not have yet; written before each attempt, removed after it

A release's result is the whole truth, and MLflow a projection of it (tasks/track/mlflow_runs.py): projecting twice changes nothing.
"""

import hashlib
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from prefect import task

from configs.errors import TameError, bare_address, named_line
from configs.schema import Recipe
from configs.settings import home
from tasks.result import Result
from tasks.runtime.files import write_text
from tasks.track import mlflow_internals, mlflow_runs, registry

logger = logging.getLogger("tame.track")

HEARTBEAT = 60.0
"""Seconds between the signs of life that a run gives."""
DEAD_AFTER = 300.0
"""Seconds without one after which a run on another host counts as killed."""
SYSTEM_METRICS_EVERY = 10.0
ANSWER_WITHIN = 10.0
"""Seconds that a server has for saying that it is there: one that hangs would else cost each call most of a minute."""

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}

_alive: dict[str, threading.Event] = {}
_connecting = threading.Lock()
_ready: set[int] = set()
"""Embedded databases, by inode, that this process has made sure of."""


def database_uri() -> str:
    """MLFLOW_TRACKING_URI, or the embedded SQLite database, made where it is missing, brought up to date where it is old.

    Raises:
        TameError: the installed MLflow cannot use the embedded database.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        _make_ready(home() / "mlflow.db")
    return _uri()


def _make_ready(database: Path) -> None:
    """Make the database, or migrate what an earlier MLflow made; once a process.

    MLflow killed while it creates its file can never open it again, and two that create it at once trip over each
    other: it is made beside its place under a lock and renamed in.
    """
    if database.exists() and database.stat().st_ino in _ready:
        return
    _settings()
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name("mlflow.lock")):
        if not database.exists():
            _create(database)
        elif kept := mlflow_internals.bring_up_to_date(database):
            logger.info("%s was brought up to date for the installed MLflow; what it was is kept in %s", database, kept)
        _ready.add(database.stat().st_ino)


def _uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def prepare() -> None:
    """Import MLflow and make its database in a background thread, so that neither is waited for later."""
    _settings()  # here, in the caller's thread: what others read in os.environ does not change behind their backs
    threading.Thread(target=_prepare, daemon=True, name="prepare MLflow").start()


def begin(recipe: Recipe, tags: dict[str, str]) -> str | None:
    """Open this release's run, RUNNING, and return its id; None, said in one line, when MLflow cannot be reached.

    What earlier runs left is put right first: results in the spool are logged, runs of dead processes are closed as
    KILLED. `tags` go on the run; with `prefect_run` among them, a retried flow run finds its run again.
    """
    try:
        client = connect()
        _replay(client)
        experiment = mlflow_runs.experiment(client, registry.experiment_name(recipe))
        _close_dead(client)
        name = _release(tags.get("prefect_run"))
        run_id = mlflow_runs.open_release(client, experiment, recipe.name, {**tags, **_signs_of_life()}, name)
        _stay_alive(client, run_id)
    except Exception as error:  # whatever MLflow throws: a release is worth more than its log
        logger.warning("%s; the release goes on and is logged later", away(error))
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
                run_id = _write(connect(), spooled)
            except Exception as error:  # whatever MLflow throws: it is all in the spool
                kept = "the result is kept in %s and logged by the next run or tame track --replay"
                logger.warning(f"%s; {kept}", away(error), spooled)
    except OSError as error:  # no space: result.json, which lies elsewhere, may still be written
        logger.warning("%s: %s; this result is not logged to MLflow", spooled, error.strerror or error)
    if final and run_id:
        _rest(run_id)
    return run_id


def replay() -> int:
    """Log every spooled result, and return how many were logged; one line for each that could not be.

    Raises:
        TameError: MLflow cannot be reached.
    """
    try:
        return _replay(connect())
    except Exception as error:  # whatever MLflow throws
        raise TameError(f"{away(error)}; start it, or see MLFLOW_TRACKING_URI") from error


def away(error: Exception) -> str:
    """In a line, that MLflow cannot be used, where and why, without credentials."""
    return f"MLflow at {place()} cannot be used ({named_line(error)})"


def run_url(run_id: str | None) -> str | None:
    """The page of a run, where MLflow is a server."""
    if run_id is None or not re.match("https?:", database_uri()):
        return None
    try:
        experiment = connect().get_run(run_id).info.experiment_id
    except Exception:  # a link is never worth a release
        return None
    return f"{place().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def connect() -> Any:
    """An MLflow client of `database_uri()`, quiet, and giving up in well under a minute on a server that is away.

    Raises:
        TameError: a server that gives no answer, nobody listens there, or a database that cannot be connected to.
    """
    _settings()
    with _connecting:  # the thread of `prepare` and the flow's may both be here
        _check_answers()
        import mlflow

        uri = database_uri()
        mlflow_internals.use(uri)
        return mlflow.MlflowClient(uri)


def _settings() -> None:
    """MLflow's own settings, quiet and impatient, where the user has given none."""
    for name, value in SETTINGS.items():
        if name not in os.environ:
            os.environ[name] = value
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_answers() -> None:
    """See that a server is there, once more if nobody listens: it may be starting again. Any answer of HTTP will do."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if re.match(rf"({'|'.join(mlflow_internals.SERVER_DATABASES)}|sqlite)[+:]", given):
        mlflow_internals.check_database(given, ANSWER_WITHIN)
    if not (address := place()).startswith(("http://", "https://")):
        return
    for last in (False, True):
        try:
            with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=ANSWER_WITHIN):  # noqa: S310
                return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError) and not isinstance(reason, TimeoutError):
                return  # whether its certificate will do is for MLflow's settings to say
            if last or not isinstance(reason, ConnectionError):
                raise TameError(f"no answer: {reason}") from error
        time.sleep(1)


def _prepare() -> None:
    try:
        connect()
    except Exception as error:  # begin() meets it again, and says so
        logger.debug("MLflow is not ready: %s", named_line(error))


def _create(database: Path) -> None:
    partial = database.with_name(".partial-mlflow.db")
    partial.unlink(missing_ok=True)
    mlflow_internals.create_database(partial, home() / "mlartifacts")
    partial.rename(database)


def _spool(spooled: Path, result: Result, run_id: str | None, report: Path | None, final: bool) -> None:
    page = report.read_text(encoding="utf-8") if report and report.exists() else None
    content = {
        "server": place(),
        "run_id": run_id,
        "final": final,
        "life": _signs_of_life(),
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
                if not spooled.exists() or json.loads(spooled.read_bytes())["server"] != place():
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


def _signs_of_life() -> dict[str, str]:
    """Tags that tell whether the process behind a run lives: where it is, which it is, and when it last said so."""
    import psutil

    me = psutil.Process()
    return {
        "tame.where": _where(),
        "tame.process": f"{me.pid} {me.create_time():.2f}",
        "tame.heartbeat": f"{time.time():.0f}",
    }


def _where() -> str:
    """Names the process table that this process is in: host, boot, and, in a container, which one."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip() if boot.exists() else "", str(namespace.readlink()) if namespace.exists() else ""]
    return " ".join([socket.gethostname(), *known])


def _is_dead(tags: dict[str, str]) -> bool:
    import psutil

    if tags.get("tame.where") == _where():
        pid, _, created = tags.get("tame.process", "0 0").partition(" ")
        try:
            return bool(abs(psutil.Process(int(pid)).create_time() - float(created)) > 1)
        except psutil.NoSuchProcess:
            return True
    return time.time() - float(tags.get("tame.heartbeat", "0")) > DEAD_AFTER


def _close_dead(client: Any) -> None:
    for run in mlflow_runs.running(client):
        if run.info.run_id not in _alive and _is_dead(run.data.tags):
            mlflow_runs.close(client, run, "KILLED")
            logger.info("closed the MLflow run %s (%s), whose process is gone", run.info.run_name, run.info.run_id)


def _stay_alive(client: Any, run_id: str) -> None:
    """Give signs of life and log the machine's load, in the background, until `_rest`."""
    _rest(run_id)
    resting = _alive[run_id] = threading.Event()
    monitor = mlflow_internals.monitor(run_id, client.tracking_uri, SYSTEM_METRICS_EVERY)

    def beat() -> None:
        nonlocal monitor
        while not resting.wait(HEARTBEAT):
            try:
                client.set_tag(run_id, "tame.heartbeat", f"{time.time():.0f}")
                if not mlflow_internals.monitors(monitor):
                    monitor = mlflow_internals.monitor(run_id, client.tracking_uri, SYSTEM_METRICS_EVERY)
            except Exception as error:  # the next beat tries again
                logger.debug("no heartbeat: %s", named_line(error))
        monitor.finish()

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()


def _rest(run_id: str) -> None:
    if resting := _alive.pop(run_id, None):
        resting.set()


def place() -> str:
    """The server's address without the credentials that it may hold."""
    return bare_address(_uri())


@task(name="log to MLflow", task_run_name="log {what}")
def track_task(what: str, result: Result, run_id: str | None, report: Path | None, final: bool) -> str | None:
    """`log` in the flow; `what` names the state, such as a variant."""
    return log(result, run_id, report, final)

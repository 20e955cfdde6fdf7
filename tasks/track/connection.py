"""Which MLflow it is, and whether it is there: the embedded database, made and kept up to date, or a server that answers.

TAME_HOME/mlflow.db     the embedded database, unless MLFLOW_TRACKING_URI names a server
TAME_HOME/mlartifacts/  reports and plots of the embedded database's runs
"""

import functools
import logging
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock

from configs.errors import TameError, bare_address, named_line
from configs.settings import home
from tasks.runtime.retry import retry
from tasks.track import mlflow_internals

logger = logging.getLogger("tame.track")

ANSWER_WITHIN = 10.0
"""Seconds that a server has for saying that it is there: one that hangs would else cost each call most of a minute."""

SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}

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


def prepare() -> None:
    """Import MLflow and make its database in a background thread, so that neither is waited for later."""
    _settings()  # here, in the caller's thread: what others read in os.environ does not change behind their backs
    threading.Thread(target=_prepare, daemon=True, name="prepare MLflow").start()


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


def public_address() -> str:
    """The server's address without the credentials that it may hold."""
    return bare_address(_uri())


def away(error: Exception) -> str:
    """In a line, that MLflow cannot be used, where and why, without credentials."""
    return f"MLflow at {public_address()} cannot be used ({named_line(error)})"


def run_url(run_id: str | None) -> str | None:
    """The page of a run, where MLflow is a server."""
    if run_id is None or not re.match("https?:", database_uri()):
        return None
    try:
        experiment = connect().get_run(run_id).info.experiment_id
    except Exception:  # a link is never worth a release
        return None
    return f"{public_address().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


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


def _create(database: Path) -> None:
    partial = database.with_name(".partial-mlflow.db")
    partial.unlink(missing_ok=True)
    mlflow_internals.create_database(partial, home() / "mlartifacts")
    partial.rename(database)


def _uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def _settings() -> None:
    """MLflow's own settings, quiet and impatient, where the user has given none."""
    for name, value in SETTINGS.items():
        if name not in os.environ:
            os.environ[name] = value
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_answers() -> None:
    """Check that the server is there. Any HTTP answer will do. If nobody listens, it may be restarting, and is asked once more.

    Raises:
        TameError: the server gives no answer.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if re.match(rf"({'|'.join(mlflow_internals.SERVER_DATABASES)}|sqlite)[+:]", given):
        mlflow_internals.check_database(given, ANSWER_WITHIN)
    if not (address := public_address()).startswith(("http://", "https://")):
        return
    try:
        retry(functools.partial(_ask, address), [1.0], lambda error: isinstance(_reason(error), ConnectionError))
    except OSError as error:
        raise TameError(f"no answer: {_reason(error)}") from error


def _ask(address: str) -> None:
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=ANSWER_WITHIN):  # noqa: S310
            return
    except urllib.error.HTTPError:
        return
    except OSError as error:
        reason = _reason(error)
        if not isinstance(reason, ssl.SSLError) or isinstance(reason, TimeoutError):
            raise
        # whether its certificate will do is for MLflow's settings to say


def _reason(error: Exception) -> object:
    """What urllib's error wraps, or the error itself."""
    return getattr(error, "reason", error)


def _prepare() -> None:
    try:
        connect()
    except Exception as error:  # begin() meets it again, and says so
        logger.debug("MLflow is not ready: %s", named_line(error))

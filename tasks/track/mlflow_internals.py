"""Everything of MLflow that is not its documented interface, in this file alone, with what it is needed for.

`pyproject.toml` admits the minor versions that this was tested with; tests/test_track.py uses all of it on real databases.
"""

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

from configs.errors import TameError, line

SERVER_DATABASES = ("postgresql", "mysql", "mssql")


def use(uri: str) -> None:
    """Make `uri` MLflow's place in this process alone.

    `mlflow.set_tracking_uri` writes it into `os.environ` too. There, other threads may be reading at that moment, and the
    embedded database would look like a choice of the user's.
    """
    from mlflow.tracking._tracking_service import utils

    utils._tracking_uri = uri


def create_database(database: Path, artifacts: Path) -> None:
    """Make an empty MLflow database in the file `database`, with its artifacts under `artifacts`."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{database}", str(artifacts))
    store.engine.dispose()


def server_app(uri: str, artifacts: Path) -> tuple[str, str]:
    """What a uvicorn serves, as `mlflow server` has it, and the file of its log settings; this process is told its database.

    Args:
        uri: The database.
        artifacts: Where runs of new experiments keep their files; clients write there themselves.
    """
    from mlflow import server
    from mlflow.environment_variables import _MLFLOW_SERVER_BOOT_ID, _MLFLOW_SGI_NAME

    os.environ |= {
        server.BACKEND_STORE_URI_ENV_VAR: uri,
        server.ARTIFACT_ROOT_ENV_VAR: str(artifacts),
        _MLFLOW_SGI_NAME.name: "uvicorn",
        _MLFLOW_SERVER_BOOT_ID.name: uuid4().hex,
    }
    return "mlflow.server.fastapi_app:app", str(server._UVICORN_LOG_CONFIG)


def bring_up_to_date(database: Path) -> Path | None:
    """Change `database`, which an earlier MLflow wrote, to what the installed one opens; a copy of it as it was before.

    None if it is up to date. It is changed in place, so that a process which has it open goes on with it. What a killed
    migration left half done begins again from the copy.

    Raises:
        TameError: a later MLflow wrote it, it is no database of MLflow's, or MLflow cannot (then it is as it was).
    """
    copy = database.with_name(".migrating-mlflow.db")
    if not _is_old(database):
        if copy.exists():  # killed when it was done
            copy.rename(_kept(database, copy))
        return None
    if copy.exists():
        _copy(copy, database)
    else:
        partial = database.with_name(".partial-mlflow.db")
        partial.unlink(missing_ok=True)
        _copy(database, partial)
        partial.rename(copy)
    try:
        _upgrade(database)
    except Exception as error:  # whatever MLflow and its libraries throw
        _copy(copy, database)
        copy.unlink()
        raise TameError(f"{database}: MLflow cannot bring it up to date ({line(error)}); move it away") from error
    return copy.rename(_kept(database, copy))


def _is_old(database: Path) -> bool:
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils

    scripts = ScriptDirectory.from_config(utils._get_alembic_config(""))
    try:
        found = _revisions(database)
    except sqlite3.Error as error:
        raise TameError(f"{database} is no database of MLflow's ({line(error)}); move it away") from None
    if found == scripts.get_heads():
        return False
    if not set(found) <= {script.revision for script in scripts.walk_revisions()}:
        raise TameError(f"a later MLflow than the installed one wrote {database}; install that again, or move it away")
    return True


def _revisions(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        return [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]


def _kept(database: Path, copy: Path) -> Path:
    return database.with_name(f"{database.name}.before-{'-'.join(_revisions(copy))}")


def _upgrade(database: Path) -> None:
    import sqlalchemy
    from mlflow.store.db import utils

    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    try:
        utils._upgrade_db(engine)
    finally:
        engine.dispose()


def _copy(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as of,
        contextlib.closing(sqlite3.connect(target, timeout=60)) as to,
    ):
        of.backup(to)


def check_database(uri: str, within: float) -> None:
    """Connect to the database that `uri` names, once: MLflow tries for minutes, whatever is wrong.

    Raises:
        TameError: the database cannot be connected to.
    """
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    try:
        address = sqlalchemy.engine.make_url(uri)
        server = address.get_backend_name() in SERVER_DATABASES
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise TameError("it is no address of a database, such as postgresql://user:password@host:5432/mlflow") from None
    if "@" in (address.host or ""):
        raise TameError("an @ in its password has to be written as %40")
    if address.get_backend_name() == "sqlite" and address.database:
        try:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
        except OSError as error:
            raise TameError(f"{error.filename}: {error.strerror}") from None
    limit = {"timeout" if address.get_backend_name() == "mssql" else "connect_timeout": int(within)} if server else {}
    try:
        sqlalchemy.create_engine(address, poolclass=NullPool, connect_args=limit).connect().close()
    except ImportError as error:
        raise TameError(f"{line(error)}; pip install it") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise TameError(line(getattr(error, "orig", None) or error)) from None


def monitor(run_id: str, uri: str, every: float) -> Any:
    """MLflow's thread that logs the machine's load to a run, every so many seconds."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=every, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def monitors(monitor: Any) -> bool:
    """Whether that thread still runs: it ends by itself when the server was away for a moment."""
    return bool(monitor._process.is_alive())


def external_model(client: Any, experiment_id: str, **about: Any) -> Any:
    """A logged model whose files lie elsewhere, as `mlflow.create_external_model`, which knows no client but the global one."""
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.utils import get_external_mlflow_model_spec
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    tags = {**about.pop("tags"), MLFLOW_MODEL_IS_EXTERNAL: "true"}
    model = client.create_logged_model(experiment_id, tags=tags, **about)
    with tempfile.TemporaryDirectory(prefix="tame-") as folder:
        get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model.model_id, folder)
    return client.finalize_logged_model(model.model_id, "READY")

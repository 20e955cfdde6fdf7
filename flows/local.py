"""A release on this machine: on the Prefect server that PREFECT_API_URL names, or on one that lives as long as the run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import TameError, line
from configs.schema import Recipe
from flows.temporary_server import TemporaryServer
from tasks.result import Result
from tasks.track import connection as mlflow


def release_here(recipe: Recipe, out: Path) -> Result:
    """Run the release flow in this process.

    Raises:
        TameError: Prefect's server does not start or cannot be reached.
    """
    with ExitStack() as stack:
        if _server_named():
            mlflow.prepare()
        else:
            stack.enter_context(_temporary_server())
        from flows.release import release

        state = release(recipe, str(out), return_state=True)
        value = state.result(raise_on_failure=False)
    if isinstance(value, Result):
        return value
    if isinstance(value, TameError):
        raise value
    raise TameError(f"{state.name}: {line(str(value if value is not None else state.message), limit=None)}")


def _server_named() -> bool:
    if os.environ.get("PREFECT_API_URL"):
        return True
    from prefect.settings import get_current_settings  # a profile may name one, too

    return get_current_settings().api.url is not None


@contextmanager
def _temporary_server() -> Iterator[None]:
    server = TemporaryServer()
    server.start()
    try:
        mlflow.prepare()  # MLflow takes as long to import as the server takes to start: both at once
        server.wait()
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        # Nobody watches the heartbeats of a server that ends with the run, and waiting for the last one costs a second.
        with temporary_settings({PREFECT_API_URL: server.api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
            APILogWorker.drain_all(timeout=5)
    finally:
        server.stop()

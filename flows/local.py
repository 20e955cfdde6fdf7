"""A release on this machine: on the Prefect server that PREFECT_API_URL names, on that of a `tame up` that runs, or on one that
lives as long as the run."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import TameError, line
from configs.schema import Recipe
from flows.temporary_server import TemporaryServer
from tasks.result import Result
from tasks.runtime import child_process, running_up
from tasks.runtime.environment import direct_opener
from tasks.runtime.progress import working
from tasks.track import connection as mlflow

log = logging.getLogger("tame.release")


def release_here(recipe: Recipe, out: Path) -> Result:
    """Run the release flow in this process.

    Raises:
        TameError: Prefect's server does not start or cannot be reached.
    """
    with ExitStack() as stack:
        if _server_named() or _server_of_up():
            mlflow.prepare()
            child_process.prepare()
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
    state = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or state / "profiles.toml")
    where_to_look = (profiles, Path(".env"), Path("prefect.toml"), Path("pyproject.toml"))
    if not any(_speaks_of_a_server(file) for file in where_to_look):  # importing Prefect to ask takes seconds
        return False
    from prefect.settings import get_current_settings  # a profile may name one, too

    return get_current_settings().api.url is not None


def _speaks_of_a_server(file: Path) -> bool:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        return "PREFECT_API_URL" in text or bool(re.search(r"^\[(tool\.prefect\.)?api\]", text, re.MULTILINE))
    except OSError:
        return False


def _server_of_up() -> bool:
    """Whether a `tame up` of this TAME_HOME runs whose server this process may use; it is used from then on."""
    servers = running_up.servers()
    if servers is None or os.environ.get("MLFLOW_TRACKING_URI", servers.mlflow) != servers.mlflow:
        return False
    try:
        with direct_opener().open(f"{servers.prefect}/admin/version", timeout=5):
            pass
    except OSError:  # it is busy, or asks for a password
        return False
    os.environ |= {"PREFECT_API_URL": servers.prefect, "MLFLOW_TRACKING_URI": servers.mlflow}
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect has read its settings already
    log.info("Using the servers of the tame up that runs: %s", servers.prefect.removesuffix("/api"))
    return True


@contextmanager
def _temporary_server() -> Iterator[None]:
    server = TemporaryServer()
    log.info("Starting Prefect's server, which takes some seconds; it ends with this run (tame up keeps one running)")
    with working("starting Prefect's server"):
        server.start()
        try:
            # Each takes as long to import as the server takes to start: all at once.
            mlflow.prepare()
            child_process.prepare()
            import flows.release  # noqa: F401  all of Prefect

            server.wait()
        except BaseException:
            server.stop()
            raise
    try:
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        # Nobody watches the heartbeats of a server that ends with the run, and waiting for the last one costs a second.
        with temporary_settings({PREFECT_API_URL: server.api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
            APILogWorker.drain_all(timeout=5)
    finally:
        server.stop()

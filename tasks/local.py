"""A release on this machine: on the Prefect server that PREFECT_API_URL names, or on one that lives as long as the run."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import TameError
from configs.schema import Recipe
from tasks import track
from tasks.result import Result


def release_here(recipe: Recipe, out: Path) -> Result:
    """Run the release flow in this process.

    Raises:
        TameError: Prefect's server does not start or cannot be reached.
    """
    track.prepare()  # MLflow takes as long to import as the server takes to start: both at once
    with ExitStack() as stack:
        if _no_server_named():
            stack.enter_context(_ephemeral_server())
        from flows.release import release

        state = release(recipe, str(out), return_state=True)
        value = state.result(raise_on_failure=False)
    if isinstance(value, Result):
        return value
    if isinstance(value, TameError):
        raise value
    raise TameError(f"{state.name}: {' '.join(str(value if value is not None else state.message).split())}")


def _no_server_named() -> bool:
    from prefect.settings import get_current_settings

    return get_current_settings().api.url is None


@contextmanager
def _ephemeral_server() -> Iterator[None]:
    """Prefect's own temporary server, which, unlike Prefect's own, ends even when this process is killed."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    server = SubprocessASGIServer()
    try:
        server.start(timeout=120)
    except RuntimeError as error:
        raise TameError(f"Prefect's temporary server did not start: {' '.join(str(error).split())[:300]}") from None
    process = server.server_process
    assert process is not None
    # Its standard input closes when this process ends, in whatever way; then it ends the server.
    watch = f"import os, sys; sys.stdin.read(); os.kill({process.pid}, {signal.SIGKILL:d})"
    guard = subprocess.Popen([sys.executable, "-S", "-c", watch], stdin=subprocess.PIPE, start_new_session=True)
    try:
        # Nobody watches the heartbeats of a server that ends with the run, and waiting for the last one costs a second.
        with temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        guard.kill()
        guard.wait()
        server.stop()

"""A release on this machine: on the Prefect server that PREFECT_API_URL names, or on one that lives as long as the run."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from configs.errors import TameError, line
from configs.schema import Recipe
from tasks.result import Result
from tasks.track import connection as mlflow

STARTS_WITHIN = 120.0  # seconds; 5 to 14 are usual (FACTS)


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
    """A Prefect server for this run. Prefect would start one as well, but import it all here too, and outlive a SIGKILL."""
    state = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    state.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "prefect.server.api.server:create_app",
        "--host",
        "127.0.0.1",
    ]
    environment = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    starting = FileLock(state / "tame-start.lock")  # two first servers at once would both create the database
    starting.acquire()
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    server = subprocess.Popen(
        [*command, "--port", str(port), "--log-level", "error", "--lifespan", "on"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    # The guard's standard input closes when this process ends, in whatever way; then it ends the server, which first
    # finishes with its database: killed while it creates one, it could leave half of it.
    watch = f"import os, sys; sys.stdin.read(); os.kill({server.pid}, {signal.SIGTERM:d})"
    guard = subprocess.Popen([sys.executable, "-S", "-c", watch], stdin=subprocess.PIPE, start_new_session=True)
    try:
        mlflow.prepare()  # MLflow takes as long to import as the server takes to start: both at once
        _wait(server, f"http://127.0.0.1:{port}/api/health", errors)
        starting.release()
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        # Nobody watches the heartbeats of a server that ends with the run, and waiting for the last one costs a second.
        with temporary_settings(
            {PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        ):
            yield
            APILogWorker.drain_all(timeout=5)
    finally:
        server.terminate()
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        guard.kill()
        guard.wait()
        starting.release()
        errors.close()


def _wait(server: "subprocess.Popen[bytes]", url: str, errors: IO[bytes]) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end:
        if server.poll() is not None:
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise TameError(f"Prefect's temporary server ended with exit code {server.returncode}: {last[:300]}")
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310  (our own loopback address)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TameError(
        f"Prefect's temporary server did not answer within {STARTS_WITHIN:.0f} s; set PREFECT_API_URL to one that runs"
    )

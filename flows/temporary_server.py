"""A Prefect server that lives as long as one `tame run`.

Prefect would start one by itself as well, but would import all of it into this process too, and would outlive a SIGKILL.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from configs.errors import TameError, line
from tasks.runtime.environment import direct_opener
from tasks.runtime.retry import wait_until

STARTS_WITHIN = 300.0
"""Seconds; 5 to 14 are usual, and two minutes where many others work on few cores."""
ENDS_WITHIN = 7.0
"""Seconds that it has to finish with its database once it is to end."""
OF_OTHER_SERVERS = (
    "PREFECT_SERVER_API_",
    "PREFECT_SERVER_DOCKET_",
    "PREFECT_SERVER_CONCURRENCY_",
    "PREFECT_SERVER_UI_",
    "PREFECT_MESSAGING_",
)
"""Variables, by their beginning, that say how a server that others use is reached, guarded and connected."""
OF_THIS_SERVER = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_API_BASE_PATH": "",  # a profile may have one, too
    "PREFECT_LOGGING_LEVEL": "ERROR",  # why it does not start is read from what it logs
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
    "PREFECT_LOGGING_COLORS": "false",
    "PYTHONSAFEPATH": "1",  # no prefect.py or uvicorn.py of the folder that tame is run in
    "PYTHONUTF8": "1",
}


class TemporaryServer:
    """A Prefect server on a free loopback port: `start` it, `wait` until it answers, `stop` it."""

    def __init__(self) -> None:
        state = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
        state.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._starting = FileLock(state / "tame-start.lock")  # two first servers at once would both create the database
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `stop`)

    @property
    def api(self) -> str:
        """The address for PREFECT_API_URL."""
        return f"{self.address}/api"

    def start(self) -> None:
        """Start the server's process, and one that ends it when this process has ended in whatever way."""
        self._starting.acquire()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_OTHER_SERVERS)}
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]]
        command += ["--log-level", "error", "--lifespan", "on"]
        command += ["--app-dir", str(Path(__file__).parent)]  # by default uvicorn imports from the working folder first
        self._server = subprocess.Popen(
            command,
            env=kept | OF_THIS_SERVER,
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )
        # The guard's standard input closes when this process ends; then it ends the server, which first finishes with its
        # database: killed while it creates one, it could leave half of it.
        watch = f"import os, sys, time; sys.stdin.read(); os.kill({self._server.pid}, {signal.SIGTERM:d})"
        watch += f"; time.sleep({ENDS_WITHIN}); os.kill({self._server.pid}, {signal.SIGKILL:d})"
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-c", watch],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where it says that the server has ended before
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            TameError: the server ended, with its reason; or it did not answer within STARTS_WITHIN.
        """
        wait_until(self._answers, STARTS_WITHIN, every=0.1, otherwise=self._too_late)
        self._starting.release()

    def stop(self) -> None:
        """End the server, at the latest after ENDS_WITHIN."""
        self._server.terminate()
        try:
            self._server.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._guard.kill()
        self._guard.communicate()
        self._starting.release()
        self._said.close()

    def _answers(self) -> bool:
        if self._server.poll() is not None:
            raise TameError(
                f"Prefect's temporary server ended with exit code {self._server.returncode}: {self._reason()}; "
                "correct that, or set PREFECT_API_URL to a server that runs"
            )
        try:
            with direct_opener().open(f"{self.api}/health", timeout=5):
                return True
        except OSError:
            return False

    def _too_late(self) -> TameError:
        return TameError(
            f"Prefect's temporary server did not answer within {STARTS_WITHIN:.0f} s ({self._reason()}); set PREFECT_API_URL "
            "to one that runs"
        )

    def _reason(self) -> str:
        """The last exception that the server has said, or else its last words."""
        self._said.seek(0)
        lines = [text.strip() for text in self._said.read().decode(errors="replace").splitlines() if text.strip()]
        errors = [text for text in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", text)]
        return line((errors or lines or ["it said nothing"])[-1])

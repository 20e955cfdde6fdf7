"""What a process of tame changes in its own environment before anything else is imported.

Nothing here is against the user: a variable that is set already stays as it is.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from configs.errors import BadInputError, bare_address
from tasks.runtime import progress

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "tame",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "false",  # datasets would ask s3.amazonaws.com whenever it opens a local file
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # tame has its own bars
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
CHILDREN = {
    "PYTHONSAFEPATH": "1",  # no prefect.py, uvicorn.py or tasks.py of the folder that tame is run in
    "PYTHONUTF8": "1",  # an ASCII locale is one of the terminal, not of the files that are read and written
}
GRACE = 1.5
"""Seconds from a Ctrl-C to the end of the process, whatever it waits for."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
interrupted = threading.Event()
"""Set by the first Ctrl-C. What libraries make of a KeyboardInterrupt on its way up may be another exception."""


def set_up(debug: bool, prefect_level: str) -> None:
    """Make this process, and those that it starts, quiet, local and safe from what lies in the working folder.

    Args:
        debug: Log more, and each record with its time and logger.
        prefect_level: From which level on Prefect's own log is shown on the console.
    """
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to fail
    shown = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG" if debug else prefect_level}
    for name, value in (QUIET | CHILDREN | shown).items():
        os.environ.setdefault(name, value)
    reach_directly(*LOOPBACK)
    _log_to_stderr(debug)


def reach_directly(*hosts: str) -> None:
    """Have `hosts` asked without the proxy that http_proxy and its like name: a proxy does not reach this machine's loopback."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") and os.environ[name] for name in os.environ):
        return
    given = [part.strip() for name in ("no_proxy", "NO_PROXY") for part in os.environ.get(name, "").split(",")]
    merged = ",".join(dict.fromkeys([*filter(None, given), *hosts]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = merged


def direct_opener() -> "OpenerDirector":
    """What opens an address of our own, whatever the proxy."""
    from urllib.request import ProxyHandler, build_opener

    return build_opener(ProxyHandler({}))


def check_addresses(environment: Mapping[str, str]) -> None:
    """Check that the addresses that libraries take from the environment are addresses.

    Raises:
        BadInputError: an address has no scheme, such as `http://`.
    """
    for name, example in (("HF_ENDPOINT", "https://huggingface.co"), ("PREFECT_API_URL", "http://127.0.0.1:4200/api")):
        value = environment.get(name, "").strip()
        if value and not re.match(r"https?://[^/]", value):
            raise BadInputError(
                f"{name} is {bare_address(value)!r}: expected an address with its scheme, such as {example}"
            )
    uri = environment.get("MLFLOW_TRACKING_URI", "").strip()
    is_path = uri.startswith((".", "/", "~", "file:")) or Path(uri).exists()
    if uri and "://" not in uri and not is_path and re.search(r"[.:]", uri) and not re.match(r"[a-z-]+:[a-z]", uri):
        raise BadInputError(
            f"MLFLOW_TRACKING_URI is {bare_address(uri)!r}: expected an address with its scheme, such as http://127.0.0.1:5000"
        )


def stop_at_interrupts() -> None:
    """Let the first Ctrl-C end work in good order, but within GRACE, and a second one end this process at once.

    Nothing is lost by that: what is not complete is taken up by the next run, and children end with their parent. What libraries
    say of being stopped is not shown.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return

    def at_once(_number: int, _frame: FrameType | None) -> None:
        end_interrupted()

    def in_order(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, at_once)
        interrupted.set()
        clear = b"\r\x1b[2K" if progress.is_terminal() else b""
        os.write(2, clear + b"tame: stopped; the next run goes on from what is finished\n")
        _hear_no_more()
        ending = threading.Timer(GRACE, end_interrupted)
        ending.daemon = True
        ending.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, in_order)


def end_interrupted() -> NoReturn:
    """End this process now, and the stages that it has started, which would else go on until they look whether it is there.

    What has a session of its own, as Prefect's temporary server has, ends in good order by itself.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            if os.getsid(child.pid) == os.getsid(0) and "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
    os._exit(130)


def _hear_no_more() -> None:
    """Send what is said from now on, by whatever library, to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _fill_closed_streams() -> None:
    """Open /dev/null in the place of a standard stream that is closed: the next file to be opened would take its place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


class _Lines(logging.Handler):
    """Prints records above the line that shows what is being done."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        try:
            progress.say(self.format(record))
        except Exception:
            self.handleError(record)


def _log_to_stderr(debug: bool) -> None:
    log = logging.getLogger("tame")
    handler = _Lines()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if debug else "%(message)s")
    )
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False
    if not debug:
        import warnings

        warnings.simplefilter("ignore")

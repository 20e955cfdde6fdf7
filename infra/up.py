"""Everything on this machine: Prefect's server, MLflow, the deployments, and workers that run them."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from configs.errors import BadInputError, TameError, bare_address
from configs.settings import UP, home
from tasks.fleet import work_queues
from tasks.runtime import running_up
from tasks.runtime.device import gpus
from tasks.runtime.environment import direct_opener, reach_directly
from tasks.runtime.files import write_text
from tasks.runtime.progress import begin, working
from tasks.runtime.retry import wait_until

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

log = logging.getLogger("tame.up")

MODELS = "workflowType=machine_learning"
"""What MLflow's pages need to show runs and metrics of models, rather than traces of applications."""

HEALTHY_WITHIN = 300.0  # seconds; on a machine that does nothing else it takes 20
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Where Prefect's server keeps who holds a device. In its memory, the default, a restart would leave it taken for ever."""
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(host: str) -> int:
    """Start everything, wait until each is healthy, print the URLs, and serve until Ctrl-C.

    PREFECT_API_URL and MLFLOW_TRACKING_URI name servers that are used instead of starting one.

    Raises:
        BadInputError: `host` is no address of this machine.
        TameError: it runs already, or something did not become healthy; its log's place is named.
    """
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler)
    with _alone() as (lock, token):
        try:
            began = time.monotonic()
            with ExitStack() as ports:  # taken until what was started on them answers
                started = _start_all(host, token, ports)
            log.info("✓ all of it is healthy after %.0f s", time.monotonic() - began)
            pages = f"Prefect  {_prefect()}/deployments\nMLflow   {_mlflow()}/#/experiments?{MODELS}"
            lock.write(pages.replace("\n", "  "))
            lock.flush()
            servers = running_up.Servers(os.environ["PREFECT_API_URL"], _mlflow())
            write_text(running_up.addresses_file(), json.dumps(servers._asdict()))
            print(pages)
            print(
                "\nStart one: open Prefect, choose quantize/model, then Run > Custom run. release/any takes a whole recipe."
            )
            print("tame run uses these servers as long as they run.")
            print(
                f"Logs: {home() / 'logs'}. Ctrl-C stops all of it; what was queued waits for the next tame up.",
                flush=True,
            )
            while not (ended := [name for name, process in started.items() if process.poll() is not None]):
                time.sleep(0.5)
            raise TameError(f"{ended[0]} ended by itself; see {home() / 'logs' / ended[0]}.log")
        except KeyboardInterrupt:
            log.info("Stopping: workers first, then the servers; ten seconds at most …")
            return 0
        finally:
            begin("")
            running_up.addresses_file().unlink(missing_ok=True)
            for number in ENDINGS:
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def _alone() -> Iterator[tuple[IO[str], str]]:
    """This TAME_HOME for this process alone, and a token for what it starts, which ends when it does.

    The guard inherits the lock: nobody else starts before the last process of this one has ended.
    """
    path = running_up.lock_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise TameError(f"tame up runs already in {home()}: {lock.read().strip() or 'it is starting'}") from None
        lock.truncate(0)
        token = uuid4().hex
        guard = subprocess.Popen(
            [sys.executable, "-m", "infra.guard", token],
            stdin=subprocess.PIPE,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
        try:
            yield lock, token
        finally:
            guard.communicate()  # closes its standard input


def _start_all(host: str, token: str, ports: ExitStack) -> dict[str, "subprocess.Popen[bytes]"]:
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, kind: str, *arguments: str) -> None:
        # A session of its own: Ctrl-C reaches this process alone.
        with (home() / "logs" / f"{name}.log").open("ab") as output:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**os.environ, UP.name: f"{token} {kind}"},
                stdin=subprocess.PIPE if kind == "worker" else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    (home() / "logs").mkdir(exist_ok=True)
    near = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104  (where to find what listens everywhere)
    reach_directly(near)
    if near != "127.0.0.1":
        log.warning("%s: whoever reaches it can start runs and see results; neither page asks for a password", host)
    if not os.environ.get("PREFECT_API_URL"):
        port = ports.enter_context(_free_port(host, 4200))
        os.environ |= {"PREFECT_API_URL": f"http://{near}:{port}/api", "PREFECT_UI_API_URL": "/api"}
        os.environ.setdefault("PREFECT_HOME", str(home() / "prefect"))
        os.environ.setdefault("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", LEASES)
        os.environ["PREFECT_SERVER_API_BASE_PATH"] = ""  # of a server behind a proxy, which this one is not
        if password := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
            os.environ["PREFECT_API_AUTH_STRING"] = password  # what this server asks for, not what another one did
        log.info("Starting Prefect's server at %s …", _prefect())
        start("prefect", "server", "prefect", "server", "start", "--host", host, "--port", str(port))
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        port = ports.enter_context(_free_port(host, 5000))
        log.info("Starting MLflow at http://%s:%d …", near, port)
        os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        start("mlflow", "server", "infra.mlflow_server", host, str(port))
        os.environ["MLFLOW_TRACKING_URI"] = f"http://{near}:{port}"
    since = datetime.now(UTC)

    for index in range(len(gpus())):
        start(f"worker-gpu{index}", "worker", "tame", "worker", "--gpu", str(index))
    if not gpus():
        start("worker-cpu", "worker", "tame", "worker")
    start("worker-control", "worker", "tame", "worker", "--control")
    _provision(started)
    _until_healthy(started, since)
    return started


def _provision(started: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """Register queues and deployments once Prefect's server answers; workers begin when their pool is there."""

    def begin_work() -> None:
        for process in started.values():
            if process.stdin:
                process.stdin.close()

    with working("waiting for Prefect's server"):
        from flows import release  # noqa: F401  imports Prefect and what is registered, in the seconds that the server takes
        from infra.provision import provision

        if "prefect" in started:
            _wait(started, lambda: _answers(f"{_prefect()}/api/health"))
    with working("registering queues and deployments"):
        provision(begin_work)
    log.info("✓ Prefect's server answers, and has the deployments")


def _until_healthy(started: dict[str, "subprocess.Popen[bytes]"], since: datetime) -> None:
    """Wait until every worker has asked for runs, and MLflow answers."""
    from infra.provision import connect

    with connect() as client, working("waiting for the workers' first sign of life"):
        _wait(started, lambda: _workers(client, since) >= len(gpus() or "1") + 1)
    log.info("✓ workers wait for runs: %s", ", ".join(name for name in started if name.startswith("worker")))
    if "mlflow" in started:
        with working("waiting for MLflow"):
            _wait(started, lambda: _answers(f"{_mlflow()}/health"))
        log.info("✓ MLflow answers")


def _wait(started: dict[str, "subprocess.Popen[bytes]"], condition: Callable[[], bool]) -> None:
    """Wait until `condition`, unless one of `started` ends before."""

    def holds() -> bool:
        if condition():
            return True
        for name, process in started.items():
            if process.poll():
                log_file = home() / "logs" / f"{name}.log"
                said = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise TameError(f"{name} did not start ({said or 'it said nothing'}); see {log_file}")
        return False

    late = f"{', '.join(started)} were not all healthy in {HEALTHY_WITHIN:.0f} s; see {home() / 'logs'}"
    wait_until(holds, HEALTHY_WITHIN, every=0.2, otherwise=lambda: TameError(late))


def _answers(url: str) -> bool:
    try:
        with direct_opener().open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _workers(client: "SyncPrefectClient", since: datetime) -> int:
    """How many workers of this machine have asked for runs since then."""
    names = socket.gethostname() + " "
    workers = client.read_workers_for_work_pool(work_queues.POOL)
    return sum(
        one.name.startswith(names) and one.last_heartbeat_time is not None and one.last_heartbeat_time > since
        for one in workers
    )


def _prefect() -> str:
    return bare_address(os.environ["PREFECT_API_URL"]).removesuffix("/api")


def _mlflow() -> str:
    return bare_address(os.environ["MLFLOW_TRACKING_URI"])


@contextmanager
def _free_port(host: str, wanted: int) -> Iterator[int]:
    """The first port from `wanted` on that nobody listens on, and that no other `tame up` of this machine is given meanwhile.

    A server takes seconds until it listens. What says so long that a port is taken is its namesake of UDP, on which nothing is
    sent: the kernel gives it to one process, and takes it back however that ends.

    Raises:
        BadInputError: `host` is no address of this machine.
        TameError: all of them are taken.
    """
    for port in range(wanted, wanted + 50):
        with socket.socket(type=socket.SOCK_DGRAM) as claim:
            if not (_binds(claim, "127.0.0.1", port) and _is_free(host, port)):
                continue
            if port != wanted:
                log.warning("port %d is taken; using %d", wanted, port)
            yield port
            return
    raise TameError(f"no free port from {wanted} to {wanted + 49} on {host}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, host, port)


def _binds(made: socket.socket, host: str, port: int) -> bool:
    """Bind a socket, unless the port is taken or needs rights that this process has not."""
    try:
        made.bind((host, port))
    except PermissionError:
        return False
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise BadInputError(f"--host {host}: {error.strerror}; give an address of this machine") from None
        return False
    return True

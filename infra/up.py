"""Everything on this machine: Prefect's server, MLflow, a deployment of each shipped recipe, and a worker that runs them."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from configs.errors import TameError

log = logging.getLogger("tame.up")

HEALTHY_WITHIN = 120.0  # seconds
CONFIGS = Path(__file__).parent.parent / "configs"


def up(host: str) -> int:
    """Start everything, wait until each is healthy, print the URLs, and serve until Ctrl-C.

    Raises:
        TameError: a server did not become healthy; its log's place is named.
    """
    from tasks.store import home

    logs = home() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    prefect_port, mlflow_port = _free_port(host, 4200), _free_port(host, 5000)
    prefect, mlflow = f"http://{host}:{prefect_port}", f"http://{host}:{mlflow_port}"
    processes: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        python = [sys.executable, "-m"]
        environment = {
            **os.environ,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_API_URL": f"{prefect}/api",
        }
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            from tasks.track import database_uri

            artifacts = home() / "mlartifacts"
            command = [*python, "mlflow", "server", "--backend-store-uri", database_uri(), "--host", host]
            # Not proxied: a run without this server, straight into the same database, must find and write the same files.
            command += ["--port", str(mlflow_port), "--no-serve-artifacts", "--default-artifact-root", str(artifacts)]
            command += ["--workers", "1"]
            processes.append(_start(command, environment, logs / "mlflow.log"))
        else:
            mlflow = os.environ["MLFLOW_TRACKING_URI"]
        command = [*python, "prefect", "server", "start", "--host", host, "--port", str(prefect_port)]
        processes.append(_start(command, environment, logs / "prefect.log"))
        _wait(f"{prefect}/api/health", processes[-1], logs / "prefect.log")
        if len(processes) == 2:
            _wait(f"{mlflow}/health", processes[0], logs / "mlflow.log")
        environment |= {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow}
        worker = _start([*python, "infra.serve"], environment, logs / "worker.log")
        processes.append(worker)
        _wait_deployed(f"{prefect}/api", worker, logs / "worker.log")
        print(f"Prefect  {prefect}/deployments   (a recipe, then Run: the form is the recipe)")
        print(f"MLflow   {re.sub(r'//[^/@]*@', '//', mlflow)}")
        print(f"logs     {logs}\nCtrl-C stops all.", flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        raise TameError(f"one of the servers ended by itself; see {logs}")
    except KeyboardInterrupt:
        print("stopping …", file=sys.stderr)
        return 0
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
    with output.open("ab") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _free_port(host: str, wanted: int) -> int:
    for port in range(wanted, wanted + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
        if port != wanted:
            log.warning("port %d is taken; using %d", wanted, port)
        return port
    raise TameError(f"no free port from {wanted} to {wanted + 49} on {host}")


def _wait(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    end = time.monotonic() + HEALTHY_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  (our own loopback address)
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TameError(f"{url} does not answer; see {output}")


def _wait_deployed(api: str, process: subprocess.Popen[bytes], output: Path) -> None:
    import json

    end = time.monotonic() + HEALTHY_WITHIN
    request = urllib.request.Request(f"{api}/deployments/count", b"{}", {"Content-Type": "application/json"})  # noqa: S310
    while time.monotonic() < end and process.poll() is None:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            if json.load(answer) >= len(list(CONFIGS.glob("*.yaml"))):
                return
        time.sleep(0.5)
    raise TameError(f"the deployments were not registered; see {output}")

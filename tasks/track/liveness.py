"""Heartbeats of the process behind an MLflow run, and how runs whose heartbeat is stale are closed."""

import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

from configs.errors import named_line
from tasks.track import mlflow_internals, mlflow_runs

logger = logging.getLogger("tame.track")

HEARTBEAT = 60.0
"""Seconds between the signs of life that a run gives."""
DEAD_AFTER = 300.0
"""Seconds without one after which a run on another host counts as killed."""
SYSTEM_METRICS_EVERY = 10.0

alive: dict[str, threading.Event] = {}
"""The runs that this process keeps alive, and what ends that."""


def heartbeat() -> dict[str, str]:
    """Tags that tell whether the process behind a run lives: where it is, which it is, and when it last said so."""
    import psutil

    me = psutil.Process()
    return {
        "tame.where": _where(),
        "tame.process": f"{me.pid} {me.create_time():.2f}",
        "tame.heartbeat": f"{time.time():.0f}",
    }


def is_stale(tags: dict[str, str]) -> bool:
    """Whether the process that gave these tags is gone."""
    import psutil

    if tags.get("tame.where") == _where():
        pid, _, created = tags.get("tame.process", "0 0").partition(" ")
        try:
            return bool(abs(psutil.Process(int(pid)).create_time() - float(created)) > 1)
        except psutil.NoSuchProcess:
            return True
    return time.time() - float(tags.get("tame.heartbeat", "0")) > DEAD_AFTER


def close_stale(client: Any) -> None:
    """Close the runs of processes that are gone, as KILLED."""
    for run in mlflow_runs.running(client):
        if run.info.run_id not in alive and is_stale(run.data.tags):
            mlflow_runs.close(client, run, "KILLED")
            logger.info("closed the MLflow run %s (%s), whose process is gone", run.info.run_name, run.info.run_id)


def keep_alive(client: Any, run_id: str) -> None:
    """Give signs of life and log the machine's load, in the background, until `stop_heartbeat`."""
    stop_heartbeat(run_id)
    resting = alive[run_id] = threading.Event()
    monitor = mlflow_internals.monitor(run_id, client.tracking_uri, SYSTEM_METRICS_EVERY)

    def beat() -> None:
        nonlocal monitor
        while not resting.wait(HEARTBEAT):
            try:
                client.set_tag(run_id, "tame.heartbeat", f"{time.time():.0f}")
                if not mlflow_internals.monitors(monitor):
                    monitor = mlflow_internals.monitor(run_id, client.tracking_uri, SYSTEM_METRICS_EVERY)
            except Exception as error:  # the next beat tries again
                logger.debug("no heartbeat: %s", named_line(error))
        monitor.finish()

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()


def stop_heartbeat(run_id: str) -> None:
    """End the signs of life of a run."""
    if resting := alive.pop(run_id, None):
        resting.set()


def _where() -> str:
    """Names the process table that this process is in: host, boot, and, in a container, which one."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text().strip() if boot.exists() else "", str(namespace.readlink()) if namespace.exists() else ""]
    return " ".join([socket.gethostname(), *parts])

"""A worker: Prefect's own, with one device that nobody else works on at the same time, and the queues that fit it."""

import os
import socket
import sys
from contextlib import suppress
from typing import NoReturn

from configs.errors import BadInputError, TameError, bare_address
from configs.settings import DEVICE_LIMIT, device_limit
from tasks.fleet import work_queues
from tasks.runtime.device import gpus

WAITING_AT_ONCE = 20  # flows that only wait
ASK_EVERY = 2  # seconds between two looks for work; Prefect's 10 leave a device idle for 5 s between two runs


def become_worker(gpu: int | None, control: bool, pool: str, once: bool = False) -> NoReturn:
    """Take a device and become `infra.patched_worker`, which imports Prefect once for both of us; does not return.

    With `once` it ends after one run, or at once if none waits: what a batch system starts.

    Raises:
        BadInputError: the GPU does not exist.
    """
    from infra.automations import HEARTBEAT

    host = socket.gethostname()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if control:
        name, queues, limit = f"{host} control", [work_queues.CONTROL], None
    elif gpu is None:
        name, queues, limit = f"{host} cpu", work_queues.queues_of(None), f"cpu:{host}"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible != [""] and gpu < len(visible) else str(gpu)
        if not (found := gpus()):
            raise BadInputError(f"--gpu {gpu}: there is no such GPU, or this torch has no CUDA; nvidia-smi lists them")
        name, queues = f"{host} gpu {gpu}", work_queues.queues_of(found[0].memory_bytes)
        limit = f"gpu:{host}:{found[0].uuid or gpu}"
    if limit:
        os.environ[DEVICE_LIMIT.name] = limit
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT))
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", str(ASK_EVERY))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")  # what a worker says before it has runs
    command = [sys.executable, "-m", "infra.patched_worker", "--pool", pool, "--name", name]
    command += ["--limit", str(WAITING_AT_ONCE if control else 1), "--install-policy", "never"]
    command += ["--run-once"] * once
    for queue in queues:
        command += ["--work-queue", queue]
    os.execv(sys.executable, command)  # noqa: S606


def prepare(pool: str, queues: list[str]) -> None:
    """Have the server know this worker's device, and show its queues as ones that are served.

    Raises:
        BadInputError: PREFECT_API_URL is not set.
        TameError: the server does not answer, or has no such work pool.
    """
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    from infra.provision import connect

    with connect() as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            raise TameError(
                f"{bare_address(str(client.api_url))} has no work pool {pool!r}; `tame provision` makes it"
            ) from None
        for known in client.read_work_queues(work_pool_name=pool):
            if known.name in queues and known.is_paused and known.description == work_queues.UNSERVED:
                client.update_work_queue(known.id, is_paused=False, description="")
        if limit := device_limit():
            with suppress(ObjectAlreadyExists):  # by another worker of this machine, at the same time
                client.upsert_global_concurrency_limit_by_name(limit, 1)

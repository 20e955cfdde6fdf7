"""What a Prefect server needs to release models: the work pool and its queues, automations, and the deployments of prefect.yaml.

Run again, it makes what is missing and changes what prefect.yaml has changed. Schedules are made with their deployment, and
belong to whoever runs the server from then on: one that was paused or edited in the pages stays as it is.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.errors import BadInputError, TameError, bare_address, line
from tasks.fleet import work_queues
from tasks.runtime.retry import wait_until

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.flows import Flow

FILE = Path(__file__).parent.parent / "prefect.yaml"
log = logging.getLogger("tame.provision")

SILENT_FOR = 2.0  # seconds that a server may take before somebody is told
HEALTHY_WITHIN = 300.0  # seconds; on a machine that does nothing else it takes 20


def provision(with_pool: Callable[[], None] = lambda: None) -> list[str]:
    """Make all of it, and return what was made or changed, a line each.

    Args:
        with_pool: Called once the work pool is there, which is what workers need to start; the rest takes seconds.

    Raises:
        BadInputError: there is no prefect.yaml, or no PREFECT_API_URL.
        TameError: the server does not answer, or refuses a deployment.
    """
    from infra.automations import create_automations

    if not FILE.exists():
        raise BadInputError(f"{FILE}: not there; tame is provisioned from a checkout of its repository")
    deployments = yaml.safe_load(FILE.read_text(encoding="utf-8"))["deployments"]
    with connect() as client:
        done = [*_work_pool(client)]
        with_pool()
        done += [made for spec in deployments for made in _deployment(client, spec)]
    create_automations()
    return done


@contextmanager
def connect() -> "Iterator[SyncPrefectClient]":
    """A client of the server that PREFECT_API_URL names, once it answers.

    Raises:
        BadInputError: PREFECT_API_URL is not set.
        TameError: the server does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:  # a profile may name it, too
        raise BadInputError("PREFECT_API_URL is not set; give the address of Prefect's server, or use tame up")
    with get_client(sync_client=True) as client:
        _wait_for(client)
        yield client


def _wait_for(client: "SyncPrefectClient") -> None:
    address, started, said = bare_address(str(client.api_url)).rstrip("/"), time.monotonic(), False
    why = ""

    def answers() -> bool:
        nonlocal said, why
        if (error := client.api_healthcheck()) is None:
            return True
        why = line(error)
        if not said and time.monotonic() - started > SILENT_FOR:
            log.warning("%s does not answer (%s); waiting for it for %.0f s", address, why, HEALTHY_WITHIN)
            said = True
        return False

    wait_until(
        answers,
        HEALTHY_WITHIN,
        every=0.3,
        otherwise=lambda: TameError(
            f"{address} does not answer: {why}; start Prefect's server, or correct PREFECT_API_URL"
        ),
    )


def _work_pool(client: "SyncPrefectClient") -> Iterator[str]:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    kind = "process"
    try:
        kind = client.read_work_pool(work_queues.POOL).type  # one of another type, such as Kubernetes, will do as well
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        try:
            client.create_work_pool(WorkPoolCreate(name=work_queues.POOL, type="process", base_job_template=template))
            yield f"work pool {work_queues.POOL}"
        except ObjectAlreadyExists:
            pass  # somebody else provisions at the same time
    existing = {queue.name for queue in client.read_work_queues(work_pool_name=work_queues.POOL)}
    for name in work_queues.QUEUES:
        if name not in existing:
            try:
                waits = kind == "process" and name != work_queues.DEFAULT  # Prefect's own workers do not wake a queue
                about = work_queues.UNSERVED if waits else None
                made = client.create_work_queue(name, about, is_paused=waits, work_pool_name=work_queues.POOL)
                if waits:  # the pages show a queue as paused only if it has become so
                    client.update_work_queue(made.id, is_paused=True)
                yield f"queue {name}"
            except ObjectAlreadyExists:
                pass


def _titled(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a form, its fields named as people write them: Prefect takes the names of the parameters."""
    for name, field in schema.get("properties", {}).items():
        if field.get("title") == name:
            field["title"] = name.replace("_", " ").capitalize()
    return schema


@cache
def _form(entrypoint: str) -> tuple[str, dict[str, Any]]:
    """The name of a flow and the schema of its form, which takes half a second to make, and which many deployments share."""
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
    return flow.name, _titled(parameter_schema(flow).model_dump(exclude_unset=True))


def _deployment(client: "SyncPrefectClient", spec: dict[str, Any]) -> Iterator[str]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
    from prefect.client.schemas.schedules import construct_schedule
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    flow_name, form = _form(spec["entrypoint"])
    asked: dict[str, Any] = {
        "entrypoint": spec["entrypoint"],
        "description": spec["description"],
        "tags": spec.get("tags", []),
        "parameters": spec.get("parameters", {}),
        "parameter_openapi_schema": form,
        "enforce_parameter_schema": True,
        "work_pool_name": spec["work_pool"]["name"],
        "work_queue_name": spec["work_pool"]["work_queue_name"],
        "job_variables": spec["work_pool"].get("job_variables", {}),
        "pull_steps": [],
    }
    content = json.dumps(asked, sort_keys=True)
    asked["version"] = f"{version('tame')}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    name = f"{flow_name}/{spec['name']}"
    try:
        existing = client.read_deployment_by_name(name)
        if existing.version != asked["version"]:
            client.update_deployment(existing.id, DeploymentUpdate(**asked))
            yield f"deployment {name}, changed"
    except ObjectNotFound:
        schedules = [
            DeploymentScheduleCreate(
                schedule=construct_schedule(cron=one["cron"], timezone=one["timezone"]),
                active=one["active"],
                slug=one["slug"],
            )
            for one in spec.get("schedules", [])
        ]
        flow_id = client.create_flow_from_name(flow_name)
        # Made with it, a schema that is enforced is checked twice by the server: a second of its CPU for each of these.
        asked["enforce_parameter_schema"] = False
        made = client.create_deployment(flow_id, name=spec["name"], schedules=schedules, **asked)
        client.update_deployment(made, DeploymentUpdate(enforce_parameter_schema=True))
        yield f"deployment {name}"
    except PrefectHTTPStatusError as error:
        raise TameError(f"{name}: Prefect refuses it ({line(error, limit=None)})") from None

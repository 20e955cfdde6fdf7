"""Releases as runs of the work pool: each started once by its key, found again, and sent to a queue by its memory."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from configs.errors import TameError, line
from configs.schema import Device, Recipe, Source, Template
from tasks.fleet import work_queues
from tasks.publish.targets import targets
from tasks.result import folder_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from tasks.values import Found

log = logging.getLogger("tame.fleet")

DEPLOYMENT, PREFETCH = "release/any", "prefetch/prefetch"
RESTARTED_WITHIN = timedelta(minutes=2)
"""A crashed run that is to be started again (infra/automations.py) is by then."""
PAGE = 200


class Fleet(NamedTuple):
    """What runs are sent to: the deployment of releases, and whether its work pool has ever had a worker with a GPU."""

    deployment: UUID
    gpus: bool


def fleet(client: "SyncPrefectClient") -> Fleet:
    """The fleet of this server.

    Raises:
        TameError: the deployment of releases, or its work pool, is not there.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        queues = client.read_work_queues(work_pool_name=work_queues.POOL)
    except ObjectNotFound:
        raise TameError(
            f"there is no deployment {DEPLOYMENT} with a work pool {work_queues.POOL} on {client.api_url}; run `tame provision`"
        ) from None
    return Fleet(deployment.id, any(queue.name.startswith("gpu-") and queue.last_polled for queue in queues))


def start(
    client: "SyncPrefectClient",
    fleet: Fleet,
    recipe: Recipe,
    key: str,
    queue: str,
    tags: list[str],
    parent: UUID | None = None,
) -> "FlowRun":
    """The release run that has `key`: the one that there is, or a new one, sent to `queue`.

    With `parent`, it is shown in that flow run, and cancelled when that is.

    Raises:
        TameError: the deployment does not take the recipe.
    """
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        return client.create_flow_run_from_deployment(
            fleet.deployment,
            parameters={"recipe": recipe.model_dump(mode="json")},
            name=f"{recipe.name}: {', '.join(variant.label for variant in recipe.variants)}",
            tags=[f"model:{recipe.source.model}", *tags],
            idempotency_key=key,
            parent_task_run_id=_stand_in(client, parent, key, DEPLOYMENT, recipe.name) if parent else None,
            work_queue_name=queue,
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code >= 500:
            raise
        raise TameError(f"{recipe.name}: Prefect takes no such run ({line(error, limit=None)})") from None


def prefetch(client: "SyncPrefectClient", source: Source, key: str, parent: UUID) -> None:
    """Start the download that has `key`, unless it was, by a worker without a GPU; shown in the flow run `parent`.

    Raises:
        TameError: the deployment is not there.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name(PREFETCH).id
    except ObjectNotFound:
        raise TameError(
            f"there is no deployment {PREFETCH} on {client.api_url}; `tame provision` makes it, or leave prefetch out"
        ) from None
    client.create_flow_run_from_deployment(
        deployment,
        parameters={"source": source.model_dump(mode="json")},
        name=f"prefetch {source.model}",
        idempotency_key=key,
        parent_task_run_id=_stand_in(client, parent, key, PREFETCH, source.model),
        work_queue_name=work_queues.CPU,
    )


def queue(fleet: Fleet, found: "Found", recipe: Recipe, device: Device) -> str:
    """The queue for a release of `found`: by its memory where GPUs are meant, else one of workers without.

    Raises:
        BadInputError: the release fits on no GPU that has a queue.
    """
    if device == "cpu":
        return work_queues.CPU
    if device == "auto" and not fleet.gpus:
        return work_queues.DEFAULT
    return work_queues.queue_for(work_queues.memory_needed(found, recipe.evaluate))


def destinations(models: list[str], template: Template) -> tuple[dict[str, str], dict[str, str]]:
    """Which model is published to each place, and, of models that would be published to the same one, what is wrong."""
    goes: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for model in models:
        recipe = template.recipe(model)
        for target in targets(recipe, Path(model).name, folder_of(recipe, None)).values():
            first = goes.setdefault(target if "/" in target else f"{model.partition('/')[0]}/{target}", model)
            if first != model:
                why = f"both {first} and {model} would be published to {target}; put {{name}} into publish.repo"
                wrong |= dict.fromkeys((model, first), why)
    return goes, wrong


def by_key(client: "SyncPrefectClient", keys: list[str]) -> dict[str, "FlowRun"]:
    """The release runs that have one of `keys`, by it."""
    return {str(run.idempotency_key): run for run in _runs(client, idempotency_key={"any_": keys})} if keys else {}


def children(client: "SyncPrefectClient", parent: UUID, seen: list[UUID]) -> dict[str, "FlowRun"]:
    """The runs that were started with `parent`, but for `seen`, by their key."""
    found = _runs(client, parent_flow_run_id={"any_": [parent]}, id={"not_any_": seen})
    return {str(run.idempotency_key): run for run in found}


def busy(client: "SyncPrefectClient") -> dict[str, "FlowRun"]:
    """A release run that has not ended, of each model that has one, however it was started."""
    from prefect.client.schemas.objects import TERMINAL_STATES

    since = datetime.now(UTC) - RESTARTED_WITHIN
    running = _runs(client, state={"type": {"not_any_": sorted(TERMINAL_STATES)}})
    crashed = _runs(client, state={"type": {"any_": ["CRASHED"]}}, end_time={"after_": since})
    return {_model(run): run for run in [*running, *crashed] if not ended(run) and not _is_planned(run)}


def ended(run: "FlowRun") -> bool:
    """Whether a run is over: it reached its end, or crashed and was not started again."""
    state = run.state
    if state is None or not state.is_final():
        return False
    return not state.is_crashed() or datetime.now(UTC) - state.timestamp > RESTARTED_WITHIN


def page(run: "FlowRun") -> str:
    """The address of a run in Prefect's pages."""
    from prefect.utilities.urls import url_for

    return url_for("flow-run", obj_id=run.id) or str(run.id)


def _runs(client: "SyncPrefectClient", **criteria: Any) -> Iterator["FlowRun"]:
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    flows = FlowFilter.model_validate({"name": {"any_": [DEPLOYMENT.partition("/")[0]]}})
    runs = FlowRunFilter.model_validate(criteria)
    offset = 0
    while True:
        found = client.read_flow_runs(
            flow_filter=flows, flow_run_filter=runs, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=offset
        )
        yield from found
        offset += PAGE
        if len(found) < PAGE:
            return


def _model(run: "FlowRun") -> str:
    recipe = run.parameters.get("recipe")
    source = recipe.get("source") if isinstance(recipe, dict) else None
    return str(source.get("model")) if isinstance(source, dict) else ""


def _is_planned(run: "FlowRun") -> bool:
    """Whether the run is for a time that is still to come, by a schedule or by somebody."""
    ahead = run.expected_start_time and run.expected_start_time > datetime.now(UTC)
    return bool(run.state_name == "Scheduled" and ahead)


def _stand_in(client: "SyncPrefectClient", parent: UUID, key: str, deployment: str, name: str) -> UUID:
    """The task run that stands for a run in its parent; the same one if it is asked for again."""
    from prefect import Task
    from prefect.states import Pending

    child: Task[[], None] = Task(fn=lambda: None, name=deployment.partition("/")[0])
    child.task_key = deployment
    return client.create_task_run(child, parent, key, name=name, state=Pending()).id

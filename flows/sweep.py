"""Many models, many variants: a release run for each pair on the work pool, and a leaderboard of them all."""

import logging
import re
import time
from itertools import repeat
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Sweep
from configs.settings import home
from tasks.fleet import flow_runs
from tasks.fleet.sweep import FAILED, Pair, Row, grid, headline, leaderboard, plan, prefetch, table
from tasks.result import write_file
from tasks.runtime.retry import retry
from tasks.sentences import ending

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger("tame.sweep")

POLL = 5.0
"""Seconds between two questions after all runs."""
AWAY = 900.0
"""Seconds that Prefect's server may be away."""


def _run_name() -> str:
    spec: Sweep = flow_run.parameters["spec"]
    return f"{spec.name}: {len(spec.models)} models, {len(spec.recipe.variants)} variants"


@flow(name="sweep", flow_run_name=_run_name)
def sweep(spec: Sweep) -> State[list[Row]]:
    """Release every model in every variant, each by a run of its own, wait for all of them, and compare them.

    Args:
        spec: The models, and what to do with each.
    """
    sweep_id = UUID(flow_run.get_id())
    try:
        planned = plan(spec, sweep_id)
        if spec.prefetch:
            prefetch(planned, sweep_id)
        return finish(spec, planned, wait(planned, sweep_id, spec.limit))
    except TameError as error:
        return Failed(message=str(error))


def wait(pairs: list[Pair], sweep_id: UUID, limit: int | None) -> dict[str, "FlowRun"]:
    """Start the runs of `pairs`, at most `limit` at a time, and return all of them, by key, when the last has ended.

    All runs are asked after at once, every few seconds; a server that is away is waited for.

    Raises:
        TameError: Prefect's server stays away, or does not take a recipe.
    """
    import httpx
    from prefect.client.orchestration import get_client

    ended: dict[str, FlowRun] = {}
    with get_client(sync_client=True) as client:

        def step() -> bool:
            """Take note of what has ended, and start what there is room for; whether all have ended."""
            under_way = flow_runs.children(client, sweep_id, [run.id for run in ended.values()])
            fresh = {key: run for key, run in under_way.items() if flow_runs.ended(run)}
            ended.update(fresh)
            for run in fresh.values():
                log.info("%s: %s; %d of %d have ended", run.name, run.state_name, len(ended), len(pairs))
            missing = [pair for pair in pairs if pair.key not in under_way and pair.key not in ended]
            room = len(missing) if limit is None else limit - len(under_way) + len(fresh)
            for pair in missing[: max(0, room)]:
                assert pair.recipe
                assert pair.queue
                flow_runs.start(client, fleet, pair.recipe, pair.key, pair.queue, [f"sweep:{sweep_id}"], sweep_id)
            return len(ended) == len(pairs)

        def warn(error: Exception, _pause: float, _spent: float) -> None:
            log.warning("%s does not answer (%s); trying again", client.api_url, type(error).__name__)

        fleet = flow_runs.fleet(client)
        try:
            while not retry(step, repeat(POLL), lambda error: isinstance(error, httpx.HTTPError), warn, AWAY):
                time.sleep(POLL)
        except httpx.HTTPError as error:
            raise TameError(f"{client.api_url} is away ({type(error).__name__}); the runs go on without it") from None
    return ended


def finish(spec: Sweep, pairs: list[Pair], runs: dict[str, "FlowRun"]) -> State[list[Row]]:
    """Show the leaderboard: as two artifacts in Prefect, a table and a page, and in TAME_HOME/runs/NAME/leaderboard.md.

    Ends Failed where a run failed, crashed or was cancelled, and names each of them; Rejected where the gate rejected all, and
    Partly rejected where it rejected some; else Completed.
    """
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    rows, notes = leaderboard(spec, pairs, runs)
    summary = headline(spec, rows)
    page = "\n\n".join([f"# {spec.name}", summary, *notes, grid(rows)]) + "\n"
    key = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    create_table_artifact(table(rows), f"{key}-table", summary)
    create_markdown_artifact(page, f"{key}-leaderboard", summary)
    write_file(home() / "runs" / spec.name / "leaderboard.md", page)
    statuses = {row.status for row in rows}
    if statuses & FAILED:
        return Failed(message=summary)  # a worker would raise what it holds
    return Completed(name=ending(statuses), message=summary, data=rows)

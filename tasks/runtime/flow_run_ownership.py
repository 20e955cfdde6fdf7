"""Stop if Prefect has started this flow run again in another process.

Prefect does so after it has missed the run's heartbeats, even if this process still works: it was only cut off, or held up. What
counts as the owner is the attempt's number, which the server counts up each time that it starts the run.
"""

import logging
from itertools import repeat

from tasks.runtime.retry import retry

log = logging.getLogger("tame.attempt")

PATIENCE = 900.0
"""Seconds to wait for a Prefect server that does not answer; it starts the run again when it is back, at the latest."""
PAUSE = 5.0


def begin() -> int | None:
    """The number of this attempt at the flow run, from 1; None where nobody else could make another."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return None
    return _read_run(context.flow_run.id)[0]


def check(attempt: int | None) -> None:
    """Return if the flow run is still this attempt's to work for: before each long stage, and before anything is published.

    Raises:
        Abort: it is not, or the server did not answer for PATIENCE. The process ends, and leaves the run's state alone.
    """
    if attempt is None:
        return
    from prefect.exceptions import Abort
    from prefect.runtime import flow_run

    now, state = _read_run(flow_run.get_id())
    if (now, state) != (attempt, "RUNNING"):
        message = f"the run is now at attempt {now} and {state.lower()}; attempt {attempt} of it stops here"
        log.warning(message)
        raise Abort(message)


def _read_run(run_id: object) -> tuple[int, str]:
    """How often the run was begun, and its state's type."""
    from uuid import UUID

    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Abort

    def ask() -> tuple[int, str]:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(str(run_id)))
        return run.run_count, run.state_type.value if run.state_type else "PENDING"

    def warn(error: Exception, _pause: float, _spent: float) -> None:
        log.warning("Prefect's server does not answer (%s); waiting for it before going on", error)

    try:
        return retry(ask, repeat(PAUSE), lambda error: isinstance(error, HTTPError), warn, PATIENCE)
    except HTTPError as error:
        raise Abort(f"Prefect's server did not answer for {PATIENCE:.0f} s ({error})") from None

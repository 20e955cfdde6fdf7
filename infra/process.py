"""Prefect's worker, which does not end when a run that it still holds is started again: `python -m infra.process OPTIONS`.

Prefect 3.8's worker tells the server that the process of a run has died, and gives its place (`--limit`) back only once
the flow's hooks have run, seconds later. An automation sets the run back to Scheduled at once; a worker that asks for runs
in between takes a second place for it, fails with "this borrower is already holding one of this CapacityLimiter's tokens",
and ends.
"""

import sys
from typing import TYPE_CHECKING, Any

from prefect.workers.base import BaseWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import WorkerFlowRunResponse

_submit = BaseWorker._submit_scheduled_flow_runs


async def _submit_others(
    self: "BaseWorker[Any, Any, Any]", flow_run_response: "list[WorkerFlowRunResponse]"
) -> "list[FlowRun]":
    """As Prefect's, without the runs that hold a place: they are in the next answer, too."""
    held = self._limiter.statistics().borrowers if self._limiter else ()
    return await _submit(self, [entry for entry in flow_run_response if entry.flow_run.id not in held])


def main() -> None:
    """Become the worker."""
    BaseWorker._submit_scheduled_flow_runs = _submit_others  # type: ignore[method-assign]
    from prefect.cli import app

    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()

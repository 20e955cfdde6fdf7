"""Prefect's worker with three habits changed: `python -m infra.patched_worker OPTIONS`.

It lives on when a run that it still holds is started again. Prefect 3.8's worker tells the server that the process of a
run has died, and gives its place (`--limit`) back only once the flow's hooks have run, seconds later. An automation sets
the run back to Scheduled at once; a worker that asks for runs in between takes a second place for it, fails with "this
borrower is already holding one of this CapacityLimiter's tokens", and ends.

It asks for runs when it has a place for one, and as soon as it has one again. The server's answer holds every run that
waits, with its parameters: asked each two seconds for nothing, it takes a third of the server's time while hundreds wait.

It starts a run's process itself. Where no command is given, Prefect puts a process of its own in between, which fetches code
and installs dependencies; tame is installed on its workers, and that process costs as much as importing Prefect does.
"""

import sys
import time
from typing import TYPE_CHECKING, Any

import anyio
from prefect.utilities.processutils import command_to_string, get_sys_executable
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import WorkerFlowRunResponse

SEEN_EVERY = 30.0
"""Seconds between two questions of a worker without a free place: one that says nothing for 60 counts as gone."""
LOOK_EVERY = 0.5
"""Seconds between two looks whether a place is free."""

_ask = BaseWorker.get_and_submit_flow_runs
_submit = BaseWorker._submit_scheduled_flow_runs
_prepare = ProcessJobConfiguration.prepare_for_flow_run


async def ask_with_a_place(self: "BaseWorker[Any, Any, Any]") -> "list[FlowRun]":
    """As Prefect's, as long as every place is taken: again once one is free, or to be seen. Returns what the last answer gave."""
    taken = await _ask(self)
    while self._limiter and not self._limiter.available_tokens:
        end = time.monotonic() + SEEN_EVERY
        while not self._limiter.available_tokens and time.monotonic() < end:
            await anyio.sleep(LOOK_EVERY)
        taken = await _ask(self)
    return taken


async def submit_others(
    self: "BaseWorker[Any, Any, Any]", flow_run_response: "list[WorkerFlowRunResponse]"
) -> "list[FlowRun]":
    """As Prefect's, without the runs that hold a place: they are in the next answer, too."""
    held = self._limiter.statistics().borrowers if self._limiter else ()
    return await _submit(self, [entry for entry in flow_run_response if entry.flow_run.id not in held])


def prepare_directly(self: ProcessJobConfiguration, *args: Any, **kwargs: Any) -> None:
    """As Prefect's, with its engine as the command where none is given."""
    if self.command is None:
        self.command = command_to_string([get_sys_executable(), "-m", "prefect.engine"])
    _prepare(self, *args, **kwargs)


def main() -> None:
    """Become the worker."""
    if "--run-once" not in sys.argv:  # it asks once
        BaseWorker.get_and_submit_flow_runs = ask_with_a_place  # type: ignore[method-assign]
    BaseWorker._submit_scheduled_flow_runs = submit_others  # type: ignore[method-assign]
    ProcessJobConfiguration.prepare_for_flow_run = prepare_directly  # type: ignore[method-assign]
    from prefect.cli import app

    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()

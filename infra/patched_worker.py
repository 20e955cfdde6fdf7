"""Prefect's worker with two habits changed: `python -m infra.patched_worker OPTIONS`.

It asks for runs when it has a place for one, and as soon as it has one again. The server's answer holds every run that
waits, with its parameters: asked each two seconds for nothing, it takes a third of the server's time while hundreds wait.
This patch can go when Prefect's worker asks for no more runs than `--limit` leaves room for.

It starts a run's process itself. Where no command is given, Prefect puts a process of its own in between, which fetches code
and installs dependencies; tame is installed on its workers, and that process costs as much as importing Prefect does. This
patch can go when a work pool can say that nothing is to be prepared; a command in the pool itself would override that of
every deployment.

A third habit was changed until Prefect 3.8: a run that was started again, while its place was still held, ended the worker.
Prefect 3.9 passes over such a run, and takes it with the next answer.
"""

import itertools
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import configs.quiet_interrupt  # noqa: F401  before the rest

# isort: split

import anyio
from prefect.utilities.processutils import command_to_string, get_sys_executable
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration

from configs.errors import TameError, named_line
from configs.settings import UP
from infra.worker import prepare

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

SEEN_EVERY = 30.0
"""Seconds between two questions of a worker without a free place: one that says nothing for 60 counts as gone."""
LOOK_EVERY = 0.5
"""Seconds between two looks whether a place is free."""

_ask = BaseWorker.get_and_submit_flow_runs
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


def prepare_directly(self: ProcessJobConfiguration, *args: Any, **kwargs: Any) -> None:
    """As Prefect's, with its engine as the command where none is given."""
    if self.command is None:
        self.command = command_to_string([get_sys_executable(), "-m", "prefect.engine"])
    _prepare(self, *args, **kwargs)


def main() -> None:
    """Become the worker. Under `tame up`, standard input ends when the work pool is made; what is slow is imported until then."""
    if "--run-once" not in sys.argv:  # it asks once
        BaseWorker.get_and_submit_flow_runs = ask_with_a_place  # type: ignore[method-assign]
    ProcessJobConfiguration.prepare_for_flow_run = prepare_directly  # type: ignore[method-assign]
    from prefect.cli import app

    given = list(itertools.pairwise(sys.argv))
    if UP.name in os.environ:
        sys.stdin.read()
    try:
        prepare(dict(given)["--pool"], [value for name, value in given if name == "--work-queue"])
    except Exception as error:
        said, code = (
            (str(error), error.exit_code) if isinstance(error, TameError) else (named_line(error, limit=None), 1)
        )
        print(f"tame: {said}", file=sys.stderr)
        sys.exit(code)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what Prefect's worker expects to find
    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()

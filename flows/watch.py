"""Which models have moved since they were released? Those are released again, each by a run of its own."""

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Failed, State

from configs.errors import TameError
from configs.schema import Watch
from tasks.fleet import watch as looks


@flow(name="watch")
def watch(spec: Watch) -> State[list[looks.Row]]:
    """Look at every model, and start a release of each that has changed since the last one: once a change.

    Args:
        spec: What to watch, and what to do with a model that has moved.
    """
    try:
        return looks.finish(looks.look_at(spec), deployment.get_name() or "watch")
    except TameError as error:
        return Failed(message=str(error))

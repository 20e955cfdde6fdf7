"""Download a model into the shared store on a worker without a GPU, before a GPU worker needs it."""

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Source
from flows.stages import download_task
from tasks.values import Snapshot


def _run_name() -> str:
    source: Source = flow_run.parameters["source"]
    return f"prefetch {source.model}"


@flow(name="prefetch", flow_run_name=_run_name)
def prefetch(source: Source) -> State[Snapshot]:
    """Download a model into the store, which a release of it then finds there.

    Args:
        source: The model, as in a recipe.
    """
    try:
        snapshot = download_task(source).result()
    except TameError as error:
        return Failed(message=str(error))
    return Completed(name="Cached" if snapshot.cached else "Completed", data=snapshot)

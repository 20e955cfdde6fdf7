"""Many models, many variants: a release run for each pair on the work pool, and a leaderboard of them all."""

from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Failed, State

from configs.errors import TameError
from configs.schema import Sweep
from tasks.fleet import sweep as pairs


def _run_name() -> str:
    spec: Sweep = flow_run.parameters["spec"]
    return f"{spec.name}: {len(spec.models)} models, {len(spec.recipe.variants)} variants"


@flow(name="sweep", flow_run_name=_run_name)
def sweep(spec: Sweep) -> State[list[pairs.Row]]:
    """Release every model in every variant, each by a run of its own, wait for all of them, and compare them.

    Args:
        spec: The models, and what to do with each.
    """
    sweep_id = UUID(flow_run.get_id())
    try:
        planned = pairs.plan(spec, sweep_id)
        if spec.prefetch:
            pairs.prefetch(planned, sweep_id)
        return pairs.finish(spec, planned, pairs.wait(planned, sweep_id, spec.limit))
    except TameError as error:
        return Failed(message=str(error))

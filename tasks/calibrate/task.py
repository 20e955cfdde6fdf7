"""The stage of calibration sequences, as Prefect sees it."""

from prefect import task
from prefect.states import Completed, State

from configs.schema import Calibrate
from tasks.calibrate.prepare import calibrate
from tasks.values import Calibration, Snapshot


@task(name="calibrate", task_run_name="calibrate: sequences for {snapshot.name}")
def calibrate_task(snapshot: Snapshot, spec: Calibrate) -> State[Calibration]:
    """`calibrate` in the flow."""
    made = calibrate(snapshot, spec)
    return Completed(name="Cached" if made.cached else "Completed", data=made)

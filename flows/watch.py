"""Release every watched model again that has changed since its last release, each in a run of its own."""

import re

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Completed, Failed, State

from configs.errors import TameError
from configs.schema import Watch
from tasks.fleet.watch import ACTIONS, Row, look_at


@flow(name="watch")
def watch(spec: Watch) -> State[list[Row]]:
    """Look at every model, and start a release of each that has changed since the last one: once a change.

    Args:
        spec: What to watch, and what to do with a model that has changed.
    """
    try:
        return finish(look_at(spec), deployment.get_name() or "watch")
    except TameError as error:
        return Failed(message=str(error))


def finish(rows: list[Row], key: str) -> State[list[Row]]:
    """Show `rows` as a table, and end with what was done in a line: Unchanged, Completed, or Failed where a look failed."""
    from prefect.artifacts import create_table_artifact

    counted = {action: [row for row in rows if row.action == action] for action in ACTIONS}
    parts = [f"{len(group)} {action}" for action, group in counted.items() if group]
    started, unseen = counted["started"], counted["error"]
    summary = ", ".join(parts) + (f"; {'; '.join(f'{row.model}: {row.why}' for row in unseen)}" if unseen else "")
    create_table_artifact(
        [row.model_dump() for row in rows], re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-"), summary[:2000]
    )
    if unseen:
        return Failed(message=summary)  # a worker would raise what it holds
    return Completed(name="Completed" if started else "Unchanged", message=summary, data=rows)

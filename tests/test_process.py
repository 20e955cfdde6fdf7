"""A worker that is asked for a run which it still holds lives on, and takes the run once its place is free."""

import asyncio
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.workers.process import ProcessWorker

from infra import process


def answer(run: FlowRun) -> WorkerFlowRunResponse:
    return WorkerFlowRunResponse.model_construct(work_pool_id=uuid4(), work_queue_id=uuid4(), flow_run=run)


@pytest.mark.parametrize("patched", [False, True])
def test_a_run_that_is_started_again_before_its_place_is_free(patched: bool) -> None:
    run = FlowRun(id=uuid4(), flow_id=uuid4())
    taken: list[Any] = []

    async def poll() -> None:
        worker = ProcessWorker(work_pool_name="tame", limit=2)
        worker._limiter = anyio.CapacityLimiter(2)
        worker._runs_task_group = SimpleNamespace(start_soon=lambda _, run: taken.append(run.id))  # type: ignore[assignment]
        submit = process._submit_others if patched else process._submit
        worker._limiter.acquire_on_behalf_of_nowait(run.id)
        await submit(worker, [answer(run)])
        assert taken == []
        worker._release_limit_slot(run.id)
        await submit(worker, [answer(run)])

    if patched:
        asyncio.run(poll())
        assert taken == [run.id]
    else:  # when this one fails, Prefect has put it right, and infra/process.py can go
        with pytest.raises(RuntimeError, match="already holding"):
            asyncio.run(poll())

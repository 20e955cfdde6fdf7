"""Prefect's worker with tame's habits: what it does with runs that it holds, when it asks for more, what it starts."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from infra import patched_worker


def answer(run: FlowRun) -> WorkerFlowRunResponse:
    return WorkerFlowRunResponse.model_construct(work_pool_id=uuid4(), work_queue_id=uuid4(), flow_run=run)


def test_a_run_that_is_started_again_before_its_place_is_free() -> None:
    """Prefect's own doing since 3.9: before, such a run ended the worker, and tame had a patch for it."""
    run = FlowRun(id=uuid4(), flow_id=uuid4())
    taken: list[Any] = []

    async def poll() -> None:
        worker = ProcessWorker(work_pool_name="tame", limit=2)
        worker._limiter = anyio.CapacityLimiter(2)
        worker._runs_task_group = SimpleNamespace(start_soon=lambda _, run: taken.append(run.id))  # type: ignore[assignment]
        worker._limiter.acquire_on_behalf_of_nowait(run.id)
        await worker._submit_scheduled_flow_runs([answer(run)])
        assert taken == []
        worker._release_limit_slot(run.id)
        await worker._submit_scheduled_flow_runs([answer(run)])

    asyncio.run(poll())
    assert taken == [run.id]


def test_a_worker_asks_when_it_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def poll() -> None:
        worker = ProcessWorker(work_pool_name="tame", limit=1)
        worker._limiter = limiter = anyio.CapacityLimiter(1)

        async def ask(_: Any) -> list[FlowRun]:
            asked.append(int(limiter.available_tokens))
            if len(asked) == 1:
                limiter.acquire_on_behalf_of_nowait("a run")
            if len(asked) == 3:  # it was asked to be seen, and then the run ended
                limiter.release_on_behalf_of("a run")
            return []

        monkeypatch.setattr(patched_worker, "_ask", ask)
        await patched_worker.ask_with_a_place(worker)

    monkeypatch.setattr(patched_worker, "SEEN_EVERY", 0.05)
    monkeypatch.setattr(patched_worker, "LOOK_EVERY", 0.01)
    asyncio.run(poll())
    assert asked == [1, 0, 0]


@pytest.mark.parametrize("given", [None, "python -m mine"])
def test_a_run_is_started_by_the_worker_itself(given: str | None) -> None:
    configuration = ProcessJobConfiguration(command=given)
    patched_worker.prepare_directly(configuration, FlowRun(id=uuid4(), flow_id=uuid4()))
    assert configuration.command == (given or f"{Path(sys.executable)} -m prefect.engine")
    assert configuration._command_configured  # or Prefect puts a process of its own in between

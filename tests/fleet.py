"""Fixtures for what starts release runs: a server to start them on, a Hub, and what a look needs to see of a model."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from tasks.fleet.work_queues import POOL
from tests.hub import Hub
from tests.models import LOOK, weights


@pytest.fixture(scope="session")
def releases(prefect_url: str) -> str:
    """The server with deployments of releases and of downloads, and no worker."""
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        for flow, name in (("release", "any"), ("prefetch", "prefetch")):
            client.create_deployment(client.create_flow_from_name(flow), name=name, work_pool_name=POOL)
    return prefect_url


@pytest.fixture
def prefect(releases: str) -> Iterator[SyncPrefectClient]:
    # Without heartbeats, the last of which every flow run would wait for.
    settings = {PREFECT_API_URL: releases, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a look needs to see of a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(LOOK)
    (tmp_path / "model" / "model.safetensors").write_bytes(weights(0))
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tame_home: Path) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        yield hub


@pytest.fixture
def owner() -> str:
    """A namespace of this test alone: the server is the session's."""
    return f"o{uuid4().hex[:8]}"

"""Watch and sweep as they are used: provisioned, with a worker that releases and one that waits, from a Hub to a Hub."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.hub import Hub
from tests.test_flow import ROOT, TEXT

pytestmark = pytest.mark.e2e


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_model("org/tiny", tiny_llama)
        yield hub


def ignore_interrupts() -> None:
    """As a shell script has it for what it starts in the background: a worker has to end at SIGTERM all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture
def prefect(hub: Hub, tmp_path: Path, prefect_url: str) -> Iterator[SyncPrefectClient]:
    """The server, provisioned, with two workers whose Hub is `hub`."""
    environment = {
        **os.environ, "TAME_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token(), "PREFECT_API_URL": prefect_url,
    }  # fmt: skip
    tame = [sys.executable, "-m", "tame"]
    subprocess.run([*tame, "provision"], cwd=ROOT, env=environment, check=True)
    workers = []
    for options in ((), ("--control",)):
        with (tmp_path / f"worker{len(workers)}.log").open("wb") as log:
            command = [*tame, "worker", *options]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
            yield client
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)


def template(folder: Path, *methods: str, **sections: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    return {
        "variants": [{"method": method} for method in methods],
        "evaluate": {
            "text": {"files": [str(folder / "text.txt")]}, "window": 64, "max_tokens": 512,
            "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}, "samples": None,
        },
        **sections,
    }  # fmt: skip


def ended(prefect: SyncPrefectClient, run: FlowRun) -> FlowRun:
    while not run.state.is_final():
        time.sleep(0.5)
        run = prefect.read_flow_run(run.id)
    return run


def fire(prefect: SyncPrefectClient, deployment: str, spec: dict[str, Any]) -> FlowRun:
    """Run a flow that waits, to its end."""
    found = prefect.read_deployment_by_name(deployment)
    return ended(prefect, prefect.create_flow_run_from_deployment(found.id, parameters={"spec": spec}))


def releases(prefect: SyncPrefectClient) -> list[FlowRun]:
    """The release runs, oldest first, once all have ended."""
    found = [run for run in prefect.read_flow_runs() if any(tag.startswith("model:") for tag in run.tags)]
    return sorted((ended(prefect, run) for run in found), key=lambda run: run.created)


def test_what_moves_is_released_once(prefect: SyncPrefectClient, hub: Hub, tmp_path: Path) -> None:
    publish = {"to": "hub", "repo": "me/{model}-{variant}"}
    spec = {"models": ["org/*"], "recipe": template(tmp_path, "nf4", publish=publish), "settle_seconds": 0}
    before = len(releases(prefect))
    assert fire(prefect, "watch/watch", spec).state.name == "Completed"
    [first] = releases(prefect)[before:]
    assert first.state.is_completed(), first.state.message
    assert first.state.message == "Published: nf4"
    assert "model.safetensors" in hub.model("me/tiny-nf4").files()

    again = fire(prefect, "watch/watch", spec)
    assert again.state.name == "Unchanged", again.state.message
    print(f"a firing that finds nothing new: {again.total_run_time.total_seconds():.1f} s")
    assert len(releases(prefect)) == before + 1

    moved = hub.write("org/tiny", "README.md", b"---\nlicense: mit\n---\n# Tiny, again\n")
    assert fire(prefect, "watch/watch", spec).state.name == "Completed"
    _, second = releases(prefect)[before:]
    assert second.parameters["recipe"]["source"]["revision"] == moved
    assert second.state.is_completed(), second.state.message
    assert fire(prefect, "watch/watch", spec).state.name == "Unchanged"


def test_a_sweep_ends_with_a_leaderboard(prefect: SyncPrefectClient, hub: Hub, tmp_path: Path) -> None:
    before = len(releases(prefect))
    recipe = template(tmp_path, "int8", "nf4", gate={"max_mean_kl": 1e-9})
    run = fire(prefect, "sweep/sweep", {"name": "both", "models": ["org/tiny"], "recipe": recipe})
    assert run.state.name == "Rejected", run.state.message
    assert "2 runs of both: 2 rejected" in run.state.message
    children = releases(prefect)[before:]
    assert [len(child.parameters["recipe"]["variants"]) for child in children] == [1, 1]
    kept = ArtifactFilter.model_validate({"key": {"any_": ["both-leaderboard"]}})
    [page] = prefect.read_artifacts(artifact_filter=kept)
    for row in ("| baseline |", "| int8 |", "| nf4 |"):
        [line] = [line for line in str(page.data).splitlines() if row in line]
        assert line.count("|") == 11
    assert str(page.data) == (tmp_path / "home" / "runs" / "both" / "leaderboard.md").read_text()

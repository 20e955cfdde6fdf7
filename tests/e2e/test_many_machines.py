"""Machines that share a Prefect server on PostgreSQL and an S3 store alone: one is killed, one is cut off, nothing is lost."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.automations import create_automations
from tests.e2e.machines import Machine, Site, missing, site
from tests.models import tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600), pytest.mark.skipif(bool(missing()), reason=missing())]

DEAD_AFTER = 75  # heartbeats come every 30 s
MODELS = ["one", "two"]
VARIANTS = [{"method": "int8"}, {"method": "nf4"}, {"method": "nf4", "double_quant": True}]
RECIPE = {
    "variants": VARIANTS,
    "evaluate": {
        "text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 512, "samples": None,
        "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
    },
    "publish": {"to": "hub", "repo": "me/{model}-{variant}"},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Site, list[Machine], SyncPrefectClient]]:
    with site(tmp_path, ["alpha", "beta", "control"]) as (it, machines):
        for number, name in enumerate(MODELS):
            it.hub.add_model(f"org/{name}", tiny(tmp_path / "models" / name, seed=number))
        it.s3_client().create_bucket(Bucket="tame")
        it.s3_client().put_bucket_versioning(Bucket="tame", VersioningConfiguration={"Status": "Enabled"})
        with temporary_settings({PREFECT_API_URL: it.api}), get_client(sync_client=True) as client:
            create_automations(DEAD_AFTER)
            yield it, machines, client


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, why
        time.sleep(0.3)
    return found


def releases(client: SyncPrefectClient) -> list[FlowRun]:
    only = FlowFilter.model_validate({"name": {"any_": ["release"]}})
    return client.read_flow_runs(flow_filter=only, limit=200)


def on(client: SyncPrefectClient, machine: Machine) -> FlowRun | None:
    """The release that `machine` works on."""
    for run in releases(client):
        if run.state_name == "Running" and str(run.labels.get("prefect.worker.name", "")).startswith(machine.name):
            return run
    return None


def history(client: SyncPrefectClient, run: FlowRun) -> list[tuple[str, float]]:
    """Its states, and when it entered them, s."""
    return [(state.name or "", state.timestamp.timestamp()) for state in client.read_flow_run_states(run.id)]


def engines(machine: Machine) -> list[int]:
    """Processes of `machine` that run a flow."""
    found = []
    for pid in machine.processes():
        path = Path(f"/proc/{pid}/cmdline")
        if path.exists() and b"prefect.engine" in path.read_bytes():
            found.append(pid)
    return found


def test_a_machine_dies_and_another_is_cut_off(place: tuple[Site, list[Machine], SyncPrefectClient]) -> None:
    it, (alpha, beta, control), client = place
    alpha.start()
    beta.start()
    control.start("--control")
    deployment = client.read_deployment_by_name("sweep/sweep")
    spec = {"name": "six", "models": [f"org/{name}" for name in MODELS], "recipe": RECIPE}
    sweep = client.create_flow_run_from_deployment(deployment.id, parameters={"spec": spec})
    until(lambda: on(client, alpha) and on(client, beta), 600, "the sweep does not spread over both machines")

    killed = until(lambda: on(client, alpha), 300, "alpha has no run")
    alpha.kill()
    killed_at = time.time()
    time.sleep(5)
    alpha.start()  # as after a reboot
    cut = until(lambda: on(client, beta), 600, "beta has no run")
    time.sleep(3)
    beta.cut()
    cut_at = time.time()
    left = engines(beta)
    assert len(left) == 1
    until(lambda: client.read_flow_run(cut.id).run_count == 2, 900, "nobody takes up what beta had")
    beta.join()  # its first process comes back while the second works
    until(lambda: not set(left) & set(engines(beta)), 300, "it does not stop, though its run has moved on")
    assert "attempt 1 of it stops here" in beta.log.read_text()
    until(lambda: client.read_flow_run(sweep.id).state.is_final(), 2400, "the sweep does not end")

    for run, since, what in ((killed, killed_at, "killed"), (cut, cut_at, "cut off")):
        seen = [(name, round(when - since, 1)) for name, when in history(client, run) if when > since]
        print(f"seconds after its machine was {what}: {seen}")
    ended = {run.id: run for run in releases(client)}
    assert len(ended) == len(MODELS) * len(VARIANTS)
    for run in ended.values():
        names = [name for name, _ in history(client, run)]
        assert names[-1] == "Completed", (names, run.state.message)
        assert run.run_count == names.count("Running") == (2 if run.id in (killed.id, cut.id) else 1), names
        assert ("Crashed" in names) == (run.id in (killed.id, cut.id))
    state = client.read_flow_run(sweep.id).state
    assert (state.name, "6 runs of six: 6 published" in (state.message or "")) == ("Completed", True), state.message

    for model in MODELS:
        for variant in ("int8", "nf4", "nf4-dq"):
            repo = it.hub.model(f"me/{model}-{variant}")
            messages = [message for _, ref, message in repo.log if ref == "refs/heads/main"]
            assert len(messages) == 2, messages  # the Hub's own, and ours
            assert messages[0] == "initial commit"
            assert sum(f"{repo.id}/commit/" in line and line.startswith("POST") for line in it.hub.requests) == 1
    versions = it.s3_client().list_object_versions(Bucket="tame", Prefix="artifacts/")["Versions"]
    manifests = Counter(version["Key"] for version in versions if version["Key"].endswith("/manifest.json"))
    kinds = Counter(key.split("/")[1].rsplit("-", 1)[0] for key in manifests)
    print(f"artifacts: {dict(kinds)}")
    assert set(manifests.values()) == {1}, manifests  # written once each
    assert kinds["quantized"] == len(MODELS) * len(VARIANTS)


def test_servers_that_go_away_for_a_while(place: tuple[Site, list[Machine], SyncPrefectClient]) -> None:
    """Each of them once, in the middle of a run; every run ends well, on the machine where it began or after a restart."""
    it, (alpha, beta, _), client = place
    alpha.start()
    beta.start()
    deployment = client.read_deployment_by_name("release/any")

    def release(window: int) -> FlowRun:
        """A run that finds no evaluation of its own in the store; it works once this returns."""
        recipe = {**RECIPE, "name": f"w{window}", "source": {"model": "org/one"}, "publish": {"to": "nowhere"}}
        recipe |= {"variants": VARIANTS[1:2], "evaluate": {**RECIPE["evaluate"], "window": window}}
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"recipe": recipe})
        until(lambda: client.read_flow_run(run.id).state_name == "Running", 300, "no worker takes it")
        time.sleep(2)
        return run

    def prefect() -> None:
        it.prefect.stop(signal.SIGKILL)
        time.sleep(40)
        it.prefect.start()

    def postgres() -> None:
        it.postgres.stop("immediate")
        time.sleep(30)
        it.postgres.start()

    def storage() -> None:
        assert it.s3.process is not None
        os.killpg(it.s3.process.pid, signal.SIGSTOP)  # its objects are in its memory
        time.sleep(60)
        os.killpg(it.s3.process.pid, signal.SIGCONT)

    def mlflow() -> None:
        it.mlflow.stop(signal.SIGKILL)
        time.sleep(60)
        it.mlflow.start()

    for window, away in enumerate((prefect, postgres, storage, mlflow), 65):
        run = release(window)
        started = time.monotonic()
        away()
        until(
            lambda run=run: client.read_flow_run(run.id).state.is_completed(), 900, f"{away.__name__}: it does not end"
        )
        ended = client.read_flow_run(run.id)
        begun = f"begun {ended.run_count} times: {[name for name, _ in history(client, ended)]}"
        print(f"{away.__name__} was away: ended after {time.monotonic() - started:.0f} s, {begun}")
        assert ended.state.name == "Completed", ended.state.message
    assert [machine.worker and machine.worker.poll() for machine in (alpha, beta)] == [None, None]

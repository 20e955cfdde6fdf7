"""Sweeps: the release runs on a real Prefect server, ended here as workers would end them, and the leaderboard from MLflow."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Completed, Failed, State
from pydantic import ValidationError

from configs.schema import Recipe, Source, Sweep
from flows.prefetch import prefetch
from flows.sweep import sweep, wait
from tasks import formatting
from tasks.fleet import sweep as pairs
from tasks.track import task as track
from tests.hub import Hub
from tests.models import LOOK
from tests.results import INT8, NF4, make

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.fleet",)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.sweep.POLL", 0.1)


def spec(*models: str, **values: Any) -> Sweep:
    variants = [{"method": "int8"}, {"method": "nf4"}]
    recipe = {"variants": variants, "evaluate": {"text": {"builtin": "python-docs"}}, **values.pop("recipe", {})}
    return Sweep.model_validate({"name": f"s{uuid4().hex[:8]}", "models": list(models), "recipe": recipe, **values})


def children(prefect: SyncPrefectClient, model: str) -> list[FlowRun]:
    wanted = {"tags": {"all_": [f"model:{model}"]}}
    return prefect.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))


@contextmanager
def workers(prefect: SyncPrefectClient, models: list[str], end: Callable[[FlowRun], State[Any]]) -> Iterator[list[int]]:
    """Ends every run of `models` that waits; yields how many waited, each time one was looked for."""
    waited: list[int] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.2):
            waiting = [run for model in models for run in children(prefect, model) if run.state.is_scheduled()]
            waited.append(len(waiting))
            for run in waiting:
                prefect.set_flow_run_state(run.id, end(run), force=True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield waited
    finally:
        stop.set()
        thread.join()


def logged(run: FlowRun, metrics: dict[str, float], status: str) -> None:
    """What the release run leaves in MLflow."""
    recipe = Recipe.model_validate(run.parameters["recipe"])
    result = make()
    variant = result.variants[0].model_copy(
        update={"name": recipe.variants[0].label, "metrics": metrics, "status": status, "published": None}
    )
    result = result.model_copy(
        update={
            "recipe": recipe,
            "prefect_run": str(run.id),
            "variants": [variant],
            "exit_code": 0,
        }
    )
    assert track.log(result, None, None, final=True)


def test_a_sweep_is_a_run_for_each_pair_and_a_leaderboard(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path, tame_home: Path
) -> None:
    good, bad = f"{owner}/good_one", f"{owner}/bad"
    for model in (good, bad):
        hub.add_model(model, checkpoint)

    def end(run: FlowRun) -> State[Any]:
        recipe = run.parameters["recipe"]
        label = Recipe.model_validate(recipe).variants[0].label
        if recipe["source"]["model"] == bad:
            return Failed(message="Failed: no space left") if label == "int8" else Cancelled()
        if label == "int8":
            logged(run, INT8, "published")
            return Completed(message="Published: int8")
        logged(run, NF4, "rejected")
        return Completed(name="Rejected", message="Rejected: nf4")

    asked = spec(good, bad, prefetch=True)
    with workers(prefect, [good, bad], end):
        state = sweep(asked, return_state=True)
    named = FlowRunFilter.model_validate({"name": {"any_": [f"prefetch {model}" for model in (good, bad)]}})
    downloads = prefect.read_flow_runs(flow_run_filter=named)
    commits = {model: hub.model(model).at("main") for model in (good, bad)}
    assert {run.work_queue_name for run in downloads} == {"cpu"}
    assert {run.parameters["source"]["model"]: run.parameters["source"]["revision"] for run in downloads} == commits
    assert len(downloads) == len(commits)
    runs = [*children(prefect, good), *children(prefect, bad)]
    assert len(runs) == 4
    assert {len(run.parameters["recipe"]["variants"]) for run in runs} == {1}
    assert {run.parameters["recipe"]["source"]["revision"] for run in runs} == {hub.model(good).at("main")}
    assert len({run.parameters["recipe"]["name"] for run in runs}) == 4
    assert {run.parameters["recipe"]["track"]["experiment"] for run in runs} == {asked.name}

    assert state.is_failed()
    assert "1 cancelled, 1 failed, 1 published, 1 rejected" in state.message
    assert f"{bad} int8 failed (Failed: no space left)" in state.message
    assert f"{bad} nf4 cancelled" in state.message
    page = (tame_home / "runs" / asked.name / "leaderboard.md").read_text()
    cells = [line.replace("\\_", "_").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [(model.removeprefix("| "), variant, status) for model, variant, status, *_ in cells] == [
        (good, "baseline", "baseline"), (good, "int8", "published"), (good, "nf4", "rejected"),
        (bad, "int8", "failed"), (bad, "nf4", "cancelled"),
    ]  # fmt: skip
    for metrics in (INT8, NF4):
        for name in ("size_bytes", "perplexity_ratio", "kl_mean", "top1_agreement", "decode_tokens_per_second"):
            assert formatting.cell(name, metrics) in page  # as the card says it
    assert "good\\_one" in page
    kept = {"key": {"any_": [f"{asked.name}-table", f"{asked.name}-leaderboard"]}}
    assert len(prefect.read_artifacts(artifact_filter=ArtifactFilter.model_validate(kept))) == 2


def test_a_model_is_downloaded_ahead(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path, tame_home: Path
) -> None:
    hub.add_model(f"{owner}/base", checkpoint)
    states = [prefetch(Source(model=f"{owner}/base"), return_state=True) for _ in range(2)]
    assert [state.name for state in states] == ["Completed", "Cached"]
    snapshot = states[0].result()
    assert (Path(snapshot.path) / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    wrong = prefetch(Source(model=f"{owner}/none"), return_state=True)
    assert wrong.is_failed()
    assert f"{owner}/none" in wrong.message
    assert "\n" not in wrong.message


def test_a_sweep_that_was_killed_goes_on_with_its_runs(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    model = f"{owner}/base"
    hub.add_model(model, checkpoint)
    asked = spec(model)
    sweep_id = prefect.create_flow_run(sweep, parameters={"spec": asked}).id
    program = (
        "import sys; from uuid import UUID; from configs.schema import Sweep; from flows.sweep import plan, wait\n"
        "spec, sweep_id = Sweep.model_validate_json(sys.argv[1]), UUID(sys.argv[2])\n"
        "wait(plan(spec, sweep_id), sweep_id, 1)"
    )
    command = [sys.executable, "-c", program, asked.model_dump_json(), str(sweep_id)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PREFECT_API_URL": str(prefect.api_url)})
    while not children(prefect, model):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [first] = children(prefect, model)
    hub.write(model, "config.json", LOOK.replace("64", "128").encode())  # it has moved since
    with workers(prefect, [model], lambda run: Completed()):
        runs = wait(pairs.plan(asked, sweep_id), sweep_id, None)
    assert len(runs) == 2
    assert first.id in {run.id for run in runs.values()}
    hub.fail("/api/models", 503, times=100)  # all of it is started: nobody needs the Hub
    assert {run.id for run in wait(pairs.plan(asked, sweep_id), sweep_id, None).values()} == {
        run.id for run in runs.values()
    }
    assert len(children(prefect, model)) == 2


def test_no_more_than_the_limit_wait_at_a_time(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    models = [f"{owner}/{name}" for name in "ab"]
    for model in models:
        hub.add_model(model, checkpoint)
    asked = spec(*models, limit=1)
    sweep_id = prefect.create_flow_run(sweep, parameters={"spec": asked}).id
    with workers(prefect, models, lambda run: Completed()) as waited:
        assert len(wait(pairs.plan(asked, sweep_id), sweep_id, asked.limit)) == 4
    assert max(waited) == 1


def test_nothing_is_started_where_something_cannot_be_done(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    good, gone = f"{owner}/good", f"{owner}/gone"
    hub.add_model(good, checkpoint)
    state = sweep(spec(good, gone, "/nowhere/at/all"), return_state=True)
    assert state.is_failed()
    assert "nothing was started" in state.message
    assert gone in state.message
    assert "/nowhere/at/all" in state.message
    assert "\n" not in state.message
    twin = f"x{owner}/good"
    hub.add_model(twin, checkpoint)
    state = sweep(
        spec(good, twin, recipe={"publish": {"to": "hub", "repo": "me/{model}-{variant}"}}), return_state=True
    )
    assert f"both {good} and {twin} would be published to me/good-" in state.message
    assert children(prefect, good) == children(prefect, twin) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": ["a/*"]}, "takes models by name"),
        (
            {"models": ["a/b", "c/d"], "recipe": {"publish": {"to": "folder", "repo": "/x-{variant}"}}},
            "put {model} in it",
        ),
        (
            {"models": ["a/b"], "recipe": {"variants": [{"method": "int8", "double_quant": True}]}},
            "belongs to the 4-bit",
        ),
        ({"models": ["a/b"], "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(*values.pop("models"), **values)

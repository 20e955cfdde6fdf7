"""Watching models: the tests' Hub over HTTP, a real Prefect server, and the release runs that are on it afterwards."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State
from pydantic import ValidationError

from configs.schema import Watch
from flows.watch import watch
from tasks.fleet.watch import Row, look_at
from tests.hub import Hub
from tests.models import LOOK, weights

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.fleet",)


def spec(*models: str, **values: Any) -> Watch:
    recipe = {
        "variants": [{"method": "nf4"}],
        "evaluate": {"text": {"builtin": "python-docs"}},
        **values.pop("recipe", {}),
    }
    return Watch.model_validate({"models": list(models), "recipe": recipe, "settle_seconds": 0, **values})


def look(spec: Watch) -> dict[str, Row]:
    return {row.model: row for row in look_at(spec)}


def fire(spec: Watch) -> State[Any]:
    return watch(spec, return_state=True)


def runs(prefect: SyncPrefectClient, model: str) -> list[FlowRun]:
    """The release runs of a model, oldest first."""
    found = prefect.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": [f"model:{model}"]}}))
    return sorted(found, key=lambda run: run.created)


def end(prefect: SyncPrefectClient, run: FlowRun, state: State[Any]) -> None:
    prefect.set_flow_run_state(run.id, state, force=True)


def test_a_commit_is_released_once(prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path) -> None:
    model = f"{owner}/base"
    first = hub.add_model(model, checkpoint).at("main")
    assert fire(spec(model)).name == "Completed"
    [run] = runs(prefect, model)
    recipe = run.parameters["recipe"]
    assert {**recipe["source"], "model": model, "revision": first, "trust_remote_code": False} == recipe["source"]
    assert run.state.is_scheduled()
    assert run.work_queue_name == "default"  # no GPU was ever seen here

    assert look(spec(model))[model].action == "waits"
    hub.write(model, "model.safetensors", weights(1))
    assert look(spec(model))[model].action == "waits"  # never two at a time
    assert len(runs(prefect, model)) == 1

    end(prefect, run, Completed(message="Published: nf4"))
    rows = look(spec(model))
    assert rows[model].action == "started"
    _, newer = runs(prefect, model)
    assert newer.parameters["recipe"]["source"]["revision"] == hub.model(model).at("main") != first

    end(prefect, newer, Completed(name="Rejected", message="Rejected: kl_mean 0.131 > 0.1 for nf4"))
    for _ in range(2):
        assert fire(spec(model)).name == "Unchanged"
        assert "kl_mean 0.131" in look(spec(model))[model].why
    assert len(runs(prefect, model)) == 2
    # Another recipe is another release of the same commit.
    assert look(spec(model, recipe={"gate": {"max_mean_kl": 0.2}}))[model].action == "started"


def test_two_commits_within_a_minute_are_one_release(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    model = f"{owner}/base"
    repo = hub.add_model(model, checkpoint)
    assert look(spec(model, settle_seconds=60))[model].action == "settles"
    last = hub.write(model, "config.json", LOOK.replace("64", "128").encode())
    assert look(spec(model, settle_seconds=60))[model].action == "settles"
    assert runs(prefect, model) == []
    repo.dates[last] = repo.dates[last].replace(year=2025)
    look(spec(model, settle_seconds=60))
    [run] = runs(prefect, model)
    assert run.parameters["recipe"]["source"]["revision"] == last


def test_two_looks_at_once_start_one_release_and_import_no_torch(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    models = [f"{owner}/{name}" for name in "abc"]
    for model in models:
        hub.add_model(model, checkpoint)
    program = (
        "import sys; from configs.schema import Watch; from flows.watch import watch\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "watch(Watch.model_validate_json(sys.argv[1]))\n"
        "print({'torch', 'transformers', 'mlflow', 'datasets', 'lm_eval'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, spec(f"{owner}/*").model_dump_json()]
    environment = {**os.environ, "PREFECT_API_URL": str(prefect.api_url)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        fire(spec(f"{owner}/*"))
        assert other.communicate()[0] == "set()\n"
    assert [len(runs(prefect, model)) for model in models] == [1, 1, 1]


def test_failures_are_tried_again_a_few_times(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    model = f"{owner}/base"
    hub.add_model(model, checkpoint)
    asked = spec(model, attempts=2)
    look(asked)
    end(prefect, runs(prefect, model)[-1], Crashed())
    assert look(asked)[model].action == "waits"  # the automation may start it again
    end(prefect, runs(prefect, model)[-1], Failed(message="Failed: no space left"))
    assert look(asked)[model].why.startswith("attempt 2")
    end(prefect, runs(prefect, model)[-1], Failed(message="Failed: no space left"))
    rows = look(asked)
    assert rows[model].action == "given up"
    assert "failed 2 times" in rows[model].why
    assert "no space left" in rows[model].why
    assert len(runs(prefect, model)) == 2
    hub.write(model, "README.md", b"---\nlicense: mit\n---\n")
    assert look(asked)[model].action == "started"
    end(prefect, runs(prefect, model)[-1], Cancelled())
    assert look(asked)[model].action == "unchanged"


def test_a_release_started_by_somebody_else_is_waited_for(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    model = f"{owner}/base"
    hub.add_model(model, checkpoint)
    deployment = prefect.read_deployment_by_name("release/any")
    recipe = {"name": "by-hand", "source": {"model": model}, "variants": [{"method": "int8"}]}
    by_hand = prefect.create_flow_run_from_deployment(deployment.id, parameters={"recipe": recipe})
    end(prefect, by_hand, Running())
    assert look(spec(model))[model].action == "waits"
    end(prefect, by_hand, Completed())
    assert look(spec(model))[model].action == "started"


def test_one_model_that_cannot_be_seen_stops_no_other(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    gone, pickled, good = f"{owner}/gone", f"{owner}/pickled", f"{owner}/good"
    hub.add_model(good, checkpoint)
    (checkpoint.parent / "pickled").mkdir()
    (checkpoint.parent / "pickled" / "config.json").write_text(LOOK)
    (checkpoint.parent / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    hub.add_model(pickled, checkpoint.parent / "pickled")
    rows = look(spec(gone, pickled, good, str(checkpoint / "nowhere"), f"{owner}/x*", "nobody/x*"))
    assert rows[f"{owner}/x*"].why == rows["nobody/x*"].why == "nothing matches it"
    assert {row.action for row in rows.values()} == {"error", "refused", "started"}
    assert rows[good].action == "started"
    assert "pickled weights" in rows[pickled].why
    state = fire(spec(gone, good))
    assert state.is_failed()
    assert gone in state.message
    assert "does not exist" in state.message
    hub.fail("/api/models", 503, times=100)
    state = fire(spec(good))
    assert state.is_failed()
    assert "answers 503" in state.message
    assert len(runs(prefect, good)) == 1


def test_a_namespace_by_pattern_but_not_what_was_made_of_it(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    for number in range(12):  # two pages of the Hub's list
        hub.add_model(f"{owner}/tune-{number}", checkpoint)
    hub.add_model(f"{owner}/tune-3-nf4", checkpoint)
    hub.add_model(f"{owner}/other", checkpoint)
    asked = spec(
        f"{owner}/tune-*", f"{owner}/tune-1", recipe={"publish": {"to": "hub", "repo": owner + "/{model}-{variant}"}}
    )
    before = len(hub.requests)
    rows = look(asked)
    assert rows.keys() == {f"{owner}/tune-{number}" for number in range(12)}
    assert {row.action for row in rows.values()} == {"started"}
    for model in rows:
        [run] = runs(prefect, model)
        end(prefect, run, Completed())
    before = len(hub.requests)
    assert fire(asked).name == "Unchanged"
    assert len(hub.requests) - before == 3  # two pages, and the model that is named


def test_folders_are_told_by_their_content(
    prefect: SyncPrefectClient, tame_home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint)
    pattern = str(checkpoint.parent / "mod*")
    assert look(spec(pattern, settle_seconds=3600))[model].action == "settles"
    look(spec(model, pattern))
    [run] = runs(prefect, model)
    assert run.parameters["recipe"]["source"]["model"] == model
    end(prefect, run, Completed())
    os.utime(checkpoint / "config.json", (1, 1))
    assert look(spec(model))[model].action == "unchanged"
    (checkpoint / "config.json").write_text(LOOK.replace("64", "128"))
    assert look(spec(model))[model].action == "started"


def test_two_models_that_would_be_published_to_one_place(
    prefect: SyncPrefectClient, hub: Hub, checkpoint: Path
) -> None:
    a, b = f"a{uuid4().hex[:8]}/same", f"b{uuid4().hex[:8]}/same"
    for model in (a, b):
        hub.add_model(model, checkpoint)
    state = fire(spec(a, b, recipe={"publish": {"to": "hub", "repo": "me/{model}-{variant}"}}))
    assert state.is_failed()
    assert f"both {a} and {b} would be published to me/same-nf4" in state.message
    assert runs(prefect, a) == runs(prefect, b) == []


def test_a_model_goes_to_the_smallest_gpu_that_it_fits_on(
    prefect: SyncPrefectClient, hub: Hub, owner: str, checkpoint: Path
) -> None:
    model = f"{owner}/base"
    hub.add_model(model, checkpoint)
    look(spec(model, device="gpu"))
    [run] = runs(prefect, model)
    assert run.work_queue_name == "gpu-8gb"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": []}, "at least 1 item"),
        ({"models": ["a/b", "a/b"]}, "'a/b' twice"),
        ({"models": ["a/*"], "recipe": {"publish": {"to": "hub", "repo": "me/x"}}}, "put {model} in it"),
        ({"recipe": {"gate": {"max_task_drop": 0.1}}}, "needs evaluate.tasks"),
        ({"attempts": 0}, "greater than or equal to 1"),
    ],
)
def test_a_watch_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec(**{"models": ["a/b"], **values}) if "models" not in values else spec(*values.pop("models"), **values)

"""Deployments, the form's schema, workers and their devices, against a real Prefect server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from configs.errors import TameError
from configs.load import load_recipe
from configs.schema import Evaluate, Recipe, Source, Sweep, TextSource, Variant, Watch
from configs.settings import DEVICE_LIMIT
from flows.release import release
from infra.provision import FILE
from infra.up import _free_port
from tasks.download.task import download
from tasks.evaluate.task import evaluate_baseline
from tasks.fleet import work_queues
from tasks.quantize.task import quantize
from tasks.runtime.device import held

ROOT = Path(__file__).parents[1]
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    spec["name"]: spec for spec in yaml.safe_load(FILE.read_text(encoding="utf-8"))["deployments"]
}
GOOD: dict[str, Any] = {"name": "a", "source": {"model": "me/a"}, "variants": [{"method": "nf4"}]}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )


def tame(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(f"import tame; tame.main({list(arguments)!r})", **environment)


def test_deployments_are_the_shipped_recipes_and_no_schedule_is_on() -> None:
    shipped = {path.stem: load_recipe(path) for path in (ROOT / "configs").glob("*.yaml")}
    asked = {
        name: Recipe.model_validate(spec["parameters"]["recipe"])
        for name, spec in DEPLOYMENTS.items()
        if spec["entrypoint"] == "flows.release.release" and name != "any"
    }
    assert asked == shipped
    Watch.model_validate(DEPLOYMENTS["watch"]["parameters"]["spec"])
    Sweep.model_validate(DEPLOYMENTS["sweep"]["parameters"]["spec"])
    for spec in DEPLOYMENTS.values():
        assert spec["work_pool"]["name"] == work_queues.POOL
        assert spec["work_pool"]["work_queue_name"] in work_queues.QUEUES
        assert not any(schedule["active"] for schedule in spec.get("schedules", []))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Of the parameters of a release, as Prefect's form and server have it."""
    return parameter_schema(release).model_dump()


def test_every_field_of_the_form_is_described(schema: dict[str, Any]) -> None:
    assert schema["required"] == ["recipe"]
    for name, definition in schema["definitions"].items():
        for key, field in definition["properties"].items():
            assert "description" in field or "$ref" in field, f"{name}.{key}"
            assert key in definition.get("required", []) or "default" in field, f"{name}.{key}"


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("*.yaml")])
def test_the_schema_takes_what_the_recipe_takes(name: str, schema: dict[str, Any]) -> None:
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    written = DEPLOYMENTS[name]["parameters"]["recipe"]
    for asked in (written, recipe.model_dump(mode="json"), recipe.model_dump(mode="json", exclude_unset=True)):
        validate({"recipe": asked}, schema, raise_on_error=True)
    validate({"recipe": written}, schema, raise_on_error=True, ignore_required=True)  # as at registration


WRONG = {
    "no method": {"variants": [{}]},
    "no variant": {"variants": []},
    "a window of one": {"evaluate": {"window": 1}},
    "a name that is a path": {"name": "a/b"},
    "an unknown key": {"evaluate": {"windows": 512}},
    "double_quant with int8": {"variants": [{"method": "int8", "double_quant": True}]},
    "compute_dtype with int8": {"variants": [{"method": "int8", "compute_dtype": "float16"}]},
    "two equal variants": {"variants": [{"method": "nf4"}, {"method": "nf4"}]},
    "files and a data set": {"evaluate": {"text": {"dataset": "me/text", "files": ["a.txt"]}}},
    "a built-in and a data set": {"evaluate": {"text": {"dataset": "me/text", "builtin": "python-docs"}}},
    "no text": {"evaluate": {"text": {"split": "test"}}},
    "a task twice": {"evaluate": {"tasks": ["piqa", "piqa"]}},
    "a task limit without tasks": {"gate": {"max_task_drop": 0.1}},
    "one repo for two": {"variants": [{"method": "nf4"}, {"method": "int8"}], "publish": {"to": "hub", "repo": "me/a"}},
    "no repo id": {"publish": {"to": "hub", "repo": "me/a/b"}},
    "a limit and no measurement": {"evaluate": None, "gate": {"max_mean_kl": 0.1}},
    "a fit and no measurement": {"evaluate": None, "variants": [{"method": "nf4", "fit": {"max_bytes": "1GB"}}]},
    "a share above one": {"gate": {"min_top1_agreement": 1.5}},
}


def test_the_schema_takes_the_recipe_that_is_made_wrong_below(schema: dict[str, Any]) -> None:
    validate({"recipe": GOOD}, schema, raise_on_error=True)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_the_schema_refuses_what_the_recipe_refuses(change: dict[str, Any], schema: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({**GOOD, **change})
    assert validate({"recipe": {**GOOD, **change}}, schema)


PROVISION = """
import sys, tame
for _ in range(2):
    try:
        tame.main(["provision"])
    except SystemExit as ended:
        assert not ended.code
    print(*{"torch", "mlflow"} & sys.modules.keys(), "imported")
"""


@pytest.fixture(scope="module")
def provisioned(prefect_url: str) -> Iterator[tuple[str, str, str]]:
    """The server's API, and what provisioning printed the first and the second time."""
    done = python(PROVISION, PREFECT_API_URL=prefect_url)
    assert done.returncode == 0, done.stderr
    first, _, second = done.stdout.partition("imported\n")
    yield prefect_url, first, second
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        for automation in client.read_automations():
            client.delete_automation(automation.id)


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


def test_provisioning_is_done_once_and_without_torch(provisioned: tuple[str, str, str]) -> None:
    api, first, second = provisioned
    assert second.splitlines() == ["everything is there", "imported"]
    assert "deployment release/demo" in first.splitlines()
    assert first.endswith("\n")  # neither torch nor mlflow
    queues = ask(f"{api}/work_pools/{work_queues.POOL}/queues/filter", {})
    assert {queue["name"] for queue in queues} == set(work_queues.QUEUES)
    deployments = {found["name"]: found for found in ask(f"{api}/deployments/filter", {})}
    for name, spec in DEPLOYMENTS.items():
        found = deployments[name]
        assert found["parameters"] == spec.get("parameters", {})
        assert found["enforce_parameter_schema"]
        assert found["work_queue_name"] == spec["work_pool"]["work_queue_name"]
        assert [schedule["active"] for schedule in found["schedules"]] == [False] * len(spec.get("schedules", []))


def test_the_server_refuses_a_wrong_recipe_before_a_worker_sees_it(provisioned: tuple[str, str, str]) -> None:
    api, _, _ = provisioned
    deployment = ask(f"{api}/deployments/name/release/any")["id"]
    wrong = {**GOOD, "evaluate": {"window": 1}}
    with pytest.raises(urllib.error.HTTPError, match="409") as refused:
        ask(f"{api}/deployments/{deployment}/create_flow_run", {"parameters": {"recipe": wrong}})
    assert "1 is less than the minimum of 2" in refused.value.read().decode()


HOLD = """
import time
from tasks.runtime.device import held
with held():  # everything is imported, and the server was reached
    pass
print("ready", flush=True)
input()
with held():
    print(time.time())
"""


def test_two_processes_never_hold_one_device_together(
    provisioned: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api, _, _ = provisioned
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("gpu:here:0", 1)
    monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:here:0")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PREFECT_API_URL": api}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, cwd=ROOT, **pipes) as other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == "ready\n"
        with temporary_settings({PREFECT_API_URL: api}), held():
            other.stdin.write("go\n")
            other.stdin.flush()
            time.sleep(2)
            ended = time.time()
        assert ended <= float(other.communicate()[0])


def test_a_device_without_a_limit_is_an_error_and_none_is_none(
    prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held():
        pass
    monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:nowhere:0")
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        began = time.monotonic()
        with pytest.raises(TameError, match=r"gpu:nowhere:0: .*must be created.*tame worker"), held():
            raise AssertionError(f"held after {time.monotonic() - began:.1f} s")


def test_stages_that_compute_hold_their_device(
    tiny_llama: Path, tame_home: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = download(Source(model=str(tiny_llama)))
    spec = Evaluate(text=TextSource(builtin="python-docs"), window=64, max_tokens=128)
    monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:nowhere:0")  # asked for before anything is computed
    with temporary_settings({PREFECT_API_URL: prefect_url}):
        with pytest.raises(TameError, match="gpu:nowhere:0"):
            quantize(snapshot, Variant(method="int8"))
        with pytest.raises(TameError, match="gpu:nowhere:0"):
            evaluate_baseline(snapshot, spec)


def test_what_fails_while_a_device_is_held_is_told_as_it_is(
    provisioned: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        temporary_settings({PREFECT_API_URL: provisioned[0]}),
        get_client(sync_client=True) as client,
    ):
        client.upsert_global_concurrency_limit_by_name("gpu:here:1", 1)
        monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:here:1")
        for _ in range(2):  # and it is given back
            with pytest.raises(ZeroDivisionError), held():
                print(1 / 0)


def test_a_server_that_is_away_is_waited_for_and_costs_no_work(
    provisioned: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:here:2")
    monkeypatch.setattr("tasks.runtime.device.PAUSE", 0.1)
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings({PREFECT_API_URL: provisioned[0]}):
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name("gpu:here:2", 1)
        with ExitStack() as gone:
            with held():
                gone.enter_context(temporary_settings(away))
            monkeypatch.setenv(DEVICE_LIMIT.name, "gpu:here:3")
            monkeypatch.setattr("tasks.runtime.device.PATIENCE", 4.0)
            with pytest.raises(TameError, match="did not answer for 4 s"), held():
                raise AssertionError
    assert "gpu:here:2 could not be given back" in caplog.text
    assert "waiting for it before taking gpu:here:3" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--gpu", "99"], 2, "--gpu 99: there is no such GPU"), (["--pool", "nowhere"], 1, "has no work pool 'nowhere'")],
)
def test_a_worker_says_what_it_lacks(prefect_url: str, arguments: list[str], code: int, said: str) -> None:
    ended = tame("worker", *arguments, PREFECT_API_URL=prefect_url)
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1)
    assert said in ended.stderr


def test_a_worker_without_a_server_says_so() -> None:
    unnamed = tame("worker")
    assert (unnamed.returncode, unnamed.stderr.count("\n")) == (2, 1)
    assert "PREFECT_API_URL is not set" in unnamed.stderr


def test_up_on_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    refused = tame("up", "--host", "192.0.2.1", TAME_HOME=str(tmp_path))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 2)  # a warning, and the refusal
    assert "--host 192.0.2.1" in refused.stderr.splitlines()[-1]


PORT = """
import sys
from infra.up import _free_port
with _free_port("127.0.0.1", int(sys.argv[1])) as port:
    print(port, flush=True)
    input()
"""


def test_two_that_come_up_at_once_are_given_two_ports() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        wanted = probe.getsockname()[1]
    command = [sys.executable, "-c", PORT, str(wanted)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = int(other.stdout.readline())  # and nothing listens on it yet
        with _free_port("127.0.0.1", wanted) as ours:
            assert theirs == wanted < ours
            other.kill()  # gives it back
            other.wait()
            with _free_port("127.0.0.1", wanted) as again:
                assert again == wanted
    with socket.create_server(("127.0.0.1", wanted)), _free_port("127.0.0.1", wanted) as ours:
        assert ours > wanted


def test_what_is_wrong_within_an_object_that_may_be_left_out_is_said_of_its_field() -> None:
    """Prefect's form says of a value that may be several things only that it is none of them."""
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools.validation import build_error_obj, validate

    from flows.release import release

    schema = parameter_schema(release).model_dump(exclude_unset=True)
    recipe = {"name": "it", "source": {"model": "m"}, "variants": [{"method": "nf4"}], "evaluate": {"window": 1}}
    errors = build_error_obj(validate({"recipe": recipe}, schema, preprocess=True, ignore_required=True))
    assert {"property": "window", "errors": ["1 is less than the minimum of 2"]} in [
        inner for outer in errors["errors"][0]["errors"] for inner in outer["errors"]
    ]
    assert not validate({"recipe": {**recipe, "evaluate": None}}, schema, preprocess=True, ignore_required=True)

"""`tame up` from nothing: the form in a real browser, a run that it starts, a schedule, a restart, and nothing left behind.

E2E_SHOTS=DIR keeps screenshots there.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from tests.e2e.browser import Browser, executable
from tests.e2e.test_report_page import keep
from tests.hub import Hub

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(executable() is None, reason="needs Chromium"),
]

ROOT = Path(__file__).parents[2]
FIELD = """((labels, inside) => {
  const all = [...document.querySelectorAll('.p-label__label')];
  let at = -1;
  for (const label of labels) {
    at = all.findIndex((e, i) => i > at && e.innerText.trim().replace(' (Optional)', '') === label);
    if (at < 0) return null;
  }
  return [...all[at].closest('.p-label').querySelectorAll(inside)].find(e => !e.closest('.schema-form-property__header'));
})"""


def processes_of(home: str) -> list[str]:
    """Command lines of what runs with the TAME_HOME `home`, but for this process."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TAME_HOME") == home and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return [line for line in found if line]


class Up:
    """`tame up` of a TAME_HOME of its own, with `hub` as its Hub, or none; as a context it starts and ends it."""

    def __init__(self, folder: Path, hub: Hub | None = None) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "HOME": str(folder), "TAME_HOME": str(folder / "tame"), "HF_HUB_OFFLINE": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        }  # fmt: skip
        for name in ("PREFECT_HOME", "PREFECT_RESULTS_LOCAL_STORAGE_PATH", "PREFECT_LOGGING_LEVEL"):
            self.environment.pop(name, None)
        if hub:
            del self.environment["HF_HUB_OFFLINE"]
            self.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def start(self) -> None:
        began = time.monotonic()
        command = [sys.executable, "-m", "tame", "up"]
        self.process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        said = [self.process.stdout.readline() for _ in range(2)]
        assert all(said), self.process.wait()
        self.prefect = said[0].split()[1].removesuffix("/deployments")
        self.mlflow = said[1].split()[1]
        print(f"tame up: {time.monotonic() - began:.0f} s until all was healthy, load {os.getloadavg()[0]:.1f}")

    def again(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tame", "up"]
        return subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)

    def ours(self) -> list[str]:
        """Command lines of what runs with this TAME_HOME."""
        return processes_of(self.environment["TAME_HOME"])

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.prefect}/api{path}", data, {"Content-Type": "application/json"})
        for pause in (1, 2, 4, 8, 0):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or not pause:  # its database is locked, as many want it on a busy machine
                    raise
                time.sleep(pause)
        raise AssertionError

    def deployment(self, name: str) -> str:
        return str(self.ask(f"/deployments/name/{name}")["id"])

    def ended(self, run: str, seconds: float = 600) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (found := self.ask(f"/flow_runs/{run}"))["state"]["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
            assert time.monotonic() < end, (found["state"], (self.folder / "tame/logs/worker-cpu.log").read_text())
            time.sleep(0.5)
        return dict(found)

    def tasks(self, run: str) -> dict[str, str]:
        """States of a run's tasks, by the task's name."""
        found = self.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {task["name"]: task["state"]["name"] for task in found}


def recipe(model: Path) -> dict[str, Any]:
    return {
        "name": "form",
        "source": {"model": str(model)},
        "variants": [{"method": "int8"}],
        "evaluate": {
            "text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 512,
            "speed": {"prompt_tokens": 16, "new_tokens": 4},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("up")) as up:
        yield up


def test_the_form_refuses_what_is_wrong_and_starts_what_is_right(up: Up, tiny_llama: Path) -> None:
    with Browser() as browser:

        def field(labels: list[str], inside: str = "textarea, input, select") -> str:
            found = f"{FIELD}({json.dumps(labels)}, {json.dumps(inside)})"
            browser.until(lambda: browser.ask(f"!!{found}"), 60, " > ".join(labels))
            return found

        def put(labels: list[str], value: str) -> None:
            # As typing does: Vue hears of a value by its events.
            browser.ask(
                f"""(e => {{ Object.getOwnPropertyDescriptor(Object.getPrototypeOf(e), 'value').set.call(e, {json.dumps(value)});
                ['input', 'change'].forEach(kind => e.dispatchEvent(new Event(kind, {{bubbles: true}}))) }})({field(labels)})"""
            )

        def press(labels: list[str], button: str) -> None:
            buttons = f"[...{field(labels, 'button')}.parentElement.querySelectorAll('button')]"
            browser.ask(f"{buttons}.find(e => e.innerText.trim() === {json.dumps(button)}).click()")

        browser.open(f"{up.prefect}/deployments/deployment/{up.deployment('release/any')}/run", 1400, 3000)
        browser.see("Licence Check", 120)
        put(["Name"], "form")
        put(["Model"], str(tiny_llama))
        press(["Variants"], "Add item")
        put(["Method"], "int8")
        browser.ask(f"{field(['Double Quant'], '[role=switch]')}.click()")
        put(["Window"], "1")
        put(["Max Tokens"], "512")
        put(["Prompt Tokens"], "16")
        put(["New Tokens"], "4")
        press(["Evaluate", "Dataset"], "None")
        press(["Evaluate", "Builtin"], "str")
        put(["Evaluate", "Builtin"], "python-docs")
        time.sleep(1)  # the form collects changes
        browser.click("Submit")
        browser.see("1 is less than the minimum of 2")
        browser.see("False was expected")  # int8 has no double_quant
        keep(browser, "form-refused")
        assert up.ask("/flow_runs/count", {}) == 0
        browser.ask(f"{field(['Double Quant'], '[role=switch]')}.click()")
        put(["Window"], "64")
        time.sleep(1)
        browser.click("Submit")  # which only looks at the values again, after it has refused some
        time.sleep(5)
        if not up.ask("/flow_runs/count", {}):
            browser.click("Submit")
        browser.until(lambda: up.ask("/flow_runs/count", {}) == 1, 60, "the run")
        [run] = up.ask("/flow_runs/filter", {})
        ended = up.ended(run["id"])
        assert ended["state"]["name"] == "Completed", ended["state"]
        browser.open(f"{up.prefect}/runs/flow-run/{run['id']}", 1400, 1000)
        browser.see("form: use int8", 120)
        browser.see("Completed")
        time.sleep(3)  # the graph is drawn on a canvas that says nothing of when it is done
        keep(browser, "form-run")
        browser.open(up.mlflow, 1400, 900)
        browser.see("form", 120)
    written = json.loads((up.folder / "tame/runs/form/result.json").read_text())
    assert written["exit_code"] == 0
    assert written["recipe"]["evaluate"]["text"]["dataset"] is None


def test_a_schedule_fires_by_itself_and_again_with_nothing_new(up: Up, tiny_llama: Path) -> None:
    deployment = up.deployment("release/any")
    schedule = {"schedule": {"interval": 20}, "active": True, "parameters": {"recipe": recipe(tiny_llama)}}
    before = {run["id"] for run in up.ask("/flow_runs/filter", {})}
    [made] = up.ask(f"/deployments/{deployment}/schedules", [schedule])
    end = time.monotonic() + 600
    fired: list[dict[str, Any]] = []
    while len(fired) < 2:
        assert time.monotonic() < end, "the schedule did not fire twice"
        time.sleep(1)
        done = up.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
        fired = [run for run in done if run["id"] not in before]
    request = urllib.request.Request(
        f"{up.prefect}/api/deployments/{deployment}/schedules/{made['id']}", method="DELETE"
    )
    urllib.request.urlopen(request)
    first, second = sorted(fired, key=lambda run: run["start_time"])[:2]
    assert first["auto_scheduled"]
    assert second["auto_scheduled"]
    states = up.tasks(second["id"])
    assert {states[name] for name in ("evaluate baseline", "quantize int8", "evaluate int8")} == {"Cached"}, states
    print(f"a firing with nothing new: {second['total_run_time']:.1f} s, load {os.getloadavg()[0]:.1f}")


def test_a_wrong_recipe_is_refused_by_the_server_and_by_the_flow(up: Up, tiny_llama: Path) -> None:
    deployment = up.deployment("release/any")
    wrong = {**recipe(tiny_llama), "variants": [{"method": "int8", "double_quant": True}]}
    with pytest.raises(urllib.error.HTTPError, match="409"):
        up.ask(f"/deployments/{deployment}/create_flow_run", {"parameters": {"recipe": wrong}})
    beyond = recipe(tiny_llama)  # what JSON schema cannot say
    beyond["evaluate"] = {**beyond["evaluate"], "window": 400, "max_tokens": 300}
    run = up.ask(f"/deployments/{deployment}/create_flow_run", {"parameters": {"recipe": beyond}})
    state = up.ended(run["id"])["state"]
    assert state["name"] == "Failed"
    assert "max_tokens 300 is less than one window of 400 tokens" in state["message"]


def test_a_second_one_is_refused_and_a_restart_goes_on(up: Up, tiny_llama: Path) -> None:
    again = up.again()
    assert again.returncode == 1
    assert "runs already" in again.stderr
    assert up.prefect in again.stderr
    assert again.stderr.count("\n") == 1
    deployment = up.deployment("release/any")
    waiting = {**recipe(tiny_llama), "name": "waiting", "variants": [{"method": "nf4"}]}
    run = up.ask(f"/deployments/{deployment}/create_flow_run", {"parameters": {"recipe": waiting}})
    known = up.ask("/flow_runs/count", {})
    began = time.monotonic()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    print(f"Ctrl-C: {time.monotonic() - began:.0f} s")
    assert up.ours() == []
    up.start()
    assert up.ask("/flow_runs/count", {}) == known
    assert up.ended(run["id"])["state"]["name"] == "Completed"


def test_killed_it_leaves_nothing(up: Up) -> None:
    assert len(up.ours()) >= 5
    up.process.kill()
    up.process.wait()
    end = time.monotonic() + 60
    while left := up.ours():
        assert time.monotonic() < end, left
        time.sleep(0.5)

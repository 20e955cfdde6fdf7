"""Approval from end to end: `tame up`, the form in a real browser, a Hub; and that nothing is held while a person thinks.

E2E_SHOTS=DIR keeps screenshots there.
"""

import hashlib
import json
import signal
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import Browser, executable
from tests.e2e.test_report_page import keep
from tests.e2e.test_up import Up
from tests.hub import Hub

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(executable() is None, reason="needs Chromium"),
]
MULTIPLE = "[...document.querySelectorAll('select')].find(e => e.multiple && e.options.length)"
SELECT = f"""((names) => {{ const e = {MULTIPLE};
  [...e.options].forEach(o => o.selected = names.includes(o.innerText.trim()));
  e.dispatchEvent(new Event('change', {{bubbles: true}})) }})"""
WRITE = """((text) => { const e = [...document.querySelectorAll('textarea')].at(-1);
  Object.getOwnPropertyDescriptor(Object.getPrototypeOf(e), 'value').set.call(e, text);
  ['input', 'change'].forEach(kind => e.dispatchEvent(new Event(kind, {bubbles: true}))) })"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("up"), hub) as up:
        yield up


def state(up: Up, run: str) -> str:
    """The name of a run's state; empty where the server is too busy to tell."""
    try:
        return str(up.ask(f"/flow_runs/{run}")["state"]["name"])
    except urllib.error.HTTPError:
        return ""


def suspended(up: Up, model: Path, name: str, variants: list[str]) -> str:
    """A run that waits for an answer, and whose process has ended."""
    recipe = {
        "name": name,
        "source": {"model": str(model)},
        "variants": [{"method": method} for method in variants],
        "evaluate": {
            "text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 256, "speed": None, "samples": None,
        },
        "publish": {"to": "hub", "repo": "me/{name}-{variant}", "approve": True},
    }  # fmt: skip
    body = {"parameters": {"recipe": recipe}}
    run = up.ask(f"/deployments/{up.deployment('release/any')}/create_flow_run", body)["id"]
    Browser.until(lambda: state(up, run) == "Suspended", 600, "the question")
    Browser.until(
        lambda: not any("prefect.engine" in line or "forkserver" in line for line in up.ours()), 60, "its end"
    )
    limits = up.ask("/v2/concurrency_limits/filter", {})
    assert [limit["active_slots"] for limit in limits if limit["name"].startswith("cpu:")] == [0]
    return str(run)


def answer(up: Up, run: str, publish: list[str], note: str, public: bool = False) -> None:
    """Fill in the form as a person does."""
    with Browser() as browser:
        browser.open(f"{up.prefect}/runs/flow-run/{run}", 1300, 1000)
        browser.see("Suspended", 120)
        browser.click("Resume")
        browser.see("If you choose none, nothing is published", 120)
        browser.until(lambda: browser.ask(f"!!{MULTIPLE}"), 60, "the variants to choose")
        browser.ask(f"{SELECT}({json.dumps(publish)})")
        browser.ask(f"{WRITE}({json.dumps(note)})")
        if public:
            browser.ask("[...document.querySelectorAll('[role=switch], .p-toggle__control')].at(-1).click()")
        time.sleep(1)  # the form collects changes
        keep(browser, f"approval-{note.replace(' ', '-')}")
        browser.click("Submit")
        browser.until(lambda: state(up, run) not in ("", "Suspended"), 60, "the answer")


def result_of(up: Up, name: str) -> dict[str, Any]:
    return dict(json.loads((up.folder / f"tame/runs/{name}/result.json").read_text()))


def test_approved_after_a_restart_it_publishes_what_was_shown(up: Up, hub: Hub, tiny_llama: Path) -> None:
    run = suspended(up, tiny_llama, "yes", ["int8", "nf4"])
    assert not hub.repos
    text = up.ask(
        f"/flow_runs/{run}/input/{up.ask(f'/flow_runs/{run}')['state']['state_details']['run_input_keyset']['description']}"
    )
    made = set(up.tasks(run))
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    up.start()
    assert up.ask(f"/flow_runs/{run}")["state"]["name"] == "Suspended"
    answer(up, run, ["nf4"], "as discussed", public=True)
    ended = up.ended(run)["state"]
    assert ended["name"] == "Partly rejected", ended
    assert "a person did not approve it: as discussed for int8" in ended["message"]
    assert set(up.tasks(run)) - made == {"publish nf4"}  # nothing was made again
    assert [name for _, name in hub.repos] == ["me/yes-nf4"]
    assert not hub.model("me/yes-nf4").private
    assert f"sha256 {hashlib.sha256(hub.read('me/yes-nf4', 'README.md')).hexdigest()[:12]}" in text
    result = result_of(up, "yes")
    files = result["variants"][1]["artifact"]["files"]
    assert {name: hashlib.sha256(hub.read("me/yes-nf4", name)).hexdigest() for name in files} == files
    assert result["approval"] == {"variants": ["nf4"], "private": False, "note": "as discussed", "answered": True}


def test_refused_it_is_rejected_with_the_note(up: Up, hub: Hub, tiny_llama: Path) -> None:
    run = suspended(up, tiny_llama, "no", ["nf4"])
    answer(up, run, [], "the licence is not clear")
    ended = up.ended(run)["state"]
    assert (ended["type"], ended["name"]) == ("COMPLETED", "Rejected")
    assert "a person did not approve it: the licence is not clear" in ended["message"]
    assert result_of(up, "no")["exit_code"] == 3
    assert ("models", "me/no-nf4") not in hub.repos
    with Browser() as browser:
        browser.open(up.mlflow, 1400, 900)
        browser.see("no", 120)


def test_nobody_answers(up: Up, hub: Hub, tiny_llama: Path) -> None:
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    up.environment["TAME_APPROVAL_HOURS"] = str(15 / 3600)
    up.start()
    run = suspended(up, tiny_llama, "silence", ["nf4"])
    Browser.until(lambda: state(up, run) not in ("", "Suspended"), 120, "the end of patience")
    assert up.ended(run)["state"]["name"] == "Rejected"
    assert "nobody approved it in time for nf4" in up.ask(f"/flow_runs/{run}")["state"]["message"]
    assert ("models", "me/silence-nf4") not in hub.repos

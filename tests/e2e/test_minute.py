"""The first minute in Prefect: from its front page to "this model, nf4, publish to me", as a person with a mouse does it.

The seconds of a person are those of the keystroke-level model (Card, Moran, Newell, 1980): 1.35 to decide what to do next, 1.1 to
point, 0.2 to press a button or, typing, 0.28 a key. They are printed, and in benchmarks/RESULTS.md. E2E_SHOTS=DIR keeps
screenshots there.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

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
DECIDE, POINT, PRESS, KEY = 1.35, 1.1, 0.2, 0.28
SEEN = "[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {} && e.getBoundingClientRect().width).at(-1)"
BELOW = """(label => {{ let e = label;
  while (e && !e.querySelector('textarea, input')) e = e.parentElement;
  return e?.querySelector('textarea, input') }})({})"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with the text that is measured on where nobody names one."""
    folder = tmp_path_factory.mktemp("wikitext")
    card = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    with Hub() as hub:
        hub.add_dataset("Salesforce/wikitext", folder)
        yield hub


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("up"), hub) as up:
        yield up


class Person:
    """Somebody before a browser, and the seconds that their actions take."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.seconds = browser, 0.0

    def click(self, text: str) -> None:
        """Point at the innermost thing that says `text`, and press."""
        self._press(SEEN.format(json.dumps(text)), text)

    def write(self, label: str, text: str) -> None:
        """Click into the field below `label`, and type in place of what it has."""
        known = f"({SEEN.format(json.dumps(label))} ?? {SEEN.format(json.dumps(f'{label} (Optional)'))})"
        field = BELOW.format(known)
        self._press(field, label)
        self.browser.ask(f"{field}.select()")
        self.browser.call("Input.insertText", text=text)
        self.seconds += KEY * len(text)

    def _press(self, element: str, what: str) -> None:
        self.browser.until(lambda: self.browser.ask(f"!!{element}"), 60, what)
        self.browser.ask(f"{element}.scrollIntoView({{block: 'nearest'}})")
        place = f"""(e => {{ const r = e.getBoundingClientRect(), at = [r.x + r.width / 2, r.y + r.height / 2];
          const seen = document.elementFromPoint(...at);
          return e.contains(seen) || seen?.closest('button, a')?.contains(e) ? at : null }})({element})"""
        at = None
        while at is None or at != self.browser.ask(place):
            at = self.browser.ask(place)  # it moves while the page is coming, and a message may lie over it
            time.sleep(0.3)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.browser.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)
        self.seconds += DECIDE + POINT + PRESS


@pytest.mark.parametrize("pages", ["V2", "V1"])
def test_from_the_front_page_to_a_published_model(
    up: Up, hub: Hub, tiny_llama: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"org/tiny-{pages.lower()}"
    hub.add_model(model, tiny_llama)
    with Browser() as browser:
        person = Person(browser)
        browser.open(up.prefect, 1300, 1000)
        if pages == "V1":
            person.click("Switch to V1 UI")
            person.click("Skip feedback and switch")
            browser.until(lambda: "/v2" not in browser.ask("location.pathname"), 60, "the other pages")
            person.seconds = 0.0
        person.click("Deployments")
        person.click("model")
        person.click("Run")
        person.click("Custom run")
        browser.see("Publish to", 120)
        person.write("Publish to", "not a name")
        person.click("Submit")
        browser.see("does not match", 60)
        keep(browser, f"minute-{pages}-refused", whole=False)
        assert not hub_has(hub, model)
        before = person.seconds
        person.write("Model", model)
        person.write("Publish to", "me")
        keep(browser, f"minute-{pages}-filled", whole=False)
        for _ in range(3):  # after a refusal, V2 hears of the second click alone
            person.click("Submit")
            time.sleep(5)
            if started := [run for run, parameters in runs(up) if model in parameters]:
                break
        keep(browser, f"minute-{pages}-submitted", whole=False)
    with capsys.disabled():
        print(f"\n{pages}: {person.seconds:.0f} s of a person, {before:.0f} of them up to the field that was refused")
    [run] = started
    ended = up.ended(run)["state"]
    assert ended["name"] == "Completed", ended
    assert hub_has(hub, model)


def runs(up: Up) -> list[tuple[str, str]]:
    """Id and parameters of all runs."""
    return [(run["id"], json.dumps(run["parameters"])) for run in up.ask("/flow_runs/filter", {})]


def hub_has(hub: Hub, model: str) -> bool:
    """Whether a quantized `model` is there."""
    return any(name.startswith(f"me/{model.rpartition('/')[2]}") for _, name in hub.repos)

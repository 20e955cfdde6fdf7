"""The report and the history in a real browser: phone and desk, light and dark, paper; nothing asked of the network.

E2E_SHOTS=DIR keeps the screenshots there; E2E_AXE=axe.min.js adds axe-core's accessibility rules.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.report import html as report
from tests.e2e.browser import Browser, executable
from tests.results import make

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(executable() is None, reason="needs Chromium")]

CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(channel); return 0.2126*r + 0.7152*g + 0.0722*b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255, 255, 255)' };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const drawn = e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color;
    const [a, b] = [light(drawn), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.tagName + ' ' + e.textContent.trim().slice(0, 30) + ' ' + drawn);
  }
  return low })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(report.render(make(folder / "evidence")))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_reads_on_a_phone_and_a_desk_by_day_and_by_night(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.requests.clear()
    browser.open(page.as_uri(), width, 900, scheme)
    assert browser.requests == [page.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(CONTRAST) == []
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)"
    )
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
    assert browser.ask(smallest) > 9  # pixels
    outside = """[...document.querySelectorAll('svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(t => {
        const a = svg.getBoundingClientRect(), b = t.getBoundingClientRect();
        return b.left < a.left - 1 || b.right > a.right + 1 }).map(t => t.textContent))"""
    assert browser.ask(outside) == []
    keep(browser, f"report-{width}-{scheme}")


def test_it_prints(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri(), 794, 1123, "dark", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("document.documentElement.scrollWidth") <= 794
    keep(browser, "report-paper")


def test_accessibility_rules(browser: Browser, page: Path) -> None:
    """What needs no library: names, headings in order, a language, tables with heads; the rest by axe-core, if given."""
    browser.open(page.as_uri())
    assert browser.ask("document.documentElement.lang") == "en"
    assert browser.ask("document.querySelectorAll('h1').length") == 1
    levels = browser.ask("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert browser.ask(
        "[...document.querySelectorAll('[role=img],[role=region]')].every(e => e.ariaLabel || e.getAttribute('aria-labelledby'))"
    )
    assert browser.ask("[...document.querySelectorAll('table')].every(t => t.querySelector('thead th[scope=col]'))")
    if axe := os.environ.get("E2E_AXE"):
        for scheme in ("light", "dark"):
            browser.open(page.as_uri(), 390, 900, scheme)
            browser.ask(Path(axe).read_text() + "; 1")
            found: dict[str, Any] = json.loads(browser.ask("axe.run().then(r => JSON.stringify(r))"))
            wrong = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]
            assert wrong == []
            assert len(found["passes"]) > 20


def keep(browser: Browser, name: str, whole: bool = True) -> None:
    """Save what is seen, where somebody wants to look at it."""
    if folder := os.environ.get("E2E_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.screenshot(Path(folder) / f"{name}.png", whole)

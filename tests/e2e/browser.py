"""Chromium without a window, driven over its DevTools protocol: enough to open a page, ask it things and look at it."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--remote-debugging-port=0",
]


def executable() -> str | None:
    """Chromium or Chrome, if it is installed."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


class Browser:
    """One tab. `requests` has every address that its pages asked for."""

    def __enter__(self) -> Self:
        self.profile = tempfile.mkdtemp(prefix="tame-browser-")
        command = [str(executable()), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(self.profile) / "DevToolsActivePort"
        self.until(lambda: port.exists() and port.read_text().count("\n") >= 1, 60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list") as answer:
            tab = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = connect(tab["webSocketDebuggerUrl"], max_size=None, ping_interval=None)
        self.numbers = itertools.count(1)
        self.requests: list[str] = []
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """One DevTools command and its result."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """Load a page as a screen of that size and colour scheme shows it, or as `print` does."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.call("Page.navigate", url=url)
        self.until(lambda: self.ask("document.readyState") == "complete" and self.ask("location.href") != "about:blank")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def see(self, text: str, seconds: float = 60) -> None:
        """Wait until the page shows `text`."""
        self.until(lambda: text in (self.ask("document.body && document.body.innerText") or ""), seconds, text)

    def click(self, text: str) -> None:
        """Click the innermost thing whose text is `text`."""
        found = f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(text)}).at(-1)"
        self.until(lambda: self.ask(f"!!{found}"), 60, text)
        self.ask(f"{found}.click()")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as PNG."""
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))

    @staticmethod
    def until(condition: Any, seconds: float = 60, what: str = "the page") -> None:
        """Wait for `condition`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not come in {seconds:.0f} s"
            time.sleep(0.2)


def open_variants(browser: Browser, mlflow: str, experiment: str, width: int, height: int) -> None:
    """Open MLflow's saved table of an experiment, its newest release unfolded to its variants."""
    browser.open(mlflow, width, height)
    browser.ask("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    browser.open(f"{mlflow}/#/experiments/{experiment}/runs?viewStateShareKey=variants", width, height)
    browser.see("matching runs", 120)
    opener = """document.querySelector('.ag-row [col-id*="Run Name"] button')"""
    browser.until(lambda: browser.ask(f"!!{opener}"), 60, "the release's +")
    browser.ask(f"{opener}.click()")

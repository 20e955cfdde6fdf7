"""What people see: a release run against a real Prefect and a real MLflow server, looked at in a browser."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.browser import Browser, executable, open_variants
from tests.e2e.test_mlflow_server import Server, free_port
from tests.e2e.test_report_page import keep

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(executable() is None, reason="needs Chromium")]

ROOT = Path(__file__).parents[2]
RECIPE = """
name: tiny
source: {{model: {model}}}
variants: [{{method: int8}}, {{method: nf4}}, {{method: nf4, double_quant: true}}]
evaluate:
  text: {{builtin: python-docs}}
  window: 64
  max_tokens: 1024
  speed: {{prompt_tokens: 16, new_tokens: 4, repeats: 1}}
  samples: {{prompts: [The], new_tokens: 8}}
gate: {{min_top1_agreement: 0.9}}
publish: {{to: folder}}
"""


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server, by its address."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_UI_API_URL": f"{url}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/api/health", timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server, by its address."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def result(prefect: str, mlflow: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A release of which int8 passes and nf4 does not."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama))
    environment = {**os.environ, "PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow}
    environment |= {"TAME_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "tame", "run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 3, process.stderr
    written: dict[str, Any] = json.loads((folder / "out" / "result.json").read_text())
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def test_mlflow_shows_releases_variants_and_their_comparison(
    browser: Browser, mlflow: str, result: dict[str, Any]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow)
    parent = client.get_run(result["mlflow_run"])
    experiment = parent.info.experiment_id
    open_variants(browser, mlflow, experiment, 1700, 800)
    browser.see("nf4-dq")
    for column in ("kl_mean", "verdict", "KL up to"):
        browser.see(column)
    keep(browser, "mlflow-runs")
    names = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment], "tags.kind = 'variant'")}
    compared = quote(json.dumps([names["int8"], names["nf4"]]))
    browser.open(f"{mlflow}/#/compare-runs?runs={compared}&experiments={quote(json.dumps([experiment]))}", 1500, 2400)
    browser.see("Comparing 2 Runs", 120)
    browser.see("double_quant")
    browser.see("kl_mean")
    keep(browser, "mlflow-compare")
    browser.open(f"{mlflow}/#/experiments/{experiment}/runs/{parent.info.run_id}/artifacts/report.html", 1500, 1000)
    browser.see("result.json", 120)
    keep(browser, "mlflow-report")


def test_prefect_shows_the_graph_the_states_and_the_artifacts(
    browser: Browser, prefect: str, result: dict[str, Any]
) -> None:
    browser.open(f"{prefect}/runs/flow-run/{result['prefect_run']}", 1500, 1100)
    browser.see("tiny: use int8", 120)
    browser.see("Partly rejected")
    browser.until(lambda: browser.ask("!!document.querySelector('canvas')"), 60, "the graph")
    time.sleep(3)  # the graph is drawn on a canvas that says nothing of when it is done
    keep(browser, "prefect-run")
    newest = {}
    for artifact in post(f"{prefect}/api/artifacts/filter", {"sort": "CREATED_DESC"}):
        newest.setdefault(artifact["key"], artifact["id"])
    assert {"tiny-variants", "tiny-summary", "tiny-mlflow"} <= set(newest)
    for key, seen in (("tiny-variants", "nf4-dq"), ("tiny-summary", "The report is at"), ("tiny-mlflow", "MLflow run")):
        browser.open(f"{prefect}/artifacts/artifact/{newest[key]}", 1500, 700)
        browser.see(seen, 120)
        browser.see("Rejected: nf4 (top-1 agreement")
        keep(browser, f"prefect-{key}")


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

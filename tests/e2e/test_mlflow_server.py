"""A real MLflow server that is stopped in the middle of a release."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Recipe
from tasks import formatting
from tasks.result import NOT_REACHED, Result
from tasks.track import connection, liveness
from tasks.track import task as track
from tests.results import RECIPE, make

pytestmark = pytest.mark.e2e
LOAD = "system/cpu_utilization_percentage"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """`mlflow server` over its own database, started and stopped as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination",
            str(self.folder),
        ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, tame_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server(tmp_path / "server")
    running.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
    yield running
    for run_id in list(liveness.alive):
        liveness.stop_heartbeat(run_id)
    running.stop()


def test_a_server_stopped_in_the_middle_misses_nothing_once_it_is_back(
    server: Server, tame_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    caplog.set_level(logging.INFO, "tame")
    whole = make(tmp_path / "evidence")
    early = [
        whole.variants[0],
        *(v.model_copy(update={"status": "failed", "error": NOT_REACHED}) for v in whole.variants[1:]),
    ]
    report = tmp_path / "report.html"
    report.write_text("<!doctype html><title>report</title>")
    recipe = Recipe.model_validate(RECIPE)
    run_id = track.begin(recipe, {"prefect_run": whole.prefect_run or ""})
    assert run_id
    assert track.log(whole.model_copy(update={"variants": early}), run_id, None, final=False) == run_id
    server.stop()
    began = time.monotonic()
    assert track.log(whole, run_id, None, final=False) == run_id
    assert track.log(whole, run_id, report, final=True) == run_id
    assert time.monotonic() - began < 60
    assert len([message for message in caplog.messages if "cannot be used" in message]) == 2
    assert len(list((tame_home / "spool").glob("*.json"))) == 1
    server.start()
    assert track.begin(recipe, {"prefect_run": "the next"})  # the next run catches up by itself
    assert list((tame_home / "spool").glob("*.json")) == []
    logged = {
        run.info.run_name: run
        for run in mlflow.search_runs(
            experiment_names=[recipe.name],
            filter_string=f"tags.`mlflow.parentRunId` = '{run_id}'",
            output_format="list",
        )
    }
    assert set(logged) == {"baseline", "int8", "nf4-dq", "fp4"}
    for measured in formatting.rows(whole):
        metrics = {
            name: value
            for name, value in logged[measured.name].data.metrics.items()
            if not name.startswith(("window/", "layer_error/"))
        }
        assert metrics == measured.metrics
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FAILED"  # as its variant
    assert {artifact.path for artifact in client.list_artifacts(run_id)} >= {"report.html", "result.json"}
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="result.json", dst_path=str(tmp_path))
    assert Result.model_validate(json.loads(Path(path).read_text())) == whole


def test_the_machine_s_load_is_logged_again_when_the_server_is_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> int:
        return len(connection.connect().get_metric_history(run_id, LOAD))

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.2)

    monkeypatch.setattr(liveness, "HEARTBEAT", 0.5)
    monkeypatch.setattr(liveness, "SYSTEM_METRICS_EVERY", 0.3)
    run_id = track.begin(Recipe.model_validate(RECIPE), {})
    assert run_id is not None
    until(lambda: steps() > 0)
    server.stop()
    until(lambda: "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()})
    server.start()
    before = steps()
    until(lambda: steps() > before)


def test_a_webhook_hears_of_an_alias_that_moves_and_of_no_other(
    tmp_path: Path, tame_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of docs/results.md, with a receiver on this machine."""
    import mlflow

    heard: list[dict[str, Any]] = []
    signatures: list[str | None] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            signatures.append(self.headers.get("X-MLflow-Signature"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
    running, receiver = Server(tmp_path / "server"), ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    running.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
        mlflow.set_tracking_uri(running.url)  # as the tests before this one have set another in this process
        page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
        program = page.split("## Deploy what is best now")[1].split("```py\n")[1].split("```")[0]
        exec(program.replace("https://deploy.example.com", f"http://127.0.0.1:{receiver.server_port}"), {})
        result = make()
        run = track.log(result, None, None, final=True)
        end = time.monotonic() + 60
        while not {"best", "best-8bit", "newest"} <= {one["data"]["alias"] for one in heard}:
            assert time.monotonic() < end, heard
            time.sleep(0.1)
        assert all(one["entity"] == "model_version_alias" and one["data"]["version"] == "1" for one in heard)
        assert all(signature and signature.startswith("v1,") for signature in signatures)
        told = len(heard)
        again = result.model_copy(update={"started": "2026-01-03T00:00:00+00:00", "prefect_run": "another"})
        assert track.log(again, None, None, final=True) != run
        time.sleep(3)
        assert len(heard) == told  # the same weights are best: nothing moved
    finally:
        receiver.shutdown()
        running.stop()

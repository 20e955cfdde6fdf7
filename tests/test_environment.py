"""What a machine's environment can do to a run: proxies, locales, closed streams, files in the working folder, signals."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import BadInputError, TameError
from infra import provision
from tasks.runtime import child_process
from tasks.runtime.environment import check_addresses, reach_directly

ROOT = Path(__file__).parent.parent
TAME = [sys.executable, "-P", "-c", "import tame; tame.main()"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SERVER = """
import sys
from flows.temporary_server import TemporaryServer
from tasks.runtime.environment import set_up
from configs.errors import TameError
set_up(False, "CRITICAL")
server = TemporaryServer()
server.start()
try:
    server.wait()
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings
    with temporary_settings({PREFECT_API_URL: server.api}), get_client(sync_client=True) as client:
        print("healthy", client.api_healthcheck(), len(client.read_flows()))
except TameError as error:
    print(error)
finally:
    server.stop()
"""


def with_server(folder: Path, **environment: str) -> str:
    home = {"PREFECT_HOME": str(folder / "prefect"), "TAME_HOME": str(folder / "tame")}
    command = [sys.executable, "-P", "-c", SERVER]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROXY = {"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
ANOTHER_SERVERS = {
    "PREFECT_SERVER_API_AUTH_STRING": "ann:secret",
    "PREFECT_SERVER_API_BASE_PATH": "/prefect/api",
    "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
}


@pytest.mark.parametrize(
    "settings",
    [
        {**PROXY, **ANOTHER_SERVERS, **ASCII},
        *(pytest.param(one, marks=pytest.mark.e2e) for one in (PROXY, ANOTHER_SERVERS, ASCII)),
    ],
    ids=["all of it", "proxy", "another server's settings", "ASCII"],
)
def test_a_temporary_server_answers_whatever_the_environment_says(tmp_path: Path, settings: dict[str, str]) -> None:
    folder = tmp_path / "it's 100 % #1"
    folder.mkdir()
    for name in ("prefect", "uvicorn", "tasks", "configs", "flows"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder')")
    assert with_server(folder, **settings) == "healthy None 0\n"


def test_a_temporary_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    said = with_server(
        tmp_path,
        PREFECT_SERVER_DATABASE_CONNECTION_URL="sqlite+aiosqlite:////nothing/here.db",
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
        PREFECT_LOGGING_LEVEL="CRITICAL",
    )
    assert "ended with exit code 3: sqlalchemy.exc.OperationalError" in said
    assert "unable to open database file; correct that, or set PREFECT_API_URL" in said


def test_hosts_are_reached_without_a_proxy_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    reach_directly("127.0.0.1")
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    reach_directly("127.0.0.1", "example.org")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_ENDPOINT", "https//hf.co"),
        ("PREFECT_API_URL", "localhost:4200/api"),
        ("PREFECT_API_URL", "http:///api"),
        ("MLFLOW_TRACKING_URI", "localhost:5000"),
        ("MLFLOW_TRACKING_URI", "mlflow.example.org"),
        ("MLFLOW_TRACKING_URI", "10.0.0.5:5000"),
    ],
)
def test_an_address_without_its_scheme_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(BadInputError, match=f"{name} is '{value}': expected an address with its scheme, such as http"):
        check_addresses({name: value})
    done = subprocess.run(
        [*TAME, "cache", "list"], cwd=tmp_path, env={**os.environ, name: value}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_every_other_address_is_left_to_its_library(tmp_path: Path) -> None:
    check_addresses({})
    for name, values in {
        "HF_ENDPOINT": ["", "https://hf-mirror.com", "http://127.0.0.1:8000/"],
        "PREFECT_API_URL": ["http://10.0.0.1:4200/api", "https://api.prefect.cloud/api/accounts/a/workspaces/b"],
        "MLFLOW_TRACKING_URI": [
            "", "http://m:5000", "sqlite:////x.db", "postgresql://a:b@c/d", "databricks", "databricks://p", "uc:http://x",
            "file:/x", "./mlruns", "/srv/mlruns", "mlruns", str(tmp_path),
        ],
    }.items():  # fmt: skip
        for value in values:
            check_addresses({name: value})


def test_an_ascii_terminal_is_no_reason_to_fail(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: größe…", encoding="utf-8")
    done = subprocess.run(
        [*TAME, "plan", str(recipe)], cwd=tmp_path, env={**os.environ, **ASCII}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tame: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_reason_to_fail(tmp_path: Path, closed: str) -> None:
    command = f'exec "$@" {closed}'
    for arguments, code in ((["cache", "list"], 0), (["run", "nothing.yaml"], 2)):
        done = subprocess.run(
            ["sh", "-c", command, "sh", *TAME, *arguments], cwd=tmp_path, env=os.environ, capture_output=True, text=True
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)


SLEEPER = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it\n"
    "from tasks.runtime.environment import stop_at_interrupts\nstop_at_interrupts()\n"
    "try:\n    print('ready', flush=True); time.sleep(60)\n"
    "except KeyboardInterrupt:\n    print('tidying', flush=True); print(1 / 0)\n"
    "finally:\n    time.sleep(60)\n"
)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_gives_the_terminal_back_in_one_line(times: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    output, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < (2.5 if times == 1 else 1.0)
    assert (process.returncode, output) == (130, "")
    assert errors == "tame: stopped; the next run goes on from what is finished\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--older-than", "-1"],
        ["prune", "--older-than", "nan"],
        ["prune", "--older-than", "x"],
        ["list", "--older-than", "1"],
    ],
)
def test_days_that_are_none_remove_nothing(tmp_path: Path, arguments: list[str]) -> None:
    kept = tmp_path / "artifacts" / ".partial-x"
    kept.mkdir(parents=True)
    environment = {**os.environ, "TAME_HOME": str(tmp_path)}
    done = subprocess.run([*TAME, "cache", *arguments], env=environment, capture_output=True, text=True)
    assert (done.returncode, kept.exists()) == (2, True)


def test_a_server_that_is_away_is_said_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(provision, "HEALTHY_WITHIN", 1.5)
    monkeypatch.setattr(provision, "SILENT_FOR", 0.5)
    with (
        caplog.at_level(logging.WARNING, "tame"),
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(
            TameError, match=r"http://127.0.0.1:9/api does not answer: .*; start Prefect's server, or correct"
        ),
        provision.connect(),
    ):
        raise AssertionError("it does not answer")
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "http://127.0.0.1:9/api does not answer"
    ]


def test_a_changed_variable_is_said_once_by_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_process, "_preloaded_under", {"PATH": "/bin", "OMP_NUM_THREADS": "1"})
    monkeypatch.setattr(child_process, "_said", set())
    with caplog.at_level(logging.INFO, "tame"):
        child_process._say_what_changed({"PATH": "/bin", "OMP_NUM_THREADS": "2", "HF_TOKEN": "hf_secret"})
        child_process._say_what_changed({"PATH": "/bin", "OMP_NUM_THREADS": "3", "HF_TOKEN": "hf_secret"})
    said = [record.getMessage() for record in caplog.records]
    assert [one.partition(" changed")[0] for one in said] == ["HF_TOKEN, OMP_NUM_THREADS"]
    assert "hf_secret" not in said[0]

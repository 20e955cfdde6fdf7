import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Gate, Recipe
from tasks import formatting, sentences
from tasks.evaluate import evidence
from tasks.report import html as report
from tasks.result import NOT_REACHED, Result, ResultVariant
from tasks.track import connection, liveness, registry
from tasks.track import task as track
from tests.results import RECIPE, make
from tests.test_report import Page

EXPERIMENT = "smollm2-135m"
BEGIN = (
    "import sys, time; from configs.schema import Recipe; from tasks.track import task as track; from tests.results import RECIPE;"
    "print(track.begin(Recipe.model_validate(RECIPE), {}), flush=True); time.sleep(600)"
)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without runs: making one costs seconds."""
    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connection._create(place)
    return place


@pytest.fixture
def home(tame_home: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tame_home.mkdir()
    shutil.copy(empty_database, tame_home / "mlflow.db")
    monkeypatch.setattr(liveness, "SYSTEM_METRICS_EVERY", 3600.0)
    yield tame_home
    for run_id in list(liveness.alive):
        liveness.stop_heartbeat(run_id)


@pytest.fixture
def result(tmp_path: Path) -> Result:
    return make(tmp_path / "evidence")


def begin(**tags: str) -> str | None:
    return track.begin(Recipe.model_validate(RECIPE), tags)


def client() -> Any:
    return connection.connect()


def runs(kind: str) -> dict[str, Any]:
    """Runs of a kind by their variant, a release by its experiment, from the one call that people use."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=[EXPERIMENT], filter_string=f"tags.kind = '{kind}'", output_format="list"
    )
    known = {run.data.tags.get("variant", EXPERIMENT if kind == "release" else kind): run for run in found}
    assert len(known) == len(found)
    return known


def everything(folder: Path, name: str = "mlflow.db") -> dict[str, list[tuple[Any, ...]]]:
    """All rows of MLflow's tables: what a second logging must not change."""
    with sqlite3.connect(folder / name) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: sorted(database.execute(f"SELECT * FROM {name}").fetchall(), key=repr) for name in tables}
    return {name: found for name, found in rows.items() if found}


def test_every_number_is_logged_under_its_name(home: Path, result: Result) -> None:
    run_id = begin(prefect_run=result.prefect_run or "")
    assert track.log(result, run_id, None, final=True) == run_id
    found = runs("variant") | runs("baseline")
    place = result.variants[0].evidence
    for measured in formatting.rows(result):
        logged = {
            name: value
            for name, value in found[measured.name].data.metrics.items()
            if not name.startswith(("window/", "layer_error/"))
        }
        assert logged == measured.metrics
        assert found[measured.name].data.tags["mlflow.parentRunId"] == run_id
    nf4 = found["nf4-dq"].data
    assert nf4.params["method"] == "nf4"
    assert nf4.params["double_quant"] == "true"
    assert nf4.params["bits"] == "4"
    assert nf4.params["evaluate.window"] == "512"
    assert nf4.params["version.torch"] == "2.13.0"
    assert nf4.params["hardware.cores"] == "2"
    assert nf4.params["protocol.text.sha256"] == "5d" * 32
    assert (nf4.tags["verdict"], nf4.tags["source_commit"]) == ("rejected", result.source.commit)
    assert nf4.tags["KL up to"] == "0.2741 > 0.1"
    assert found["int8"].data.tags["hub_commit"] == "c" * 40
    assert [found[name].info.status for name in ("baseline", "int8", "nf4-dq", "fp4")] == ["FINISHED"] * 3 + ["FAILED"]
    curve = client().get_metric_history(found["int8"].info.run_id, "window/kl")
    assert [point.step for point in curve] == list(range(8))
    by_depth = client().get_metric_history(found["int8"].info.run_id, "layer_error/self_attn.q_proj")
    layers = {layer.depth: layer.error for layer in evidence.layers(place) if layer.kind == "self_attn.q_proj"}
    assert {point.step: point.value for point in by_depth} == layers
    shown = client().search_runs(
        [found["int8"].info.experiment_id], "tags.kind != 'release'", order_by=["attributes.start_time DESC"]
    )
    assert [run.info.run_name for run in shown] == ["baseline", "int8", "nf4-dq", "fp4"]
    parent = runs("release")[EXPERIMENT]
    assert re.fullmatch(r"SmolLM2-135M-Instruct: int8, nf4-dq, fp4 \(\d{4}-\d\d-\d\d \d\d:\d\d\)", parent.info.run_name)
    assert (parent.info.run_id, parent.info.status) == (run_id, "FAILED")
    shown = {name: parent.data.tags[name] for name in ("verdict", "KL up to", "use")}
    assert shown == {"verdict": "1/3 passed, 1 rejected, 1 failed", "KL up to": "0.0209 ≤ 0.1", "use": "int8"}
    assert "use" not in found["nf4-dq"].data.tags or not found["nf4-dq"].data.tags["use"]
    assert parent.data.tags["headline"] == sentences.headline(result)
    written = Path(parent.info.artifact_uri.removeprefix("file://")) / "result.json"
    assert json.loads(written.read_text()) == result.model_dump(mode="json")


def test_what_a_narrow_column_says(result: Result) -> None:
    int8, nf4, fp4 = result.variants
    measured = int8.model_copy(update={"status": "measured"})

    def told(*variants: ResultVariant, **gate: Any) -> tuple[str, str]:
        recipe = result.recipe.model_copy(update={"gate": Gate(**gate)})
        release = result.model_copy(update={"variants": list(variants), "recipe": recipe})
        return registry.tally(release), registry.kl_and_limit(release, variants[0])

    assert told(int8, int8, nf4, max_mean_kl=0.1) == ("2/3 passed, 1 rejected", "0.0209 ≤ 0.1")
    assert told(nf4, fp4, max_mean_kl=0.27405) == ("0/2 passed, 1 rejected, 1 failed", "0.2741 > 0.27405")
    assert told(int8) == ("passed", "0.0209")
    assert told(fp4, int8, measured) == ("1/3 passed, 1 failed, 1 measured", "")
    assert registry.kl_and_limit(result, None) == ""


def test_models_are_references_with_linked_numbers(home: Path, result: Result) -> None:
    track.log(result, begin(), None, final=True)
    models = client().search_logged_models([client().get_experiment_by_name(EXPERIMENT).experiment_id])
    assert {model.name for model in models} == {f"{EXPERIMENT}-int8", f"{EXPERIMENT}-nf4-dq"}
    int8 = next(model for model in models if model.name.endswith("int8"))
    variant = result.variants[0]
    assert {metric.key: metric.value for metric in int8.metrics} == variant.metrics
    assert {metric.dataset_digest for metric in int8.metrics} == {"5d" * 18}
    assert int8.tags["artifact_digest"] == (variant.artifact and variant.artifact.digest)
    run = runs("variant")["int8"]
    assert [output.model_id for output in run.outputs.model_outputs] == [int8.model_id]
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == ["python-docs of CPython 3.11.9"]
    written = sum(path.stat().st_size for path in (home / "mlartifacts").rglob("*") if path.is_file())
    assert written < 100_000


def test_logging_again_changes_nothing(home: Path, result: Result, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text('<!doctype html><svg data-name="windows" aria-hidden="true"></svg>')
    run_id = begin()
    partly = [
        result.variants[0],
        *(v.model_copy(update={"status": "failed", "error": NOT_REACHED}) for v in result.variants[1:]),
    ]
    passed = result.variants[0].model_copy(update={"status": "passed", "published": None})
    early = result.model_copy(update={"variants": [passed, *partly[1:]]})
    assert track.log(early, run_id, None, final=False) == run_id
    assert set(runs("variant")) == {"int8"}
    assert runs("release")[EXPERIMENT].info.status == "RUNNING"
    assert track.log(result, run_id, report, final=True) == run_id
    assert [path.read_text() for path in (home / "mlartifacts").rglob("report.html")] == [report.read_text()]
    assert len(list((home / "mlartifacts").rglob("plots/windows.svg"))) == 1
    before = everything(home)
    assert track.log(result, run_id, report, final=True) == run_id
    assert everything(home) == before
    versions = client().search_model_versions(f"name = '{EXPERIMENT}'")
    assert [version.tags["published"] for version in versions] == [result.variants[0].published]


def test_a_rerun_from_the_cache_adds_no_release(home: Path, result: Result) -> None:
    whole = [v.model_copy(update={"evidence": None}) for v in result.variants[:2]]
    made = result.model_copy(update={"variants": whole, "prefect_run": "p1"})
    first = track.log(made, begin(prefect_run="p1"), None, final=True)
    count = len(runs("variant")) + len(runs("baseline"))

    def again(run: str, **update: Any) -> Any:
        assert made.baseline is not None
        cached = [v.model_copy(update={"cached": ["quantize", "evaluate"]}) for v in whole]
        later = {
            "prefect_run": run,
            "baseline": made.baseline.model_copy(update={"cached": ["evaluate"]}),
            "seconds": 2.0,
        }
        run_id = track.log(
            made.model_copy(update={"variants": cached, **later, **update}), begin(prefect_run=run), None, True
        )
        return client().get_run(run_id)

    rerun = again("p2", started="2026-11-24T18:00:00+00:00")
    assert (rerun.info.status, rerun.data.tags["kind"], rerun.data.tags["rerun_of"]) == ("FINISHED", "rerun", first)
    assert list(runs("release")) == [EXPERIMENT]
    assert len(runs("variant")) + len(runs("baseline")) == count
    assert again("p2").info.run_id == rerun.info.run_id  # the same Prefect run, tried again
    assert list(runs("release")) == [EXPERIMENT]

    # Another verdict is another release, and so is anything that was made anew.
    stricter = made.recipe.model_copy(update={"gate": made.recipe.gate.model_copy(update={"max_mean_kl": 0.01})})
    for run, update in (("p3", {"recipe": stricter}), ("p4", {"variants": whole})):
        assert again(run, **update).data.tags["kind"] == "release"


def test_one_call_answers_which_variant_is_best(home: Path, result: Result) -> None:
    def released(day: int, kl: float, digest: str, size: float, **recipe: Any) -> None:
        int8, nf4, _ = result.variants
        artifact = nf4.artifact and nf4.artifact.model_copy(update={"digest": digest})
        better = nf4.model_copy(
            update={
                "status": "passed",
                "artifact": artifact,
                "metrics": {**nf4.metrics, "kl_mean": kl, "size_bytes": size},
            }
        )
        update = {
            "started": f"2026-11-{day:02}T18:00:00+00:00",
            "variants": [int8, better],
            "prefect_run": None,
            "recipe": result.recipe.model_copy(update=recipe),
        }
        track.log(result.model_copy(update=update), None, None, final=True)

    released(1, 0.08, "aa" * 32, 1e8)
    released(2, 0.06, "bb" * 32, 1e8)
    released(3, 0.09, "cc" * 32, 1e8)
    versions = {version.tags["artifact_digest"]: version.version for version in client().search_model_versions("")}
    by_alias = {
        alias: client().get_model_version_by_alias(EXPERIMENT, alias).tags["artifact_digest"]
        for alias in ("best", "best-4bit", "best-8bit", "newest")
    }
    int8 = result.variants[0].artifact and result.variants[0].artifact.digest
    assert by_alias == {"best": int8, "best-4bit": "bb" * 32, "best-8bit": int8, "newest": int8}
    assert len(versions) == 4  # the same int8 weights three times are one version
    documented: dict[str, Any] = {}
    connection.connect()
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, documented)
    best = documented["best"]
    assert len(best) == 1
    assert best.iloc[0]["metrics.kl_mean"] == 0.06
    assert best.iloc[0]["tags.artifact_digest"] == "bb" * 32
    assert documented["version"].tags["artifact_digest"] == "bb" * 32
    released(4, 0.2, "dd" * 32, 1e8, evaluate=result.recipe.evaluate.model_copy(update={"window": 1024}))
    assert (
        client().get_model_version_by_alias(EXPERIMENT, "best-4bit").tags["artifact_digest"] == "dd" * 32
    )  # not comparable
    drawn = Page(report.history(EXPERIMENT))
    assert drawn.cells.count("nf4-dq") == 4
    assert "0.0600" in drawn.cells
    assert [address for address in drawn.addresses if not address.startswith("#")] == []
    with pytest.raises(BadInputError, match=f"there are: {EXPERIMENT}"):
        report.history("never released")


def test_mlflow_away_is_said_in_a_line_spooled_and_caught_up(
    home: Path, result: Result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, empty_database: Path
) -> None:
    place = home / "server" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}")
    caplog.set_level(logging.INFO, "tame")
    place.parent.write_text("not a folder: MLflow cannot open its database")
    assert begin(prefect_run="p1") is None
    result = result.model_copy(update={"prefect_run": "p1"})
    assert track.log(result, None, None, final=False) is None
    assert track.log(result, None, None, final=True) is None
    assert [path.name for path in (home / "spool").glob("*.json")] == ["p1.json"]
    assert len(caplog.messages) == 3
    assert all("cannot be used" in message and "\n" not in message for message in caplog.messages)
    with pytest.raises(TameError, match="cannot be used"):
        track.replay()
    place.parent.unlink()
    place.parent.mkdir()
    shutil.copy(empty_database, place)
    monkeypatch.chdir(place.parent)
    assert track.replay() == 1
    assert [path.name for path in place.parent.iterdir()] == ["mlflow.db"]  # nothing lands where one happens to be
    assert list((home / "spool").glob("*.json")) == []
    assert runs("variant")["int8"].data.metrics["kl_mean"] == result.variants[0].metrics["kl_mean"]
    assert runs("release")[EXPERIMENT].info.status == "FAILED"  # a variant failed
    assert track.replay() == 0


def older(database: Path) -> str:
    """Make an MLflow database as the version before the last change of its tables made it; the revision."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    config = utils._get_alembic_config(f"sqlite:///{database}")
    before = list(ScriptDirectory.from_config(config).walk_revisions())[1].revision
    engine = sqlalchemy.create_engine(f"sqlite:///{database}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, before)
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'of last year', 'active')"
            )
        )
    engine.dispose()
    return before


def test_a_database_of_an_earlier_mlflow_is_brought_up_to_date_and_kept(
    tame_home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    tame_home.mkdir()
    database = tame_home / "mlflow.db"
    before = older(database)
    as_it_was = everything(tame_home)
    caplog.set_level(logging.INFO, "tame")

    def fails(*_: object) -> None:
        raise RuntimeError("no space")

    with monkeypatch.context() as broken:
        upgrade = command.upgrade
        broken.setattr(command, "upgrade", lambda *given: (upgrade(*given), fails()))
        assert begin() is None
        assert f"{database}: MLflow cannot bring it up to date (no space)" in caplog.text
    assert everything(tame_home) == as_it_was
    shutil.copy(database, tame_home / ".migrating-mlflow.db")  # and one that was killed half way
    with sqlite3.connect(database) as half:
        half.execute("DROP TABLE tags")
    assert begin() is not None
    assert client().get_experiment("7").name == "of last year"
    kept = database.with_name(f"mlflow.db.before-{before}")
    assert f"what it was is kept in {kept}" in caplog.text
    assert everything(tame_home, kept.name) == as_it_was
    assert not (tame_home / ".migrating-mlflow.db").exists()


@pytest.mark.parametrize("content", ["later", "not MLflow's", "not SQLite's"])
def test_a_database_that_cannot_be_used_is_said_and_left_alone(
    tame_home: Path, empty_database: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    tame_home.mkdir()
    database = tame_home / "mlflow.db"
    if content == "later":
        shutil.copy(empty_database, database)
    if content == "not SQLite's":
        database.write_text("dear diary")
    else:
        with sqlite3.connect(database) as connection:
            connection.execute(
                "UPDATE alembic_version SET version_num = 'f00d'" if content == "later" else "CREATE TABLE a (b)"
            )
    bytes_before = database.read_bytes()
    assert begin() is None
    said = "a later MLflow than the installed one wrote" if content == "later" else "is no database of MLflow's"
    assert said in caplog.text
    assert "move it away" in caplog.text
    assert database.read_bytes() == bytes_before


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql://ann:secret@127.0.0.1:9/mlflow", "Connection refused"),
        ("postgresql://ann:sec@ret@127.0.0.1:9/mlflow", "an @ in its password has to be written as %40"),
        ("postgresql://ann:sec/ret@127.0.0.1:9/mlflow", "Connection refused"),
        ("mysql+pymysql://ann:secret@127.0.0.1:9/mlflow", "No module named 'pymysql'; pip install it"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file or directory"),
    ],
)
def test_a_dead_database_is_asked_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, uri: str, said: str
) -> None:
    from mlflow.store.db import utils

    attempts = []
    monkeypatch.setattr(utils, "create_sqlalchemy_engine", lambda uri: attempts.append(uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert begin() is None
    [message] = caplog.messages
    assert said in message
    assert not [part for part in ("ann:", "ann@", "secret", "sec@", "sec/", "ret@") if part in message]
    assert attempts == []  # MLflow, which would try ten times, was not let near it


def test_connecting_changes_no_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection.prepare()
    before = dict(os.environ)
    seen: list[object] = []
    threads = [threading.Thread(target=lambda: seen.append(connection.connect())) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert dict(os.environ) == before
    assert len(seen) == 4
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_spool_waits_for_its_own_server_and_rubbish_stops_nothing(
    home: Path, result: Result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert track.log(result, None, None, final=True) is None
    spooled = next((home / "spool").glob("*.json"))
    assert "secret" not in spooled.read_text() + caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (home / "spool" / "a.json").write_text("{")
    assert begin() is not None
    assert spooled.exists()
    assert "a.json cannot be logged" in caplog.text


def test_a_server_that_hangs_is_asked_nothing_but_whether_it_is_there(
    home: Path, result: Result, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def listen() -> None:
            kept = []
            while True:
                try:
                    connection, _ = silent.accept()
                except OSError:
                    return
                kept.append(connection)
                asked.append(connection.recv(1000).splitlines()[0])

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}/sub")
        monkeypatch.setattr(connection, "ANSWER_WITHIN", 0.1)
        assert begin() is None
        assert track.log(result, None, None, final=False) is None
        assert track.log(result, None, None, final=True) is None
        assert connection.run_url("a run") is None
        silent.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert asked == [b"GET /sub/health HTTP/1.1"] * 4
    assert len(list((home / "spool").glob("*.json"))) == 1
    assert len(caplog.messages) == 3
    assert all("timed out" in message for message in caplog.messages)


@pytest.mark.e2e
def test_two_first_runs_make_one_database_and_the_killed_one_is_closed_by_the_next(tame_home: Path) -> None:
    tame_home.mkdir()
    (tame_home / ".partial-mlflow.db").write_bytes(b"SQLite format 3\0 and then it was killed")
    killed, living = (
        subprocess.Popen(
            [sys.executable, "-c", BEGIN], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        for _ in range(2)
    )
    try:
        dead, alive = (process.stdout.readline().strip() for process in (killed, living) if process.stdout)
        assert {path.name for path in tame_home.glob("*mlflow.*")} == {"mlflow.db", "mlflow.lock"}
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        mine = begin()
        status = {run_id: client().get_run(run_id).info.status for run_id in (dead, alive, mine)}
        assert status == {dead: "KILLED", alive: "RUNNING", mine: "RUNNING"}
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()


def test_silence_from_another_host_counts_as_death_after_a_while(home: Path) -> None:
    elsewhere = {"tame.where": "another host", "tame.process": "1 1.0"}
    assert not liveness.is_stale({**elsewhere, "tame.heartbeat": f"{time.time() - 100:.0f}"})
    assert liveness.is_stale({**elsewhere, "tame.heartbeat": f"{time.time() - 1000:.0f}"})
    assert liveness.is_stale({})
    assert not liveness.is_stale(liveness.heartbeat())
    assert liveness.is_stale(
        {**liveness.heartbeat(), "tame.process": f"{os.getpid()} 1.0"}
    )  # the pid lives on in another


def test_a_deleted_run_is_made_again_and_a_deleted_experiment_restored(home: Path, result: Result) -> None:
    run_id = begin()
    client().delete_run(run_id)
    again = track.log(result, run_id, None, final=True)
    assert again != run_id
    client().delete_experiment(client().get_experiment_by_name(EXPERIMENT).experiment_id)
    assert track.log(result, again, None, final=True) == again
    assert set(runs("variant")) == {"int8", "nf4-dq", "fp4"}


def test_names_that_mlflow_refuses() -> None:
    from tasks.track.mlflow_runs import metric_key

    assert metric_key("task/gsm8k/exact_match,strict-match") == "task/gsm8k/exact_match-strict-match"
    assert metric_key("task/piqa/acc_norm") == "task/piqa/acc_norm"
    asked = Recipe.model_validate({**RECIPE, "track": {"experiment": "me/model:v1.0"}})
    assert registry.model_name(asked) == "me-model-v1-0"


def test_one_number_says_the_same_in_five_places(home: Path, result: Result) -> None:
    """In result.json, MLflow, Prefect's table, the report and the card, for every metric and variant."""
    from tasks.publish import card
    from tasks.track.mlflow_runs import metric_key

    written = json.loads(result.model_dump_json())
    track.log(result, None, None, final=True)
    logged = {name: run.data.metrics for name, run in (runs("variant") | runs("baseline")).items()}
    table = {row["variant"]: row for row in formatting.table(result)}
    shown = Page(report.render(result)).cells
    compared = on_cards = 0
    for said in [written["baseline"], *written["variants"]]:
        lines: list[str] = []
        if said.get("artifact"):
            files = card.release_files(result, said["name"])
            provenance = json.loads(files["tame.json"])
            assert {**provenance["metrics"], **provenance["run"]["metrics"]} == said["metrics"]
            lines = files["README.md"].decode().splitlines()
        for name, value in said["metrics"].items():
            assert logged[said["name"]][metric_key(name)] == value
            if name.endswith(("_low", "_high")):
                continue
            figure = formatting.figure(name, value)
            assert table[said["name"]][formatting.label(name)].split(" (")[0] == figure
            assert figure in shown
            rows = [line for line in lines if line.startswith(f"| {formatting.label(name)} |")]
            assert all(f"| {figure} |" in row for row in rows), name
            on_cards += len(rows)
            compared += 1
    assert compared == sum(len(formatting.points([row.metrics])) for row in formatting.rows(result)) > 30
    assert on_cards > 20

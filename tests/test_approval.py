"""Nothing is published before a person has said yes: in Prefect, where the run waits without a process, and on a terminal."""

import contextlib
import hashlib
import json
import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Pending
from pydantic import ValidationError

import tame
from configs.errors import TameError
from configs.load import load_recipe
from configs.schema import Publish, Recipe
from flows.approve import form, on_terminal
from flows.release import release
from tasks.publish.approval import Shown, keep, question, recall
from tasks.publish.check import problems_in_folder
from tasks.result import refused
from tasks.store.on_disk import store_folder
from tasks.values import Answer
from tests.results import make
from tests.test_flow import Place

QUICK = {"text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 256, "speed": None, "samples": None}
BOTH = [{"method": "int8"}, {"method": "nf4"}]


def shown() -> Shown:
    result = make()
    return Shown(result=result, targets={"int8": "me/a"}, documents={"int8": {"README.md": b"---\na: b\n---\n\n# a\n"}})


def test_an_answer_is_for_exactly_what_was_shown(tame_home: Path) -> None:
    asked = shown()
    assert recall("run") is None
    keep("run", asked)
    found = recall("run")
    assert found is not None
    assert found == asked
    assert found.digest == asked.digest
    for other in (
        {"targets": {"int8": "me/b"}},
        {"documents": {"int8": {"README.md": b"another"}}},
        {"documents": {"int8": {**asked.documents["int8"], "tame.json": b"{}"}}},
        {"result": asked.result.with_variant(asked.result.variants[0].model_copy(update={"artifact": None}))},
    ):
        assert asked.model_copy(update=other).digest != asked.digest
    card = next(store_folder().glob("shown-*/files/documents/int8/README.md"))
    before = card.stat()
    card.write_bytes(card.read_bytes().replace(b"# a", b"# b"))
    os.utime(card, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TameError, match="is not what was shown, so nothing is published"):
        recall("run")


def test_the_question_has_the_verdicts_and_links(tame_home: Path) -> None:
    text = question(shown(), "[report](http://x)", {"int8": "[README.md](http://y)"}, "Until then.")
    digest = hashlib.sha256(shown().documents["int8"]["README.md"]).hexdigest()
    assert f"- int8 to me/a: [README.md](http://y), sha256 {digest[:12]}…" in text
    assert "rejected" in text
    assert text.index("| variant |") < text.index("0 means the same") < text.index("[report]")
    assert "[report](http://x)" in text
    assert "If you choose none, nothing is published. Until then." in text


def test_the_form_takes_names_of_what_passed_and_nothing_filled_in_is_a_no() -> None:
    asked = form(shown())
    assert asked().model_dump() == {"publish": [], "note": "", "private": True}
    assert asked(publish=["int8"]).model_dump()["publish"] == ["int8"]
    with pytest.raises(ValidationError):
        asked(publish=["nf4-dq"])
    assert asked.model_json_schema()["properties"]["publish"]["items"] == {"enum": ["int8"], "type": "string"}


def test_a_no_counts_as_the_gates() -> None:
    result = make()
    answer = Answer(variants=[], private=True, note="the licence is not clear")
    result = result.with_variant(refused(result.variant("int8"), answer))
    assert result.variant("int8").status == "rejected"
    assert result.variant("int8").gate is not None
    assert result.variant("int8").gate.reasons == ["a person did not approve it: the licence is not clear"]
    assert Answer(variants=[], private=True, answered=False).no == "nobody approved it in time"
    assert Answer(variants=[], private=True).no == "a person answered, and nothing was chosen to be published"
    assert Answer(variants=["nf4"], private=True).no == "a person did not approve it"


def test_a_recipe_that_publishes_nowhere_asks_nobody() -> None:
    with pytest.raises(ValidationError, match="approve asks before publishing, but to is nowhere"):
        Publish(approve=True)


def test_without_a_terminal_and_without_a_worker_a_run_is_refused_before_it_begins(
    tiny_llama: Path,
    tame_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO())
    publish = {"to": "folder", "approve": True}
    recipe = Place(tmp_path, "").recipe(tiny_llama, publish=publish)
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        tame.main(["run", str(recipe), *out])
    assert ended.value.code == 2
    assert "publish.approve is true, and nobody can be asked" in capfd.readouterr().err
    assert not (tame_home / "artifacts").exists()
    with pytest.raises(SystemExit) as ended:
        tame.main(["plan", str(recipe), *out])
    assert ended.value.code == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "if a person approves it" in told
    assert "nobody can be asked" in told


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("nf5\nint8\n\nfine\n", Answer(variants=["int8"], private=True, note="fine")),
        ("all\nsecret\npublic\n\n", Answer(variants=["int8"], private=False)),
        ("\nnot yet\n", Answer(variants=[], private=True, note="not yet")),
        ("int8\n", Answer(variants=[], private=True, answered=False)),
    ],
    ids=["a name", "all, public", "none", "Ctrl-D"],
)
def test_on_a_terminal(
    typed: str, expected: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    assert on_terminal(shown(), tmp_path) == expected
    told = capfd.readouterr()
    assert told.out == ""  # which is for results
    assert "rejected" in told.err
    card = tmp_path / "to-approve" / "int8" / "README.md"
    assert f"int8 to me/a; its card: {card}" in told.err
    assert card.read_bytes() == shown().documents["int8"]["README.md"]
    assert ("There is no nf5 to publish" in told.err) == ("nf5" in typed)


class Worker:
    """A run of a deployment, gone on with as a process of a worker's does it; `tests/e2e/test_approval.py` has real ones."""

    def __init__(self, client: SyncPrefectClient, recipe: Recipe, out: Path) -> None:
        self.client = client
        flow = client.create_flow_from_name("release")
        deployment = client.create_deployment(flow, "approved")
        parameters = {"recipe": recipe.model_dump(mode="json"), "out": str(out)}
        self.run = client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    def work(self) -> str:
        """Go on with the run to where its process would end; the state then."""
        with contextlib.suppress(Pause):
            run = self.client.read_flow_run(self.run)
            self.client.set_flow_run_state(run.id, Pending())
            run_flow(
                release, flow_run=self.client.read_flow_run(self.run), parameters=run.parameters, return_type="state"
            )
        return str(self.client.read_flow_run(self.run).state_name)

    def answer(self, given: dict[str, Any]) -> None:
        told = self.client.resume_flow_run(self.run, given)
        assert told.status.value == "ACCEPT", told

    def tasks(self) -> list[str]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        found = self.client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[self.run])))
        return sorted(task.name for task in found)


@pytest.mark.e2e
def test_a_run_of_a_worker_suspends_itself_and_publishes_what_was_shown(
    prefect_url: str, tiny_llama: Path, tame_home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place = Place(tmp_path, prefect_url)
    publish = {"to": "folder", "approve": True}
    recipe = load_recipe(place.recipe(tiny_llama, variants=BOTH, publish=publish, evaluate=QUICK))
    settings = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        worker = Worker(client, recipe, out)
        assert worker.work() == "Suspended"
        waiting = json.loads((out / "result.json").read_text())
        assert {v["status"] for v in waiting["variants"]} == {"passed"}
        assert not (out / "published").exists()
        [text] = _inputs(client, worker, "description")
        assert "nobody answers until" in text
        [artifact] = [a for a in _artifacts(client, worker) if a["key"] == "tiny-nf4-card"]
        assert "```yaml" in artifact["data"]
        made = worker.tasks()

        worker.answer({"publish": ["nf4"], "note": "as discussed"})
        assert worker.work() == "Partly rejected"
        assert set(worker.tasks()) - set(made) == {"publish nf4"}  # nothing was made again
        result = json.loads((out / "result.json").read_text())
        assert {v["name"]: v["status"] for v in result["variants"]} == {"int8": "rejected", "nf4": "published"}
        assert result["approval"]["note"] == "as discussed"
        published = Path(result["variants"][1]["published"])
        assert problems_in_folder(published) == []
        told = json.loads((published / "tame.json").read_text())
        assert told["artifact"]["files"] == waiting["variants"][1]["artifact"]["files"]
        head, _, body = (published / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
        assert artifact["data"] == f"{body}\nIts metadata:\n\n```yaml\n{head}\n```\n"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("hours", "said"),
    [("168", "a person answered, and nothing was chosen to be published"), ("0.0002", "nobody approved it in time")],
    ids=["a person", "the server, which does so when the time is over"],
)
def test_an_empty_form_says_whether_somebody_has_sent_it(
    hours: str,
    said: str,
    prefect_url: str,
    tiny_llama: Path,
    tame_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAME_APPROVAL_HOURS", hours)
    sections = {"publish": {"to": "folder", "approve": True}, "evaluate": None}
    recipe = load_recipe(Place(tmp_path, prefect_url).recipe(tiny_llama, **sections))
    settings = {PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        worker = Worker(client, recipe, tmp_path / "out")
        assert worker.work() == "Suspended"
        worker.answer({})
        assert worker.work() == "Rejected"
        state = client.read_flow_run(worker.run).state
        assert state is not None
        assert state.message == f"Rejected: nf4 ({said})"


def _inputs(client: SyncPrefectClient, worker: Worker, kind: str) -> list[str]:
    run = client.read_flow_run(worker.run)
    assert run.state
    key = (run.state.state_details.run_input_keyset or {})[kind]
    return [json.loads(client.request("GET", f"/flow_runs/{worker.run}/input/{key}").text)]


def _artifacts(client: SyncPrefectClient, worker: Worker) -> list[dict[str, Any]]:
    wanted = {"artifacts": {"flow_run_id": {"any_": [str(worker.run)]}}}
    found: list[dict[str, Any]] = client.request("POST", "/artifacts/filter", json=wanted).json()
    return found

"""What Prefect's server does about dead runs: a real server, runs that are moved by its API as a worker moves them."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID, uuid4

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events import Event
from prefect.events.clients import PrefectEventsClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Failed, Pending, Running, State, Suspended
from prefect.utilities.asyncutils import run_coro_as_sync

from infra.automations import ATTEMPTS, create_automations

DEAD_AFTER = 10


@pytest.fixture(scope="module")
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    """A server with our automations; deleted afterwards, for the tests that share it."""
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        create_automations(DEAD_AFTER, answer_within=DEAD_AFTER)
        yield client
        for automation in client.read_automations():
            client.delete_automation(automation.id)


def deployed(client: SyncPrefectClient, flow: str = "release") -> FlowRun:
    deployment = client.create_deployment(client.create_flow_from_name(flow), f"test-{uuid4()}")
    return client.create_flow_run_from_deployment(deployment)


def move(client: SyncPrefectClient, run: FlowRun, *states: State) -> None:
    for state in states:
        client.set_flow_run_state(run.id, state)


def wait(
    client: SyncPrefectClient, run: FlowRun, name: str, seconds: float = 30, alive: FlowRun | None = None
) -> FlowRun:
    """Until `run` is in the state `name`; `alive` sends its heartbeats meanwhile."""
    end = time.monotonic() + seconds
    while (found := client.read_flow_run(run.id)).state_name != name and time.monotonic() < end:
        time.sleep(0.1)
        if alive is not None:
            beat(client, alive)
    assert found.state_name == name, [(state.name, state.message) for state in client.read_flow_run_states(run.id)]
    return found


def beat(client: SyncPrefectClient, run: FlowRun) -> None:
    """A heartbeat as a run's process sends it (prefect/flow_engine.py)."""
    related = [{"prefect.resource.id": f"prefect.flow.{run.flow_id}", "prefect.resource.role": "flow"}]
    related[0]["prefect.resource.name"] = client.read_flow(run.flow_id).name
    if run.deployment_id:
        related.append({"prefect.resource.id": f"prefect.deployment.{run.deployment_id}"})
        related[1]["prefect.resource.role"] = "deployment"
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
    event = Event(event="prefect.flow-run.heartbeat", resource=resource, related=related)

    async def send() -> None:
        async with PrefectEventsClient() as events:
            await events.emit(event)

    run_coro_as_sync(send())


def names(client: SyncPrefectClient, run: FlowRun) -> list[str]:
    return [state.name or "" for state in client.read_flow_run_states(run.id)]


def test_a_run_without_heartbeats_is_crashed_and_scheduled_again(client: SyncPrefectClient) -> None:
    dead, alive, done, other = deployed(client), deployed(client), deployed(client), deployed(client, "somebody-elses")
    never_began = deployed(client)
    move(client, never_began, Pending())
    unanswered = deployed(client)  # its process ends, and with it the heartbeats
    move(client, unanswered, Pending(), Running())
    beat(client, unanswered)
    move(client, unanswered, Suspended(timeout_seconds=None, pause_key="approval"))
    for run in (dead, alive, done, other):
        move(client, run, Pending(), Running())
        beat(client, run)
    move(client, done, Completed())
    for _ in range(DEAD_AFTER // 2 + 2):
        time.sleep(2)
        beat(client, alive)
    wait(client, dead, "AwaitingRetry", alive=alive)
    wait(client, never_began, "AwaitingRetry", alive=alive)
    assert names(client, dead)[-3:] == ["Running", "Crashed", "AwaitingRetry"]
    assert "No heartbeat for 10 seconds" in (client.read_flow_run_states(dead.id)[-2].message or "")
    assert client.read_flow_run(alive.id).state_name == "Running"
    assert client.read_flow_run(done.id).state_name == "Completed"
    assert client.read_flow_run(other.id).state_name == "Running"  # not ours to judge
    wait(client, unanswered, "Resuming")  # with nothing filled in: that is a no
    assert names(client, unanswered)[-3:] == ["Running", "Suspended", "Resuming"]


def test_a_crashed_run_is_started_again_up_to_a_limit(client: SyncPrefectClient) -> None:
    run = deployed(client)
    for attempt in range(1, ATTEMPTS):
        move(client, run, Pending(), Running(), Crashed(message="SIGKILL"))
        assert wait(client, run, "AwaitingRetry").run_count == attempt
    move(client, run, Pending(), Running(), Crashed(message="SIGKILL"))
    given_up = wait(client, run, "Failed")
    assert given_up.run_count == ATTEMPTS
    assert f"crashed {ATTEMPTS} times and is not started again" in (given_up.state.message or "")
    assert names(client, run).count("AwaitingRetry") == ATTEMPTS - 1


@pytest.mark.e2e
def test_each_of_several_crashes_at_once_is_answered_once(client: SyncPrefectClient) -> None:
    runs = [deployed(client) for _ in range(8)]
    for run in runs:
        move(client, run, Pending(), Running(), Crashed(message="SIGKILL"))
    for run in runs:
        wait(client, run, "AwaitingRetry", 60)
    for run in runs:
        after = names(client, run)[3:]  # on a busy machine, the silence of those that wait is noticed, too
        assert after in (["Crashed", "AwaitingRetry"] * n for n in range(1, 9)), after


def test_a_run_that_crashes_before_it_begins_is_started_again_once(client: SyncPrefectClient) -> None:
    run = deployed(client)
    move(client, run, Pending(), Crashed(message="exit code 1"))
    wait(client, run, "AwaitingRetry")
    move(client, run, Pending(), Crashed(message="exit code 1"))
    time.sleep(3)
    assert client.read_flow_run(run.id).state_name == "Crashed"


def test_a_failed_run_is_not_started_again(client: SyncPrefectClient) -> None:
    run = deployed(client)
    move(client, run, Pending(), Running(), Failed(message="no such repo"))
    time.sleep(2)
    assert names(client, run)[-1] == "Failed"


def test_creating_them_again_changes_nothing_and_drops_those_of_an_older_version(client: SyncPrefectClient) -> None:
    first = {automation.name: automation for automation in client.read_automations()}
    create_automations(DEAD_AFTER, DEAD_AFTER)
    again = {automation.name: automation for automation in client.read_automations()}
    assert again == first
    assert len(first) == 5  # without a block to notify


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server, and the bodies that were posted to it."""
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/in?key=verysecret", bodies
    server.shutdown()


def test_people_are_told_of_failures_and_rejections_through_every_block_of_that_name(
    client: SyncPrefectClient, listener: tuple[str, list[str]]
) -> None:
    url, bodies = listener
    blocks: list[UUID] = []
    form = {"text": "{{subject}}: {{body}}"}
    blocks.append(CustomWebhookNotificationBlock(name="n", url=url, json_data=form).save("tame-notify"))
    blocks.append(Webhook(url=url, allow_private_urls=True).save("tame-notify"))
    create_automations(DEAD_AFTER, DEAD_AFTER)
    failed, rejected, partly, crashed = deployed(client), deployed(client), deployed(client), deployed(client)
    move(client, failed, Pending(), Running(), Failed(message='nf4: "no" space'))
    move(client, rejected, Pending(), Running(), Completed(name="Rejected", message="the gate rejected nf4"))
    move(client, partly, Pending(), Running(), Completed(name="Partly rejected", message="int8 was published"))
    move(client, crashed, Pending(), Running(), Crashed(message="SIGKILL"))
    end = time.monotonic() + 120
    while len(bodies) < 6 and time.monotonic() < end:
        time.sleep(0.1)
    texts = [body for body in bodies if "text" in json.loads(body)]
    news = [json.loads(body) for body in bodies if "flow" in json.loads(body)]
    news.sort(key=lambda new: str(new["state"]))
    assert [(new["flow"], new["state"], new["message"]) for new in news] == [
        ("release", "Failed", 'nf4: "no" space'),
        ("release", "Partly rejected", "int8 was published"),
        ("release", "Rejected", "the gate rejected nf4"),
    ]
    assert news[0]["run"] == failed.name
    assert len(texts) == 3
    assert any('"no" space' in json.loads(text)["text"] for text in texts)
    assert "verysecret" not in "".join(automation.model_dump_json() for automation in client.read_automations())
    for block in blocks:
        client.delete_block_document(block)
    create_automations(DEAD_AFTER, DEAD_AFTER)
    assert len(client.read_automations()) == 5

"""What Prefect's server does by itself about runs of ours: notices the dead, starts them again, and tells people."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from configs.settings import approval_time

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

FLOWS = ["release", "quantize", "watch", "sweep", "prefetch"]
HEARTBEAT = 30
"""Seconds between the heartbeats of a run (PREFECT_FLOWS_HEARTBEAT_FREQUENCY of its worker); Prefect takes no less."""
DEAD_AFTER = 180
"""Seconds without a heartbeat, also before the first, after which a run counts as dead. A server that was away for
longer sees the same: it starts each running run again, which goes on from its artifacts."""
ATTEMPTS = 4
"""Times that a run is started in all, if its machine or its process dies each time."""
NOTIFY = "tame-notify"
"""The name of the blocks that notifications go to: Slack, Teams, mail, webhook, …; none, no notification."""

HEARTBEATS = "prefect.flow-run.heartbeat"
TAKEN = "prefect.flow-run.Pending"
"""A worker has taken the run, and its process starts."""
# The ends that no other automation reacts to. On SQLite, Prefect 3.8 often fails to count an expected event of a state
# ("database is locked"); then it hands the event to no automation, or to some of them again and again, and holds back
# what follows it: of 20 runs that crashed at once 13 were started again, most of them four times. An end that was not
# counted is harmless: what has ended cannot be marked as crashed.
ENDS = [f"prefect.flow-run.{name}" for name in ("Completed", "Cached", "Unchanged", "Cancelled", "Suspended")]
REJECTED = {"prefect.flow-run.Rejected", "prefect.flow-run.Partly rejected"}
"""The gate, or a person, turned down all variants, or some."""
ASKS, ANSWERED = "prefect.flow-run.Suspended", "prefect.flow-run.Resuming"
"""A run waits for somebody's approval; it was given, or refused."""


def create_automations(dead_after: int = DEAD_AFTER, answer_within: float | None = None) -> None:
    """Create the automations of a server, or bring them up to date: to be called again after a new `tame-notify` block.

    Args:
        dead_after: Seconds without a heartbeat after which a run is dead; at least two heartbeats.
        answer_within: Seconds after which an approval that nobody gave is a no; None: TAME_APPROVAL_HOURS.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        existing = {automation.name: automation.id for automation in client.read_automations(limit=200)}
        within = int(approval_time().total_seconds() if answer_within is None else answer_within)
        wanted = [*_restarts(dead_after), _no_answer(within), *_notifications(client)]
        for automation in wanted:
            if automation.name in existing:
                client.update_automation(existing[automation.name], automation)
            else:
                client.create_automation(automation)
        for name in sorted(existing.keys() - {automation.name for automation in wanted}):
            if name.startswith("tame: "):  # its block is gone, or an older version of tame made it
                client.delete_automation(existing[name])


def _restarts(dead_after: int) -> list["AutomationCore"]:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState

    dead = ChangeFlowRunState(
        name=None,
        state=StateType.CRASHED,
        message=f"No heartbeat for {dead_after} seconds: its worker died, or was cut from the network",
    )
    again = ChangeFlowRunState(
        name="AwaitingRetry",
        state=StateType.SCHEDULED,
        message="Started again after a crash; what was finished is taken from the artifacts",
    )
    given_up = ChangeFlowRunState(
        name=None,
        state=StateType.FAILED,
        message=f"It crashed {ATTEMPTS} times and is not started again; the states before this one say how. "
        "When the cause is gone, use Retry",
        force=True,
    )
    crashed = {"prefect.flow-run.Crashed"}
    counts = [str(count) for count in range(100)]
    return [
        _automation(
            "a run without heartbeats has crashed",
            _silence({TAKEN, HEARTBEATS}, dead_after, {HEARTBEATS, *ENDS}),
            [dead],
        ),
        _automation(
            "a crashed run is started again",
            _event(crashed, {"prefect.run-count": counts[1:ATTEMPTS]}),
            [again],
        ),
        # Prefect counts a run when it begins. One that crashes before that, as with a broken installation, would be
        # started for ever: here it is once an hour at the most.
        _automation(
            "a run that crashed before it began is started again",
            _event(crashed, {"prefect.run-count": "0"}, within=timedelta(hours=1)),
            [again],
        ),
        _automation(
            f"a run that crashed {ATTEMPTS} times has failed",
            _event(crashed, {"prefect.run-count": counts[ATTEMPTS:]}),
            [given_up],
        ),
    ]


def _no_answer(seconds: int) -> "AutomationCore":
    """A run whose approval nobody gave goes on, with nothing filled in: that is a no, which it logs like any other."""
    from prefect.events.actions import ResumeFlowRun

    ends = {ANSWERED, "prefect.flow-run.Cancelled", "prefect.flow-run.Cancelling"}
    resume = ResumeFlowRun(
        type="resume-flow-run"
    )  # updating leaves out what was not given, and then it would do nothing
    return _automation("an approval that nobody gives is a no", _silence({ASKS}, seconds, ends), [resume])


def _notifications(client: "SyncPrefectClient") -> list["AutomationCore"]:
    """One for each kind of news, with an action for each block that is called `tame-notify`."""
    from prefect.events.actions import CallWebhook, SendNotification

    blocks = client.request(
        "POST",
        "/block_documents/filter",
        json={"block_documents": {"name": {"any_": [NOTIFY]}}, "include_secrets": False},
    ).json()
    actions: list[Any] = []
    for block in blocks:
        if "notify" in block["block_schema"]["capabilities"]:
            subject = "tame: {{ flow_run.name }} {{ flow_run.state.name | lower }}"
            body = "{{ flow_run.state.message }}\n{{ (flow_run | ui_url) or '' }}"
            actions.append(SendNotification(block_document_id=block["id"], subject=subject, body=body))
        elif block["block_type"]["slug"] == "webhook":
            payload = (
                '{"flow": {{ flow.name | tojson }}, "run": {{ flow_run.name | tojson }}, '
                '"state": {{ flow_run.state.name | tojson }}, "message": {{ flow_run.state.message | tojson }}, '
                '"url": {{ flow_run | ui_url | tojson }}}'
            )
            actions.append(CallWebhook(block_document_id=block["id"], payload=payload))
    if not actions:
        return []
    failed = {"prefect.flow-run.Failed", "prefect.flow-run.TimedOut"}
    return [
        _automation("people are told of a failure", _event(failed, {}), actions),
        _automation("people are told of a question", _event({ASKS}, {}), actions),
        _automation("people are told of a rejection", _event(REJECTED, {}), actions),
    ]


def _automation(name: str, trigger: Any, actions: list[Any]) -> "AutomationCore":
    from prefect.events.schemas.automations import AutomationCore

    return AutomationCore(
        name=f"tame: {name}", trigger=trigger, actions=actions, description="Made by `tame provision`"
    )


def _event(expect: set[str], labels: dict[str, Any], within: timedelta = timedelta(0)) -> Any:
    """One of `expect` happens to a run whose labels are `labels`; again only after `within`."""
    from prefect.events.schemas.automations import EventTrigger, Posture

    return EventTrigger(
        expect=expect,
        match={"prefect.resource.id": "prefect.flow-run.*", **labels},
        match_related=_ours(),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=within,
    )


def _silence(after: set[str], seconds: int, expect: set[str]) -> Any:
    """One of `after` happened to a run, and then none of `expect` for `seconds`."""
    from prefect.events.schemas.automations import EventTrigger, Posture

    return EventTrigger(
        after=after,
        expect=expect,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_ours(),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _ours() -> list[Any]:
    """Runs of tame's deployments: one of `tame run` has no deployment, and cannot be started elsewhere."""
    return [
        {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS},
        {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"},
    ]

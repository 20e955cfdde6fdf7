"""Asking a person what is to be published: in Prefect, where the run waits without a process, or on this terminal.

A run that a worker has started suspends itself: its process ends, and the worker takes the next run. Prefect's page shows the
question and a form; when it is answered, a worker starts the run again, which goes on from what it has kept. If nobody answers
in time, an automation of the server (infra/automations.py) resumes the run with an empty form, and that is a no.
"""

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, WithJsonSchema, create_model

from configs.schema import Recipe
from configs.settings import approval_time
from tasks.publish.approval import Shown, keep, question
from tasks.report.terminal import closing
from tasks.result import write_file
from tasks.runtime import progress
from tasks.runtime.progress import say
from tasks.values import Answer

if TYPE_CHECKING:
    from prefect.input import RunInput

log = logging.getLogger("tame.release")


class Links(NamedTuple):
    """Where what is shown can be read, in Markdown."""

    report: str
    cards: dict[str, str]
    """By the variants' labels."""


def suspended(shown: Shown, show: Callable[[], Links]) -> Answer:
    """Suspend this flow run until somebody has answered, and return the answer in the process that goes on with it.

    Args:
        shown: What is asked about.
        show: Shows it in every place where people look, and tells where that is.

    Raises:
        Pause: the run is suspended now; this process ends. TameError: the store cannot be written.
    """
    from prefect.flow_runs import suspend_flow_run
    from prefect.runtime import flow_run

    key, run = f"approval-{shown.digest[:16]}", str(flow_run.get_id())
    text = ""
    if not _asked(run, key):
        keep(run, shown)
        links = show()
        until = datetime.now(UTC) + approval_time()
        text = question(
            shown, links.report, links.cards, f"If nobody answers until {until:%Y-%m-%d %H:%M} UTC, that is a no."
        )
        log.info("Waiting for somebody to approve %s in Prefect", ", ".join(shown.targets))
    given: Any = suspend_flow_run(wait_for_input=form(shown).with_initial_data(description=text), key=key)
    answer = Answer(
        variants=list(given.publish),
        private=getattr(given, "private", shown.result.recipe.publish.private),
        note=given.note.strip(),
        answered=bool(given.model_fields_set) or _in_time(run),
    )
    if answer.variants:
        log.info("Approved: %s%s", ", ".join(answer.variants), f" ({answer.note})" if answer.note else "")
    else:
        log.info("Nothing is published: %s", answer.no)
    return answer


def form(shown: Shown) -> "type[RunInput]":
    """What Prefect's page asks for. Nothing filled in is a no."""
    from prefect.input import RunInput

    # An enum of one is a const for Pydantic, which Prefect's page offers nothing to choose from.
    one: Any = Annotated[Literal[tuple(shown.targets)], WithJsonSchema({"enum": [*shown.targets], "type": "string"})]
    fields: dict[str, Any] = {
        "publish": (
            list[one],
            Field([], title="Publish", description="Choose variants. If you choose none, nothing is published."),
        ),
        "note": (str, Field("", title="Note", description="Say why; it is kept with the result.", max_length=1000)),
    }
    if shown.result.recipe.publish.to == "hub":
        private = Field(shown.result.recipe.publish.private, title="Private", description="Off makes the repos public.")
        fields["private"] = (bool, private)
    made: type[RunInput] = create_model("Approval", __base__=RunInput, **fields)
    return made


def on_terminal(shown: Shown, folder: Path) -> Answer:
    """Ask on this terminal; the cards are written below `folder`. Ctrl-D is a no; what is not understood is asked again.

    Raises:
        TameError: a card cannot be written.
    """
    progress.begin("")
    publish = shown.result.recipe.publish
    say(closing(shown.result, folder, progress.width(), colour=sys.stderr.isatty()))
    say("What would be published:")
    for label, target in shown.targets.items():
        card = write_file(folder / "to-approve" / label / "README.md", shown.documents[label]["README.md"].decode())
        say(f"  {label} to {target}; its card: {card}")
    try:
        variants = _chosen(list(shown.targets))
        private = _private(publish.private) if variants and publish.to == "hub" else publish.private
        note = _ask("A note, kept with the result: ")
    except EOFError:
        say("")
        return Answer(variants=[], private=True, answered=False)
    return Answer(variants=variants, private=private, note=note)


def refusal(recipe: Recipe) -> str | None:
    """Why a run of `recipe` in this process could not be approved; None if it can, or need not."""
    if not recipe.publish.approve or (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return (
        "publish.approve is true, and nobody can be asked, as this is no terminal; start it on a server's worker (tame up), on a "
        "terminal, or with --set publish.approve=false"
    )


def _chosen(labels: list[str]) -> list[str]:
    while True:
        given = _ask(f"Publish which? {', '.join(labels)}; all or none [none] ").replace(",", " ").split()
        if given in ([], ["none"]):
            return []
        if given == ["all"]:
            return labels
        if not (unknown := set(given) - set(labels)):
            return [label for label in labels if label in given]
        say(f"There is no {min(unknown)} to publish; give names of {', '.join(labels)}, or all, or none.")


def _private(default: bool) -> bool:
    while True:
        given = _ask(f"Private or public? [{'private' if default else 'public'}] ").lower()
        if given in ("", "private", "public"):
            return given == "private" if given else default
        say("Say private or public.")


def _ask(what: str) -> str:
    """A line from the terminal; asked for where tame says things, as standard output is for results."""
    sys.stderr.write(what)
    sys.stderr.flush()
    return input().strip()


def _in_time(run: str) -> bool:
    """Whether a run went on before the time was over after which the server resumes it by itself: an empty form from a person, who
    has sent it without choosing, is the same as the server's."""
    from uuid import UUID

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(UUID(run)), key=lambda state: state.timestamp)
    last = max(rank for rank, state in enumerate(states) if state.is_paused())
    waited = states[last + 1].timestamp - states[last].timestamp
    return bool(waited < approval_time())


def _asked(run: str, key: str) -> bool:
    """Whether this run has asked for just this before: Prefect keeps the keys of what it has suspended for."""
    from uuid import UUID

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return key in (client.read_flow_run(UUID(run)).empirical_policy.pause_keys or ())

"""How long work is shown: a bar in a terminal, a line now and then in a log, a progress artifact in Prefect."""

import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from uuid import UUID

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`, as often as convenient; `done == total` ends it."""

log = logging.getLogger("tame.progress")

LOG_EVERY = 15.0
ARTIFACT_EVERY = 2.0
BAR_EVERY = 0.1

_last: dict[tuple[str, str], float] = {}
_artifact: ContextVar[tuple[str, UUID] | None] = ContextVar("_artifact", default=None)


def show(what: str, done: int, total: int) -> None:
    """Show that `done` of `total` units of `what` are finished, in every place that somebody may be looking."""
    last = done >= total
    if sys.stderr.isatty():
        if _due("bar", what, BAR_EVERY) or last:
            _bar(what, done, total)
    elif _due("log", what, LOG_EVERY, at_first=False) and not last:
        log.info("%s: %d %%", what, 100 * done // max(total, 1))
    if _due("artifact", what, ARTIFACT_EVERY, at_first=False) or (last and _artifact.get()):
        _update_artifact(what, 100.0 * done / max(total, 1))
    if last:
        for place in ("bar", "log", "artifact"):
            _last.pop((place, what), None)


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def _due(place: str, what: str, every: float, at_first: bool = True) -> bool:
    now = time.monotonic()
    before = _last.get((place, what))
    if before is None:
        _last[place, what] = now
        return at_first
    if now - before < every:
        return False
    _last[place, what] = now
    return True


def _bar(what: str, done: int, total: int) -> None:
    filled = 30 * done // max(total, 1)
    line = f"\r\x1b[2K{what}  {'━' * filled}{' ' * (30 - filled)} {100 * done // max(total, 1):3d} %"
    # A finished bar is wiped: the line that says what came of it is printed by the stage.
    sys.stderr.write("\r\x1b[2K" if done >= total else line)
    sys.stderr.flush()


def _update_artifact(what: str, percent: float) -> None:
    if "prefect" not in sys.modules:
        return
    from prefect.artifacts import create_progress_artifact, update_progress_artifact
    from prefect.context import TaskRunContext

    if TaskRunContext.get() is None:
        return
    known = _artifact.get()
    try:
        if known is None or known[0] != what:
            made: Any = create_progress_artifact(progress=percent, description=what)
            _artifact.set((what, made))
        else:
            update_progress_artifact(artifact_id=known[1], progress=percent)
    except Exception as error:  # a progress bar is never worth a release
        log.debug("no progress artifact for %s: %s", what, error)

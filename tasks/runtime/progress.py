"""Shows the progress of slow work: a line below all others in a terminal, a line now and then in a log, an artifact in Prefect.

What is said stays: only the line at the bottom changes. It says what is worked on, how far it is, and about how long it will
still take.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from uuid import UUID

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`, as often as convenient; `done == total` ends it."""

log = logging.getLogger("tame.progress")

LOG_EVERY = 15.0
ARTIFACT_EVERY = 2.0
DRAWN_EVERY = 0.2
BAR = 20
"""Characters."""

_last: dict[tuple[str, str], float] = {}
_artifact: ContextVar[tuple[str, UUID] | None] = ContextVar("_artifact", default=None)


def show(what: str, done: int, total: int) -> None:
    """Show that `done` of `total` units of `what` are finished, in every place that somebody may be looking."""
    last = done >= total
    if is_terminal():
        _bottom.advance(what, done, max(total, 1))
    elif _due("log", what, LOG_EVERY, at_first=False) and not last:
        log.info("%s: %d %%", what, 100 * done // max(total, 1))
    if _due("artifact", what, ARTIFACT_EVERY, at_first=False) or (last and _artifact.get()):
        _update_artifact(what, 100.0 * done / max(total, 1))
    if last:
        for sink in ("log", "artifact"):
            _last.pop((sink, what), None)


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def say(text: str) -> None:
    """Print a line that stays to the standard error stream, above what changes."""
    _bottom.above(text)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show within this that `what` is being done, and for how long, wherever no bar says more."""
    before = _bottom.stage
    begin(what)
    try:
        yield
    finally:
        begin(before)


def begin(what: str) -> None:
    """Show from now on that `what` is being done; nothing, if it is empty."""
    _bottom.begin(what)


def width() -> int:
    """Columns of the terminal; where there is none, more than anything is long."""
    return shutil.get_terminal_size((10_000, 24)).columns


def is_terminal() -> bool:
    """Whether what is said is read on a screen whose last line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Bottom:
    """The line at the bottom of a terminal, drawn again a few times a second by a thread of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stage, self.began, self.bar_began = "", 0.0, 0.0
        self.bar: tuple[str, int, int] | None = None
        self.drawn = False
        self.drawing = False

    def begin(self, what: str) -> None:
        """Another stage is worked on, or none."""
        with self.lock:
            self.stage, self.began, self.bar = what, time.monotonic(), None
            self._wipe()
            if what and is_terminal() and not self.drawing:
                self.drawing = True
                threading.Thread(target=self._keep_drawing, daemon=True, name="progress").start()

    def advance(self, what: str, done: int, total: int) -> None:
        """So much is done of it."""
        with self.lock:
            if self.bar is None or self.bar[0] != what:
                self.bar_began = time.monotonic()
            self.bar = None if done >= total else (what, done, total)
            if self.bar is None:
                self._wipe()
            elif _due("bar", "", DRAWN_EVERY):
                self._draw()

    def above(self, text: str) -> None:
        """A line that stays."""
        with self.lock:
            self._wipe()
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _keep_drawing(self) -> None:
        while True:
            time.sleep(DRAWN_EVERY)
            with self.lock:
                if not self.stage and self.bar is None:
                    self.drawing = False
                    return
                self._draw()

    def _wipe(self) -> None:
        if self.drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self.drawn = False

    def _draw(self) -> None:
        now, width = time.monotonic(), shutil.get_terminal_size((80, 24)).columns - 1
        if self.bar:
            what, done, total = self.bar
            filled = BAR * done // total
            remaining = (now - self.bar_began) * (total - done) / done if done else 0
            ending = f" {'━' * filled}{'╌' * (BAR - filled)} {100 * done // total:3d} %" + (
                f" {_clock(remaining)} left" if done and now - self.bar_began > 1 else ""
            )
            position, _, name = self.stage.partition(" ")
            text = f"{position} {what}" if what.startswith(name) else f"{self.stage}: {what}"
        else:
            text, ending = self.stage, f" … {_clock(now - self.began)}"
        room = max(width - len(ending), 8)
        text = text if len(text) <= room else text[: room - 1] + "…"
        sys.stderr.write(f"\r\x1b[2K{(text + ending)[:width]}")
        sys.stderr.flush()
        self.drawn = True


_bottom = _Bottom()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _due(sink: str, what: str, every: float, at_first: bool = True) -> bool:
    now = time.monotonic()
    before = _last.get((sink, what))
    if before is None:
        _last[sink, what] = now
        return at_first
    if now - before < every:
        return False
    _last[sink, what] = now
    return True


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

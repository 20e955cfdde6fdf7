"""Trying again and waiting, in one place: how long, how often, and what is said meanwhile."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def doubling(first: float, longest: float) -> Iterable[float]:
    """Pauses without end, in seconds: `first`, and each twice as long as the one before, up to `longest`."""
    pause = first
    while True:
        yield pause
        pause = min(2 * pause, longest)


def retry(
    attempt: Callable[[], T],
    pauses: Iterable[float],
    again: Callable[[Exception], bool],
    before: Callable[[Exception, float, float], float | None] | None = None,
    patience: float | None = None,
) -> T:
    """Call `attempt` until it returns, again after each of `pauses`, and return what it returns.

    Args:
        attempt: What is tried. It must be safe to repeat.
        pauses: Seconds between two attempts. When they are used up, the last error is raised.
        again: Whether an error may be gone at the next attempt. Any other is raised at once.
        before: Called before each pause with the error, the seconds of the pause, and the seconds since the first attempt
            began: to say something, to return other seconds to wait, or to raise something else.
        patience: Seconds after the first attempt began in which another one may begin; None is no limit.

    Raises:
        Exception: the last one of `attempt`.
    """
    started = time.monotonic()
    waits = iter(pauses)
    while True:
        try:
            return attempt()
        except Exception as error:
            pause = next(waits, None)
            spent = time.monotonic() - started
            if pause is None or not again(error) or (patience is not None and spent + pause > patience):
                raise
            asked = before(error, pause, spent) if before else None
        time.sleep(pause if asked is None else asked)


def wait_until(
    condition: Callable[[], bool], patience: float, every: float, otherwise: Callable[[], Exception]
) -> None:
    """Ask `condition` every so many seconds until it holds.

    Args:
        condition: What is waited for. What it raises ends the waiting.
        patience: Seconds after which it is given up.
        every: Seconds between two questions.
        otherwise: Makes the exception that is raised then.

    Raises:
        Exception: what `otherwise` makes, or what `condition` raises.
    """
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise otherwise()
        time.sleep(every)

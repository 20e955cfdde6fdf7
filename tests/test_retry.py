"""Trying again, and waiting."""

import itertools

import pytest

from tasks.runtime.retry import doubling, retry, wait_until


def failing(times: int, error: Exception):
    count = itertools.count(1)

    def attempt() -> int:
        number = next(count)
        if number <= times:
            raise error
        return number

    return attempt


def test_an_attempt_is_made_again_until_it_succeeds_and_each_pause_is_told_before_it() -> None:
    told: list[tuple[str, float]] = []
    made = retry(
        failing(2, OSError("away")),
        (0.0, 0.01, 0.02),
        lambda error: isinstance(error, OSError),
        before=lambda error, pause, spent: told.append((str(error), pause)),
    )
    assert made == 3
    assert told == [("away", 0.0), ("away", 0.01)]


def test_the_last_error_is_raised_when_the_pauses_are_used_up() -> None:
    attempt = failing(9, OSError("away"))
    with pytest.raises(OSError, match="away"):
        retry(attempt, (0.0, 0.0), lambda error: True)
    with pytest.raises(OSError, match="away"):  # three attempts were made: this is the fourth
        attempt()
    assert failing(3, OSError())  # and a fresh one is not affected


def test_another_error_is_raised_at_once() -> None:
    attempt = failing(1, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry(attempt, (0.0,), lambda error: isinstance(error, OSError))
    assert attempt() == 2


def test_no_attempt_begins_after_the_patience() -> None:
    told: list[float] = []
    with pytest.raises(OSError, match="away"):
        retry(
            failing(99, OSError("away")),
            doubling(0.01, 0.02),
            lambda error: True,
            lambda error, pause, spent: told.append(pause),
            patience=0.1,
        )
    assert told[:3] == [0.01, 0.02, 0.02]
    assert sum(told) <= 0.1


def test_what_is_said_before_a_pause_may_end_the_attempts() -> None:
    def refuse(error: Exception, pause: float, spent: float) -> None:
        raise RuntimeError(f"it asks to wait {pause:.0f} s")

    with pytest.raises(RuntimeError, match="it asks to wait 300 s"):
        retry(failing(1, OSError()), (300.0,), lambda error: True, refuse)


def test_a_condition_is_waited_for_and_given_up() -> None:
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), 5.0, every=0.0, otherwise=lambda: TimeoutError("late"))
    with pytest.raises(TimeoutError, match="late"):
        wait_until(lambda: False, 0.02, every=0.005, otherwise=lambda: TimeoutError("late"))

"""What the values of the command line have to be, for argparse: each function refuses what is not that, with what was expected."""

import argparse


def index(text: str) -> int:
    """The number of a device, counted from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 is the first")
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def days(text: str) -> float:
    """A number of days, 0 or more."""
    return _number(text, "a number of days, 0 or more")


def limit(text: str) -> float:
    """A number of nats, 0 or more."""
    return _number(text, "a number of nats, 0 or more, such as 0.1")


def _number(text: str, expected: str) -> float:
    """A finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return number

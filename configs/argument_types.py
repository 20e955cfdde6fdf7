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


def fit(text: str) -> dict[str, float | str]:
    """A limit that a variant is fitted to, as the recipe has it: max_mean_kl=X or max_bytes=X."""
    name, _, value = text.partition("=")
    if name == "max_mean_kl":
        return {name: _number(value, "max_mean_kl=X, X in nats, such as 0.05")}
    if name == "max_bytes":
        return {name: value}
    raise argparse.ArgumentTypeError(f"{text!r}: expected max_mean_kl=X, such as 0.05, or max_bytes=X, such as 1.2GB")


def _number(text: str, expected: str) -> float:
    """A finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return number
